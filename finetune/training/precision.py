"""Which number format is faster here: looked at, not assumed."""

from __future__ import annotations

import time

import torch

# bf16 must beat float32 by this ratio to be worth its three decimal digits.
WORTH_IT_RATIO = 1.3
SIZE = 512
REPEATS = 5


def choose_precision(wanted: str) -> str:
    """Settle `auto`: "bf16" where its matrix products are clearly faster on this device, else "float32"."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if measure_bf16_ratio() >= WORTH_IT_RATIO else "float32"


def measure_bf16_ratio() -> float:
    """Time of a float32 matrix product over that of a bf16 one on this CPU, best of several, alternating."""
    float32 = torch.ones(SIZE, SIZE)
    bf16 = float32.bfloat16()
    times: dict[torch.dtype, float] = {}
    for _ in range(REPEATS):
        for matrix in (float32, bf16):
            start = time.perf_counter()
            matrix @ matrix
            times[matrix.dtype] = min(times.get(matrix.dtype, float("inf")), time.perf_counter() - start)
    return times[torch.float32] / times[torch.bfloat16]
