"""Answer the rows of a file: `finetune predict RUN --input rows.csv --output scored.csv`, and `finetune generate`."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.console import Console
from rich.progress import Progress

from finetune.artifact.load import list_predictors, load
from finetune.artifact.predictor import MultiPredictor, Predictor, describe_empty
from finetune.artifact.run_folder import find_run
from finetune.data.sources import load_texts
from finetune.errors import DataError, FinetuneError, ResourceError, UsageError
from finetune.recipe import load_recipe

FORMATS = (".csv", ".jsonl", ".parquet")
TEXT = "text"


def score_file(
    run: str | Path,
    source: Path,
    output: Path,
    *,
    column: str | None = None,
    engine: str | None = None,
    quiet: bool = False,
) -> int:
    """Write every row of `source` with `predicted_label`, `confidence` and one `score_<class>` column each.

    Where the run tells texts of no class, also with `outside`, the probability of that.

    Where the run has several tasks, these columns come for each, with `<task>_` before their names.

    Args:
        run: a finished run.
        source: CSV, JSONL or Parquet.
        output: CSV, JSONL or Parquet; appears whole or not at all.
        column: where the text is; default where the run's own data have it, else `text`.
        engine: see `load`.
        quiet: no progress bar.

    Returns:
        The number of rows.

    Raises:
        UsageError: an output that is the input, or of an unknown format.
        DataError: rows that cannot be read or have no text, a column called like one of those that are added, or values
            that the format of the output cannot hold.
    """
    records, texts = _read(source, output, list_text_columns(run) if column is None else [column])
    if empty := describe_empty(texts, "row"):
        raise DataError(
            f"{source}: every row must have a text, got none in {empty}. Fill or remove them, or name another column "
            "with --column."
        )
    predictor = load(run, engine=engine)
    parts = list_predictors(predictor, [""])
    _check_free(
        source,
        records[0],
        list(_build_columns(parts, {name: np.zeros((0, len(part.labels))) for name, part in parts.items()})),
    )
    check_writable(output)
    with show_progress("predict", len(texts), quiet) as advance:
        if isinstance(predictor, MultiPredictor):
            logits = predictor.compute_logits(texts, advance=advance)
        else:
            logits = {"": predictor.compute_text_logits(texts, advance)}
    write_records(records, output, _build_columns(parts, logits))
    return len(records)


def generate_file(
    generate: Callable[..., list[str]],
    source: Path,
    output: Path,
    *,
    columns: Sequence[str] = (TEXT,),
    quiet: bool = False,
) -> int:
    """Write every row of `source` with what a model writes to its text, as column `generated`.

    Args:
        generate: (texts, columns=..., advance=...) -> what is written to each, such as a `Predictor`'s.
        columns: names of the text column; the first that is there is taken.
        source, output, quiet: as in `score_file`, with what it returns and raises.
    """
    records, texts = _read(source, output, columns)
    _check_free(source, records[0], ["generated"])
    check_writable(output)
    with show_progress("generate", len(texts), quiet) as advance:
        given = [{name: _write_value(value) for name, value in record.items()} for record in records]
        written = generate(texts, columns=given, advance=advance)
    write_records(records, output, {"generated": written})
    return len(records)


def list_text_columns(run: str | Path) -> list[str]:
    """Where a file is likely to have its texts: where the run's own data have them, then `text`."""
    try:
        recipe = load_recipe(find_run(run).recipe)
    except FinetuneError:  # a pushed model, or a folder of one: it has no data of its own
        return [TEXT]
    named = [section.columns.get(TEXT, TEXT) for section in recipe.tasks.values()]
    return list(dict.fromkeys([*named, TEXT]))


def _write_value(value: Any) -> str:
    return "" if value is None else str(value)


def _build_columns(
    parts: Mapping[str, Predictor], logits: Mapping[str, npt.NDArray[np.floating[Any]]]
) -> dict[str, npt.NDArray[Any]]:
    """What is added for each task, whose name stands in front where the run has several."""
    return {
        f"{name}_{column}" if name else column: values
        for name, part in parts.items()
        for column, values in part.build_columns(logits[name]).items()
    }


def _read(source: Path, output: Path, columns: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    check_format(output)
    if output.resolve() == source.resolve():
        raise UsageError(f"{output}: must be another file than the input, got the same. Choose another --output.")
    return load_texts(source, *columns)


def check_format(output: Path) -> None:
    """Raise UsageError unless the ending of a file is one that `write_records` knows."""
    if output.suffix not in FORMATS:
        raise UsageError(f"{output}: must end in {', '.join(FORMATS)}, got {output.suffix or 'no ending'!r}.")


def check_writable(output: Path) -> None:
    """Raise ResourceError unless a file can be made there: better before the rows are scored than after."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise _build_error(output, error) from error


def _build_error(output: Path, error: OSError) -> ResourceError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ResourceError(f"{output}: must be writable, got {reason}. Free it, or choose another --output.")


def _check_free(source: Path, names: Container[str], added: Sequence[str]) -> None:
    if taken := [name for name in added if name in names]:
        raise DataError(f"{source}: {', '.join(taken)} must be free, got columns of that name. Rename them.")


@contextmanager
def show_progress(verb: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, and what moves it on; none if quiet."""
    with Progress(console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda count: progress.advance(task, count)


def write_records(
    records: list[dict[str, Any]],
    output: Path,
    added: Mapping[str, Sequence[Any] | npt.NDArray[Any]] = MappingProxyType({}),
) -> None:
    """Write rows as CSV, JSONL or Parquet, with further columns behind theirs; the file appears whole or not at all.

    Raises:
        DataError: values that the format cannot hold.
        ResourceError: a file that cannot be written.
    """
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".jsonl":
            # Not through a table: the values of a JSONL file may differ in type from row to row.
            with temporary.open("w", encoding="utf-8") as file:
                for i, record in enumerate(records):
                    file.write(_to_json(record | {name: values[i] for name, values in added.items()}) + "\n")
        else:
            table = pa.Table.from_pylist(records)
            for name, values in added.items():
                table = table.append_column(name, pa.array(values))
            write = pyarrow.csv.write_csv if output.suffix == ".csv" else pyarrow.parquet.write_table
            write(table, temporary)
        temporary.replace(output)
    except pa.ArrowException as error:
        raise DataError(f"{output}: every column must fit {output.suffix}, got '{error}'. Write .jsonl.") from error
    except OSError as error:
        raise _build_error(output, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _to_json(record: dict[str, Any]) -> str:
    """One line: numbers that are none become null, times ISO 8601 text."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(plain, ensure_ascii=False, default=lambda value: getattr(value, "isoformat", value.__str__)())
