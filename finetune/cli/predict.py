"""`finetune predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.output import (
    AsJson,
    Engine,
    RunArgument,
    print_json,
    print_table,
    print_written,
    suggest_output,
)


def predict_command(
    run: RunArgument,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to score.")] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help="A CSV, TSV, JSONL, Parquet or text file with a text column.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where the scored rows go: CSV, JSONL or Parquet.")
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="The text column of --input; default the run's own, else `text`.")
    ] = None,
    engine: Engine = None,
    as_json: AsJson = False,
) -> None:
    """Predict with a finished run; empty texts are refused, with the numbers of their rows."""
    from finetune.errors import UsageError

    if bool(texts) == bool(source):
        raise UsageError("predict: must get either texts or --input FILE, got " + ("both." if texts else "neither."))
    if source is None:
        _predict_texts(run, texts or [], engine, as_json)
        return
    if output is None:
        add = f"Add --output {suggest_output('scored', source)}"
        raise UsageError(f"predict: --input must come with --output, got none. {add}")
    from finetune.artifact.score_file import score_file

    rows = score_file(run, source, output, column=column, engine=engine, quiet=as_json)
    if as_json:
        print_json({"output": str(output), "rows": rows})
    else:
        print_written(output, rows)


def _predict_texts(run: str, texts: list[str], engine: str | None, as_json: bool) -> None:
    from dataclasses import asdict

    from finetune.artifact.load import load
    from finetune.artifact.predictor import MultiPredictor

    predictor = load(run, engine=engine)
    if isinstance(predictor, MultiPredictor):
        answers = predictor.predict(texts)
        if as_json:
            tasks = [{name: asdict(answers[name][i]) for name in answers} for i in range(len(texts))]
            print_json([{"text": text, "tasks": task} for text, task in zip(texts, tasks, strict=True)])
            return
        rows = [
            [name, answers[name][i].label, f"{answers[name][i].confidence:.1%}", text]
            for i, text in enumerate(texts)
            for name in answers
        ]
        print_table(["task", "label", "confidence", "text"], rows)
        return
    predictions = predictor.predict(texts)
    if as_json:
        print_json([{"text": text, **asdict(prediction)} for text, prediction in zip(texts, predictions, strict=True)])
        return
    outside = ["outside"] if any(prediction.outside is not None for prediction in predictions) else []
    rows = [
        [prediction.label, f"{prediction.confidence:.1%}", *(f"{prediction.outside:.1%}" for _ in outside), text]
        for text, prediction in zip(texts, predictions, strict=True)
    ]
    print_table(["label", "confidence", *outside, "text"], rows)
