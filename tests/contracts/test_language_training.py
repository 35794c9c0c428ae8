"""How runs of the language tasks train: stopped and resumed, in small batches, packed and padded, and as a base."""

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

import finetune
from finetune import fitting, runner
from finetune.data.batches import Examples
from finetune.errors import Interrupted
from finetune.recipe import load_recipe
from finetune.runner import Run
from finetune.tasks import TASKS, language

KINDS = ["causal_lm", "masked_lm", "seq2seq"]
Train = Callable[..., Run]


class PowerCutError(Exception):
    """The process is gone; nothing after this is written."""


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def cut_power() -> None:
    raise PowerCutError


def load_events(run: Run, kind: str) -> list[dict[str, Any]]:
    """Events without the clock."""
    events = [json.loads(line) for line in run.folder.events.read_text().splitlines()]
    return [
        {name: value for name, value in event.items() if name not in ("time", "seconds")}
        for event in events
        if event["event"] == kind
    ]


def read_weights(run: Run) -> bytes:
    return (run.folder.model / "model.safetensors").read_bytes()


@pytest.fixture
def train(write_language_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """A function (kind, *changes) -> a run that is trained in two epochs, and not judged."""
    monkeypatch.setattr(runner, "assess", lambda *_arguments: {"one": {"gates": {}}})

    def call(kind: str, *changes: dict[str, Any]) -> Run:
        recipe = write_language_recipe(tmp_path / "in", kind, {"train": {"epochs": 2}}, *changes)
        return finetune.run(recipe, runs=tmp_path / "runs", quiet=True)

    return call


# Stopped


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_with_the_same_bits(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Stopped in the first epoch, and cut off in the last; dropout and hidden tokens do not notice."""
    whole = train(kind)
    (steps,) = {event["step"] for event in load_events(whole, "step")[-1:]}
    compute, calls = TASKS[kind].compute_losses, 0
    actions = {2: stop, steps - 1: cut_power}

    def compute_until(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        actions.get(calls, int)()
        return compute(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TASKS[kind], "compute_losses", compute_until)
        with pytest.raises(Interrupted, match=rf"^stopped by SIGTERM after step 2 of {steps}; saved\. Go on with: "):
            train(kind)
        (folder,) = set((tmp_path / "runs" / kind).iterdir()) - {whole.folder.path}
        torch.manual_seed(99)
        with pytest.raises(PowerCutError):
            finetune.resume(folder, quiet=True)
    torch.manual_seed(99)
    resumed = finetune.resume(folder, quiet=True)
    assert [event["step"] for event in load_events(resumed, "resumed")] == [2, steps // 2]
    for event in ("step", "evaluation"):
        assert load_events(resumed, event) == load_events(whole, event)
    assert read_weights(resumed) == read_weights(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_max_steps_ends_with_an_evaluation(train: Train, kind: str) -> None:
    plain, short = train(kind), train(kind, {"train": {"max_steps": 3}})
    steps = load_events(short, "step")
    assert [event["step"] for event in steps] == [1, 2, 3] != [event["step"] for event in load_events(plain, "step")]
    assert [event["step"] for event in load_events(short, "evaluation")] == [3]
    assert short.folder.load_status()["training"]["steps"] == 3
    rates = [event["learning_rate"] for event in steps]
    assert rates == [rates[0], rates[0], rates[0] / 2], "up in one step, and down to the end that was set"
    assert finetune.check(short.folder.path.parents[2] / "in" / "recipe.yaml")["steps"] == 3


# Batches

# Every step sees all rows, with one rate: a run of so many steps is the beginning of any longer one.
AT_ONCE = {
    "epochs": 30,
    "tokens_per_batch": 100_000,
    "schedule": "constant",
    "warmup_ratio": 0.0,
    "ema_decay": None,
    "early_stop": None,
}


def compute_losses(run: Run) -> tuple[list[float], list[int]]:
    """Loss of each train row as Hugging Face's classes compute it, one row at a time, and how many tokens it has."""
    model, examples = finetune.load(run.folder.model).model, Examples.load(run.folder.examples("train"))
    sources, targets = language.list_tokens(examples.input_ids, examples.starts), language.list_targets(examples)
    losses = []
    for source, target in zip(sources, targets, strict=True):
        if run.task_type == "causal_lm":  # the model moves labels itself, and takes one token more to do so
            source = target = np.append(source, target[-1])
        ids, labels = (torch.from_numpy(tokens.astype(np.int64))[None] for tokens in (source, target))
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    return losses, [len(target) for target in targets]


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_the_loss_is_the_mean_over_tokens_however_a_batch_is_cut(train: Train, kind: str) -> None:
    # Two long blocks and a short one.
    model = {"dropout": 0.0, "max_length": 900 if kind == "causal_lm" else 40}
    run = train(kind, {"model": model, "train": AT_ONCE | {"max_steps": 12}})
    losses, tokens = compute_losses(run)
    expected = np.average(losses, weights=tokens)
    assert abs(np.mean(losses) - expected) > 1e-3, "else the mean over rows would do"
    found = {
        micro_steps: load_events(
            train(kind, {"model": model, "train": AT_ONCE | {"max_steps": 14, "micro_steps": micro_steps}}), "step"
        )
        for micro_steps in (1, 3)
    }
    for events in found.values():
        assert events[12]["loss"] == pytest.approx(expected, abs=1e-4)
    for name in ("loss", "grad_norm"):
        whole, parts = ([event[name] for event in found[micro_steps]] for micro_steps in (1, 3))
        assert parts == pytest.approx(whole, rel=1e-3)


def test_packed_blocks_train_as_padded_ones(train: Train, tiny_gpt2: Path) -> None:
    """Triad packs blocks end to end; GPT-2's own class pads them."""
    runs = {}
    for architecture in ("triad", "native"):
        model = {"base": str(tiny_gpt2), "architecture": architecture, "dropout": 0.0}
        changes = {"model": model, "adapter": {"method": "full"}, "train": {"max_steps": 6, "evaluations_per_epoch": 3}}
        runs[architecture] = train("causal_lm", changes)
    packed, padded = runs["triad"], runs["native"]
    assert [type(finetune.load(run.folder.model).model).__name__ for run in (packed, padded)] == [
        *("TriadForCausalLM", "GPT2LMHeadModel")
    ]
    for kind in ("step", "evaluation"):
        losses, expected = (
            [event.get("metrics", event)["loss"] for event in load_events(run, kind)] for run in (packed, padded)
        )
        assert losses == pytest.approx(expected, abs=1e-4)
        assert len(losses) > 1
        assert losses[0] - losses[-1] > 0.01


# A base for other recipes


@pytest.mark.parametrize(("base", "pooling"), [("scratch", "mean"), ("BERT", "pooler")])
def test_a_masked_language_model_is_a_base(
    write_language_recipe: Callable[..., Path],
    write_recipe: Callable[..., Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    pooling: str,
) -> None:
    changes = {"train": {"max_steps": 4}, "model": {} if base == "scratch" else {"base": str(tiny_base)}}
    masked = finetune.run(
        write_language_recipe(tmp_path / "pretrain", "masked_lm", changes), runs=tmp_path / "runs", quiet=True
    )
    seen: list[Any] = []
    attach = fitting.attach_adapter

    def watch(model: Any, *arguments: Any) -> Any:
        seen.append((model.config.pooling, {name: tensor.clone() for name, tensor in model.model.state_dict().items()}))
        return attach(model, *arguments)

    monkeypatch.setattr(fitting, "attach_adapter", watch)
    monkeypatch.chdir(tmp_path)
    run = finetune.run(write_recipe(tmp_path / "in", model={"base": "runs/masked_lm"}), quiet=True)
    assert load_recipe(run.folder.recipe).model.base == str(masked.folder.model.resolve())

    ((found, weights),) = seen
    assert found == pooling
    expected = masked.load().model.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items() if "pooler" not in name)
    assert {name for name in weights if "pooler" not in name} == expected.keys()
    assert run.load().predict(["shares fall"])[0].label in run.test["labels"]
    assert run.evaluate()["opened"] == 2
