"""BitFit (arXiv:2106.10199): train the biases, as differences, so that the base keeps its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune.adapters.frozen import FrozenConfig, FrozenLayer, FrozenModel, InTreeType, list_base_layers
from finetune.errors import RecipeError, UsageError


@dataclass
class BiasConfig(FrozenConfig):
    """Every bias of the base's linear layers and norms, the paper's `b_q` to `b_LN2`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = InTreeType.BITFIT


class BiasLayer(FrozenLayer):
    """y = base(x) + delta, with delta (D,): the same function, and the same gradient, as with the bias b + delta."""

    adapter_layer_names = ("bitfit_delta",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bitfit_delta = nn.ParameterDict()
        self.bias_before_merge: torch.Tensor | None = None

    def update_layer(self, name: str, _config: Any) -> None:
        """A delta of zeros."""
        self.bitfit_delta[name] = nn.Parameter(torch.zeros_like(self.get_base_layer().bias))
        self._move_adapter_to_device_of_base_layer(name)

    def has(self, name: str) -> bool:
        """Whether an adapter changes this layer."""
        return name in self.bitfit_delta

    def change(self, name: str, states: torch.Tensor, _source: torch.Tensor | None) -> torch.Tensor:
        """Add the delta."""
        return torch.add(states, self.bitfit_delta[name]).to(states.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas to the base's bias.

        Raises:
            UsageError: with `safe_merge`, a delta that is not finite.
        """
        for name in filter(self.has, check_adapters_to_merge(self, adapter_names)):
            bias, delta = self.get_base_layer().bias, self.bitfit_delta[name]
            if safe_merge and not torch.isfinite(delta).all():
                raise UsageError(f"adapter {name}: must have finite weights to be merged, got others. Train it anew.")
            if not self.merged:
                self.bias_before_merge = bias.clone()
            bias.copy_(bias + delta)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base its own bias back, bit for bit."""
        if self.bias_before_merge is not None:
            self.get_base_layer().bias.copy_(self.bias_before_merge)
        self.bias_before_merge, self.merged_adapters = None, []


class BiasModel(FrozenModel):
    """BitFit as a tuner of PEFT."""

    prefix = "bitfit_"
    tuner_layer_cls = BiasLayer

    def find_targets(self, config: Any, model: nn.Module) -> list[str]:
        """The layers of `find_biases`."""
        return find_biases(model, config.modules_to_save or ())


def find_biases(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Full names of the base's linear layers and norms that have a bias; not the layer over the vocabulary.

    Args:
        model: a Hugging Face model; its weights are not read, so that shapes on the meta device do.
        head: names of the head's modules.

    Raises:
        RecipeError: a base without biases, such as Llama.
    """
    over_vocabulary = getattr(model, "get_output_embeddings", lambda: None)()
    found = [
        name
        for name, layer in list_base_layers(model, head)
        if isinstance(layer, nn.Linear | Conv1D | nn.LayerNorm)
        and layer.bias is not None
        and layer is not over_vocabulary
    ]
    if not found:
        raise RecipeError(
            f"adapter.method: bitfit must find biases to train, got a base without any ({type(model).__name__}). "
            "Set adapter.method: lora."
        )
    return found
