"""Files that are no recipe, problems all at once, overrides, and the way back to YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RecipeError
from finetune.recipe import Recipe, dump_recipe, load_document, load_recipe, recipe_json_schema
from finetune.recipe.loading import MAX_BYTES

RECIPE = """\
# A comment
recipe: 1
name: tone
tasks:
  sentiment:
    type: text_classification
    data: headlines
train:
  epochs: 3
  early_stop: null
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


def _message(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(str(path), "x.yaml")


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_read_and_defaults_are_filled_in(path: Path) -> None:
    recipe = load_recipe(path)
    assert list(recipe.tasks) == ["sentiment"]
    assert recipe.tasks["sentiment"].data == "headlines"
    assert recipe.train.epochs == 3
    assert recipe.train.early_stop is None
    assert recipe.adapter.method == "lora"


def test_all_problems_come_at_once_in_the_order_of_their_lines(path: Path) -> None:
    text = RECIPE.replace("text_classification", "text_clasification").replace(
        "epochs: 3", "epochs: 0\n  lerning_rate: 2"
    )
    assert _message(_write(path, text), "adapter.rank=0") == (
        "x.yaml: 4 problems\n"
        "  line 6   tasks.sentiment.type: must be one of text_classification, causal_lm, masked_lm, seq2seq, "
        "completion, retrieval, reranking, question_answering, recommendation, got 'text_clasification'."
        " Did you mean 'text_classification'?\n"
        "  line 9   train.epochs: must be at least 1, got 0.\n"
        "  line 10  train.lerning_rate: unknown key. Did you mean 'learning_rate'?\n"
        "  --set    adapter.rank: must be at least 1, got 0."
    )


def test_one_problem_is_not_a_plural(path: Path) -> None:
    assert _message(_write(path, RECIPE + "x: 1\n")).startswith("x.yaml: 1 problem\n  line 11  x: unknown key.")


def test_duplicates_and_tags_come_together_with_wrong_values(path: Path) -> None:
    message = _message(_write(path, RECIPE + "name: !x again\nmodel: {base: 3}\n"))
    assert message == (
        "x.yaml: 3 problems\n"
        "  line 11  name: must be given once, is on lines 3 and 11. Remove one.\n"
        "  line 11  name: must not have a tag, got '!x'. Files are data, not code: remove the tag.\n"
        "  line 12  model.base: must be text, got 3. Put it in quotes."
    )


def test_a_missing_key_points_at_its_parent(path: Path) -> None:
    assert _message(_write(path, RECIPE.replace("    data: headlines\n", ""))) == (
        "x.yaml: 1 problem\n  line 5  tasks.sentiment.data: must be given. A card in the catalog or the samples, a "
        "path (file or folder of splits), or `hub:org/name@revision` (of several configurations one: "
        "`hub:org/name:config@revision`). A relative path leads from the recipe's folder, or, where nothing lies "
        "there, from the working folder."
    )
    assert "  line 2  name: must be given. Names the run's folder." in _message(
        _write(path, RECIPE.replace("name: tone\n", ""))
    )


def test_many_problems_are_cut(path: Path) -> None:
    message = _message(_write(path, RECIPE + "".join(f"x{n}: 1\n" for n in range(60))))
    assert message.startswith("x.yaml: 60 problems\n")
    assert message.endswith("\n  and 10 more")
    assert len(message.splitlines()) == 52


def test_a_long_value_is_cut(path: Path) -> None:
    message = _message(_write(path, RECIPE.replace("epochs: 3", "epochs: " + "a" * 5000)))
    assert "train.epochs: must be a whole number, got 'aaa" in message
    assert len(message) < 300


# Files that hold no keys at all


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "no.yaml"
    assert _message(path) == "x.yaml: the file must exist. Check the path."


def test_a_folder(tmp_path: Path) -> None:
    assert _message(tmp_path).endswith(": must be a YAML file, is a folder.")


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(RecipeError, match="the file must be readable, got: "):
        load_recipe(Path("x\0.yaml"))


def test_a_file_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "open", refuse)
    assert _message(path) == "x.yaml: the file must be readable, got: [Errno 13] Permission denied."


NO_KEYS = "the file must hold keys and values, such as `recipe: ...`, got"
COPY = "Start from a copy: finetune recipes copy sentiment mine.yaml"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xef\xbb\xbfname: x", "the file must not begin with a byte order mark. Save it as UTF-8 without BOM."),
        (b"name: x\nb: \0", "the file must be text, got a NUL byte on line 2. Save it as UTF-8."),
        (b"name: x\nb: caf\xe9\n", "the file must be UTF-8, got byte 0xe9 on line 2. Save it as UTF-8."),
        ("name: é".encode("utf-16"), "the file must be text, got a NUL byte on line 1. Save it as UTF-8."),
        (b"#" * (MAX_BYTES + 1), "the file must be at most 1,000,000 bytes. Is it a YAML file?"),
        (b"", f"{NO_KEYS} an empty file. {COPY}"),
        (b"# nothing\n", f"{NO_KEYS} an empty file. {COPY}"),
        (b"- a\n- b\n", f"{NO_KEYS} ['a', 'b']. {COPY}"),
        (b"text", f"{NO_KEYS} 'text'. {COPY}"),
    ],
)
def test_files_that_hold_no_recipe(path: Path, content: bytes, sentence: str) -> None:
    path.write_bytes(content)
    assert _message(path) == f"x.yaml: {sentence}"


def test_text_that_is_not_yaml_is_one_problem(path: Path) -> None:
    assert _message(_write(path, "a: 1\nb: [1"), "train.epochs=0") == (
        "x.yaml: 1 problem\n  line 2  is not YAML: a comma or ']' is missing."
    )


def test_a_pickle_is_refused_and_does_not_run(path: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path.write_bytes(b"cos\nmkdir\n(S'" + str(witness).encode() + b"'\ntR.")
    _message(path)
    _write(path, RECIPE + f'description: !!python/object/apply:os.mkdir ["{witness}"]\n')
    assert "must not have a tag, got '!!python/object/apply:os.mkdir'." in _message(path)
    assert not witness.exists()


# Overrides


def test_overrides_change_values_and_make_sections(path: Path) -> None:
    recipe = load_recipe(
        path,
        [
            "train.epochs=1",
            "train.epochs=2",
            "train.learning_rate=2e-5",
            "adapter.rank=4",
            "evaluate.metrics=[macro_f1]",
            "evaluate.gates.macro_f1=>= 0.8",
            "tasks.sentiment.data=./my data.csv",
            "tasks.sentiment.labels={0: bad, 1: good}",
            "description=no",
        ],
    )
    assert recipe.train.epochs == 2
    assert recipe.train.learning_rate == 2e-5
    assert recipe.adapter.rank == 4
    assert recipe.evaluate.metrics == ["macro_f1"]
    assert recipe.evaluate.gates == {"macro_f1": ">= 0.8"}
    assert recipe.tasks["sentiment"].data == "./my data.csv"
    assert recipe.tasks["sentiment"].labels == {"0": "bad", "1": "good"}
    assert recipe.description == "no"


def test_an_override_fills_a_section_that_is_null(path: Path) -> None:
    early_stop = load_recipe(path, ["train.early_stop.patience=5"]).train.early_stop
    assert early_stop is not None
    assert early_stop.patience == 5
    assert load_recipe(path, ["train.early_stop={}", "train.early_stop=null"]).train.early_stop is None


def test_a_task_with_dots_in_its_name_can_be_overridden(path: Path) -> None:
    _write(path, RECIPE.replace("  sentiment:", "  v1.0:"))
    assert load_recipe(path, ["tasks.v1.0.data=x.csv"]).tasks["v1.0"].data == "x.csv"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.epochs", "must have the form key=value, such as train.epochs=1, got 'train.epochs'."),
        ("=1", "must have the form key=value, such as train.epochs=1, got '=1'."),
        ("train.epochs=0", "train.epochs: must be at least 1, got 0."),
        ("train.epochs=four", "train.epochs: must be a whole number, got 'four'."),
        ("train.epochs=", "train.epochs: must be a whole number, got nothing. Give it a value or remove the key."),
        ("train.epoch=1", "train.epoch: unknown key. Did you mean 'epochs'?"),
        ("trian.epochs=1", "trian: unknown key. Did you mean 'train'?"),
        ("train.epochs.x=1", "train.epochs: must be a section to set 'x' in it, got 3."),
        ("train.epochs=[1", "train.epochs: is not YAML: a comma or ']' is missing."),
        ("hub.repo=!!python/name:os.system x", "hub.repo: must not have a tag, got '!!python/name:os.system'."),
        ("hub={repo: 1}", "hub.repo: must be text, got 1. Put it in quotes."),
        ("tasks..data=x", "tasks.'': the key must be 1 to 64 letters"),
    ],
)
def test_problems_of_overrides_are_shown_as_set(path: Path, override: str, sentence: str) -> None:
    places = [line.split(maxsplit=1) for line in _message(path, override).splitlines()[1:]]
    assert [place for place, _ in places if place != "--set"] == []
    assert any(problem.startswith(sentence) for _, problem in places)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["tasks.other={type: causal_lm, data: x}", "evaluate.calibrate=none"],
            "tasks.other.type: must be text_classification, retrieval or reranking where a recipe has several tasks, "
            "got causal_lm. Give it a recipe of its own.",
        ),
        (
            ["tasks.other={type: text_classification, data: x}", "model.architecture=native"],
            "model.architecture: must be triad for several tasks, got native: Hugging Face's own classes have one "
            "head.",
        ),
        (
            ["tasks.other={type: text_classification, data: x}", "model.normalize_features=true"],
            "model.normalize_features: must be false for several tasks, got true.",
        ),
        (
            ["tasks.other={type: text_classification, data: x}", "train.few_shot=contrastive"],
            "train.few_shot: must be none for several tasks, got 'contrastive'.",
        ),
        (
            ["tasks.other={type: text_classification, data: x}", "evaluate.gates={ohter.accuracy: '> 0.5'}"],
            "evaluate.gates.ohter.accuracy: must begin with a task of this recipe (sentiment, other) and a dot.",
        ),
    ],
)
def test_what_several_tasks_cannot_share_is_refused(path: Path, overrides: list[str], problem: str) -> None:
    assert problem in _message(path, *overrides)


def test_features_that_cosines_shaped_have_length_1(path: Path) -> None:
    assert not load_recipe(path).model.normalize_features
    assert load_recipe(path, ["train.few_shot=contrastive"]).model.normalize_features
    overrides = ["train.few_shot=contrastive", "model.architecture=native"]
    assert not load_recipe(path, overrides).model.normalize_features
    overrides = ["train.few_shot=contrastive", "model.normalize_features=false"]
    assert not load_recipe(path, overrides).model.normalize_features


def test_a_gate_is_for_every_task_or_for_one(path: Path) -> None:
    gates = "evaluate.gates={accuracy: '> 0.5', other.macro_f1: '> 0.4'}"
    recipe = load_recipe(path, ["tasks.other={type: text_classification, data: x}", gates])
    assert recipe.evaluate_for("sentiment").gates == {"accuracy": "> 0.5"}
    assert recipe.evaluate_for("other").gates == {"accuracy": "> 0.5", "macro_f1": "> 0.4"}


def test_a_value_in_the_file_that_an_override_replaces_is_not_a_problem(path: Path) -> None:
    _write(path, RECIPE.replace("epochs: 3", "epochs: four"))
    assert load_recipe(path, ["train.epochs=1"]).train.epochs == 1


# The way back


def test_a_dump_names_every_key_and_loads_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    text = dump_recipe(recipe)
    assert text.startswith("recipe: 1\nname: tone\n")
    assert "  column: null\n" in text
    assert load_recipe(_write(tmp_path / "resolved.yaml", text)) == recipe
    assert load_document(tmp_path / "resolved.yaml", Recipe) == recipe


def test_the_json_schema_describes_every_key_and_refuses_others() -> None:
    schema = recipe_json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "finetune recipe"
    sections = [schema, *schema["$defs"].values()]
    assert [section["additionalProperties"] for section in sections] == [False] * len(sections)
    undescribed = [
        f"{section['title']}.{key}"
        for section in sections
        for key, value in section["properties"].items()
        if not value.get("description") and not schema["$defs"][value["$ref"].split("/")[-1]]["description"]
    ]
    assert undescribed == []
    assert schema["required"] == ["recipe", "name", "tasks"]


def test_the_head_alone_needs_a_task_with_one(path: Path) -> None:
    overrides = ["tasks.sentiment.type=causal_lm", "adapter={method: head}"]
    problem = "adapter.method: must change the base for causal_lm, got 'head': the task has no head of its own."
    assert problem in _message(path, *overrides)
