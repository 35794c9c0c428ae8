"""A row: one validated record of a data set, and the splits that rows are sorted into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from finetune.data.files import MAX_TEXT_CHARACTERS
from finetune.errors import DataError

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


def number_groups(rows: Sequence[Row], column: str | None) -> npt.NDArray[np.int64] | None:
    """The number of each row's value in a column, (N,); None where there is no such column."""
    if column is None or not all(column in row.values for row in rows):
        return None
    return np.unique([str(row.values[column]) for row in rows], return_inverse=True)[1].astype(np.int64)


def build_name_rows(labels: Sequence[str]) -> list[Row]:
    """One row for each class whose text is the class's name, as people would write it: `card_arrival`, card arrival."""
    return [
        Row(f"class:{number}", "train", number, {"text": " ".join(label.replace("_", " ").split()), "label": label})
        for number, label in enumerate(labels, start=1)
    ]


def to_text(value: object, where: str) -> str:
    """The text of a cell; "" when it is missing.

    Raises:
        DataError: no text, or one that is too long; `where` names the cell.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of whole numbers with a gap comes as floats
    if isinstance(value, (list, dict, bytes)):
        raise DataError(f"{where}: must hold text, got a {type(value).__name__}. Choose another column.")
    text = str(value)
    if len(text) > MAX_TEXT_CHARACTERS:
        must = f"must have at most {MAX_TEXT_CHARACTERS:,} characters"
        raise DataError(f"{where}: {must}, got {len(text):,}. Split or cut the text.")
    return text
