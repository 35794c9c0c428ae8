"""The score, broken down by the values of columns: where the model is weak."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.cleaning import SPACED_WORD
from finetune.errors import DataError
from finetune.evaluation.intervals import Interval, Resampling, compute_intervals
from finetune.evaluation.metrics import Floats, Ints

LENGTH = "length"  # the number of words, not a column
PATTERNS = {
    "numbers": re.compile(r"\d"),
    "tickers": re.compile(r"(?<![\w$])\$[A-Za-z]{1,6}(?:\.[A-Za-z]{1,2})?(?!\w)"),
    "percent": re.compile(r"[%\uff05]|\b(?:percent(?:age)?|per cent|pct)\b", re.IGNORECASE),
    "negation": re.compile(
        r"\b(?:no|not|never|none|nobody|nothing|nowhere|neither|nor|without|cannot)\b"
        r"|\b(?:do|does|did|is|are|was|were|wo|ca|could|would|should|has|have|had|need|must)n['\u2019]?t\b",
        re.IGNORECASE,
    ),
}
"""Slice that is no column either -> what a text with it holds: a digit; `$AAPL`; a percent sign or word; an English
word that denies."""
DERIVED = (LENGTH, *PATTERNS)
OTHER = "other"
MISSING = "(missing)"
MAX_VALUES = 12  # of a column; a number with more values is cut into quartiles
MIN_ROWS = 10  # an interval over fewer rows says nothing


@dataclass(frozen=True, slots=True)
class SliceRows:
    """The N rows of a split, scored."""

    references: Ints
    scores: Floats
    texts: Sequence[str]
    values: Sequence[Mapping[str, Any]]
    """Column -> value of each row."""


def check_slice_columns(columns: Sequence[str], available: Sequence[str]) -> None:
    """Every column of `evaluate.slices` must exist, or be one of `DERIVED`.

    Raises:
        DataError: Lists every missing column, with the nearest that exists.
    """
    problems = []
    for column in columns:
        if column not in (*DERIVED, *available):
            near = difflib.get_close_matches(column, [*available, *DERIVED], n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Use one of these, or {', '.join(DERIVED)}."
            got = ", ".join(sorted(available)) or "none"
            problems.append(f"evaluate.slices: column {column!r} must exist, got columns {got}. {hint}")
    if problems:
        raise DataError("\n".join(problems))


def compute_slices(
    rows: SliceRows, columns: Sequence[str], names: Sequence[str], *, confidence: float, resampling: Resampling
) -> dict[str, list[dict[str, Any]]]:
    """Metrics with intervals for each value of each column.

    Numbers with more than 12 values, and `length`, are cut into quartiles. A key of `PATTERNS` parts the texts with it
    from those without. Of other columns the 12 most frequent values stand alone. The rest, and every slice under 10
    rows, are one slice called `other`.

    Args:
        rows: The scored split.
        columns: Of `evaluate.slices`.
        names: Metrics.
        confidence: Level of the intervals.
        resampling: Of the split's rows.

    Returns:
        column -> [{"value", "rows", "metrics": name -> {"value", "low", "high"}}].

    Raises:
        DataError: A column does not exist.
    """

    def score(chosen: Ints) -> dict[str, Interval]:
        own = resampling.take(chosen)
        return compute_intervals(
            rows.references[chosen], rows.scores[chosen], names, confidence=confidence, resampling=own
        )

    return score_slices(rows.texts, rows.values, columns, score)


def score_slices(
    texts: Sequence[str],
    values: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    score: Callable[[Ints], dict[str, Interval]],
) -> dict[str, list[dict[str, Any]]]:
    """The same for any way to score some of the rows: `score` takes their positions.

    Raises:
        DataError: A column does not exist.
    """
    check_slice_columns(columns, sorted({column for row in values for column in row}))
    return {
        column: [
            {"value": value, "rows": len(chosen), "metrics": score(chosen)}
            for value, chosen in group_rows(column, texts, values)
        ]
        for column in columns
    }


def group_rows(column: str, texts: Sequence[str], values: Sequence[Mapping[str, Any]]) -> list[tuple[str, Ints]]:
    """(value, positions of its rows): quartiles upwards and behind them the rows without a number, other values from
    the most frequent down, `other` last."""
    if column == LENGTH:
        labels, order = _label_quartiles([float(len(SPACED_WORD.findall(text))) for text in texts], " words")
    elif column in PATTERNS:
        order = [f"with {column}", f"without {column}"]
        labels = [order[0] if PATTERNS[column].search(text) else order[1] for text in texts]
    else:
        found = [row.get(column) for row in values]
        there = [value for value in found if not _is_missing(value)]
        numbers = [_to_number(value) for value in there]
        if None not in numbers and len(set(numbers)) > MAX_VALUES:
            named, order = _label_quartiles([n for n in numbers if n is not None], "")
            names = iter(named)
            labels = [MISSING if _is_missing(value) else next(names) for value in found]
            order.append(MISSING)
        else:
            labels = [MISSING if _is_missing(value) else str(value) for value in found]
            order = [value for value, _ in Counter(labels).most_common()]
    counts = Counter(labels)
    kept = [value for value in order if counts[value] >= MIN_ROWS and value != OTHER][:MAX_VALUES]
    positions: dict[str, list[int]] = {value: [] for value in [*kept, OTHER]}
    for position, label in enumerate(labels):
        positions[label if label in kept else OTHER].append(position)
    return [(value, np.array(chosen, dtype=np.int64)) for value, chosen in positions.items() if chosen]


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _to_number(value: Any) -> float | None:
    """A finite number, also one written as text; None otherwise. True and false are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _label_quartiles(numbers: Sequence[float], unit: str) -> tuple[list[str], list[str]]:
    """The quartile of each number, named by the smallest and largest number in it, and the names upwards.

    Fewer than four bins where rows are few or many numbers are equal: equal numbers share a bin.
    """
    values = np.array(numbers, dtype=np.float64)
    bins = max(1, min(4, len(values) // MIN_ROWS))
    edges = np.quantile(values, np.arange(1, bins) / bins, method="lower") if len(values) else values
    chosen = np.searchsorted(np.unique(edges), values, side="left")
    names = {int(b): _name_range(values[chosen == b].min(), values[chosen == b].max(), unit) for b in np.unique(chosen)}
    return [names[int(b)] for b in chosen], list(names.values())


def _name_range(low: float, high: float, unit: str) -> str:
    first, last = (str(int(v)) if v.is_integer() else f"{v:.4g}" for v in (float(low), float(high)))
    if first == last:
        return first + (unit.removesuffix("s") if first == "1" else unit)
    return f"{first}-{last}{unit}" if unit else f"{first} to {last}"
