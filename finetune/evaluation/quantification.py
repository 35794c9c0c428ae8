"""Quantification: how many of some texts are negative, from a classifier that errs.

The classifier was judged on validation texts of one prior. Where only the prior changes, a text's likelihood ratio of
negative to other stays what it was, and the share of new texts is the maximum of a likelihood with one parameter: what
the EM of Saerens, Latinne and Decaestecker (2002), SLD, converges to. PACC (Bella et al. 2010) solves for the mean
posterior instead. Counting what is called negative (classify and count) is the biased way that both correct.

Texts are counted in B bins of their probability, so that the cost does not depend on how many there are; with a bin for
each text the functions are the unbinned ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import chi2

Floats = npt.NDArray[np.float64]

PENALTY = 4.0
"""On a recalibration's slope away from 1: what two standard errors of 1/2 would say against it."""
TOLERANCE = 1e-9


def sum_bins(counts: npt.ArrayLike, values: npt.ArrayLike) -> Floats:
    """Sum over bins of counts times values, (..., B) and (..., B) or (B,) -> (...)."""
    each, other = np.asarray(counts, dtype=np.float64), np.asarray(values, dtype=np.float64)
    return np.asarray(np.einsum("...b,...b->...", each, other))


def fit_recalibration(log_odds: npt.ArrayLike, negatives: npt.ArrayLike, others: npt.ArrayLike) -> Floats:
    """Slope and intercept that make the probabilities of bins agree with what was seen in them.

    The logistic regression of the truth on the log odds: temperature with bias, after which SLD is hardest to beat
    (arXiv:1901.06852). The intercept is free, so that the mean posterior is the share of negatives exactly; the slope
    is held near 1, so that it is finite where the classes come apart.

    Args:
        log_odds: of each bin's probability, (B,).
        negatives, others: rows in each bin, (..., B); some of each.

    Returns:
        Slope and intercept, (..., 2).
    """
    scores = np.asarray(log_odds, dtype=np.float64)
    seen = np.asarray(negatives, dtype=np.float64)
    total = seen + np.asarray(others, dtype=np.float64)
    slope, intercept = np.ones(seen.shape[:-1]), np.zeros(seen.shape[:-1])
    for _ in range(100):
        posteriors = expit(slope[..., None] * scores + intercept[..., None])
        missing = seen - total * posteriors
        weights = total * posteriors * (1 - posteriors)
        # Newton's step of the two, by Cramer's rule.
        by_slope = (missing * scores).sum(-1) - PENALTY * (slope - 1)
        by_intercept = missing.sum(-1)
        a = (weights * scores**2).sum(-1) + PENALTY
        b = (weights * scores).sum(-1)
        c = weights.sum(-1) + 1e-9
        determinant = a * c - b**2
        steps = np.stack([(c * by_slope - b * by_intercept), (a * by_intercept - b * by_slope)]) / determinant
        steps = np.clip(steps, -1, 1)  # far from the optimum a full step may overshoot
        slope, intercept = slope + steps[0], intercept + steps[1]
        if np.abs(steps).max(initial=0) < TOLERANCE:
            break
    return np.stack([slope, intercept], axis=-1)


def compute_ratios(posteriors: npt.ArrayLike, prior: float | Floats) -> Floats:
    """Likelihood ratios of negative to other, from calibrated posteriors under a prior, both inside (0, 1)."""
    known = np.asarray(posteriors, dtype=np.float64)
    return np.asarray(known / (1 - known) * ((1 - prior) / prior))


def estimate_sld(counts: npt.ArrayLike, ratios: Floats, start: npt.ArrayLike = 0.5) -> Floats:
    """The share of negatives under which the counts are likeliest.

    It is where SLD's EM converges to; EM itself needs thousands of steps near 0 and 1. The likelihood is concave, so
    Newton's steps inside a shrinking bracket find it.

    Args:
        counts: texts in each bin, (..., B).
        ratios: likelihood ratio of each bin, above 0, (B,) or as counts.
        start: a guess, inside (0, 1).

    Returns:
        In [0, 1], (...); 0 where there are no texts.
    """
    seen = np.asarray(counts, dtype=np.float64)
    gains = ratios - 1
    low, high = np.zeros(seen.shape[:-1]), np.ones(seen.shape[:-1])
    at_zero = sum_bins(seen, gains) <= 0
    at_one = ~at_zero & (sum_bins(seen, gains / ratios) >= 0)
    share = np.clip(np.broadcast_to(np.asarray(start, dtype=np.float64), low.shape), 1e-6, 1 - 1e-6)
    for _ in range(100):
        rates = gains / (1 + share[..., None] * gains)
        slope, curvature = sum_bins(seen, rates), sum_bins(seen, rates**2)
        low, high = np.where(slope > 0, share, low), np.where(slope < 0, share, high)
        moved = share + slope / np.where(curvature > 0, curvature, 1)
        moved = np.where((moved >= low) & (moved <= high), moved, (low + high) / 2)
        is_done = bool((at_zero | at_one | (np.abs(moved - share) < TOLERANCE)).all())
        share = moved
        if is_done:
            break
    return np.where(at_zero, 0.0, np.where(at_one, 1.0, share))


def compute_information(counts: npt.ArrayLike, ratios: Floats, share: npt.ArrayLike) -> Floats:
    """Observed Fisher information on the share, 1 / variance, (..., B) -> (...)."""
    gains = ratios - 1
    rates = gains / (1 + np.asarray(share, dtype=np.float64)[..., None] * gains)
    return sum_bins(counts, rates**2)


def compute_interval(
    counts: npt.ArrayLike, ratios: Floats, share: float, variance: float, confidence: float
) -> tuple[float, float]:
    """The shares that the counts do not speak against: an interval by likelihood ratio (Wilks 1938).

    It covers the share of the source that the texts come from, which their own share varies around. The ratios come
    from validation and are uncertain too: the log-likelihood is made flatter by that part of the variance.

    Args:
        counts: texts in each bin, (B,).
        ratios: (B,).
        share: where the likelihood is greatest.
        variance: of the share, because of validation.
        confidence: inside (0, 1).

    Returns:
        Both ends, in [0, 1]; 0 and 1 where there are no texts.
    """
    seen = np.asarray(counts, dtype=np.float64)
    gains = ratios - 1

    def likelihood(value: float) -> float:
        return float(seen @ np.log1p(value * gains))

    flatness = 1 + variance * float(compute_information(seen, ratios, share))
    least = likelihood(share) - flatness * float(chi2.ppf(confidence, 1)) / 2
    ends = []
    for end in (0.0, 1.0):
        inside, outside = share, end
        if likelihood(end) >= least:
            inside = end
        for _ in range(40 if inside != end else 0):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if likelihood(middle) >= least else (inside, middle)
        ends.append(inside)
    return ends[0], ends[1]


def estimate_pacc(counts: npt.ArrayLike, posteriors: Floats, matrix: npt.ArrayLike) -> Floats:
    """The share of negatives that explains the mean posterior.

    Args:
        counts: texts in each bin, (..., B), some of them.
        posteriors: of each bin, (B,).
        matrix: mean posterior of (negative, other) in its rows, for texts that are negative and other in its columns,
            (2, 2); the columns differ.

    Returns:
        In [0, 1], (...).
    """
    seen = np.asarray(counts, dtype=np.float64)
    mean = (seen @ posteriors) / seen.sum(-1)
    shares = np.linalg.solve(np.asarray(matrix, dtype=np.float64), np.stack([mean.ravel(), 1 - mean.ravel()]))
    return np.asarray(np.clip(shares[0], 0, 1).reshape(mean.shape))
