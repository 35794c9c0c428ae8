"""The recipes and data cards that come with the toolkit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from finetune.errors import RecipeError
from finetune.recipe.loading import load_recipe
from finetune.recipe.messages import suggest


class _Described(Protocol):
    @property
    def description(self) -> str: ...


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
    return list_files(load_recipe, comparisons=False)


def list_files(load: Callable[[Path], _Described], *, comparisons: bool) -> list[ShippedRecipe]:
    """The shipped recipes, or the comparisons of recipes, which lie among them."""
    found = []
    for name, path in _paths().items():
        if _is_comparison(path) == comparisons:
            description, problem = "", None
            try:
                description = load(path).description
            except RecipeError as error:
                problem = str(error)
            found.append(ShippedRecipe(name, path, description, _is_benchmark(name), problem))
    return found


def find_recipe(name_or_path: str | Path) -> Path:
    """The file that a user means: an existing path, else the name of a shipped recipe.

    Raises:
        RecipeError: neither; lists the names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    paths = _paths()
    name = path.as_posix().removesuffix(".yaml").removeprefix("recipes/")
    if name in paths:
        return paths[name]
    known = f"Shipped: {', '.join(paths)}." if paths else "No recipe is shipped with this installation."
    raise RecipeError(f"{name_or_path}: must be a file or the name of a shipped recipe.{suggest(name, paths)} {known}")


def _is_comparison(path: Path) -> bool:
    """Whether the first key of a file is `compare`."""
    lines = (line for line in path.read_bytes().splitlines() if line.strip() and not line.startswith(b"#"))
    return next(lines, b"").startswith(b"compare:")


def _paths() -> dict[str, Path]:
    folder = shipped_folder("recipes")
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return {name: names[name] for name in sorted(names, key=lambda name: (_is_benchmark(name), name))}


def _is_benchmark(name: str) -> bool:
    return name.startswith("benchmarks/")
