"""`finetune evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from finetune.cli.output import AsJson, print_findings, print_json, print_text
from finetune.cli.run import show_all_scores


def evaluate_command(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's folder; runs/NAME means its latest finished run.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Another held-out set with the same columns: a card, a path, hub:org/name@revision."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", help="The task that --data is for, where the run has several; the type, where --model has."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Instead of a run: org/name on the Hub, or a saved model's folder. Needs --data."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="With --model: its classes in order, A,B,..., where it calls them otherwise."),
    ] = None,
    knowledge: Annotated[
        str | None,
        typer.Option(
            "--knowledge",
            help="With --model, a sentence encoder or a reranker: the entries, where the data's card has none.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", help='With --model, one that completes: what it reads, such as "Q: {text} A:"; default {text}.'
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="ROLE=NAME", help="A column of --data, such as label=intent; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run again (opening its test split is counted), or any model on a held-out set."""
    named = _read_columns(columns or [], data)
    options = {"--labels": labels, "--knowledge": knowledge, "--prompt": prompt}
    if model:
        scored = _score_model(run, model, data, named, task, options)
    else:
        scored = _score_run(run, data, named, task, options)
    if as_json:
        print_json(scored)
        return
    tests = {"": scored} if "metrics" in scored else scored
    show_all_scores(tests)
    if model:
        print_text(f"{model}: scored as {scored['task']}, {scored['max_length']:,} tokens at a time.")
        if "first_search" in scored:
            print_text(f"It read again the first {scored['candidates']} entries that {scored['first_search']} found.")
    print_findings([finding for test in tests.values() for finding in test.get("findings", [])])
    opened = max(test.get("opened") or 1 for test in tests.values())
    if opened > 1:
        print_text(f"The test split has been opened {opened} times: do not choose between models by this score.")


def _read_columns(columns: Sequence[str], data: str | None) -> dict[str, str]:
    from finetune.errors import UsageError

    parted = [column.partition("=") for column in columns]
    if wrong := [role for role, sign, name in parted if not (role and sign and name)]:
        raise UsageError(f"--column: must have the form ROLE=NAME, such as label=intent, got {wrong[0]!r}.")
    if parted and data is None:
        raise UsageError("evaluate: --column must come with --data, whose columns it names, got none. Leave it out.")
    return {role: name for role, _, name in parted}


def _score_run(
    run: str | None, data: str | None, columns: Mapping[str, str], task: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    from finetune.errors import UsageError
    from finetune.runner import evaluate

    if run is None:
        raise UsageError("evaluate: must get a RUN or --model, got neither. Write: finetune evaluate runs/NAME")
    for name in filter(options.get, options):
        raise UsageError(f"evaluate: {name} must come with --model, got a run, which knows its own. Leave it out.")
    return evaluate(run, data, task, columns)


def _score_model(
    run: str | None,
    model: str,
    data: str | None,
    columns: Mapping[str, str],
    task: str | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    from finetune.artifact.score_model import score_model
    from finetune.errors import UsageError

    if run is not None:
        raise UsageError(f"evaluate: must get a RUN or --model, got both: {run} and {model}. Leave one out.")
    if data is None:
        raise UsageError("evaluate: --model must come with --data, got none. Add --data CARD, or a file.")
    labels = options["--labels"]
    return score_model(
        model,
        data,
        columns=columns,
        task=task,
        labels=labels.split(",") if labels else None,
        knowledge=options["--knowledge"],
        prompt=options["--prompt"],
    )
