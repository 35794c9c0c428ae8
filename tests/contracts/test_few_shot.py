"""Runs on few rows of each class: what they leave, how they resume, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import finetune
from finetune import fitting, runner
from finetune.data.batches import Examples
from finetune.errors import Interrupted
from finetune.models.prediction import compute_logits
from finetune.runner import Run
from finetune.tasks.contrastive import ContrastivePhase

SHOTS = 10
CHANCE = 1 / 3


class PowerCutError(Exception):
    """The process is gone; nothing after this is written."""


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load_events(run: Run, kind: str) -> list[dict[str, Any]]:
    """Events without the clock."""
    events = [json.loads(line) for line in run.folder.events.read_text().splitlines()]
    return [
        {name: value for name, value in event.items() if name not in ("time", "seconds")}
        for event in events
        if event["event"] == kind
    ]


def read_weights(run: Run) -> bytes:
    return next(run.folder.model.glob("*.safetensors")).read_bytes()


@pytest.fixture(scope="module")
def recipe(write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("few") / "in",
        tasks={"tone": {"split": {"shots": SHOTS, "validation": 0.2, "test": 0.4}}},
        train={"few_shot": "contrastive", "epochs": 8, "tokens_per_batch": 128, "early_stop": {"patience": 9}},
    )


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune.run(recipe, runs=tmp_path_factory.mktemp("runs"), quiet=True)


def test_a_run_learns_and_says_how(whole: Run) -> None:
    test, status = whole.test, load_json(whole.folder.path / "status.json")
    assert test["rows"] == 36
    assert test["metrics"]["accuracy"]["value"] > CHANCE + 0.2
    assert status["training"]["rows"] == 3 * SHOTS
    assert load_events(whole, "head_fitted") == [{"event": "head_fitted", "few_shot": "contrastive", "rows": 30}]
    steps = load_events(whole, "step")
    first, last = (np.mean([step["loss"] for step in steps if step["epoch"] == epoch]) for epoch in (0, 7))
    assert last < 0.9 * first
    report = (whole.folder.evaluation / "report.html").read_text(encoding="utf-8")
    assert "a contrastive loss on the base, then a head by logistic regression" in report
    assert "by random, at most 10 rows of a class" in report
    card = whole.folder.card.read_text(encoding="utf-8")
    assert "by a contrastive loss on few rows (arXiv:2209.11055)" in card
    assert "at most 10 rows of a class, 30 rows for training" in card


def test_the_saved_model_is_the_one_that_validation_chose(whole: Run) -> None:
    best = load_json(whole.folder.path / "status.json")["training"]["best_step"]
    (scores,) = [event["metrics"] for event in load_events(whole, "evaluation") if event["step"] == best]
    examples = Examples.load(whole.folder.examples("validation"))
    logits = torch.from_numpy(compute_logits(whole.load().model, examples, None))
    labels = torch.from_numpy(examples.labels)
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(scores["loss"], rel=1e-4)
    assert (logits.argmax(1) == labels).double().mean().item() == pytest.approx(scores["accuracy"])


@pytest.mark.parametrize("adapter", ["adapter.init=default", "adapter.init=eva", "adapter={method: full}"])
def test_an_interrupted_run_ends_with_the_same_bits(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    """Stopped in the first epoch, and cut off after the head was fitted, before anything was saved."""
    monkeypatch.setattr(runner, "assess", lambda *_arguments: {"tone": {"gates": {}}})
    overrides = [adapter, "model.dropout=0.1", "train.epochs=2", "train.early_stop=null"]
    uninterrupted = finetune.run(recipe, overrides, runs=tmp_path, quiet=True)
    compute, calls = ContrastivePhase.compute_losses, 0

    def compute_until(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(*arguments)

    def cut_power(*_arguments: Any) -> None:
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(ContrastivePhase, "compute_losses", compute_until)
        with pytest.raises(Interrupted):
            finetune.run(recipe, overrides, runs=tmp_path, quiet=True)
        (folder,) = set((tmp_path / "tiny").iterdir()) - {uninterrupted.folder.path}
        patch.setattr(fitting, "save_model", cut_power)
        with pytest.raises(PowerCutError):
            finetune.resume(folder, quiet=True)
    resumed = finetune.resume(folder, quiet=True)
    assert len(load_events(resumed, "resumed")) == 2
    for event in ("step", "evaluation"):
        assert load_events(resumed, event) == load_events(uninterrupted, event)
    assert read_weights(resumed) == read_weights(uninterrupted)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "adapter={method: head}",
            "adapter.method: must change the base when train.few_shot is contrastive, got 'head'.",
        ),
        (
            "tasks.tone.split.shots=1",
            "tasks.tone.split.shots: must be at least 2 when train.few_shot is contrastive, which compares the rows of "
            "a batch, got 1.",
        ),
        (
            "model={architecture: native, normalize_features: true}",
            "model.normalize_features: must be false when model.architecture is native, got true: the family's own "
            "class reads its features as they are.",
        ),
        (
            "train.micro_steps=2",
            "train.micro_steps: must be 1 when train.few_shot is contrastive, which compares the rows of a batch, "
            "got 2.",
        ),
        (
            "train.label_smoothing=0.1",
            "train.label_smoothing: must be 0 when train.few_shot is contrastive, which compares the rows of a "
            "batch, got 0.1.",
        ),
    ],
)
def test_what_cannot_go_together(command: Callable[..., Any], recipe: Path, override: str, words: str) -> None:
    done = command("check", recipe, "--set", override)
    assert (done.code, done.out) == (2, ""), done.err
    assert words in done.err


def test_a_class_of_one_row_is_refused_before_training(
    command: Callable[..., Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        tasks={"tone": {"labels": ["negative", "neutral", "positive", "odd"], "split": {"shots": 4}}},
        train={"few_shot": "contrastive"},
    )
    with (tmp_path / "rows.csv").open("a", encoding="utf-8") as file:
        file.writelines(f"strange news of day {word},odd\n" for word in ("one", "two", "three"))
    done = command("run", recipe, "--runs", tmp_path / "runs")
    assert done.code == 3
    assert "train: every class must have at least 2 rows for train.few_shot: contrastive, got 1 of 'odd'." in done.err
    assert not (tmp_path / "runs").exists()


def test_names_of_classes_are_rows_of_train_alone(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"negative": "bad_news", "neutral": "neutral", "positive": "good_news"}
    recipe = write_recipe(
        tmp_path,
        tasks={"tone": {"labels": labels, "class_names": "rows", "split": {"shots": 2}}},
        train={"max_steps": 1},
    )
    monkeypatch.setattr(runner, "assess", lambda *_arguments: {"tone": {"gates": {}}})
    run = finetune.run(recipe, runs=tmp_path / "runs", quiet=True)
    (ids,) = load_json(run.folder.data / "ids.json").values()
    assert ids["train"][-3:] == ["class:1", "class:2", "class:3"]
    assert {name: len(rows) for name, rows in ids.items()} == {"train": 9, "validation": 6, "test": 18}
    examples = Examples.load(run.folder.examples("train"))
    assert examples.labels[-3:].tolist() == [0, 1, 2]
    tokenizer = AutoTokenizer.from_pretrained(run.folder.model)
    texts = [tokenizer.decode(examples.input_ids[start:]) for start in examples.starts[-4:-1]]
    assert texts[0].startswith("[CLS] bad news [SEP]"), texts
