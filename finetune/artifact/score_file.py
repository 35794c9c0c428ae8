"""Score the rows of a file: `finetune predict RUN --input rows.csv --output scored.csv`."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.console import Console
from rich.progress import Progress

from finetune.artifact.load import load
from finetune.data.sources import load_rows
from finetune.errors import ResourceError, UsageError

FORMATS = (".csv", ".jsonl", ".parquet")


def score_file(run: str | Path, source: Path, output: Path, *, column: str = "text", quiet: bool = False) -> int:
    """Write every row of `source` with `predicted_label`, `confidence` and one `score_<class>` column each.

    Args:
        run: a finished run.
        source: CSV, JSONL or Parquet.
        output: CSV, JSONL or Parquet; appears whole or not at all.
        column: where the text is.
        quiet: no progress bar.

    Returns:
        The number of rows.

    Raises:
        UsageError: an output that is the input, or of an unknown format.
        DataError: rows that cannot be read.
    """
    if output.suffix not in FORMATS:
        raise UsageError(f"{output}: must end in {', '.join(FORMATS)}, got {output.suffix or 'no ending'!r}.")
    if output.resolve() == source.resolve():
        raise UsageError(f"{output}: must be another file than the input, got the same. Choose another --output.")
    rows = load_rows(str(source), {"text": column}, roles=("text",)).rows
    predictor = load(run)
    with Progress(console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task("predict", total=len(rows))
        texts = [row.values["text"] for row in rows]
        predictions = predictor.predict(texts, advance=lambda count: progress.advance(task, count))
    scored = [
        {(column if name == "text" else name): value for name, value in row.values.items()}
        | {"predicted_label": prediction.label, "confidence": prediction.confidence}
        | {f"score_{label}": score for label, score in prediction.scores.items()}
        for row, prediction in zip(rows, predictions, strict=True)
    ]
    _write(pa.Table.from_pylist(scored), output)
    return len(scored)


def _write(table: pa.Table, output: Path) -> None:
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".parquet":
            pyarrow.parquet.write_table(table, temporary)
        elif output.suffix == ".csv":
            pyarrow.csv.write_csv(table, temporary)
        else:
            table.to_pandas().to_json(temporary, orient="records", lines=True, force_ascii=False, date_format="iso")
        temporary.replace(output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{output}: must be writable, got {error.strerror or error}.") from error
