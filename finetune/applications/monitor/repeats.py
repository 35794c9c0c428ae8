"""Items that come again: by their id, or as a copy of a text that came before.

A copy may add words, as wires do (`UPDATE 1-...`, `... - Newswire`), but none of those that make it other news:
numbers, tickers, negations. Where each text has words of its own, one may say `rises` and the other `falls`: those are
two.
"""

from __future__ import annotations

import re
import sqlite3
from hashlib import blake2b

import numpy as np

from finetune.applications.monitor.records import Item
from finetune.data.cleaning import clean_text, normalize_for_duplicates
from finetune.data.duplicates import SHINGLE_CHARACTERS, SIMILARITY, compute_similarity

REMEMBERED_SECONDS = 24 * 3600
"""How far back a text is looked for, by the items' own times."""
REMEMBERED_ITEMS = 100_000
COMPARED_CHARACTERS = 1_000
BANDS, ROWS = 8, 4
"""A pair of Jaccard similarity s is compared with probability 1 - (1 - s^4)^8: .985 at .8, .9998 at .9."""
CANDIDATES_PER_BAND = 5  # the latest ones: texts made from one template would all be candidates of each other

_UPDATE = re.compile(r"^(?:(?:update|wrapup|corrected|refile|rpt|breaking|exclusive)(?: \d+)? )+(?=\w)")
_NEGATIONS = frozenset({"not", "no", "never", "without", "t", "denies", "denied"})  # "isn't" is normalised to "isn t"

_draw = np.random.default_rng(0)
_SHINGLE_FACTORS = _draw.integers(2**63, size=SHINGLE_CHARACTERS, dtype=np.uint64) * 2 + 1
_HASH_FACTORS = _draw.integers(2**63, size=BANDS * ROWS, dtype=np.uint64) * 2 + 1
_HASH_OFFSETS = _draw.integers(2**63, size=BANDS * ROWS, dtype=np.uint64)


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
        normal = _normalize(item.text)
        named, exact = _hash(b"id", item.id.encode()), _hash(b"text", normal.encode())
        bands = _compute_bands(normal)
        last = self._read_last()
        found = self._connection.execute(
            "SELECT 1 FROM keys JOIN remembered USING (number)"
            " WHERE key IN (?, ?) AND time >= ? AND number > ? LIMIT 1",
            (named, exact, newest - self._seconds, last - self._items),
        ).fetchone()
        if found or any(is_copy(normal, other) for other in self._find_candidates(bands, newest, last)):
            return False
        if not is_kept:
            return True
        keys = np.array(sorted({named, exact, *bands}), dtype=np.int64)
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

    def _find_candidates(self, bands: list[int], newest: float, last: int) -> list[str]:
        numbers: set[int] = set()
        for band in bands:
            rows = self._connection.execute(
                "SELECT number FROM keys WHERE key = ? AND number > ? ORDER BY number DESC LIMIT ?",
                (band, last - self._items, CANDIDATES_PER_BAND),
            )
            numbers.update(number for (number,) in rows)
        found = [
            self._connection.execute("SELECT time, text FROM remembered WHERE number = ?", (number,)).fetchone()
            for number in sorted(numbers)
        ]
        return [text for time, text in found if time >= newest - self._seconds]


def is_copy(first: str, second: str) -> bool:
    """Whether one of two normalised texts is the other one, perhaps with words added that change nothing."""
    if first == second:
        return True
    one, two = set(first.split()), set(second.split())
    added = one ^ two
    if not (one <= two or two <= one) or any(_tells(word) for word in added):
        return False
    return compute_similarity(f" {first} ", f" {second} ") >= SIMILARITY


def _tells(word: str) -> bool:
    return word in _NEGATIONS or "$" in word or any(character.isdigit() for character in word)


def _normalize(text: str) -> str:
    normal = normalize_for_duplicates(clean_text(text, ["html", "urls"]))
    return _UPDATE.sub("", normal)[:COMPARED_CHARACTERS]


def _compute_bands(normal: str) -> list[int]:
    """Keys of which two similar texts share at least one, by MinHash (Broder 1997) with locality-sensitive bands."""
    codes = np.frombuffer(f" {normal} ".encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    count = len(codes) - SHINGLE_CHARACTERS + 1
    if count < 1:
        return []
    shingles = np.zeros(count, dtype=np.uint64)
    for offset, factor in enumerate(_SHINGLE_FACTORS):
        shingles += codes[offset : offset + count] * factor  # modulo 2**64
    shingles ^= shingles >> np.uint64(31)  # its low bits mix badly
    hashes = (shingles[:, None] * _HASH_FACTORS + _HASH_OFFSETS) >> np.uint64(32)  # (count, BANDS * ROWS)
    lowest = hashes.min(axis=0).reshape(BANDS, ROWS)
    return [_hash(bytes([band]), row.tobytes()) for band, row in enumerate(lowest)]


def _hash(kind: bytes, data: bytes) -> int:
    """64 bits, signed as SQLite's integers are."""
    return int.from_bytes(blake2b(data, digest_size=8, person=kind).digest(), "little", signed=True)
