"""Items that come again: by their id, or as a copy of a text that came before.

A copy is the same words in the same order. Case, punctuation, markup and links do not count, nor what a wire adds at
either end: `UPDATE 1-...`, `... (repeats)`, `Reuters: ...`, `... - Newswire`, and the item's own source in the place of
the wire. One more word can make it other news: `unlikely`, `shares plunge`.
"""

from __future__ import annotations

import re
import sqlite3
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from finetune.applications.monitor.records import Item
from finetune.data.cleaning import clean_text, normalize_for_duplicates

REMEMBERED_SECONDS = 24 * 3600
"""How far back a text is looked for, by the items' own times."""
REMEMBERED_ITEMS = 100_000
COMPARED_CHARACTERS = 1_000

_UPDATE = re.compile(r"^(?:(?:update|wrapup|corrected|refile|rpt|breaking|exclusive)(?: \d+)? )+(?=\w)")
_WIRES = (
    "repeats|updates|updated|corrects|corrected|newswire|pr ?newswire|business ?wire|globe ?newswire|accesswire|reuters"
    "|bloomberg|dow jones(?: newswires)?|associated press|ap|afp|dpa|cnbc|marketwatch|benzinga|yahoo finance|wsj"
    "|the wall street journal|ft|financial times|barron's|seeking alpha|investing\\.com|xinhua|kyodo|interfax|tass"
)


class Repeats:
    """The items of the last hours, in the tables of a connection whose owner begins and ends the transactions.

    What is found depends on the order of the items alone, and not on when `forget` is called.
    """

    SCHEMA = """
    CREATE TABLE IF NOT EXISTS remembered (
      number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, text TEXT NOT NULL, keys BLOB NOT NULL);
    CREATE INDEX IF NOT EXISTS remembered_by_time ON remembered (time);
    CREATE TABLE IF NOT EXISTS keys (
      key INTEGER NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (key, number)) WITHOUT ROWID;
    """

    def __init__(
        self, connection: sqlite3.Connection, seconds: float = REMEMBERED_SECONDS, items: int = REMEMBERED_ITEMS
    ) -> None:
        self._connection, self._seconds, self._items = connection, seconds, items

    def is_new(self, item: Item, newest: float, *, is_kept: bool) -> bool:
        """Whether an item is new.

        Args:
            item: with its id, text and time.
            newest: the largest time so far, epoch seconds; what is older by `seconds` is forgotten.
            is_kept: whether a new one is remembered. One that does not count must not hide a copy that does.
        """
        normal = normalize(item)
        named, exact = _hash(b"id", item.id.encode()), _hash(b"text", normal.encode())
        last = self._read_last()
        found = self._connection.execute(
            "SELECT 1 FROM keys JOIN remembered USING (number)"
            " WHERE key IN (?, ?) AND time >= ? AND number > ? LIMIT 1",
            (named, exact, newest - self._seconds, last - self._items),
        ).fetchone()
        if found:
            return False
        if not is_kept:
            return True
        keys = np.array(sorted({named, exact}), dtype=np.int64)
        number = self._connection.execute(
            "INSERT INTO remembered (time, text, keys) VALUES (?, ?, ?)",
            (item.time.timestamp(), normal, keys.tobytes()),
        ).lastrowid
        self._connection.executemany("INSERT INTO keys VALUES (?, ?)", [(key, number) for key in keys.tolist()])
        return True

    def forget(self, newest: float) -> None:
        """Delete what is too old or too much to be found again."""
        gone = self._connection.execute(
            "SELECT number, keys FROM remembered WHERE time < ? OR number <= ?",
            (newest - self._seconds, self._read_last() - self._items),
        ).fetchall()
        for number, keys in gone:
            pairs = [(key, number) for key in np.frombuffer(keys, dtype=np.int64).tolist()]
            self._connection.executemany("DELETE FROM keys WHERE key = ? AND number = ?", pairs)
        self._connection.executemany("DELETE FROM remembered WHERE number = ?", [(number,) for number, _ in gone])

    def _read_last(self) -> int:
        row = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'remembered'").fetchone()
        return int(row[0]) if row else 0


def normalize(item: Item) -> str:
    """The text of an item as all its copies have it."""
    text = clean_text(item.text, ["html", "urls"])
    head, tail = _build_patterns(item.source or "")
    text = tail.sub("", head.sub("", text)).strip() or text
    return _UPDATE.sub("", normalize_for_duplicates(text))[:COMPARED_CHARACTERS]


@lru_cache
def _build_patterns(source: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What a wire puts before a text and behind it: its name, set apart. In `Reuters cuts jobs` it is the news."""
    name = f"(?:{_WIRES}|{re.escape(source)})" if source else f"(?:{_WIRES})"
    head = rf"^(?:[(\[]?{name}[)\]]?\s*[-–—:|]+\s+){{1,3}}"  # noqa: RUF001  (dashes are what is looked for)
    tail = rf"(?:(?:\s[-–—|]+\s*|\svia\s|\s?[(\[]){name}[)\]]?\.*){{1,3}}$"  # noqa: RUF001
    return re.compile(head, re.IGNORECASE), re.compile(tail, re.IGNORECASE)


def _hash(kind: bytes, data: bytes) -> int:
    """64 bits, signed as SQLite's integers are."""
    return int.from_bytes(blake2b(data, digest_size=8, person=kind).digest(), "little", signed=True)
