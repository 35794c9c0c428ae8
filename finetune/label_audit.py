"""The story of an audit: rows -> features -> out-of-fold probabilities -> likely label errors.

An audit looks at train and validation. A given test split is left out unless asked for: to correct it is legitimate,
but it changes what every score on it means, and whoever reads its errors knows it. Data without splits have no test
split yet, and are looked at as a whole.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetune.artifact.score_file import write_records
from finetune.data.batches import Examples
from finetune.data.cleaning import normalize_for_duplicates
from finetune.data.rows import Row
from finetune.data.sources import load_rows
from finetune.errors import DataError
from finetune.evaluation.baselines import build_vectorizer
from finetune.evaluation.label_errors import FOLDS, check_cleanlab, compute_out_of_fold, find_label_errors
from finetune.models.base import find_base, load_tokenizer, resolve_base
from finetune.models.embedding import compute_embeddings
from finetune.recipe.schema import DEFAULT_BASE, TaskSection
from finetune.tasks.task import TaskData
from finetune.tasks.text_classification import TextClassification

Features = Literal["both", "frozen", "tfidf"]
MAX_TOKENS = 128
DIGITS = 4


@dataclass(frozen=True)
class JudgedRow:
    """A row, its label, and what the other rows say about it."""

    id: str
    split: str | None
    row: int
    """1-based data row in its file, the header not counted."""
    given: str
    suggested: str
    """The likeliest class."""
    given_probability: float
    suggested_probability: float
    flagged: bool
    """Whether it is among the estimated number of errors."""
    text: str


@dataclass(frozen=True)
class Conflict:
    """One text with several labels; at most one of them is right."""

    text: str
    rows: dict[str, str]
    """Row id -> label."""


@dataclass(frozen=True)
class Audit:
    """The labels of a data set, judged."""

    data: str
    features: Features
    accuracy: float
    """Of the auditing model, cross-validated against the given labels: where it is low, so is the worth of this."""
    ranked: list[JudgedRow]
    """Every row that was looked at, the likeliest error first."""
    conflicts: list[Conflict]
    notes: list[str]
    """What was not looked at, and what to know before using this."""

    @property
    def suspects(self) -> list[JudgedRow]:
        """The flagged rows, the likeliest error first."""
        return [row for row in self.ranked if row.flagged]

    @property
    def pairs(self) -> dict[tuple[str, str], int]:
        """(given, suggested) -> number of suspects, largest first."""
        return dict(Counter((row.given, row.suggested) for row in self.suspects).most_common())

    def save(self, output: Path) -> None:
        """Write every row that was looked at, the likeliest error first, as CSV, JSONL or Parquet."""
        write_records([asdict(row) for row in self.ranked], output)


def audit(
    data: str,
    columns: Mapping[str, str] | None = None,
    *,
    features: Features | None = None,
    test: bool = False,
    seed: int = 13,
    quiet: bool = False,
) -> Audit:
    """Look for likely label errors in a data set of texts with one label each.

    Args:
        data: a card, a file, a folder of splits, or hub:org/name@revision.
        columns: role (`text`, `label`) -> column.
        features: `frozen`, embeddings of the default base; `tfidf`, words and word pairs; `both`, the mean of what
            a model on each says, which finds most; None for `both` where the base is at hand, else `tfidf`.
        test: look at a given test split too.
        seed: deals out the folds.
        quiet: nothing on standard error.

    Raises:
        ResourceError: cleanlab is not installed.
        DataError: unreadable data, or too few rows.
        ModelError: `frozen` or `both` without the base.
    """
    check_cleanlab()
    source = load_rows(data, columns or {})
    task = TextClassification.build(
        TaskSection(type="text_classification", data=data),
        TaskData(source.rows, source.card.labels if source.card else None),
    )
    notes: list[str] = []
    rows = _choose_rows(task.prepare_rows(source.rows), source.name, test, notes)
    classes = sorted({row.values["label"] for row in rows})
    labels = np.array([classes.index(row.values["label"]) for row in rows])
    keys = [normalize_for_duplicates(row.values["text"]) for row in rows]
    if features is None:
        features = "both" if find_base(DEFAULT_BASE) else "tfidf"
    if not quiet:
        sys.stderr.write(f"{source.name}: {len(rows):,} rows of {len(classes)} classes, features {features}\n")
    groups = np.unique(keys, return_inverse=True)[1]
    matrices = _build_features([row.values["text"] for row in rows], features)
    probabilities = np.mean([compute_out_of_fold(matrix, labels, groups, seed) for matrix in matrices], axis=0)
    found = find_label_errors(labels, probabilities)
    suggested = probabilities.argmax(axis=1)
    ranked = [
        JudgedRow(
            id=rows[i].id,
            split=rows[i].split,
            row=rows[i].number,
            given=classes[labels[i]],
            suggested=classes[suggested[i]],
            given_probability=round(float(probabilities[i, labels[i]]), DIGITS),
            suggested_probability=round(float(probabilities[i, suggested[i]]), DIGITS),
            flagged=bool(found.flagged[i]),
            text=rows[i].values["text"],
        )
        for i in np.argsort(found.quality, kind="stable")
    ]
    accuracy = round(float((suggested == labels).mean()), DIGITS)
    return Audit(source.origin, features, accuracy, ranked, _find_conflicts(rows, keys), notes)


def _choose_rows(rows: Sequence[Row], name: str, test: bool, notes: list[str]) -> list[Row]:
    """The rows that can be judged; `notes` says which are left out."""
    if any(row.split == "test" for row in rows):
        if test:
            notes.append(
                "The test split was looked at. Whoever corrects it must score every model on it anew, and say so."
            )
        else:
            notes.append(f"{sum(row.split == 'test' for row in rows):,} rows of test were not looked at.")
    elif not any(row.split for row in rows):
        notes.append(
            "The data come without splits: all rows were looked at, also those that a recipe would put into test. "
            "Correct them before the first run."
        )
    rows = [row for row in rows if test or row.split != "test"]
    usable = [row for row in rows if row.values["label"] and row.values["text"].strip()]
    texts = {(row.values["label"], normalize_for_duplicates(row.values["text"])) for row in usable}
    counts = Counter(label for label, _ in texts)
    rare = sorted(label for label, count in counts.items() if count < FOLDS)
    if len(usable) < len(rows):
        notes.append(f"{len(rows) - len(usable):,} rows without text or label were not looked at.")
    if rare:
        few = sum(row.values["label"] in rare for row in usable)
        listed = ", ".join(rare[:12]) + (f" and {len(rare) - 12} more" if len(rare) > 12 else "")
        notes.append(f"{few:,} rows of classes with fewer than {FOLDS} different texts were not looked at: {listed}.")
    if len(counts) - len(rare) < 2:
        raise DataError(
            f"{name}: at least 2 classes must have {FOLDS} different texts each to judge one by the others, got "
            f"{len(counts) - len(rare)} of {len(counts)}. Check the label column, or add rows."
        )
    return [row for row in usable if row.values["label"] not in rare]


def _build_features(texts: list[str], features: Features) -> list[Any]:
    """Embeddings at length 1, a sparse matrix of words and word pairs, or one of each; (N, D)."""
    matrices: list[Any] = []
    if features != "frozen":
        try:
            matrices.append(build_vectorizer().fit_transform(texts))
        except ValueError as error:  # scikit-learn's way to say that the vocabulary is empty
            raise DataError("data audit: texts must hold words, got none. Check the text column.") from error
    if features != "tfidf":
        base = resolve_base(DEFAULT_BASE)
        tokenizer = load_tokenizer(base)
        encoded = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        examples = Examples.build(encoded, [0] * len(texts))
        matrices += compute_embeddings(base, [examples], tokenizer.pad_token_id)
    return matrices


def _find_conflicts(rows: Sequence[Row], keys: Sequence[str]) -> list[Conflict]:
    same: dict[str, list[Row]] = defaultdict(list)
    for key, row in zip(keys, rows, strict=True):
        same[key].append(row)
    return [
        Conflict(group[0].values["text"], {row.id: row.values["label"] for row in group})
        for group in same.values()
        if len({row.values["label"] for row in group}) > 1
    ]
