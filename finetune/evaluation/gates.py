"""Gates: what a model's test scores must reach before the run counts as done."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from finetune.errors import GateError, RecipeError
from finetune.evaluation.corpus_metrics import CORPUS_METRICS
from finetune.evaluation.metrics import KINDS, METRICS, OUTSIDE_METRICS, check_metric_names, is_larger_better

BEATS_BASELINES = "beats_baselines"
ABOVE_ONE = {"brier", "log_loss", "loss", "perplexity", "bits_per_byte", "bleu", "bleu_zh", "chrf"}
SHARES = {*METRICS, *CORPUS_METRICS, *OUTSIDE_METRICS} - ABOVE_ONE
"""Metrics that are at most 1."""

_CONDITION = re.compile(r"(>=|<=|>|<)\s*(\d*\.?\d+)")

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def select_gate_metrics(gates: Mapping[str, str | bool]) -> list[str]:
    """The metrics that the gates name."""
    return [name for name in gates if name != BEATS_BASELINES]


def check_gate_names(gates: Mapping[str, str | bool], baselines: Iterable[str], kind: str = "labels") -> None:
    """Every gate must be a known metric of the kind or `beats_baselines`, which must have a baseline to beat.

    Raises:
        RecipeError: Lists every problem; to be called before training.
    """
    problems = []
    also = (BEATS_BASELINES, *(OUTSIDE_METRICS if kind == "labels" else ()))
    try:
        check_metric_names(select_gate_metrics(gates), key="evaluate.gates", also=also, kind=kind)
    except RecipeError as error:
        problems.append(str(error))
    problems += [
        f"evaluate.gates.{name}: must compare with a number from 0 to 1, got {condition!r}. "
        f"Did you mean '{found[1]} {float(found[2]) / 100:g}'?"
        for name, condition in gates.items()
        if name in SHARES and (found := _CONDITION.fullmatch(str(condition))) and float(found[2]) > 1
    ]
    if gates.get(BEATS_BASELINES) and not list(baselines):
        problems.append(
            "evaluate.gates: beats_baselines must have a baseline to beat, got none. "
            f"Add evaluate.baselines: [{', '.join(KINDS[kind].baselines[:2])}]."
        )
    if problems:
        raise RecipeError("\n".join(problems))


def check_gates(gates: Mapping[str, str | bool], scored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Hold the gates against a scored split.

    Args:
        gates: Metric -> condition such as ">= 0.80"; `beats_baselines` -> whether the first metric of the recipe must
            be better than every baseline's that has one.
        scored: "metrics" and "baselines" of a split, as in evaluation/test.json. A metric without a value misses.

    Returns:
        Gate -> {"condition", "value", "passed"}. A switched-off `beats_baselines` is left out.

    Raises:
        RecipeError: A gate names a metric that was not scored.
    """
    results = {}
    for name, condition in gates.items():
        if name != BEATS_BASELINES:
            results[name] = _check_metric(name, str(condition), scored["metrics"])
        elif condition:
            results[name] = _check_baselines(scored["metrics"], scored["baselines"])
    return results


def raise_on_failed_gates(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise GateError with each missed gate, its condition and its value; nothing if all passed."""
    if missed := list_missed_gates(results):
        raise GateError(
            f"evaluate.gates: {len(missed)} of {len(results)} missed on test\n"
            + "".join(f"  {words}.\n" for words in missed)
            + "Improve the model on validation, or lower evaluate.gates if the bar was wrong."
        )


def list_missed_gates(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each missed gate in words."""
    return [
        f"{name}: must be {result['condition']}, got {_format(result['value'])}"
        for name, result in results.items()
        if not result["passed"]
    ]


def join_gates(tests: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The gates of all tasks, under `task.gate` where there are several.

    Args:
        tests: task name -> the content of its test.json.
    """
    return {
        f"{name}.{gate}" if len(tests) > 1 else gate: result
        for name, test in tests.items()
        for gate, result in test["gates"].items()
    }


def _format(value: float | None) -> str:
    return "no value" if value is None else f"{value:g}"


def _check_metric(name: str, condition: str, metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    if name not in metrics:
        raise RecipeError(
            f"evaluate.gates: must name scored metrics ({', '.join(metrics)}), got {name!r}. "
            "Add it to evaluate.metrics."
        )
    found = _CONDITION.fullmatch(condition)
    if found is None:
        raise RecipeError(f'evaluate.gates.{name}: must be a condition such as ">= 0.80", got {condition!r}.')
    value = metrics[name]["value"]
    passed = value is not None and _COMPARE[found[1]](value, float(found[2]))
    return {"condition": f"{found[1]} {found[2]}", "value": value, "passed": passed}


def _check_baselines(metrics: Mapping[str, Mapping[str, float | None]], baselines: Mapping[str, Any]) -> dict[str, Any]:
    """The first metric against the best baseline; a tie does not beat it."""
    metric = next(iter(metrics))
    sign, word = (1, "above") if is_larger_better(metric) else (-1, "below")
    known = {name: b["metrics"].get(metric, {}).get("value") for name, b in baselines.items()}
    known = {name: value for name, value in known.items() if value is not None}
    value = metrics[metric]["value"]
    if not known:
        return {"condition": f"{metric} {word} every baseline, and there is none", "value": value, "passed": False}
    best = max(known, key=lambda name: sign * known[name])
    passed = value is not None and sign * value > sign * known[best]
    return {"condition": f"{metric} {word} {best}'s {_format(known[best])}", "value": value, "passed": passed}
