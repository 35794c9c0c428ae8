"""From a recipe's sections to rows that are checked, split and encoded; loads no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import numpy as np

from finetune.data.batches import Examples, Indices
from finetune.data.catalog import card_names
from finetune.data.checks import (
    Finding,
    advise_on_leaks,
    check_given_test,
    check_lengths,
    check_rows,
    check_shots,
    raise_on_errors,
    set_apart,
)
from finetune.data.cleaning import normalize_for_duplicates
from finetune.data.interactions import ROLES, WEIGHT, LoadedInteractions
from finetune.data.knowledge import Entry, compute_knowledge_fingerprint, load_card_knowledge, load_knowledge
from finetune.data.rows import Row, Splits, build_name_rows
from finetune.data.sources import LoadedRows, load_rows
from finetune.data.splits import keep_shots, settle_split, split_rows
from finetune.data.turns import CONTEXT, add_subject_changes
from finetune.data.typos import add_typos
from finetune.errors import ColumnError, DataError, RecipeError, UsageError
from finetune.models.base import BaseModel
from finetune.recipe.messages import suggest
from finetune.recipe.schema import ModelSection, TaskSection
from finetune.tasks import (
    TASKS,
    Completion,
    MultiTask,
    QuestionAnswering,
    Recommendation,
    Reranking,
    Retrieval,
    TextClassification,
)
from finetune.tasks.entries import ENTRY
from finetune.tasks.multi_task import Headed
from finetune.tasks.people import load_others, load_people
from finetune.tasks.task import Task, TaskData

ALSO_NAMED = {QuestionAnswering.type: ("answer_start",), Completion.type: (ENTRY,), Recommendation.type: (WEIGHT,)}
"""Task type -> what `columns` may name beside the roles: where an answer starts, and the entries of a card's rows."""


@dataclass(frozen=True)
class Part:
    """A task with its rows.

    Args:
        section: as the recipe has it, with the way of splitting that `auto` came to.
        task: the problem shape with settled labels.
        source: where the rows came from.
        splits: train, validation and test rows, prepared by the task.
        examples: the same, encoded.
        findings: what the checks saw; none of them an error.
        entries: the knowledge, for tasks that look for entries.
    """

    section: TaskSection
    task: Task
    source: LoadedRows
    splits: Splits
    examples: dict[str, Examples]
    findings: list[Finding]
    entries: Sequence[Entry] = ()

    @property
    def group_column(self) -> str | None:
        """The column whose values were split as wholes."""
        return self.section.split.column if self.section.split.by == "group" else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over rows and entries, as they were read."""
        if not self.entries:
            return self.source.fingerprint
        return _join_fingerprints([self.source.fingerprint, compute_knowledge_fingerprint(self.entries)])


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
        prints = [part.fingerprint for part in self.parts.values()]
        return prints[0] if len(prints) == 1 else _join_fingerprints(prints)


def _join_fingerprints(prints: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prints).encode()).hexdigest()


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
    tasks = {name: cast("Headed", part.task) for name, part in parts.items()}  # the schema lets no other types in
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
    _check_named_columns(section)
    if section.type == Recommendation.type:
        return _prepare_people(section, model, base, seed, relative_to, tokenizer)
    shape = TASKS[section.type]
    source = load_rows(
        section.data, section.columns, roles=shape.roles, optional=shape.optional_roles, relative_to=relative_to
    )
    entries = load_entries(section, source, relative_to) if ENTRY in shape.roles else []
    known = section.model_copy(update={"columns": {**section.columns, **source.columns}})
    task = shape.build(known, TaskData(source.rows, _get_card_labels(source), entries))
    rows = task.prepare_rows(source.rows)
    section = section.model_copy(update={"split": settle_split(rows, section.split)})
    splits = split_rows(rows, section.split, seed=seed, columns=source.columns)
    dealt_anew = check_given_test(splits)
    splits, apart = set_apart(splits, section.out_of_scope, is_exposed=section.outlier_exposure > 0)
    splits, findings = check_rows(
        splits,
        task.labels,
        leaks=section.split.leaks,
        texts=list_texts(task),
        same=list_same(source.columns),
        out_of_scope=section.out_of_scope,
    )
    findings = [*dealt_anew, *apart, *findings]
    raise_on_errors(findings, source.origin)
    if section.split.shots is not None:  # after leaks were dropped, so that the count holds
        splits = keep_shots(splits, section.split.shots, seed=seed)
        findings += check_shots(splits["train"], task.labels or [], section.split.shots)
    splits["train"] = _add_rows(splits["train"], known, task.labels, entries or _find_entries(known, source), seed)
    tokenizer = tokenizer or task.build_tokenizer(base, splits["train"], model)
    task = task.bind(tokenizer)
    examples = {name: task.build_examples(rows, tokenizer, model.max_length) for name, rows in splits.items()}
    lengths = {
        name: _measure_lengths(task, rows, examples[name], tokenizer, model.max_length)
        for name, rows in splits.items()
        if task.cuts_rows
    }
    notes = list(source.findings)
    if left_out := len(source.rows) - len(rows):
        message = f"{left_out:,} of {len(source.rows):,} rows name no entry, and are left out of {section.type}."
        notes.append(Finding("no_entry", "note", "all", left_out, message))
    findings = [*findings, *check_lengths(lengths, model.max_length), *notes]
    return Part(section, task, source, splits, examples, findings, entries), tokenizer


def _check_named_columns(section: TaskSection) -> None:
    """A role that is misspelt would be read from the column of its own name, which may hold something else."""
    shape = TASKS[section.type]
    roles = [*shape.roles, *shape.optional_roles, *ALSO_NAMED.get(section.type, ())]
    if unknown := [role for role in section.columns if role not in roles]:
        raise RecipeError(
            f"tasks.<name>.columns: must name what {section.type} reads ({', '.join(roles)}), got {unknown[0]!r}."
            f"{suggest(unknown[0], roles) or ' Leave it out.'} Other columns need no role."
        )


def _add_rows(
    train: Sequence[Row], section: TaskSection, labels: Sequence[str] | None, entries: Sequence[Entry], seed: int
) -> list[Row]:
    """The train rows, and those that a recipe has made out of them."""
    rows = [*train, *(build_name_rows(labels or []) if section.class_names == "rows" else [])]
    if section.typos:
        rows = add_typos(rows, section.typos, seed=seed)
    if section.subject_changes:
        if CONTEXT not in section.columns:
            raise DataError(
                f"{section.data}: subject_changes must be 0 where no column is read as what was said before, got "
                f"{section.subject_changes:g}. Name one: columns: {{{CONTEXT}: COLUMN}}."
            )
        answers = {entry.id: entry.text for entry in entries}
        rows = add_subject_changes(rows, section.subject_changes, answers, seed=seed)
    return rows


def _find_entries(section: TaskSection, source: LoadedRows) -> list[Entry]:
    """The entries that agents answer from, where a card has them and the recipe needs them."""
    card = source.card if section.subject_changes else None
    return load_card_knowledge(card) if card and card.knowledge else []


def _prepare_people(
    section: TaskSection,
    model: ModelSection,
    base: BaseModel,
    seed: int,
    relative_to: Path | None,
    tokenizer: Any,
) -> tuple[Part, Any]:
    """The same of events: a row is a person."""
    loaded, task, splits = load_people(section, relative_to, seed)
    source = _as_rows(loaded, [row for part in splits.values() for row in part])
    tokenizer = tokenizer or task.build_tokenizer(base, splits["train"], model)
    examples = {name: task.build_examples(people, tokenizer, model.max_length) for name, people in splits.items()}
    return Part(section, task, source, splits, examples, list(loaded.findings)), tokenizer


def _as_rows(loaded: LoadedInteractions, people: list[Row]) -> LoadedRows:
    return LoadedRows(loaded.name, people, loaded.card, dict(loaded.columns), loaded.origin, loaded.fingerprint)


def load_entries(section: TaskSection, source: LoadedRows, relative_to: Path | None) -> list[Entry]:
    """The knowledge that a recipe names, else the card's.

    Raises:
        DataError: there is none, or its entries are damaged.
    """
    if section.knowledge is not None:
        return load_knowledge(section.knowledge, relative_to)
    if source.card is None:
        raise DataError(
            f"{source.origin}: {section.type} must have entries to look for, got none. "
            "Set tasks.<name>.knowledge to a file of them (id, text, and perhaps title and group)."
        )
    return load_card_knowledge(source.card)


def _get_card_labels(source: LoadedRows) -> list[str] | dict[str, str] | None:
    """The classes that the card names, unless the recipe reads another column."""
    card = source.card
    return card.labels if card and source.columns.get("label") == card.roles.get("label") else None


def _check_across(parts: Mapping[str, Part]) -> list[Finding]:
    """Texts that one task is judged on and another learns from."""
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
    return [role for role in task.roles if role not in ("label", "answer", ENTRY)]


def list_same(roles: Collection[str]) -> list[str]:
    """Those of the roles that together make two rows the same: one question may be asked about several passages."""
    return [role for role in (CONTEXT, "text", "passage") if role in roles]


def _measure_lengths(task: Task, rows: Sequence[Row], examples: Examples, tokenizer: Any, max_length: int) -> Indices:
    """Tokens of each row before it was cut, counted up to `max_length` + 1: one more than fits says that it was."""
    lengths = examples.sizes
    full = np.flatnonzero(lengths == max_length).tolist()
    lengths[full] = task.build_examples([rows[i] for i in full], tokenizer, max_length + 1).sizes
    return lengths


def load_held_out(
    part: Part, reference: str, columns: Mapping[str, str], tokenizer: Any, max_length: int, seed: int
) -> Part:
    """Put another held-out set in the place of a part's test split: its test split where it has one, else all of it.

    Args:
        part: what was trained, and on what.
        reference: as for `load_rows`.
        columns: role -> the set's column, where it is not that of the part's recipe.
        tokenizer, max_length, seed: of the run.

    Returns:
        The part with the source of the set, and the findings about it.

    Raises:
        UsageError: a role that the task does not have.
        DataError: unreadable data, unknown or missing labels.
    """
    task = part.task
    check_roles(task, columns)
    columns = {**part.section.columns, **columns}
    if isinstance(task, Recommendation):
        named = columns if reference in card_names() else {**part.source.columns, **columns}
        loaded, task, rows = load_others(reference, {role: named[role] for role in ROLES if role in named}, task, seed)
        source, findings = _as_rows(loaded, rows), list(loaded.findings)
    else:
        try:
            source = load_rows(reference, columns, roles=type(task).roles, optional=type(task).optional_roles)
        except ColumnError as error:
            raise DataError(f"{error.problem} Say what the set calls it: --column ROLE=NAME.") from error
        rows, findings = check_held_out(task, source, part.splits["train"])
    examples = part.examples | {"test": task.build_examples(rows, tokenizer, max_length)}
    splits = part.splits | {"test": rows}
    return replace(part, task=task, source=source, splits=splits, examples=examples, findings=findings)


def check_roles(task: Task, columns: Mapping[str, str]) -> None:
    """Refuse columns of a held-out set that the task does not read.

    Raises:
        UsageError: a role that is none of the task's.
    """
    known = (*task.roles, *task.optional_roles)
    if unknown := [role for role in columns if role not in known]:
        raise UsageError(f"--column: must be one of {', '.join(known)} for {task.type}, got {unknown[0]!r}.")


def check_held_out(
    task: Task, source: LoadedRows, train: Sequence[Row] | None = None
) -> tuple[list[Row], list[Finding]]:
    """The rows of a held-out set that are scored, and what there is to know of them.

    Args:
        task: what was trained.
        source: the set.
        train: what it was trained on; None where that is not known.

    Raises:
        DataError: unknown or missing labels, or entries that are not there.
    """
    if isinstance(task, Retrieval | Reranking):
        task.library.check(source.rows)
    rows = task.prepare_rows(source.rows)
    if any(row.split == "test" for row in rows):
        rows = [row for row in rows if row.split == "test"]
    outside = task.out_of_scope if isinstance(task, TextClassification) else None
    same = list_same(source.columns)
    _, own = check_rows(
        {"test": rows}, task.labels, leaks="fail", texts=list_texts(task), same=same, out_of_scope=outside
    )
    raise_on_errors([finding for finding in own if finding.kind != "absent_class"], source.origin)
    # A new set may repeat training texts; that is for the reader to know, and no reason to refuse.
    splits = {"train": list(train or []), "test": rows}
    _, together = check_rows(splits, task.labels, leaks="warn", same=same, out_of_scope=outside)
    recipes, sets = advise_on_leaks("train"), "The score is too hopeful: take them out of the set."
    shared = [
        replace(finding, message=finding.message.replace(recipes, sets))
        for finding in together
        if finding.kind in ("leak", "near_leak")
    ]
    return rows, shared
