"""What a recipe calls `data` -> rows: a card, a file, a folder of splits, or a data set on the Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.packaged_modules.csv.csv import CsvConfig

from finetune.data.card_files import read_card_files
from finetune.data.catalog import (
    DATA_VARIABLE,
    card_names,
    describe_location,
    find_card_file,
    find_card_folder,
    load_card,
)
from finetune.data.checks import Finding
from finetune.data.files import (
    Record,
    data_suffix,
    describe_columns,
    guess_delimiter,
    list_places,
    read_table,
    to_records,
)
from finetune.data.knowledge import load_card_knowledge
from finetune.data.rows import SPLITS, Row, to_text
from finetune.errors import ColumnError, DataError
from finetune.recipe.card import Card, HubSource
from finetune.recipe.messages import count_of, suggest

ENTRY_COLUMNS = ("title", "passage")
"""Columns that rows have of the entries which they name, where a recipe reads them."""

_ALIASES = {name: name for name in SPLITS} | {"valid": "validation", "val": "validation", "dev": "validation"}
_HUB_REFERENCE = re.compile(r"hub:(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?@(?P<revision>[\w./-]+)")


@dataclass
class LoadedRows:
    """The rows of one data set, before they are split."""

    name: str
    """The card's name, or that of the file, the folder or the repository."""
    rows: list[Row]
    card: Card | None
    columns: dict[str, str]
    """Role -> the column of the data that it was read from."""
    origin: str
    """Where the rows came from, for a report."""
    fingerprint: str
    """SHA-256 over ids and values: the same rows give the same value on any machine."""
    findings: tuple[Finding, ...] = ()
    """What the card says that the files do not keep, such as a number of rows; another file of the same name."""


@dataclass
class _Part:
    """The records of one file, or of one split on the Hub."""

    split: str | None
    prefix: str
    """What the ids of its rows begin with."""
    where: str
    """Names it in messages."""
    records: list[Record]


def load_rows(
    reference: str,
    columns: Mapping[str, str],
    *,
    roles: Sequence[str] = ("text", "label"),
    optional: Sequence[str] = (),
    relative_to: Path | None = None,
) -> LoadedRows:
    """Load the rows that a recipe's `data` names.

    Args:
        reference: the name of a card; a file with one of the endings of `files.SUFFIXES`; a folder that holds train.*,
            validation.* and test.*; or `hub:org/name@revision`, with
            `:config` behind the name where there are several. A relative path is tried against `relative_to`, then
            against the working folder.
        columns: role -> column; the card's own roles fill in what is missing, then the role's own name.
        roles: the roles that every row must have, such as `text` and `target` of a translation.
        optional: roles that are read only where `columns` or the card names their column.
        relative_to: the folder of the recipe.

    Raises:
        DataError: nothing of that name, a file that cannot be trusted, a missing column, or a text that is too long.
    """
    card = load_card(reference) if reference in card_names() else None
    findings: list[Finding] = []
    if card is not None:
        name, origin = card.name, describe_location(card)
        parts = _load_card_parts(card)
        findings = _compare_with_card(card, parts)
    elif reference.startswith("hub:"):
        name, origin, parts = _load_hub_reference(reference)
    else:
        path = find_path(reference, relative_to)
        name, origin = (path.name if path.is_dir() else _stem(path)), reference
        parts = _load_folder(path) if path.is_dir() else [_Part(None, _stem(path), str(path), read_table(path))]
        findings = warn_of_namesake(reference, path, relative_to)
    named = (card.roles if card else {}) | dict(columns)
    if card is not None and card.knowledge is not None and set(columns.values()) & set(ENTRY_COLUMNS):
        _add_entry_columns(parts, card, named.get("entry", "entry"))
    chosen = {role: named.get(role) or role for role in roles} | {
        role: named[role] for role in optional if role in named
    }
    rows = [row for number, part in enumerate(parts) for row in _build_rows(part, chosen, _count_before(parts, number))]
    if blank := sum(len(part.records) for part in parts) - len(rows):
        message = f"{count_of(blank, 'row')} with nothing in any column, as spreadsheets leave behind: left out."
        findings.append(Finding("blank_rows", "note", "all", blank, message))
    return LoadedRows(name, rows, card, chosen, origin, _compute_fingerprint(rows), tuple(findings))


def load_texts(path: Path, *columns: str) -> tuple[list[Record], list[str]]:
    """The records of a file as they are, and the text of each; "" where it is missing.

    Args:
        path: of a table.
        columns: names of the text column; the first that is there is taken.

    Raises:
        DataError: a file that cannot be trusted, no such column, or a text that is too long.
    """
    records = read_table(path)
    column = next((name for name in columns if name in records[0]), columns[0])
    if column not in records[0]:
        there = describe_columns(records[0])
        name_it = f"{suggest(column, records[0])} Name the text column with --column."
        fix = advise_on_form(str(path), records) or name_it.lstrip()
        raise DataError(f"{path}: column {column!r} must exist, got {there}. {fix}")
    where = (f"{path}: row {number}: column {column!r}" for number in range(1, len(records) + 1))
    return records, [to_text(record[column], place) for record, place in zip(records, where, strict=True)]


def _add_entry_columns(parts: Sequence[_Part], card: Card, column: str) -> None:
    """Give records of a card that lack them the titles and passages of the entries that they name, a line each."""
    entries = {entry.id: entry for entry in load_card_knowledge(card)}
    for part in parts:
        for number, record in enumerate(part.records, start=1):
            names = to_text(record.get(column), part.where).split()
            if unknown := [name for name in names if name not in entries]:
                raise DataError(
                    f"{part.where}: row {number}: {column} must name entries of {card.knowledge}, got {unknown[0]!r}."
                )
            texts = ["\n".join(getattr(entries[name], key) for name in names) for key in ENTRY_COLUMNS]
            part.records[number - 1] = dict(zip(ENTRY_COLUMNS, texts, strict=True)) | record


# Paths


def find_path(reference: str, relative_to: Path | None) -> Path:
    """The file or folder that a recipe's `data` names, when it names no card.

    Raises:
        DataError: nothing lies there.
    """
    tried = list_places(reference, relative_to)
    for candidate in tried:
        if candidate.exists():
            return candidate
    names = card_names()
    places = " nor ".join(dict.fromkeys(str(candidate) for candidate in tried))
    raise DataError(
        f"data: must be a card, a file, a folder or hub:org/name@revision, got {reference!r}: no card has this name and"
        f" nothing lies at {places}.{suggest(reference, names)} Cards: {', '.join(names) or 'none'}."
    )


def warn_of_namesake(reference: str, path: Path, relative_to: Path | None) -> list[Finding]:
    """A warning where a recipe's relative path leads to another file from the working folder too."""
    others = [other for other in list_places(reference, relative_to) if other.exists() and not path.samefile(other)]
    message = f"data: {reference} is read from the recipe's folder; the working folder has another one."
    return [Finding("namesake", "warning", "all", 1, message)] if others else []


def _stem(path: Path) -> str:
    return path.name[: -len(data_suffix(path))]


def _load_folder(folder: Path) -> list[_Part]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = _ALIASES.get(path.name.partition(".")[0].lower())
        if split is None or not path.is_file():
            continue
        data_suffix(path)  # raises: a split that cannot be read is not to be left out unseen
        if split in found:
            raise DataError(f"{folder}: must hold one file for {split}, got {found[split].name} and {path.name}.")
        found[split] = path
    if not found:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise DataError(f"{folder}: must hold train.*, validation.* and test.*, got {names}. Name a file instead.")
    return [_Part(split, split, str(found[split]), read_table(found[split])) for split in SPLITS if split in found]


# Cards


def _load_card_parts(card: Card) -> list[_Part]:
    folder = find_card_folder(card)
    if folder is None:
        return _load_card_from_hub(card)
    parts = []
    for split, names in card.list_files():
        files = [name.partition("#")[0] for name in names]
        paths = [find_card_file(card, folder, file) for file in files]
        prefix = Path(files[0]).name.partition(".")[0] if split == "all" else split
        records = read_card_files(card, paths, names[0].partition("#")[2])
        parts.append(_Part(None if split == "all" else split, prefix, f"{card.name}: {' + '.join(names)}", records))
    return parts


def _load_card_from_hub(card: Card) -> list[_Part]:
    fix = f"Set {DATA_VARIABLE} to a folder that holds {card.local}/ or connect to the Hub."
    if card.hub is None:
        raise DataError(f"{card.name}: must lie in a folder, got none and no copy on the Hub. {fix}")
    loaded = _load_from_hub(card.hub, card.name, fix)
    splits = cast("dict[str, str]", card.hub.splits or {})
    if not splits:
        return _name_splits(loaded, card.name)
    if missing := [theirs for theirs in splits.values() if theirs not in loaded]:
        raise DataError(f"{card.name}: the Hub must hold the splits {', '.join(missing)}, got {', '.join(loaded)}.")
    return _name_splits({ours: loaded[theirs] for ours, theirs in splits.items()}, card.name)


def _compare_with_card(card: Card, parts: Sequence[_Part]) -> list[Finding]:
    findings = []
    for key, expected in card.rows.items():
        count = sum(len(part.records) for part in parts if key == (part.split or "all"))
        if count != expected:
            message = f"{key}: the card says {expected:,} rows, got {count:,}."
            findings.append(Finding("row_count", "note", "all", 1, message))
    return findings


# The Hub


def _load_hub_reference(reference: str) -> tuple[str, str, list[_Part]]:
    match = _HUB_REFERENCE.fullmatch(reference)
    if match is None:
        must = "hub:org/name@revision, with a commit or a tag so that the rows stay the same"
        must += ", or hub:org/name:config@revision"
        raise DataError(f"data: must be {must}, got {reference!r}.")
    name = match["id"]
    source = HubSource.model_construct(id=name, config=match["config"], revision=match["revision"])
    fix = "Connect to the Hub, or check name and revision; of several configurations name one: hub:org/name:config@rev."
    return name.rpartition("/")[2], f"Hub {reference[4:]}", _name_splits(_load_from_hub(source, name, fix), name)


def _load_from_hub(source: HubSource, name: str, fix: str) -> dict[str, list[Record]]:
    """Hub's split -> records, with our names for the columns."""
    path = f"hf://datasets/{source.id}"  # the bare name would also mean a folder that is called so
    options = {"name": source.config, "revision": source.revision, "data_files": source.files}
    try:
        loaded = datasets.load_dataset(path, **options, **_choose_types(path, options))
    except Exception as error:  # offline, unknown, private and damaged each have several types, from several libraries
        reason = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".") or type(error).__name__
        raise DataError(
            f"{name}: must come from a folder or the Hub, got no folder, and {source.id} at {source.revision} failed"
            f" with {type(error).__name__} ({reason}). {fix}"
        ) from error
    theirs = {hub: ours for ours, hub in (source.columns or {}).items()}
    return {
        split: [{theirs.get(column, column): value for column, value in record.items()} for record in to_records(part)]
        for split, part in loaded.items()
    }


def _choose_types(path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """As in local files, fields of CSV are text as written: no number for "01", nothing missing for "NA"."""
    builder = datasets.load_dataset_builder(path, **options)
    if builder.info.features is not None or not isinstance(builder.config, CsvConfig):
        return {}
    first = next(iter(next(iter(builder.as_streaming_dataset().values()))))
    features = datasets.Features({column: datasets.Value("string") for column in first})
    return {"features": features, "keep_default_na": False, "na_filter": False}


def _name_splits(loaded: Mapping[str, list[Record]], name: str) -> list[_Part]:
    if list(loaded) == ["all"]:
        return [_Part(None, "all", name, loaded["all"])]
    parts = {_ALIASES[split.lower()]: records for split, records in loaded.items() if split.lower() in _ALIASES}
    if not parts:
        raise DataError(f"{name}: must have a split named train, validation or test, got {', '.join(loaded)}.")
    return [_Part(split, split, f"{name}: {split}", parts[split]) for split in SPLITS if split in parts]


# Rows


def _count_before(parts: Sequence[_Part], number: int) -> int:
    """Rows in earlier parts whose ids begin alike, so that ids go on where those end."""
    return sum(len(part.records) for part in parts[:number] if part.prefix == parts[number].prefix)


def _build_rows(part: _Part, columns: Mapping[str, str], offset: int) -> list[Row]:
    if not part.records:
        raise DataError(f"{part.where}: must hold rows, is empty.")
    for role, column in columns.items():
        if column not in part.records[0]:
            raise _missing_column(part, role, column, columns)
    used = set(columns.values())
    rows = []
    for number, record in enumerate(part.records, start=1):
        if all(value is None or (isinstance(value, str) and not value.strip()) for value in record.values()):
            continue
        values = {name: value for name, value in record.items() if name not in used}
        for role, column in columns.items():
            where = f"{part.where}: row {number}: column {column!r}"
            if role == "label" and isinstance(record[column], list):
                raise DataError(
                    f"{where}: must hold one label, got a list of {len(record[column])}: several labels a text are not"
                    " offered. Keep the label that matters most, or make a column of yes and no for each label and a"
                    " task of its own for each column, all in one recipe with split: {by: group, column: <text"
                    " column>}."
                )
            text = to_text(record[column], where)
            values[role] = text.strip() or None if role == "label" else text
        rows.append(Row(f"{part.prefix}:{offset + number}", part.split, number, values))
    if not rows:
        raise DataError(f"{part.where}: must hold rows, got {count_of(len(part.records), 'row')} with nothing in them.")
    return rows


def _missing_column(part: _Part, role: str, column: str, columns: Mapping[str, str]) -> DataError:
    problem = f"{part.where}: column {column!r} must exist, got {describe_columns(part.records[0])}."
    if advice := advise_on_form(part.where, part.records):
        return DataError(f"{problem} {advice}")
    free = [name for name in part.records[0] if name not in columns.values()]
    close = suggest(column, free)
    guess = close.split("'")[1] if close else free[0] if len(free) == 1 else "<column>"
    fix = f"Set tasks.<name>.columns: {{{role}: {guess}}}." if free else f"Add a column {column!r} to the data."
    return ColumnError(problem, fix)


def advise_on_form(where: str, records: Sequence[Record]) -> str | None:
    """What to do about a file whose columns have no names, or one name for all; None where neither seems so.

    Args:
        where: the file.
        records: its rows, at least one.
    """
    names = list(records[0])
    if advice := guess_delimiter(names):
        return advice
    is_value = any(_is_number(name) or any(record[name] == name for record in records[:1000]) for name in names)
    is_sentence = len(names) == 1 and len(names[0].split()) > 3
    if re.search(r"\.[ct]sv(\.gz)?$", where, re.IGNORECASE) and (is_value or is_sentence):
        return "The file seems to have no header line: write the names of its columns above its first row."
    return None


def _is_number(name: str) -> bool:
    return name.strip("+-").replace(".", "", 1).isdecimal()


def _compute_fingerprint(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.values], sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
