"""`finetune sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.output import AsJson, Overrides, print_json, print_table, print_text


def sweep_command(
    sweep: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="A YAML file of what to search, or a name from `finetune recipes list`.",
        ),
    ],
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Trials in all; default the sweep's.")] = None,
    runs: Annotated[Path | None, typer.Option("--runs", help="Where runs are kept; default ./runs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search values of a recipe on validation, and write the best recipe; run again to go on."""
    from dataclasses import asdict

    from finetune.search import sweep as search

    done = search(sweep, overrides or (), trials=trials, runs=runs, quiet=as_json)
    if as_json:
        trials_json = [asdict(trial) for trial in done.trials]
        paths = {"folder": str(done.folder), "recipe": str(done.recipe)}
        print_json(paths | {"metric": done.metric, "best": asdict(done.best), "trials": trials_json})
        return
    rows = [
        [
            f"{trial.number}{' *' if trial == done.best else ''}",
            "" if trial.score is None else f"{trial.score:.4f}",
            trial.state,
            *(str(value) for value in trial.values.values()),
        ]
        for trial in done.trials
    ]
    print_table(["trial", done.metric, "", *done.best.values], rows, title="validation; * is the best")
    for trial in done.trials:
        if trial.error:
            print_text(f"  trial {trial.number}: {trial.error}")
    print_text(f"best    {done.recipe}")
    print_text(f"run     finetune run {done.recipe}")
