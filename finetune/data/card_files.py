"""Files of a card -> records, also of files that do not say themselves what their columns are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.dstc import read_dialogues, read_entries
from finetune.data.files import Record, list_names, open_checked, read_json, read_table
from finetune.errors import DataError
from finetune.recipe.card import Card
from finetune.recipe.messages import show, suggest


def read_card_files(card: Card, paths: Sequence[Path], key: str) -> list[Record]:
    """Read one file of a card; with the formats `parallel` and `dstc`, the files of one split.

    Args:
        card: says the format and the columns.
        paths: one file; with `parallel` one per column; with `dstc` dialogues and labels, or labels.
        key: what the card writes behind `#`, with `json_splits`.

    Returns:
        As `files.read_table`.

    Raises:
        DataError: a file is missing, empty, damaged, too large or not what the card says.
    """
    columns = list(card.columns)
    if card.format == "json_splits":
        return _read_json_split(paths[0], key, columns)
    if card.format == "json_list":
        return _read_json_list(paths[0], columns, card.aliases)
    if card.format == "lines":
        return [{"text": line.strip()} for line in _read_lines(paths[0]) if line.strip()]
    if card.format == "parallel":
        return _read_parallel(paths, columns)
    if card.format == "headerless_tsv":
        return _read_fields(paths[0], columns)
    if card.format == "dstc":
        return read_dialogues(paths)
    return read_table(paths[0])


def read_card_entries(card: Card, path: Path) -> list[Record]:
    """Read the knowledge file of a card as records for `knowledge.build_entries`.

    Raises:
        DataError: as `read_card_files`.
    """
    return read_entries(path) if card.format == "dstc" else read_table(path)


def _read_lines(path: Path) -> list[str]:
    """The lines of a text, without their ends.

    Only a line feed ends a line: characters that other tools take for line ends would part two files from each other.
    """
    with open_checked(path, is_text=True) as copy, copy.open(encoding="utf-8-sig", newline="\n") as file:
        return [line.rstrip("\r\n") for line in file]


def _read_parallel(paths: Sequence[Path], columns: Sequence[str]) -> list[Record]:
    texts = [[line.strip() for line in _read_lines(path)] for path in paths]
    if len({len(lines) for lines in texts}) > 1:
        got = ", ".join(f"{path.name} {len(lines):,}" for path, lines in zip(paths, texts, strict=True))
        raise DataError(
            f"{paths[0]}: must have as many lines as the files that it goes with, got {got}. Get the files again:"
            " line n of each belongs to one row."
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*texts, strict=True)]


def _read_fields(path: Path, columns: Sequence[str]) -> list[Record]:
    """Tab-separated fields as written: quotes are part of the text."""
    records = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != len(columns):
            must = f"must have {len(columns)} fields parted by tabs ({list_names(columns)}), got {len(fields)}"
            raise DataError(f"{path}: line {number}: {must}. Get the file again, or correct the card's columns.")
        records.append(dict(zip(columns, fields, strict=True)))
    return records


def _read_json_split(path: Path, key: str, columns: Sequence[str]) -> list[Record]:
    """One list of [text, label] pairs of an object, split -> list of pairs."""
    content = read_json(path)
    if not isinstance(content, dict) or key not in content:
        keys = list(content) if isinstance(content, dict) else []
        raise DataError(f"{path}: must hold the key {key!r}, got {list_names(keys)}.{suggest(key, keys)}")
    pairs = content[key]
    if not isinstance(pairs, list) or not pairs:
        raise DataError(f"{path}: {key} must be a list of [text, label] pairs, got {show(pairs)}.")
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{path}: {key}, entry {number}: must be a pair [text, label], got {show(pair)}.")
    names = columns[:2] if len(columns) >= 2 else [*columns, "text", "label"][:2]
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


def _read_json_list(path: Path, columns: Sequence[str], aliases: dict[str, str]) -> list[Record]:
    """The named columns of each object of a list; None where an object has neither the column nor its alias."""
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: must be a JSON list of objects, got {show(content)}. Get the file again.")
    records = []
    for number, entry in enumerate(content, start=1):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: entry {number}: must be a JSON object, got {show(entry)}. Get the file again.")
        keys = {column: column if column in entry else aliases.get(column, column) for column in columns}
        place = f"{path}: entry {number}"
        records.append({column: _join_lines(entry.get(key), f"{place}: {key!r}") for column, key in keys.items()})
    return records


def _join_lines(value: Any, where: str) -> Any:
    """A list of lines as one text; other plain values as they are."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if isinstance(value, (list, dict)):
        raise DataError(f"{where}: must be text or a list of lines, got {show(value)}. Leave it out of the columns.")
    return value
