"""Every sentence about a wrong value, through the door that a user takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError

from finetune.errors import RecipeError
from finetune.recipe import Recipe, Section, load_recipe
from finetune.recipe.adapter import ADAPTER_KEYS
from finetune.recipe.messages import Problem, explain, format_path, format_problems, show, suggest

TASK = "tasks: {s: {type: text_classification, data: d, %s}}"

METHODS = ", ".join(ADAPTER_KEYS)

CASES: list[tuple[str, str]] = [
    # versions
    ("recipe: 2", "recipe: must be 1, the version this toolkit reads, got 2. Update the toolkit."),
    ("recipe: 0", "recipe: must be 1, the version this toolkit reads, got 0. Write `recipe: 1`."),
    ("recipe: true", "recipe: must be 1, the version this toolkit reads, got True. Write `recipe: 1`."),
    ("recipe: '1'", "recipe: must be 1, the version this toolkit reads, got '1'. Write `recipe: 1`."),
    # numbers
    ("train: {epochs: 0}", "train.epochs: must be at least 1, got 0."),
    ("train: {learning_rate: 0}", "train.learning_rate: must be above 0, got 0."),
    ("train: {learning_rate: 2}", "train.learning_rate: must be at most 1, got 2."),
    ("train: {seed: 9999999999}", "train.seed: must be below 4294967296, got 9999999999."),
    ("train: {warmup_ratio: 1.0}", "train.warmup_ratio: must be below 1, got 1.0."),
    ("train: {epochs: four}", "train.epochs: must be a whole number, got 'four'."),
    ("train: {epochs: 2.5}", "train.epochs: must be a whole number, got 2.5."),
    ("train: {epochs: '4'}", "train.epochs: must be a whole number, got '4'. Write 4."),
    ("train: {epochs: 1_000}", "train.epochs: must be a whole number, got '1_000'. Write 1000."),
    (f"train: {{epochs: '{'9' * 400}'}}", "train.epochs: must be a whole number, got '999"),
    ("train: {epochs: true}", "train.epochs: must be a whole number, got true."),
    ("train: {epochs: }", "train.epochs: must be a whole number, got nothing. Give it a value or remove the key."),
    ("train: {learning_rate: fast}", "train.learning_rate: must be a number, got 'fast'."),
    ("train: {learning_rate: '1e-3'}", "train.learning_rate: must be a number, got '1e-3'. Write 0.001."),
    ("train: {learning_rate: 'nan'}", "train.learning_rate: must be a number, got 'nan'."),
    ("adapter: {alpha: .inf}", "adapter.alpha: must be a finite number, got .inf."),
    ("adapter: {alpha: .nan}", "adapter.alpha: must be a finite number, got .nan."),
    (f"train: {{learning_rate: {'9' * 400}}}", "train.learning_rate: must be a number, got a very large number."),
    # text
    ("name: 5", "name: must be text, got 5. Put it in quotes."),
    (
        "name: a b",
        "name: must be 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit, got 'a b'.",
    ),
    ("model: {base: ''}", "model.base: must be text of 1 or more characters, got ''."),
    ("hub: {repo: x}", "hub.repo: must be `owner/name`, got 'x'."),
    ("train: {early_stop: {metric: null}}", "train.early_stop.metric: must be text, got nothing."),
    # true or false
    ("hub: {private: yes}", "hub.private: must be true or false, got 'yes'. Write true."),
    ("hub: {private: 'off'}", "hub.private: must be true or false, got 'off'. Write false."),
    ("hub: {private: 1}", "hub.private: must be true or false, got 1."),
    # choices
    ("adapter: {method: lor}", f"adapter.method: must be one of {METHODS}, got 'lor'. Did you mean 'lora'?"),
    ("adapter: {method: LoRA}", f"adapter.method: must be one of {METHODS}, got 'LoRA'. Did you mean 'lora'?"),
    ("adapter: {method: x}", f"adapter.method: must be one of {METHODS}, got 'x'."),
    ("model: {architecture: bert}", "model.architecture: must be one of triad, native, got 'bert'."),
    (
        "train: {trackers: [wand]}",
        "train.trackers[0]: must be one of tensorboard, wandb, trackio, got 'wand'. Did you mean",
    ),
    # shapes
    (
        "model: null",
        "model: must be a section with the keys base, adapters, scratch, architecture, quantize, max_length, pooling, ",
    ),
    ("train: [1]", "train: must be a section with the keys epochs, "),
    ("evaluate: {metrics: macro_f1}", "evaluate.metrics: must be a list, got 'macro_f1'. Write [macro_f1]."),
    ("evaluate: {metrics: []}", "evaluate.metrics: must have at least 1 entry, got 0."),
    ("tasks: {}", "tasks: must have at least 1 entry, got 0."),
    ("tasks: {'a b': 1}", "tasks.'a b': the key must be 1 to 64 letters, digits, "),
    (TASK % "columns: [a]", "tasks.s.columns: must be a mapping, got ['a']."),
    (
        TASK % "prompt: {text}",
        'tasks.s.prompt: must be text, got {text: nothing}. Put it in quotes: "{text}"; behind --set, within those of '
        "the shell.",
    ),
    (TASK % "columns: {text: 1}", "tasks.s.columns.text: must be text, got 1. Put it in quotes."),
    # one sentence for values that may have several types
    (
        "adapter: {targets: all-liner}",
        "adapter.targets: must be all-linear, attention or a list of text, got 'all-liner'. Did you mean 'all-linear'?",
    ),
    ("adapter: {targets: 3}", "adapter.targets: must be all-linear, attention or a list of text, got 3."),
    ("adapter: {targets: [query, 3]}", "adapter.targets[1]: must be text, got 3. Put it in quotes."),
    (TASK % "labels: 3", "tasks.s.labels: must be a list of text or a mapping, got 3."),
    (TASK % "labels: {a: 1}", "tasks.s.labels.a: must be text, got 1. Put it in quotes."),
    (TASK % "labels: [a, 2]", "tasks.s.labels[1]: must be text, got 2. Put it in quotes."),
    ("evaluate: {gates: 3}", "evaluate.gates: must be a mapping, got 3."),
    # what validators say
    (TASK % "labels: [a]", "tasks.s.labels: must name at least 2 classes, got ['a']."),
    (TASK % "labels: {a: x, b: x}", "tasks.s.labels: must name at least 2 classes, got ['x']."),
    (TASK % "labels: [a, b, a]", "tasks.s.labels: must not repeat a class, got 'a' more than once."),
    (TASK % "split: {by: group}", "tasks.s.split.column: must name a column when `by` is group, got nothing."),
    (TASK % "split: {column: c}", "tasks.s.split.column: must be left out unless `by` is group or time, got 'c'."),
    (TASK % "split: {validation: 0.5, test: 0.5}", "tasks.s.split: must leave rows for train: validation + test is 1."),
    (TASK % "split: {test: 0}", "tasks.s.split.test: must be above 0, got 0."),
    (TASK % "split: {validation: 0}", "tasks.s.split.validation: must be above 0, got 0."),
    (
        "evaluate: {gates: {macro_f1: 0.8}}",
        'evaluate.gates.macro_f1: must be a condition such as ">= 0.80", got 0.8.',
    ),
    ("evaluate: {gates: {x: 'is 3'}}", "evaluate.gates.x: must be a condition such as \">= 0.80\", got 'is 3'."),
    ("evaluate: {gates: {x: true}}", 'evaluate.gates.x: must be a condition such as ">= 0.80", got True.'),
    (
        "evaluate: {gates: {beats_baselines: yes}}",
        "evaluate.gates.beats_baselines: must be true or false, got 'yes'.",
    ),
    # unknown keys
    ("trian: {}", "trian: unknown key. Did you mean 'train'?"),
    ("epochs: 3", "epochs: unknown key. Did you mean 'train.epochs'?"),
    ("rank: 3", "rank: unknown key. Did you mean 'adapter.rank'?"),
    ("data: x", "data: unknown key. Did you mean 'tasks.<name>.data'?"),
    ("train: {patience: 3}", "train.patience: unknown key. Did you mean 'train.early_stop.patience'?"),
    ("hub: {zzz: 3}", "hub.zzz: unknown key. Known here: repo, private."),
    (TASK % "split: {columns: c}", "tasks.s.split.columns: unknown key. Did you mean 'column'?"),
    # missing keys
    (
        "tasks: {s: {data: d}}",
        "tasks.s.type: must be given, as one of text_classification, causal_lm, masked_lm, seq2seq, completion, "
        "retrieval, reranking, question_answering, recommendation.",
    ),
    ("tasks: {s: {type: text_classification}}", "tasks.s.data: must be given. A card in the catalog or the samples,"),
]


def _problems(text: str, tmp_path: Path) -> list[str]:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return [line.strip().removeprefix("line ") for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(("lines", "sentence"), CASES, ids=[text[:40] for text, _ in CASES])
def test_a_wrong_value_gives_one_sentence(lines: str, sentence: str, tmp_path: Path) -> None:
    key = lines.partition(":")[0]
    others = {"recipe": "recipe: 1", "name": "name: x", "tasks": TASK % ""}
    text = "\n".join([*(line for name, line in others.items() if name != key), lines])
    problems = [line.split("  ", 1)[-1].strip() for line in _problems(text, tmp_path)]
    own = [problem for problem in problems if "'a b'.data" not in problem]
    assert any(problem.startswith(sentence) for problem in own), problems
    if "'a b'" not in lines or key == "name":
        assert len(problems) == 1, problems
    assert not any("Input should" in problem or "[key]" in problem or "literal[" in problem for problem in problems)


def test_a_missing_version_says_what_to_write(tmp_path: Path) -> None:
    assert _problems("name: x\n" + TASK % "", tmp_path)[0].endswith("recipe: must be given. Write `recipe: 1`.")


def test_every_wrong_gate_and_share_is_reported(tmp_path: Path) -> None:
    text = "recipe: 1\nname: x\nevaluate: {gates: {a: 1, b: 2}}\n" + TASK % "split: {by: time, test: 0, validation: 0}"
    problems = _problems(text, tmp_path)
    assert [problem.split()[1] for problem in problems] == [
        "evaluate.gates.a:",
        "evaluate.gates.b:",
        "tasks.s.split.column:",
        "tasks.s.split.validation:",
        "tasks.s.split.test:",
    ]


def test_a_choice_of_several_that_is_missing_is_listed() -> None:
    class Shape(Section):
        kind: Literal["round", "square"]

    with pytest.raises(ValidationError) as caught:
        Shape.model_validate({})
    assert explain(caught.value.errors(), Shape) == [(("kind",), "must be given, as one of round, square.")]


def test_a_list_of_choices_suggests_the_nearest() -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"recipe": 1, "name": "x", "tasks": {}, "evaluate": {"baselines": ["tfidf"]}})
    sentences = dict(explain(caught.value.errors(), Recipe))
    assert sentences["evaluate", "baselines", 0] == (
        "must be one of majority, tfidf_logreg, frozen_logreg, unigram, ngram, copy, nearest, bm25, "
        "frozen, fused, no_answer, bm25_sentence, popular, popular_week, own_history, item_knn, ease, co_occurrence, "
        "got 'tfidf'. Did you mean 'tfidf_logreg'?"
    )


def test_problems_are_sorted_aligned_and_named_once() -> None:
    problems = [
        Problem("--set", ("b",), "must be 2."),
        Problem(12, ("a", "c", 3, "d e"), "must be 1."),
        Problem(None, (), "is not YAML."),
        Problem(3, (), "must be 0."),
        Problem(3, (), "must be 0."),
    ]
    assert format_problems("x.yaml", problems) == (
        "x.yaml: 4 problems\n"
        "  line 3   must be 0.\n"
        "  line 12  a.c[3].'d e': must be 1.\n"
        "  --set    b: must be 2.\n"
        "  file     is not YAML."
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "nothing"),
        (True, "true"),
        (False, "false"),
        (1.0, "1.0"),
        (float("-inf"), "-.inf"),
        ("a'b", '"a\'b"'),
        ({"a": [1, None]}, "{a: [1, nothing]}"),
        (10**300, "a very large number"),
        ("x" * 100, "'" + "x" * 76 + "..."),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"),
    ],
)
def test_values_are_shown_as_yaml_has_them(value: object, shown: str) -> None:
    assert show(value) == shown


def test_suggestions_are_near_or_nothing() -> None:
    assert suggest("epoch", ["epochs", "rank"]) == " Did you mean 'epochs'?"
    assert suggest("zzz", ["epochs", "rank"]) == ""
    assert format_path(()) == ""
