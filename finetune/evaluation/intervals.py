"""Bootstrap intervals of metrics and of the difference between two systems.

Percentile intervals over resampled rows (Efron & Tibshirani 1993, chapter 13). A resample is the number of times each
row was drawn. Every metric but AUROC depends on few sums over rows (right rows, predictions and references of each
class), so that one product of a sparse table with the draws gives all resamples at once.

Rows of one group, such as the questions about one hotel, tend to be right or wrong together: whole groups are drawn
(Davison & Hinkley 1997, section 3.8), because rows drawn one by one would make the interval too narrow.

The calibration error has no interval: it adds up sizes of gaps, to which drawing again only adds, so that where
confidence is honest no resample comes down to the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import sparse

from finetune.evaluation.metrics import (
    Floats,
    Ints,
    auroc_labels,
    compute_brier_rows,
    compute_log_loss_rows,
    compute_metric,
    compute_predictions,
)

BLOCK_CELLS = 500_000  # rows x resamples held at once: 4 MB, which stays in the processor's cache

Interval = dict[str, float]


@dataclass(frozen=True, slots=True)
class Resampling:
    """How rows are drawn again. Equal draws for all systems make their differences paired."""

    resamples: int
    seed: int
    groups: Ints | None = None
    """The group of each row, (N,); None where each row is drawn by itself."""

    def take(self, rows: Ints | npt.NDArray[np.bool_]) -> Resampling:
        """The same for some of the rows."""
        return self if self.groups is None else replace(self, groups=self.groups[rows])

    def describe(self) -> dict[str, int]:
        """What is written beside the intervals; `groups` is their number, where there are any."""
        number = {} if self.groups is None else {"groups": len(np.unique(self.groups))}
        return {"resamples": self.resamples, "seed": self.seed, **number}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric's value on the rows, and on each resample of them; nan where it is not defined."""

    value: float
    samples: Floats
    """(resamples,). All nan for one row, for the calibration error, and for a metric of `evaluate`, which would take
    too long a thousand times."""


def compute_intervals(
    references: Ints, scores: Floats, names: Sequence[str], *, confidence: float, resampling: Resampling
) -> dict[str, Interval]:
    """Value and percentile interval of each metric.

    Args:
        references: Labels, (N,).
        scores: Probabilities, (N, K).
        names: Metrics.
        confidence: Level, such as 0.95.
        resampling: Of the N rows.

    Returns:
        name -> {"value", "low", "high"}; nan where not defined.
    """
    estimates = compute_estimates(references, scores, names, resampling=resampling)
    return {name: compute_interval(estimate, confidence) for name, estimate in estimates.items()}


def compute_interval(estimate: Estimate, confidence: float) -> Interval:
    """{"value", "low", "high"} of an estimate; resamples without a value are left out.

    Where both ends meet, as where no row is wrong, they are nan: drawing the same rows again cannot show how many
    others would be wrong, and an interval of no width would claim that none.
    """
    low, high = _percentiles(estimate.samples, confidence)
    if low == high:
        low = high = float("nan")
    return {"value": estimate.value, "low": low, "high": high}


def compute_difference(estimate: Estimate, other: Estimate, confidence: float) -> Interval:
    """Paired difference `estimate - other`, of two systems' estimates on the same rows, resamples and seed.

    Returns:
        {"value", "low", "high", "p_value"}. The two-sided p-value is twice the share of resamples on the rarer side of
        0, counting one more resample there, so that it is never 0 (Davison & Hinkley 1997, section 4.2).
    """
    differences = estimate.samples - other.samples
    low, high = _percentiles(differences, confidence)
    drawn = differences[np.isfinite(differences)]
    rarer = int(min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)))
    p_value = min(1.0, 2 * (1 + rarer) / (1 + drawn.size)) if drawn.size else float("nan")
    return {"value": estimate.value - other.value, "low": low, "high": high, "p_value": p_value}


def compute_ratio(estimate: Estimate, other: Estimate, confidence: float) -> Interval:
    """Paired ratio `estimate / other`, of two systems' estimates on the same rows, resamples and seed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        samples, value = estimate.samples / other.samples, np.float64(estimate.value) / other.value
    low, high = _percentiles(samples, confidence)
    return {"value": float(value), "low": low, "high": high}


def average_over_seeds(estimates: Sequence[Estimate], seed: int) -> Estimate:
    """The mean of one system's estimates over its training seeds.

    Each resample draws as many training seeds as there are, with replacement, and takes their values on its rows: the
    interval holds chance in the test rows and in training. With S seeds the part of training is too small by
    (S - 1) / S; with one seed there is none.

    Args:
        estimates: one for each training seed, with equally many resamples.
        seed: fixes the draws; they depend on (S, resamples, seed) only, so that systems stay paired.
    """
    samples = np.stack([estimate.samples for estimate in estimates])  # (S, resamples)
    drawn = np.random.default_rng(seed).integers(0, len(samples), size=samples.shape)
    value = float(np.mean([estimate.value for estimate in estimates]))
    return Estimate(value, np.take_along_axis(samples, drawn, axis=0).mean(axis=0))


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the chance of any false alarm among all tests stays below the level.

    A p-value that is nan stays nan, and does not count as a test.
    """
    adjusted, largest = list(p_values), 0.0
    order = sorted((i for i, p_value in enumerate(p_values) if not np.isnan(p_value)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def compute_estimates(
    references: Ints, scores: Floats, names: Sequence[str], *, resampling: Resampling
) -> dict[str, Estimate]:
    """Value and resampled values of each metric."""
    references, scores = np.asarray(references, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    values = {name: compute_metric(name, references, scores) for name in names}
    fast = [name for name in values if name in _FORMULAS or name == "auroc"]
    samples = {name: np.full(resampling.resamples, np.nan) for name in values}
    if fast and len(references) and np.isfinite(scores).all():
        resample = build_resampler(references, scores, fast)
        start = 0
        for weights in draw_weights(len(references), resampling):
            block = slice(start, start + weights.shape[1])
            for name, drawn in resample(weights).items():
                samples[name][block] = drawn
            start = block.stop
    return {name: Estimate(value, samples[name]) for name, value in values.items()}


def draw_weights(n_rows: int, resampling: Resampling) -> Iterator[Floats]:
    """Blocks (N, B) of how often each row is drawn in each of B resamples: as many draws as there are groups, or rows.

    One group, or one row, gives none: all its resamples are the same.
    """
    group = None if resampling.groups is None else np.unique(resampling.groups, return_inverse=True)[1]
    n_drawn = n_rows if group is None else int(group.max(initial=-1)) + 1
    if min(n_rows, n_drawn) < 2:
        return
    generator = np.random.default_rng(resampling.seed)
    largest = max(1, BLOCK_CELLS // n_rows)
    for start in range(0, resampling.resamples, largest):
        size = min(largest, resampling.resamples - start)
        drawn = generator.integers(0, n_drawn, size=(size, n_drawn))  # (B, groups) numbers of groups
        cells = drawn * size + np.arange(size)[:, None]  # position of (group, resample) in the block
        counts = np.bincount(cells.ravel(), minlength=n_drawn * size).reshape(n_drawn, size).astype(np.float64)
        yield counts if group is None else counts[group]


def build_resampler(references: Ints, scores: Floats, names: Sequence[str]) -> Callable[[Floats], dict[str, Floats]]:
    """A function from weights (N, B) to each metric's values on the B resamples, name -> (B,)."""
    tables = {kind: _SUMS[kind](references, scores) for kind in {_FORMULAS[n][0] for n in names if n in _FORMULAS}}
    auroc = _build_auroc(references, scores) if "auroc" in names else None

    def resample(weights: Floats) -> dict[str, Floats]:
        sums = {kind: table @ weights for kind, table in tables.items()}  # (S, B)
        values = {name: _FORMULAS[name][1](sums[_FORMULAS[name][0]]) for name in names if name in _FORMULAS}
        return values if auroc is None else values | {"auroc": auroc(weights)}

    return resample


def _percentiles(samples: Floats, confidence: float) -> tuple[float, float]:
    finite = samples[np.isfinite(samples)]
    if not finite.size:
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def _table(sums: Ints, values: Floats, n_sums: int) -> sparse.csr_array:
    """(S, N): row i adds `values[i]` to sum `sums[i]`."""
    return sparse.csr_array((values, (sums, np.arange(len(sums)))), shape=(n_sums, len(sums)))


def _class_sums(references: Ints, scores: Floats) -> sparse.csr_array:
    """3 K sums: right rows, predictions and references of each class: all that accuracy, F1 and MCC ask for."""
    n_labels, predictions = scores.shape[1], compute_predictions(scores)
    ones = np.ones(len(references))
    right = _table(references, (references == predictions).astype(np.float64), n_labels)
    return sparse.vstack([right, _table(predictions, ones, n_labels), _table(references, ones, n_labels)], format="csr")


def _mean_of(rows: Callable[[Ints, Floats], Floats]) -> Callable[[Ints, Floats], sparse.csr_array]:
    """2 sums: of what each row gives, and of rows, whose number differs where groups are drawn."""
    return lambda references, scores: sparse.vstack(
        [
            _table(np.zeros_like(references), values, 1)
            for values in (rows(references, scores), np.ones(len(references)))
        ],
        format="csr",
    )


def _f1_by_class(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """F1 (K, B), 0 where not defined; predictions + references (K, B); references (K, B)."""
    right, predicted, referred = np.split(sums, 3)
    total = predicted + referred
    return np.divide(2 * right, total, out=np.zeros_like(total), where=total > 0), total, referred


def _accuracy(sums: Floats) -> Floats:
    right, _, referred = np.split(sums, 3)
    values: Floats = right.sum(axis=0) / referred.sum(axis=0)
    return values


def _macro_f1(sums: Floats) -> Floats:
    f1, total, _ = _f1_by_class(sums)
    values: Floats = f1.sum(axis=0) / np.count_nonzero(total, axis=0)
    return values


def _weighted_f1(sums: Floats) -> Floats:
    f1, _, referred = _f1_by_class(sums)
    values: Floats = (f1 * referred).sum(axis=0) / referred.sum(axis=0)
    return values


def _mcc(sums: Floats) -> Floats:
    right, predicted, referred = np.split(sums, 3)
    n_rows = referred.sum(axis=0)
    covariance = right.sum(axis=0) * n_rows - (predicted * referred).sum(axis=0)
    spread = (n_rows**2 - np.square(predicted).sum(axis=0)) * (n_rows**2 - np.square(referred).sum(axis=0))
    values: Floats = np.divide(covariance, np.sqrt(spread), out=np.zeros_like(covariance), where=spread > 0)
    return values


def _mean(sums: Floats) -> Floats:
    values: Floats = sums[0] / sums[1]
    return values


_SUMS: dict[str, Callable[[Ints, Floats], sparse.csr_array]] = {
    "classes": _class_sums,
    "brier": _mean_of(compute_brier_rows),
    "log_loss": _mean_of(compute_log_loss_rows),
}

_FORMULAS: dict[str, tuple[str, Callable[[Floats], Floats]]] = {
    "accuracy": ("classes", _accuracy),
    "macro_f1": ("classes", _macro_f1),
    "weighted_f1": ("classes", _weighted_f1),
    "mcc": ("classes", _mcc),
    "brier": ("brier", _mean),
    "log_loss": ("log_loss", _mean),
}


def _build_auroc(references: Ints, scores: Floats) -> Callable[[Floats], Floats]:
    """Weights (N, B) -> AUROC (B,): share of pairs (row of the class, other row) in the right order; ties count half.

    The m different scores of the class's own rows cut the axis into 2 m + 1 places: 2 j between two of them, 2 j + 1 on
    one. The other rows are summed by place, so that a rare class costs little.
    """
    tables = []
    for label in auroc_labels(scores.shape[1]):
        own, column = references == label, scores[:, label]
        if not own.any():
            continue  # no resample has pairs either
        cuts = np.unique(column[own])
        left = np.searchsorted(cuts, column, "left")
        places = left + np.searchsorted(cuts, column, "right")
        others = _table(places, (~own).astype(np.float64), 2 * len(cuts) + 1)
        tables.append((_table(np.minimum(left, len(cuts) - 1), own.astype(np.float64), len(cuts)), others))

    def resample(weights: Floats) -> Floats:
        total, defined = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
        for own_table, others_table in tables:
            own, others = own_table @ weights, others_table @ weights
            pairs = own.sum(axis=0) * others.sum(axis=0)
            won = (own * (others.cumsum(axis=0)[0:-1:2] + others[1::2] / 2)).sum(axis=0)
            total += np.divide(won, pairs, out=np.zeros_like(won), where=pairs > 0)
            defined += pairs > 0
        return np.divide(total, defined, out=np.full_like(total, np.nan), where=defined > 0)

    return resample
