from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from finetune.errors import DataError, DivergedError, RecipeError
from finetune.evaluation.baselines import BaselineData, compute_baselines
from finetune.evaluation.calibration import apply_temperature
from finetune.evaluation.intervals import Resampling
from finetune.evaluation.scoring import ScoredSplit, check_section, score_split
from finetune.recipe.schema import EvaluateSection

LABELS = ["negative", "neutral", "positive"]
N = 90


def make_split(**changes: Any) -> ScoredSplit:
    generator = np.random.default_rng(0)
    references = generator.integers(0, 3, N)
    logits = generator.normal(size=(N, 3))
    logits[np.arange(N), references] += 1.5
    texts = [f"{'word ' * (i % 9)}{LABELS[label][:3]}" for i, label in enumerate(references)]
    data = BaselineData(texts, references)
    split = ScoredSplit(
        name="test",
        labels=LABELS,
        references=references,
        logits=logits,
        texts=texts,
        values=[{"channel": "web" if i % 3 else "app"} for i in range(N)],
        temperature=2.0,
        baselines=compute_baselines(["majority", "tfidf_logreg"], data, data, data, 3, 0),
        resampling=Resampling(100, 0),
        opened=1,
    )
    return dataclasses.replace(split, **changes)


def make_section(**changes: Any) -> EvaluateSection:
    return EvaluateSection(resamples=100, slices=["length", "channel"], **changes)


def test_layout_is_the_documented_one() -> None:
    scored = score_split(
        make_split(resampling=Resampling(100, 13)), make_section(gates={"mcc": "> 0", "beats_baselines": True})
    )
    assert list(scored) == [
        *("split", "rows", "labels", "confidence", "resamples", "seed", "opened", "metrics", "baselines", "per_class"),
        *("confusion", "temperature", "reliability", "selective", "slices", "gates"),
    ]
    assert scored["split"] == "test"
    assert scored["rows"] == N
    assert (scored["confidence"], scored["resamples"], scored["seed"], scored["opened"]) == (0.95, 100, 13, 1)
    assert list(scored["metrics"]) == ["macro_f1", "accuracy", "ece", "mcc"]  # the recipe's, then the gates'
    ece = scored["metrics"]["ece"]
    assert ece == {"value": ece["value"], "low": None, "high": None}
    assert ece["value"] > 0
    difference = scored["baselines"]["majority"]["difference"]["ece"]
    assert (difference["low"], difference["high"], difference["p_value"]) == (None, None, None)
    assert set(scored["baselines"]) == {"majority", "tfidf_logreg"}
    baseline = scored["baselines"]["tfidf_logreg"]
    assert set(baseline) == {"metrics", "difference", "settings"}
    assert set(baseline["difference"]["macro_f1"]) == {"value", "low", "high", "p_value"}
    assert baseline["settings"] in ({"C": 1.0}, {"C": 10.0}, {"C": 100.0})
    assert set(scored["per_class"]["neutral"]) == {"precision", "recall", "f1", "support"}
    assert set(scored["reliability"]) == {"before", "after"}
    assert set(scored["reliability"]["after"][0]) == {"low", "high", "count", "confidence", "accuracy"}
    assert set(scored["slices"]) == {"length", "channel"}
    assert set(scored["slices"]["channel"][0]) == {"value", "rows", "metrics"}
    assert set(scored["gates"]) == {"mcc", "beats_baselines"}
    assert set(scored["gates"]["mcc"]) == {"condition", "value", "passed"}


def test_numbers_agree_with_scikit_learn() -> None:
    split = make_split()
    scored = score_split(split, make_section())
    predictions = split.logits.argmax(axis=1)
    report = sk.classification_report(split.references, predictions, target_names=LABELS, output_dict=True)
    assert scored["metrics"]["accuracy"]["value"] == pytest.approx(report["accuracy"], abs=1e-6)
    assert scored["metrics"]["macro_f1"]["value"] == pytest.approx(report["macro avg"]["f1-score"], abs=1e-6)
    for label in LABELS:
        found, expected = scored["per_class"][label], report[label]
        assert found["f1"] == pytest.approx(expected["f1-score"], abs=1e-6)
        assert found["precision"] == pytest.approx(expected["precision"], abs=1e-6)
        assert found["support"] == expected["support"]
    assert scored["confusion"] == sk.confusion_matrix(split.references, predictions).tolist()


def test_scores_are_taken_at_the_temperature() -> None:
    split = make_split()
    scored = score_split(split, make_section(metrics=["log_loss"]))
    expected = sk.log_loss(split.references, apply_temperature(split.logits, 2.0))
    assert scored["metrics"]["log_loss"]["value"] == pytest.approx(expected, abs=1e-6)
    assert scored["temperature"] == 2.0
    assert scored["reliability"]["before"] != scored["reliability"]["after"]


def test_difference_is_model_minus_baseline() -> None:
    scored = score_split(make_split(), make_section())
    for baseline in scored["baselines"].values():
        for name, difference in baseline["difference"].items():
            expected = scored["metrics"][name]["value"] - baseline["metrics"][name]["value"]
            assert difference["value"] == pytest.approx(expected, abs=2e-6)
            if name != "ece":
                assert difference["low"] <= difference["value"] <= difference["high"]


def test_result_is_strict_json_with_six_digits() -> None:
    section = make_section(metrics=["auroc", "macro_f1"])
    scored = score_split(make_split(references=np.zeros(N, dtype=np.int64)), section)
    assert json.loads(json.dumps(scored, allow_nan=False)) == scored
    assert scored["metrics"]["auroc"] == {"value": None, "low": None, "high": None}
    assert scored["per_class"]["neutral"]["recall"] is None
    value = scored["metrics"]["macro_f1"]["value"]
    assert value == round(value, 6)


def test_equal_inputs_give_equal_results() -> None:
    one, two = (score_split(make_split(resampling=Resampling(100, 4)), make_section()) for _ in range(2))
    assert one == two
    assert score_split(make_split(resampling=Resampling(100, 5)), make_section())["metrics"] != one["metrics"]


def test_validation_is_scored_without_gates() -> None:
    section = make_section(gates={"accuracy": "> 0.99"})
    scored = score_split(make_split(name="validation", opened=None), section)
    assert scored["gates"] == {}
    assert "opened" not in scored
    assert not score_split(make_split(), section)["gates"]["accuracy"]["passed"]


def test_no_baselines_no_slices() -> None:
    scored = score_split(make_split(baselines={}), EvaluateSection(resamples=100, baselines=[], slices=[]))
    assert scored["baselines"] == {}
    assert scored["slices"] == {}


def test_logits_that_are_not_finite() -> None:
    logits = make_split().logits.copy()
    logits[3, 1], logits[5, 0], logits[5, 2] = np.nan, np.inf, np.nan
    with pytest.raises(
        DivergedError, match="test: the model's logits must be finite, got nan or infinity in 2 of 90 rows"
    ):
        score_split(make_split(logits=logits), make_section())


def test_a_slice_over_a_column_that_is_not_there() -> None:
    with pytest.raises(DataError, match=r"column 'chanel' must exist, got columns channel\. Did you mean 'channel'"):
        score_split(make_split(), EvaluateSection(resamples=100, slices=["chanel"]))


def test_a_section_is_checked_before_training() -> None:
    check_section(EvaluateSection(gates={"accuracy": "> 0.5", "beats_baselines": True}))
    with pytest.raises(RecipeError) as caught:
        check_section(EvaluateSection(metrics=["a/b"], baselines=[], gates={"c/d": "> 0", "beats_baselines": True}))
    assert [line.split(", got")[0].split(" out of")[0] for line in str(caught.value).splitlines()] == [
        "evaluate.metrics: must name metrics",
        "evaluate.gates: must name metrics",
        "evaluate.gates: beats_baselines must have a baseline to beat",
    ]
