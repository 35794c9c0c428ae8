"""`finetune adapters`: list, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.output import AsJson, print_json, print_table, print_text

MUCH = 0.2
"""Relative error of cut updates above which they are no longer the sum."""

app = typer.Typer(help="The ways to tune a model, and saved adapters.", no_args_is_help=True)


@app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """List methods: paper, what each is good for, its keys, and what it can and cannot be combined with."""
    from finetune.adapters.methods import METHODS
    from finetune.recipe.adapter import ADAPTER_KEYS

    if as_json:
        print_json(
            [
                {
                    "method": method.name,
                    "title": method.title,
                    "paper": f"https://arxiv.org/abs/{method.paper}" if method.paper else None,
                    "summary": method.summary,
                    "keys": ADAPTER_KEYS[method.name],
                    "merges": method.merges,
                    "packs": method.packs,
                    "combines": method.limits,
                }
                for method in METHODS.values()
            ]
        )
        return
    print_table(
        ["method", "paper", "merges", "what it is good for", "what it goes with", "keys"],
        [
            [
                method.name,
                f"arXiv:{method.paper}" if method.paper else "",
                "yes" if method.merges else "no",
                method.summary,
                method.limits,
                ", ".join(ADAPTER_KEYS[method.name]),
            ]
            for method in METHODS.values()
        ],
    )
    print_text("In a recipe: adapter: {method: lora, rank: 16}. A key that the method does not read is an error.")


@app.command("merge")
def merge_command(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN=WEIGHT...", help="LoRA runs of one base, each with its weight.")
    ],
    output: Annotated[Path, typer.Option("--output", help="A new folder for the merged model.")],
    rank: Annotated[
        int | None, typer.Option("--rank", help="Cut the sum to this rank; the error is said. Default: exact.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add up the updates of several LoRA runs; the folder is for `finetune predict`."""
    from finetune.artifact.merge import merge_adapters

    merged = merge_adapters(_parse_weights(runs), output, rank=rank)
    if as_json:
        print_json({"output": str(merged.folder), "rank": merged.rank, "error": merged.error})
    else:
        exact = "exact" if rank is None else f"relative error {merged.error:.2%}"
        print_text(f"{merged.folder}: {len(runs)} adapters, rank {merged.rank}, {exact}; not calibrated.")
        if merged.error > MUCH:
            print_text(
                f"  warning: rank {merged.rank} loses {merged.error:.0%} of the sum, so its answers may be other ones. "
                "Raise --rank or leave it out, and score both: finetune evaluate --model FOLDER --data FILE."
            )


def _parse_weights(runs: list[str]) -> dict[str | Path, float]:
    from finetune.errors import UsageError

    weights: dict[str | Path, float] = {}
    for given in runs:
        reference, _, weight = given.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = None
        if not reference or value is None:
            raise UsageError(f"merge: each run must come with its weight, got {given!r}. Write RUN=0.5.")
        if reference in weights:
            raise UsageError(f"merge: each run must be given once, got {reference} twice. Add its weights up.")
        weights[reference] = value
    return weights
