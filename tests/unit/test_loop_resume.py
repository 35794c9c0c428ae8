"""Stopped at any step, by a signal, a crash, a full disk or a flipped bit: resumed runs end with the same bits."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.errors import CheckpointError, Interrupted, ResourceError
from finetune.training import checkpoint
from finetune.training.checkpoint import load_checkpoint
from finetune.training.events import load_events
from finetune.training.session import load_weights

DROPOUT = 0.3
# With 40 tokens a step an epoch has 7 steps: evaluations, and with them checkpoints, after 4, 7, 11 and 14.
SETTINGS = {
    "epochs": 2,
    "evaluations_per_epoch": 2,
    "early_stop": {"metric": "macro_f1", "patience": 9},
    "ema_decay": 0.9,
}
STEPS, EVALUATIONS = 14, [4, 7, 11, 14]


class PowerCutError(Exception):
    """The process is gone; nothing after this is written."""


def act_at(step: int, action: Callable[[], Any], training: Any) -> Callable[..., torch.Tensor]:
    """`compute_losses` that does something during one optimizer step (there is one micro-step in each)."""
    count = 0

    def compute(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == step:
            action()
        return training.task.compute_losses(model, batch, 0.0)

    return compute


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def cut_power() -> None:
    raise PowerCutError


def flip_bit(path: Path, position: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def load_step_events(training: Any, run: str, kind: str = "step") -> list[dict[str, Any]]:
    """Events without the clock."""
    events = load_events(training.root / run / "events.jsonl")
    return [
        {name: value for name, value in event.items() if name not in ("time", "seconds")}
        for event in events
        if event["event"] == kind
    ]


@pytest.fixture
def uninterrupted(training, tiny_classifier):
    """State and weights of a run that nothing disturbed."""
    state, weights = training.fit(tiny_classifier(dropout=DROPOUT), run="uninterrupted", **SETTINGS)
    assert state.step == STEPS
    assert [event["step"] for event in load_step_events(training, "uninterrupted", "evaluation")] == EVALUATIONS
    return state, weights


@pytest.fixture
def finish_and_compare(training, tiny_classifier, uninterrupted):
    """A function that resumes the run "run" in a new model and holds everything against the undisturbed run."""

    def finish(seed: int = 99) -> None:
        # Other weights to begin with: everything must come from the checkpoint.
        state, weights = training.fit(tiny_classifier(dropout=DROPOUT, seed=seed), run="run", **SETTINGS)
        expected_state, expected = uninterrupted
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor), name
        assert (state.step, state.best_step, state.best_value) == (
            expected_state.step,
            expected_state.best_step,
            expected_state.best_value,
        )
        for kind in ("step", "evaluation"):
            assert load_step_events(training, "run", kind) == load_step_events(training, "uninterrupted", kind)

    return finish


@pytest.mark.parametrize("step", [1, 4, 5, 7, 8, 14])
def test_sigterm_ends_after_the_step_and_resumes_bit_for_bit(training, tiny_classifier, finish_and_compare, step):
    problem = training.build_problem(compute_losses=act_at(step, send(signal.SIGTERM), training))
    with pytest.raises(Interrupted, match=rf"^stopped by SIGTERM after step {step} of 14; saved\.$") as caught:
        training.fit(tiny_classifier(dropout=DROPOUT), problem, **SETTINGS)
    assert caught.value.exit_code == 75
    assert load_checkpoint(training.root / "run" / "checkpoints").step == step
    assert [event["step"] for event in load_step_events(training, "run")] == list(range(1, step + 1))
    finish_and_compare()


def test_ctrl_c_is_a_request_too(training, tiny_classifier, finish_and_compare):
    problem = training.build_problem(compute_losses=act_at(3, send(signal.SIGINT), training))
    with pytest.raises(Interrupted, match=r"^stopped by SIGINT after step 3 of 14; saved\.$"):
        training.fit(tiny_classifier(dropout=DROPOUT), problem, **SETTINGS)
    finish_and_compare()


@pytest.mark.parametrize(("step", "saved"), [(2, None), (4, None), (5, 4), (6, 4), (8, 7), (14, 11)])
def test_a_crash_resumes_bit_for_bit_from_the_last_checkpoint(
    training, tiny_classifier, finish_and_compare, step, saved
):
    problem = training.build_problem(compute_losses=act_at(step, cut_power, training))
    with pytest.raises(PowerCutError):
        training.fit(tiny_classifier(dropout=DROPOUT), problem, **SETTINGS)
    finish_and_compare(seed=99 if saved else 0)
    assert [event["step"] for event in load_step_events(training, "run", "resumed")] == ([saved] if saved else [])


def test_stopped_again_and_again(training, tiny_classifier, finish_and_compare):
    """Every session does two steps."""
    for seed, step in enumerate(range(2, STEPS, 2)):
        problem = training.build_problem(compute_losses=act_at(2, send(signal.SIGTERM), training))
        with pytest.raises(Interrupted, match=f"after step {step} of 14"):
            training.fit(tiny_classifier(dropout=DROPOUT, seed=seed), problem, **SETTINGS)
    finish_and_compare()
    assert len(load_step_events(training, "run", "resumed")) == 6


def test_a_finished_run_resumes_to_the_same_weights(training, tiny_classifier, finish_and_compare):
    training.fit(tiny_classifier(dropout=DROPOUT), **SETTINGS)
    finish_and_compare()


def test_a_run_that_stopped_early_does_not_go_on(training, tiny_classifier):
    scores = iter([0.9, 0.1, 0.1, 0.1, 0.1, 0.1])
    problem = training.build_problem(compute_metrics=lambda _logits, _references: {"macro_f1": next(scores)})
    settings = {"epochs": 4, "early_stop": {"metric": "macro_f1", "patience": 1}}
    state, weights = training.fit(tiny_classifier(), problem, **settings)
    assert state.stopped_early
    again, same = training.fit(tiny_classifier(seed=99), problem, **settings)
    assert again == state
    assert all(torch.equal(weights[name], same[name]) for name in weights)


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "optimizer.safetensors", "average.safetensors", "state.json", "manifest.json"],
)
def test_a_flipped_bit_costs_some_steps_and_nothing_else(training, tiny_classifier, finish_and_compare, file):
    problem = training.build_problem(compute_losses=act_at(9, send(signal.SIGTERM), training))
    with pytest.raises(Interrupted):
        training.fit(tiny_classifier(dropout=DROPOUT), problem, **SETTINGS)
    checkpoints = training.root / "run" / "checkpoints"
    flip_bit(checkpoints / "step-00000009" / file)
    finish_and_compare()
    skipped = load_step_events(training, "run", "checkpoint_skipped")
    assert len(skipped) == 1
    assert skipped[0]["reason"].startswith("step-00000009: ")
    assert "(kept as quarantine-step-00000009)" in skipped[0]["reason"]
    assert [event["step"] for event in load_step_events(training, "run", "resumed")] == [7]
    assert (checkpoints / "quarantine-step-00000009").is_dir()


def test_every_checkpoint_damaged_is_an_error_and_no_silent_restart(training, tiny_classifier):
    training.fit(tiny_classifier(), **SETTINGS)
    checkpoints = training.root / "run" / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("step-*"))
    for name in names:
        flip_bit(checkpoints / name / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        training.fit(tiny_classifier(), **SETTINGS)
    assert "at least one checkpoint must verify, got" in str(caught.value)
    assert all(f"{name}: model.safetensors must have sha256" in str(caught.value) for name in names)
    assert str(caught.value).endswith("Nothing was deleted. Start the run again.")


def test_a_full_disk_stops_training_and_keeps_the_last_checkpoint(
    training, tiny_classifier, finish_and_compare, monkeypatch
):
    """The second checkpoint does not fit; later there is room again."""
    save_file, calls = checkpoint.save_file, 0

    def refuse(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:  # model, optimizer and average of the first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", refuse)
        with pytest.raises(ResourceError) as caught:
            training.fit(tiny_classifier(dropout=DROPOUT), **SETTINGS)
    assert "step-00000007: must be written (" in str(caught.value)
    assert "got 'No space left on device'" in str(caught.value)
    assert "The last good checkpoint, step-00000004, is intact: resume from it afterwards." in str(caught.value)
    assert load_checkpoint(training.root / "run" / "checkpoints").step == 4
    finish_and_compare()


@pytest.mark.parametrize(("saved_steps", "wanted"), [(4, 1), (1, 4)])
def test_smaller_micro_batches_are_remembered_and_obeyed(training, tiny_classifier, saved_steps, wanted):
    """A resumed run does not run out of memory once more: neither where it found out, nor where its recipe says so."""
    problem = training.build_problem(compute_losses=act_at(5, send(signal.SIGTERM), training))
    with pytest.raises(Interrupted):
        training.fit(tiny_classifier(), problem, micro_steps=1)
    path = training.root / "run" / "checkpoints"
    saved = load_checkpoint(path)
    checkpoint.save_checkpoint(path, saved.step, saved.tensors, {**saved.state, "micro_steps": saved_steps})
    sizes: list[int] = []

    def watch(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(batch["labels"]))
        return training.task.compute_losses(model, batch, 0.0)

    state, _ = training.fit(tiny_classifier(), training.build_problem(compute_losses=watch), micro_steps=wanted)
    assert state.micro_steps == 4
    assert len(sizes) == 4 * (STEPS - 5)


def test_another_model_is_refused():
    trained = {"a.weight": nn.Parameter(torch.zeros(2)), "b.weight": nn.Parameter(torch.zeros(2))}
    with pytest.raises(CheckpointError) as caught:
        load_weights(trained, {"a.weight": torch.ones(2), "c.weight": torch.ones(2)})
    assert str(caught.value) == (
        "checkpoint: must hold the weights that this recipe trains, got a difference in 2 of them, such as b.weight. "
        "Resume with the recipe that the run was started with."
    )
    assert torch.equal(trained["a.weight"], torch.zeros(2))
