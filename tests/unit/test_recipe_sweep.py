"""A sweep's file: every value is checked against the recipe before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe import find_recipe, list_recipes
from finetune.recipe.sweep import Sweep, format_override, is_whole, load_sweep

HEAD = "sweep: 1\nname: s\nrecipe: sentiment\nsearch:\n"


def load(tmp_path: Path, text: str) -> Sweep:
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return load_sweep(path)[0]


def test_the_shipped_sweep_loads_and_is_no_recipe() -> None:
    path = find_recipe("sweep_sentiment", "sweep")
    section, recipe = load_sweep(path)
    assert recipe == find_recipe("sentiment")
    assert section.name == path.stem
    assert "sweep_sentiment" not in [one.name for one in list_recipes()]
    with pytest.raises(RecipeError, match=r"must be a sweep, got a recipe\. Try: finetune run sentiment$"):
        find_recipe("sentiment", "sweep")
    with pytest.raises(RecipeError, match=r"must be a file or the name of a shipped sweep\. Shipped: sweep_sentiment"):
        find_recipe("nothing", "sweep")


def test_a_recipe_beside_the_sweep_goes_first(tmp_path) -> None:
    mine = tmp_path / "sentiment"
    mine.write_bytes(find_recipe("sentiment").read_bytes())
    (tmp_path / "s.yaml").write_text(HEAD + "  adapter.rank: [4, 8]\n")
    assert load_sweep(tmp_path / "s.yaml")[1] == mine


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("train.lerning_rate: [1, 2]", "search.train.lerning_rate: unknown key. Did you mean 'learning_rate'?"),
        ("learning_rate: [1.0e-3, 1.0e-4]", "search.learning_rate: unknown key. Did you mean 'train.learning_rate'?"),
        ("train.epochs: [0, 2]", "search.train.epochs: must be at least 1, got 0."),
        ("train.epochs: {low: 1.5, high: 4}", "search.train.epochs: must be a whole number, got 1.5."),
        ("adapter.rank: {low: 4, high: 2000}", "search.adapter.rank: must be at most 1024, got 2000."),
        (
            "adapter.method: [lora, loraa]",
            "adapter, bitfit, got 'loraa'. Did you mean 'lora'?",
        ),
        ("adapter.rank: [4]", "search.adapter.rank.choices: must have at least 2 entries, got 1."),
        ("adapter.rank: {low: 4}", "search.adapter.rank: must be a list of values, or a range with low and high."),
        ("adapter.rank: {low: 8, high: 4}", "search.adapter.rank.high: must be above low, got 8 and 4."),
        ("adapter.rank: {low: 4, hihg: 8}", "search.adapter.rank.hihg: unknown key. Did you mean 'high'?"),
        ("adapter.rank: {low: 4, high: 8, choices: [1, 2]}", "search.adapter.rank.choices: must stand alone, got also"),
        ("train.weight_decay: {low: 0, high: 1, log: true}", "low: must be above 0 when log is true, got 0."),
        ("train.seed: [1, 2]", "must be a key of model, adapter, train, and none of train.seed, train.early_stop, "),
        ("train.early_stop.patience: [1, 2]", "got 'train.early_stop.patience'. Scores are compared only on the same"),
        ("evaluate.metrics: [a, b]", "search.evaluate.metrics: must be a key of model, adapter, train, and none of"),
        ("tasks.sentiment.data: [a, b]", "search.tasks.sentiment.data: must be a key of model, adapter, train, and"),
        ("model.base: [scratch, x]", "must be a pretrained base for text_classification, got 'scratch'."),
    ],
)
def test_every_value_is_held_against_the_recipe(tmp_path, line, sentence) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, HEAD + f"  train.clip_norm: [0.5, 1]\n  {line}\n")
    message = str(caught.value)
    assert sentence in message
    assert "\n  line 6  search." in message
    assert "train.clip_norm" not in message.replace("Known here", "")


def test_all_problems_are_reported_at_once(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"s\.yaml: 3 problems\n  line 5 .*\n  line 6 .*\n  line 6 "):
        load(tmp_path, HEAD + "  train.epochs: [0, 2]\n  adapter.rank: [0, 2000]\n")


def test_a_recipe_in_place_of_a_sweep_is_told_what_a_sweep_is() -> None:
    with pytest.raises(RecipeError, match=r"must be a sweep, got a recipe\. Try: finetune run "):
        load_sweep(find_recipe("sentiment"))


def test_the_type_of_a_key_says_what_is_drawn() -> None:
    assert is_whole("adapter.rank")
    assert is_whole("train.max_steps")
    assert not is_whole("adapter.alpha")
    assert not is_whole("train.head_learning_rate")
    assert not is_whole("adapter.method")


@pytest.mark.parametrize("value", [0.00031, 1e-05, 3, "no", "1e-3", None, True, "a: b"])
def test_a_value_survives_as_an_override(value) -> None:
    from finetune.recipe.document import parse_yaml

    key, _, text = format_override("train.x", value).partition("=")
    read = parse_yaml(text).values
    assert (key, read, type(read)) == ("train.x", value, type(value))
