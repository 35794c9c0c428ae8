"""From a recipe's sections to rows that are checked, split and encoded; loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.batches import Examples, Indices
from finetune.data.checks import Finding, check_lengths, check_rows, check_shots, raise_on_errors
from finetune.data.rows import Row, Splits, build_name_rows
from finetune.data.sources import LoadedRows, load_rows
from finetune.data.splits import keep_shots, split_rows
from finetune.models.base import BaseModel
from finetune.recipe.schema import ModelSection, TaskSection
from finetune.tasks import TASKS
from finetune.tasks.task import Task


@dataclass(frozen=True)
class Prepared:
    """A task with its rows, ready to train on.

    Args:
        task: the problem shape with settled labels.
        source: where the rows came from.
        splits: train, validation and test rows, prepared by the task.
        examples: the same, encoded.
        findings: what the checks saw; none of them an error.
        tokenizer: the base's, or the one learned from the train split.
    """

    task: Task
    source: LoadedRows
    splits: Splits
    examples: dict[str, Examples]
    findings: list[Finding]
    tokenizer: Any


def prepare(
    section: TaskSection,
    model: ModelSection,
    base: BaseModel,
    *,
    seed: int,
    relative_to: Path | None = None,
    tokenizer: Any = None,
) -> Prepared:
    """Load, clean, split, check and encode a task's rows.

    Args:
        section: the recipe's task.
        model: the recipe's `model`.
        base: whose tokenizer encodes.
        seed: of the split.
        relative_to: the recipe's folder, for relative paths.
        tokenizer: of a run that goes on; None to take the base's, or to learn one.

    Raises:
        DataError: unreadable data, or rows that fail a check; the message lists every failure.
    """
    shape = TASKS[section.type]
    source = load_rows(section.data, section.columns, roles=shape.roles, relative_to=relative_to)
    task = shape.build(section, source.card.labels if source.card else None, source.rows)
    splits = split_rows(task.prepare_rows(source.rows), section.split, seed=seed, columns=source.columns)
    splits, findings = check_rows(splits, task.labels, leaks=section.split.leaks, texts=list_texts(task))
    raise_on_errors(findings, source.origin)
    if section.split.shots is not None:  # after leaks were dropped, so that the count holds
        splits = keep_shots(splits, section.split.shots, seed=seed)
        findings += check_shots(splits["train"], task.labels or [], section.split.shots)
    if section.class_names == "rows":
        splits["train"] = [*splits["train"], *build_name_rows(task.labels or [])]
    tokenizer = tokenizer or task.build_tokenizer(base, splits["train"], model)
    task = task.bind(tokenizer)
    examples = {name: task.build_examples(rows, tokenizer, model.max_length) for name, rows in splits.items()}
    lengths = {
        name: _measure_lengths(task, rows, examples[name], tokenizer, model.max_length)
        for name, rows in splits.items()
        if task.cuts_rows
    }
    notes = [Finding("row_count", "note", "all", 1, note) for note in source.notes]
    findings = [*findings, *check_lengths(lengths, model.max_length), *notes]
    return Prepared(task, source, splits, examples, findings, tokenizer)


def list_texts(task: Task) -> list[str]:
    """The roles of a task that are texts."""
    return [role for role in task.roles if role != "label"]


def _measure_lengths(task: Task, rows: Sequence[Row], examples: Examples, tokenizer: Any, max_length: int) -> Indices:
    """Tokens of each row before it was cut, counted up to `max_length` + 1: one more than fits says that it was."""
    lengths = examples.sizes
    full = np.flatnonzero(lengths == max_length).tolist()
    lengths[full] = task.build_examples([rows[i] for i in full], tokenizer, max_length + 1).sizes
    return lengths


def load_held_out(
    task: Task, reference: str, columns: dict[str, str], train: Sequence[Row]
) -> tuple[LoadedRows, list[Row], list[Finding]]:
    """Load another held-out set for a trained task: its test split where it has one, else all of its rows.

    Raises:
        DataError: unreadable data, unknown or missing labels.
    """
    source = load_rows(reference, columns, roles=type(task).roles)
    rows = task.prepare_rows(source.rows)
    if any(row.split == "test" for row in rows):
        rows = [row for row in rows if row.split == "test"]
    _, own = check_rows({"test": rows}, task.labels, leaks="fail", texts=list_texts(task))
    raise_on_errors([finding for finding in own if finding.kind != "absent_class"], source.origin)
    # A new set may repeat training texts; that is for the reader to know, and no reason to refuse.
    _, together = check_rows({"train": list(train), "test": rows}, task.labels, leaks="warn")
    shared = [finding for finding in together if finding.kind in ("leak", "near_leak")]
    return source, rows, shared
