"""The files of events and of the items that they name -> tables, and their columns -> ids, texts and numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute as pc

from finetune.data.catalog import DATA_VARIABLE, find_card_file, find_card_folder
from finetune.data.checks import Finding
from finetune.data.files import MAX_TEXT_CHARACTERS, list_names, read_columns
from finetune.errors import DataError
from finetune.recipe.card import Card
from finetune.recipe.messages import count_of, show, suggest

MAX_WHOLE_FLOAT = 2.0**53
"""Above it floats skip whole numbers."""
NO_GENRES = "(no genres listed)"
"""What MovieLens writes for a film without genres."""


def read_card_events(card: Card) -> tuple[pyarrow.Table, list[Finding]]:
    """The events of a card, in the order of its files; and what is not as its card says, or left out of them.

    Raises:
        DataError: the card's folder is not at hand, it deals its events out to splits, or a file cannot be trusted.
    """
    folder = _find_folder(card)
    if list(card.files) != ["all"]:
        got = ", ".join(card.files)
        raise DataError(f"{card.name}: files must be `all`, as events are split by their times, got {got}.")
    files = [file for _, names in card.list_files() for file in names]
    tables = [read_columns(find_card_file(card, folder, file)) for file in files]
    table = tables[0] if len(tables) == 1 else pyarrow.concat_tables(tables, promote_options="permissive")
    count, expected = table.num_rows, card.rows.get("all", table.num_rows)
    findings = []
    if count != expected:
        message = f"all: the card says {expected:,} rows, got {count:,}."
        findings.append(Finding("row_count", "note", "all", 1, message))
    if card.format == "online_retail":
        table = _keep_purchases(table, card.name)
        message = f"{count - table.num_rows:,} of {count:,} rows are no purchases of a known customer: left out."
        findings.append(Finding("no_purchase", "note", "all", count - table.num_rows, message))
    return table, findings


def read_card_items(card: Card, file: str) -> pyarrow.Table:
    """The catalogue of a card.

    Raises:
        DataError: as `read_card_events`.
    """
    table = read_columns(find_card_file(card, _find_folder(card), file))
    return _read_films(table) if card.format == "movielens" else table


def _find_folder(card: Card) -> Path:
    folder = find_card_folder(card)
    if folder is None:
        fix = f"Set {DATA_VARIABLE} to a folder that holds {card.local}/."
        raise DataError(f"{card.name}: its events must lie in a folder, got none. {fix}")
    return folder


def _keep_purchases(table: pyarrow.Table, name: str) -> pyarrow.Table:
    """Rows of Online Retail that say that a customer bought something."""
    if missing := [key for key in ("CustomerID", "InvoiceNo", "Quantity") if key not in table.column_names]:
        raise DataError(f"{name}: must have the column {missing[0]!r}, got {list_names(table.column_names)}.")
    is_cancelled = pc.starts_with(table["InvoiceNo"].cast(pyarrow.string()), "C")
    is_bought = pc.and_(pc.greater(table["Quantity"], 0), pc.invert(is_cancelled))
    kept = table.filter(pc.and_(is_bought, table["CustomerID"].is_valid()))
    if not kept.num_rows:
        raise DataError(f"{name}: must hold purchases of customers, got none in {table.num_rows:,} rows.")
    return kept


def _read_films(table: pyarrow.Table) -> pyarrow.Table:
    """The films of MovieLens with genres in words, and the year that most titles end in."""
    if missing := [key for key in ("title", "genres") if key not in table.column_names]:
        raise DataError(f"movies.csv: must have the column {missing[0]!r}, got {list_names(table.column_names)}.")
    titles = pc.utf8_trim_whitespace(table["title"])
    year = pc.struct_field(pc.extract_regex(titles, r"\((?P<year>[0-9]{4})(?:[-\x{2013}][0-9]{0,4})?\)$"), "year")
    genres = pc.replace_substring(pc.replace_substring(table["genres"], NO_GENRES, ""), "|", ", ")
    table = table.set_column(table.column_names.index("genres"), "genres", genres)
    return table.append_column("year", year)


# Columns


def get_column(table: pyarrow.Table, column: str, where: str, key: str) -> pyarrow.ChunkedArray:
    """A column by name, its texts all of one type.

    Args:
        key: what names the column in a recipe, such as `columns.user`.

    Raises:
        DataError: it is not there.
    """
    if column not in table.column_names:
        there = table.column_names
        got = f"columns {list_names(there)}"
        raise DataError(
            f"{where}: column {column!r} must exist, got {got}.{suggest(column, there)} Set {key} to the right one."
        )
    array = table[column]
    if pyarrow.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    is_wide = pyarrow.types.is_large_string(array.type) or pyarrow.types.is_string_view(array.type)
    return array.cast(pyarrow.string()) if is_wide or pyarrow.types.is_null(array.type) else array


def to_ids(array: pyarrow.ChunkedArray, where: str) -> tuple[pyarrow.ChunkedArray, str]:
    """Ids as text, so that 1, 1.0, "1" and "1.0" are one id; and whether the file holds `numbers` or `text`.

    Raises:
        DataError: an id is missing, or the column holds neither.
    """
    kind = array.type
    is_whole_number = pyarrow.types.is_integer(kind)
    if pyarrow.types.is_floating(kind):
        array = pc.if_else(pc.is_nan(array), None, array)
        whole = pc.and_(pc.equal(pc.floor(array), array), pc.less(pc.abs(array), MAX_WHOLE_FLOAT))
        if pc.all(whole).as_py() is not False:
            array, is_whole_number = array.cast(pyarrow.int64()), True
    is_text = pyarrow.types.is_string(kind)
    if not (is_whole_number or is_text or pyarrow.types.is_floating(kind) or pyarrow.types.is_decimal(kind)):
        raise DataError(f"{where}: must hold ids, which are text or numbers, got {kind}. Choose another column.")
    text = pc.utf8_trim_whitespace(array.cast(pyarrow.string()))
    check_all_present(pc.equal(text, ""), where, "an id")
    if not is_whole_number:
        text = pc.replace_substring_regex(text, r"^(-?[0-9]+)\.0*$", r"\1")
    return text, "text" if is_text else "numbers"


def check_all_present(is_empty: pyarrow.ChunkedArray, where: str, what: str) -> None:
    """Raise DataError, naming the first row, when a value is empty or missing."""
    empty = np.flatnonzero(pc.fill_null(is_empty, fill_value=True).to_numpy())
    if len(empty):
        rows = count_of(len(empty), "row")
        raise DataError(
            f"{where}: row {empty[0] + 1}: must hold {what}, got nothing (in {rows}). Fill in or remove these rows."
        )


def to_texts(array: pyarrow.ChunkedArray, where: str) -> list[str]:
    """Texts without space around them; "" where one is missing.

    Raises:
        DataError: the column holds lists or the like, or a text is too long.
    """
    if pyarrow.types.is_nested(array.type) or pyarrow.types.is_binary(array.type):
        raise DataError(f"{where}: must hold text, got {array.type}. Choose another column.")
    text = pc.utf8_trim_whitespace(pc.fill_null(array.cast(pyarrow.string()), ""))
    longest = pc.max(pc.utf8_length(text)).as_py() or 0
    if longest > MAX_TEXT_CHARACTERS:
        must = f"must have at most {MAX_TEXT_CHARACTERS:,} characters"
        raise DataError(f"{where}: {must}, got {longest:,}. Split or cut the text.")
    return text.to_pylist()  # type: ignore[no-any-return]


def to_numbers(array: pyarrow.ChunkedArray, where: str) -> npt.NDArray[np.float64]:
    """Numbers; NaN where one is missing.

    Raises:
        DataError: the first value that is no finite number.
    """
    if pyarrow.types.is_string(array.type):
        text = pc.utf8_trim_whitespace(array)
        array = pc.if_else(pc.equal(text, ""), None, text)
    try:
        values: npt.NDArray[np.float64] = array.cast(pyarrow.float64()).to_numpy()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        row = next(row for row, value in enumerate(array, start=1) if not _is_number(value))
        got = show(array[row - 1].as_py())
        raise DataError(f"{where}: row {row}: must be a number, got {got}. Correct it.") from None
    if np.isinf(values).any():
        row = int(np.argmax(np.isinf(values))) + 1
        raise DataError(f"{where}: row {row}: must be a finite number, got {values[row - 1]}. Correct it.")
    return values


def _is_number(value: pyarrow.Scalar) -> bool:
    try:
        value.cast(pyarrow.float64())
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        return False
    return True
