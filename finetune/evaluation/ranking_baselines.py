"""What a tuned ranking must beat: shared words, the frozen base, and both together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from finetune.data.ranking import LexicalIndex, Scores, fuse_rankings
from finetune.errors import DivergedError
from finetune.evaluation.metrics import Ints

Rankings = npt.NDArray[np.float32]
"""Scores of E entries for N questions, (N, E); higher is better."""


def compute_ranking_baselines(
    names: Sequence[str],
    questions: Sequence[str],
    passages: Sequence[str],
    embed: Callable[[], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]],
) -> dict[str, Rankings]:
    """Score every passage for every question; nothing is fitted.

    Args:
        names: Out of `bm25`, `frozen` and `fused`, which is the reciprocal rank fusion of the two.
        questions: N texts.
        passages: E texts.
        embed: Gives the frozen base's embeddings of questions (N, D) and passages (E, D), of length 1; called only if
            they are needed.
    """
    rankings: dict[str, Rankings] = {}
    if {"bm25", "fused"} & set(names):
        index = LexicalIndex(passages)
        rankings["bm25"] = np.stack([index.compute_scores(question) for question in questions])
    if {"frozen", "fused"} & set(names):
        asked, known = embed()
        rankings["frozen"] = asked @ known.T
    if "fused" in names:
        # What shares no word follows by meaning: its place in the file says nothing.
        words = np.where(rankings["bm25"] > 0, rankings["bm25"], rankings["frozen"] - 2)
        rankings["fused"] = np.stack(
            [fuse_rankings(list(rows)) for rows in zip(words, rankings["frozen"], strict=True)]
        )
    return {name: rankings[name] for name in names}


def find_places(scores: Scores, right: Sequence[int] | Ints) -> Ints:
    """The places of the right entries in the ranking of one question, from 1, the first one first.

    Args:
        scores: (E,). Of equal scores a wrong entry comes first, so that what cannot be told apart is no success.
        right: Numbers of entries.

    Raises:
        DivergedError: a score is nan, which no comparison finds better than another.
    """
    if broken := int(np.isnan(scores).sum()):
        raise DivergedError(
            f"ranking: scores must be numbers, got nan for {broken} of {len(scores)} entries. Lower "
            "train.learning_rate, or set train.precision: float32."
        )
    chosen = np.sort(scores[np.asarray(right)])[::-1]
    before = np.array([np.count_nonzero(scores >= score) for score in chosen])  # (R,)
    before -= (chosen[None] >= chosen[:, None]).sum(axis=1)  # those that are right
    places: Ints = before + np.arange(1, len(chosen) + 1)
    return places
