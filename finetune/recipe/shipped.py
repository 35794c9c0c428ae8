"""The recipes and data cards that come with the toolkit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.errors import RecipeError
from finetune.recipe.loading import load_recipe
from finetune.recipe.messages import suggest

Kind = Literal["recipe", "sweep", "compare"]
"""What a file below `recipes/` is; the key that holds its schema version."""

_OTHER_KINDS = re.compile(rb"^(sweep|compare):", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ShippedRecipe:
    """A recipe as `finetune recipes list` shows it."""

    name: str
    """Path below `recipes/` without `.yaml`: `sentiment`, `benchmarks/sentiment_twitter`."""
    path: Path
    description: str
    """Empty when the file is broken."""
    benchmark: bool
    """True for the recipes on public data sets."""
    problem: str | None = None
    """What is wrong with the file; None when nothing is."""


def shipped_folder(kind: Literal["recipes", "data"]) -> Path:
    """The folder in the installed wheel, else in the repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "shipped" / kind
    return installed if installed.is_dir() else package.parent / kind


def list_recipes() -> list[ShippedRecipe]:
    """Every shipped recipe by name, uses before benchmarks; a broken file is listed with its problem."""
    recipes = []
    for name, path in _paths().items():
        description, problem = "", None
        try:
            description = load_recipe(path).description
        except RecipeError as error:
            problem = str(error)
        recipes.append(ShippedRecipe(name, path, description, _is_benchmark(name), problem))
    return recipes


def find_recipe(name_or_path: str | Path, kind: Kind = "recipe") -> Path:
    """The file that a user means: an existing path, else the name of a shipped recipe, or of another kind of file.

    Raises:
        RecipeError: neither; lists the names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    paths = _paths(kind)
    name = path.as_posix().removesuffix(".yaml").removeprefix("recipes/")
    if name in paths:
        return paths[name]
    known = f"Shipped: {', '.join(paths)}." if paths else f"No {kind} is shipped with this installation."
    raise RecipeError(f"{name_or_path}: must be a file or the name of a shipped {kind}.{suggest(name, paths)} {known}")


def _paths(kind: Kind = "recipe") -> dict[str, Path]:
    folder = shipped_folder("recipes")
    files = [path for path in folder.rglob("*.yaml") if _read_kind(path) == kind]
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    return {name: names[name] for name in sorted(names, key=lambda name: (_is_benchmark(name), name))}


def _read_kind(path: Path) -> str:
    """What a file is, by its first key; a broken one counts as a recipe, and is listed with its problem."""
    other = _OTHER_KINDS.search(path.read_bytes())
    return other[1].decode() if other else "recipe"


def _is_benchmark(name: str) -> bool:
    return name.startswith("benchmarks/")
