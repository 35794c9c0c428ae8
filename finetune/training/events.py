"""The run's diary: events.jsonl, one JSON object a line, appended and never rewritten except to resume."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune.errors import ResourceError
from finetune.recipe.files import build_disk_error, write_file_atomically

_RESERVED = ("time", "non_finite")
_BY_STEP = ("step", "evaluation")


class EventLog:
    """Append-only log of a run; each line is flushed, so that a killed process loses none that was written.

    Opening it cuts off the torn last line that a crash may have left. Only one process of a run writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path)
            self._file = path.open("ab")
        except OSError as error:
            raise build_disk_error(path, error, needed_bytes=0) from error

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time (UTC, ISO 8601).

        Args:
            event: its kind, e.g. `step`, `evaluation`, `checkpoint`.
            fields: JSON values; NumPy numbers too. NaN and infinities become null, and `non_finite` lists their names,
                nested ones with dots (`metrics.macro_f1`).

        Raises:
            ResourceError: the disk refused.
            ValueError: a field is called `time` or `non_finite`.
        """
        for name in _RESERVED:
            if name in fields:
                raise ValueError(f"a field of an event must not be called {name!r}: the log writes it itself")
        non_finite: list[str] = []
        line: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        line |= {name: _clean(value, name, non_finite) for name, value in fields.items()}
        if non_finite:
            line["non_finite"] = non_finite
        data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise build_disk_error(self.path, error, needed_bytes=len(data)) from error

    def truncate_after_step(self, step: int) -> int:
        """Drop `step` and `evaluation` events later than `step`, which a resumed run writes again; return how many."""
        events = load_events(self.path)
        kept = [event for event in events if not (event.get("event") in _BY_STEP and event.get("step", step) > step)]
        if len(kept) < len(events):
            self._file.close()
            data = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept)
            try:
                write_file_atomically(self.path, data.encode())
            finally:
                self._file = self.path.open("ab")
        return len(events) - len(kept)

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        try:
            self._file.close()
        except OSError as error:
            raise build_disk_error(self.path, error, needed_bytes=0) from error

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def load_events(path: Path) -> list[dict[str, Any]]:
    """Read the events of a run, also while it runs; a torn last line is left out, and no file means no events.

    Raises:
        ResourceError: a line before the last is not a JSON object.
    """
    if not path.exists():
        return []
    events = []
    # Bytes, because str.splitlines also splits at characters that JSON allows inside a string.
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise ResourceError(
                f"{path}: line {number} must be a JSON object, got {line[:60].decode(errors='replace')!r}. "
                "Delete that line; the checkpoints do not depend on it."
            )
        events.append(event)
    return events


def _cut_torn_line(path: Path) -> None:
    """Shorten the file to its last complete line; appending to a torn one would spoil the next event as well."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _clean(value: Any, name: str, non_finite: list[str]) -> Any:
    """Return `value` as strict JSON, with the names of non-finite numbers added to `non_finite`."""
    if isinstance(value, Mapping):
        return {key: _clean(item, f"{name}.{key}", non_finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, f"{name}.{position}", non_finite) for position, item in enumerate(value)]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if math.isfinite(value):
        return float(value)
    non_finite.append(name)
    return None
