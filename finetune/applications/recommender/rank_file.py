"""Lists for the people of a file: `finetune recommend RUN --input people.jsonl --output ranked.parquet`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

from finetune.applications.recommender.histories import read_people
from finetune.applications.recommender.recommender import Recommender, Wish
from finetune.applications.recommender.records import RankedList
from finetune.artifact.score_file import check_writable, show_progress
from finetune.errors import ResourceError, UsageError

FORMATS = (".jsonl", ".parquet")
PEOPLE = 1024
"""Read, ranked and written at once."""
COLUMNS = pyarrow.schema(
    {
        "user": pyarrow.string(),
        "items": pyarrow.list_(pyarrow.string()),
        "scores": pyarrow.list_(pyarrow.float64()),
        "by": pyarrow.list_(pyarrow.string()),
        "why": pyarrow.list_(pyarrow.string()),
        "known": pyarrow.int64(),
        "skipped": pyarrow.int64(),
        "fallback": pyarrow.string(),
    }
)
"""Of a Parquet file: a row for each person."""


def rank_file(load: Callable[[], Recommender], source: Path, output: Path, wish: Wish, *, quiet: bool = False) -> int:
    """Write a list for each line of `source`, in order.

    Args:
        load: gives the recommender, once every line was checked.
        source: JSONL, as `read_people` reads it; read twice.
        output: JSONL with all that `--json` has, or Parquet with `COLUMNS`; appears whole or not at all.
        wish: what every list is asked for.
        quiet: no progress bar.

    Returns:
        The number of people.

    Raises:
        UsageError: an output that is the input, or of an unknown format; a run or wish that cannot be met.
        DataError: a line that is no person.
        ResourceError: a file that cannot be written.
    """
    if output.suffix not in FORMATS:
        raise UsageError(f"{output}: must end in {' or '.join(FORMATS)}, got {output.suffix or 'no ending'!r}.")
    if output.resolve() == source.resolve():
        raise UsageError(f"{output}: must be another file than the input, got the same. Choose another --output.")
    for _ in read_people(source, lambda _bytes: None):
        pass
    check_writable(output)
    recommender = load()
    count = 0
    with show_progress("recommend", source.stat().st_size, quiet) as advance, _open(output) as write:
        people = read_people(source, advance)
        while chunk := list(islice(people, PEOPLE)):
            lists = list(recommender.answer([history for _, history in chunk], wish))
            write([user for user, _ in chunk], lists)
            count += len(chunk)
    return count


class _Write(Protocol):
    def __call__(self, users: Sequence[Any], lists: Sequence[RankedList]) -> None:
        """Append a chunk."""


@contextmanager
def _open(output: Path) -> Iterator[_Write]:
    """What appends to a file that is there only in the end."""
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _open_jsonl(temporary) if output.suffix == ".jsonl" else _open_parquet(temporary) as write:
            yield write
        temporary.replace(output)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ResourceError(f"{output}: must be writable, got {reason}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _open_jsonl(path: Path) -> Iterator[_Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(users: Sequence[Any], lists: Sequence[RankedList]) -> None:
            for user, found in zip(users, lists, strict=True):
                file.write(json.dumps({"user": user} | found.to_json(), ensure_ascii=True, allow_nan=False) + "\n")

        yield write


@contextmanager
def _open_parquet(path: Path) -> Iterator[_Write]:
    with pyarrow.parquet.ParquetWriter(path, COLUMNS) as writer:

        def write(users: Sequence[Any], lists: Sequence[RankedList]) -> None:
            rows = [_build_row(user, found) for user, found in zip(users, lists, strict=True)]
            writer.write_table(pyarrow.Table.from_pylist(rows, COLUMNS))

        yield write


def _build_row(user: Any, found: RankedList) -> dict[str, Any]:
    items = found.items
    return {
        # Half of a surrogate pair is allowed in JSON and in no Parquet file.
        "user": None if user is None else str(user).encode("utf-8", "replace").decode(),
        "items": [item.id for item in items],
        "scores": [item.score for item in items],
        "by": [item.by for item in items],
        "why": [item.why for item in items],
        "known": found.known,
        "skipped": found.skipped,
        "fallback": found.fallback,
    }
