"""Whatever happens to the disk or the process, a complete earlier checkpoint loads, and damage never does."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from finetune.errors import CheckpointError, ResourceError
from finetune.training import checkpoint as module
from finetune.training.checkpoint import has_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def build_tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"layer.weight": torch.randn(16, 16, generator=generator), "scale": torch.tensor(step)},
        "optimizer": {"0.exp_avg": torch.randn(16, 16, generator=generator).bfloat16(), "0.step": torch.tensor(step)},
    }


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, build_tensors(step), {"step": step, "epoch": 1})


def check_loads(folder: Path, *steps: int) -> module.Checkpoint:
    """The newest that loads is one of `steps`, complete and equal to what was saved."""
    loaded = load_checkpoint(folder)
    assert loaded.step in steps
    assert loaded.state == {"step": loaded.step, "epoch": 1}
    expected = build_tensors(loaded.step)
    assert loaded.tensors.keys() == expected.keys()
    for key, group in expected.items():
        assert loaded.tensors[key].keys() == group.keys()
        assert all(torch.equal(loaded.tensors[key][name], tensor) for name, tensor in group.items())
    return loaded


# Damage on the disk


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found_and_the_previous_checkpoint_loads(tmp_path: Path, name: str) -> None:
    original = save(tmp_path / "original", 2).parent
    save(original, 1)
    rng = random.Random(13)
    for trial in range(40):
        folder = tmp_path / str(trial)
        shutil.copytree(original, folder)
        flip_bit(folder / "step-00000002" / name, rng)
        loaded = check_loads(folder, 1)
        assert len(loaded.skipped) == 1
        assert loaded.skipped[0].startswith("step-00000002: ")
        assert loaded.skipped[0].endswith(" (kept as quarantine-step-00000002)")


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "missing state": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "truncated": (lambda path: os.truncate(path / "model.safetensors", 9), " bytes, got 9"),
    "grown": (lambda path: os.truncate(path / "model.safetensors", 2000), " bytes, got 2000"),
    "emptied manifest": (lambda path: os.truncate(path / "manifest.json", 0), "a file must be readable as what it is"),
    "extra file": (lambda path: (path / "more.bin").touch(), "must hold the manifest's files only, got also more.bin"),
    "extra folder": (lambda path: (path / "more").mkdir(), "more must be a plain file, got a link or a folder"),
    "linked file": (lambda path: replace_by_link(path / "state.json"), "state.json must be a plain file"),
    "linked folder": (replace_by_link, "must be a folder of its own, got a link or a file"),
    "a file of that name": (lambda path: (shutil.rmtree(path), path.touch()), "must be a folder of its own"),
    "an empty folder": (lambda path: (shutil.rmtree(path), path.mkdir()), "manifest.json is missing"),
    "name leads outside": (
        lambda path: edit_manifest(path, lambda m: m["files"].update({"../elsewhere": m["files"]["state.json"]})),
        "manifest.json must list plain file names, got '../elsewhere'",
    ),
    "absolute name": (
        lambda path: edit_manifest(path, lambda m: m["files"].update({"/state.json": m["files"]["state.json"]})),
        "manifest.json must list plain file names, got '/state.json'",
    ),
    "other checksum": (
        lambda path: edit_manifest(path, lambda m: m["files"]["state.json"].update(sha256="0" * 64)),
        f"state.json must have sha256 {'0' * 64}, got ",
    ),
    "other step": (lambda path: edit_manifest(path, lambda m: m.update(step=3)), "version 1, step 2 and files"),
    "later version": (lambda path: edit_manifest(path, lambda m: m.update(version=2)), "version 1, step 2 and files"),
    "unlisted file": (
        lambda path: edit_manifest(path, lambda m: m["files"].pop("model.safetensors")),
        "got also model",
    ),
    "no state listed": (
        lambda path: edit_manifest(path, lambda m: m["files"].pop("state.json")),
        "must list state.json",
    ),
    "no files": (lambda path: edit_manifest(path, lambda m: m.pop("files")), "must list state.json among its files"),
    "not an object": (lambda path: (path / "manifest.json").write_text("[]"), "version 1, step 2 and files"),
    "half an entry": (
        lambda path: edit_manifest(path, lambda m: m["files"]["state.json"].pop("bytes")),
        "manifest.json must hold bytes and sha256 of state.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_put_aside_and_the_previous_checkpoint_loads(tmp_path: Path, damage: str) -> None:
    spoil, words = DAMAGES[damage]
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    spoil(save(folder, 2))
    loaded = check_loads(folder, 1)
    assert words in loaded.skipped[0]
    assert os.path.lexists(folder / "quarantine-step-00000002")
    assert words in (folder / "quarantine-step-00000002.txt").read_text()
    assert check_loads(folder, 1).skipped == []


def test_a_checkpoint_with_the_number_of_another_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009")
    assert "step 9 and files" in check_loads(tmp_path, 1).skipped[0]


def test_when_nothing_verifies_every_reason_is_listed_and_nothing_is_lost(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: at least one checkpoint must verify, got 2 damaged:\n"
        "  step-00000002: state.json is missing (kept as quarantine-step-00000002)\n"
        "  step-00000001: state.json is missing (kept as quarantine-step-00000001)\n"
        "Nothing was deleted. Start the run again."
    )
    assert (tmp_path / "quarantine-step-00000001" / "model.safetensors").exists()


def test_a_given_step_that_is_damaged_does_not_become_another(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="the checkpoint of step 2 must verify, got 1 damaged"):
        load_checkpoint(tmp_path, step=2)
    check_loads(tmp_path, 1)


def test_the_same_step_can_be_quarantined_twice(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for _ in range(2):
        (save(tmp_path, 2) / "state.json").unlink()
        check_loads(tmp_path, 1)
    assert {"quarantine-step-00000002", "quarantine-step-00000002-2"} <= {path.name for path in tmp_path.iterdir()}


def test_files_that_verify_but_are_no_safetensors_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", lambda _, path: path.write_bytes(b"nonsense"))
        save(tmp_path, 2)
    assert "a file must be readable as what it is" in check_loads(tmp_path, 1).skipped[0]


def test_a_state_that_is_no_object_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 2, build_tensors(2), [1])  # type: ignore[arg-type]  # what a later version might write
    assert "state.json must hold an object, got list" in check_loads(tmp_path, 1).skipped[0]


# A disk that refuses


class Faults:
    """Counts the calls that reach the disk, and acts at the one with number `at`: before it, or halfway in a write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None], *, lasting: bool) -> None:
        self.calls, self.at, self.act, self.lasting = 0, at, act, lasting
        write_bytes, save_file = Path.write_bytes, module.save_file

        def half_write(path: Path, data: bytes) -> int:
            self.meet(lambda: write_bytes(path, data[: len(data) // 2]))
            return write_bytes(path, data)

        def half_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
            self.meet(lambda: write_bytes(path, b"\x00" * 100), rust=True)
            save_file(tensors, path)

        monkeypatch.setattr(Path, "write_bytes", half_write)
        monkeypatch.setattr(module, "save_file", half_save)
        for name in ("fsync", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self.guard(getattr(os, name)))

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.meet(lambda: None)
            return function(*args, **kwargs)

        return call

    def meet(self, before: Callable[[], object], *, rust: bool = False) -> None:
        self.calls += 1
        if self.calls == self.at or (self.lasting and self.calls > self.at):
            before()
            try:
                self.act()
            except OSError as error:
                if not rust:
                    raise
                words = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise SafetensorError(words) from None


def refuse(number: int) -> Callable[[], None]:
    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def count_calls(folder: Path, prepare: Callable[[Path], object], action: Callable[[Path], object]) -> int:
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, at=0, act=lambda: None, lasting=False)
        action(folder)
    return faults.calls


@pytest.mark.parametrize(
    ("number", "lasting"),
    [(errno.ENOSPC, False), (errno.EROFS, True), (errno.EACCES, True)],
    ids=["once full", "read-only from then on", "closed from then on"],
)
def test_a_disk_that_refuses_at_any_point_leaves_a_checkpoint_and_no_litter(
    tmp_path: Path, number: int, lasting: bool
) -> None:
    points = count_calls(tmp_path / "count", lambda folder: save(folder, 1), lambda folder: save(folder, 2))
    assert points >= 11
    for at in range(1, points + 1):
        folder = tmp_path / str(at)
        save(folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, at, refuse(number), lasting=lasting)
            with pytest.raises(ResourceError) as caught:
                save(folder, 2)
        loaded = check_loads(folder, 1, 2)
        assert loaded.skipped == []
        assert f"The last good checkpoint, {loaded.path.name}, is intact: resume from it" in str(caught.value)
        assert not [path for path in folder.iterdir() if not path.name.startswith("step-")]
        save(folder, 3)
        check_loads(folder, 3)


def test_the_same_holds_when_a_step_is_saved_again(tmp_path: Path) -> None:
    points = count_calls(tmp_path / "count", lambda folder: save(folder, 1), lambda folder: save(folder, 1))
    for at in range(1, points + 1):
        folder = tmp_path / str(at)
        save(folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, at, refuse(errno.ENOSPC), lasting=True)
            with pytest.raises(ResourceError, match="is intact"):
                save(folder, 1)
        check_loads(folder, 1)
        save(folder, 1)
        assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_the_message_of_a_full_disk_says_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1_500_000))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: refuse(errno.ENOSPC)())
        with pytest.raises(ResourceError) as caught:
            save(folder, 1)
        assert "There is no earlier checkpoint." in str(caught.value)
    save(folder, 1)
    monkeypatch.setattr(os, "fsync", lambda _: refuse(errno.ENOSPC)())
    with pytest.raises(ResourceError) as caught:
        save(folder, 2)
    assert str(caught.value) == (
        f"{folder / 'step-00000002'}: must be written (1.6 kB needed), got 'No space left on device' with 1.5 MB free. "
        "The last good checkpoint, step-00000001, is intact: resume from it afterwards. "
        "Free disk space, or point the run at a larger disk."
    )


def test_a_real_refusal_of_the_operating_system_reads_the_same(tmp_path: Path) -> None:
    """The limit on file sizes makes the kernel itself refuse in the middle of a tensor file."""
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"\(100\.0 kB needed\), got 'File too large' with"):
            save_checkpoint(tmp_path, 2, {"model": {"w": torch.ones(25_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_loads(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_an_error_of_safetensors_that_is_not_the_disks_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("something else")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(SafetensorError, match="something else"):
        save(tmp_path, 1)


def test_damage_in_a_folder_that_cannot_be_written_is_skipped_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").unlink()
    monkeypatch.setattr(os, "replace", lambda *_: refuse(errno.EROFS)())
    loaded = check_loads(tmp_path, 1)
    assert loaded.skipped == ["step-00000002: state.json is missing (could not be moved aside: Read-only file system)"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT], ids=errno.errorcode.get)
def test_a_file_that_the_disk_cannot_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    checksum = module.compute_sha256

    def read(path: Path) -> str:
        if path.parent.name == "step-00000002":
            raise OSError(number, os.strerror(number), str(path))
        return checksum(path)

    monkeypatch.setattr(module, "compute_sha256", read)
    assert "every file must be readable" in check_loads(tmp_path, 1).skipped[0]


def test_missing_rights_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)

    def read(file: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(module, "compute_sha256", read)
    with pytest.raises(ResourceError) as caught:
        load_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{path / 'model.safetensors'}: the checkpoint must be readable, got 'Permission denied'. "
        "Give this user the right to read it, or check the disk; then resume again."
    )
    assert path.exists()


def test_pruning_that_the_disk_refuses_says_so_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: refuse(errno.EROFS)())
        with pytest.raises(
            ResourceError, match=r"got 'Read-only file system' with .* Give this user the right to write"
        ):
            prune_checkpoints(tmp_path, 1, None)
    assert load_checkpoint(tmp_path, step=1).step == 1
    check_loads(tmp_path, 2)


# A process that is killed

FORK = multiprocessing.get_context("fork")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(folder: Path, step: int, at: int) -> None:
    Faults(pytest.MonkeyPatch(), at, kill_self, lasting=False)
    save(folder, step)
    prune_checkpoints(folder, 1, None)


@pytest.mark.parametrize("step", [2, 1], ids=["a later step", "the same step again"])
def test_a_kill_at_every_point_of_a_save_leaves_a_complete_checkpoint(tmp_path: Path, step: int) -> None:
    def save_and_prune(folder: Path) -> None:
        save(folder, step)
        prune_checkpoints(folder, 1, None)

    points = count_calls(tmp_path / "count", lambda folder: save(folder, 1), save_and_prune)
    for at in range(1, points + 1):
        folder = tmp_path / str(at)
        save(folder, 1)
        process = FORK.Process(target=save_and_die, args=(folder, step, at))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert has_checkpoint(folder)
        assert check_loads(folder, 1, step).skipped == []
        save_and_prune(folder)
        check_loads(folder, step)
        assert [path.name for path in folder.iterdir()] == [f"step-{step:08d}"]


def save_for_ever(folder: Path, step: int, saved: Connection) -> None:
    while True:
        save(folder, step)
        saved.send(step)
        prune_checkpoints(folder, 2, None)
        step += 1


@pytest.fixture
def idle() -> Iterator[Connection]:
    """A pipe on which nothing ever comes: waiting on it passes a moment."""
    receiver, sender = FORK.Pipe(duplex=False)
    yield receiver
    receiver.close()
    sender.close()


def test_kills_at_random_moments_never_lose_a_checkpoint_that_was_reported_saved(
    tmp_path: Path, idle: Connection
) -> None:
    rng = random.Random(13)
    save(tmp_path, 0)
    newest = 0
    for _ in range(15):
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=save_for_ever, args=(tmp_path, newest + 1, sender))
        process.start()
        sender.close()
        reported = newest
        for _ in range(rng.randrange(3)):
            reported = receiver.recv()
        idle.poll(rng.uniform(0, 0.02))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        while receiver.poll():
            try:
                reported = receiver.recv()
            except EOFError:
                break
        receiver.close()
        loaded = check_loads(tmp_path, reported, reported + 1)
        assert loaded.skipped == []
        newest = loaded.step
    assert newest > 0
    save(tmp_path, newest + 1)
    assert all(path.name.startswith("step-") for path in tmp_path.iterdir())
