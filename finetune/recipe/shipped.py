"""The recipes and data cards that come with the toolkit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from finetune.errors import RecipeError
from finetune.recipe.loading import KINDS, load_recipe
from finetune.recipe.messages import suggest


class _Described(Protocol):
    @property
    def description(self) -> str: ...


Kind = Literal["recipe", "sweep", "compare"]
"""What a file below `recipes/` is; the key that holds its schema version."""

_FIRST_KEY = re.compile(rb"\A(?:[ \t]*(?:#.*)?\r?\n)*(sweep|compare):")


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
    return list_files(load_recipe, "recipe")


def list_files(load: Callable[[Path], _Described], kind: Kind) -> list[ShippedRecipe]:
    """The shipped files of a kind, which lie among those of the others."""
    found = []
    for name, path in _paths(kind).items():
        description, problem = "", None
        try:
            description = load(path).description
        except RecipeError as error:
            problem = str(error)
        found.append(ShippedRecipe(name, path, description, _is_benchmark(name), problem))
    return found


def find_recipe(name_or_path: str | Path, kind: Kind | None = "recipe") -> Path:
    """The file that a user means: an existing path, else the name of a shipped file.

    Args:
        name_or_path: what the user wrote.
        kind: of the shipped files to look among; None for all.

    Raises:
        RecipeError: neither; lists the names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    paths = _paths(kind)
    what = KINDS[kind][0].removeprefix("a ") if kind else "file"
    name = path.as_posix().removesuffix(".yaml").removeprefix("recipes/")
    if name in paths:
        return paths[name]
    if other := _paths(None).get(name):
        is_a, command = KINDS[_read_kind(other)]
        raise RecipeError(f"{name_or_path}: must be a {what}, got {is_a}. Try: {command} {name}")
    known = f"Shipped: {', '.join(paths)}." if paths else f"No {what} is shipped with this installation."
    raise RecipeError(f"{name_or_path}: must be a file or the name of a shipped {what}.{suggest(name, paths)} {known}")


def _paths(kind: Kind | None) -> dict[str, Path]:
    folder = shipped_folder("recipes")
    files = [path for path in folder.rglob("*.yaml") if kind is None or _read_kind(path) == kind]
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    return {name: names[name] for name in sorted(names, key=lambda name: (_is_benchmark(name), name))}


def _read_kind(path: Path) -> str:
    """What a file is, by its first key; a broken one counts as a recipe, and is listed with its problem."""
    other = _FIRST_KEY.match(path.read_bytes())
    return other[1].decode() if other else "recipe"


def _is_benchmark(name: str) -> bool:
    return name.startswith("benchmarks/")
