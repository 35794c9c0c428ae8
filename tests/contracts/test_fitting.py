"""From a run's folder to its model: in which order, and what is said where the machine has too little."""

from __future__ import annotations

import errno
from typing import Any

import accelerate
import pytest
import torch
from safetensors import SafetensorError

import finetune
from finetune import fitting, runner
from finetune.tasks import TextClassification
from finetune.training import loop

ROWS = 63  # for training: seven tenths of 90


def test_the_head_starts_on_the_device_of_training_and_says_so(write_recipe, tmp_path, monkeypatch, capsys):
    """A pass over all rows: on a GPU it must not be made by the CPU."""
    done: list[str] = []
    build, start = fitting.build_session, TextClassification.start

    def build_and_tell(*arguments: Any) -> Any:
        session = build(*arguments)
        done.append(f"session on {session.accelerator.device}")
        return session

    def start_and_tell(task: Any, model: torch.nn.Module, *arguments: Any) -> None:
        done.append(f"start on {next(model.parameters()).device}")
        start(task, model, *arguments)

    monkeypatch.setattr(fitting, "build_session", build_and_tell)
    monkeypatch.setattr(TextClassification, "start", start_and_tell)
    finetune.run(write_recipe(tmp_path / "in"), ["train.max_steps=1"], runs=tmp_path, open_test=False)
    assert done == ["session on cpu", "start on cpu"]
    assert f"starting the head from {ROWS} rows\n" in capsys.readouterr().err


def fail_by(error: Exception) -> Any:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    return fail


MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.96 GiB.\nOf which")
PLACES = {
    "the model goes to the device": (accelerate.Accelerator, "prepare"),
    "the optimizer steps": (loop, "_update"),
    "validation is scored": (loop, "_evaluate"),
    "the test split is scored": (runner, "assess"),
}


@pytest.mark.parametrize("place", PLACES)
def test_memory_that_runs_out_is_no_bug_wherever_it_does(command, write_recipe, tmp_path, monkeypatch, place):
    path = write_recipe(tmp_path / "in", train={"max_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[place], fail_by(MEMORY))
        done = command("run", path, "--runs", tmp_path)
    (folder,) = (tmp_path / "tiny").iterdir()
    assert done.code == 5
    assert (
        f"{folder}: the model and what is computed with it must fit into memory, got 'CUDA out of memory. Tried to "
        f"allocate 1.96 GiB.'. Free memory and go on with: finetune resume {folder}. Or start a new run with "
        "adapter.method: lora, a lower model.max_length or a smaller base."
    ) in done.err
    assert command("resume", folder).code == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_is_full_when_the_model_is_saved_is_no_bug(command, write_recipe, tmp_path, monkeypatch, error):
    path = write_recipe(tmp_path / "in", train={"max_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "save_model", fail_by(error))
        done = command("run", path, "--runs", tmp_path)
    (folder,) = (tmp_path / "tiny").iterdir()
    assert done.code == 5
    assert ": must be written (" in done.err
    assert "got 'No space left on device' with " in done.err
    assert "Free disk space, or point the run at a larger disk." in done.err
    assert command("resume", folder).code == 0


def test_other_errors_stay_bugs(command, write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "save_model", fail_by(FileNotFoundError(errno.ENOENT, "gone")))
    done = command("run", write_recipe(tmp_path / "in", train={"max_steps": 2}), "--runs", tmp_path)
    assert (done.code, "a bug: FileNotFoundError" in done.err) == (70, True)
