"""Rows of no class: their scores, the threshold, the fitted probability, and the metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from finetune.errors import RecipeError
from finetune.evaluation.gates import check_gate_names
from finetune.evaluation.intervals import Resampling, compute_interval
from finetune.evaluation.metrics import check_metric_names
from finetune.evaluation.outside import (
    OutsideRule,
    OutsideScores,
    compute_outside_estimates,
    compute_outside_scores,
    compute_threshold,
    fit_outside,
)
from finetune.tasks.text_classification import TextClassification

LOGITS = np.array([[math.log(1), math.log(3)], [math.log(10), math.log(30)], [0.0, 0.0]])


def draw(n_inside: int, n_outside: int, seed: int = 0):
    """Scores that overlap, with ties, and which rows are outside."""
    generator = np.random.default_rng(seed)
    scores = np.concatenate([generator.normal(0, 1, n_inside), generator.normal(1.5, 1, n_outside)]).round(1)
    return scores, np.arange(n_inside + n_outside) >= n_inside


def estimate(is_outside, scores, threshold=0.0, resamples=200, seed=3):
    return compute_outside_estimates(is_outside, OutsideScores(scores, threshold), Resampling(resamples, seed))


def test_scores_of_a_row_worked_by_hand():
    # exp sums to 4, 40 and 2; the largest probabilities are 3/4, 3/4 and 1/2.
    np.testing.assert_allclose(compute_outside_scores(LOGITS, "energy"), [-math.log(4), -math.log(40), -math.log(2)])
    np.testing.assert_allclose(compute_outside_scores(LOGITS, "max_probability"), [0.25, 0.25, 0.5])


def test_energy_alone_sees_how_large_all_logits_of_a_row_are():
    raised = LOGITS + 7
    np.testing.assert_allclose(
        compute_outside_scores(raised, "energy"), compute_outside_scores(LOGITS, "energy") - 7, atol=1e-12
    )
    np.testing.assert_allclose(
        compute_outside_scores(raised, "max_probability"), compute_outside_scores(LOGITS, "max_probability")
    )


@pytest.mark.parametrize(("n_rows", "expected"), [(20, 19), (40, 38), (10, 10), (21, 20), (1, 1)])
def test_threshold_keeps_at_least_95_percent(n_rows, expected):
    scores = np.random.default_rng(1).permutation(np.arange(1.0, n_rows + 1))
    assert compute_threshold(scores) == expected  # the smallest that 95 % of 1 ... n do not exceed


def test_metrics_agree_with_scikit_learn_and_a_count():
    scores, is_outside = draw(200, 50)
    threshold = compute_threshold(scores[~is_outside])
    found = estimate(is_outside, scores, threshold)
    assert found["outside_auroc"].value == pytest.approx(roc_auc_score(is_outside, scores), abs=1e-12)
    assert found["outside_recall_at_95"].value == sum(score > threshold for score in scores[200:]) / 50
    for one in found.values():
        interval = compute_interval(one, 0.95)
        assert interval["low"] < one.value < interval["high"]


def test_intervals_are_those_of_resampled_rows():
    scores, is_outside = draw(60, 30)
    drawn = estimate(is_outside, scores, resamples=400)["outside_auroc"].samples
    generator = np.random.default_rng(3)  # as `intervals.draw_weights` draws
    rows = generator.integers(0, 90, size=(400, 90))
    np.testing.assert_allclose(drawn, [roc_auc_score(is_outside[one], scores[one]) for one in rows], atol=1e-12)


def test_without_rows_of_no_class_there_is_no_value():
    found = estimate(np.zeros(5, dtype=bool), np.arange(5.0))
    assert all(math.isnan(one.value) and np.isnan(one.samples).all() for one in found.values())


def test_probability_is_calibrated_on_the_rows_it_was_fitted_on():
    generator = np.random.default_rng(2)
    logits = generator.normal(0, 2, (4000, 3))
    chance = 1 / (1 + np.exp(-(compute_outside_scores(logits, "energy") * 1.5 + 2)))
    is_outside = generator.random(4000) < chance
    rule = fit_outside(logits, is_outside, "energy")
    assert (rule.slope, rule.intercept) == pytest.approx((1.5, 2), abs=0.25)
    fitted = rule.compute_probabilities(logits)
    assert fitted is not None
    assert fitted.mean() == pytest.approx(is_outside.mean(), abs=1e-3)
    np.testing.assert_allclose(fitted, chance, atol=0.05)


@pytest.mark.parametrize("score", ["energy", "max_probability"])
def test_probability_rises_with_the_score_also_where_rows_come_apart(score):
    logits = np.concatenate([np.full((30, 2), 9.0) * [1, 0.2], np.zeros((10, 2))])
    rule = fit_outside(logits, np.arange(40) >= 30, score)
    fitted = rule.compute_probabilities(logits)
    assert fitted is not None
    assert fitted[0] < 0.1 < 0.8 < fitted[-1] < 1
    assert rule.threshold == compute_outside_scores(logits, score)[0]


def test_without_rows_of_no_class_there_is_a_threshold_and_no_probability():
    rule = fit_outside(LOGITS, np.zeros(3, dtype=bool), "energy")
    assert rule == OutsideRule("energy", -math.log(2))
    assert rule.compute_probabilities(LOGITS) is None


def test_gates_may_name_the_metrics_and_recipes_need_not():
    check_gate_names({"outside_auroc": ">= 0.9", "outside_recall_at_95": ">= 0.5"}, [])
    words = r"got 'outside_auroc'\. It comes by itself with tasks\.<name>\.out_of_scope; evaluate\.gates may name it\."
    with pytest.raises(RecipeError, match=words):
        check_metric_names(["outside_auroc"])
    with pytest.raises(RecipeError, match="must name metrics out of"):
        check_gate_names({"outside_auroc": ">= 0.9"}, [], "texts")


def test_the_loss_of_a_row_of_no_class_is_least_where_all_classes_are_alike():
    task = TextClassification(["a", "b", "c"], {}, out_of_scope="none", exposure=0.5)
    logits = torch.tensor([[2.0, 0.0, -1.0], [2.0, 0.0, -1.0], [0.3, 0.3, 0.3]], requires_grad=True)
    losses = task.compute_loss(logits, torch.tensor([0, 3, 3]), 0.0)
    logs = np.log(softmax([2.0, 0.0, -1.0]))
    assert losses.tolist() == pytest.approx([-logs[0], -0.5 * logs.mean(), 0.5 * np.log(3)], rel=1e-6)
    losses[2].backward()
    assert logits.grad.abs().max() < 1e-7  # nothing to improve
    assert (task.codes, replace(task, exposure=0.0).codes) == (4, 3)
