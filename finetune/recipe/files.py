"""Files that survive a crash: atomic writes, checksums, and what to say when a disk refuses."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from finetune.errors import ResourceError

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"

TEMPORARY_PREFIX = ".tmp-"

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def write_file_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a run after a crash, sees the old bytes or the new ones and never a part.

    Args:
        path: the file; its folder must exist.
        data: all of its bytes.

    Raises:
        ResourceError: the disk is full, read-only or closed to this user; the former file is untouched.
    """
    # Thread numbers are unique on a machine, so that two writers never share a temporary file.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{threading.get_native_id()}")
    try:
        temporary.write_bytes(data)
        sync_path(temporary)
        temporary.replace(path)
        sync_path(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise build_disk_error(path, error, needed_bytes=len(data)) from error


def compute_sha256(path: Path) -> str:
    """Return the lower-case hexadecimal SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's list of names, survive a power cut.

    Raises:
        OSError: the disk could not keep them.
    """
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # Windows cannot open a folder, and orders renames itself
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync of a folder and answer EINVAL: there is nothing more to do.
        if not (is_folder and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


def find_errno(error: BaseException) -> int | None:
    """The operating system's number of an error; safetensors and tokenizers tell it in their text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def build_disk_error(path: Path, error: OSError, needed_bytes: int, kept: str = "") -> ResourceError:
    """Return the error for a write that the disk refused.

    Args:
        path: what was to be written.
        error: what the operating system said.
        needed_bytes: size of what was to be written.
        kept: a sentence on what is still there.
    """
    if error.errno in FULL:
        fix = "Free disk space, or point the run at a larger disk."
    elif error.errno in _FORBIDDEN:
        fix = "Give this user the right to write there, or choose another folder."
    else:
        fix = "Check that the disk is there and in order."
    reason = os.strerror(error.errno) if error.errno else str(error)
    got = f"got '{reason}' with {_format_free(path)} free"
    sentences = [f"{path}: must be written ({_format_bytes(needed_bytes)} needed), {got}.", kept, fix]
    return ResourceError(" ".join(filter(None, sentences)))


def _format_free(path: Path) -> str:
    """Free bytes of the disk that holds `path`, or would hold it."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            return _format_bytes(shutil.disk_usage(folder).free)
    return "an unknown amount"


def _format_bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
