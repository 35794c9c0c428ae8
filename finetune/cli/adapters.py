"""`finetune adapters list`."""

from __future__ import annotations

import typer

from finetune.cli.output import AsJson, print_json, print_table, print_text

app = typer.Typer(help="The ways to tune a model.", no_args_is_help=True)


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
