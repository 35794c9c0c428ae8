"""Recommendation by counting: what is popular, what follows what, what goes with what.

This is what a recommender must beat, and it is strong. Every score is linear in the history: a person's history is a
row of weights over items, the older the lighter, and it is multiplied with a matrix of items by items.

Shapes: E events, I items, R requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import linalg, sparse

Numbers: TypeAlias = npt.NDArray[np.int64]
Scores: TypeAlias = npt.NDArray[np.float32]
Matrix: TypeAlias = Any
"""Items by items, (I, I) float32: scipy's CSR, or dense."""

DAY = 86_400
MOST_EASE_ITEMS = 12_000
"""EASE inverts a matrix of items by items; beyond so many it is fitted on the most frequent ones."""
KNOWN_EVENTS = 2
"""EASE leaves out items with fewer events: they have nothing to go with."""
NEIGHBOURS = 200
"""Of each item, the strongest pairs that are kept for the ranker."""
SORTED_ROWS = 1000
"""Rows of a matrix whose entries are sorted at once."""


@dataclass(frozen=True)
class Events:
    """What is known when something is counted: events sorted by person and time.

    Args:
        user, item, time: (E,).
        items: I.
        now: the time at which it is known; all events lie before it.
        weight: (E,) what each event counts in `count`, 1 on average; None where all count 1.
    """

    user: Numbers
    item: Numbers
    time: Numbers
    items: int
    now: int
    weight: npt.NDArray[np.float64] | None = None

    def count(self, since: int | None = None) -> Scores:
        """Events of each item, or the sum of their weights, (I,); all or those from a time on."""
        chosen = slice(None) if since is None else self.time >= since
        weight = None if self.weight is None else self.weight[chosen]
        return np.bincount(self.item[chosen], weight, minlength=self.items).astype(np.float32)


@dataclass(frozen=True)
class Histories:
    """R histories: `item[start:end]` of each, oldest first.

    Args:
        item: (E,) items of all events.
        start, end: (R,).
    """

    item: Numbers
    start: Numbers
    end: Numbers

    def __len__(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> Numbers:
        """Events of each history, (R,)."""
        return self.end - self.start

    def take(self, rows: slice | Numbers) -> Histories:
        """Some of them."""
        return Histories(self.item, self.start[rows], self.end[rows])

    def get(self, row: int) -> Numbers:
        """Items of one history, oldest first."""
        return self.item[self.start[row] : self.end[row]]

    def mark(self, scores: Scores, value: float) -> None:
        """Set what each person had to a value, in place; scores are (R, I)."""
        for row in range(len(self)):
            scores[row, self.get(row)] = value

    def weigh(self, items: int, decay: float, last: int | None = None) -> Matrix:
        """Weights of items in each history, CSR (R, I): decay^a for the event with a newer ones; repeats add up.

        Args:
            items: I.
            decay: in (0, 1].
            last: only so many newest events.
        """
        lengths = self.lengths
        if last is not None:
            lengths = np.minimum(lengths, last)
        starts = np.cumsum(lengths) - lengths
        place = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        age = np.repeat(lengths, lengths) - 1 - place
        chosen = self.item[np.repeat(self.end, lengths) - 1 - age]
        rows = np.repeat(np.arange(len(self)), lengths)
        weights = np.power(np.float32(decay), age).astype(np.float32)
        return sparse.csr_matrix((weights, (rows, chosen)), shape=(len(self), items))


def count_following(events: Events, window: int) -> Matrix:
    """How often one item follows another in a person's history, CSR (I, I): the d-th after it, of a window of w, counts
    1 - (d - 1) / w. Row a is divided by sqrt(1 + its sum), so that what is everywhere does not drown the rest."""
    shape = (events.items, events.items)
    counts = sparse.csr_matrix(shape, dtype=np.float32)
    for distance in range(1, window + 1):
        same = events.user[:-distance] == events.user[distance:]
        pair = events.item[:-distance][same], events.item[distance:][same]
        weights = np.full(len(pair[0]), 1 - (distance - 1) / window, np.float32)
        counts = counts + sparse.csr_matrix((weights, pair), shape=shape)
    return _divide_rows(counts)


def count_preceding(events: Events, window: int) -> Matrix:
    """The same the other way round: row a has what came before a."""
    turned = Events(events.user[::-1], events.item[::-1], events.time[::-1], events.items, events.now)
    return count_following(turned, window)


def _divide_rows(counts: Matrix) -> Matrix:
    scale = 1 / np.sqrt(1 + np.asarray(counts.sum(axis=1)).ravel())
    return (sparse.diags(scale.astype(np.float32)) @ counts).tocsr()


def build_people(events: Events) -> Matrix:
    """Who had what, CSR (people, I) of ones."""
    _, person = np.unique(events.user, return_inverse=True)
    shape = (int(person.max(initial=-1)) + 1, events.items)
    people = sparse.csr_matrix((np.ones(len(person), np.float32), (person, events.item)), shape=shape)
    people.data[:] = 1
    return people


def count_neighbours(events: Events, shrinkage: float, neighbours: int) -> Matrix:
    """Item-kNN (Sarwar et al. 2001): cosine of two items' people, times n / (n + shrinkage) for n people in common; of
    each item only the nearest stay. CSR (I, I)."""
    people = build_people(events)
    common = (people.T @ people).tocsr()
    norm = 1 / np.sqrt(np.maximum(1, np.asarray(people.sum(axis=0)).ravel()))
    cosine = (sparse.diags(norm) @ common @ sparse.diags(norm)).tocsr()
    cosine.data *= common.data / (common.data + shrinkage)
    cosine.setdiag(0)
    return keep_strongest(cosine.astype(np.float32), neighbours)


def fit_ease(events: Events, penalty: float) -> tuple[Numbers, Scores]:
    """EASE (arXiv:1905.03375): the linear model that best rebuilds who had what, with a zero diagonal.

    B = -P / diag(P), P the inverse of X'X + penalty.

    Returns:
        The K items it is fitted on, (K,) ascending: those with at least 2 events, of the 12,000 most frequent; and
        their weights, (K, K). All others are zero.
    """
    people = build_people(events)
    counts = np.asarray(people.sum(axis=0)).ravel()
    kept = np.sort(np.argsort(-counts, kind="stable")[:MOST_EASE_ITEMS])
    kept = kept[counts[kept] >= KNOWN_EVENTS]
    chosen = people[:, kept]
    gram = (chosen.T @ chosen).toarray().astype(np.float32)
    gram[np.diag_indices_from(gram)] += penalty
    if not len(kept):
        return kept, gram
    factor, _ = linalg.lapack.spotrf(gram, lower=0, overwrite_a=1)
    upper, _ = linalg.lapack.spotri(factor, lower=0, overwrite_c=1)
    inverse = np.triu(upper) + np.triu(upper, 1).T
    inverse /= -np.diag(inverse)
    inverse[np.diag_indices_from(inverse)] = 0
    return kept, inverse


def count_ease(events: Events, penalty: float, neighbours: int) -> Matrix:
    """EASE with the strongest weights of each item alone, CSR (I, I)."""
    kept, weights = fit_ease(events, penalty)
    strongest = keep_strongest(weights, neighbours).tocoo()
    pairs = kept[strongest.row], kept[strongest.col]
    return sparse.csr_matrix((strongest.data, pairs), shape=(events.items, events.items))


def keep_strongest(matrix: Matrix, count: int) -> Matrix:
    """CSR with at most so many entries of each row, the largest by absolute value."""
    if matrix.shape[0] > SORTED_ROWS:
        parts = [matrix[start : start + SORTED_ROWS] for start in range(0, matrix.shape[0], SORTED_ROWS)]
        return sparse.vstack([keep_strongest(part, count) for part in parts], format="csr")
    matrix = sparse.csr_matrix(matrix)
    matrix.sum_duplicates()
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -np.abs(matrix.data), rows))
    rank = np.arange(len(rows)) - matrix.indptr[rows]
    kept = order[rank < count]
    return sparse.csr_matrix((matrix.data[kept], (rows[kept], matrix.indices[kept])), shape=matrix.shape)


def apply(histories: Matrix, matrix: Matrix) -> Scores:
    """Weights of histories (R, I) times items by items -> dense (R, I)."""
    scores = histories @ matrix
    return np.asarray(scores.toarray() if sparse.issparse(scores) else scores, dtype=np.float32)


# Baselines

Fitted = Callable[[Histories], Scores]
"""Histories -> scores of all items, (R, I)."""


@dataclass(frozen=True)
class Counting:
    """A baseline and the settings that validation chooses among.

    Args:
        fit: (events, what has to be fitted anew) -> what `score` needs.
        score: (what was fitted, events, histories, the other settings) -> (R, I).
        fitted, chosen: values of the settings of each.
    """

    fit: Callable[..., Any]
    score: Callable[..., Scores]
    fitted: Mapping[str, Sequence[float]]
    chosen: Mapping[str, Sequence[float]]

    def list_settings(self) -> list[dict[str, float]]:
        """Every combination; those that share what is fitted stand together."""
        return list(_combine({**self.fitted, **self.chosen}))

    def fit_all(self, events: Events, settings: Iterable[Mapping[str, float]]) -> Iterator[Fitted]:
        """A scorer for each of the settings in turn; what they share is fitted once."""
        popular = events.count()
        popular /= max(1.0, float(popular.max(initial=0)))
        last: tuple[dict[str, float], Any] | None = None
        for one in settings:
            needed = {name: one[name] for name in self.fitted}
            if last is None or last[0] != needed:
                last = (needed, self.fit(events, **needed))
            others = {name: one[name] for name in self.chosen}
            yield _build_scorer(self.score, last[1], events, others, popular)


def _combine(grid: Mapping[str, Sequence[float]]) -> Iterator[dict[str, float]]:
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _build_scorer(
    score: Callable[..., Scores], fitted: Any, events: Events, others: Mapping[str, float], popular: Scores
) -> Fitted:
    def compute(histories: Histories) -> Scores:
        scores = score(fitted, events, histories, **others)
        # Where it has nothing to say, the popular comes first: after an empty history, and among items at zero.
        largest = np.abs(scores).max(axis=1, keepdims=True)
        return scores + np.where(largest > 0, 1e-5 * largest, 1.0).astype(np.float32) * popular

    return compute


def _score_popular(counts: Scores, _events: Events, histories: Histories) -> Scores:
    return np.broadcast_to(counts, (len(histories), len(counts))).copy()


def _score_linear(matrix: Matrix, events: Events, histories: Histories, decay: float) -> Scores:
    return apply(histories.weigh(events.items, decay), matrix)


def _score_ease(fitted: tuple[Numbers, Scores], events: Events, histories: Histories, decay: float) -> Scores:
    kept, weights = fitted
    scores = np.zeros((len(histories), events.items), np.float32)
    scores[:, kept] = apply(histories.weigh(events.items, decay)[:, kept], weights)
    return scores


def _score_own(_none: None, events: Events, histories: Histories, decay: float) -> Scores:
    return np.asarray(histories.weigh(events.items, decay).toarray(), dtype=np.float32)


DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
COUNTINGS: dict[str, Counting] = {
    "popular": Counting(lambda events: events.count(), _score_popular, {}, {}),
    "popular_week": Counting(lambda events: events.count(events.now - 7 * DAY), _score_popular, {}, {}),
    "own_history": Counting(lambda _events: None, _score_own, {}, {"decay": (0.8, 0.9, 0.95, 0.98, 1.0)}),
    "item_knn": Counting(
        lambda events, shrinkage, neighbours: count_neighbours(events, shrinkage, int(neighbours)),
        _score_linear,
        {"shrinkage": (0.0, 10.0, 50.0), "neighbours": (50, 200)},
        {"decay": DECAYS},
    ),
    "ease": Counting(fit_ease, _score_ease, {"penalty": (50.0, 200.0, 500.0)}, {"decay": DECAYS}),
    "co_occurrence": Counting(
        lambda events, window: count_following(events, int(window)),
        _score_linear,
        {"window": (5, 10, 20)},
        {"decay": DECAYS},
    ),
}
"""Baseline -> how it counts. `own_history` says what a person had before, and is for items that are bought again;
the others but the popular ones are linear in the history."""
