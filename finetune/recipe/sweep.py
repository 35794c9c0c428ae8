"""The schema of a sweep: which values of a recipe are tried, and what they are compared by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from finetune.errors import RecipeError
from finetune.recipe.loading import check_document, load_document, load_recipe, read_document
from finetune.recipe.messages import Problem, find_types, format_problems, show
from finetune.recipe.schema import Name, Recipe, Section
from finetune.recipe.section import raise_all
from finetune.recipe.shipped import ShippedRecipe, find_recipe, list_files

SEARCHED = ("model", "adapter", "train")
"""Sections of a recipe whose keys may be searched."""
FIXED = ("train.seed", "train.early_stop", "train.trackers")
"""Keys in them that may not: the seed deals out the rows, and the rest says how a run is watched."""

Choice = bool | int | float | str | None


class Values(Section):
    """Values of one key: a list, or a range from `low` to `high`, both included."""

    choices: list[Choice] | None = Field(default=None, min_length=2)
    """The values themselves; a list in place of the section says the same."""
    low: float | None = None
    """Smallest value; whole numbers are drawn for a key that holds one."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Draw evenly over orders of magnitude, as learning rates need it."""

    @model_validator(mode="before")
    @classmethod
    def _wrap(cls, values: Any) -> Any:
        return {"choices": values} if isinstance(values, list) else values

    @model_validator(mode="after")
    def _check(self) -> Values:
        problems = []
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                problems.append("choices: must stand alone, got also low, high or log. Remove one.")
        elif self.low is None or self.high is None:
            problems.append("must be a list of values, or a range with low and high. Write {low: 1, high: 8}.")
        elif not self.low < self.high:
            problems.append(f"high: must be above low, got {self.low:g} and {self.high:g}.")
        elif self.log and self.low <= 0:
            problems.append(f"low: must be above 0 when log is true, got {self.low:g}.")
        raise_all(problems)
        return self

    def list_ends(self, whole: bool) -> list[Choice]:
        """The choices, or both ends of the range, as whole numbers where `whole` and where they are."""
        if self.choices is not None:
            return self.choices
        return [int(end) if whole and end.is_integer() else end for end in (self.low, self.high) if end is not None]


class Sweep(Section):
    """A search over values of a recipe."""

    sweep: Literal[1]
    """Schema version."""
    name: Name
    """Names the folder below `runs/`."""
    description: str = ""
    """One line on what is searched."""
    recipe: str = Field(min_length=1)
    """The recipe's file, looked for beside this one too, or the name of a shipped one."""
    metric: str | None = None
    """Metric on validation; default the recipe's `train.early_stop.metric`, else its first of `evaluate.metrics`."""
    trials: int = Field(default=20, ge=1, le=10_000)
    """Values that are tried, pruned trials included."""
    search: dict[str, Values] = Field(min_length=1)
    """Key of the recipe, with dots -> its values."""
    seed: int = Field(default=13, ge=0, lt=2**32)
    """Of the choice of values."""


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> tuple[Sweep, Path]:
    """Read and check a sweep, its recipe, and every value of the search against the recipe's schema.

    Args:
        path: the sweep's file.
        overrides: for the recipe, as `--set` gives them.

    Returns:
        The sweep, and its recipe's file.

    Raises:
        RecipeError: with every problem found, each with its line.
    """
    lines = read_document(path, Sweep)
    if isinstance(lines.values, dict) and "recipe" in lines.values and "sweep" not in lines.values:
        raise RecipeError(
            f"{path}: must be a sweep, got {'a recipe' if 'tasks' in lines.values else 'no key `sweep`'}. Write one: "
            "`sweep: 1`, a `name`, the `recipe`, and `search: {train.learning_rate: {low: 1.0e-4, high: 3.0e-3, log: "
            "true}}`."
        )
    sweep = load_document(path, Sweep)
    beside = path.parent / sweep.recipe
    recipe = beside if beside.is_file() else find_recipe(sweep.recipe)
    load_recipe(recipe, overrides)  # its own problems first, so that what follows is the search's
    problems = [
        Problem(lines.lines.get(("search", key)), ("search", *problem.path), problem.sentence)
        for key, values in sweep.search.items()
        for problem in _check_values(key, values, recipe, overrides)
    ]
    if problems:
        raise RecipeError(format_problems(str(path), problems))
    return sweep, recipe


def is_whole(key: str) -> bool:
    """Whether a key of the recipe holds whole numbers only."""
    types = find_types(tuple(key.split(".")), Recipe)
    return int in types and float not in types


def format_override(key: str, value: Choice) -> str:
    """`key=value` as `--set` takes it; JSON is YAML, and keeps text apart from numbers."""
    return f"{key}={json.dumps(value)}"


def _is_fixed(key: str) -> bool:
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)


def _check_values(key: str, values: Values, recipe: Path, overrides: Sequence[str]) -> list[Problem]:
    path = tuple(key.split("."))
    if path[0] in Recipe.model_fields and (path[0] not in SEARCHED or _is_fixed(key)):
        must = f"must be a key of {', '.join(SEARCHED)}, and none of {', '.join(FIXED)}"
        why = "Scores are compared only on the same rows, and by the same rule."
        return [Problem(None, path, f"{must}, got {show(key)}. {why}")]
    problems: list[Problem] = []
    for value in values.list_ends(is_whole(key)):
        document = read_document(recipe, Recipe, [*overrides, format_override(key, value)])
        check_document(document, Recipe)
        problems += document.problems
    return problems


def list_sweeps() -> list[ShippedRecipe]:
    """Every shipped sweep, as `list_recipes` lists recipes."""
    return list_files(lambda path: load_document(path, Sweep), "sweep")
