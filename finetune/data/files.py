"""A data file on disk -> records, after checks on its raw bytes.

Every file is first copied to a temporary folder while its bytes are checked, so that what was checked is what is read,
and so that no cache can hand back an older version of it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from finetune.errors import DataError
from finetune.recipe.messages import count_of, show

MAX_TEXT_CHARACTERS = 100_000
MAX_UNPACKED_BYTES = 4 * 2**30
MAX_UNPACKING_RATIO = 200
FREE_UNPACKED_BYTES = 64 * 2**20  # below this size any ratio is harmless
BLOCK_BYTES = 2**20

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".txt.gz")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy")
_SHEETS = (".xlsx", ".xls", ".ods")
_FORMATS = "CSV, TSV, JSONL, Parquet or plain text"

_LINE_END = re.compile(r"\r\n?|\n")
_SURE_COMMA = re.compile(r"(?<!\d),(?! |$)|,(?![ \d]|$)")
"""A comma as prose has none: neither before a space or a line's end nor between digits."""
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")

Record: TypeAlias = dict[str, Any]


def list_places(reference: str, relative_to: Path | None) -> list[Path]:
    """Where a path of a recipe may lead: a relative one from the recipe's folder, then from the working folder."""
    path = Path(reference).expanduser()
    return [path] if path.is_absolute() or relative_to is None else [relative_to / path, path]


def data_suffix(path: Path) -> str:
    """The readable ending of a file's name, such as `.csv.gz`.

    Raises:
        DataError: the ending is not one of `SUFFIXES`.
    """
    name = path.name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return suffix
    ending = "".join(path.suffixes[-2:]) if name.endswith(".gz") else path.suffix
    if path.suffix.lower() in _PICKLES:
        raise DataError(
            f"{path}: rows come as {_FORMATS}, got {ending!r}, which can run code when opened."
            " Save the rows as CSV or JSONL."
        )
    hint = " Save its sheet as CSV in UTF-8." if ending in _SHEETS else " Save the rows as CSV or JSONL."
    if ending == ".json":
        hint = " Write one JSON object per line and name it .jsonl."
    raise DataError(f"{path}: must end in one of {', '.join(SUFFIXES)}, got {ending or 'no ending'!r}.{hint}")


def read_table(path: Path) -> list[Record]:
    """Read a file of rows; at least one.

    Args:
        path: ends in one of `SUFFIXES`; text files are UTF-8, with or without a byte order mark.

    Returns:
        One mapping of column -> value per row, all with the same keys in file order. Values of CSV and TSV are text as
        written ("NA" and "null" too); JSONL and Parquet keep their types, and a key that a JSONL row lacks is None.
        Plain text has the column `text` and a row per paragraph: what stands between blank lines, with its own line
        ends as "\n", so that "\n\n" between the rows gives the text back.

    Raises:
        DataError: the file is missing, empty, damaged, too large or not what its name says.
    """
    suffix = data_suffix(path)
    with open_checked(path, is_text=suffix != ".parquet") as copy:
        if suffix == ".parquet":
            return _read_parquet(copy, path)
        if suffix.startswith(".jsonl"):
            return _read_jsonl(copy, path)
        if suffix.startswith(".txt"):
            return _read_paragraphs(copy, path)
        return _read_csv(copy, path, "\t" if suffix.startswith(".tsv") else ",")


def read_columns(path: Path) -> pyarrow.Table:
    """Read a file of rows as columns, without an object per value where the format allows it.

    Args:
        path: as `read_table` takes it, but no plain text.

    Returns:
        What `read_table` returns, as a table; a column of JSONL that mixes numbers and text becomes text.

    Raises:
        DataError: as `read_table`; or the file is plain text.
    """
    suffix = data_suffix(path)
    if suffix.startswith(".txt"):
        raise DataError(f"{path}: must be CSV, TSV, JSONL or Parquet, which have columns, got plain text.")
    with open_checked(path, is_text=suffix != ".parquet") as copy:
        if suffix == ".parquet":
            _check_parquet(copy, path)
            return pyarrow.parquet.read_table(copy)
        if suffix.startswith(".jsonl"):
            return _to_table(_read_jsonl(copy, path))
        return _read_csv_columns(copy, path, "\t" if suffix.startswith(".tsv") else ",")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: the file is missing, empty, damaged, too large or no JSON.
    """
    with open_checked(path, is_text=True) as copy:
        try:
            return json.loads(copy.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: must be JSON, got {quote_reason(error)}. Get the file again.") from None


def to_records(dataset: datasets.Dataset) -> list[Record]:
    """The rows of a `datasets.Dataset`; class numbers become class names, -1 (no class) becomes None."""
    names = {
        column: feature.names
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    records = cast("list[Record]", dataset.to_list())
    for column, classes in names.items():
        for record in records:
            number = record[column]
            record[column] = None if number is None or number < 0 else classes[number]
    return records


@contextmanager
def open_checked(path: Path, *, is_text: bool) -> Iterator[Path]:
    """A checked, unpacked copy of a file, in a temporary folder that disappears.

    Raises:
        DataError: the file is missing, empty, damaged or too large, or a text file is not UTF-8.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise DataError(f"{path}: must be a file, got {got}. Check the name.")
    with tempfile.TemporaryDirectory(prefix="finetune-data-") as folder:
        copy = Path(folder) / "rows"
        try:
            with path.open("rb") as file, copy.open("wb") as target:
                if not is_text:
                    shutil.copyfileobj(file, target)
                elif path.name.lower().endswith(".gz"):
                    with gzip.open(file) as unpacked:
                        _copy_packed(cast("BinaryIO", unpacked), target, path)
                else:
                    _copy_text(file, target, path, packed_bytes=None)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: must be a whole gzip file, got {quote_reason(error)}. Pack it again.") from None
        except OSError as error:
            raise DataError(f"{path}: must be readable, got '{error.strerror or error}'. Check its rights.") from None
        yield copy


def _copy_packed(source: BinaryIO, target: BinaryIO, path: Path) -> None:
    """Copy what is no bomb; of a bomb that holds no text, either, that it is one is said."""
    packed_bytes = path.stat().st_size
    try:
        _copy_text(source, target, path, packed_bytes)
    except DataError:
        while source.read(BLOCK_BYTES):
            _check_unpacked(path, source.tell(), packed_bytes)
        raise


def _copy_text(source: BinaryIO, target: BinaryIO, path: Path, packed_bytes: int | None) -> None:
    """Copy block by block, so that neither a large file nor a gzip bomb fills the memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = newlines = 0
    has_content = False
    while True:
        block = source.read(BLOCK_BYTES)
        if not offset and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path}: line 1, byte 1: must be UTF-8, got the mark of UTF-16. {_iconv(path, 'UTF-16')}")
        if (zero := block.find(b"\0")) >= 0:
            place = _place(newlines, block, zero, offset)
            raise DataError(f"{path}: {place}: must be text, got a NUL byte. {_repair_nul(path, block)}")
        try:
            pending = len(decoder.getstate()[0])
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = _place(newlines, error.object, error.start, offset - pending)
            got = f"0x{error.object[error.start]:02x}"
            raise DataError(
                f"{path}: {place}: must be UTF-8, got {got}. {_iconv(path, _guess_encoding(block))}"
            ) from None
        if not block:
            break
        has_content = has_content or bool(text.strip("\ufeff \t\r\n"))
        offset += len(block)
        newlines += block.count(b"\n")
        if packed_bytes is not None:
            _check_unpacked(path, offset, packed_bytes)
        target.write(block)
    if not has_content:
        raise DataError(f"{path}: must hold rows, is empty. Write rows into it, or name another file.")


def _place(newlines: int, block: bytes, index: int, offset: int) -> str:
    """`line 3, byte 41`, both 1-based, for `block[index]`; before the block lie `newlines` and `offset` bytes."""
    line = newlines + block.count(b"\n", 0, index) + 1
    return f"line {line}, byte {offset + index + 1}"


def _check_unpacked(path: Path, unpacked_bytes: int, packed_bytes: int) -> None:
    suspicious = unpacked_bytes > max(FREE_UNPACKED_BYTES, MAX_UNPACKING_RATIO * packed_bytes)
    if suspicious or unpacked_bytes > MAX_UNPACKED_BYTES:
        raise DataError(
            f"{path}: must unpack to at most {MAX_UNPACKING_RATIO} times its {packed_bytes:,} bytes and at most"
            f" {MAX_UNPACKED_BYTES / 2**30:g} GiB, got more. Unpack it yourself if you trust it."
        )


def _repair_nul(path: Path, block: bytes) -> str:
    if block.count(b"\0") * 4 > len(block):  # UTF-16 of Latin letters is half NUL bytes
        return _iconv(path, "UTF-16")
    name = path.name.removesuffix(".gz")
    return f"Remove it, for example: tr -d '\\000' < {name} > clean-{name}"


def _guess_encoding(block: bytes) -> str:
    """GB18030 where all of the first block is that and most of it in common characters, else what Windows writes."""
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(block)  # its last character may be cut
    except UnicodeDecodeError:
        return "WINDOWS-1252"
    foreign = re.sub("[\0-\x7f]", "", text)
    # Of two bytes above 0xa0 each: a letter with an accent and the one behind it are a rare character.
    common = foreign.encode("gb2312", "ignore").decode("gb2312")
    return "GB18030" if 2 * len(re.findall("[\u4e00-\u9fff]", common)) > len(foreign) else "WINDOWS-1252"


def _iconv(path: Path, encoding: str) -> str:
    name = path.name.removesuffix(".gz")
    return f"Convert it, for example: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}"


def _read_csv(copy: Path, path: Path, delimiter: str) -> list[Record]:
    columns, count = _check_csv(copy, path, delimiter)
    # Without types and without missing values to guess, pandas hands every field over as it was written.
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    options = {"sep": delimiter, "column_names": columns, "header": 0, "keep_default_na": False, "na_filter": False}
    records = _load("csv", copy, path, features=features, encoding="utf-8-sig", **options)
    if len(records) != count:  # csv and pandas disagree only on what a blank row is
        raise DataError(f"{path}: must hold no blank rows, got {abs(len(records) - count)}. Remove them.")
    return records


def _check_csv(copy: Path, path: Path, delimiter: str) -> tuple[list[str], int]:
    """Check the shape of every row; return the columns and the number of rows."""
    columns: list[str] = []
    count, line = 0, 1
    with copy.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                start, line = line, reader.line_num + 1
                if not fields or (len(fields) == 1 and not fields[0].strip() and len(columns) != 1):
                    continue
                if not columns:
                    columns = _check_header(fields, path)
                    continue
                count += 1
                if line > start + 1:
                    _check_swallowed(fields, len(columns), path, start, delimiter)
                if len(fields) != len(columns):
                    raise DataError(
                        f"{path}: line {start}: must have {count_of(len(columns), 'field')} like the header, got "
                        f"{len(fields)}. {_repair_fields(columns, delimiter)}"
                    )
        except csv.Error as error:
            file.seek(0)
            hint = guess_delimiter(columns or file.readline().split(delimiter))
            raise _csv_error(path, line, error, hint) from None
    if not count:
        raise DataError(f"{path}: must hold rows, got only the header {', '.join(columns)}. Add rows below it.")
    return columns, count


def _check_swallowed(fields: Sequence[str], width: int, path: Path, line: int, delimiter: str) -> None:
    """Refuse a field that took in the rows below it, from a quote that nothing closes up to the next quote.

    Args:
        fields: of one record.
        width: fields of the header.
        path: for messages.
        line: 1-based, where the record begins.
        delimiter: a comma or a tab.
    """
    for position, field in enumerate(fields):
        lines = _LINE_END.split(field)
        if len(lines) > 1 and _holds_rows(lines, position, width, delimiter):
            raise DataError(
                f'{path}: line {line}: a field must end on its line, got one that a quote " opens and that takes in all'
                f" up to line {line + len(lines) - 1}, as if these rows were one text. Close that quote, and write each"
                ' quote inside a "quoted" text as "". If it is one text, save the rows as JSONL.'
            )
        line += len(lines) - 1


def _holds_rows(lines: Sequence[str], position: int, width: int, delimiter: str) -> bool:
    """Whether the lines of a field, the one at `position` of a record of `width`, are rows.

    Where fields are parted by commas, all lines between its first and its last must have the form of a row, and at
    least two, and half of them, a comma that is none of prose; the first line holds the rest of the row that the quote
    opened in, the last what stands before the field that it closed in.
    """
    if delimiter == "\t":
        return any(delimiter in line for line in lines)  # no text holds tabs
    first, *inner, last = lines
    inner = [line.replace('"', '""') for line in inner if line.strip()]  # as they stand in the file
    if width == 1 or first.count(",") < width - 1 - position or last.count(",") < position:
        return False
    sure = sum(_SURE_COMMA.search(line) is not None for line in inner)
    return 2 * sure >= max(4, len(inner)) and all(len(row) == width for row in csv.reader(inner))


def _repair_fields(columns: Sequence[str], delimiter: str) -> str:
    return guess_delimiter(columns) or (
        f'Put a text that holds {"a tab" if delimiter != "," else "a comma"} in "quotes".'
    )


def guess_delimiter(columns: Sequence[str]) -> str | None:
    """What to do about a header that is one column because its names are parted by something else."""
    separators = re.findall(r"[;\t|]", columns[0]) if len(columns) == 1 else []
    if not separators:
        return None
    return f"Its fields seem to be parted by {separators[0]!r}: save it with commas, or with tabs as .tsv."


def _check_header(fields: list[str], path: Path) -> list[str]:
    columns = [field.strip() or f"column_{position}" for position, field in enumerate(fields, start=1)]
    if repeated := sorted({column for column in columns if columns.count(column) > 1}):
        raise DataError(f"{path}: line 1: must name each column once, got {', '.join(repeated)} twice. Rename one.")
    return columns


def _csv_error(path: Path, line: int, error: csv.Error, hint: str | None) -> DataError:
    if "field larger" in str(error) or "unexpected end" in str(error):
        must = f"a field must end and have at most {MAX_TEXT_CHARACTERS:,} characters, got more or no end"
        return DataError(f'{path}: line {line}: {must}. Close the quote " or split the text.')
    fix = hint or 'Write a quote inside a quoted text as "".'
    return DataError(f"{path}: line {line}: must be CSV, got {error}. {fix}")


def _read_jsonl(copy: Path, path: Path) -> list[Record]:
    # Not through `datasets`: its JSON reader guesses types and turns a text such as "2020-01-01" into a timestamp.
    records: list[Record] = []
    columns: dict[str, None] = {}
    with copy.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                must = f"must be a JSON object, got {quote_reason(error)}"
                raise DataError(f"{path}: line {number}: {must}. Write one object per line.") from None
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}: line {number}: must be a JSON object, got {show(record)}. Write one object per line."
                )
            if _ESCAPED_HALF.search(line):
                _check_whole(record, path, number)
            columns.update(dict.fromkeys(record))
            records.append(record)
    return [{column: record.get(column) for column in columns} for record in records]


def _check_whole(record: Record, path: Path, line: int) -> None:
    """Half of a surrogate pair is allowed in JSON and in no file: with it ends a text that was cut inside an emoji."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        got = ascii(error.object[error.start])
        raise DataError(
            f"{path}: line {line}: must hold whole characters, got {got}, half of one: a text was cut inside an emoji."
            " Remove it, or cut the text elsewhere."
        ) from None


def _read_csv_columns(copy: Path, path: Path, delimiter: str) -> pyarrow.Table:
    columns, count = _check_csv(copy, path, delimiter)
    try:
        table = pyarrow.csv.read_csv(
            copy,
            read_options=pyarrow.csv.ReadOptions(column_names=columns, skip_rows_after_names=1),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pyarrow.string())),
        )
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: must be readable as CSV, got {quote_reason(error)}.") from None
    if table.num_rows != count:
        raise DataError(f"{path}: must hold no blank rows, got {abs(table.num_rows - count)}. Remove them.")
    return table


def _to_table(records: Sequence[Record]) -> pyarrow.Table:
    columns = {}
    for name in records[0] if records else ():
        values = [record[name] for record in records]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, TypeError, OverflowError):
            columns[name] = pyarrow.array([None if value is None else str(value) for value in values])
    return pyarrow.table(columns)


def _read_parquet(copy: Path, path: Path) -> list[Record]:
    _check_parquet(copy, path)
    return _load("parquet", copy, path)


def _check_parquet(copy: Path, path: Path) -> None:
    try:
        metadata = pyarrow.parquet.read_metadata(copy)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: must be a Parquet file, got {quote_reason(error)}. Get or write it again.") from None
    unpacked_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    if unpacked_bytes > MAX_UNPACKED_BYTES:
        raise DataError(
            f"{path}: must unpack to at most {MAX_UNPACKED_BYTES / 2**30:g} GiB, got {unpacked_bytes / 2**30:.1f}."
            " Split it."
        )
    if not metadata.num_rows:
        raise DataError(f"{path}: must hold rows, got only the columns {list_names(metadata.schema.names)}.")


def _read_paragraphs(copy: Path, path: Path) -> list[Record]:
    """The paragraphs of a text that `open_checked` gave, with `path` for messages."""
    paragraphs: list[list[str]] = [[]]
    with copy.open(encoding="utf-8-sig") as file:  # any line end becomes \n
        for line in file:
            if line.strip():
                paragraphs[-1].append(line.removesuffix("\n"))
            elif paragraphs[-1]:
                paragraphs.append([])
    records: list[Record] = [{"text": "\n".join(lines)} for lines in paragraphs if lines]
    if not records:
        raise DataError(f"{path}: must hold rows, got only blank lines. Write text into it, or name another file.")
    return records


def _load(builder: str, copy: Path, path: Path, **options: Any) -> list[Record]:
    with _quiet(), tempfile.TemporaryDirectory(prefix="finetune-cache-") as cache:
        try:
            return to_records(
                datasets.load_dataset(
                    builder, data_files=str(copy), split="train", cache_dir=cache, keep_in_memory=True, **options
                )
            )
        except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError) as error:
            cause = error.__cause__ or error
            raise DataError(f"{path}: must be readable as {builder}, got {quote_reason(cause)}.") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars for files that are read in a moment."""
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()


def describe_columns(record: Mapping[str, Any]) -> str:
    """`columns text, target` for a message."""
    return f"columns {list_names(list(record))}"


def list_names(names: Sequence[str]) -> str:
    """Up to twelve names, and how many more."""
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"


def quote_reason(error: BaseException) -> str:
    """The first line of a library's message, without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "'" + lines[0][:200].rstrip(".") + "'"
