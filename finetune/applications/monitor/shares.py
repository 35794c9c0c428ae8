"""The negative share of a window's texts, corrected for what the model is known to get wrong."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from finetune.applications.monitor.records import BINS, Share, Tally, find_bin
from finetune.artifact.run_folder import load_json, save_json
from finetune.errors import DataError, ResourceError
from finetune.evaluation.quantification import (
    Floats,
    compute_interval,
    compute_ratios,
    estimate_pacc,
    estimate_sld,
    fit_recalibration,
)

GRID = 21
"""Shares, evenly from 0 to 1, at which it is known how far validation may mislead."""
RESAMPLES = 200
"""Of the validation rows, for that."""
CERTAIN = 1e-6
"""Mean probabilities of bins are kept so far from 0 and 1, and its square the corrected ones."""


@dataclass(frozen=True)
class Quantifier:
    """How the model's probabilities relate to the truth, from validation.

    Args:
        negatives, others: validation rows in each bin, (BINS,), of both some.
        centres: mean probability of the rows of a bin; its middle where there are none, (BINS,).
        slope, intercept: of the log odds, which make the bins' probabilities agree with what was seen in them.
        variances: of an estimate at each share of `GRID`, because validation is a sample, (GRID,).
    """

    negatives: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]
    centres: Floats
    slope: float
    intercept: float
    variances: Floats

    @property
    def prior(self) -> float:
        """The negative share of validation."""
        return float(self.negatives.sum() / (self.negatives.sum() + self.others.sum()))

    @cached_property
    def posteriors(self) -> Floats:
        """Probability that a text of a bin is negative, where the prior is that of validation, (BINS,)."""
        corrected = expit(self.slope * logit(self.centres) + self.intercept)
        return np.asarray(np.clip(corrected, CERTAIN**2, 1 - CERTAIN**2))

    @cached_property
    def ratios(self) -> Floats:
        """Likelihood ratio of negative to other, rising from bin to bin, (BINS,)."""
        return compute_ratios(self.posteriors, self.prior)

    @cached_property
    def matrix(self) -> Floats:
        """PACC's: mean posterior of (negative, other), in rows, for rows that are so, in columns, (2, 2)."""
        means = np.array([each @ self.posteriors / each.sum() for each in (self.negatives, self.others)])
        return np.stack([means, 1 - means])

    def estimate(self, tally: Tally, confidence: float = 0.95) -> Share:
        """The share of negative texts among those counted.

        Args:
            tally: a window's, or several windows' added up. Of no texts nothing is known: the prior, from 0 to 1.
            confidence: of the interval, inside (0, 1).
        """
        if not tally.total:
            return Share(self.prior, 0.0, 1.0, self.prior, self.prior, 0)
        value = float(estimate_sld(tally.bins, self.ratios, self.prior))
        variance = float(np.interp(value, np.linspace(0, 1, GRID), self.variances))
        low, high = compute_interval(tally.bins, self.ratios, value, variance, confidence)
        check = float(estimate_pacc(tally.bins, self.posteriors, self.matrix))
        return Share(value, low, high, check, tally.called / tally.total, tally.total)


def fit_quantifier(negatives: npt.ArrayLike, truths: npt.ArrayLike, *, seed: int = 13) -> Quantifier:
    """Learn from validation rows how probabilities relate to the truth.

    Args:
        negatives: calibrated probability of the negative class, of N rows that were not trained on, (N,).
        truths: whether each is negative, (N,).
        seed: of the resamples that say how uncertain this is.

    Raises:
        DataError: what was given are no probabilities, rows of one class only, or probabilities that do not tell the
            classes apart.
    """
    known, truth = np.asarray(negatives, dtype=np.float64), np.asarray(truths, dtype=bool)
    if known.shape != truth.shape or known.ndim != 1 or not ((known >= 0) & (known <= 1)).all():
        raise DataError(
            "monitor: validation must give each row a probability of the negative class, in [0, 1], and its truth, "
            f"got {known.shape} and {truth.shape} values."
        )
    if truth.all() or not truth.any():
        raise DataError(
            f"monitor: validation must have rows of the negative class and others, got {int(truth.sum())} negative of "
            f"{truth.size}. Name the class in monitor.negative, or give validation more rows."
        )
    places = np.array([find_bin(each) for each in known])
    counts = np.stack([np.bincount(places[truth == side], minlength=BINS) for side in (True, False)])
    sums = np.bincount(places, weights=known, minlength=BINS)
    totals = counts.sum(axis=0)
    centres = np.where(totals > 0, sums / np.maximum(totals, 1), (np.arange(BINS) + 0.5) / BINS)
    centres = np.clip(centres, CERTAIN, 1 - CERTAIN)
    slope, intercept = fit_recalibration(logit(centres), *counts)
    means = counts @ np.arange(BINS) / counts.sum(axis=1)
    if slope <= 0 or means[0] <= means[1]:
        raise DataError(
            "monitor: the model must find negative rows of validation more likely negative than others, got mean "
            f"probabilities of {means[0] / BINS:.2f} and {means[1] / BINS:.2f}. Train it longer, or correct "
            "monitor.negative."
        )
    variances = _compute_variances(counts, logit(centres), np.random.default_rng(seed))
    return Quantifier(counts[0], counts[1], centres, float(slope), float(intercept), variances)


def save_quantifier(path: Path, quantifier: Quantifier) -> None:
    """Write it as JSON."""
    content: dict[str, Any] = {
        "prior": quantifier.prior,
        "rows": int(quantifier.negatives.sum() + quantifier.others.sum()),
        "slope": quantifier.slope,
        "intercept": quantifier.intercept,
        "matrix": quantifier.matrix.tolist(),
    }
    content |= {name: getattr(quantifier, name).tolist() for name in ("negatives", "others", "centres", "variances")}
    save_json(path, content)


def load_quantifier(path: Path) -> Quantifier:
    """Read what `save_quantifier` wrote.

    Raises:
        ResourceError: the file is missing, or does not hold what it should.
    """
    again = "Run the recipe's monitor again."
    if not path.is_file():
        raise ResourceError(f"{path}: must hold how shares are corrected, got nothing there. {again}")
    found = load_json(path)
    lists = {}
    for name, size in (("negatives", BINS), ("others", BINS), ("centres", BINS), ("variances", GRID)):
        lists[name] = _read_numbers(found.get(name), size)
        if lists[name] is None:
            raise ResourceError(f"{path}: {name} must be {size} numbers of 0 or more, got something else. {again}")
    for name in ("slope", "intercept"):
        if isinstance(found.get(name), bool) or not isinstance(found.get(name), int | float):
            raise ResourceError(f"{path}: {name} must be a number, got {found.get(name)!r}. {again}")
    counts = [np.asarray(lists[name]) for name in ("negatives", "others")]
    centres = np.asarray(lists["centres"])
    is_sound = all((each == each.round()).all() and each.sum() > 0 for each in counts)
    is_sound &= bool((np.diff(centres) > 0).all() and centres[0] > 0 and centres[-1] < 1) and found["slope"] > 0
    if not is_sound:
        raise ResourceError(
            f"{path}: must hold counts of both classes, probabilities that rise, and a slope above 0, got others. "
            f"{again}"
        )
    negatives, others = (each.astype(np.int64) for each in counts)
    variances = np.asarray(lists["variances"])
    return Quantifier(negatives, others, centres, float(found["slope"]), float(found["intercept"]), variances)


def _read_numbers(found: Any, size: int) -> Floats | None:
    """A list of that many finite numbers of 0 or more; None where it is none."""
    if not isinstance(found, list) or len(found) != size:
        return None
    if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in found):
        return None
    values = np.asarray(found, dtype=np.float64)
    return values if bool((np.isfinite(values) & (values >= 0)).all()) else None


def _compute_variances(counts: npt.NDArray[np.int64], log_odds: Floats, generator: np.random.Generator) -> Floats:
    """How far an estimate is off because validation is a sample: mean square at each share of `GRID`.

    Each resample of validation is fitted as validation was and then asked for the share of texts in the proportions
    that validation itself had: it is to them what validation is to the world.

    Args:
        counts: rows of validation in each bin, negative and other, (2, BINS).
        log_odds: of each bin, (BINS,).
        generator: of the resamples.
    """
    total = int(counts.sum())
    drawn = generator.multinomial(total, counts.ravel() / total, size=RESAMPLES).reshape(-1, 2, BINS)
    drawn = drawn[(drawn.sum(axis=-1) > 0).all(axis=-1)]
    fitted = fit_recalibration(log_odds, drawn[:, 0], drawn[:, 1])
    priors = drawn[:, 0].sum(-1) / total
    posteriors = np.clip(expit(fitted[:, :1] * log_odds + fitted[:, 1:]), CERTAIN**2, 1 - CERTAIN**2)
    ratios = compute_ratios(posteriors, priors[:, None])
    shares = np.linspace(0, 1, GRID)
    rates = counts / counts.sum(axis=1, keepdims=True)
    worlds = shares[:, None] * rates[0] + (1 - shares[:, None]) * rates[1]
    found = np.stack([estimate_sld(world, ratios) for world in worlds])  # (GRID, resamples)
    return np.asarray(((found - shares[:, None]) ** 2).mean(axis=1))
