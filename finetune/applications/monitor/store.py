"""The monitor's memory on disk: one SQLite file, of which one transaction takes all that a batch changes.

A process that is killed leaves the last whole transaction. In it, the position in the source, the tallies, the
watcher's state and the alerts with their outbox belong together: no item is lost or counted twice, and no alert is
raised twice.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from finetune.applications.monitor.json_lines import dump_alert, dump_json, read_alert, read_share
from finetune.applications.monitor.records import Alert, Share, Tally
from finetune.applications.monitor.repeats import Repeats
from finetune.applications.monitor.windows import to_time
from finetune.errors import ResourceError, UsageError

TOP_ITEMS = 5
REASONS_KEPT = 3
"""Rejected lines that are kept as examples, of each reason."""
LOCK_SECONDS = 10.0
_APPLICATION, _VERSION = 0x46744D6E, 1  # "FtMn", which tells our files from others

_SCHEMA = f"""
BEGIN;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS positions (origin TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS rejections (reason TEXT NOT NULL, number INTEGER NOT NULL, words TEXT NOT NULL,
  PRIMARY KEY (reason, number));
CREATE TABLE IF NOT EXISTS tallies (start INTEGER NOT NULL, topic TEXT NOT NULL, bins BLOB NOT NULL,
  called INTEGER NOT NULL, PRIMARY KEY (start, topic));
CREATE TABLE IF NOT EXISTS top_items (topic TEXT NOT NULL, start INTEGER NOT NULL, negative REAL NOT NULL,
  time TEXT NOT NULL, id TEXT NOT NULL, item TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS top_items_by_window ON top_items (topic, start);
CREATE TABLE IF NOT EXISTS windows (start INTEGER NOT NULL, topic TEXT NOT NULL, "end" INTEGER NOT NULL,
  share TEXT NOT NULL, called INTEGER NOT NULL, total INTEGER NOT NULL, is_closed INTEGER NOT NULL,
  PRIMARY KEY (start, topic));
CREATE TABLE IF NOT EXISTS watchers (topic TEXT PRIMARY KEY, state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS alerts (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
  body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (sink TEXT NOT NULL, number INTEGER NOT NULL, refusal TEXT,
  PRIMARY KEY (sink, number)) WITHOUT ROWID;
{Repeats.SCHEMA}
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
COMMIT;
"""


@dataclass(frozen=True, slots=True)
class WindowRecord:
    """One topic in one window.

    Args:
        share: of the items so far.
        called: items of which negative is the most likely class.
        total: items.
        is_closed: whether it was judged; an open one may still take items.
    """

    topic: str
    start: datetime
    end: datetime
    share: Share
    called: int
    total: int
    is_closed: bool


@dataclass(frozen=True, slots=True)
class Parcel:
    """An alert that waits for a sink.

    Args:
        number: the order in which alerts were raised.
        id: the alert's.
        body: the alert as JSON.
    """

    number: int
    id: str
    body: str


class Store:
    """The file; one process at a time writes it.

    Args:
        path: created with its folder where it does not exist.
        seconds: how long to wait for another program that has the database locked.

    Raises:
        UsageError: the file is something else, or another monitor has it.
        ResourceError: the disk refuses.
    """

    def __init__(self, path: Path, seconds: float = LOCK_SECONDS) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path.with_name(path.name + ".lock"))
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"{path}: must belong to one monitor at a time, got a second one. Wait for the first, or name another "
                "file with --state."
            ) from None
        except OSError as error:
            raise ResourceError(f"{path}: must be in a folder that can be written, got {error.strerror}.") from error
        try:
            with self._guard():
                self.connection = sqlite3.connect(path, timeout=seconds, isolation_level=None)
                self._prepare()
        except BaseException:
            self._lock.release()
            raise

    def _prepare(self) -> None:
        application, version = (self._read_pragma(name) for name in ("application_id", "user_version"))
        is_empty = self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if not is_empty and (application, version) != (_APPLICATION, _VERSION):
            raise UsageError(
                f"{self.path}: must be the state of a monitor of this version, got another database. Name another file "
                "with --state."
            )
        self.connection.execute("PRAGMA journal_mode = WAL")
        # With NORMAL, a power cut could take back a transaction whose alert was delivered already.
        self.connection.execute("PRAGMA synchronous = FULL")
        if is_empty:
            self.connection.executescript(_SCHEMA)

    def _read_pragma(self, name: str) -> int:
        return int(self.connection.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """What SQLite says, in words; whatever was not committed is not in the file."""
        try:
            yield
        except sqlite3.OperationalError as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                fix = "Close the program that has it locked; the same command goes on where this one stopped."
            elif name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
                fix = "Make room on the disk; the same command goes on where this one stopped."
            else:
                fix = "See that the file and its folder can be read and written."
            raise ResourceError(f"{self.path}: the state must be written, got {str(error)!r}. {fix}") from error
        except sqlite3.DatabaseError as error:
            raise UsageError(
                f"{self.path}: must be the state of a monitor, got {str(error)!r}. Name another file with --state."
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside is kept, or nothing of it."""
        with self._guard():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:  # a full disk has rolled back by itself
                    self.connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Let the file go."""
        self.connection.close()
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # Facts, positions and counts

    def check_fact(self, name: str, value: Any, fix: str) -> None:
        """Keep a fact at first; later, see that it is the same.

        Raises:
            UsageError: it is another one now.
        """
        known = self.read_fact(name)
        if known is None:
            self.save_fact(name, value)
        elif known != value:
            raise UsageError(f"{self.path}: {name} must be {_show(known)} as before, got {_show(value)}. {fix}")

    def read_fact(self, name: str) -> Any:
        """A JSON value; None where there is none."""
        row = self.connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def save_fact(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        self.connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def read_positions(self) -> dict[str, Any]:
        """Where each source goes on."""
        rows = self.connection.execute("SELECT origin, value FROM positions")
        return {origin: json.loads(value) for origin, value in rows}

    def save_position(self, origin: str, position: Any) -> None:
        """Where a source goes on, as a JSON value."""
        self.connection.execute("INSERT OR REPLACE INTO positions VALUES (?, ?)", (origin, json.dumps(position)))

    def count(self, name: str, by: int = 1) -> None:
        """Add to a count."""
        self.connection.execute(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            (name, by),
        )

    def read_counts(self) -> dict[str, int]:
        """Every count since the file was made."""
        return dict(self.connection.execute("SELECT name, value FROM counts ORDER BY name"))

    def add_rejection(self, reason: str, words: str) -> None:
        """Count a line that is no item, and keep the first few."""
        self.count(f"rejected: {reason}")
        number = self.read_counts()[f"rejected: {reason}"]
        if number <= REASONS_KEPT:
            self.connection.execute("INSERT INTO rejections VALUES (?, ?, ?)", (reason, number, words))

    def read_rejections(self) -> list[str]:
        """The first few of each reason, in words."""
        return [words for (words,) in self.connection.execute("SELECT words FROM rejections ORDER BY reason, number")]

    # Windows

    def load_tally(self, start: int, topic: str) -> Tally:
        """The tally of an open window, empty where nothing was counted."""
        row = self.connection.execute(
            "SELECT bins, called FROM tallies WHERE start = ? AND topic = ?", (start, topic)
        ).fetchone()
        return Tally(np.frombuffer(row[0], dtype="<i8").astype(np.int64), row[1]) if row else Tally()

    def save_tally(self, start: int, topic: str, tally: Tally) -> None:
        """Keep the tally of an open window."""
        self.connection.execute(
            "INSERT OR REPLACE INTO tallies VALUES (?, ?, ?, ?)",
            (start, topic, tally.bins.astype("<i8").tobytes(), tally.called),
        )

    def list_open_starts(self) -> list[int]:
        """Starts of the open windows that hold items, ascending."""
        return [start for (start,) in self.connection.execute("SELECT DISTINCT start FROM tallies ORDER BY start")]

    def save_window(self, start: int, end: int, topic: str, share: Share, tally: Tally, *, is_closed: bool) -> None:
        """Keep the share of a window; of a closed one the tally is no longer needed."""
        self.connection.execute(
            "INSERT OR REPLACE INTO windows VALUES (?, ?, ?, ?, ?, ?, ?)",
            (start, topic, end, dump_json(asdict(share)), tally.called, tally.total, is_closed),
        )
        if is_closed:
            self.connection.execute("DELETE FROM tallies WHERE start = ? AND topic = ?", (start, topic))

    def read_windows(self) -> list[WindowRecord]:
        """Every window, by time and topic."""
        return self._read_windows("ORDER BY start, topic")

    def read_latest_windows(self) -> list[WindowRecord]:
        """The last closed window of each topic."""
        return self._read_windows(
            "WHERE start = (SELECT start FROM windows WHERE is_closed ORDER BY start DESC LIMIT 1) ORDER BY topic"
        )

    def _read_windows(self, which: str) -> list[WindowRecord]:
        rows = self.connection.execute(
            f'SELECT topic, start, "end", share, called, total, is_closed FROM windows {which}'
        )
        return [
            WindowRecord(
                topic, to_time(start), to_time(end), read_share(json.loads(share)), called, total, bool(closed)
            )
            for topic, start, end, share, called, total, closed in rows
        ]

    def add_top_items(self, topic: str, start: int, items: Sequence[Mapping[str, Any]]) -> None:
        """Keep the most negative items of a window.

        Args:
            items: with `negative`, `time` and `id`, by which they are ordered.
        """
        self.connection.executemany(
            "INSERT INTO top_items VALUES (?, ?, ?, ?, ?, ?)",
            [(topic, start, item["negative"], item["time"], item["id"], dump_json(item)) for item in items],
        )
        self.connection.execute(
            "DELETE FROM top_items WHERE topic = :topic AND start = :start AND rowid NOT IN (SELECT rowid"
            " FROM top_items WHERE topic = :topic AND start = :start ORDER BY negative DESC, time, id LIMIT :kept)",
            {"topic": topic, "start": start, "kept": TOP_ITEMS},
        )

    def read_top_items(self, topic: str, start: datetime) -> list[dict[str, Any]]:
        """The most negative items of a window, the most negative first."""
        rows = self.connection.execute(
            "SELECT item FROM top_items WHERE topic = ? AND start = ? ORDER BY negative DESC, time, id",
            (topic, int(start.timestamp())),
        )
        return [json.loads(item) for (item,) in rows]

    def delete_top_items(self, start: int) -> None:
        """Forget the most negative items of a window and those before; alerts hold theirs."""
        self.connection.execute("DELETE FROM top_items WHERE start <= ?", (start,))

    def read_states(self) -> dict[str, dict[str, Any]]:
        """What the watcher remembers of each topic."""
        return {topic: json.loads(state) for topic, state in self.connection.execute("SELECT * FROM watchers")}

    def save_state(self, topic: str, state: Mapping[str, Any]) -> None:
        """Keep what the watcher remembers of a topic."""
        self.connection.execute("INSERT OR REPLACE INTO watchers VALUES (?, ?)", (topic, json.dumps(state)))

    # Alerts and their outbox

    def add_alert(self, alert: Alert, sinks: Sequence[str]) -> bool:
        """Keep an alert and lay it out for each sink; False where it was raised before."""
        cursor = self.connection.execute(
            "INSERT OR IGNORE INTO alerts (id, body) VALUES (?, ?)", (alert.id, dump_alert(alert))
        )
        if cursor.rowcount == 0:
            return False
        rows = [(sink, cursor.lastrowid) for sink in sinks]
        self.connection.executemany("INSERT INTO outbox (sink, number) VALUES (?, ?)", rows)
        return True

    def read_alerts(self) -> list[Alert]:
        """Every alert, in the order in which they were raised."""
        return [
            read_alert(json.loads(body))
            for (body,) in self.connection.execute("SELECT body FROM alerts ORDER BY number")
        ]

    def read_outbox(self, sink: str, limit: int = 100) -> list[Parcel]:
        """What waits for a sink, in order."""
        rows = self.connection.execute(
            "SELECT number, id, body FROM outbox JOIN alerts USING (number) WHERE sink = ? AND refusal IS NULL"
            " ORDER BY number LIMIT ?",
            (sink, limit),
        )
        return [Parcel(*row) for row in rows]

    def count_outbox(self, sink: str) -> int:
        """How many alerts wait for a sink."""
        row = self.connection.execute(
            "SELECT count(*) FROM outbox WHERE sink = ? AND refusal IS NULL", (sink,)
        ).fetchone()
        return int(row[0])

    def mark_delivered(self, sink: str, parcel: Parcel) -> None:
        """Take an alert out of a sink's outbox."""
        with self.transaction():
            self.connection.execute("DELETE FROM outbox WHERE sink = ? AND number = ?", (sink, parcel.number))

    def mark_refused(self, sink: str, parcel: Parcel, words: str) -> None:
        """An alert that a sink will never take; it stays, and blocks no other."""
        with self.transaction():
            self.connection.execute(
                "UPDATE outbox SET refusal = ? WHERE sink = ? AND number = ?", (words, sink, parcel.number)
            )

    def read_refusals(self) -> list[str]:
        """The alerts that a sink would not take, in words."""
        rows = self.connection.execute("SELECT refusal FROM outbox WHERE refusal IS NOT NULL ORDER BY number")
        return [words for (words,) in rows]


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
