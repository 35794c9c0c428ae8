"""Where items come from: files, a followed file, standard input. A source yields records, and None while it has none.

A record carries the position behind it. The position is stored in the transaction that takes in the record, so that a
source which is opened again with it goes on with exactly the next one.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

from finetune.applications.monitor.items import MAX_LINE_BYTES, Note, is_object
from finetune.errors import ResourceError, UsageError
from finetune.recipe.files import build_disk_error

BLOCK_BYTES = 2**16
HEAD_BYTES = 256  # of a file, by which it is known again
RECORDS_PER_TURN = 100
BLOCKS_WAITING = 16

_ROTATED = re.compile(r"\.\d[\d._:TZ-]*")
"""How the name of a file goes on that a rotation has put aside: `.1`, `.2025-10-06`."""


@dataclass(frozen=True, slots=True)
class Record:
    """What may be an item.

    Args:
        where: the place, for people.
        content: a line of JSON or what it would hold; None where only the position moves.
        origin: names the source in the store; None where the source cannot go on from a position.
        position: behind this record, as a JSON value.
        note: what is to be counted beside it.
    """

    where: str
    content: bytes | Mapping[str, Any] | None
    origin: str | None = None
    position: Any = None
    note: Note | None = None


Source = Iterable[Record | None]
Read = Callable[[int], bytes]


class _Lines:
    """Bytes -> lines; of a line that is too long only as much is held as shows that it is."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._dropped = 0

    def feed(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """Lines that are complete, without their end, and how many bytes each took in its file."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._hold(data[start:end])
            yield self._take(1)
            start = end + 1
        self._hold(data[start:])

    def finish(self) -> Iterator[tuple[bytes, int]]:
        """What stands behind the last end of a line."""
        if self._rest:
            yield self._take(0)

    def drop(self) -> None:
        """Forget a line that will never be complete."""
        self._rest.clear()
        self._dropped = 0

    def _hold(self, data: bytes) -> None:
        kept = data[: max(0, MAX_LINE_BYTES + 1 - len(self._rest))]
        self._rest += kept
        self._dropped += len(data) - len(kept)

    def _take(self, end: int) -> tuple[bytes, int]:
        line, size = bytes(self._rest), len(self._rest) + self._dropped + end
        self.drop()
        return line, size


class FileSource:
    """The lines of a file, to its end or, followed, as it grows.

    A followed file may be replaced (a new file under its name: the old one is read to its end first) or cut short (it
    is read from its beginning). A position belongs to a file that begins with the same bytes; where another one stands
    under the name by now, the former is looked for beside it, as `stream.jsonl.1`, and those that were put aside after
    it are read as well. A last line without its end counts where it is a JSON object: else it is still being written,
    and left for the next time.

    Args:
        path: a file of lines.
        is_followed: whether to wait for more.

    Raises:
        UsageError: there is no such file, and none is waited for.
    """

    def __init__(self, path: Path, *, is_followed: bool = False) -> None:
        self.path, self.is_followed = path, is_followed
        self.origin = f"file {path.resolve()}"
        self._position: Mapping[str, Any] | None = None
        if path.is_dir():
            raise UsageError(f"{path}: must be a file of JSON lines, got a folder. Name a file in it.")
        if not (is_followed or path.exists()):
            raise UsageError(
                f"{path}: must be a file of JSON lines, got no file. Check the name, or add --follow to wait for it."
            )

    def go_on(self, position: Mapping[str, Any] | None) -> None:
        """Begin where a former source stopped."""
        self._position = position

    def __iter__(self) -> Iterator[Record | None]:
        try:
            if self._position and self._position["offset"]:
                yield from self._go_on(self._position)
            else:
                yield from self._read(self.path, 0, 0)
            while self.is_followed:
                yield from self._read(self.path, 0, 0)
        except OSError as error:
            raise build_disk_error(self.path, error, needed_bytes=0) from error

    def _go_on(self, position: Mapping[str, Any]) -> Iterator[Record | None]:
        beside = [path for path in self.path.parent.glob(f"{glob.escape(self.path.name)}.*") if path.is_file()]
        beside.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
        known = [path for path in (self.path, *beside) if path.is_file() and _has_head(path, position)]
        if not known:
            start = {"offset": 0, "line": 0, "head": _hash(b"")}
            yield Record(str(self.path), None, self.origin, start, "file gone")
            yield from self._read(self.path, 0, 0)
            return
        yield from self._read(known[0], position["offset"], position["line"])
        if known[0] == self.path:
            return
        for path in beside[beside.index(known[0]) + 1 :]:
            if _ROTATED.fullmatch(path.name.removeprefix(self.path.name)):
                yield from self._read(path, 0, 0)
        yield from self._read(self.path, 0, 0)

    def _read(self, path: Path, offset: int, line: int) -> Iterator[Record | None]:
        """Read one file; followed, until another one stands under the name."""
        while not path.exists():
            if not self.is_followed:
                return
            yield None
        with path.open("rb", buffering=0) as file:
            lines, is_last = _Lines(), False
            head = file.read(min(HEAD_BYTES, offset))
            file.seek(offset)
            while True:
                data = file.read(BLOCK_BYTES)
                head += data[: HEAD_BYTES - len(head)]
                for content, size in lines.feed(data):
                    offset, line = offset + size, line + 1
                    yield self._build(head, content, offset, line)
                if data:
                    is_last = False
                elif is_last:  # twice nothing: what wrote the old file has had its last word
                    break
                elif not self.is_followed or path != self.path or self._is_replaced(file):
                    is_last = True
                elif os.fstat(file.fileno()).st_size < file.tell():
                    lines.drop()
                    file.seek(0)
                    head, offset, line = b"", 0, 0
                else:
                    yield None
            is_written = self.is_followed or path != self.path  # to its end: another one has taken its place
            for content, size in lines.finish():
                if is_written or is_object(content):
                    yield self._build(head, content, offset + size, line + 1)

    def _build(self, head: bytes, content: bytes, offset: int, line: int) -> Record:
        position = {"offset": offset, "line": line, "head": _hash(head[:offset])}
        return Record(f"{self.path}: line {line:,}", content, self.origin, position)

    def _is_replaced(self, file: FileIO) -> bool:
        try:
            now, ours = self.path.stat(), os.fstat(file.fileno())
        except FileNotFoundError:
            return False  # moved away, and nothing new there yet
        return (now.st_ino, now.st_dev) != (ours.st_ino, ours.st_dev)


def _has_head(path: Path, position: Mapping[str, Any]) -> bool:
    """Whether a position was taken in this file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(min(HEAD_BYTES, position["offset"]))
    return size >= position["offset"] and _hash(head) == str(position["head"])


def _hash(head: bytes) -> str:
    return hashlib.sha256(head).hexdigest()


def read_stream(read: Read, name: str = "-") -> Iterator[Record | None]:
    """The lines of a pipe as they come. A pipe has no position: what a killed monitor had not taken in is lost.

    Args:
        read: up to so many bytes, as soon as there are any; b"" at the end.
        name: its path; - is standard input.
    """
    name = "standard input" if name == "-" else name
    blocks: Queue[bytes | OSError] = Queue(BLOCKS_WAITING)
    is_closed = threading.Event()

    def fill() -> None:
        try:
            data: bytes | OSError = b"-"
            while data and not is_closed.is_set():
                data = read(BLOCK_BYTES)
                _put(blocks, data, is_closed)
        except OSError as error:
            _put(blocks, error, is_closed)

    threading.Thread(target=fill, daemon=True).start()  # a read cannot be interrupted
    lines, number = _Lines(), 0
    try:
        while True:
            try:
                data = blocks.get_nowait()
            except Empty:
                yield None
                continue
            if isinstance(data, OSError):
                raise ResourceError(f"{name}: must be readable, got {data.strerror}.") from data
            for content, _ in lines.feed(data) if data else lines.finish():
                number += 1
                yield Record(f"{name}: line {number:,}", content)
            if not data:
                return
    finally:
        is_closed.set()


def _put(blocks: Queue[bytes | OSError], data: bytes | OSError, is_closed: threading.Event) -> None:
    while not is_closed.is_set():
        try:
            blocks.put(data, timeout=1.0)
        except Full:
            continue
        return


def read_in_turn(sources: Sequence[Source]) -> Iterator[Record | None]:
    """Several sources as one: each has its turn, until it has nothing or enough; None when none has anything."""
    running = [iter(source) for source in sources]
    while running:
        is_idle = True
        for source in list(running):
            for _ in range(RECORDS_PER_TURN):
                try:
                    record = next(source)
                except StopIteration:
                    running.remove(source)
                    break
                if record is None:
                    break
                is_idle = False
                yield record
        if is_idle and running:
            yield None
