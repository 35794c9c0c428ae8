"""`finetune recipes list | show | copy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.output import AsJson, print_json, print_table, print_text

app = typer.Typer(help="The recipes that ship with the toolkit.", no_args_is_help=True)
RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="A name from `finetune recipes list`.")]


@app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """List recipes by use, comparisons of them, and searches over their values."""
    from finetune.recipe import list_recipes
    from finetune.recipe.comparison import list_comparisons
    from finetune.recipe.sweep import list_sweeps

    kinds = {
        "recipe": (list_recipes(), "what it does"),
        "comparison": (list_comparisons(), "what it compares: finetune compare NAME"),
        "sweep": (list_sweeps(), "what it searches: finetune sweep NAME"),
    }
    if as_json:
        listed = [(kind, one) for kind, (found, _) in kinds.items() for one in found]
        print_json([{"name": one.name, "kind": kind, "description": one.description} for kind, one in listed])
        return
    for kind, (found, purpose) in kinds.items():
        print_table([kind, purpose], [[one.name, one.description] for one in found])


@app.command("show")
def show_command(name: RecipeName, as_json: AsJson = False) -> None:
    """Print a recipe."""
    from finetune.recipe import find_recipe

    path = find_recipe(name, None)
    text = path.read_text(encoding="utf-8")
    if as_json:
        print_json({"path": str(path), "text": text})
    else:
        print_text(text.rstrip())


@app.command("copy")
def copy_command(
    name: RecipeName,
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="A file or a folder; with / at its end a new one.")
    ],
    as_json: AsJson = False,
) -> None:
    """Copy a recipe to start from."""
    from finetune.errors import UsageError
    from finetune.recipe import find_recipe
    from finetune.recipe.files import build_disk_error, write_file_atomically

    source = find_recipe(name, None)
    content, target = source.read_bytes(), Path(destination)
    if target.is_dir() or destination.endswith("/"):
        target /= source.name
    if target.exists():
        raise UsageError(f"{target}: must not exist yet, got a file. Choose another name, or remove it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise build_disk_error(target.parent, error, len(content)) from None
    write_file_atomically(target, content)
    if as_json:
        print_json({"path": str(target)})
    else:
        print_text(f"{target}: written. Edit it, then: finetune check {target}")
