"""The second stage of a recommender: candidates from several sources, ranked by trees.

A sequence model, counts, texts and the items' own columns each know something that the others do not. Gradient boosted
trees with LambdaMART's gradient (LightGBM's `lambdarank`; Burges 2010, MSR-TR-2010-82) learn on validation what each is
worth. Their features are known at the time of the request: counts end at the cut.

Shapes: I items, R requests of a chunk, C candidates of all of them together, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from finetune.errors import DataError, ResourceError
from finetune.evaluation.counting import Histories, Matrix, Numbers, Scores, apply
from finetune.evaluation.recommending import find_first
from finetune.tasks.forest import Forest
from finetune.tasks.items import RECENT_DAYS, WINDOWS, Counts, Items, normalize

DECAYS = (0.5, 0.8, 0.95)
EASE_DECAYS = (0.5, 0.8, 0.95, 1.0)
SLOW_DECAY = 0.99
LAST_EVENTS = 50
"""Of a history, the newest events that count for what decays, and for a person's taste in columns."""
TEXT_SOURCE = "text 0.8"
SOURCES = ("follows 5, 0.5", "follows 20, 0.8", "ease 0.5", "ease 0.8")
"""Features whose first items become candidates, beside those of the sequence model and of the texts."""
NOTHING = np.zeros(0, np.int64)
TREES = {
    "objective": "lambdarank",
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_data_in_leaf": 20,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "lambdarank_truncation_level": 20,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}
ROUNDS = (50, 100, 200, 400)
"""Numbers of trees that validation chooses among."""
FEW_VECTORS = 8
TEXT_BLOCK = 512
"""Texts that stay in the processor's cache while several vectors are multiplied with them."""


@dataclass(frozen=True)
class Table:
    """Candidates with their features.

    Args:
        request: (C,) number of the request in its chunk, ascending.
        item: (C,) number of the item.
        values: (C, F) float32.
    """

    request: Numbers
    item: Numbers
    values: Scores


@dataclass(frozen=True)
class Ranker:
    """The second stage.

    Args:
        features: those of `rank.features` in the recipe, and columns of the catalogue.
        candidates: so many from each source.
        exclude_seen: whether what a person had is left out.
        counts: what was counted.
        items: what is known of the items.
        trees: LightGBM's model; None before it is fitted.
    """

    features: tuple[str, ...]
    candidates: int
    exclude_seen: bool
    counts: Counts
    items: Items
    trees: Any = None

    @cached_property
    def names(self) -> list[str]:
        """Name of each of the F features: that of `features`, a colon, and what it is."""
        empty = Histories(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64))
        size = len(self.items.catalogue.ids)
        return self._gather(self._compute(empty, np.zeros((1, size), np.float32)), empty).names

    def build_table(self, histories: Histories, sequence: Scores) -> Table:
        """Candidates of a chunk of requests and their features.

        Args:
            histories: R.
            sequence: log probabilities of the sequence model, (R, I); nan after an empty history.
        """
        computed = self._compute(histories, sequence)
        request, item = self._choose(computed, histories)
        return Table(request, item, self._gather(computed, histories).take(request, item))

    def score(self, table: Table) -> npt.NDArray[np.float64]:
        """Scores of candidates, (C,)."""
        return self._forest.score(table.values)

    def explain(self, table: Table) -> list[dict[str, float]]:
        """What each feature of `features` adds to a candidate's score (SHAP values, arXiv:1802.03888), C times."""
        parts = np.asarray(self.trees.predict(table.values, pred_contrib=True))[:, :-1]
        groups = [name.partition(":")[0] for name in self.names]
        return [_sum_groups(groups, row) for row in parts]

    def compute_importances(self) -> dict[str, float]:
        """Share of the gain that splits on each feature of `features` brought, the largest first."""
        gains = _sum_groups([name.partition(":")[0] for name in self.names], self.trees.feature_importance("gain"))
        total = sum(gains.values()) or 1.0
        return {name: gain / total for name, gain in sorted(gains.items(), key=lambda pair: -pair[1])}

    @cached_property
    def _forest(self) -> Forest:
        return Forest.build(self.trees)

    def _compute(self, histories: Histories, sequence: Scores) -> _Computed:
        size = len(self.items.catalogue.ids)
        weights = {decay: histories.weigh(size, decay, LAST_EVENTS) for decay in DECAYS}
        every = sparse.vstack([weights[decay] for decay in DECAYS], format="csr")
        pairs: dict[str, Scores] = {"sequence": sequence}
        tastes: dict[float, Scores] = {}
        for window in WINDOWS:
            parts = np.split(apply(every, self.counts.matrices[f"follows {window}"]), len(DECAYS))
            pairs |= {f"follows {window}, {decay}": part for decay, part in zip(DECAYS, parts, strict=True)}
        pairs["precedes"] = apply(weights[DECAYS[1]], self.counts.matrices["precedes"])
        long = {**weights, 1.0: histories.weigh(size, 1.0)}
        longer = sparse.vstack([long[decay] for decay in EASE_DECAYS], format="csr")
        parts = np.split(apply(longer, self.counts.matrices["ease"]), len(EASE_DECAYS))
        pairs |= {f"ease {decay}": part for decay, part in zip(EASE_DECAYS, parts, strict=True)}
        if self.items.texts is not None:
            means = normalize(every @ self.items.texts)
            tastes = dict(zip(DECAYS, np.split(means, len(DECAYS)), strict=True))
            pairs[TEXT_SOURCE] = multiply(tastes[DECAYS[1]], self.items.texts)
        if not self.exclude_seen:
            pairs["times"] = np.asarray(long[1.0].toarray(), np.float32)
            pairs["newest"] = np.asarray(weights[DECAYS[2]].toarray(), np.float32)
            pairs["lately"] = np.asarray(histories.weigh(size, SLOW_DECAY).toarray(), np.float32)
            pairs["since"] = _count_since(histories, size)
        return _Computed(pairs, weights[DECAYS[2]], tastes)

    def _choose(self, computed: _Computed, histories: Histories) -> tuple[Numbers, Numbers]:
        """Request and item of each candidate: the first items of each source, of the lately popular, and of those
        that nobody had yet, by their texts; and what the person had, where it may come again."""
        pairs, new, seen = computed.pairs, self._new, np.zeros(len(self.items.catalogue.ids), bool)
        counted = [pairs[name] for name in (*SOURCES, "newest") if name in pairs]
        found = []
        for row in range(len(histories)):
            own = histories.get(row) if self.exclude_seen else NOTHING
            seen[own] = True
            first = self._popular[: self.candidates + len(own)]
            chosen = [first[~seen[first]][: self.candidates]]
            for name in ("sequence", TEXT_SOURCE):
                if name not in pairs:
                    continue
                scores = pairs[name][row].copy()
                scores[own] = -np.inf
                chosen.append(find_first(scores, self.candidates))
                if name == TEXT_SOURCE:
                    chosen.append(new[find_first(scores[new], self.candidates)])
            for source in counted:
                items = np.flatnonzero(source[row] > 0)  # what was never counted is no candidate
                items = items[~seen[items]]
                chosen.append(items[find_first(source[row, items], self.candidates)])
            seen[own] = False
            found.append(np.unique(np.concatenate(chosen)))
        return np.repeat(np.arange(len(found)), [len(items) for items in found]), np.concatenate(found)

    @cached_property
    def _popular(self) -> Numbers:
        """Items that were popular of late, the most popular first."""
        popular = self.counts.rank_popular(RECENT_DAYS[1])
        return np.argsort(-popular, kind="stable")[: np.count_nonzero(popular > 0)]

    @cached_property
    def _new(self) -> Numbers:
        """Items that nobody had yet."""
        return np.flatnonzero(self.counts.vectors["popularity"] == 0)

    def _gather(self, computed: _Computed, histories: Histories) -> _Columns:
        pairs, vectors = computed.pairs, self.counts.vectors
        columns = _Columns()
        groups = {
            "sequence": ("sequence",),
            "co_occurrence": ("follows", "precedes"),
            "ease": ("ease",),
            "text": ("text",),
            "repeats": ("times", "newest", "lately", "since"),
        }
        for name in self.features:
            if name in groups:
                columns.pairs |= {f"{name}: {key}": pairs[key] for key in pairs if key.startswith(groups[name])}
                if name == "text" and self.items.texts is not None:
                    columns.texts = self.items.texts
                    columns.tastes = {
                        f"{name}: text {decay}": taste
                        for decay, taste in computed.tastes.items()
                        if f"text {decay}" != TEXT_SOURCE
                    }
                if name == "repeats":
                    columns.items[f"{name}: by others"] = vectors["again"]
            elif name == "popularity":
                # Not in the order of `vectors`: a file hands them back in another one.
                spans = ["popularity", *(f"popularity {days}" for days in RECENT_DAYS)]
                columns.items |= {f"{name}: {key}": self.counts.logs[key] for key in spans}
            elif name == "recency":
                columns.items[f"{name}: age"] = vectors["age"]
            elif name == "history":
                columns.requests[f"{name}: events"] = np.log1p(histories.lengths).astype(np.float32)
            elif name in self.items.numeric:
                values = self.items.numeric[name]
                present = np.nan_to_num(values)
                weight = computed.recent @ (~np.isnan(values)).astype(np.float32)
                mean = np.divide(
                    computed.recent @ present, weight, out=np.full(len(weight), np.nan, np.float32), where=weight > 0
                )
                columns.items[f"{name}: value"] = values
                columns.differences[f"{name}: above the person's mean"] = (values, mean)
            else:
                kinds = self.items.kinds[name]
                share = (computed.recent @ kinds).toarray()
                share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-9)
                columns.shares[f"{name}: the person's share"] = (kinds, share.astype(np.float32))
        return columns


@dataclass(frozen=True)
class _Computed:
    """Features of every item for each request, (R, I), by name; what the person had of late, CSR (R, I); and the mean
    of its texts, (R, S), by how fast it fades."""

    pairs: dict[str, Scores]
    recent: Matrix
    tastes: dict[float, Scores]


@dataclass
class _Columns:
    """Features by what they depend on: item and request, item alone, request alone, a column's distance from the
    person's mean, the person's share of an item's kinds, and how near an item's text is to the person's; the last three
    are computed for candidates alone."""

    pairs: dict[str, Scores] = field(default_factory=dict)
    items: dict[str, Scores] = field(default_factory=dict)
    requests: dict[str, Scores] = field(default_factory=dict)
    differences: dict[str, tuple[Scores, Scores]] = field(default_factory=dict)
    shares: dict[str, tuple[Matrix, Scores]] = field(default_factory=dict)
    tastes: dict[str, Scores] = field(default_factory=dict)
    texts: Scores | None = None

    @property
    def names(self) -> list[str]:
        """In the order of `take`."""
        return [*self.pairs, *self.items, *self.requests, *self.differences, *self.shares, *self.tastes]

    def take(self, request: Numbers, item: Numbers) -> Scores:
        """(C, F)."""
        columns = [
            *(matrix[request, item] for matrix in self.pairs.values()),
            *(vector[item] for vector in self.items.values()),
            *(vector[request] for vector in self.requests.values()),
            *(values[item] - mean[request] for values, mean in self.differences.values()),
            *(_sum_shares(kinds[item], share, request) for kinds, share in self.shares.values()),
            *self._compare_texts(request, item),
        ]
        return np.column_stack(columns).astype(np.float32)

    def _compare_texts(self, request: Numbers, item: Numbers) -> list[Scores]:
        if self.texts is None or not self.tastes:
            return []
        tastes = np.stack(list(self.tastes.values()), axis=-1)  # (R, S, K)
        found = np.empty((len(item), len(self.tastes)), np.float32)
        for taste, own in zip(tastes, _find_bounds(request, len(tastes)), strict=True):
            np.matmul(self.texts[item[own]], taste, out=found[own])
        return list(found.T)


def _sum_shares(kinds: Matrix, share: Scores, request: Numbers) -> Scores:
    """The person's share of each candidate's kinds, CSR (C, kinds), from that of all kinds, (R, kinds): (C,)."""
    row = np.repeat(np.arange(len(request)), np.diff(kinds.indptr))
    values: Scores = kinds.data * share[request[row], kinds.indices]
    return np.bincount(row, values, minlength=len(request)).astype(np.float32)


def _count_since(histories: Histories, items: int) -> Scores:
    """Events since a person last had an item, from 1, (R, I); nan where never."""
    since = np.full((len(histories), items), np.nan, np.float32)
    for row in range(len(histories)):
        own = histories.get(row)
        since[row, own] = np.arange(len(own), 0, -1)  # of an item that comes several times the last one stays
    return since


def fit_trees(
    tables: Sequence[Table], targets: Sequence[Sequence[Numbers]], seed: int, rounds: int = ROUNDS[-1]
) -> Any:
    """Fit the trees on candidates whose outcome is known; requests none of whose targets is a candidate say nothing.

    Args:
        tables: of several chunks.
        targets: of each chunk, the items that each request was answered with.
        seed: of the draws of rows and features.
        rounds: trees.

    Raises:
        DataError: no request has a target among its candidates.
        ResourceError: LightGBM is not installed.
    """
    lightgbm = import_lightgbm()
    values, labels, groups = [], [], []
    for table, answers in zip(tables, targets, strict=True):
        for request, bounds in enumerate(_find_bounds(table.request, len(answers))):
            right = np.isin(table.item[bounds], answers[request])
            if right.any():
                values.append(table.values[bounds])
                labels.append(right)
                groups.append(len(right))
    if not groups:
        raise DataError(
            "rank: must have validation requests with a target among the candidates, got none. Raise rank.candidates, "
            "or set rank: null."
        )
    data = lightgbm.Dataset(np.concatenate(values), np.concatenate(labels).astype(np.int32), group=groups)
    return lightgbm.train(TREES | {"seed": seed}, data, num_boost_round=rounds)


def multiply(means: Scores, texts: npt.NDArray[np.float32]) -> Scores:
    """Products of some vectors (N, S) with those of all items, (N, I).

    A few vectors wait for the memory, not for the processor: then each part of the texts is fetched once for all of
    them, which a matrix product of so few rows does not do well.
    """
    if len(means) > FEW_VECTORS:
        return np.asarray(means @ texts.T, np.float32)
    found = np.empty((len(means), len(texts)), np.float32)
    for start in range(0, len(texts), TEXT_BLOCK):
        part = texts[start : start + TEXT_BLOCK]
        for mean, own in zip(means, found, strict=True):
            np.dot(part, mean, out=own[start : start + TEXT_BLOCK])
    return found


def import_lightgbm() -> Any:
    """LightGBM, which `rank` needs.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import lightgbm
    except ImportError as error:
        raise ResourceError(
            "rank: must have LightGBM, got no such package. Install it: pip install lightgbm, or set rank: null for "
            "the sequence model alone."
        ) from error
    return lightgbm


def _find_bounds(request: Numbers, count: int) -> list[slice]:
    edges = np.searchsorted(request, np.arange(count + 1))
    return [slice(int(start), int(end)) for start, end in pairwise(edges)]


def _sum_groups(groups: Sequence[str], values: npt.ArrayLike) -> dict[str, float]:
    sums = dict.fromkeys(groups, 0.0)
    for group, value in zip(groups, np.asarray(values, float).tolist(), strict=True):
        sums[group] += value
    return sums
