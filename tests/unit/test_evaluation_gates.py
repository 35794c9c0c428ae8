from __future__ import annotations

from typing import Any

import pytest

from finetune.errors import GateError, RecipeError
from finetune.evaluation import gates
from finetune.evaluation.gates import check_gate_names, check_gates, raise_on_failed_gates


def make_scored(value: float | None, baselines: dict[str, float | None], metric: str = "macro_f1") -> dict[str, Any]:
    return {
        "metrics": {metric: {"value": value}, "accuracy": {"value": 0.9}},
        "baselines": {name: {"metrics": {metric: {"value": b}}} for name, b in baselines.items()},
    }


@pytest.mark.parametrize(
    ("condition", "passed"),
    [(">= 0.80", True), (">0.80", False), ("<= .8", True), ("< 0.8", False), ("> 0.79", True), (">= 1", False)],
)
def test_conditions(condition: str, passed: bool) -> None:
    assert check_gates({"macro_f1": condition}, make_scored(0.8, {}))["macro_f1"]["passed"] is passed


@pytest.mark.parametrize(
    ("gate", "kind", "problem"),
    [
        ({"macro_f1": ">= 80"}, "labels", "got '>= 80'. Did you mean '>= 0.8'?"),
        ({"ece": "<= 5"}, "labels", "got '<= 5'. Did you mean '<= 0.05'?"),
        ({"mrr": ">1.5"}, "ranking", "got '>1.5'. Did you mean '> 0.015'?"),
        ({"macro_f1": ">= 1", "brier": "< 1.5", "log_loss": "< 2"}, "labels", None),
        ({"bleu": ">= 30", "chrf": ">= 50", "loss": "<= 2"}, "texts", None),
    ],
)
def test_shares_are_not_held_against_percents(gate: dict[str, str | bool], kind: str, problem: str | None) -> None:
    if problem is None:
        check_gate_names(gate, [], kind)
        return
    with pytest.raises(RecipeError) as caught:
        check_gate_names(gate, [], kind)
    assert str(caught.value) == f"evaluate.gates.{next(iter(gate))}: must compare with a number from 0 to 1, {problem}"


def test_results_say_what_was_asked_and_found() -> None:
    assert check_gates({"accuracy": ">=0.80"}, make_scored(0.7, {})) == {
        "accuracy": {"condition": ">= 0.80", "value": 0.9, "passed": True}
    }


def test_the_best_baseline_must_be_beaten() -> None:
    baselines: dict[str, float | None] = {"majority": 0.3, "tfidf_logreg": 0.76, "frozen_logreg": 0.7}
    passed = check_gates({"beats_baselines": True}, make_scored(0.8, baselines))
    assert passed == {
        "beats_baselines": {"condition": "macro_f1 above tfidf_logreg's 0.76", "value": 0.8, "passed": True}
    }
    for value in (0.76, 0.75, None):  # a tie is no win
        assert not check_gates({"beats_baselines": True}, make_scored(value, baselines))["beats_baselines"]["passed"]


def test_an_error_must_be_below_the_baselines() -> None:
    result = check_gates({"beats_baselines": True}, make_scored(0.1, {"a": 0.2, "b": 0.15}, metric="log_loss"))
    assert result["beats_baselines"]["condition"] == "log_loss below b's 0.15"
    assert result["beats_baselines"]["passed"]


def test_beats_baselines_can_be_switched_off() -> None:
    assert check_gates({"beats_baselines": False}, make_scored(0.1, {"a": 0.9})) == {}


def test_baselines_without_a_value_are_not_beaten() -> None:
    result = check_gates({"beats_baselines": True}, make_scored(0.9, {"a": None}))["beats_baselines"]
    assert result == {"condition": "macro_f1 above every baseline, and there is none", "value": 0.9, "passed": False}


def test_a_baseline_without_the_metric_is_passed_over() -> None:
    scored = make_scored(0.8, {"a": 0.7})
    scored["baselines"]["b"] = {"metrics": {"accuracy": {"value": 0.95}}}
    result = check_gates({"beats_baselines": True}, scored)["beats_baselines"]
    assert result == {"condition": "macro_f1 above a's 0.7", "value": 0.8, "passed": True}


def test_every_missed_gate_is_named() -> None:
    scored = make_scored(0.71, {"tfidf_logreg": 0.76})
    results = check_gates({"macro_f1": ">= 0.80", "accuracy": "> 0.5", "beats_baselines": True}, scored)
    with pytest.raises(GateError) as caught:
        raise_on_failed_gates(results)
    assert str(caught.value) == (
        "evaluate.gates: 2 of 3 missed on test\n"
        "  macro_f1: must be >= 0.80, got 0.71.\n"
        "  beats_baselines: must be macro_f1 above tfidf_logreg's 0.76, got 0.71.\n"
        "Improve the model on validation, or lower evaluate.gates if the bar was wrong."
    )
    assert caught.value.exit_code == 4


def test_a_metric_without_a_value_misses_its_gate() -> None:
    with pytest.raises(GateError, match=r"macro_f1: must be < 0\.5, got no value\."):
        raise_on_failed_gates(check_gates({"macro_f1": "< 0.5"}, make_scored(None, {})))


def test_a_near_miss_is_not_rounded_up() -> None:
    with pytest.raises(GateError, match=r"must be >= 0\.80, got 0\.799999\."):
        raise_on_failed_gates(check_gates({"macro_f1": ">= 0.80"}, make_scored(0.799999, {})))


def test_passed_gates_are_silent() -> None:
    raise_on_failed_gates(check_gates({"macro_f1": ">= 0.80"}, make_scored(0.8, {})))
    raise_on_failed_gates({})


def test_names_are_checked_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(names: list[str], **options: Any) -> None:
        asked.append((names, options))
        raise RecipeError("evaluate.gates: must name metrics out of ..., got 'makro_f1'.")

    check_gate_names({"macro_f1": ">= 0.8", "beats_baselines": True}, ["majority"])
    check_gate_names({"beats_baselines": False}, [])
    monkeypatch.setattr(gates, "check_metric_names", refuse)
    with pytest.raises(RecipeError) as caught:
        check_gate_names({"makro_f1": ">= 0.8", "beats_baselines": True}, [])
    also = ("beats_baselines", "outside_auroc", "outside_recall_at_95")
    assert asked == [(["makro_f1"], {"key": "evaluate.gates", "also": also, "kind": "labels"})]
    assert str(caught.value).splitlines() == [
        "evaluate.gates: must name metrics out of ..., got 'makro_f1'.",
        "evaluate.gates: beats_baselines must have a baseline to beat, got none. "
        "Add evaluate.baselines: [majority, tfidf_logreg].",
    ]


def test_a_gate_on_a_metric_that_was_not_scored() -> None:
    with pytest.raises(RecipeError, match=r"must name scored metrics \(macro_f1, accuracy\), got 'mcc'. Add it to"):
        check_gates({"mcc": "> 0"}, make_scored(0.8, {}))


def test_a_condition_that_is_none() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.gates\.macro_f1: must be a condition such as .*, got '== 0\.8'"):
        check_gates({"macro_f1": "== 0.8"}, make_scored(0.8, {}))
