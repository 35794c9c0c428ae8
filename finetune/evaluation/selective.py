"""Selective accuracy: how often a model is right on the rows that it answers when it may keep silent on the rest.

The rows are sorted by confidence; at coverage c the surest share c is answered. It is 1 - the risk of the risk-coverage
curve of selective classification (El-Yaniv & Wiener 2010; arXiv:1705.08500), and its area 1 - the AURC of
arXiv:1805.08206.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.evaluation.metrics import Floats, Ints, compute_predictions

POINTS = 100


def compute_selective_accuracy(references: Ints, scores: Floats) -> dict[str, Any]:
    """Accuracy against coverage.

    Rows of equal confidence come in no order: each of them counts as right as they are on average.

    Args:
        references: (N,).
        scores: Probabilities, (N, K).

    Returns:
        {"area", "points"}: the mean of the accuracies of the surest 1, 2, ... N rows, nan without rows; and up to
        `POINTS` of them, {"coverage", "accuracy", "confidence"}, the last of the least sure row that is answered.
    """
    if not len(references):
        return {"area": float("nan"), "points": []}
    confidences, right = scores.max(axis=1), (compute_predictions(scores) == references).astype(np.float64)
    order = np.argsort(-confidences, kind="stable")
    confidences, right = confidences[order], right[order]
    _, tie, counts = np.unique(-confidences, return_inverse=True, return_counts=True)
    right = (np.bincount(tie, weights=right) / counts)[tie]
    n_rows = len(right)
    accuracies = np.cumsum(right) / np.arange(1, n_rows + 1)
    kept = np.unique(np.ceil(np.arange(1, POINTS + 1) * n_rows / POINTS).astype(np.int64))
    return {
        "area": float(accuracies.mean()),
        "points": [
            {
                "coverage": float(count / n_rows),
                "accuracy": float(accuracies[count - 1]),
                "confidence": float(confidences[count - 1]),
            }
            for count in kept.tolist()
        ],
    }
