"""The YAML file of a comparison: one recipe, several candidates that change it, the same seeds and budget for each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finetune.errors import RecipeError
from finetune.recipe.document import Document
from finetune.recipe.loading import build_recipe, load_document, load_recipe, read_document
from finetune.recipe.messages import KeyPath, Problem, format_problems, suggest
from finetune.recipe.schema import Name, Recipe, Section
from finetune.recipe.section import raise_all
from finetune.recipe.shipped import ShippedRecipe, find_recipe, list_files

MAX_NAME = 32
"""Characters of a candidate: with rate and seed behind it, it names a run."""
DEFAULT_RATES = "default"
OWN_KEYS = {"name": "`name`", "train.seed": "`seeds`", "train.learning_rate": "`learning_rates`"}
"""Key of a recipe that a comparison sets -> where it takes the values from."""

Rate = Annotated[float, Field(gt=0, le=1)]
Rates = Annotated[list[Rate], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Comparison(Section):
    """Several ways to tune one model, on the same data, with the same seeds and the same tuning budget."""

    compare: Literal[1]
    """Schema version."""
    name: Name
    """Names the folder of the comparison's runs."""
    description: str = ""
    """One line for `finetune recipes list`."""
    recipe: str = Field(min_length=1)
    """What all candidates share: a file beside this one, or the name of a shipped recipe."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Key of the recipe -> value, for all candidates: `{train.epochs: 10}`."""
    seeds: list[Seed] = Field(default_factory=lambda: [13], min_length=1)
    """Every candidate is trained once with each; the learning rate is chosen with the first."""
    learning_rates: dict[Name, Rates] = Field(min_length=1)
    """Candidate -> rates to choose from on validation, equally many for each; `default` for those not named."""
    reference: str | None = None
    """The candidate whose score is 100 %."""
    candidates: dict[Name, dict[str, Any]] = Field(min_length=2)
    """Name -> what it changes of the recipe: `lora: {adapter.method: lora}`."""

    @model_validator(mode="after")
    def _check(self) -> Comparison:
        problems = [*self._check_rates()]
        for seed in _list_repeated(self.seeds):
            problems.append(f"seeds: must not repeat a seed, got {seed} more than once.")
        for name in self.candidates:
            if len(name) > MAX_NAME:
                problems.append(f"candidates.{name}: the key must be at most {MAX_NAME} characters, got {len(name)}.")
        for section, changes in {"set": self.set, **self._name_candidates()}.items():
            for key in OWN_KEYS.keys() & changes.keys():
                problems.append(f"{section}.{key}: must be left to {OWN_KEYS[key]}, got {changes[key]!r}.")
        if self.reference is not None and self.reference not in self.candidates:
            problems.append(
                f"reference: must be one of the candidates, got {self.reference!r}."
                f"{suggest(self.reference, self.candidates)}"
            )
        raise_all(problems)
        return self

    def list_rates(self, candidate: str) -> list[float]:
        """The rates that a candidate chooses from."""
        return self.learning_rates.get(candidate) or self.learning_rates[DEFAULT_RATES]

    def _check_rates(self) -> list[str]:
        problems = []
        for name, rates in self.learning_rates.items():
            if name not in self.candidates and name != DEFAULT_RATES:
                fix = suggest(name, [*self.candidates, DEFAULT_RATES])
                problems.append(f"learning_rates.{name}: must be a candidate or `{DEFAULT_RATES}`.{fix}")
            for rate in _list_repeated(rates):
                problems.append(f"learning_rates.{name}: must not repeat a rate, got {rate:g} more than once.")
        counts = {name: len(rates) for name, rates in self.learning_rates.items()}
        if len(set(counts.values())) > 1:
            got = ", ".join(f"{count} for {name}" for name, count in counts.items())
            problems.append(f"learning_rates: must be equally many for each candidate, to be fair, got {got}.")
        without = [name for name in self.candidates if name not in self.learning_rates]
        if without and DEFAULT_RATES not in self.learning_rates:
            problems.append(f"learning_rates: must have `{DEFAULT_RATES}`, or rates for {', '.join(without)}.")
        return problems

    def _name_candidates(self) -> dict[str, dict[str, Any]]:
        return {f"candidates.{name}": changes for name, changes in self.candidates.items()}


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    candidate: str
    rate: float
    seed: int
    recipe: Recipe
    """Resolved; its name is that of the run's folder."""
    changes: Mapping[str, Any]
    """Key of the recipe -> value."""

    @property
    def overrides(self) -> list[str]:
        """The changes as `--set` takes them."""
        return [f"{key}={_write_value(value)}" for key, value in self.changes.items()]


@dataclass(frozen=True)
class LoadedComparison:
    """A checked comparison and where it came from."""

    path: Path
    recipe_path: Path
    section: Comparison
    values: Mapping[str, Any]
    """The recipe as it stands in its file."""

    def build_trial(self, candidate: str, rate: float, seed: int) -> Trial:
        """The recipe of one run.

        Raises:
            RecipeError: what the candidate changes does not go with this rate or seed.
        """
        changes = self.list_changes(candidate, rate, seed)
        recipe, problems = build_recipe(dict(self.values), changes)
        if recipe is None:
            raise RecipeError(format_problems(f"{self.path}: {candidate}", problems))
        return Trial(candidate, rate, seed, recipe, changes)

    def list_changes(self, candidate: str, rate: float, seed: int) -> dict[str, Any]:
        """What a run of the candidate changes of the recipe: the comparison's `set`, its own, and its place in both."""
        own = {"name": f"{candidate}-{rate:g}-{seed}", "train.learning_rate": rate, "train.seed": seed}
        # A section that is set as a whole must not take back what was set in it.
        return {**self.section.set, **self.section.candidates[candidate], **own}


def load_comparison(name_or_path: str | Path) -> LoadedComparison:
    """Read a comparison and check the recipe of each of its candidates.

    Raises:
        RecipeError: with every problem found, each with its line.
    """
    path = find_recipe(name_or_path, "compare")
    section = load_document(path, Comparison)
    document = read_document(path, Comparison)
    recipe_path = _find_beside(path, section.recipe, document)
    load_recipe(recipe_path)
    values = read_document(recipe_path, Recipe).values
    loaded = LoadedComparison(path, recipe_path, section, values)
    problems = [problem for name in section.candidates for problem in _check_candidate(loaded, name, document)]
    if problems:
        raise RecipeError(format_problems(str(path), problems))
    return loaded


def list_comparisons() -> list[ShippedRecipe]:
    """Every shipped comparison, as `list_recipes` lists recipes."""
    return list_files(lambda path: load_document(path, Comparison), "compare")


def _find_beside(path: Path, recipe: str, document: Document) -> Path:
    beside = path.parent / recipe
    if beside.is_file():
        return beside
    try:
        return find_recipe(recipe)
    except RecipeError as error:
        problem = Problem(document.lines.get(("recipe",)), ("recipe",), str(error).removeprefix(f"{recipe}: "))
        raise RecipeError(format_problems(str(path), [problem])) from None


def _check_candidate(loaded: LoadedComparison, name: str, document: Document) -> list[Problem]:
    """Problems of a candidate's recipe, at the lines that brought them in."""
    section = loaded.section
    changes = loaded.list_changes(name, section.list_rates(name)[0], section.seeds[0])
    _, found = build_recipe(dict(loaded.values), changes)
    problems = []
    for problem in found:
        key = ".".join(map(str, problem.path))
        own = _find_change(key, section.candidates[name])
        shared = None if own else _find_change(key, section.set)
        place: KeyPath = ("set",) if shared else ("candidates", name)
        line = document.lines.get((*place, own or shared or ""), document.lines.get(place))
        problems.append(Problem(line, (*place, *problem.path), problem.sentence))
    return problems


def _find_change(key: str, changes: Mapping[str, Any]) -> str | None:
    """The change that a key of the recipe comes from."""
    return next((change for change in changes if key == change or key.startswith((f"{change}.", f"{change}["))), None)


def _write_value(value: Any) -> str:
    """A value on one line of YAML: JSON, but for what YAML would take for the end of a line."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)


def _list_repeated(values: Sequence[Any]) -> list[Any]:
    return [value for value, times in Counter(values).items() if times > 1]
