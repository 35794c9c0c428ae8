"""Means over seeds, ratios, and p-values of several tests."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.evaluation.intervals import (
    Estimate,
    Resampling,
    adjust_p_values,
    average_over_seeds,
    compute_estimates,
    compute_interval,
    compute_ratio,
)


def test_seeds_are_drawn_with_replacement() -> None:
    """Two seeds that differ by 2 and have no chance in their rows: means -1, 0 and 1, a quarter, a half, a quarter."""
    low, high = Estimate(-1.0, np.full(20_000, -1.0)), Estimate(1.0, np.full(20_000, 1.0))
    mean = average_over_seeds([low, high], seed=3)
    values, counts = np.unique(mean.samples, return_counts=True)
    assert values.tolist() == [-1.0, 0.0, 1.0]
    assert counts / 20_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.015)
    assert mean.value == 0.0


def test_one_seed_keeps_its_own_interval() -> None:
    estimate = Estimate(0.5, np.random.default_rng(0).normal(0.5, 0.1, 500))
    mean = average_over_seeds([estimate], seed=1)
    assert compute_interval(mean, 0.9) == compute_interval(estimate, 0.9)


def test_rows_and_seeds_both_widen_the_interval() -> None:
    """The variance of the mean is that of the rows, which all seeds share, plus that of the seeds over their number."""
    generator = np.random.default_rng(5)
    references = generator.integers(0, 2, 400)
    systems = []
    for wrong in (40, 60, 80, 100):
        scores = np.eye(2)[references]
        rows = generator.choice(400, wrong, replace=False)
        scores[rows] = scores[rows][:, ::-1]
        systems.append(scores)
    each = [
        compute_estimates(references, s, ["accuracy"], resampling=Resampling(20_000, 1))["accuracy"] for s in systems
    ]
    mean = average_over_seeds(each, seed=1)
    accuracies = np.array([0.9, 0.85, 0.8, 0.75])
    assert mean.value == pytest.approx(accuracies.mean())
    right = np.mean([(s.argmax(1) == references) for s in systems], axis=0)  # share of seeds right on each row
    from_rows = right.var() / 400
    within = np.mean([a * (1 - a) / 400 for a in accuracies])
    from_seeds = accuracies.var() / 4 + (within - from_rows) / 4  # and rows seen by one seed more than once
    assert mean.samples.var() == pytest.approx(from_rows + from_seeds, rel=0.05)


def test_systems_stay_paired_over_seeds() -> None:
    generator = np.random.default_rng(2)
    noise = generator.normal(size=(3, 1000))
    one = average_over_seeds([Estimate(0.0, row) for row in noise], seed=9)
    other = average_over_seeds([Estimate(0.5, row + 0.5) for row in noise], seed=9)
    assert other.samples - one.samples == pytest.approx(np.full(1000, 0.5))


def test_a_ratio_is_paired() -> None:
    samples = np.array([0.5, 0.8, 1.0])
    ratio = compute_ratio(Estimate(0.4, 0.5 * samples), Estimate(0.8, samples), 0.95)
    assert (ratio["value"], ratio["low"], ratio["high"]) == pytest.approx((0.5, 0.5, 0.5))
    nothing = compute_ratio(Estimate(0.4, samples), Estimate(0.0, np.zeros(3)), 0.95)
    assert np.isnan(nothing["low"])


def test_holm_by_hand() -> None:
    """Sorted .01, .02, .03, .04 times 4, 3, 2, 1 is .04, .06, .06, .04; none may be below the one before."""
    assert adjust_p_values([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert adjust_p_values([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert adjust_p_values([0.2]) == [0.2]
    first, second = adjust_p_values([float("nan"), 0.03])
    assert np.isnan(first)
    assert second == 0.03
