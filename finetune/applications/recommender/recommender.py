"""From histories to ranked lists, in the way that the run was judged.

Shapes: I items, R histories of a chunk, D width of the sequence model's item vectors, S of the texts'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune.applications.recommender.conditions import Mask, find_matching
from finetune.applications.recommender.histories import History, read_histories
from finetune.applications.recommender.nearest import NearestItems
from finetune.applications.recommender.reasons import SEQUENCE_ALONE, Reasons
from finetune.applications.recommender.records import BOTH, POPULAR, SEQUENCE, Because, RankedList, Recommended
from finetune.errors import UsageError
from finetune.evaluation.counting import Histories, Numbers, Scores
from finetune.evaluation.recommending import find_first
from finetune.tasks.items import Counts, normalize
from finetune.tasks.judge_lists import fill_popular, place_candidates
from finetune.tasks.ranker import Ranker, Table
from finetune.tasks.recommendation import Recommendation, compute_sequence_scores, compute_states

CELLS = 3_200_000
"""Scores of a chunk, R x I at most."""
MAX_CHUNK = 128
SAMPLES, SAMPLE_EVENTS = 512, 5
"""Histories that an index is tuned and measured on, and the events of each, drawn by popularity."""
POOL = 100
"""Of the best items at least so many are looked at for a diverse list."""


@dataclass(frozen=True)
class Wish:
    """What lists are asked for.

    Args:
        top: items of a list, at least 1.
        exclude_seen: leave out what the person had; None for what the recipe says.
        filters: conditions on columns, all of which must be met.
        diversity: in [0, 1]: 0 for the plain order, 1 for what is least alike.
        explain: give reasons.
    """

    top: int = 10
    exclude_seen: bool | None = None
    filters: Sequence[str] = ()
    diversity: float = 0.0
    explain: bool = True

    @property
    def pool(self) -> int:
        """Best items that a list is chosen from."""
        return max(POOL, 2 * self.top) if self.diversity else self.top

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UsageError(f"top: must be at least 1, got {self.top}. Ask for 10 items, or any number from 1.")
        if not 0 <= self.diversity <= 1:
            raise UsageError(
                f"diversity: must lie in 0 to 1, got {self.diversity:g}. 0 is the plain order, 1 what is least alike; "
                "try 0.3."
            )


@dataclass(frozen=True)
class Recommender:
    """A trained recommender, ready to answer.

    Args:
        task: what the run was trained for, with its I items.
        model: the first stage, in evaluation mode.
        max_length: items of a history that it reads.
        counts: what was counted before the test's cut.
        trees: the second stage; None where there is none.
        is_exact: whether every item is scored; else `nearest` finds the first ones, of a run without a second stage.
    """

    task: Recommendation
    model: Any
    max_length: int
    counts: Counts
    trees: Any = None
    is_exact: bool = True

    def recommend(self, history: History, top: int = 10, **wish: Any) -> RankedList:
        """Items for one person.

        Args:
            history: ids of what the person had, oldest first; numbers or text. Ids that the catalogue does not have are
                skipped and counted. Where none is left, the list is what was popular in the last 7 days.
            top: how many.
            wish: as in `Wish`.

        Raises:
            UsageError: a wish that cannot be met.
        """
        return self.recommend_many([history], top, **wish)[0]

    def recommend_many(self, histories: Sequence[History], top: int = 10, **wish: Any) -> list[RankedList]:
        """The same for many people at once, in order."""
        return list(self.answer(histories, Wish(top, **wish)))

    def answer(self, histories: Sequence[History], wish: Wish) -> Iterator[RankedList]:
        """A list for each history, in order."""
        allowed = find_matching(wish.filters, self.task.catalogue) if wish.filters else None
        step = choose_chunk(len(self.task.catalogue.ids))
        for start in range(0, len(histories), step):
            yield from self._answer_chunk(histories[start : start + step], wish, allowed)

    def _answer_chunk(self, given: Sequence[History], wish: Wish, allowed: Mask | None) -> Iterator[RankedList]:
        read = read_histories(given, self.task.catalogue)
        histories = read.histories
        left_out = _LeftOut(allowed, self.task.section.exclude_seen if wish.exclude_seen is None else wish.exclude_seen)
        if self.nearest is None:
            scored = self._score(histories, left_out)
        else:
            scored = self._find_nearest(self.nearest, histories, wish, left_out)
        for row, placed in enumerate(scored.placed):
            history, items = histories.get(row), self._choose(placed, wish)
            listed = self._describe(scored, row, history, items, explain=wish.explain)
            yield RankedList(listed, len(history), int(read.given[row]) - len(history), read.unknown[row])

    # Scores

    def _score(self, histories: Histories, left_out: _LeftOut) -> _Scored:
        """As `tasks.judge_lists` does it, without what lists leave out."""
        sequence = compute_sequence_scores(self.model, histories, self.max_length, self._vectors)
        first = fill_popular(sequence, histories, self._popular)
        ranker = self._get_ranker(exclude_seen=left_out.seen)
        if ranker is None:
            left_out.mark(first, histories)
            return _Scored(first, first)
        table = ranker.build_table(histories, sequence)
        ranks = ranker.score(table)
        placed = place_candidates(first, table, ranks, histories)
        left_out.mark(placed, histories)
        return _Scored(placed, first, table, ranks)

    def _find_nearest(self, nearest: NearestItems, histories: Histories, wish: Wish, left_out: _LeftOut) -> _Scored:
        """Scores of what an index finds, which are not normalized; all are scored where it finds too few."""
        placed = np.full((len(histories), len(self.task.catalogue.ids)), -np.inf, np.float32)
        rows, states = compute_states(self.model, histories, self.max_length, self._vectors)
        count = wish.pool + int(histories.lengths.max(initial=0))
        items = nearest.search(states, count)
        scores, found = nearest.score(states, items), items >= 0
        placed[np.repeat(rows, found.sum(axis=1)), items[found]] = scores[found]
        left_out.mark(placed, histories)
        short = np.flatnonzero(np.isfinite(placed).sum(axis=1) < wish.pool)
        if len(short):
            placed[short] = self._score(histories.take(short), left_out).placed
        return _Scored(placed, placed)

    def _get_ranker(self, *, exclude_seen: bool) -> Ranker | None:
        """The second stage; what a person had is among its candidates only where it may come again."""
        ranker = self._ranker
        return self._ranker_with_seen if ranker and ranker.exclude_seen and not exclude_seen else ranker

    @cached_property
    def _ranker(self) -> Ranker | None:
        ranker = self.task.build_ranker(self.model, self.counts)
        return None if ranker is None else replace(ranker, trees=self.trees)

    @cached_property
    def _ranker_with_seen(self) -> Ranker | None:
        return None if self._ranker is None else replace(self._ranker, exclude_seen=False)

    @cached_property
    def _vectors(self) -> torch.Tensor:
        """Of all items, (I, D), computed once."""
        with torch.inference_mode():
            vectors: torch.Tensor = self.model.compute_item_vectors()
        return vectors

    @cached_property
    def nearest(self) -> NearestItems | None:
        """An index over all items, tuned on histories of what is popular; None where every item is scored."""
        if self.is_exact:
            return None
        weights = self.counts.vectors["popularity"].astype(float) + 1e-9
        drawn = np.random.default_rng(0).choice(len(weights), SAMPLES * SAMPLE_EVENTS, p=weights / weights.sum())
        starts = np.arange(0, len(drawn), SAMPLE_EVENTS)
        samples = Histories(drawn, starts, starts + SAMPLE_EVENTS)
        states = compute_states(self.model, samples, self.max_length, self._vectors)[1]
        bias = self.model.compute_item_bias()
        biases = None if bias is None else bias.detach().float().cpu().numpy()
        return NearestItems.build(self._vectors.float().cpu().numpy(), biases, states)

    @cached_property
    def _popular(self) -> Scores:
        """For people of whom nothing is known, (I,)."""
        return self.counts.rank_lately()

    # Lists

    def _choose(self, placed: npt.NDArray[np.float32], wish: Wish) -> Numbers:
        """The best items of a row, (I,), without those at minus infinity."""
        if not wish.diversity:
            items = find_first(placed, wish.top)
            return items[np.isfinite(placed[items])]
        pool = find_first(placed, wish.pool)
        pool = pool[np.isfinite(placed[pool])]
        return pool[diversify(normalize(self._meaning[pool]), wish.top, wish.diversity)]

    @cached_property
    def _meaning(self) -> npt.NDArray[np.float32]:
        """What likeness of items is measured by: vectors of their texts, (I, S), else of the sequence model, (I, D)."""
        ranker = self._ranker
        if ranker is not None and ranker.items.texts is not None:
            return ranker.items.texts
        texts = self.model.text_vectors
        return np.asarray((self._vectors if texts is None else texts).float().cpu().numpy())

    # Reasons

    @cached_property
    def _reasons(self) -> Reasons:
        texts = None if self._ranker is None else self._ranker.items.texts
        return Reasons(self.task.catalogue, self.counts, self._vectors.float().cpu().numpy(), texts)

    def _describe(
        self, scored: _Scored, row: int, history: Numbers, items: Numbers, *, explain: bool
    ) -> tuple[Recommended, ...]:
        """A list with its reasons."""
        if len(history):
            places = scored.find_candidates(row, items)
            by = [BOTH if place >= 0 else SEQUENCE for place in places.tolist()]
        else:
            places, by = np.full(len(items), -1), [POPULAR] * len(items)
        features: list[Mapping[str, float]] = [{} for _ in by]
        reasons: list[tuple[Because, ...]] = [()] * len(by)
        if explain and len(history):
            features = self._explain(scored, places)
            reasons = self._reasons.find(history, items, [own or SEQUENCE_ALONE for own in features])
        ids, texts = self.task.catalogue.ids, self.task.catalogue.texts
        return tuple(
            Recommended(ids[item], texts[item], scored.get(row, item, place), by[n], reasons[n], features[n])
            for n, (item, place) in enumerate(zip(items.tolist(), places.tolist(), strict=True))
        )

    def _explain(self, scored: _Scored, places: Numbers) -> list[Mapping[str, float]]:
        """What each feature adds to the scores of candidates, the largest first; nothing for what is none."""
        found: list[Mapping[str, float]] = [{} for _ in places]
        chosen = np.flatnonzero(places >= 0)
        if scored.table is None or self._ranker is None or not len(chosen):
            return found
        rows, table = places[chosen], scored.table
        parts = self._ranker.explain(Table(table.request[rows], table.item[rows], table.values[rows]))
        for place, part in zip(chosen.tolist(), parts, strict=True):
            found[place] = dict(sorted(part.items(), key=lambda pair: -pair[1]))
        return found


@dataclass(frozen=True)
class _LeftOut:
    """What lists leave out: what does not meet the conditions, (I,) true for what does; and what people had."""

    allowed: Mask | None
    seen: bool

    def mark(self, placed: Scores, histories: Histories) -> None:
        """Put it at minus infinity, in place, (R, I)."""
        if self.seen:
            histories.mark(placed, -np.inf)
        if self.allowed is not None:
            placed[:, ~self.allowed] = -np.inf


@dataclass(frozen=True)
class _Scored:
    """Scores of a chunk.

    Args:
        placed: what items are ordered by, (R, I); lists put what they leave out at minus infinity.
        first: scores of the first stage, (R, I).
        table, ranks: the candidates of the second, and their scores, (C,).
    """

    placed: Scores
    first: Scores
    table: Table | None = None
    ranks: npt.NDArray[np.float64] | None = None

    def find_candidates(self, row: int, items: Numbers) -> Numbers:
        """Where items stand among the candidates of the second stage; -1 for those that do not, (N,)."""
        if self.table is None:
            return np.full(len(items), -1)
        start, end = np.searchsorted(self.table.request, [row, row + 1])
        own = self.table.item[start:end]
        place = np.searchsorted(own, items)
        found = place < len(own)
        found[found] = own[place[found]] == items[found]
        return np.where(found, start + place, -1)

    def get(self, row: int, item: int, place: int) -> float:
        """Score of the stage that put an item into its place."""
        return float(self.first[row, item] if place < 0 or self.ranks is None else self.ranks[place])


def choose_chunk(items: int) -> int:
    """Histories that are scored at once against so many items."""
    return max(1, min(MAX_CHUNK, CELLS // items))


def diversify(vectors: npt.NDArray[np.float32], top: int, diversity: float) -> Numbers:
    """Maximal marginal relevance (Carbonell and Goldstein 1998).

    What is relevant is said by the place, which the scores of both stages have in common.

    Args:
        vectors: of N items, the best first, (N, S), of length 1.
        top: how many to choose.
        diversity: what being unlike the chosen ones weighs, in [0, 1].

    Returns:
        Places of the chosen items in their new order, (top or N,).
    """
    count = min(top, len(vectors))
    relevance = 1 - np.arange(len(vectors)) / max(1, len(vectors))
    nearest = np.zeros(len(vectors))
    chosen: list[int] = []
    for _ in range(count):
        gain = (1 - diversity) * relevance - diversity * nearest
        gain[chosen] = -np.inf
        best = int(gain.argmax())
        likeness = vectors @ vectors[best]
        nearest = np.maximum(nearest, likeness) if chosen else likeness.astype(float)
        chosen.append(best)
    return np.array(chosen, np.int64)
