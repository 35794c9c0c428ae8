"""The file of a comparison: what it may hold, and every mistake with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RecipeError
from finetune.recipe import load_recipe
from finetune.recipe.adapter import ADAPTER_KEYS
from finetune.recipe.comparison import load_comparison
from finetune.recipe.loading import build_recipe, read_document
from finetune.recipe.schema import Recipe

GOOD = """\
compare: 1
name: tones
recipe: recipe.yaml
set: {train.epochs: 2}
seeds: [13, 17]
learning_rates: {default: [3.0e-4, 1.0e-3], full: [1.0e-5, 1.0e-4]}
reference: full
candidates:
  lora: {adapter.method: lora}
  full:
    adapter.method: full
    train.epochs: 3
"""


@pytest.fixture
def write(tmp_path: Path, write_recipe: Any) -> Any:
    write_recipe(tmp_path)

    def write(text: str = GOOD, **changes: str) -> Path:
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "compare.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refuse(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_comparison(path)
    return str(caught.value)


def test_a_trial_is_the_recipe_with_the_changes_of_all_and_its_own(write: Any) -> None:
    loaded = load_comparison(write())
    trial = loaded.build_trial("full", 1e-5, 17)
    expected = load_recipe(loaded.recipe_path).to_dict()
    expected["name"] = "full-1e-05-17"
    expected["adapter"]["method"] = "full"
    expected["train"] |= {"epochs": 3, "learning_rate": 1e-5, "seed": 17}
    assert trial.recipe == Recipe.model_validate(expected)
    assert loaded.build_trial("lora", 3e-4, 13).recipe.train.epochs == 2
    assert loaded.section.list_rates("lora") == [3e-4, 1e-3]
    assert loaded.section.list_rates("full") == [1e-5, 1e-4]


def test_overrides_on_the_command_line_give_the_same_recipe(write: Any) -> None:
    text = GOOD.replace(
        "set: {train.epochs: 2}",
        'set: {train.epochs: 2, adapter.targets: [query, "value"], train.early_stop: null, tasks.tone.clean: [html],\n'
        '  description: "two \\"words\\" and a \\u2028 \\U0001f600 line", hub.private: false,\n'
        "  evaluate.gates: {macro_f1: '>= 0.1'}}",
    )
    loaded = load_comparison(write(text))
    for rate in (1e-5, 0.1):
        trial = loaded.build_trial("lora", rate, 13)
        assert load_recipe(loaded.recipe_path, trial.overrides) == trial.recipe
        assert trial.recipe.train.early_stop is None
        assert trial.recipe.adapter.targets == ["query", "value"]


def test_a_recipe_may_be_a_shipped_one(write: Any) -> None:
    loaded = load_comparison(write(**{"recipe: recipe.yaml": "recipe: sentiment"}))
    assert loaded.recipe_path.name == "sentiment.yaml"
    assert loaded.build_trial("lora", 3e-4, 13).recipe.tasks.keys() == {"sentiment"}


def test_mistakes_in_what_candidates_change_have_the_comparisons_lines(write: Any) -> None:
    path = write(
        **{
            "set: {train.epochs: 2}": "set: {train.epoch: 2}",
            "  lora: {adapter.method: lora}": "  lora: {adapter.method: lor}",
            "    train.epochs: 3": "    train.epochs: 0\n    tasks.tone.split.shuffle: true",
        }
    )
    assert refuse(path) == (
        f"{path}: 4 problems\n"
        "  line 4   set.train.epoch: unknown key. Did you mean 'epochs'?\n"
        f"  line 9   candidates.lora.adapter.method: must be one of {', '.join(ADAPTER_KEYS)}, got 'lor'. Did you mean "
        "'lora'?\n"
        "  line 12  candidates.full.train.epochs: must be at least 1, got 0.\n"
        "  line 13  candidates.full.tasks.tone.split.shuffle: unknown key. "
        "Known here: by, column, validation, test, shots, leaks."
    )


def test_a_change_that_does_not_go_with_the_recipe_has_the_candidates_line(write: Any) -> None:
    path = write(**{"  lora: {adapter.method: lora}": "  lora: {tasks.tone.separator: x, name.first: y}"})
    said = refuse(path)
    assert "line 9  candidates.lora.tasks.tone.separator: must be left out unless the type is causal_lm" in said
    assert "line 9  candidates.lora.name: must be a section to set 'first' in it, got 'tiny'." in said


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "reference: full",
            "reference: ful",
            "reference: must be one of the candidates, got 'ful'. Did you mean 'full'?",
        ),
        ("seeds: [13, 17]", "seeds: [13, 13]", "line 5  seeds: must not repeat a seed, got 13 more than once."),
        ("seeds: [13, 17]", "seeds: []", "line 5  seeds: must have at least 1 entry, got 0."),
        ("full: [1.0e-5", "ful: [1.0e-5", "learning_rates.ful: must be a candidate or `default`. Did you mean 'full'?"),
        (
            "[3.0e-4, 1.0e-3]",
            "[3.0e-4]",
            "must be equally many for each candidate, to be fair, got 1 for default, 2 for",
        ),
        (
            "[3.0e-4, 1.0e-3]",
            "[1e-3, 1e-3]",
            "learning_rates.default: must not repeat a rate, got 0.001 more than once.",
        ),
        ("[3.0e-4, 1.0e-3]", "[0, 1]", "line 6  learning_rates.default[0]: must be above 0, got 0."),
        ("default: [3.0e-4, 1.0e-3], ", "", "learning_rates: must have `default`, or rates for lora."),
        ("train.epochs: 2", "train.seed: 2", "line 4  set.train.seed: must be left to `seeds`, got 2."),
        ("train.epochs: 3", "name: x", "candidates.full.name: must be left to `name`, got 'x'."),
        (
            "train.epochs: 3",
            "train.learning_rate: 1",
            "line 10  candidates.full.train.learning_rate: must be left to `learning_rates`, got 1.",
        ),
        ("  lora:", f"  {'l' * 33}:", f"candidates.{'l' * 33}: the key must be at most 32 characters, got 33."),
        ("  lora: {adapter.method: lora}\n", "", "candidates: must have at least 2 entries, got 1."),
        ("{adapter.method: lora}", "lora", "line 9  candidates.lora: must be a mapping, got 'lora'."),
        ("compare: 1", "compare: 2", "line 1  compare: must be 1, got 2."),
        ("seeds:", "seed:", "line 5  seed: unknown key. Did you mean 'seeds'?"),
        (
            "recipe: recipe.yaml",
            "recipe: sentimnt",
            "line 3  recipe: must be a file or the name of a shipped recipe. Did you mean 'sentiment'?",
        ),
    ],
)
def test_what_a_comparison_may_not_hold(write: Any, old: str, new: str, words: str) -> None:
    said = refuse(write(**{old: new}))
    assert words in said
    assert "compare.yaml: " in said


def test_a_broken_recipe_is_told_about_the_recipe(write: Any, tmp_path: Path) -> None:
    path = write()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 2", "epochs: 0"))
    assert refuse(path).startswith(f"{recipe}: 1 problem\n  line")


def test_each_kind_of_file_names_the_command_of_the_other(write: Any, tmp_path: Path) -> None:
    path = write()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: must be a recipe, got a comparison. Try: finetune compare {path}"
    recipe = tmp_path / "recipe.yaml"
    assert refuse(recipe) == f"{recipe}: must be a comparison, got a recipe. Try: finetune run {recipe}"


def test_building_a_recipe_leaves_the_values_as_they_are(write: Any, tmp_path: Path) -> None:
    values = read_document(tmp_path / "recipe.yaml", Recipe).values
    before = repr(values)
    recipe, problems = build_recipe(values, {"train.epochs": 7, "evaluate.generate.beams": 2})
    assert problems == []
    assert recipe is not None
    assert (recipe.train.epochs, recipe.evaluate.generate.beams) == (7, 2)
    assert repr(values) == before
