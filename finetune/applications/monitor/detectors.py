"""Tests on a topic's windows: worse news by CUSUM and EWMA, more news by a burst test.

All take arrays of any leading shape, so that thresholds are simulated with the code that watches. Worse news is judged
by what each text's probability says about the share, given how many texts there are; more news by their number alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, gammainc

from finetune.evaluation.quantification import Floats, compute_information, estimate_sld, sum_bins

WEIGHT = 0.1
"""Of the newest window in the EWMA: it finds what is too small for the CUSUM and lasts."""
LEAST_SHARE = 0.01
"""A usual share below it is taken for it: of a few texts none is negative by chance."""
LEAST_VOLUME = 1.0
"""A usual number of items below it is taken for it: a topic that is mostly silent has no bursts of two."""
LEAST_TAIL = 1e-300


@dataclass(frozen=True)
class Usual:
    """What is usual for a topic, from its reference windows. All arrays are (...)."""

    share: Floats
    """Of negative texts."""
    information: Floats
    """Of one text on the share."""
    items: Floats
    """Texts that the share comes from."""


def compute_usual(counts: npt.ArrayLike, ratios: Floats, start: npt.ArrayLike = 0.5) -> Usual:
    """The usual share from the texts of all reference windows together, counted in bins, (..., B)."""
    seen = np.asarray(counts, dtype=np.float64)
    share = np.clip(estimate_sld(seen, ratios, start), LEAST_SHARE, 1 - LEAST_SHARE)
    items = seen.sum(-1)
    return Usual(share, compute_information(seen, ratios, share) / np.maximum(items, 1), items)


def compute_gain(counts: npt.ArrayLike, ratios: Floats, usual: Usual, rise: float) -> Floats:
    """Log-likelihood ratio of a window's texts: the usual share and `rise` more, against the usual share, (..., B) ->
    (...).

    Page's CUSUM of it finds that rise soonest among all tests with its rate of false alarms (Moustakides 1986).
    """
    gains = ratios - 1
    risen = np.minimum(usual.share + rise, 1.0)
    logs = np.log1p(risen[..., None] * gains) - np.log1p(usual.share[..., None] * gains)
    return sum_bins(counts, logs)


def compute_score(counts: npt.ArrayLike, ratios: Floats, usual: Usual) -> Floats:
    """How far a window's share lies above the usual one, times its information: the first step of the maximum
    likelihood from there. Unlike the share itself it has no walls at 0 and 1. (..., B) -> (...).
    """
    gains = ratios - 1
    return sum_bins(counts, gains / (1 + usual.share[..., None] * gains))


def compute_spread(squares: npt.ArrayLike, windows: npt.ArrayLike) -> Floats:
    """How much more than by chance the reference windows differ, at least 1: news comes in stories.

    Args:
        squares: sum of the windows' score^2 / information, (...).
        windows: how many of them have texts, (...).
    """
    return np.maximum(1.0, np.asarray(squares) / np.maximum(windows, 1))


def compute_squares(counts: npt.ArrayLike, ratios: Floats, usual: Usual) -> Floats:
    """score^2 / information of windows: by chance 1 on average; 0 without texts: (..., B) -> (...)."""
    information = np.asarray(counts).sum(-1) * usual.information
    return np.asarray(compute_score(counts, ratios, usual) ** 2 / np.where(information > 0, information, 1.0))


def update_cusum(value: npt.ArrayLike, gain: npt.ArrayLike, spread: npt.ArrayLike) -> Floats:
    """Page's one-sided CUSUM, in nats."""
    return np.maximum(0.0, np.asarray(value) + np.asarray(gain) / spread)


def update_ewma(moments: npt.ArrayLike, score: npt.ArrayLike, information: npt.ArrayLike) -> Floats:
    """Weighted sums of the windows' scores, their variances and their information, (..., 3); windows without texts
    change nothing."""
    known, each, certainty = np.asarray(moments, dtype=np.float64), np.asarray(score), np.asarray(information)
    new = np.stack([WEIGHT * each, WEIGHT**2 * certainty, WEIGHT * certainty], axis=-1)
    moved = known * [1 - WEIGHT, (1 - WEIGHT) ** 2, 1 - WEIGHT] + new
    return np.where((certainty > 0)[..., None], moved, known)


def compute_ewma(moments: npt.ArrayLike, usual: Usual, spread: npt.ArrayLike) -> Floats:
    """The EWMA of the scores in standard errors, those of the usual share included, (..., 3) -> (...)."""
    score, variance, information = np.moveaxis(np.asarray(moments, dtype=np.float64), -1, 0)
    known = np.maximum(usual.items * usual.information, 1e-12)
    total = (variance + information**2 / known) * spread
    return np.asarray(score / np.sqrt(np.where(total > 0, total, 1.0)))


def compute_surprise(items: npt.ArrayLike, mean: npt.ArrayLike, variance: npt.ArrayLike) -> Floats:
    """-log10 of the probability of so many items or more in a window of usual volume.

    The volume is negative binomial with these moments, from the reference windows; Poisson where they vary no more than
    that.
    """
    seen, usual = np.asarray(items, dtype=np.float64), np.maximum(mean, LEAST_VOLUME)
    excess = np.asarray(variance, dtype=np.float64) - usual
    size = usual**2 / np.where(excess > 0, excess, 1.0)
    counted = np.maximum(seen, 1.0)
    tail = np.where(excess > 0, betainc(counted, size, usual / (usual + size)), gammainc(counted, usual))
    return np.asarray(-np.log10(np.maximum(np.where(seen > 0, tail, 1.0), LEAST_TAIL)))


def count_guard(reference_windows: int) -> int:
    """Windows that wait before they join the reference: a change that is being found must not become usual."""
    return max(8, reference_windows // 4)


def judge_streams(
    counts: npt.NDArray[np.int64], ratios: Floats, reference_windows: int, rise: float
) -> tuple[Floats, Floats]:
    """CUSUM and EWMA of many streams that nobody is told about: what the watcher computes, without its alerts.

    Args:
        counts: texts in each bin, (windows, streams, B); the first `reference_windows` are the first reference.
        ratios: (B,).
        reference_windows: of them.
        rise: what the CUSUM is to find.

    Returns:
        Both for the windows behind the first reference, (windows - reference_windows, streams).
    """
    guard = count_guard(reference_windows)
    first = counts[:reference_windows]
    reference = first.sum(axis=0)
    usual = compute_usual(reference, ratios)
    squares, has_texts = np.zeros(counts.shape[:2]), counts.sum(axis=-1) > 0
    squares[:reference_windows] = compute_squares(first, ratios, usual)
    cusum, moments = np.zeros(counts.shape[1]), np.zeros((counts.shape[1], 3))
    statistics = np.zeros((2, len(counts) - reference_windows, counts.shape[1]))
    for i in range(reference_windows, len(counts)):
        leaves, joins = max(0, i - guard - reference_windows), max(reference_windows, i - guard)
        spread = compute_spread(squares[leaves:joins].sum(axis=0), has_texts[leaves:joins].sum(axis=0))
        squares[i] = compute_squares(counts[i], ratios, usual)
        cusum = update_cusum(cusum, compute_gain(counts[i], ratios, usual, rise), spread)
        information = counts[i].sum(axis=-1) * usual.information
        moments = update_ewma(moments, compute_score(counts[i], ratios, usual), information)
        statistics[:, i - reference_windows] = cusum, compute_ewma(moments, usual, spread)
        if i >= reference_windows + guard:  # the window that waited longest joins, the oldest leaves
            reference = reference + counts[joins] - counts[leaves]
            usual = compute_usual(reference, ratios, usual.share)
    return statistics[0], statistics[1]
