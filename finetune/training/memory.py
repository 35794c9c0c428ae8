"""The most memory that training held."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINUX_STATUS = Path("/proc/self/status")


def read_peak_memory_mb() -> int | None:
    """Peak of this process in MB (2**20 bytes): what is allocated on the GPU where there is one, else resident.

    Returns:
        None where the system does not tell.
    """
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    # Not getrusage on Linux: a process that another one started begins there with the peak of that other one.
    if LINUX_STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", LINUX_STATUS.read_text())):
        return round(int(found[1]) / 2**10)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
