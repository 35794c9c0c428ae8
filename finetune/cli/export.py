"""`finetune export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli.output import AsJson, Overrides, RunArgument, print_json, print_note, print_table, print_text


def export_command(
    run: RunArgument,
    format_: Annotated[
        str,
        typer.Option("--format", help="transformers, onnx, onnx-int8, openvino, openvino-int8 or torch-export."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", help="The folder; default export/FORMAT in the run's.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write a finished run for another engine, and prove that its answers stayed the same."""
    from finetune.artifact.export.export_run import export_run

    exported = export_run(
        run, format_, output, overrides=overrides or (), narrate=(lambda _text: None) if as_json else print_note
    )
    if as_json:
        print_json({"folder": str(exported.folder)} | dict(exported.parity))
        return
    _show(run, exported.folder, exported.parity)


def _show(run: str, folder: Path, parity: Mapping[str, Any]) -> None:
    rows = []
    for name, task in parity["tasks"].items():
        for metric, values in task["metrics"].items():
            rows.append([name, metric, _score(values["before"]), _score(values["after"]), _score(values["lost"], "+")])
    print_table(["task", "metric", "run", "export", "lost"], rows)
    for name, task in parity["tasks"].items():
        print_text(
            f"{name}: {task['equal_decisions']:.2%} of {task['rows']:,} decisions are equal, largest difference "
            f"{task['largest_difference']:.2g}"
        )
    speed, size = parity["speed"], parity["bytes"]
    rows = [
        [name, f"{speed[name]['rows_per_second']:,}", f"{speed[name]['p50_ms']} ms", f"{speed[name]['p95_ms']} ms"]
        for name in ("pipeline", "run", "export")
    ]
    print_table(["", "rows/s", "one row, p50", "p95"], rows)
    print_text(f"{size['after'] / 1e6:,.1f} MB of weights, before {size['before'] / 1e6:,.1f} MB")
    print_text(f"{folder}: written. Use it:")
    print_text(f'finetune predict {run} "some text" --engine {parity["format"]}')


def _score(values: Mapping[str, Any], sign: str = "") -> str:
    if values["value"] is None:
        return "not defined"
    interval = f" [{values['low']:{sign}.3f}, {values['high']:{sign}.3f}]" if values.get("low") is not None else ""
    return f"{values['value']:{sign}.4f}{interval}"
