"""Where the answers to questions stand in their passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.data.rows import Row
from finetune.errors import DataError

MAX_LISTED = 5  # rows that a message names


def find_answers(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows with `answer_start`: the character of `passage` at which `answer` starts, None where the answer is "".

    Args:
        rows: with `passage` and `answer`.
        column: says where the answer starts; without it, or where it is empty, the first place counts.

    Raises:
        DataError: an answer that is not where it should be.
    """
    found = [(row, _find_start(row, column)) for row in rows]
    if wrong := [(row, reason) for row, reason in found if isinstance(reason, str)]:
        more = f" and {len(wrong) - MAX_LISTED:,} more" if len(wrong) > MAX_LISTED else ""
        listed = "; ".join(f"{row.id} {reason}" for row, reason in wrong[:MAX_LISTED])
        raise DataError(
            f"question_answering: every answer must stand in its passage, got {listed}{more}. Correct the rows; an "
            "empty answer says that there is none."
        )
    return [replace(row, values={**row.values, "answer_start": start}) for row, start in found]


def _find_start(row: Row, column: str) -> int | str | None:
    """Where the row's answer starts, None for no answer, or what is wrong with it."""
    passage, answer = row.values.get("passage") or "", row.values.get("answer") or ""
    given = row.values.get(column)
    if not answer:
        return None
    if given in (None, ""):
        start = passage.find(answer)
        return start if start >= 0 else f"has {_shorten(answer)}, which is not there"
    try:
        start = int(float(given))
    except (TypeError, ValueError):
        return f"has {column} {given!r}, which is no number"
    if start < 0 or not passage.startswith(answer, start):
        there = passage[start : start + len(answer)] if start >= 0 else ""
        return f"has {_shorten(answer)} with {column} {start}, where {_shorten(there)} stands"
    return start


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
