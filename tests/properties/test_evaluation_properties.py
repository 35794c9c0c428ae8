from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluation.calibration import apply_temperature, compute_reliability, fit_temperature
from finetune.evaluation.intervals import Resampling, build_resampler, compute_intervals
from finetune.evaluation.metrics import METRICS, compute_metric
from finetune.evaluation.slices import group_rows


@st.composite
def splits(draw: st.DrawFn, n_labels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """References (N,) and logits (N, K) on a grid, so that there are ties, saturated scores and lost classes."""
    k = n_labels or draw(st.integers(2, 5))
    n = draw(st.integers(1, 30))
    references = draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))
    logits = draw(st.lists(st.lists(st.integers(-20, 20), min_size=k, max_size=k), min_size=n, max_size=n))
    return np.array(references), np.array(logits, dtype=np.float64) / 2


def same(one: float, two: float) -> bool:
    return (math.isnan(one) and math.isnan(two)) or math.isclose(one, two, abs_tol=1e-9)


@settings(max_examples=30, deadline=None)
@given(splits())
def test_values_stay_in_their_range(split: tuple[np.ndarray, np.ndarray]) -> None:
    references, logits = split
    for name in METRICS:
        value = compute_metric(name, references, apply_temperature(logits, 1.0))
        low, high = {"mcc": (-1, 1), "brier": (0, 2), "log_loss": (0, 37)}.get(name, (0, 1))
        assert math.isnan(value) or low - 1e-9 <= value <= high + 1e-9


@settings(max_examples=30, deadline=None)
@given(splits(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(split: tuple[np.ndarray, np.ndarray], random: object) -> None:
    references, logits = split
    order = np.arange(len(references))
    random.shuffle(order)  # type: ignore[attr-defined]  # hypothesis gives a Random
    scores = apply_temperature(logits, 1.0)
    for name in METRICS:
        assert same(compute_metric(name, references, scores), compute_metric(name, references[order], scores[order]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 6), st.permutations(range(6)))
def test_the_names_of_classes_do_not_matter(seed: int, n_labels: int, order: list[int]) -> None:
    generator = np.random.default_rng(seed)
    references, scores = generator.integers(0, n_labels, 20), generator.dirichlet(np.ones(n_labels), 20)
    renamed = np.array([label for label in order if label < n_labels])
    for name in METRICS:
        moved = np.empty_like(scores)
        moved[:, renamed] = scores
        assert same(compute_metric(name, references, scores), compute_metric(name, renamed[references], moved))


@settings(max_examples=30, deadline=None)
@given(splits())
def test_counting_each_row_once_is_the_metric(split: tuple[np.ndarray, np.ndarray]) -> None:
    references, logits = split
    scores = apply_temperature(logits, 1.0)
    fast = build_resampler(references, scores, list(METRICS))(np.ones((len(references), 1)))
    assert list(fast) == [name for name in METRICS if name not in ("auroc", "ece")] + ["auroc"]
    for name, values in fast.items():
        assert same(float(values[0]), compute_metric(name, references, scores))


@settings(max_examples=30, deadline=None)
@given(splits(), st.integers(0, 2**32 - 1))
def test_intervals_are_ordered_and_in_range(split: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    references, logits = split
    scores = apply_temperature(logits, 1.0)
    wide = compute_intervals(references, scores, list(METRICS), confidence=0.99, resampling=Resampling(100, seed))
    narrow = compute_intervals(references, scores, list(METRICS), confidence=0.8, resampling=Resampling(100, seed))
    for name in METRICS:
        if not math.isnan(wide[name]["low"]):
            ends = [wide[name]["low"], narrow[name]["low"], narrow[name]["high"], wide[name]["high"]]
            assert ends == sorted(ends)


@settings(max_examples=30, deadline=None)
@given(splits(), st.floats(0.05, 20))
def test_temperature_keeps_the_decision(split: tuple[np.ndarray, np.ndarray], temperature: float) -> None:
    references, logits = split
    plain, scaled = apply_temperature(logits, 1.0), apply_temperature(logits, temperature)
    np.testing.assert_allclose(scaled.sum(axis=1), 1)
    np.testing.assert_array_equal(plain.argmax(axis=1), scaled.argmax(axis=1))
    assert compute_metric("accuracy", references, plain) == compute_metric("accuracy", references, scaled)


@settings(max_examples=30, deadline=None)
@given(splits())
def test_a_fitted_temperature_never_raises_the_loss(split: tuple[np.ndarray, np.ndarray]) -> None:
    references, logits = split
    temperature = fit_temperature(logits, references)
    assert 0.05 <= temperature <= 20
    before, after = (compute_metric("log_loss", references, apply_temperature(logits, t)) for t in (1.0, temperature))
    assert after <= before + 1e-4


@settings(max_examples=30, deadline=None)
@given(splits(), st.integers(1, 20))
def test_reliability_counts_every_row_in_its_bin(split: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    references, logits = split
    table = compute_reliability(references, apply_temperature(logits, 1.0), bins)
    assert sum(b["count"] for b in table) == len(references)
    assert all(b["low"] - 1e-9 <= b["confidence"] <= b["high"] + 1e-9 for b in table if b["count"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)), max_size=80))
def test_slices_split_the_rows_whatever_the_column_holds(values: list[object]) -> None:
    n = len(values)
    for column in ("column", "length"):
        groups = group_rows(column, [""] * n, [{"column": value} for value in values])
        assert sorted(p for _, chosen in groups for p in chosen) == list(range(n))
        assert len(groups) <= 13
        assert len({value for value, _ in groups}) == len(groups)
        assert all(len(chosen) >= 10 for value, chosen in groups if value != "other")
