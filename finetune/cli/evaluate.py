"""`finetune evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.cli.output import AsJson, RunArgument, print_findings, print_json, print_text
from finetune.cli.run import show_all_scores


def evaluate_command(
    run: RunArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Another held-out set with the same columns: a card, a path, hub:org/name@revision."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="The task that --data is for, where the run has several.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run again; opening its test split is counted."""
    from finetune.runner import evaluate

    scored = evaluate(run, data, task)
    if as_json:
        print_json(scored)
        return
    tests = {"": scored} if "metrics" in scored else scored
    show_all_scores(tests)
    print_findings([finding for test in tests.values() for finding in test.get("findings", [])])
    opened = max(test.get("opened") or 1 for test in tests.values())
    if opened > 1:
        print_text(f"The test split has been opened {opened} times: do not choose between models by this score.")
