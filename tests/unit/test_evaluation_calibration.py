from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve

from finetune.evaluation.calibration import apply_temperature, compute_reliability, fit_temperature
from finetune.evaluation.metrics import compute_metric


def draw_calibrated(n_rows: int, n_labels: int, scale: float = 2) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and references that are drawn from their own softmax."""
    generator = np.random.default_rng(0)
    logits = generator.normal(scale=scale, size=(n_rows, n_labels))
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
        likelihood = compute_metric("log_loss", references, apply_temperature(logits, temperature))
        return 300 * likelihood - stats.norm.logpdf(math.log(temperature), scale=0.5)

    assert loss(best) <= min(loss(best * 1.01), loss(best / 1.01), loss(1.0))


def test_calibration_lowers_ece() -> None:
    logits, references = draw_calibrated(4000, 4)
    before = compute_metric("ece", references, apply_temperature(logits * 4, 1.0))
    after = compute_metric("ece", references, apply_temperature(logits * 4, fit_temperature(logits * 4, references)))
    assert after < 0.03 < before


@pytest.mark.parametrize(("right", "n_rows", "excess"), [(1.0, 10, 0.02), (1.0, 300, 0.005), (3.0, 300, 0.02)])
def test_few_rows_do_not_make_confidence_worse(right: float, n_rows: int, excess: float) -> None:
    """Log loss on new rows lies hardly above that of the right temperature, on average over 100 validation splits."""
    logits, references = draw_calibrated(40_000, 3, scale=8)
    new, truth = logits[:10_000], references[:10_000]
    best = compute_metric("log_loss", truth, apply_temperature(new, 1.0))
    assert compute_metric("accuracy", truth, new) > 0.9, "ten rows are often without a mistake"
    generator, losses = np.random.default_rng(1), []
    for _ in range(100):
        rows = generator.integers(0, len(logits), n_rows)
        temperature = fit_temperature(logits[rows] * right, references[rows])
        losses.append(compute_metric("log_loss", truth, apply_temperature(new * right, temperature)))
    assert np.mean(losses) < best + excess


def test_temperature_stays_in_range() -> None:
    never_wrong, always_wrong = np.tile(np.eye(2), (10_000, 1)), np.tile(np.eye(2) * 1000, (10_000, 1))
    classes = np.tile([0, 1], 10_000)
    assert 0.05 <= fit_temperature(never_wrong * 1e-3, classes) < 0.051
    assert 19.9 < fit_temperature(always_wrong, 1 - classes) <= 20
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
