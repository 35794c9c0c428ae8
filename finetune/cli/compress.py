"""`finetune compress`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli.output import AsJson, Overrides, RunArgument, print_json, print_table, print_text


def compress_command(
    run: RunArgument,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", help="The most of the headline that may be lost on validation; default 0.01."),
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option("--min-speedup", help="In its place: times the run's rows per second, at least.")
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="LAYERSxSHARE", help="Try this size, such as 3x0.5; repeatable."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", help="Tokens to keep at least: those of train rows, then common ones; default 8000."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where runs are kept; default beside the run's own.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make a finished run smaller and faster, and choose among sizes by what they cost on validation."""
    from finetune.compression import compress

    results = compress(
        run,
        max_drop=max_drop,
        min_speedup=min_speedup,
        sizes=sizes or (),
        tokens=tokens,
        output=output,
        overrides=overrides or (),
        quiet=as_json,
    )
    if as_json:
        print_json(results)
        return
    _show(results)


def _show(results: Mapping[str, Any]) -> None:
    from finetune.evaluation.compression_page import describe_choice, list_cells
    from finetune.evaluation.wording import decimals_of, format_score

    metric = results["metric"]
    columns = ["size", f"{metric}, validation", "lost", "weights", "rows/s", "one row, p50 ms"]
    print_table(columns, list_cells(results))
    print_text(describe_choice(results))
    test = results["test"]
    before, after = (format_score(test[one]["metrics"][metric], decimals_of(metric)) for one in ("run", "chosen"))
    print_text(f"test    {metric} {after}, of the run {before}")
    print_text(f"run     {results['points'][results['chosen']]['run']}")
    print_text(f"page    {results['page']}")
