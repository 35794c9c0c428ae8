"""What must hold for every recipe and for every text."""

from __future__ import annotations

import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any, get_args

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from ruamel.yaml import YAML

from finetune.errors import RecipeError
from finetune.recipe import Card, Recipe, TaskSection, dump_recipe, load_document, load_recipe
from finetune.recipe.document import parse_scalar, parse_yaml

# Text that YAML could take for something else.
TRAPS = ["", "no", "on", "yes", "~", "null", "true", "1", "1_000", "2e-5", "0x1F", "0o7", "0b1", ".inf", ".NaN", "- a"]
TRAPS += [
    "a: b",
    "# x",
    "*x",
    "&x",
    "!x",
    "%x",
    "@x",
    "'",
    '"',
    "|",
    ">= 1",
    " a ",
    "a\nb",
    "a\r\n",
    "\t",
    "\x85",
    "\u2028",
]
TRAPS += ["\ufeff", "---", "...", "<<", "=", "12:30", "2026-01-01", "\\", "{a}", "[a]", "?", "\x07", "😀", "é" * 200]

letters = st.characters(min_codepoint=97, max_codepoint=122)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
words = texts | st.sampled_from([trap for trap in TRAPS if trap])
ratios = st.floats(0, 1, exclude_max=True)
positive = st.floats(0, 1e300, exclude_min=True)
shares = st.floats(0.01, 0.49)


def choice(section: type, key: str) -> st.SearchStrategy[Any]:
    annotation: Any = section.model_fields[key].annotation  # type: ignore[attr-defined]  # every Section has fields
    return st.sampled_from(get_args(annotation))


splits = st.one_of(
    st.fixed_dictionaries({"by": st.just("random"), "validation": shares, "test": shares}),
    st.fixed_dictionaries({"by": st.sampled_from(["group", "time"]), "column": words, "test": shares}),
    st.fixed_dictionaries(
        {"by": st.just("given"), "validation": ratios, "leaks": st.sampled_from(["fail", "warn", "drop"])}
    ),
)
tasks = st.fixed_dictionaries(
    {"type": st.just("text_classification"), "data": words},
    optional={
        "columns": st.dictionaries(words, words, max_size=3),
        "labels": st.none()
        | st.lists(words, min_size=2, max_size=5, unique=True)
        | st.lists(words, min_size=2, max_size=5, unique=True).map(lambda keys: {key: f"class {key}" for key in keys}),
        "clean": st.lists(st.sampled_from(["html", "urls"]), max_size=2),
        "split": splits,
    },
)
trains = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(1, 10_000),
        "learning_rate": st.floats(0, 1, exclude_min=True),
        "head_learning_rate": st.none() | st.floats(0, 1, exclude_min=True),
        "warmup_ratio": ratios,
        "clip_norm": positive,
        "checkpoint_seconds": positive,
        "early_stop": st.none() | st.fixed_dictionaries({"metric": words, "patience": st.integers(1, 99)}),
        "seed": st.integers(0, 2**32 - 1),
        "trackers": st.lists(st.sampled_from(["wandb", "trackio"])),
    },
)
evaluates = st.fixed_dictionaries(
    {},
    optional={
        "metrics": st.lists(words, min_size=1, max_size=3),
        "slices": st.lists(words, max_size=3),
        "gates": st.fixed_dictionaries({}, optional={"beats_baselines": st.booleans(), "1": st.just(">= 0.80")}),
    },
)
recipes = st.fixed_dictionaries(
    {"recipe": st.just(1), "name": names, "tasks": st.dictionaries(names, tasks, min_size=1, max_size=1)},
    optional={
        "description": words | st.just(""),
        "model": st.fixed_dictionaries({"base": words, "max_length": st.integers(8, 8192)}),
        "adapter": st.fixed_dictionaries({"alpha": positive, "targets": st.just("attention") | st.lists(words)}),
        "train": trains,
        "evaluate": evaluates,
    },
).map(Recipe.model_validate)


def _load(text: str, schema: Any = Recipe, overrides: tuple[str, ...] = ()) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return load_document(path, schema, overrides)


@given(recipes)
@settings(max_examples=60, deadline=None)
def test_a_dumped_recipe_loads_back_equal(recipe: Recipe) -> None:
    assert _load(dump_recipe(recipe)) == recipe


@given(recipes)
@settings(max_examples=25, deadline=None)
def test_another_reader_of_yaml_1_2_sees_the_same_values(recipe: Recipe) -> None:
    assert YAML(typ="safe", pure=True).load(io.StringIO(dump_recipe(recipe))) == recipe.to_dict()


@pytest.mark.parametrize("trap", [trap for trap in TRAPS if trap])
def test_text_that_looks_like_something_else_survives(trap: str) -> None:
    task = TaskSection(type="text_classification", data=trap, labels={trap: "a", trap + "x": "b"})
    recipe = Recipe(recipe=1, name="x", description=trap, tasks={"t": task})
    assert _load(dump_recipe(recipe)) == recipe


@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_json_scalars_mean_the_same_in_yaml(value: object) -> None:
    text = json.dumps(value)
    read = parse_scalar(text)
    assert read == json.loads(text)
    assert type(read) is type(value)


printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=10)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | printable,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(printable, inner, max_size=4),
    max_leaves=15,
)


@given(json_values)
@settings(deadline=None)
def test_json_is_yaml(value: object) -> None:
    document = parse_yaml(json.dumps(value))
    assert document.problems == []
    assert document.values == value


yaml_characters = st.text(
    st.sampled_from(list("ab1:-[]{},&*!|>'\"%@`#?<=~. \n\t\\uxU\r\x00\x85\u2028\ufeff\ud800")), max_size=40
)


@given(st.text(max_size=60) | yaml_characters)
@example("a: !!python/object/apply:os.system ['true']")
@example("\ud800")
@example("a: &a [*a]")
@example('"\\UFFFFFFFF"')
@settings(max_examples=200, deadline=None)
def test_random_text_gives_a_recipe_error(text: str) -> None:
    for schema in (Recipe, Card):
        with pytest.raises(RecipeError):
            _load(text, schema)


def _outcome(text: str, *overrides: str) -> str:
    """What went wrong, or nothing; any error but RecipeError goes through."""
    try:
        assert isinstance(_load(text, Recipe, overrides), Recipe)
    except RecipeError as error:
        return str(error)
    return ""


JARGON = re.compile(r"Input should|\[key\]|literal\[|list\[str\]|valid (string|integer|dictionary)")


@given(recipes.map(dump_recipe), st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_recipe_gives_a_recipe_or_a_recipe_error(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    until = data.draw(st.integers(at, min(len(text), at + 20)))
    assert "Input should" not in _outcome(text[:at] + data.draw(yaml_characters) + text[until:])


RECIPE = "{recipe: 1, name: x, tasks: {t: {type: text_classification, data: d}}}"
any_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(letters, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(letters, max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(any_values, st.sampled_from(sorted(Recipe.model_fields)), st.data())
@settings(max_examples=100, deadline=None)
def test_a_value_of_any_shape_anywhere_is_refused_in_our_words(value: Any, key: str, data: st.DataObject) -> None:
    inner = sorted(getattr(Recipe.model_fields[key].annotation, "model_fields", {}))
    path = f"{key}.{data.draw(st.sampled_from(inner))}" if inner else key
    message = _outcome(RECIPE, f"{path}={json.dumps(value)}")
    assert not message or "--set" in message
    assert not JARGON.search(message)


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_random_overrides_give_a_recipe_or_a_recipe_error(override: str) -> None:
    message = _outcome(RECIPE, override, f"train.{override}")
    assert not message or "--set" in message


def test_load_recipe_is_load_document_of_recipes(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    assert load_recipe(path) == load_document(path, Recipe)
