"""What an export changed: logits, decisions, scores with intervals, on the validation split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import Examples
from finetune.errors import GateError, UsageError
from finetune.evaluation.calibration import apply_temperature
from finetune.evaluation.intervals import Resampling, compute_difference, compute_estimates, compute_interval
from finetune.evaluation.metrics import METRICS, is_larger_better
from finetune.evaluation.scoring import round_numbers
from finetune.models.classifier import get_padding
from finetune.recipe.schema import EvaluateSection
from finetune.tasks import MultiTask, QuestionAnswering, Reranking, Retrieval, Task, TextClassification
from finetune.tasks.task import Outputs

BLOCK = 512  # rows whose neighbours are looked for at once
ALLOWED_DIFFERENCE = 1e-4
"""Between what a run and its export in float32 give, times the run's largest output where that is above 1. Decisions
may differ only where two are this close."""
DROP = 0.005
"""Of a task's headline, where the recipe says nothing."""


@dataclass(frozen=True)
class Judged:
    """How one task's validation rows are scored.

    Args:
        task: of the run.
        section: `evaluate`, as it holds for the task.
        temperature: fitted when the run was judged.
        seed: of the resamples.
        threshold: above which an answer is given, where one was fitted.
    """

    task: Task
    section: EvaluateSection
    temperature: float
    seed: int
    threshold: float = 0.0


@dataclass(frozen=True)
class Answers:
    """What a model gives for validation rows.

    Args:
        outputs: as the task's `compute_outputs`, (N, K).
        references: labels, (N,).
    """

    outputs: Outputs
    references: npt.NDArray[np.int64]


def compute_answers(
    task: Task | MultiTask, model: nn.Module, examples: Examples, tokenizer: Any, names: Mapping[str, Any]
) -> dict[str, Answers]:
    """Task name -> what a model gives for its rows.

    Args:
        task: of the run.
        model: torch's, or an engine's.
        examples: validation rows; of several tasks all of them, labels numbered on end.
        tokenizer: the model's.
        names: the tasks.
    """
    outputs = task.compute_outputs(model, examples, get_padding(model, tokenizer))
    if isinstance(task, MultiTask):
        return dict(_split(task, outputs, examples.labels))
    return {next(iter(names)): Answers(outputs, examples.labels)}


def _split(task: MultiTask, outputs: Outputs, labels: npt.NDArray[np.int64]) -> Iterator[tuple[str, Answers]]:
    first = 0
    for name, part in task.split_outputs(outputs):
        rows = np.flatnonzero((labels >= first) & (labels < first + task.tasks[name].codes))
        yield name, Answers(part[rows], labels[rows] - first)
        first += task.tasks[name].codes


def decide(task: Task, outputs: Outputs, threshold: float) -> npt.NDArray[np.int64]:
    """What each row's answer is, (N,) or (N, 2): the class; whether a pair belongs together; of a vector the row that
    is nearest; where an answer begins and ends, -1 where none is given."""
    if isinstance(task, Reranking):
        return (outputs[:, 0] > 0).astype(np.int64)
    if isinstance(task, Retrieval):
        return np.concatenate([_find_nearest(outputs, start) for start in range(0, len(outputs), BLOCK)])
    if isinstance(task, QuestionAnswering):
        null, best = outputs[:, 1], outputs[:, 2]
        return np.where((best - null > threshold)[:, None], outputs[:, 3:5], -1).astype(np.int64)
    return np.asarray(outputs.argmax(axis=1), dtype=np.int64)


def _find_nearest(outputs: Outputs, start: int) -> npt.NDArray[np.int64]:
    part = outputs[start : start + BLOCK] @ outputs.T
    part[np.arange(len(part)), np.arange(start, start + len(part))] = -np.inf
    return np.asarray(part.argmax(axis=1), dtype=np.int64)


def compare_answers(judged: Judged, before: Answers, after: Answers) -> dict[str, Any]:
    """What became of one task's rows.

    Returns:
        rows; the run's largest output; largest and mean difference of what the model gives, None where one gives
        numbers and the other none; share of equal decisions; each metric before and after, with intervals where it has
        any, and what was lost of it: positive is worse.
    """
    task = judged.task
    columns = slice(1, 3) if isinstance(task, QuestionAnswering) else slice(None)  # the others are places and losses
    given, found = before.outputs[:, columns], after.outputs[:, columns]
    finite = np.isfinite(given)  # -inf stands for what a row's task does not have
    differences = np.abs(given[finite] - found[finite])
    equal = decide(task, before.outputs, judged.threshold) == decide(task, after.outputs, judged.threshold)
    metrics = _compare_classes(judged, task, before, after) if isinstance(task, TextClassification) else {}
    if not metrics:
        metrics = _compare_points(judged, before, after)
    return dict(
        round_numbers(
            {
                "rows": len(given),
                "largest_output": float(np.abs(given[finite]).max(initial=0.0)),
                "largest_difference": float(differences.max(initial=0.0)),
                "mean_difference": float(differences.mean()) if differences.size else 0.0,
                "equal_decisions": float(equal.reshape(len(equal), -1).all(axis=1).mean()) if len(equal) else 1.0,
                "metrics": metrics,
            }
        )
    )


def _compare_classes(judged: Judged, task: TextClassification, before: Answers, after: Answers) -> dict[str, Any]:
    section, known = judged.section, task.has_class(before.references)
    names = [name for name in section.metrics if name in METRICS]
    resampling = Resampling(section.resamples, judged.seed)

    def estimate(answers: Answers) -> Any:
        scores = apply_temperature(answers.outputs[known].astype(np.float64), judged.temperature)
        return compute_estimates(answers.references[known], scores, names, resampling=resampling)

    old, new = estimate(before), estimate(after)
    found = {}
    for name in names:
        worse = (old[name], new[name]) if is_larger_better(name) else (new[name], old[name])
        lost = compute_difference(*worse, section.confidence)
        found[name] = {
            "before": compute_interval(old[name], section.confidence),
            "after": compute_interval(new[name], section.confidence),
            "lost": {key: lost[key] for key in ("value", "low", "high")},
        }
    return found


def _compare_points(judged: Judged, before: Answers, after: Answers) -> dict[str, Any]:
    """Point values, as they are computed while training: those of rankings and of answers."""
    values = []
    for answers in (before, after):
        outputs = np.ascontiguousarray(answers.outputs)
        values.append(judged.task.compute_metrics(outputs, answers.references, list(judged.section.metrics)))
    old, new = values
    return {
        name: {
            "before": {"value": old[name]},
            "after": {"value": new[name]},
            "lost": {"value": (old[name] - new[name]) * (1 if is_larger_better(name) else -1)},
        }
        for name in old
        if name != "loss"
    }


def settle_max_drop(given: Mapping[str, float] | None, judged: Mapping[str, Judged]) -> dict[str, dict[str, float]]:
    """Task name -> metric -> what may be lost of it.

    Args:
        given: the recipe's `export.max_drop`. A task that it says nothing of may lose `DROP` of its headline.
        judged: the tasks.

    Raises:
        UsageError: a metric that no task has.
    """
    known = dict.fromkeys(metric for one in judged.values() for metric in one.section.metrics)
    for metric in given or {}:
        if metric not in known:
            raise UsageError(f"export.max_drop: must name metrics of the run, {', '.join(known)}, got {metric!r}.")
    return {
        name: {metric: drop for metric, drop in (given or {}).items() if metric in one.section.metrics}
        or {one.section.metrics[0]: DROP}
        for name, one in judged.items()
    }


def list_excesses(tasks: Mapping[str, Mapping[str, Any]], max_drop: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each metric that lost more than it may."""
    several = len(tasks) > 1
    found = []
    for task, limits in max_drop.items():
        for metric, limit in limits.items():
            values = tasks[task]["metrics"][metric]
            lost = values["lost"]["value"]
            if lost is None or lost > limit:
                name = f"{task}.{metric}" if several else metric
                got = "nothing that is a number" if lost is None else f"{lost:.4f}"
                found.append(
                    f"{name} must lose at most {limit:g} on validation, lost {got} "
                    f"({values['before']['value']} -> {values['after']['value']})"
                )
    return found


def list_differences(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each task whose outputs differ by more than `ALLOWED_DIFFERENCE`."""
    found = []
    for name, task in tasks.items():
        most, got = ALLOWED_DIFFERENCE * max(1.0, task["largest_output"]), task["largest_difference"]
        if got is None or got > most:
            difference = "no numbers" if got is None else f"a difference of {got:.2g}"
            found.append(
                f"{name} must be within {most:.1e} of the run on validation, got {difference}, with "
                f"{task['equal_decisions']:.2%} of {task['rows']:,} decisions equal"
            )
    return found


def check_equality(where: str, differences: list[str], kept: bool) -> None:
    """Raise GateError where an export in float32 is not what it was made of."""
    if differences:
        raise GateError(
            f"{where}: {'; '.join(differences)}. {_say_what_is_there(kept)} This engine does not compute here what the "
            "run does: take another format."
        )


def check_drop(where: str, excesses: list[str], kept: bool) -> None:
    """Raise GateError where something lost more than it may."""
    if excesses:
        raise GateError(
            f"{where}: {'; '.join(excesses)}. {_say_what_is_there(kept)} Take a format without int8, or allow more: "
            "export.max_drop in the recipe, or --set."
        )


def _say_what_is_there(kept: bool) -> str:
    return "The export that was there is as it was." if kept else "Nothing was written."


def count_bytes(model: nn.Module) -> int:
    """What a model's weights take as they are."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
