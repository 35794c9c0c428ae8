"""From a recipe's sections to rows that are checked, split and encoded; loads no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.batches import Examples, Indices
from finetune.data.checks import Finding, check_lengths, check_rows, check_shots, raise_on_errors
from finetune.data.cleaning import normalize_for_duplicates
from finetune.data.rows import Row, Splits, build_name_rows
from finetune.data.sources import LoadedRows, load_rows
from finetune.data.splits import keep_shots, split_rows
from finetune.models.base import BaseModel
from finetune.recipe.schema import ModelSection, TaskSection
from finetune.tasks import TASKS, MultiTask, TextClassification
from finetune.tasks.task import Task


@dataclass(frozen=True)
class Part:
    """A task with its rows.

    Args:
        section: as the recipe has it.
        task: the problem shape with settled labels.
        source: where the rows came from.
        splits: train, validation and test rows, prepared by the task.
        examples: the same, encoded.
        findings: what the checks saw; none of them an error.
    """

    section: TaskSection
    task: Task
    source: LoadedRows
    splits: Splits
    examples: dict[str, Examples]
    findings: list[Finding]


@dataclass(frozen=True)
class Prepared:
    """All that a recipe trains on.

    Args:
        parts: task name -> the task with its rows.
        task: what is trained: the recipe's only task, or its several on one base.
        examples: train and validation rows of all parts.
        tokenizer: the base's, or the one learned from the train split.
        findings: of all parts.
    """

    parts: dict[str, Part]
    task: Task | MultiTask
    examples: dict[str, Examples]
    tokenizer: Any
    findings: list[Finding]

    @property
    def origin(self) -> str:
        """Where the rows came from, for a report."""
        return ", ".join(dict.fromkeys(part.source.origin for part in self.parts.values()))

    @property
    def source_name(self) -> str:
        """The names of the data sets."""
        return ", ".join(dict.fromkeys(part.source.name for part in self.parts.values()))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the rows of all parts, as they were read."""
        prints = [part.source.fingerprint for part in self.parts.values()]
        return prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()


def prepare(
    sections: Mapping[str, TaskSection],
    model: ModelSection,
    base: BaseModel,
    *,
    seed: int,
    relative_to: Path | None = None,
    tokenizer: Any = None,
) -> Prepared:
    """Load, clean, split, check and encode the rows of a recipe.

    Args:
        sections: the recipe's tasks.
        model: the recipe's `model`.
        base: whose tokenizer encodes.
        seed: of the splits.
        relative_to: the recipe's folder, for relative paths.
        tokenizer: of a run that goes on; None to take the base's, or to learn one.

    Raises:
        DataError: unreadable data, or rows that fail a check; the message lists every failure.
    """
    parts = {}
    for name, section in sections.items():
        parts[name], tokenizer = _prepare_part(section, model, base, seed, relative_to, tokenizer)
    if len(parts) == 1:
        (part,) = parts.values()
        return Prepared(parts, part.task, part.examples, tokenizer, part.findings)
    tasks = {name: part.task for name, part in parts.items() if isinstance(part.task, TextClassification)}
    task = MultiTask(tasks, {name: section.weight for name, section in sections.items()})
    examples = {
        split: task.combine({name: part.examples[split] for name, part in parts.items()})
        for split in ("train", "validation")
    }
    findings = [
        replace(finding, message=f"{name}: {finding.message}")
        for name, part in parts.items()
        for finding in part.findings
    ]
    return Prepared(parts, task, examples, tokenizer, [*findings, *_check_across(parts)])


def _prepare_part(
    section: TaskSection,
    model: ModelSection,
    base: BaseModel,
    seed: int,
    relative_to: Path | None,
    tokenizer: Any,
) -> tuple[Part, Any]:
    shape = TASKS[section.type]
    source = load_rows(section.data, section.columns, roles=shape.roles, relative_to=relative_to)
    task = shape.build(section, _get_card_labels(source), source.rows)
    splits = split_rows(task.prepare_rows(source.rows), section.split, seed=seed, columns=source.columns)
    splits, findings = check_rows(
        splits, task.labels, leaks=section.split.leaks, texts=list_texts(task), same=list_same(task)
    )
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
    return Part(section, task, source, splits, examples, findings), tokenizer


def _get_card_labels(source: LoadedRows) -> list[str] | dict[str, str] | None:
    """The classes that the card names, unless the recipe reads another column."""
    card = source.card
    return card.labels if card and source.columns.get("label") == card.roles.get("label") else None


def _check_across(parts: Mapping[str, Part]) -> list[Finding]:
    """"""
    findings = []
    texts = {
        name: {
            split: {normalize_for_duplicates(row.values["text"]) for row in rows} for split, rows in part.splits.items()
        }
        for name, part in parts.items()
    }
    for one, other in permutations(parts, 2):
        if count := len(texts[one]["test"] & (texts[other]["train"] | texts[other]["validation"])):
            findings.append(
                Finding(
                    "shared_text",
                    "warning",
                    "test",
                    count,
                    f"{one}: {count:,} of its test texts are among those that {other} learns from. To keep them apart, "
                    "split both tasks by the same column (split.by: time, or group).",
                )
            )
    return findings


def list_texts(task: Task) -> list[str]:
    """The roles of a task that are texts which no row may lack."""
    return [role for role in task.roles if role not in ("label", "answer")]


def list_same(task: Task) -> list[str]:
    """The roles of a task that together make two rows the same: one question may be asked about several passages."""
    return [role for role in task.roles if role in ("text", "passage")]


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
    _, own = check_rows({"test": rows}, task.labels, leaks="fail", texts=list_texts(task), same=list_same(task))
    raise_on_errors([finding for finding in own if finding.kind != "absent_class"], source.origin)
    # A new set may repeat training texts; that is for the reader to know, and no reason to refuse.
    _, together = check_rows({"train": list(train), "test": rows}, task.labels, leaks="warn", same=list_same(task))
    shared = [finding for finding in together if finding.kind in ("leak", "near_leak")]
    return source, rows, shared
