from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import evaluate
import numpy as np
import pytest
from evaluate.module import Features, Value
from sklearn import metrics as sk

from finetune.errors import RecipeError
from finetune.evaluation import metrics
from finetune.evaluation.evaluate_metrics import (
    Accuracy,
    Auroc,
    Brier,
    Ece,
    LogLoss,
    MacroF1,
    Mcc,
    PerClassF1,
    WeightedF1,
)
from finetune.evaluation.metrics import (
    METRICS,
    check_metric_names,
    compute_bins,
    compute_confusion,
    compute_metric,
    compute_per_class,
    is_larger_better,
)

CLASSES = [Accuracy, MacroF1, WeightedF1, Mcc, Auroc, Ece, Brier, LogLoss]


def make_scores(predictions: list[int], n_labels: int) -> np.ndarray:
    return np.eye(n_labels)[predictions]


def draw(n_rows: int, n_labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    references = generator.integers(0, n_labels, n_rows)
    raw = generator.exponential(size=(n_rows, n_labels))
    raw[np.arange(n_rows), references] += 1
    return references, raw / raw.sum(axis=1, keepdims=True)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no such module")

    metrics._load_metric.cache_clear()
    monkeypatch.setattr(evaluate, "load", refuse)
    yield
    metrics._load_metric.cache_clear()


class CohenKappa(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Value("int64"), "references": Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        return {"cohen_kappa": sk.cohen_kappa_score(references, predictions)}


class Precision(CohenKappa):
    def _compute(self, predictions: Any, references: Any, average: str = "binary") -> dict[str, Any]:
        return {"precision": sk.precision_score(references, predictions, average=average)}


class NeedsText(CohenKappa):
    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Value("string"), "sources": Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[str]]:
    asked: list[str] = []
    available = {"cohen_kappa": CohenKappa, "precision": Precision, "comet": NeedsText}

    def load(path: str, module_type: str | None = None) -> Any:
        asked.append(path)
        return available[path.removeprefix("evaluate-metric/")](cache_dir=str(tmp_path))

    metrics._load_metric.cache_clear()
    monkeypatch.setattr(evaluate, "load", load)
    yield asked
    metrics._load_metric.cache_clear()


# 3 x 3, worked by hand: F1 of the classes is 4/5, 1/2 and 2/3.
REFERENCES, PREDICTIONS = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 4 / 6),
        ("macro_f1", (4 / 5 + 1 / 2 + 2 / 3) / 3),
        ("weighted_f1", (3 * 4 / 5 + 2 * 1 / 2 + 1 * 2 / 3) / 6),
        ("mcc", (4 * 6 - (3 * 2 + 2 * 2 + 1 * 2)) / math.sqrt((36 - 12) * (36 - 14))),
    ],
)
def test_three_classes_by_hand(name: str, value: float) -> None:
    assert compute_metric(name, REFERENCES, make_scores(PREDICTIONS, 3)) == pytest.approx(value)


def test_two_classes_by_hand() -> None:
    references = [0] * 4 + [1] * 6
    predictions = [0, 0, 0, 1, 0, 0, 1, 1, 1, 1]  # 3 true negatives, 1 false positive, 2 false negatives, 4 hits
    scores = make_scores(predictions, 2)
    assert compute_metric("mcc", references, scores) == pytest.approx((4 * 3 - 1 * 2) / math.sqrt(5 * 6 * 4 * 5))
    assert compute_metric("macro_f1", references, scores) == pytest.approx((2 * 3 / 9 + 2 * 4 / 11) / 2)
    assert compute_confusion(np.array(references), np.array(predictions), 2).tolist() == [[3, 1], [2, 4]]


def test_auroc_by_hand() -> None:
    positive = np.array([0.8, 0.4, 0.6, 0.4, 0.1])  # 3 + (0 + 1/2 + 1) of 6 pairs are in order
    assert compute_metric("auroc", [1, 1, 0, 0, 0], np.stack([1 - positive, positive], axis=1)) == pytest.approx(0.75)


def test_scores_by_hand() -> None:
    scores = np.array([[0.7, 0.2, 0.1]])
    assert compute_metric("brier", [0], scores) == pytest.approx(0.3**2 + 0.2**2 + 0.1**2)
    assert compute_metric("log_loss", [1], scores) == pytest.approx(-math.log(0.2))
    confidences = np.array([0.9, 0.9, 0.65, 0.65])
    four = np.stack([confidences, 1 - confidences], axis=1)
    # Bins of 0.9 (one of two right) and of 0.65 (both right): |1 - 1.8| and |2 - 1.3|, over 4 rows.
    assert compute_metric("ece", [0, 1, 0, 0], four) == pytest.approx((0.8 + 0.7) / 4)


@pytest.mark.parametrize("n_labels", [2, 3, 7])
def test_agrees_with_scikit_learn(n_labels: int) -> None:
    references, scores = draw(200, n_labels)
    predictions = scores.argmax(axis=1)
    expected = {
        "accuracy": sk.accuracy_score(references, predictions),
        "macro_f1": sk.f1_score(references, predictions, average="macro"),
        "weighted_f1": sk.f1_score(references, predictions, average="weighted"),
        "mcc": sk.matthews_corrcoef(references, predictions),
        "auroc": sk.roc_auc_score(references, scores[:, 1] if n_labels == 2 else scores, multi_class="ovr"),
        "brier": np.mean([np.sum((row - np.eye(n_labels)[r]) ** 2) for row, r in zip(scores, references, strict=True)]),
        "log_loss": sk.log_loss(references, scores),
    }
    assert {name: compute_metric(name, references, scores) for name in expected} == pytest.approx(expected)
    assert set(expected) | {"ece"} == set(METRICS)


def test_ece_is_the_mean_gap_of_reliability_bins() -> None:
    references, scores = draw(300, 4)
    confidences, right = scores.max(axis=1), scores.argmax(axis=1) == references
    gap = 0.0
    for low in np.arange(15) / 15:
        inside = (confidences > low) & (confidences <= low + 1 / 15)
        if inside.any():
            gap += inside.mean() * abs(right[inside].mean() - confidences[inside].mean())
    assert compute_metric("ece", references, scores) == pytest.approx(gap)


def test_bins_are_closed_above_and_hold_both_ends() -> None:
    assert compute_bins(np.array([0.0, 0.1, 0.5, 0.51, 1.0]), bins=10).tolist() == [0, 0, 4, 5, 9]


@pytest.mark.parametrize("metric_class", CLASSES)
def test_evaluate_interface_gives_the_same_number(metric_class: Any, tmp_path: Any) -> None:
    references, scores = draw(60, 3)
    metric = metric_class(cache_dir=str(tmp_path))
    assert isinstance(metric, evaluate.Metric)
    assert metric.description == METRICS[metric.key].formula
    needs = METRICS[metric.key].needs
    given = {needs: scores.argmax(axis=1) if needs == "predictions" else scores}
    expected = {metric.key: pytest.approx(compute_metric(metric.key, references, scores), abs=1e-9)}
    assert metric.compute(references=references, **given) == expected


def test_every_metric_has_an_evaluate_class() -> None:
    assert {metric_class.key for metric_class in CLASSES} == set(METRICS)


def test_per_class(tmp_path: Any) -> None:
    values = PerClassF1(cache_dir=str(tmp_path)).compute(references=REFERENCES, predictions=PREDICTIONS)
    assert values["per_class"] == pytest.approx([4 / 5, 1 / 2, 2 / 3])
    table = compute_per_class(np.array([0, 0, 1]), np.array([0, 0, 0]), 3)
    assert table[0] == pytest.approx({"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "support": 2})
    assert math.isnan(table[1]["precision"])  # never predicted
    assert table[1]["recall"] == 0
    assert table[1]["f1"] == 0
    assert math.isnan(table[2]["f1"])  # neither in references nor in predictions
    assert table[2]["support"] == 0


@pytest.mark.parametrize("name", METRICS)
def test_degenerate_inputs_neither_fail_nor_warn(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_class = compute_metric(name, [1, 1, 1], make_scores([1, 1, 1], 3))
        single_row = compute_metric(name, [0], np.array([[0.25, 0.75]]))
        assert math.isnan(compute_metric(name, [], np.zeros((0, 3))))
        assert math.isnan(compute_metric(name, [0, 1], np.full((2, 2), np.nan)))
    assert math.isnan(one_class) == (name == "auroc")
    assert math.isnan(single_row) == (name == "auroc")


def test_auroc_leaves_out_classes_without_rows() -> None:
    references, scores = draw(50, 3)
    references = np.minimum(references, 1)
    expected = np.mean([sk.roc_auc_score(references == k, scores[:, k]) for k in (0, 1)])
    assert compute_metric("auroc", references, scores) == pytest.approx(expected)


def test_a_score_of_zero_for_the_reference_stays_finite() -> None:
    assert compute_metric("log_loss", [1], np.array([[1.0, 0.0]])) == pytest.approx(-math.log(np.finfo(float).eps))


def test_direction() -> None:
    assert [name for name in METRICS if not is_larger_better(name)] == ["ece", "brier", "log_loss"]
    assert not is_larger_better("loss")
    assert is_larger_better("cohen_kappa")


@pytest.mark.usefixtures("no_hub")
def test_unknown_names_are_all_reported() -> None:
    check_metric_names(METRICS)
    check_metric_names(["loss"], key="train.early_stop.metric", also=("loss",))
    with pytest.raises(RecipeError) as caught:
        check_metric_names(["macro_f2", "accuracy", "a/b"])
    first, second = str(caught.value).splitlines()
    assert first == (
        "evaluate.metrics: must name metrics out of accuracy, auroc, brier, ece, log_loss, macro_f1, mcc, weighted_f1, "
        "got 'macro_f2'. Did you mean 'macro_f1'? `evaluate` could not load 'macro_f2' either (FileNotFoundError): "
        "it needs the Hub or a filled cache."
    )
    assert "got 'a/b'" in second
    assert "given by its bare name" in second
    with pytest.raises(RecipeError, match=r"^train\.early_stop\.metric: must name metrics out of .*loss.*'los'"):
        check_metric_names(["los"], key="train.early_stop.metric", also=("loss",))


@pytest.mark.usefixtures("no_hub")
def test_computing_an_unknown_metric_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="could not load 'kappa'"):
        compute_metric("kappa", [0, 1], make_scores([0, 1], 2))


def test_metrics_of_evaluate_are_taken_by_name(hub: list[str]) -> None:
    references, scores = draw(40, 3)
    predictions = scores.argmax(axis=1)
    check_metric_names(["macro_f1", "cohen_kappa", "precision"])
    kappa = compute_metric("cohen_kappa", references, scores)
    assert kappa == pytest.approx(sk.cohen_kappa_score(references, predictions))
    precision = compute_metric("precision", references, scores)
    assert precision == pytest.approx(sk.precision_score(references, predictions, average="macro"))
    assert hub == ["evaluate-metric/cohen_kappa", "evaluate-metric/precision"]  # the official namespace only, once each


@pytest.mark.usefixtures("hub")
def test_metrics_of_evaluate_that_need_more_than_labels() -> None:
    with pytest.raises(
        RecipeError, match="`evaluate` has 'comet', but it needs predictions, sources rather than labels"
    ):
        check_metric_names(["comet"])


def test_metrics_of_evaluate_that_give_no_number(monkeypatch: pytest.MonkeyPatch, hub: list[str]) -> None:
    monkeypatch.setattr(CohenKappa, "_compute", lambda self, predictions, references: {"cohen_kappa": [0.1, 0.2]})
    with pytest.raises(RecipeError, match="'cohen_kappa' of `evaluate` must give one number for class labels, got"):
        compute_metric("cohen_kappa", [0, 1], make_scores([0, 1], 2))
