from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from finetune.evaluation import intervals
from finetune.evaluation.intervals import (
    Estimate,
    Resampling,
    build_resampler,
    compute_difference,
    compute_estimates,
    compute_interval,
    compute_intervals,
    draw_weights,
)
from finetune.evaluation.metrics import METRICS, compute_metric

DRAWN = [name for name in METRICS if name != "ece"]


def draw(n_rows: int, n_labels: int, seed: int = 0, skill: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Skewed classes, and scores rounded so that there are ties."""
    generator = np.random.default_rng(seed)
    share = 0.5 ** np.arange(n_labels)
    references = generator.choice(n_labels, n_rows, p=share / share.sum())
    raw = generator.exponential(size=(n_rows, n_labels)).round(1) + 0.1
    raw[np.arange(n_rows), references] += skill
    return references, raw / raw.sum(axis=1, keepdims=True)


def make_wrong(references: np.ndarray, wrong: list[int]) -> np.ndarray:
    """Scores of a two-class system that errs on the given rows."""
    predictions = references.copy()
    predictions[wrong] = 1 - predictions[wrong]
    return np.eye(2)[predictions]


@pytest.mark.parametrize("n_labels", [2, 3, 6])
@pytest.mark.parametrize("name", DRAWN)
def test_a_resample_equals_the_metric_on_its_rows(name: str, n_labels: int) -> None:
    references, scores = draw(30, n_labels)  # small, so that resamples lose whole classes
    (weights,) = draw_weights(30, Resampling(40, 3))
    fast = build_resampler(references, scores, [name])(weights)[name]
    rows = [np.repeat(np.arange(30), column.astype(int)) for column in weights.T]
    slow = [compute_metric(name, references[chosen], scores[chosen]) for chosen in rows]
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-12)


def test_same_distribution_as_resampling_rows_with_scikit_learn() -> None:
    references, scores = draw(120, 4)
    predictions = scores.argmax(axis=1)
    generator = np.random.default_rng(1)
    naive = []
    for _ in range(400):
        chosen = generator.integers(0, 120, 120)
        naive.append(sk.f1_score(references[chosen], predictions[chosen], average="macro"))
    fast = compute_estimates(references, scores, ["macro_f1"], resampling=Resampling(4000, 2))["macro_f1"].samples
    assert stats.ks_2samp(naive, fast).pvalue > 0.01
    levels = [0.025, 0.5, 0.975]
    np.testing.assert_allclose(np.quantile(fast, levels), np.quantile(naive, levels), atol=0.02)


def test_every_resample_draws_as_many_rows_as_there_are() -> None:
    weights = np.concatenate(list(draw_weights(50, Resampling(300, 0))), axis=1)
    assert weights.shape == (50, 300)
    assert (weights.sum(axis=0) == 50).all()
    # Each count is binomial (50, 1/50): mean 1, variance 49/50.
    assert weights.var() == pytest.approx(49 / 50, rel=0.05)


def test_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    references, scores = draw(40, 3)
    whole = compute_estimates(references, scores, ["macro_f1", "auroc"], resampling=Resampling(101, 5))
    monkeypatch.setattr(intervals, "BLOCK_CELLS", 400)
    blocks = compute_estimates(references, scores, ["macro_f1", "auroc"], resampling=Resampling(101, 5))
    for name, estimate in whole.items():
        np.testing.assert_allclose(estimate.samples, blocks[name].samples, rtol=0, atol=1e-12)


def test_accuracy_interval_is_the_binomial_one() -> None:
    references = np.zeros(1000, dtype=np.int64)
    scores = make_wrong(references, list(range(200)))
    found = compute_intervals(references, scores, ["accuracy"], confidence=0.9, resampling=Resampling(5000, 0))[
        "accuracy"
    ]
    low, high = stats.binom.ppf([0.05, 0.95], 1000, 0.8) / 1000
    assert found["value"] == pytest.approx(0.8)
    assert found["low"] == pytest.approx(low, abs=0.002)
    assert found["high"] == pytest.approx(high, abs=0.002)


def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        references = generator.integers(0, 2, 250)
        scores = make_wrong(references, np.flatnonzero(generator.random(250) < 0.25).tolist())
        found = compute_intervals(references, scores, ["accuracy"], confidence=0.9, resampling=Resampling(200, seed))
        held += found["accuracy"]["low"] <= 0.75 <= found["accuracy"]["high"]
    assert stats.binomtest(held, 200, 0.9).pvalue > 0.01


def test_the_seed_alone_fixes_the_resamples() -> None:
    references, scores = draw(60, 3)
    one, two = (Resampling(100, seed) for seed in (1, 2))
    first = compute_intervals(references, scores, ["macro_f1", "brier"], confidence=0.95, resampling=one)
    again = compute_intervals(references, scores, ["brier"], confidence=0.95, resampling=one)
    other = compute_intervals(references, scores, ["brier"], confidence=0.95, resampling=two)
    assert again["brier"] == first["brier"]
    assert other["brier"]["value"] == first["brier"]["value"]
    assert other["brier"]["low"] != first["brier"]["low"]


def test_paired_p_value_agrees_with_mcnemar() -> None:
    references = np.random.default_rng(0).integers(0, 2, 400)
    better, worse = make_wrong(references, list(range(30))), make_wrong(references, list(range(20, 65)))
    one, two = (compute_estimates(references, s, ["accuracy"], resampling=Resampling(8000, 0)) for s in (better, worse))
    found = compute_difference(one["accuracy"], two["accuracy"], 0.95)
    # 35 rows are right only with the first system, 20 only with the second.
    spread = math.sqrt(35 + 20 - (35 - 20) ** 2 / 400)
    assert found["value"] == pytest.approx(15 / 400)
    assert found["p_value"] == pytest.approx(2 * stats.norm.sf(15 / spread), abs=0.015)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread / 400, rel=0.05)


def test_a_difference_turns_around() -> None:
    references, scores = draw(80, 3, skill=1.5)
    one = compute_estimates(references, scores, ["macro_f1"], resampling=Resampling(200, 0))["macro_f1"]
    two = compute_estimates(references, draw(80, 3, seed=9)[1], ["macro_f1"], resampling=Resampling(200, 0))["macro_f1"]
    there, back = compute_difference(one, two, 0.9), compute_difference(two, one, 0.9)
    turned = {"value": -back["value"], "low": -back["high"], "high": -back["low"], "p_value": back["p_value"]}
    assert there == pytest.approx(turned)
    assert there["low"] > 0
    assert there["p_value"] == pytest.approx(2 / 201)  # the smallest that 200 resamples can tell


def test_a_system_does_not_differ_from_itself() -> None:
    references, scores = draw(50, 3)
    one = compute_estimates(references, scores, ["mcc"], resampling=Resampling(100, 0))["mcc"]
    assert compute_difference(one, one, 0.95) == {"value": 0, "low": 0, "high": 0, "p_value": 1}


def test_undefined_values_are_nan_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = compute_intervals(
            np.zeros(0, dtype=np.int64), np.zeros((0, 2)), list(METRICS), confidence=0.95, resampling=Resampling(100, 0)
        )
        drawing = Resampling(100, 0)
        one_class = compute_estimates(
            np.ones(5, dtype=np.int64), np.full((5, 3), 1 / 3), list(METRICS), resampling=drawing
        )
        rare = compute_estimates(np.array([1] + [0] * 9), np.eye(2)[[1] + [0] * 9], ["auroc"], resampling=drawing)[
            "auroc"
        ]
        empty = Estimate(float("nan"), np.full(3, np.nan))
        assert all(math.isnan(value) for value in compute_difference(empty, empty, 0.95).values())
    assert all(math.isnan(v) for found in nothing.values() for v in found.values())
    assert [name for name, found in one_class.items() if np.isnan(found.samples).any()] == ["auroc", "ece"]
    assert set(np.unique(rare.samples)[:1]) == {1.0}  # resamples without the one positive row have no value
    assert 0 < np.isnan(rare.samples).sum() < 100
    interval = compute_interval(rare, 0.95)
    assert interval["value"] == 1.0
    assert math.isnan(interval["low"])
    assert math.isnan(interval["high"])


def test_an_interval_of_no_width_is_none() -> None:
    """Twenty rows without a mistake: 47 % of such tests of a model that is right in 97 % hold no mistake."""
    references, scores = np.zeros(20, dtype=np.int64), np.eye(2)[np.zeros(20, dtype=np.int64)]
    found = compute_intervals(references, scores, ["accuracy"], confidence=0.95, resampling=Resampling(100, 0))
    assert found["accuracy"]["value"] == 1.0
    assert math.isnan(found["accuracy"]["low"])
    worse = make_wrong(references, [3])
    some = compute_intervals(references, worse, ["accuracy"], confidence=0.95, resampling=Resampling(100, 0))
    assert some["accuracy"]["low"] < some["accuracy"]["value"] < some["accuracy"]["high"]


def test_one_row_has_values_and_no_interval() -> None:
    """Every resample of one row is that row: its interval would have no width, and claim certainty."""
    scores = np.array([[0.2, 0.8]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute_intervals(
            np.array([1]), scores, ["accuracy", "brier", "auroc"], confidence=0.95, resampling=Resampling(100, 0)
        )
        one = compute_estimates(np.array([1]), scores, ["accuracy"], resampling=Resampling(100, 0))["accuracy"]
        difference = compute_difference(one, one, 0.95)
    assert (found["accuracy"]["value"], found["brier"]["value"]) == (1.0, pytest.approx(0.04 + 0.04))
    assert all(math.isnan(values[end]) for values in found.values() for end in ("low", "high"))
    assert difference["value"] == 0
    assert math.isnan(difference["p_value"])
    assert list(draw_weights(1, Resampling(100, 0))) == []


def test_the_calibration_error_has_a_value_and_no_interval() -> None:
    """Its confidence is honest, so that the true error is 0: every resample lies above it, and most above the value."""
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, 1000)
    references = (generator.random(1000) > confidence).astype(np.int64)
    scores = np.stack([confidence, 1 - confidence], axis=1)
    options = {"confidence": 0.95, "resampling": Resampling(100, 0)}
    found = compute_intervals(references, scores, ["ece", "accuracy"], **options)
    assert 0 < found["ece"]["value"] < 0.05
    assert all(math.isnan(found["ece"][end]) for end in ("low", "high"))
    assert found["accuracy"]["low"] < found["accuracy"]["value"] < found["accuracy"]["high"]
    one = compute_estimates(references, scores, ["ece"], resampling=Resampling(100, 0))["ece"]
    assert math.isnan(compute_difference(one, one, 0.95)["p_value"])


def test_a_metric_of_evaluate_has_a_value_and_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "compute_metric", lambda name, references, scores: 0.5)
    references, scores = draw(20, 2)
    found = compute_intervals(references, scores, ["cohen_kappa"], confidence=0.95, resampling=Resampling(100, 0))[
        "cohen_kappa"
    ]
    assert found["value"] == 0.5
    assert math.isnan(found["low"])


def test_groups_are_drawn_as_wholes() -> None:
    groups = np.array([7, 3, 7, 9, 3, 7])
    weights = np.concatenate(list(draw_weights(6, Resampling(400, 0, groups))), axis=1)
    for group in (3, 7, 9):
        assert (np.ptp(weights[groups == group], axis=0) == 0).all()
    first_of_each = weights[[0, 1, 3]]
    assert (first_of_each.sum(axis=0) == 3).all()  # three groups, three draws
    assert first_of_each.mean() == pytest.approx(1.0, abs=0.05)
    assert list(draw_weights(3, Resampling(100, 0, np.array([5, 5, 5])))) == []


def test_groups_of_one_row_are_rows() -> None:
    references, scores = draw(40, 3)
    one, other = (
        compute_estimates(references, scores, DRAWN, resampling=Resampling(100, 4, groups))
        for groups in (None, np.arange(100, 140))
    )
    for name in DRAWN:
        np.testing.assert_array_equal(one[name].samples, other[name].samples)


def test_resampled_values_of_groups_are_the_metric_of_the_drawn_rows() -> None:
    references, scores = draw(30, 3)
    resampling = Resampling(60, 1, np.random.default_rng(2).integers(0, 8, 30))
    found = compute_estimates(references, scores, DRAWN, resampling=resampling)
    (weights,) = draw_weights(30, resampling)
    for name in DRAWN:
        for place in range(60):
            drawn = np.repeat(np.arange(30), weights[:, place].astype(int))
            expected = compute_metric(name, references[drawn], scores[drawn])
            np.testing.assert_allclose(found[name].samples[place], expected, atol=1e-12, err_msg=name)


def test_intervals_over_groups_hold_the_truth_where_rows_agree_within_them() -> None:
    """40 groups of 10 rows, of which each is right with a chance of its own around .7: 95 % intervals hold .7 about so
    often over groups, and far less often over rows."""
    held = {"groups": 0, "rows": 0}
    groups = np.repeat(np.arange(40), 10)
    for trial in range(200):
        generator = np.random.default_rng(trial)
        chance = generator.beta(2.8, 1.2, 40)  # a mean of .7, and a correlation of .2 within a group
        right = generator.random(400) < chance[groups]
        references, scores = np.ones(400, dtype=np.int64), np.eye(2)[right.astype(int)]
        for name, own in (("groups", groups), ("rows", None)):
            found = compute_intervals(
                references, scores, ["accuracy"], confidence=0.95, resampling=Resampling(300, trial, own)
            )["accuracy"]
            held[name] += found["low"] <= 0.7 <= found["high"]
    assert held["groups"] >= 0.9 * 200
    assert held["rows"] <= 0.85 * 200


def test_some_rows_keep_their_groups() -> None:
    resampling = Resampling(100, 0, np.array([4, 4, 2, 9]))
    assert resampling.take(np.array([0, 2])).describe() == {"resamples": 100, "seed": 0, "groups": 2}
    assert resampling.take(np.array([True, True, False, False])).describe()["groups"] == 1
    assert Resampling(100, 3).take(np.array([0])).describe() == {"resamples": 100, "seed": 3}
