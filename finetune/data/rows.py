"""A row: one validated record of a data set, and the splits that rows are sorted into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Row:
    """One record. Equal rows of the same file on any machine have the same `id`."""

    id: str
    """`<split or file stem>:<number>`, unique in the data set."""
    split: str | None
    """The given split (train, validation or test); None where the data came unsplit."""
    number: int
    """1-based data row in its file, the header not counted."""
    values: Mapping[str, Any]
    """Role (`text`, `label`) -> text, None for a missing label; other columns under their own names, as read."""


Splits: TypeAlias = dict[str, list[Row]]
"""Split name -> its rows; the keys are those of `SPLITS`, in that order."""


def build_name_rows(labels: Sequence[str]) -> list[Row]:
    """One row for each class whose text is the class's name, as people would write it: `card_arrival`, card arrival."""
    return [
        Row(f"class:{number}", "train", number, {"text": " ".join(label.replace("_", " ").split()), "label": label})
        for number, label in enumerate(labels, start=1)
    ]
