"""What people get wrong with language tasks, end to end: the exit code, the words, and that nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune

SIZE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SCRATCH = {"base": "scratch", "max_length": 32, "scratch": {"tokenizer": "characters"} | SIZE}
Write = Callable[..., Path]


def merge(*parts: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries key by key."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            merged[key] = merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


@pytest.fixture
def write(write_recipe: Write, tmp_path: Path) -> Write:
    """A function (kind, **changes) -> a recipe of a language task from scratch, on rows of text and label."""

    def call(kind: str, **changes: Any) -> Path:
        return write_recipe(tmp_path / "in", **merge(build_changes(kind), changes))

    return call


def build_changes(kind: str) -> dict[str, Any]:
    """What makes the recipe of a language task from scratch of the usual one; labels are the targets."""
    labels = ["negative", "neutral", "positive"] if kind == "text_classification" else None
    columns = {"target": "label"} if kind == "seq2seq" else {}
    return {
        "model": SCRATCH,
        "adapter": {"method": "full"},
        "tasks": {"tone": {"type": kind, "labels": labels, "columns": columns}},
        "train": {"epochs": 1, "max_steps": 2},
        "evaluate": {"baselines": [], "samples": 1, "generate": {"beams": 1, "max_new_tokens": 4}},
    }


@pytest.fixture
def refuse(command: Callable[..., Any], tmp_path: Path) -> Callable[..., None]:
    """Checks and runs a recipe that must be refused: with this code and these words, and nothing written."""

    def call(path: Path, code: int, words: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        for verb, options in (("check", []), ("run", ["--runs", tmp_path / "results"])):
            done = command(verb, path, *options)
            assert (done.code, done.out) == (code, ""), done.err
            assert words in done.err
            assert "Traceback" not in done.err
            assert done.err.startswith("finetune: ")
            assert sorted(tmp_path.rglob("*")) == before

    return call


# The recipe

RECIPES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a classifier from scratch": (
        "text_classification",
        {},
        "model.base: must be a pretrained base for text_classification, got 'scratch'. Pretrain one first: "
        "finetune run pretrain_mlm, then set model.base to that run.",
    ),
    "an adapter on random weights": (
        "causal_lm",
        {"adapter": {"method": "lora"}},
        "adapter.method: must be full when model.base is scratch, got 'lora': random weights need training.",
    ),
    "an adapter that should become a base": (
        "masked_lm",
        {"adapter": {"method": "lora"}, "model": {"base": "acme/encoder"}},
        "adapter.method: must be full for masked_lm, got 'lora': what it trains becomes the base of other recipes.",
    ),
    "Hugging Face's class from scratch": (
        "seq2seq",
        {"model": {"architecture": "native"}},
        "model.architecture: must be triad when model.base is scratch, got 'native'.",
    ),
    "heads that do not divide the width": (
        "causal_lm",
        {"model": {"scratch": {"num_attention_heads": 3, "position": "learned"}}},
        "model.scratch: hidden_size (16) must be a multiple of num_attention_heads (3)",
    ),
    "too few tokens for byte pairs": (
        "masked_lm",
        {"model": {"scratch": {"tokenizer": "bpe", "vocab_size": 260}}},
        "model.scratch.vocab_size: must be at least 261 for byte pairs (256 bytes and 5 special tokens), got 260. "
        "Raise it, or set model.scratch.tokenizer: characters.",
    ),
    "early stopping by a score that needs written text": (
        "seq2seq",
        {"train": {"early_stop": {"metric": "bleu"}}},
        "train.early_stop.metric: must be computed while training, got 'bleu'. Use loss.",
    ),
    "a classifier's metric": (
        "causal_lm",
        {"evaluate": {"metrics": ["accuracy"]}},
        "evaluate.metrics: must name metrics out of bits_per_byte, loss, perplexity, token_accuracy, got 'accuracy'. "
        "It is for",
    ),
    "a baseline of another task": (
        "masked_lm",
        {"evaluate": {"baselines": ["ngram"]}},
        "evaluate.baselines: must name baselines out of unigram, got 'ngram'. It is for",
    ),
    "classes": (
        "seq2seq",
        {"tasks": {"tone": {"labels": ["a", "b"]}}},
        "tasks.tone.labels: must be left out for seq2seq, got 2 labels.",
    ),
    "rows of no class": (
        "seq2seq",
        {"tasks": {"tone": {"out_of_scope": "none"}}},
        "tasks.tone.out_of_scope: must be left out for seq2seq, got 'none'.",
    ),
    "so many rows of each class": (
        "causal_lm",
        {"tasks": {"tone": {"split": {"shots": 8}}}},
        "tasks.tone.split.shots: must be left out for causal_lm, which has no classes, got 8.",
    ),
    "rows of a class that should lie together": (
        "masked_lm",
        {"train": {"few_shot": "contrastive"}},
        "train.few_shot: must be none for masked_lm, which has no classes, got 'contrastive'.",
    ),
    "names of classes": (
        "seq2seq",
        {"tasks": {"tone": {"class_names": "rows"}}},
        "tasks.tone.class_names: must be ignore for seq2seq, which has no classes, got 'rows'.",
    ),
    "features of length 1": (
        "causal_lm",
        {"model": {"normalize_features": True}},
        "model.normalize_features: must be false for causal_lm, got true.",
    ),
    "an answerer from scratch": (
        "question_answering",
        {},
        "model.base: must be a pretrained base for question_answering, got 'scratch'. Pretrain one first: "
        "finetune run pretrain_mlm, then set model.base to that run.",
    ),
    "classes of answers": (
        "question_answering",
        {"tasks": {"tone": {"labels": ["a", "b"]}}},
        "tasks.tone.labels: must be left out for question_answering, got 2 labels.",
    ),
    "so many questions of each class": (
        "question_answering",
        {"tasks": {"tone": {"split": {"shots": 8}}}},
        "tasks.tone.split.shots: must be left out for question_answering, which has no classes, got 8.",
    ),
    "cleaned passages": (
        "question_answering",
        {"tasks": {"tone": {"clean": ["html", "urls"]}}},
        "tasks.tone.clean: must be left out for question_answering, got html, urls: an answer is a place in the "
        "passage as it stands.",
    ),
    "windows that hardly move on": (
        "question_answering",
        {"tasks": {"tone": {"stride": 16}}, "model": {"max_length": 32}},
        "tasks.tone.stride: must be below half of model.max_length, 16, got 16.",
    ),
    "windows of a translation": (
        "seq2seq",
        {"tasks": {"tone": {"stride": 4}}},
        "tasks.tone.stride: must be left out for seq2seq, got 4.",
    ),
    "a temperature for answers": (
        "question_answering",
        {"evaluate": {"calibrate": "temperature"}},
        "evaluate.calibrate: must be none for question_answering, got 'temperature'.",
    ),
    "an answerer's baseline for a translation": (
        "seq2seq",
        {"evaluate": {"baselines": ["bm25_sentence"]}},
        "evaluate.baselines: must name baselines out of copy, nearest, got 'bm25_sentence'. "
        "It is for tasks that complete a prompt or tasks that find answers in passages.",
    ),
    "a separator between sentences of a translation": (
        "seq2seq",
        {"tasks": {"tone": {"separator": "\n"}}},
        "tasks.tone.separator: must be left out unless the type is causal_lm, got seq2seq.",
    ),
    "mistakes of typing in a translation": (
        "seq2seq",
        {"tasks": {"tone": {"typos": 0.5}}},
        "tasks.tone.typos: must be 0 for seq2seq, got 0.5.",
    ),
    "changes of the subject in a translation": (
        "seq2seq",
        {"tasks": {"tone": {"subject_changes": 0.5}}},
        "tasks.tone.subject_changes: must be 0 for seq2seq, got 0.5.",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_cannot_be_meant(refuse: Callable[..., None], write: Write, case: str) -> None:
    kind, changes, words = RECIPES[case]
    refuse(write(kind, **changes), 2, words)


# The base


def test_an_encoder_as_base_of_a_language_model(refuse: Callable[..., None], write: Write, tiny_base: Path) -> None:
    words = (
        f"model.base: causal_lm needs a decoder, got {tiny_base}, which is an encoder (bert). "
        "Name another base, or scratch."
    )
    path = write("causal_lm", model={"base": str(tiny_base)}, tasks={"tone": {"separator": "\n"}})
    refuse(path, 2, words)


def test_a_run_that_holds_only_an_adapter_as_base(
    refuse: Callable[..., None], write: Write, finished_run: Path
) -> None:
    words = (
        f"{finished_run / 'model'}: must hold whole weights in model.safetensors, got an adapter alone. "
        "A base for others must be trained with adapter: {method: full}, or pushed with --merge. To train an adapter "
        "on: model.adapters."
    )
    refuse(write("masked_lm", model={"base": str(finished_run)}), 5, words)


def test_a_run_that_is_not_finished_as_base(refuse: Callable[..., None], write: Write, own_run: Path) -> None:
    status = own_run / "status.json"
    status.write_text(status.read_text().replace('"finished"', '"stopped"'))
    words = f"{own_run}: must be a finished run, got one that is stopped. Try: finetune resume {own_run}"
    refuse(write("masked_lm", model={"base": str(own_run)}), 2, words)


def test_an_adapter_on_a_class_without_linear_layers(refuse: Callable[..., None], write: Write, tmp_path: Path) -> None:
    """GPT-2's own class has Conv1D in their place."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from finetune.models.tokenizer import train_tokenizer

    base = tmp_path / "gpt2"
    tokenizer = train_tokenizer(["abc"], "characters", 64, 32, appends_end=False)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    words = (
        "adapter.targets: must be linear layers of the base, got a base without one (GPT-2's own class has another "
        "kind). Set model.architecture: triad, or adapter.method: full."
    )
    model = {"base": str(base), "architecture": "native"}
    refuse(write("causal_lm", model=model, adapter={"method": "loha"}), 2, words)


# The rows


def change_data(path: Path, name: str, content: str) -> Path:
    """The recipe, on another file."""
    (path.parent / name).write_text(content, encoding="utf-8")
    path.write_text(path.read_text().replace("rows.csv", name))
    return path


def test_a_translation_without_its_target_column(refuse: Callable[..., None], write: Write) -> None:
    words = "rows.csv: column 'target' must exist, got columns text, label."
    refuse(write("seq2seq", tasks={"tone": {"columns": {"target": "target"}}}), 3, words)


def test_a_translation_of_a_text_file(refuse: Callable[..., None], write: Write) -> None:
    path = change_data(
        write("seq2seq", tasks={"tone": {"columns": {"target": "target"}}}), "notes.txt", "One.\n\nTwo.\n"
    )
    refuse(path, 3, "notes.txt: column 'target' must exist, got columns text.")


def test_an_empty_translation(refuse: Callable[..., None], write: Write) -> None:
    rows = "text,label\n" + "".join(f"text {i},{'' if i == 3 else f'Text {i}'}\n" for i in range(40))
    words = "target must not be empty, is in 1 row (some:4). Fill or remove them."
    refuse(change_data(write("seq2seq"), "some.csv", rows), 3, words)


@pytest.mark.parametrize(("kind", "content"), [("causal_lm", ""), ("masked_lm", " \n\n\t\n")])
def test_an_empty_text_file(refuse: Callable[..., None], write: Write, kind: str, content: str) -> None:
    refuse(
        change_data(write(kind), "empty.txt", content),
        3,
        "empty.txt: must hold rows, is empty. Write rows into it, or name another file.",
    )


def test_a_text_file_of_one_paragraph(refuse: Callable[..., None], write: Write) -> None:
    words = "split: every split must hold rows, got train "
    refuse(change_data(write("causal_lm"), "one.txt", "A line.\nAnother.\n"), 3, words)


def test_a_split_of_one_token(refuse: Callable[..., None], write: Write) -> None:
    path = write("causal_lm", tasks={"tone": {"separator": "\n", "split": {"by": "order"}}})
    paragraphs = [f"paragraph {i}" for i in range(7)] + ["v", "w", "x"]
    words = "causal_lm: each split must hold at least 2 tokens, got 1. Add text."
    refuse(change_data(path, "short.txt", "\n\n".join(paragraphs)), 3, words)


# Finished runs


@pytest.fixture(scope="module")
def runs(write_recipe: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `causal_lm` and `seq2seq`."""
    folder = tmp_path_factory.mktemp("language")
    for kind in ("causal_lm", "seq2seq"):
        path = write_recipe(folder / kind, **build_changes(kind), name=kind)
        finetune.run(path, runs=folder / "runs", quiet=True)
    return folder / "runs"


def test_labels_from_a_translation(command: Callable[..., Any], runs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nshares fall\n")
    for options in (["shares fall"], ["--input", tmp_path / "a.csv", "--output", tmp_path / "b.csv"]):
        done = command("predict", runs / "seq2seq", *options)
        assert (done.code, done.out) == (2, "")
        assert done.err == "finetune: predict: must get a run that gives labels, got seq2seq. Use finetune generate.\n"
    assert not (tmp_path / "b.csv").exists()


def test_text_from_a_classifier(command: Callable[..., Any], finished_run: Path) -> None:
    done = command("generate", finished_run, "--prompt", "shares")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "finetune: generate: must get a run that writes text (causal_lm, seq2seq, completion), "
        "got text_classification. Use finetune predict.\n"
    )


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_characters_that_were_never_seen_are_read_as_unknown(
    command: Callable[..., Any], runs: Path, kind: str
) -> None:
    prompt = "shares \u4ef7\u683c \N{GRINNING FACE}"
    predictor = finetune.load(runs / kind)
    assert predictor.tokenizer(prompt)["input_ids"].count(predictor.tokenizer.unk_token_id) == 3
    done = command("generate", runs / kind, "--prompt", prompt)
    assert (done.code, done.err) == (0, "")
    (written,) = predictor.generate([prompt])
    assert done.out == (prompt if kind == "causal_lm" else "") + written + "\n"


def test_another_held_out_set_without_targets(command: Callable[..., Any], runs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nshares fall\n")
    done = command("evaluate", runs / "seq2seq", "--data", tmp_path / "a.csv")
    assert (done.code, done.out) == (3, "")
    assert "a.csv: column 'label' must exist, got columns text." in done.err
