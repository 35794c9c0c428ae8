"""Who did something with which item, and when: events and the catalogue of their items, as arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute as pc

from finetune.data.catalog import card_names, describe_location, load_card
from finetune.data.checks import MAX_ROWS, Finding, Severity
from finetune.data.event_files import (
    check_all_present,
    get_column,
    read_card_events,
    read_card_items,
    to_ids,
    to_numbers,
    to_texts,
)
from finetune.data.files import list_names, read_columns
from finetune.data.sources import find_path, warn_of_namesake
from finetune.data.times import parse_times
from finetune.errors import DataError
from finetune.recipe.card import Card, ItemsSection
from finetune.recipe.messages import count_of, show

ROLES = ("user", "item", "time")
"""What every event has; `weight` is read only where a recipe or a card names its column."""

WEIGHT = "weight"
"""The role of what an event counts."""

NO_CATALOGUE = ItemsSection(file=None, text=[], categorical=[], numeric=[])
"""Of events only people, items and times are read: a run has its catalogue."""

Numbers = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]
Values = tuple[str | float | None, ...]


@dataclass(frozen=True)
class Catalogue:
    """The I items that events name, and those that no event names yet."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    """(I,) the text columns joined by ". "; "" where all are missing."""
    columns: Mapping[str, Values]
    """Declared categorical columns (text) and numeric columns (float) -> (I,) values, None where missing."""

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Id -> number of the item."""
        return {item: number for number, item in enumerate(self.ids)}

    @cached_property
    def numeric(self) -> frozenset[str]:
        """The columns of numbers: those without a text."""
        return frozenset(
            name for name, values in self.columns.items() if not any(isinstance(value, str) for value in values)
        )


@dataclass(frozen=True)
class Interactions:
    """E events of U people with I items, sorted by person, time and order in the file."""

    users: tuple[str, ...]
    """(U,) ids, sorted as text."""
    catalogue: Catalogue
    user: Numbers
    """(E,) numbers of people."""
    item: Numbers
    """(E,) numbers of items."""
    time: Numbers
    """(E,) seconds since 1970 UTC."""
    weight: Weights | None = None
    """(E,) float64 above 0, what each event counts where popularity is counted; None where no column is named."""


@dataclass(frozen=True)
class LoadedInteractions:
    """The events of one data set, before they are split."""

    name: str
    """The card's name, or that of the file."""
    origin: str
    """Where the events came from, for a report."""
    card: Card | None
    columns: Mapping[str, str]
    """Role -> the column of the events that it was read from."""
    items: ItemsSection
    """The columns of the catalogue that were read."""
    fingerprint: str
    """SHA-256 over events and catalogue: the same give the same value on any machine."""
    interactions: Interactions
    findings: tuple[Finding, ...]
    """What was left out, read in more than one way, or missing."""


def load_interactions(
    reference: str,
    columns: Mapping[str, str],
    items: ItemsSection | None = None,
    relative_to: Path | None = None,
) -> LoadedInteractions:
    """Load the events that a recipe's `data` names, and their catalogue.

    Args:
        reference: the name of a card, or a file of events: CSV, TSV, JSONL or Parquet.
        columns: role (`user`, `item`, `time`, `weight`) -> column; the card's own roles fill in what is missing, then
            the role's own name, but of `weight`, which events need not have.
        items: the catalogue; its keys go before those of the card. Its file lies in the card's folder, or beside the
            events. Without a file, an item has the texts and values of its first event: later ones, a most frequent
            text or a mean price would tell of times that a split by time keeps from training.
        relative_to: the folder of the recipe.

    Raises:
        DataError: nothing of that name, a file that cannot be trusted, a missing column, an event without person, item
            or time, a time that cannot be read, a weight that is no number above 0, or an item twice in the catalogue.
    """
    card = load_card(reference) if reference in card_names() else None
    section = settle_items(reference, items)
    named = (card.roles if card else {}) | dict(columns)
    roles = {role: named.get(role, role) for role in ROLES}
    if WEIGHT in named:
        roles[WEIGHT] = named[WEIGHT]
    if card is not None:
        name, origin, where = card.name, describe_location(card), card.name
        table, findings = read_card_events(card)
        catalogue = read_card_items(card, section.file) if section.file else None
    else:
        path = _find_file(reference, relative_to)
        findings = warn_of_namesake(reference, path, relative_to)
        name, origin, where = path.name.partition(".")[0], reference, str(path)
        table = read_columns(path)
        catalogue = read_columns(path.parent / section.file) if section.file else None
    read = _Reading(where, roles, section, findings)
    interactions = read.build(table, catalogue)
    return LoadedInteractions(
        name, origin, card, roles, section, _compute_fingerprint(interactions), interactions, tuple(read.findings)
    )


def settle_items(reference: str, items: ItemsSection | None) -> ItemsSection:
    """How a recipe's catalogue is read: its own keys, then those of the card that its `data` names."""
    card = load_card(reference) if reference in card_names() else None
    given = items.model_dump(exclude_unset=True) if items else {}
    return ItemsSection.model_validate((card.items.model_dump() if card and card.items else {}) | given)


def load_catalogue(path: Path, items: ItemsSection) -> Catalogue:
    """A catalogue by itself.

    Args:
        path: CSV, TSV, JSONL or Parquet.
        items: its columns; `file` counts for nothing.

    Raises:
        DataError: a file that cannot be trusted, a missing column, or an item twice.
    """
    return _Reading(str(path), {}, items, []).read_catalogue(read_columns(path))


def _find_file(reference: str, relative_to: Path | None) -> Path:
    path = None if reference.startswith("hub:") else find_path(reference, relative_to)
    if path is None or path.is_dir():
        got = f"{reference!r}" + ("" if path is None else ", a folder")
        raise DataError(f"data: must be a card or a file of events, got {got}. Name the file.")
    return path


@dataclass
class _Reading:
    """One data set on its way from tables to arrays; gathers what is found."""

    where: str
    columns: Mapping[str, str]
    items: ItemsSection
    findings: list[Finding]

    def build(self, table: pyarrow.Table, catalogue: pyarrow.Table | None) -> Interactions:
        """Events of `table` with the items of `catalogue`, or of the events themselves."""
        user_ids, _ = self._read_ids(table, "user")
        item_ids, kind = self._read_ids(table, "item")
        users, user = _number(user_ids)
        names, item = _number(item_ids)
        time = self._read_times(table)
        weight = self._read_weights(table) if WEIGHT in self.columns else None
        order = np.lexsort((time, user))
        if catalogue is None:
            first = np.lexsort((time, item))
            rows = first[np.searchsorted(item[first], np.arange(len(names)))]
            known = self._describe(names, table.take(pyarrow.array(rows)), "")
        else:
            known = self.read_catalogue(catalogue, kind)
            known, item = self._join(known, names, item)
        kept = self._drop_repeated(order, user, item, time, weight)
        weight = None if weight is None else weight[kept]
        return Interactions(tuple(users), known, user[kept], item[kept], time[kept], weight)

    def _column(self, table: pyarrow.Table, role: str) -> tuple[pyarrow.ChunkedArray, str]:
        column = self.columns[role]
        array = get_column(table, column, self.where, f"columns.{role}")
        return array, f"{self.where}: column {column!r}"

    def _read_ids(self, table: pyarrow.Table, role: str) -> tuple[pyarrow.ChunkedArray, str]:
        return to_ids(*self._column(table, role))

    def _read_times(self, table: pyarrow.Table) -> Numbers:
        array, where = self._column(table, "time")
        is_text = pyarrow.types.is_string(array.type)
        check_all_present(pc.equal(pc.utf8_trim_whitespace(array), "") if is_text else array.is_null(), where, "a time")
        times, forms = parse_times(array, where)
        if len(forms) > 1:
            found = ", ".join(f"{count:,} {form}" for form, count in forms.items())
            message = f"times come in {len(forms)} forms, {found}; times without a zone are read as UTC."
            self._find("mixed_times", "warning", len(times), message)
        return times

    def _read_weights(self, table: pyarrow.Table) -> Weights:
        array, where = self._column(table, WEIGHT)
        weights = to_numbers(array, where)
        refused = np.flatnonzero(~(weights > 0))
        if len(refused):
            row, count = int(refused[0]), count_of(len(refused), "row")
            fix = f"Correct or remove these rows, or leave columns.{WEIGHT} out."
            got = show(array[row].as_py() or None) if np.isnan(weights[row]) else f"{weights[row]:g}"
            raise DataError(f"{where}: row {row + 1}: must be a weight above 0, got {got} (in {count}). {fix}")
        return weights

    def read_catalogue(self, table: pyarrow.Table, kind_in_events: str | None = None) -> Catalogue:
        """The items of `table`, whose ids events hold as numbers or text."""
        where = f"{self.where}: items: column {self.items.id!r}"
        column, kind = to_ids(get_column(table, self.items.id, f"{self.where}: items", "items.id"), where)
        ids = column.to_pylist()
        rows: dict[str, int] = {}
        for row, item in enumerate(ids, start=1):
            if rows.setdefault(item, row) != row:
                must = f"must name each item once, got {item!r} in rows {rows[item]} and {row}"
                raise DataError(f"{where}: {must}. Remove one of them.")
        if kind_in_events not in (None, kind):
            message = f"ids of items are {kind_in_events} in the events and {kind} in the catalogue; joined as text."
            self._find("id_types", "note", len(ids), message)
        return self._describe(ids, table, ": items")

    def _describe(self, ids: list[str], table: pyarrow.Table, place: str) -> Catalogue:
        """The items `ids`, one per row of `table`."""
        where = f"{self.where}{place}"

        def read(key: str, column: str) -> tuple[pyarrow.ChunkedArray, str]:
            return get_column(table, column, where, f"items.{key}"), f"{where}: column {column!r}"

        texts = [to_texts(*read("text", column)) for column in self.items.text]
        joined = [". ".join(part for part in parts if part) for parts in zip(*texts, strict=True)] or [""] * len(ids)
        columns: dict[str, Values] = {}
        for column in self.items.categorical:
            columns[column] = tuple(text or None for text in to_texts(*read("categorical", column)))
        for column in self.items.numeric:
            numbers = to_numbers(*read("numeric", column))
            columns[column] = tuple(None if np.isnan(number) else float(number) for number in numbers)
        empty = [item for item, text in zip(ids, joined, strict=True) if not text]
        if self.items.text and empty:
            message = f"{len(empty):,} of {len(ids):,} items have no text in {list_names(self.items.text)}."
            self._find("item_without_text", "warning", len(empty), message, empty)
        return Catalogue(tuple(ids), tuple(joined), columns)

    def _join(self, catalogue: Catalogue, names: list[str], item: Numbers) -> tuple[Catalogue, Numbers]:
        """The catalogue, with items that only events name at its end, and the numbers of the events' items in it."""
        unknown = [name for name in names if name not in catalogue.numbers]
        if len(unknown) == len(names):
            got = f"only others, such as {unknown[0]!r} where the catalogue has {catalogue.ids[0]!r}"
            raise DataError(f"{self.where}: events must name items of the catalogue, got {got}. Set items.id.")
        if unknown:
            size = len(unknown)
            message = f"{size:,} of {len(names):,} items of the events are not in the catalogue: they have no text."
            self._find("unknown_item", "warning", size, message, unknown)
            catalogue = Catalogue(
                catalogue.ids + tuple(unknown),
                catalogue.texts + ("",) * size,
                {column: values + (None,) * size for column, values in catalogue.columns.items()},
            )
        return catalogue, np.array([catalogue.numbers[name] for name in names])[item]

    def _drop_repeated(
        self, order: Numbers, user: Numbers, item: Numbers, time: Numbers, weight: Weights | None
    ) -> Numbers:
        """`order` without events that repeat person, item and time of one before; the first stays, or the heaviest."""
        first = () if weight is None else (-weight[order],)
        grouped = order[np.lexsort((*first, item[order], time[order], user[order]))]
        same = np.ones(len(order) - 1, bool)
        for values in (user, item, time):
            same &= values[grouped[1:]] == values[grouped[:-1]]
        repeated = grouped[1:][same]
        if len(repeated):
            message = f"{len(repeated):,} of {len(order):,} events repeat person, item and time of one before: dropped."
            self._find("repeated_event", "warning", len(repeated), message)
        keep = np.ones(len(order), bool)
        keep[repeated] = False
        return order[keep[order]]

    def _find(self, kind: str, severity: Severity, count: int, message: str, rows: Sequence[str] = ()) -> None:
        self.findings.append(Finding(kind, severity, "all", count, message, tuple(rows[:MAX_ROWS])))


def _number(ids: pyarrow.ChunkedArray) -> tuple[list[str], Numbers]:
    """The different ids, sorted as text, and the number of each row's id among them."""
    encoded = ids.combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    numbers = np.empty(len(names), np.int64)
    numbers[order] = np.arange(len(names))
    return [names[index] for index in order], numbers[encoded.indices.to_numpy()]


def _compute_fingerprint(interactions: Interactions) -> str:
    catalogue = interactions.catalogue
    columns = sorted(catalogue.columns.items())
    digest = hashlib.sha256(json.dumps([interactions.users, catalogue.ids, catalogue.texts, columns]).encode())
    for values in (interactions.user, interactions.item, interactions.time):
        digest.update(values.astype("<i8").tobytes())
    # As ones where there are none: so the data of runs that were made before there were weights are still theirs.
    weight = interactions.weight
    counted = np.ones(len(interactions.user), "<f4") if weight is None else weight.astype("<f8")
    digest.update(counted.tobytes())
    return digest.hexdigest()
