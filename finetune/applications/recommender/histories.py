"""What people had, as they or their files say it, as item numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow

from finetune.data.event_files import to_ids
from finetune.data.files import open_checked, quote_reason
from finetune.data.interactions import NO_CATALOGUE, Catalogue, load_interactions
from finetune.errors import DataError, UsageError
from finetune.evaluation.counting import Histories, Numbers
from finetune.recipe.messages import show, suggest

History: TypeAlias = Sequence[Any]
"""Ids of items, oldest first: text or numbers."""
SHOWN_UNKNOWN = 5


@dataclass(frozen=True)
class Read:
    """Histories of a chunk.

    Args:
        histories: R, without what the catalogue does not have.
        given: (R,) events of each as they came.
        unknown: of each, some of the ids that were skipped.
    """

    histories: Histories
    given: Numbers
    unknown: Sequence[tuple[str, ...]]


def read_histories(given: Sequence[History], catalogue: Catalogue) -> Read:
    """Histories as item numbers; 1, 1.0, "1" and "1.0" are one id, as in events."""
    lengths = np.array([len(history) for history in given], np.int64)
    ids = normalize_ids(list(chain.from_iterable(given)))
    numbers = np.fromiter((catalogue.numbers.get(item, -1) for item in ids), np.int64, len(ids))
    known = numbers >= 0
    ends = np.cumsum(lengths)
    kept = np.concatenate([[0], np.cumsum(known)])
    starts = ends - lengths
    unknown = [
        tuple(dict.fromkeys(ids[place] for place in np.flatnonzero(~known[start:end]) + start))[:SHOWN_UNKNOWN]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return Read(Histories(numbers[known], kept[starts], kept[ends]), lengths, unknown)


def normalize_ids(values: Sequence[Any]) -> list[str]:
    """Ids as events and catalogues have them; "" for what is missing."""
    texts = [_write(value) for value in values]
    present = [text for text in texts if text]
    if not present:
        return texts
    column, _ = to_ids(pyarrow.chunked_array([pyarrow.array(present, pyarrow.string())]), "history")
    ids = iter(column.to_pylist())
    return [next(ids) if text else "" for text in texts]


def _write(value: Any) -> str:
    if value is None or value != value:  # not a number
        return ""
    if isinstance(value, float | np.floating) and value.is_integer():
        value = int(value)
    # Half of a surrogate pair is allowed in JSON and in no catalogue.
    return str(value).strip().encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class People:
    """The people of a file of events.

    Args:
        origin: of the events, for messages.
        histories: id of a person -> ids of what the person had, oldest first.
    """

    origin: str
    histories: Mapping[str, Sequence[str]]

    @classmethod
    def load(cls, reference: str, columns: Mapping[str, str], relative_to: Path | None = None) -> People:
        """Read events.

        Args:
            reference: a card, or a file.
            columns: role -> column, as in a recipe.
            relative_to: the folder of the recipe.

        Raises:
            DataError: they cannot be read.
        """
        loaded = load_interactions(reference, columns, NO_CATALOGUE, relative_to)
        log = loaded.interactions
        edges = np.searchsorted(log.user, np.arange(len(log.users) + 1))
        ids = np.array(log.catalogue.ids, dtype=object)
        parts = zip(log.users, edges[:-1], edges[1:], strict=True)
        return cls(loaded.origin, {user: ids[log.item[start:end]].tolist() for user, start, end in parts})

    def find(self, user: str) -> Sequence[str]:
        """The history of one person.

        Raises:
            UsageError: nobody of that id.
        """
        (name,) = normalize_ids([user])
        if name not in self.histories:
            raise UsageError(
                f"--user: must be one of the {len(self.histories):,} people of {self.origin}, got {user!r}."
                f"{suggest(user, self.histories)}"
            )
        return self.histories[name]


def read_people(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[Any, list[Any]]]:
    """User and history of each line of a JSONL file, one at a time.

    Args:
        path: lines such as {"user": "P1", "history": ["B1", "B2"]}; the user may be left out.
        advance: called with the bytes of each line.

    Raises:
        DataError: the file is missing or empty, or a line is something else.
    """
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: must be people a line and end in .jsonl, got {path.suffix or 'no ending'!r}.")
    with open_checked(path, is_text=True) as copy, copy.open("rb") as file:
        for number, line in enumerate(file, start=1):
            advance(len(line))
            if line.strip():
                yield _read_person(line.removeprefix(b"\xef\xbb\xbf"), f"{path}: line {number}")


def _read_person(line: bytes, where: str) -> tuple[Any, list[Any]]:
    example = 'such as {"user": "P1", "history": ["B1", "B2"]}'
    try:
        person = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: must be a JSON object {example}, got {quote_reason(error)}.") from None
    if not isinstance(person, dict) or not isinstance(person.get("history"), list):
        raise DataError(f"{where}: must be a JSON object with a list `history`, {example}, got {show(person)}.")
    if wrong := [item for item in person["history"] if isinstance(item, list | dict)]:
        raise DataError(f"{where}: history must hold ids, which are text or numbers, got {show(wrong[0])}.")
    return person.get("user"), person["history"]
