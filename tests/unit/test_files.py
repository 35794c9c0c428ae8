from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from finetune.errors import ResourceError
from finetune.recipe.files import build_disk_error, compute_sha256, sync_path, write_file_atomically


def test_an_atomic_write_makes_and_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    for data in (b"first", b"", b"second \x00\xff"):
        write_file_atomically(path, data)
        assert path.read_bytes() == data
        assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_the_checksum_is_that_of_hashlib_for_a_file_longer_than_a_block(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert compute_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_former_file_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "status.json"
    write_file_atomically(path, b"former")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(ResourceError) as caught:
        write_file_atomically(path, b"x" * 2500)
    message = str(caught.value)
    assert message.startswith(f"{path}: must be written (2.5 kB needed), got 'No space left on device' with ")
    assert message.endswith(" free. Free disk space, or point the run at a larger disk.")
    assert path.read_bytes() == b"former"
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.EACCES, "Give this user the right to write there, or choose another folder."),
        (errno.EROFS, "Give this user the right to write there, or choose another folder."),
        (errno.EDQUOT, "Free disk space, or point the run at a larger disk."),
        (errno.EIO, "Check that the disk is there and in order."),
    ],
)
def test_every_refusal_has_its_fix(tmp_path: Path, number: int, fix: str) -> None:
    error = build_disk_error(
        tmp_path / "absent" / "file", OSError(number, "x"), 3_200_000_000, kept="The rest is there."
    )
    assert f"(3.2 GB needed), got '{os.strerror(number)}' with " in str(error)
    assert str(error).endswith(f" free. The rest is there. {fix}")


def test_a_missing_folder_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="No such file or directory"):
        write_file_atomically(tmp_path / "absent" / "file", b"")


def test_file_systems_without_fsync_of_folders_are_accepted_and_those_without_fsync_of_files_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "file").touch()
    sync_path(tmp_path)
    with pytest.raises(OSError, match="no"):
        sync_path(tmp_path / "file")
