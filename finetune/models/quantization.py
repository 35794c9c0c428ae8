"""A frozen base in fewer bits, for an adapter to be trained on it (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import nn

from finetune.errors import ResourceError

# Kind -> the package that does it, on a CPU as well as on a GPU.
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}

# Kind -> bytes of a weight, with its share of a scale.
BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}


def check_quantization(kind: str) -> None:
    """Whether what `quantize_layers` needs is installed.

    Raises:
        ResourceError: it is not.
    """
    package = PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise ResourceError(
            f"model.quantize: {kind} needs the package {package}, which is not installed. "
            f"pip install {package}, or set model.quantize: none."
        )


def quantize_layers(model: nn.Module, names: Sequence[str], kind: str) -> None:
    """Keep the weights of some linear layers in fewer bits, in place; each product is taken with what they stand for.

    Gradients flow through these layers, and none is computed for their weights.

    Args:
        model: in float32; all of it has been read when this begins.
        names: of the layers. Biases stay as they are.
        kind: "int8": a scale for each output (torchao's weight-only form). "nf4": the 16 values of arXiv:2305.14314,
            with a scale for each 64 weights (bitsandbytes). "none": nothing is done.
    """
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        chosen = set(names)
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _module, name: name in chosen)
    elif kind == "nf4":
        for name in names:
            model.set_submodule(name, _build_nf4(model.get_submodule(name)))


def _build_nf4(linear: Any) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer: nn.Module = Linear4bit(linear.in_features, linear.out_features, quant_type="nf4", device="meta")
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to(linear.weight.device)  # which quantizes
