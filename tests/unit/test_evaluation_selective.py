"""Accuracy against coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from finetune.evaluation.selective import POINTS, compute_selective_accuracy


def score(confidences, n_labels=2):
    """Scores whose largest is for class 0."""
    rest = (1 - np.asarray(confidences)) / (n_labels - 1)
    return np.column_stack([confidences, *([rest] * (n_labels - 1))])


def test_a_curve_worked_by_hand():
    # By confidence: right, right, wrong, right.
    found = compute_selective_accuracy(np.array([0, 1, 0, 0]), score([0.6, 0.7, 0.9, 0.8]))
    assert found["points"] == [
        {"coverage": 0.25, "accuracy": 1.0, "confidence": 0.9},
        {"coverage": 0.5, "accuracy": 1.0, "confidence": 0.8},
        {"coverage": 0.75, "accuracy": pytest.approx(2 / 3), "confidence": 0.7},
        {"coverage": 1.0, "accuracy": 0.75, "confidence": 0.6},
    ]
    assert found["area"] == pytest.approx((1 + 1 + 2 / 3 + 3 / 4) / 4)


def test_equal_confidence_is_no_order():
    references = np.array([0, 1, 1, 0])  # of the three unsure rows one is right
    found = compute_selective_accuracy(references, score([0.9, 0.7, 0.7, 0.7]))
    assert [one["accuracy"] for one in found["points"]] == pytest.approx([1, 2 / 3, 5 / 9, 1 / 2])


def test_no_rows():
    found = compute_selective_accuracy(np.zeros(0, dtype=np.int64), np.zeros((0, 2)))
    assert found["points"] == []
    assert math.isnan(found["area"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_curve_of_any_rows(data):
    n_rows = data.draw(st.integers(1, 230))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = generator.dirichlet(np.ones(3), n_rows).round(data.draw(st.integers(1, 4)))  # with ties
    references = generator.integers(0, 3, n_rows)
    found = compute_selective_accuracy(references, scores)
    coverages, accuracies, confidences = (
        [one[key] for one in found["points"]] for key in ("coverage", "accuracy", "confidence")
    )
    assert coverages[-1] == 1
    assert accuracies[-1] == pytest.approx(accuracy_score(references, scores.argmax(axis=1)))
    assert coverages == sorted(set(coverages))
    assert len(coverages) == min(n_rows, POINTS)
    assert confidences == sorted(confidences, reverse=True)
    assert min(accuracies) - 1e-9 <= found["area"] <= 1 + 1e-9
    order = generator.permutation(n_rows)
    again = compute_selective_accuracy(references[order], scores[order])
    assert again["area"] == pytest.approx(found["area"])
    assert [one["accuracy"] for one in again["points"]] == pytest.approx(accuracies)
