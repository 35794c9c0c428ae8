"""Temperature scaling and reliability (Guo et al. 2017, arXiv:1706.04599)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, softmax

from finetune.evaluation.metrics import ECE_BINS, Floats, Ints, compute_bins, compute_predictions

LOWEST, HIGHEST = 0.05, 20.0
SPREAD = 0.5
"""Standard deviation of log T before any row is seen: a temperature lies between 0.4 and 2.7, says the prior, in 19 of
20 models."""


def fit_temperature(logits: npt.ArrayLike, references: Ints) -> float:
    """The temperature in [0.05, 20] that minimises the negative log-likelihood of softmax(logits / T), summed over the
    rows, and of T itself, whose logarithm has the prior N(0, 0.5^2).

    The prior is not in the paper, where thousands of rows outweigh it. Few rows without a mistake would sharpen the
    scores without end: at the bound, one mistake on new rows costs more than all the sharpness gains.

    Args:
        logits: Raw outputs on rows that were not trained on, (N, K).
        references: Labels, (N,).
    """
    from scipy.optimize import minimize_scalar  # takes longer than all that `finetune check` needs of scipy

    raw, rows = np.asarray(logits, dtype=np.float64), np.arange(len(references))
    if not rows.size:
        return 1.0

    def loss(log_temperature: float) -> float:
        return -float(
            log_softmax(raw / np.exp(log_temperature), axis=1)[rows, references].sum()
        ) + log_temperature**2 / (2 * SPREAD**2)

    found = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x))


def apply_temperature(logits: npt.ArrayLike, temperature: float) -> Floats:
    """Scores softmax(logits / temperature), (N, K) -> (N, K); 1 leaves the softmax as it is."""
    scores: Floats = softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)
    return scores


def compute_reliability(references: Ints, scores: Floats, bins: int = ECE_BINS) -> list[dict[str, float]]:
    """How often the top label is right, by its score.

    Returns:
        `bins` equal-width bins over [0, 1], each {"low", "high", "count", "confidence", "accuracy"}; the last two are
        means over the bin's rows, nan in an empty bin.
    """
    confidences, right = scores.max(axis=1), compute_predictions(scores) == references
    chosen = compute_bins(confidences, bins)
    edges = np.linspace(0.0, 1.0, bins + 1)
    table = []
    for index in range(bins):
        inside = chosen == index
        count = int(inside.sum())
        table.append(
            {
                "low": float(edges[index]),
                "high": float(edges[index + 1]),
                "count": count,
                "confidence": float(confidences[inside].mean()) if count else float("nan"),
                "accuracy": float(right[inside].mean()) if count else float("nan"),
            }
        )
    return table
