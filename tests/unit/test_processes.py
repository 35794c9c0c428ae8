from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from finetune import errors, fitting, worker
from finetune.artifact.run_folder import RunFolder, find_run, load_json
from finetune.errors import DataError, FinetuneError, Interrupted, ResourceError, UsageError
from finetune.runner import resume
from finetune.training import processes
from finetune.training.events import load_events
from finetune.training.processes import (
    STOP_TIMEOUT_SECONDS,
    agree_on,
    is_main_process,
    rebuild_error,
    run_command,
    start_workers,
    world_size,
)

TOLERANCE = 1e-5
# Each of two processes writes what it was told; the second one then fails.
WORKER = """
import json, pathlib, sys
from torch.distributed.launcher.api import LaunchConfig
from finetune.errors import DataError
from finetune.training.processes import agree_on, is_main_process, world_size

def fail():
    raise DataError("rows.csv: must hold rows, got none.")

def crash():
    raise KeyError("lost")

def attempt(compute):
    try:
        return agree_on(compute)
    except Exception as error:
        return [type(error).__name__, str(error)]

asked = []
said = [attempt(lambda: asked.append(1) or "runs/a"), attempt(fail), attempt(crash), attempt(lambda: "runs/b")]
name = "main" if is_main_process() else "other"
patience = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2).shutdown_timeout
found = {"said": said, "asked": asked, "of": world_size(), "patience": patience}
pathlib.Path(sys.argv[1], name).write_text(json.dumps(found))
sys.exit(0 if is_main_process() else 3)
"""


def test_alone_there_is_nothing_to_agree_on():
    assert (world_size(), is_main_process()) == (1, True)
    assert agree_on(lambda: "runs/a") == "runs/a"

    def fail() -> str:
        raise DataError("rows.csv: must hold rows, got none.")

    with pytest.raises(DataError, match="must hold rows"):
        agree_on(fail)


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
)
def test_every_error_is_rebuilt_as_what_it_was(kind):
    rebuilt = rebuild_error(kind.__name__, "line 1\nline 2")
    assert type(rebuilt) is kind
    assert (str(rebuilt), rebuilt.exit_code) == ("line 1\nline 2", kind.exit_code)


@pytest.mark.parametrize("name", ["KeyError", "NoSuchError"])
def test_an_error_of_another_kind_is_a_bug(name):
    assert type(rebuild_error(name, "lost")) is FinetuneError


def test_two_processes_hear_the_same(tmp_path, monkeypatch):
    """A value, an error and a crash of the main process reach the other; nobody waits for ever."""
    (tmp_path / "two_processes_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    code = start_workers("two_processes_worker", [str(tmp_path)], 2)
    assert code != 0  # the second process failed
    main, other = (json.loads((tmp_path / name).read_text()) for name in ("main", "other"))
    refused = ["DataError", "rows.csv: must hold rows, got none."]
    assert main["said"] == ["runs/a", refused, ["KeyError", "'lost'"], "runs/b"]
    assert other["said"] == ["runs/a", refused, ["FinetuneError", "the main process failed: 'lost'"], "runs/b"]
    assert (main["asked"], other["asked"]) == ([1], [])
    assert main["of"] == other["of"] == 2
    assert main["patience"] == STOP_TIMEOUT_SECONDS  # until torchrun kills workers that save


def test_files_of_the_working_folder_stand_in_for_no_library(tmp_path, monkeypatch):
    (tmp_path / "typer.py").write_text("raise SystemExit('the file of the working folder')\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "shadow_worker.py").write_text("import typer\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"), prepend=os.pathsep)
    assert start_workers("shadow_worker", [], 2) == 0
    assert run_command(["recipes", "list", "--json"])[0] == 0


def test_a_signal_that_workers_are_too_young_for_is_a_stop_and_no_failure(tmp_path, monkeypatch):
    script = "import os, signal, sys\nif os.environ['RANK'] == '0':\n    os.kill(int(sys.argv[1]), signal.SIGTERM)\n"
    (tmp_path / "young_worker.py").write_text(f"{script}signal.pause()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert start_workers("young_worker", [str(os.getpid())], 2) == Interrupted.exit_code
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(fitting, "start_workers", lambda *_arguments: Interrupted.exit_code)
    with pytest.raises(Interrupted, match=r"^stopped by a signal\.$"):
        fitting.train_in_workers(folder, 2, quiet=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_error_of_every_process_is_said_once(tmp_path, monkeypatch, capsys, rank):
    """By the command for the main process, by itself for another one."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise ResourceError("memory: lost.")

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(worker, "train", fail)
    assert worker.main(str(tmp_path), "quiet") == ResourceError.exit_code
    told = RunFolder(tmp_path).load_status().get("error")
    assert (told, capsys.readouterr().err) == [("memory: lost.", ""), (None, "finetune: process 1: memory: lost.\n")][
        rank
    ]


@pytest.mark.parametrize("verb", ["run", "resume"])
def test_rows_that_are_compared_are_not_shared_by_processes(
    command, write_recipe, write_support_recipe, tmp_path, verb
):
    recipe = write_support_recipe(tmp_path / "in")
    if verb == "resume":
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir()
        folder.update_status(state="stopped")
        shutil.copy(recipe, folder.recipe)
    done = command(verb, folder.path if verb == "resume" else recipe, "--processes", "2")
    assert done.code == 2
    assert (
        "processes: must be 1 with tasks.answer.type: retrieval, which compares the rows of a batch, got 2: each would "
        "see a part of them. Train in one process."
    ) in done.err
    with pytest.raises(UsageError, match=r"processes: must be 1 with train\.few_shot: contrastive, which compares"):
        finetune.run(write_recipe(tmp_path / "few", train={"few_shot": "contrastive"}), processes=2)


def test_a_command_runs_in_a_process_of_its_own():
    code, out, err = run_command(["recipes", "list", "--json"])
    assert (code, err) == (0, "")
    assert json.loads(out)[0]["name"]
    code, out, err = run_command(["recipes", "show", "nowhere"])
    assert (code, out) == (2, "")
    assert err.startswith("finetune: nowhere: must be a file or the name of a shipped file.")


@pytest.mark.parametrize("received", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ends_well", [True, False])
def test_a_signal_reaches_the_command_and_is_not_forgotten(monkeypatch, tmp_path, received, ends_well):
    """Whatever the command makes of it, its caller hears that it is to stop; then the former handlers are back."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, signal, sys\n"
        f"signal.signal({int(received)}, lambda *_: sys.exit({0 if ends_well else 75}))\n"
        "os.kill(os.getppid(), int(sys.argv[-1]))\n"
        "while True: signal.pause()\n"
    )
    start = subprocess.Popen
    monkeypatch.setattr(
        processes.subprocess,
        "Popen",
        lambda _command, **options: start([sys.executable, str(script), str(int(received))], **options),
    )
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert run_command(["run"])[0] == Interrupted.exit_code
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def load_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "adapter_model.safetensors")


def check_same(run: Path, reference: Path) -> None:
    """The same weights and scores, up to the order in which numbers are added."""
    expected, found = load_weights(reference), load_weights(run)
    assert expected.keys() == found.keys()
    assert max((expected[name] - found[name]).abs().max().item() for name in expected) < TOLERANCE
    scores = [load_json(folder / "evaluation" / "test.json")["metrics"] for folder in (run, reference)]
    for metric, values in scores[1].items():
        assert scores[0][metric] == pytest.approx(values, abs=1e-4), metric


def test_two_processes_train_the_same_model(write_recipe: Callable[..., Path], tmp_path):
    """Also with micro-steps, with batches that do not divide, and where one process has no validation batch."""
    recipe = write_recipe(tmp_path / "in")
    alone = finetune.run(recipe, runs=tmp_path / "alone", quiet=True)
    together = finetune.run(recipe, ["train.micro_steps=2"], processes=2, runs=tmp_path / "together", quiet=True)
    check_same(together.folder.path, alone.folder.path)
    status = together.folder.load_status()
    assert status["training"]["processes"] == 2
    assert (status["state"], status["error"]) == ("finished", None)
    steps = [
        [event["step"] for event in load_events(run.folder.events) if event["event"] == "step"]
        for run in (alone, together)
    ]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_under_torchrun_the_command_trains_in_every_process(write_recipe: Callable[..., Path], tmp_path):
    recipe = write_recipe(tmp_path / "in")
    alone = finetune.run(recipe, runs=tmp_path / "alone", quiet=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "finetune", "run", str(recipe), "--runs", str(tmp_path / "runs"), "--json"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"]["split"] == "test"  # one process prints, the other is silent
    [run] = (tmp_path / "runs" / "tiny").iterdir()
    check_same(run, alone.folder.path)


@pytest.mark.slow
def test_under_torchrun_a_trained_run_is_judged_by_one_process_and_none_waits(write_recipe, tmp_path):
    run = finetune.run(write_recipe(tmp_path / "in"), runs=tmp_path / "runs", quiet=True, open_test=False)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "finetune", "resume", str(run.folder.path), "--json"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert run.folder.load_status()["state"] == "finished"


@pytest.mark.slow
def test_two_processes_train_on_a_base_in_fewer_bits(write_recipe: Callable[..., Path], tmp_path):
    """What is frozen is sent to nobody: no collective knows torchao's tensors."""
    pytest.importorskip("torchao")
    recipe = write_recipe(tmp_path / "in", model={"quantize": "int8"}, train={"max_steps": 4})
    alone = finetune.run(recipe, runs=tmp_path / "alone", quiet=True)
    together = finetune.run(recipe, processes=2, runs=tmp_path / "together", quiet=True)
    check_same(together.folder.path, alone.folder.path)


@pytest.mark.slow
def test_sigterm_stops_all_processes_and_the_run_goes_on(write_recipe: Callable[..., Path], tmp_path):
    # At a higher rate, 40 epochs make a visible difference of the order in which numbers are added.
    recipe = write_recipe(tmp_path / "in", train={"epochs": 40, "early_stop": None, "learning_rate": 0.001})
    alone = finetune.run(recipe, runs=tmp_path / "alone", quiet=True)

    def stop_after_the_first_checkpoint() -> None:
        while not list((tmp_path / "runs").glob("tiny/*/checkpoints/step-*")):
            finished.wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    finished = threading.Event()
    watcher = threading.Thread(target=stop_after_the_first_checkpoint, daemon=True)
    watcher.start()
    with pytest.raises(
        Interrupted, match=r"stopped by SIGTERM after step \d+ of \d+; saved\. Go on with: finetune resume"
    ):
        finetune.run(recipe, processes=2, runs=tmp_path / "runs", quiet=True)
    watcher.join()
    folder = find_run(tmp_path / "runs" / "tiny", finished=False)
    assert folder.load_status()["state"] == "stopped"
    check_same(resume(folder.path, quiet=True).folder.path, alone.folder.path)  # with one process where two began
