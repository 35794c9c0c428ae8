"""One line of a stream -> a checked item, or the reason why it is none.

The bounds are chosen so that an item of 1 MB is read, its text cut to what a model could look at, while nothing larger
is ever held.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from finetune.applications.monitor.records import Item
from finetune.data.cleaning import clean_text

MAX_LINE_BYTES = 2 * 2**20
MAX_TEXT_CHARACTERS = 20_000
MAX_ID_CHARACTERS = 512
MAX_FIELD_CHARACTERS = 2_000  # of source, ticker and link
FUTURE_SECONDS = 300.0
"""How far a publisher's clock may be ahead of ours. One item from far ahead would close every window before it."""
MILLISECONDS = 1e11
"""Epoch seconds from here on, the year 5138, are taken for milliseconds that nobody converted."""
_NUMBER = re.compile(r"\d{9,}(?:\.\d+)?")  # eight digits are a date
_RFC_2822 = re.compile(r"(?:[A-Za-z]{3},\s*)?\d{1,2}\s+[A-Za-z]{3}\s")

Reason = Literal["no JSON", "too long", "no id", "no time", "bad time", "in the future", "no text", "bad labels"]
Note = Literal["zone assumed", "text cut", "bytes replaced", "file gone", "closed early"]
NOTES: Mapping[Note, str] = {
    "zone assumed": "had a time without a zone, which was taken as UTC",
    "text cut": f"had a text of which only the first {MAX_TEXT_CHARACTERS:,} characters were read",
    "bytes replaced": "had bytes that are no UTF-8, which were replaced",
    "file gone": "time the file of the last position was gone: what else it held was not read",
    "closed early": "came within the lateness, for a window that --close or a silence had closed: late all the same",
}


class ItemError(ValueError):
    """A line that is no item. `reason` is for counting, the message for people."""

    def __init__(self, reason: Reason, words: str) -> None:
        super().__init__(words)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ReadItem:
    """An item, and what had to be done to it."""

    item: Item
    notes: tuple[Note, ...] = ()


def read_item(content: bytes | Mapping[str, Any], now: float) -> ReadItem:
    """Check one item.

    Args:
        content: a line of JSON, or what it would hold: `id`, `time` (ISO 8601, RFC 2822 or epoch seconds), `text`, and
            perhaps `source`, `ticker`, `link` and `labels` (task -> class).
        now: epoch seconds of the clock.

    Raises:
        ItemError: it is no item.
    """
    notes: list[Note] = []
    fields = _parse(content, notes) if isinstance(content, bytes) else content
    name = _take_id(fields.get("id"))
    time = _take_time(fields.get("time"), notes)
    if time.timestamp() > now + FUTURE_SECONDS:
        raise ItemError("in the future", f"time must not be after now, got {show(fields['time'])}.")
    text = _take_text(fields.get("text"), notes)
    source, ticker, link = (_take_field(fields.get(key)) for key in ("source", "ticker", "link"))
    return ReadItem(
        Item(name, time, text, source, ticker, check_link(link), _take_labels(fields.get("labels"))), tuple(notes)
    )


def check_link(link: Any) -> str | None:
    """An address that may be followed, or none: `javascript:` would run on the report page."""
    return link if isinstance(link, str) and link.lower().startswith(("https://", "http://")) else None


def is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        _parse(line, [])
    except ItemError:
        return False
    return True


def show(value: Any) -> str:
    """A value as part of a message, short."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _parse(line: bytes, notes: list[Note]) -> Mapping[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise ItemError("too long", f"must have at most {MAX_LINE_BYTES:,} bytes, got more.")
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        notes.append("bytes replaced")
        text = line.decode("utf-8-sig", "replace")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise ItemError("no JSON", f"must be a JSON object, got {show(text.strip())}.") from None
    if not isinstance(fields, dict):
        raise ItemError("no JSON", f"must be a JSON object, got {show(fields)}.")
    return fields


def _take_id(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_ID_CHARACTERS:
        raise ItemError("no id", f"id must be text of 1 to {MAX_ID_CHARACTERS} characters, got {show(value)}.")
    return _without_surrogates(value.strip())


def _take_time(value: Any, notes: list[Note]) -> datetime:
    if value is None or value == "":
        raise ItemError("no time", f"time must be there, got {show(value)}.")
    try:
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, str):
            time = _parse_time(value.strip())
            if time.tzinfo is None:
                notes.append("zone assumed")
                time = time.replace(tzinfo=UTC)
            return time.astimezone(UTC)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            if value >= MILLISECONDS:
                raise ItemError("bad time", f"time must be epoch seconds, got {show(value)}. Divide it by 1000.")
            return datetime.fromtimestamp(value, UTC)
    except ItemError:
        raise
    except (ValueError, OverflowError, OSError):
        pass
    raise ItemError("bad time", f"time must be ISO 8601, RFC 2822 or epoch seconds, got {show(value)}.")


def _parse_time(text: str) -> datetime:
    """ISO 8601, or the RFC 2822 of mail and RSS.

    Raises:
        ValueError: it is neither.
    """
    return parsedate_to_datetime(text) if _RFC_2822.match(text) else datetime.fromisoformat(text)


def _take_text(value: Any, notes: list[Note]) -> str:
    if not isinstance(value, str):
        raise ItemError("no text", f"text must be text, got {show(value)}.")
    text = _without_surrogates(value)
    if len(text) > MAX_TEXT_CHARACTERS:
        notes.append("text cut")
        text = text[:MAX_TEXT_CHARACTERS]
    if not clean_text(text, ["html"]):  # as the model will see it: `&nbsp;` is nothing
        raise ItemError("no text", f"text must not be empty, got {show(value)}.")
    return text


def _take_field(value: Any) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        return None
    return _without_surrogates(value.strip())[:MAX_FIELD_CHARACTERS]


def _take_labels(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(label, str) for label in value.values()):
        raise ItemError("bad labels", f"labels must be a class for each task, got {show(value)}.")
    return dict(value)


def _without_surrogates(text: str) -> str:
    """Half of a surrogate pair is allowed in JSON, and in no file and no database."""
    return text.encode("utf-8", "replace").decode()
