"""The probability that an entry answers, from all that is known of the two: fitted on validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.artifact.run_folder import load_json, save_json
from finetune.data.ranking import COSINE_SCALE
from finetune.errors import ResourceError

Numbers = npt.NDArray[np.float64]

EPSILON = 1e-6
FOLDS = 5


@dataclass(frozen=True, slots=True)
class Relevance:
    """A logistic regression on the evidence for an entry; as it stands, the model's second look alone."""

    intercept: float = 0.0
    cosine: float = 0.0
    share: float = 0.0
    words: float = 0.0
    asked: float = 0.0
    reread: float = 1.0
    unlinked: Relevance | None = None
    """The same without `asked`, for entries that no training message asked for; None where they are weighed alike."""

    def compute_probabilities(self, evidence: Numbers) -> Numbers:
        """In [0, 1], (n,), from evidence (n, 5)."""
        weights = np.array([self.cosine, self.share, self.words, self.asked, self.reread])
        return np.asarray(1 / (1 + np.exp(-np.clip(self.intercept + evidence @ weights, -50, 50))))


def compute_shares(cosines: npt.ArrayLike) -> Numbers:
    """The share of each entry in the softmax over all, (E,), from a question's cosines with them, (E,)."""
    scaled = COSINE_SCALE * np.asarray(cosines, dtype=np.float64)
    weights = np.exp(scaled - scaled.max())
    return np.asarray(weights / weights.sum())


def collect_evidence(
    cosines: npt.ArrayLike, words: npt.ArrayLike, asked: npt.ArrayLike, first: npt.ArrayLike, reread: npt.ArrayLike
) -> Numbers:
    """What speaks for some entries, (n, 5).

    Args:
        cosines: of the question with all entries, (E,).
        words: BM25 scores of all entries, (E,).
        asked: how likely the question's intents ask for these entries, as logarithms, (n,).
        first: numbers of the entries, (n,).
        reread: the probability that the model gives each of them when it reads it with the question, (n,).

    Returns:
        The cosine; the log of the entry's share in the softmax over all; its BM25 score against the best one's; `asked`
        as it is; the log odds of the second look.
    """
    chosen = np.asarray(first)
    known, scores = np.asarray(cosines, dtype=np.float64), np.asarray(words, dtype=np.float64)
    shares = np.log(np.maximum(compute_shares(known)[chosen], np.finfo(float).tiny))
    odds = np.clip(np.asarray(reread, dtype=np.float64), EPSILON, 1 - EPSILON)
    relative = scores[chosen] / max(scores.max(), EPSILON)
    return np.column_stack([known[chosen], shares, relative, np.asarray(asked), np.log(odds / (1 - odds))])


def fit_relevance(evidence: Sequence[Numbers], right: Sequence[npt.NDArray[np.bool_]]) -> Relevance:
    """Logistic regression over the candidates of validation questions.

    The second look takes longer than all else of a reply, and stays only if it helps: its weight is 0 unless the log
    loss of questions that were not fitted on is smaller with it, by more than one standard error.

    Args:
        evidence: of each question's candidates, (n, 5).
        right: whether each of them answers, (n,).

    Returns:
        The fit, with one for entries without links; the second look alone where all candidates are right, or none.
    """
    known, truth = np.concatenate(list(evidence)), np.concatenate(list(right))
    if truth.all() or not truth.any():
        return Relevance()
    without = known * [1, 1, 1, 1, 0]
    question = np.repeat(np.arange(len(right)), [len(answers) for answers in right])
    gains = _compute_losses(without, truth, question) - _compute_losses(known, truth, question)  # (questions,)
    helps = len(gains) < FOLDS or gains.mean() > gains.std(ddof=1) / np.sqrt(len(gains))
    weighed = known if helps else without
    return replace(_fit(weighed, truth), unlinked=_fit(weighed * [1, 1, 1, 0, 1], truth))


def _fit(evidence: Numbers, truth: npt.NDArray[np.bool_]) -> Relevance:
    fitted = _build_regression().fit(evidence, truth)
    intercept, cosine, share, words, asked, reread = map(float, (fitted.intercept_[0], *fitted.coef_[0]))
    return Relevance(intercept, cosine, share, words, asked, reread)


def _build_regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10.0, max_iter=1000)


def _compute_losses(evidence: Numbers, truth: npt.NDArray[np.bool_], question: npt.NDArray[np.int64]) -> Numbers:
    """Mean log loss of each question's candidates, (questions,), by a fit without it; zeros where all that is left to
    fit on is right, or nothing."""
    losses = np.zeros(len(truth))
    for fold in range(FOLDS):
        own = question % FOLDS == fold
        if own.any() and truth[~own].any() and not truth[~own].all():
            found = _build_regression().fit(evidence[~own], truth[~own]).predict_proba(evidence[own])[:, 1]
            losses[own] = -np.log(np.clip(np.where(truth[own], found, 1 - found), EPSILON, 1))
    return np.bincount(question, losses) / np.bincount(question)


def save_relevance(path: Path, relevance: Relevance) -> None:
    """Write it as JSON."""
    save_json(path, asdict(relevance))


def load_relevance(path: Path) -> Relevance:
    """Read what `save_relevance` wrote.

    Raises:
        ResourceError: the file is missing, or does not hold its six numbers, once or twice.
    """
    if not path.is_file():
        raise ResourceError(f"{path}: must hold how entries are weighed, got nothing there. Build the assistant again.")
    return _read(load_json(path), path)


def _read(found: object, path: Path) -> Relevance:
    names = [name for name in Relevance.__slots__ if name != "unlinked"]
    found = {"unlinked": None, **found} if isinstance(found, dict) else {}  # older runs have the six numbers alone
    unlinked = found.pop("unlinked")
    if sorted(found) != sorted(names) or not all(isinstance(value, int | float) for value in found.values()):
        raise ResourceError(f"{path}: must hold the numbers {', '.join(names)}, got {found}.")
    return Relevance(**found, unlinked=None if unlinked is None else _read(unlinked, path))
