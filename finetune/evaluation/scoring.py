"""Everything that is known about a model on one split, in the layout of evaluation/<split>.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.errors import DivergedError, RecipeError
from finetune.evaluation.baselines import BaselineResult
from finetune.evaluation.calibration import apply_temperature, compute_reliability
from finetune.evaluation.corpus_metrics import CORPUS_METRICS
from finetune.evaluation.gates import BEATS_BASELINES, check_gate_names, check_gates, select_gate_metrics
from finetune.evaluation.intervals import Estimate, Resampling, compute_difference, compute_estimates, compute_interval
from finetune.evaluation.metrics import (
    KINDS,
    OUTSIDE_METRICS,
    Floats,
    Ints,
    check_metric_names,
    compute_confusion,
    compute_per_class,
    compute_predictions,
    list_foreign_names,
)
from finetune.evaluation.outside import OutsideRows
from finetune.evaluation.selective import compute_selective_accuracy
from finetune.evaluation.slices import SliceRows, compute_slices
from finetune.recipe.schema import EvaluateSection

DIGITS = 6
AFTER_TRAINING = ("bits_per_byte", "bleu", "bleu_zh", "chrf")
"""Metrics that would cost too much while training: bytes are counted, and texts written, at the end."""


@dataclass(frozen=True, slots=True)
class ScoredSplit:
    """The N rows of a split that have a class, and what the model said about them."""

    name: str
    """"validation" or "test"."""
    labels: Sequence[str]
    """Names of the K classes."""
    references: Ints
    """(N,)."""
    logits: Floats
    """(N, K)."""
    texts: Sequence[str]
    values: Sequence[Mapping[str, Any]]
    """Column -> value of each row, for slices."""
    resampling: Resampling
    temperature: float = 1.0
    """Fitted on validation; 1 where nothing was fitted."""
    baselines: Mapping[str, BaselineResult] = field(default_factory=dict)
    outside: OutsideRows | None = None
    """The same rows and those of no class; None where the task has no such rows."""
    opened: int | None = None
    """How often the test split was opened."""


def choose_section(section: EvaluateSection, kind: str, others: Collection[str]) -> EvaluateSection:
    """`evaluate` for one of several tasks: without the metrics, baselines and gates that are for the others alone.

    Args:
        section: The recipe's `evaluate`.
        kind: What the task's metrics look at, a key of `metrics.KINDS`.
        others: The kinds of the recipe's tasks.

    Raises:
        RecipeError: No metric is left.
    """
    foreign = list_foreign_names(kind, others)
    metrics = [name for name in section.metrics if name not in foreign]
    if not metrics:
        raise RecipeError(
            f"evaluate.metrics: must name a metric for {KINDS[kind].words}, got {', '.join(section.metrics)}. "
            f"Add one of {', '.join(KINDS[kind].metrics)}."
        )
    return section.model_copy(
        update={
            "metrics": metrics,
            "baselines": [name for name in section.baselines if name not in foreign],
            "gates": {name: gate for name, gate in section.gates.items() if name not in foreign},
        }
    )


def check_section(section: EvaluateSection, kind: str = "labels") -> None:
    """Metrics, baselines and gates must suit the task; to be called before training.

    Args:
        section: The recipe's `evaluate`.
        kind: What the task's metrics look at, a key of `metrics.KINDS`.

    Raises:
        RecipeError: Lists every problem.
    """
    problems = []
    checks: list[Callable[[], None]] = [
        lambda: check_metric_names(section.metrics, kind=kind),
        lambda: _check_baselines(section, kind),
        lambda: check_gate_names(section.gates, section.baselines, kind),
    ]
    for check in checks:
        try:
            check()
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))


def check_early_stop(metric: str, kinds: Mapping[str, str]) -> None:
    """The metric that stops training must suit a task and be computed while training; `loss` always is.

    Args:
        metric: Of several tasks the mean over those that have it; `<task>.<metric>` for one.
        kinds: Task -> what its metrics look at, a key of `metrics.KINDS`.

    Raises:
        RecipeError: It does not.
    """
    key = "train.early_stop.metric"
    task, _, name = metric.rpartition(".")
    if len(kinds) > 1 and task in kinds:
        kinds, metric = {task: kinds[task]}, name
    fitting = [kind for kind in kinds.values() if metric in KINDS[kind].metrics]
    check_metric_names([metric], key=key, also=("loss",), kind=[*fitting, *kinds.values()][0])
    if metric in AFTER_TRAINING:
        raise RecipeError(f"{key}: must be computed while training, got {metric!r}. Use loss.")


def score_split(split: ScoredSplit, section: EvaluateSection) -> dict[str, Any]:
    """Score a split: metrics with intervals, baselines, classes, calibration, slices and, on test, the gates.

    Metrics are those of the recipe in its order, then those that only a gate names, all on scores at the split's
    temperature; then those of `OUTSIDE_METRICS`, where there are rows of no class. All systems see the same resamples.
    Baselines are scored as they are, without a temperature.

    Returns:
        What is written as JSON: numbers rounded to six digits, None where a number is not defined.

    Raises:
        DivergedError: The logits hold nan or infinity.
        DataError: A column of `evaluate.slices` does not exist.
        RecipeError: A metric or gate does not exist.
    """
    references, logits = np.asarray(split.references, dtype=np.int64), np.asarray(split.logits, dtype=np.float64)
    _check_finite(split.name, logits)
    named = dict.fromkeys([*section.metrics, *select_gate_metrics(section.gates)])
    names = [name for name in named if name not in OUTSIDE_METRICS]
    resampling, outside = split.resampling, split.outside
    before, scores = apply_temperature(logits, 1.0), apply_temperature(logits, split.temperature)
    model = compute_estimates(references, scores, names, resampling=resampling)
    if outside:
        model |= outside.compute_estimates(outside.model)
    predictions, n_labels = compute_predictions(scores), len(split.labels)
    per_class = compute_per_class(references, predictions, n_labels)
    rows = SliceRows(references, scores, split.texts, split.values)
    scored: dict[str, Any] = {
        "split": split.name,
        "rows": len(references),
        "labels": list(split.labels),
        "confidence": section.confidence,
        **resampling.describe(),
        **({} if split.opened is None else {"opened": split.opened}),
        "metrics": {name: compute_interval(estimate, section.confidence) for name, estimate in model.items()},
        "baselines": {
            name: compare_systems(
                model,
                compute_estimates(references, baseline.scores[split.name], names, resampling=resampling)
                | (outside.compute_estimates(outside.baselines[name]) if outside else {}),
                baseline.settings,
                section.confidence,
            )
            for name, baseline in split.baselines.items()
        },
        "per_class": {
            label: {**values, "support": int(values["support"])}
            for label, values in zip(split.labels, per_class, strict=True)
        },
        "confusion": compute_confusion(references, predictions, n_labels).tolist(),
        "temperature": split.temperature,
        "reliability": {
            "before": compute_reliability(references, before),
            "after": compute_reliability(references, scores),
        },
        "selective": compute_selective_accuracy(references, scores),
        **({"outside": outside.describe()} if outside else {}),
        "slices": compute_slices(rows, section.slices, names, confidence=section.confidence, resampling=resampling),
    }
    scored = round_numbers(scored)
    # After rounding, so that a reader of the file comes to the same verdict.
    scored["gates"] = check_gates(section.gates, scored) if split.name == "test" else {}
    return scored


def _check_baselines(section: EvaluateSection, kind: str) -> None:
    """The task must have every baseline, and gate `beats_baselines` the headline of one."""
    known, problems = KINDS[kind].baselines, []
    for name in section.baselines:
        others = [other.words for other in KINDS.values() if name in other.baselines]
        if name not in known:
            problems.append(
                f"evaluate.baselines: must name baselines out of {', '.join(known)}, got {name!r}. "
                f"It is for {' or '.join(others)}."
            )
    headline = CORPUS_METRICS.get(section.metrics[0])
    if section.gates.get(BEATS_BASELINES) and kind == "texts" and headline and headline.needs != "texts":
        problems.append(
            f"evaluate.gates: beats_baselines must have a first metric that {', '.join(known)} have, "
            f"got {headline.name!r}. Put bleu or chrf first in evaluate.metrics."
        )
    if problems:
        raise RecipeError("\n".join(problems))


def _check_finite(name: str, logits: Floats) -> None:
    broken = int((~np.isfinite(logits)).any(axis=1).sum())
    if broken:
        raise DivergedError(
            f"{name}: the model's logits must be finite, got nan or infinity in {broken} of {len(logits)} rows. "
            "Lower train.learning_rate, or set train.precision: float32."
        )


def compare_systems(
    model: Mapping[str, Estimate], baseline: Mapping[str, Estimate], settings: Mapping[str, Any], confidence: float
) -> dict[str, Any]:
    """A baseline's metrics and how far the model's lie from them, for the metrics that the baseline has."""
    return {
        "metrics": {name: compute_interval(estimate, confidence) for name, estimate in baseline.items()},
        "difference": {name: compute_difference(model[name], baseline[name], confidence) for name in baseline},
        "settings": dict(settings),
    }


def round_numbers(value: Any) -> Any:
    """What is written as JSON: numbers rounded to six digits, None for nan and infinity."""
    if isinstance(value, dict):
        return {key: round_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [round_numbers(inner) for inner in value]
    if isinstance(value, float):
        return round(value, DIGITS) + 0.0 if math.isfinite(value) else None  # + 0.0 turns -0.0 into 0.0
    return value
