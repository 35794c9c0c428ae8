"""Memory and disks that run out: told from bugs, and put into words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from finetune.errors import FinetuneError, ResourceError
from finetune.recipe.files import FULL, build_disk_error, find_errno


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a CPU, a GPU or a Mac."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "out of memory")
    )


@contextmanager
def naming_shortages(folder: Path) -> Iterator[None]:
    """Within the block, memory and disks that run out are errors of the machine and not bugs.

    Args:
        folder: of the run that the work belongs to.

    Raises:
        ResourceError: in their place.
    """
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            said = (str(error).splitlines() or ["out of memory"])[0]
            raise ResourceError(
                f"{folder}: the model and what is computed with it must fit into memory, got '{said}'. Free memory and "
                f"go on with: finetune resume {folder}. Or start a new run with adapter.method: lora, a lower "
                "model.max_length or a smaller base."
            ) from error
        if (number := find_errno(error)) in FULL:
            path = Path(getattr(error, "filename", None) or folder)
            raise build_disk_error(path, OSError(number, os.strerror(number)), needed_bytes=0) from error
        raise
