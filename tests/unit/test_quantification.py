"""Shares of texts against EM itself, numbers of the library QuaPy, and worked cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import chi2

from finetune.evaluation.quantification import (
    compute_information,
    compute_interval,
    compute_ratios,
    estimate_pacc,
    estimate_sld,
    fit_recalibration,
)

POSTERIORS = np.array([0.03, 0.05, 0.1, 0.2, 0.35, 0.5, 0.6, 0.72, 0.85, 0.93, 0.97, 0.02, 0.08, 0.15, 0.4, 0.66])
TRUTHS = np.array([0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1], dtype=bool)


def run_em(posteriors, prior, steps=20_000):
    """SLD as Saerens, Latinne and Decaestecker wrote it."""
    share = prior
    for _ in range(steps):
        negative, other = share / prior * posteriors, (1 - share) / (1 - prior) * (1 - posteriors)
        share = (negative / (negative + other)).mean()
    return share


def test_sld_gives_what_quapy_gives():
    # quapy 0.2.3: EMQ.EM([.7, .3], [1 - POSTERIORS, POSTERIORS], epsilon=1e-12) -> [0.43588342, 0.56411658]
    found = estimate_sld(np.ones(16), compute_ratios(POSTERIORS, 0.3))
    assert found == pytest.approx(0.56411658, abs=1e-8)


def test_pacc_gives_what_quapy_gives():
    # quapy 0.2.3: PACC.getPteCondEstim([0, 1], TRUTHS, posteriors) and ACC.solve_adjustment(..., method="inversion",
    # solver="minimize") -> [0.46182397, 0.53817603]
    means = np.array([POSTERIORS[TRUTHS].mean(), POSTERIORS[~TRUTHS].mean()])
    assert means == pytest.approx([0.66571429, 0.21666667])
    new = np.array([0.1, 0.4, 0.6, 0.7, 0.05, 0.9])
    found = estimate_pacc(np.ones(6), new, np.stack([means, 1 - means]))
    assert found == pytest.approx(0.53817603, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_newton_finds_what_em_converges_to(seed):
    generator = np.random.default_rng(seed)
    posteriors = np.clip(generator.beta(0.5, 1 + seed, 300), 0.001, 0.999)
    found = estimate_sld(np.ones(300), compute_ratios(posteriors, 0.3))
    assert found == pytest.approx(run_em(posteriors, 0.3), abs=1e-5)


def test_many_windows_are_estimated_as_each_by_itself():
    generator = np.random.default_rng(1)
    ratios = np.exp(np.linspace(-4, 4, 16))
    counts = generator.poisson(generator.gamma(0.3, 10, size=(5, 7, 16)))
    counts[0, 0], counts[1, 1], counts[2, 2] = 0, [30] + [0] * 15, [0] * 15 + [30]
    found = estimate_sld(counts, ratios, 0.9)
    assert found.shape == (5, 7)
    assert (found[0, 0], found[1, 1], found[2, 2]) == (0, 0, 1)
    for place in np.ndindex(5, 7):
        assert found[place] == pytest.approx(float(estimate_sld(counts[place], ratios)), abs=1e-7)
        grid = np.linspace(0, 1, 2001)
        best = grid[np.argmax(np.log(1 + grid[:, None] * (ratios - 1)) @ counts[place])]
        assert found[place] == pytest.approx(best, abs=5e-4)


def test_a_text_more_negative_never_lowers_the_share():
    generator = np.random.default_rng(2)
    ratios = np.exp(np.linspace(-3, 5, 20))
    for _ in range(50):
        counts = generator.poisson(2.0, 20)
        counts[3] += 1
        moved = counts.copy()
        moved[3] -= 1
        moved[generator.integers(4, 20)] += 1
        assert estimate_sld(moved, ratios) >= estimate_sld(counts, ratios) - 1e-7


def test_recalibration_is_the_logistic_regression_and_keeps_the_prior():
    generator = np.random.default_rng(3)
    scores = np.linspace(-4, 4, 30)
    total = generator.integers(20, 200, 30)
    negatives = generator.binomial(total, expit(0.6 * scores - 0.8))
    slope, intercept = fit_recalibration(scores, negatives, total - negatives)
    posteriors = expit(slope * scores + intercept)
    assert total @ posteriors == pytest.approx(negatives.sum(), rel=1e-9)
    from sklearn.linear_model import LogisticRegression

    rows = np.repeat(scores, 2)[:, None]
    reference = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000).fit(
        rows, np.tile([1, 0], 30), sample_weight=np.stack([negatives, total - negatives], 1).ravel()
    )
    assert slope == pytest.approx(reference.coef_[0, 0], abs=0.01)  # held near 1 by a hair
    assert intercept == pytest.approx(reference.intercept_[0], abs=0.01)
    both = fit_recalibration(scores, np.stack([negatives, negatives]), np.stack([total - negatives] * 2))
    assert both == pytest.approx(np.array([[slope, intercept]] * 2))


def test_recalibration_stays_finite_where_the_classes_come_apart():
    slope, intercept = fit_recalibration([-3.0, -2.0, 2.0, 3.0], [0, 0, 5, 5], [50, 50, 0, 0])
    assert 1 < slope < 5
    assert np.isfinite(intercept)


def test_an_interval_with_a_perfect_model_is_the_binomials():
    # Two bins that tell all: 30 of 100 are negative. Ends solve 2 (l(.3) - l(p)) = chi2.
    seen, ratios = np.array([70, 30]), np.array([1e-9, 1e9])
    low, high = compute_interval(seen, ratios, 0.3, 0.0, 0.95)

    def loss(p):
        return 2 * (30 * np.log(0.3 / p) + 70 * np.log(0.7 / (1 - p)))

    assert loss(low) == pytest.approx(chi2.ppf(0.95, 1), rel=1e-6)
    assert loss(high) == pytest.approx(chi2.ppf(0.95, 1), rel=1e-6)
    assert compute_information(seen, ratios, 0.3) == pytest.approx(100 / (0.3 * 0.7), rel=1e-6)
    wider = compute_interval(seen, ratios, 0.3, 3 * 0.3 * 0.7 / 100, 0.95)  # four times the variance
    assert (wider[1] - wider[0]) / (high - low) == pytest.approx(2, rel=0.05)


def test_intervals_at_the_walls():
    ratios = np.array([1e-9, 1e9])
    low, high = compute_interval(np.array([20, 0]), ratios, 0.0, 0.0, 0.95)
    assert low == 0
    assert high == pytest.approx(1 - np.exp(-chi2.ppf(0.95, 1) / 40), rel=1e-6)  # -2 * 20 log(1 - p) = chi2
    assert compute_interval(np.zeros(2), ratios, 0.0, 0.0, 0.95) == (0.0, 1.0)


def test_ratios_undo_the_prior():
    assert compute_ratios([0.2, 0.5], 0.2) == pytest.approx([1.0, 4.0])  # odds 1/4 and 1 under prior odds of 1/4
