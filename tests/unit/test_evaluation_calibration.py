from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from finetune.evaluation.calibration import apply_temperature, compute_reliability, fit_temperature
from finetune.evaluation.metrics import compute_metric


def draw_calibrated(n_rows: int, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and references that are drawn from their own softmax."""
    generator = np.random.default_rng(0)
    logits = generator.normal(scale=2, size=(n_rows, n_labels))
    scores = apply_temperature(logits, 1.0)
    return logits, (scores.cumsum(axis=1) < generator.random(n_rows)[:, None]).sum(axis=1).clip(0, n_labels - 1)


@pytest.mark.parametrize("planted", [0.25, 1.0, 3.0])
def test_finds_a_planted_temperature(planted: float) -> None:
    logits, references = draw_calibrated(6000, 4)
    assert fit_temperature(logits * planted, references) == pytest.approx(planted, rel=0.06)


def test_no_temperature_nearby_has_a_lower_loss() -> None:
    logits, references = draw_calibrated(300, 3)
    logits *= 2.5
    best = fit_temperature(logits, references)

    def loss(temperature: float) -> float:
        return compute_metric("log_loss", references, apply_temperature(logits, temperature))

    assert loss(best) <= min(loss(best * 1.01), loss(best / 1.01), loss(1.0))


def test_calibration_lowers_ece() -> None:
    logits, references = draw_calibrated(4000, 4)
    before = compute_metric("ece", references, apply_temperature(logits * 4, 1.0))
    after = compute_metric("ece", references, apply_temperature(logits * 4, fit_temperature(logits * 4, references)))
    assert after < 0.03 < before


def test_temperature_stays_in_range() -> None:
    assert fit_temperature(np.eye(3), np.arange(3)) == pytest.approx(0.05, rel=1e-3)  # never wrong
    assert fit_temperature(np.eye(2) * 10, np.array([1, 0])) == pytest.approx(20, rel=1e-3)  # always wrong
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=np.int64)) == 1.0


def test_scores_are_the_softmax() -> None:
    scores = apply_temperature(np.log([[1.0, 2.0, 5.0]]) * 3, 3.0)
    np.testing.assert_allclose(scores, [[0.125, 0.25, 0.625]])
    assert np.isfinite(apply_temperature(np.array([[1e4, -1e4]], dtype=np.float32), 0.05)).all()


def test_reliability_agrees_with_scikit_learn() -> None:
    logits, references = draw_calibrated(500, 3)
    scores = apply_temperature(logits, 1.0)
    table = compute_reliability(references, scores, bins=10)
    accuracy, confidence = calibration_curve(
        scores.argmax(axis=1) == references, scores.max(axis=1), n_bins=10, strategy="uniform"
    )
    filled = [b for b in table if b["count"]]
    np.testing.assert_allclose([b["accuracy"] for b in filled], accuracy)
    np.testing.assert_allclose([b["confidence"] for b in filled], confidence)
    assert sum(b["count"] for b in table) == 500


def test_reliability_spans_zero_to_one_and_marks_empty_bins() -> None:
    table = compute_reliability(np.array([0]), np.array([[1.0, 0.0]]))
    assert len(table) == 15
    assert table[0]["low"] == 0
    assert table[-1] == {"low": pytest.approx(14 / 15), "high": 1.0, "count": 1, "confidence": 1.0, "accuracy": 1.0}
    assert all(math.isnan(b["accuracy"]) for b in table[:-1])


def test_ece_follows_from_reliability() -> None:
    logits, references = draw_calibrated(200, 3)
    scores = apply_temperature(logits * 2, 1.0)
    gaps = [
        b["count"] * abs(b["accuracy"] - b["confidence"]) for b in compute_reliability(references, scores) if b["count"]
    ]
    assert compute_metric("ece", references, scores) == pytest.approx(sum(gaps) / 200)
