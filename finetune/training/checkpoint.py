"""Checkpoints that survive a crash at any moment and never load damaged.

A checkpoint is a folder `step-00000400` of safetensors files, `state.json` and `manifest.json`, which holds the size
and the SHA-256 of each of the others. It is written under a temporary name, synced and renamed, so that a folder with
its final name is complete; on load every byte is verified, from the newest checkpoint downwards. No pickle.

Other names in the same folder:

    .tmp-*                      an unfinished save or removal; gone with the next save
    former-step-00000400        what a second save of the same step replaces, while it does so
    quarantine-step-00000400    failed to verify; its reason lies beside it in `quarantine-step-00000400.txt`
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.errors import CheckpointError, ResourceError
from finetune.recipe.files import JSON, TEMPORARY_PREFIX, build_disk_error, compute_sha256, find_errno, sync_path

Tensors = Mapping[str, Mapping[str, torch.Tensor]]

_VERSION = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
_SUFFIX = ".safetensors"
_FORMER = "former-"
_QUARANTINE = "quarantine-"
_FOLDER = re.compile(r"(former-)?step-(\d{8,})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_GONE_OR_BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.EIO)


class _Damaged(Exception):  # noqa: N818  (a finding about a folder, which never leaves this module)
    """Why a checkpoint does not verify."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint; the tensors are on the CPU."""

    step: int
    path: Path
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    skipped: list[str] = field(default_factory=list)
    """Newer checkpoints that did not verify: the name, the reason, and where each was put."""


def save_checkpoint(folder: Path, step: int, tensors: Tensors, state: Mapping[str, JSON]) -> Path:
    """Write `folder/step-<step>` so that a crash at any moment leaves it complete or absent.

    Args:
        folder: the run's `checkpoints` folder; made if missing.
        step: optimizer updates so far, at least 0. A second save of the same step replaces the first.
        tensors: one file per key, e.g. model, optimizer, rng; any device, layout and sharing. Tensors that share
            memory are stored once each and load as separate ones.
        state: what else a resume needs, as JSON; lists come back for tuples.

    Returns:
        The checkpoint's folder.

    Raises:
        ResourceError: the disk refused; earlier checkpoints are intact.
        ValueError: a negative step, or a key that cannot be a file or tensor name.
    """
    _check_keys(step, tensors)
    encoded = _encode(state)
    target = folder / f"step-{step:08d}"
    temporary = folder / f"{TEMPORARY_PREFIX}{target.name}"
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_path(folder.parent)
        _remove_leftovers(folder)
        _write(temporary, step, tensors, encoded)
        _publish(temporary, target)
    except OSError as error:
        _remove(temporary)
        needed_bytes = len(encoded) + sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        raise build_disk_error(target, error, needed_bytes, _describe_last_good(folder)) from error
    return target


def load_checkpoint(folder: Path, step: int | None = None) -> Checkpoint:
    """Load the newest checkpoint that verifies; move those that do not aside as `quarantine-*`.

    Call it on one process first: several that find the same damage at once would report it differently.

    Args:
        folder: the run's `checkpoints` folder.
        step: load this step and no other.

    Raises:
        CheckpointError: none verifies; the message lists each with its reason.
        ResourceError: a checkpoint cannot be read for a reason other than damage, such as missing rights.
    """
    skipped: list[str] = []
    try:
        for path, found in _list_candidates(folder):
            if step is not None and found != step:
                continue
            try:
                tensors, state = _load_verified(path)
            except _Damaged as damage:
                skipped.append(f"{path.name}: {damage} ({_quarantine(path, str(damage))})")
            else:
                return Checkpoint(found, path, tensors, state, skipped)
    except OSError as error:
        raise ResourceError(
            f"{error.filename or folder}: the checkpoint must be readable, got '{error.strerror or error}'. "
            "Give this user the right to read it, or check the disk; then resume again."
        ) from error
    wanted = "at least one checkpoint" if step is None else f"the checkpoint of step {step}"
    got = "\n  ".join([f"{len(skipped)} damaged:", *skipped]) + "\nNothing was deleted." if skipped else "none."
    raise CheckpointError(f"{folder}: {wanted} must verify, got {got} Start the run again.")


def has_checkpoint(folder: Path) -> bool:
    """Whether there is anything for `load_checkpoint` to try; damaged ones count until they are put aside."""
    return bool(_list_candidates(folder))


def prune_checkpoints(folder: Path, keep: int, best: int | None) -> list[str]:
    """Delete all but the newest `keep` checkpoints and the one at step `best`; return the names that went.

    Quarantined checkpoints stay. Call it after `save_checkpoint` has returned, never before.

    Raises:
        ResourceError: the disk refused.
        ValueError: `keep` is below 1, which would delete the newest.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    removed = []
    try:
        _remove_leftovers(folder)
        for path, step in _list_candidates(folder)[keep:]:
            if step == best:
                continue
            # Renamed first: a crash halfway must not leave something that looks like a checkpoint.
            doomed = folder / f"{TEMPORARY_PREFIX}{path.name}"
            path.replace(doomed)
            _remove(doomed)
            removed.append(path.name)
    except OSError as error:
        raise build_disk_error(folder, error, needed_bytes=0) from error
    return removed


def _check_keys(step: int, tensors: Tensors) -> None:
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    for key, group in tensors.items():
        if not _FILE.fullmatch(key):
            raise ValueError(f"a key of tensors must be a plain file name, got {key!r}")
        if "__metadata__" in group:
            raise ValueError(f"tensors[{key!r}]: '__metadata__' is reserved by safetensors and cannot name a tensor")


def _encode(value: Mapping[str, JSON]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def _write(temporary: Path, step: int, tensors: Tensors, state: bytes) -> None:
    """Fill the temporary folder: every file is on the disk before the manifest vouches for it."""
    temporary.mkdir()
    for key, group in tensors.items():
        _save_tensors(group, temporary / f"{key}{_SUFFIX}")
    (temporary / _STATE).write_bytes(state)
    files: dict[str, JSON] = {}
    for path in sorted(temporary.iterdir()):
        sync_path(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": compute_sha256(path)}
    (temporary / _MANIFEST).write_bytes(_encode({"version": _VERSION, "step": step, "files": files}))
    sync_path(temporary / _MANIFEST)
    sync_path(temporary)


def _save_tensors(group: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file; the format wants contiguous tensors on the CPU that share no memory."""
    plain: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    try:
        save_file(plain, path)
    except SafetensorError as error:
        if (number := find_errno(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _publish(temporary: Path, target: Path) -> None:
    """Give a complete folder its name; at every moment either it or what it replaces can be loaded."""
    former = target.with_name(f"{_FORMER}{target.name}")
    if os.path.lexists(target):
        target.replace(former)
    temporary.replace(target)
    sync_path(target.parent)
    _remove(former)


def _remove_leftovers(folder: Path) -> None:
    for path in list(folder.iterdir()):
        replaced = path.name.startswith(_FORMER) and (folder / path.name.removeprefix(_FORMER)).exists()
        if replaced or path.name.startswith(TEMPORARY_PREFIX):
            _remove(path)


def _remove(path: Path) -> None:
    """Delete as much as the disk allows: what stays is tried again by the next save."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _list_candidates(folder: Path) -> list[tuple[Path, int]]:
    """Checkpoints with their steps, newest first; what a save was replacing comes after its replacement."""
    if not folder.is_dir():
        return []
    matches = [(path, _FOLDER.fullmatch(path.name)) for path in folder.iterdir()]
    found = [(path, int(match[2])) for path, match in matches if match]
    return sorted(found, key=lambda pair: (-pair[1], pair[0].name.startswith(_FORMER)))


def _load_verified(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read a checkpoint after every byte of it was verified.

    Raises:
        _Damaged: something in it is not what was saved.
    """
    try:
        names = _verify(path)
        tensors = {name.removesuffix(_SUFFIX): load_file(path / name) for name in names if name != _STATE}
        state = json.loads((path / _STATE).read_bytes())
    except (SafetensorError, ValueError) as error:
        raise _Damaged(f"a file must be readable as what it is, got {error}") from error
    except OSError as error:
        if error.errno in _GONE_OR_BROKEN:
            raise _Damaged(f"every file must be readable, got '{error}'") from error
        raise
    if not isinstance(state, dict):
        raise _Damaged(f"{_STATE} must hold an object, got {type(state).__name__}")
    return tensors, state


def _verify(path: Path) -> list[str]:
    """Return the names of a checkpoint's files, in the manifest's order, if all are as the manifest says."""
    if path.is_symlink() or not path.is_dir():
        raise _Damaged("must be a folder of its own, got a link or a file")
    entries = {entry.name: entry for entry in path.iterdir()}
    for name, entry in sorted(entries.items()):
        if entry.is_symlink() or not entry.is_file():
            raise _Damaged(f"{name} must be a plain file, got a link or a folder")
    if _MANIFEST not in entries:
        raise _Damaged(f"{_MANIFEST} is missing")
    files = _load_manifest(path)
    for name in files:
        if name not in entries:
            raise _Damaged(f"{name} is missing")
    extra = sorted(entries.keys() - files.keys() - {_MANIFEST})
    if extra:
        raise _Damaged(f"must hold the manifest's files only, got also {', '.join(extra)}")
    for name, (size, sha256) in files.items():
        actual = entries[name].stat().st_size
        if actual != size:
            raise _Damaged(f"{name} must have {size} bytes, got {actual}")
        if (digest := compute_sha256(entries[name])) != sha256:
            raise _Damaged(f"{name} must have sha256 {sha256}, got {digest}")
    return list(files)


def _load_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 by file name; a manifest that says anything unexpected is damaged."""
    manifest = json.loads((path / _MANIFEST).read_bytes())
    match = _FOLDER.fullmatch(path.name)
    step = int(match[2]) if match else None
    expected = {"version": _VERSION, "step": step, "files": None}
    if not isinstance(manifest, dict) or {**manifest, "files": None} != expected:
        raise _Damaged(f"{_MANIFEST} must hold version {_VERSION}, step {step} and files, got something else")
    files = manifest.get("files")
    if not isinstance(files, dict) or _STATE not in files:
        raise _Damaged(f"{_MANIFEST} must list {_STATE} among its files")
    for name, entry in files.items():
        # The pattern has no separator: a name cannot lead out of the folder.
        if not _FILE.fullmatch(name) or not (name == _STATE or name.endswith(_SUFFIX)):
            raise _Damaged(f"{_MANIFEST} must list plain file names, got {name!r}")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise _Damaged(f"{_MANIFEST} must hold bytes and sha256 of {name}, got something else")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def _quarantine(path: Path, reason: str) -> str:
    """Move a damaged checkpoint aside with its reason in a file; return what happened, in words."""
    aside = path.with_name(f"{_QUARANTINE}{path.name}")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{_QUARANTINE}{path.name}-{number}")
    try:
        path.replace(aside)
        # Beside it and not inside, where a link could lead the file astray.
        aside.with_name(f"{aside.name}.txt").write_text(f"{path.name}: {reason}\n", encoding="utf-8")
    except OSError as error:
        return f"could not be moved aside: {error.strerror or error}"
    return f"kept as {aside.name}"


def _describe_last_good(folder: Path) -> str:
    """Say which checkpoint a failed save leaves, after verifying it."""
    with suppress(OSError):
        for path, _ in _list_candidates(folder):
            with suppress(_Damaged, ValueError):
                _verify(path)
                return f"The last good checkpoint, {path.name}, is intact: resume from it afterwards."
    return "There is no earlier checkpoint."
