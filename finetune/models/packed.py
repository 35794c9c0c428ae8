"""Linear layers that predict through oneDNN, where it is faster than what torch takes by itself.

In float32 torch multiplies by the BLAS that it was built with, MKL, which takes no AVX-512 on processors that are not
Intel's. oneDNN, which comes with torch too, does: with the weight laid out for it once, a layer of 384 by 1,536 took
.43 of the time on an AMD EPYC of family 26, for 14 tokens as for 450, with the same numbers but for rounding.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]

WORTH_IT_RATIO = 1.3
TOKENS, WIDTH = 128, 512
REPEATS = 5
MOST_WEIGHTS = 50_000_000
"""Of all layers together: the weights are held twice, 200 MB more at most."""


def pack_linear_layers(model: nn.Module) -> nn.Module:
    """Let a frozen model's plain linear layers predict through oneDNN, in place, where that is faster here."""
    layers = [module for module in model.modules() if type(module) is nn.Linear and _can_be_packed(module)]
    if layers and sum(layer.weight.numel() for layer in layers) <= MOST_WEIGHTS and is_packed_faster():
        for layer in layers:
            layer.__class__ = PackedLinear
    return model


def unpack_linear_layers(model: nn.Module) -> nn.Module:
    """Take the layers back to plain ones, in place: what transformers alone would have."""
    for module in model.modules():
        if type(module) is PackedLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
            module.__dict__.pop("_packed", None)
    return model


@cache
def is_packed_faster() -> bool:
    """Whether oneDNN multiplies float32 clearly faster on this CPU: best of several, alternating."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (available and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    layer, x = nn.Linear(WIDTH, WIDTH).requires_grad_(False), torch.ones(TOKENS, WIDTH)
    packed = _pack(layer.weight)
    times = {"torch": float("inf"), "packed": float("inf")}
    with torch.inference_mode():
        for _ in range(REPEATS):
            for name in times:
                start = time.perf_counter()
                _multiply(x, packed, layer.bias) if name == "packed" else layer(x)
                times[name] = min(times[name], time.perf_counter() - start)
    return times["torch"] / times["packed"] >= WORTH_IT_RATIO


class PackedLinear(nn.Linear):
    """A linear layer that predicts with a copy of its weight in oneDNN's own layout, and is itself in all else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (torch's name)
        """Map (..., in) to (..., out)."""
        if not self._can_be_fast(input):
            return super().forward(input)
        state = (self.weight.data_ptr(), self.weight._version)
        if self.__dict__.get("_packed", (None,))[0] != state:
            self._packed = (state, _pack(self.weight))
        return _multiply(input, self._packed[1], self.bias)

    def _can_be_fast(self, x: torch.Tensor) -> bool:
        return (
            not is_compiling()
            and not is_tracing()  # type: ignore[no-untyped-call]
            and type(x) is torch.Tensor
            and x.dtype is torch.float32
            and x.numel() > 0
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and _can_be_packed(self)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}  # it cannot be copied


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    plain = type(weight) in (torch.Tensor, nn.Parameter)  # a rounded weight (torchao's) multiplies in its own way
    return plain and weight.device.type == "cpu" and weight.dtype is torch.float32 and not weight.requires_grad


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y
