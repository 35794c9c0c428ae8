"""`finetune evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.cli.output import AsJson, RunArgument, print_findings, print_json, print_text
from finetune.cli.run import show_scores


def evaluate_command(
    run: RunArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Another held-out set with the same columns: a card, a path, hub:org/name@revision."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run again; opening its test split is counted."""
    from finetune.runner import evaluate

    scored = evaluate(run, data)
    if as_json:
        print_json(scored)
        return
    show_scores(scored)
    print_findings(scored.get("findings", []))
    if scored.get("opened", 1) > 1:
        print_text(
            f"The test split has been opened {scored['opened']} times: do not choose between models by this score."
        )
