"""How well a classifier knows the texts that belong to none of its classes.

Each row gets a score from its logits, larger for rows that look outside. `energy`, -logsumexp(logits)
(arXiv:2010.03759, at its temperature of 1), is the default: a softmax sees the differences between the logits of a row
and forgets how large they are, and for a text unlike all that was trained on they are small. `max_probability`, 1 - the
largest probability (arXiv:1610.02136), is what can be had where there are probabilities alone, as of baselines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logsumexp, softmax

from finetune.evaluation.intervals import Estimate, Resampling, compute_estimates
from finetune.evaluation.metrics import KEPT_RATIO, Floats
from finetune.recipe.schema import OutsideScore

Bools = npt.NDArray[np.bool_]


def compute_outside_scores(logits: npt.ArrayLike, score: OutsideScore) -> Floats:
    """How far outside each row looks, (N, K) logits -> (N,)."""
    raw = np.asarray(logits, dtype=np.float64)
    if score == "energy":
        return np.asarray(-logsumexp(raw, axis=1), dtype=np.float64)
    return compute_uncertainty(softmax(raw, axis=1))


def compute_uncertainty(scores: Floats) -> Floats:
    """1 - the largest probability of each row, (N, K) -> (N,)."""
    uncertainty: Floats = 1 - scores.max(axis=1)
    return uncertainty


def compute_threshold(scores: Floats) -> float:
    """The smallest of these scores that at least `KEPT_RATIO` of them do not exceed, (N,) of rows with a class."""
    return float(np.quantile(scores, KEPT_RATIO, method="inverted_cdf"))


@dataclass(frozen=True, slots=True)
class OutsideRule:
    """What validation says about the score of a model."""

    score: OutsideScore
    threshold: float
    """Rows above it are taken for outside; `KEPT_RATIO` of the rows with a class are not."""
    slope: float | None = None
    """Of the log-odds of being outside, in the score; None where validation has no such rows."""
    intercept: float | None = None

    def compute_probabilities(self, logits: npt.ArrayLike) -> Floats | None:
        """The probability that a row belongs to no class, (N, K) -> (N,), where they are as frequent as in validation;
        None where it could not be fitted."""
        if self.slope is None or self.intercept is None:
            return None
        probabilities: Floats = expit(self.slope * compute_outside_scores(logits, self.score) + self.intercept)
        return probabilities


def fit_outside(logits: npt.ArrayLike, is_outside: Bools, score: OutsideScore) -> OutsideRule:
    """Choose the threshold, and fit a logistic regression of outside or not on the score (Platt 1999).

    Args:
        logits: of rows that were not trained on, (N, K).
        is_outside: (N,); some rows have a class.
        score: which one.
    """
    scores = compute_outside_scores(logits, score)
    threshold = compute_threshold(scores[~is_outside])
    if not is_outside.any():
        return OutsideRule(score, threshold)
    from sklearn.linear_model import LogisticRegression

    # Standardised, so that the penalty, which keeps the slope finite where the rows come apart, is the same for both
    # scores.
    center, scale = float(scores.mean()), float(scores.std()) or 1.0
    model = LogisticRegression().fit((scores[:, None] - center) / scale, is_outside)
    slope = float(model.coef_[0, 0]) / scale
    return OutsideRule(score, threshold, slope, float(model.intercept_[0]) - slope * center)


@dataclass(frozen=True, slots=True)
class OutsideScores:
    """The scores of one system on the rows of a split, (N,), and its threshold from validation."""

    scores: Floats
    threshold: float


@dataclass(frozen=True, slots=True)
class OutsideRows:
    """All rows of a split, those with a class and those without."""

    label: str
    """What the data call rows without a class."""
    is_outside: Bools
    """(N,)."""
    resampling: Resampling
    """Of the N rows."""
    score: OutsideScore
    model: OutsideScores
    baselines: Mapping[str, OutsideScores] = field(default_factory=dict)

    def compute_estimates(self, system: OutsideScores) -> dict[str, Estimate]:
        """The metrics of `OUTSIDE_METRICS`, of the model or of a baseline."""
        return compute_outside_estimates(self.is_outside, system, self.resampling)

    def describe(self) -> dict[str, Any]:
        """What `<split>.json` says beside the metrics."""
        kept = self.model.scores[~self.is_outside] <= self.model.threshold
        return {
            "label": self.label,
            "rows": int(self.is_outside.sum()),
            "score": self.score,
            "threshold": self.model.threshold,
            "kept": float(kept.mean()) if kept.size else float("nan"),
        }


def compute_outside_estimates(is_outside: Bools, system: OutsideScores, resampling: Resampling) -> dict[str, Estimate]:
    """The metrics of `OUTSIDE_METRICS` for one system on all rows of a split."""
    ranked = np.stack([-system.scores, system.scores], axis=1)
    auroc = compute_estimates(is_outside.astype(np.int64), ranked, ["auroc"], resampling=resampling)["auroc"]
    found = (system.scores[is_outside] > system.threshold).astype(np.float64)
    # The share of rows found is the accuracy of saying "outside" where that is always right.
    right = np.ones(len(found), dtype=np.int64)
    own = resampling.take(is_outside)
    recall = compute_estimates(right, np.stack([1 - found, found], axis=1), ["accuracy"], resampling=own)["accuracy"]
    return {"outside_auroc": auroc, "outside_recall_at_95": recall}
