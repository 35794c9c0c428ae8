"""Bottleneck adapters: a narrow layer of two matrices beside or behind the sublayers of a frozen Transformer.

    sequential: y <- y + s up(act(down(y)))      parallel: y <- y + s up(act(down(x)))

with x (..., D) what a sublayer reads and y (..., D) what it makes of it, before dropout, residual and norm; down is
(m, D), up is (D, m), both have biases, and up starts at zero, so that training starts at the base's own function.

- `houlsby` (arXiv:1902.00751): sequential, behind attention and feed-forward, as there.
- `pfeiffer` (arXiv:2005.00247): sequential, behind the feed-forward layer only. The paper's best placement reads the
  states after their norm, adds them to y and norms again; so does AdapterHub's `seq_bn`. Here it reads y itself, as
  Houlsby's: the adapter then needs no access to residual and norm, which lie in another place in each family.
- `parallel` (arXiv:2110.04366): beside the feed-forward layer, with the constant s = 4 of its experiments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from finetune.adapters.frozen import FrozenConfig, FrozenLayer, FrozenModel, InTreeType, list_base_layers
from finetune.adapters.targets import ends_with
from finetune.errors import RecipeError, UsageError

STYLES = ("houlsby", "pfeiffer", "parallel")
SCALINGS = {"houlsby": 1.0, "pfeiffer": 1.0, "parallel": 4.0}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class Sublayers(NamedTuple):
    """How a family ends the names of the layers that matter here.

    Args:
        attention: the last linear layer of each attention.
        first, last: those of the feed-forward layer, side by side in one module.
    """

    attention: tuple[str, ...]
    first: str
    last: str


SUBLAYERS = (
    Sublayers(("attention.o_proj", "cross_attention.o_proj", "self_attn.o_proj"), "mlp.up_proj", "mlp.down_proj"),
    Sublayers(
        ("attention.output.dense", "crossattention.output.dense", "attention.attn.o"),
        "intermediate.dense",
        "output.dense",
    ),
    Sublayers(("attention.out_lin",), "ffn.lin1", "ffn.lin2"),
    Sublayers(("attn.c_proj", "crossattention.c_proj"), "mlp.c_fc", "mlp.c_proj"),
    Sublayers(("self_attn.out_proj", "encoder_attn.out_proj"), "fc1", "fc2"),
)  # Triad and Llama; BERT, RoBERTa and MPNet; DistilBERT; GPT-2; Marian


@dataclass
class BottleneckConfig(FrozenConfig):
    """One bottleneck adapter.

    Args:
        style: where it stands: houlsby, pfeiffer or parallel.
        reduction: D / m, at least 1; m is at least 1.
        activation: relu, gelu, silu or tanh.
        scaling: s; None for the style's own.
    """

    style: str = "pfeiffer"
    reduction: float = 16
    activation: str = "relu"
    scaling: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = InTreeType.BOTTLENECK
        if self.style not in STYLES:
            raise ValueError(f"adapter.style: must be one of {', '.join(STYLES)}, got {self.style!r}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"adapter.activation: must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")
        if self.reduction < 1:
            raise ValueError(f"adapter.reduction: must be at least 1, got {self.reduction}.")
        if self.scaling is None:
            self.scaling = SCALINGS[self.style]


class Slot(threading.local):
    """Holds what a feed-forward layer reads until its last linear layer wants it; each thread has its own."""

    states: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()  # a copy of the model starts empty, and its two layers share the copy

    def take(self) -> torch.Tensor | None:
        """Empty the slot."""
        states, self.states = self.states, None
        return states


class Tap(nn.Module):
    """The first linear layer of a feed-forward layer, which also leaves its input in a slot."""

    def __init__(self, base_layer: nn.Module, slot: Slot) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slot = slot

    def get_base_layer(self) -> nn.Module:
        """What PEFT puts back when it unloads."""
        return self.base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., inner)."""
        self.slot.states = x
        output: torch.Tensor = self.base_layer(x)
        return output


class BottleneckLayer(FrozenLayer):
    """The last linear layer of a sublayer, and the bottleneck of each adapter."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_config",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_config: dict[str, BottleneckConfig] = {}
        self.slot: Slot | None = None

    def update_layer(self, name: str, config: Any) -> None:
        """A bottleneck whose second half is zero."""
        base: Any = self.get_base_layer()
        width = base.out_features if hasattr(base, "out_features") else base.nf  # Conv1D's name for it
        inner = max(1, int(width / config.reduction))
        down, up = nn.Linear(width, inner), nn.Linear(inner, width)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self.bottleneck_config[name] = config
        self._move_adapter_to_device_of_base_layer(name)

    def has(self, name: str) -> bool:
        """Whether an adapter changes this layer."""
        return name in self.bottleneck_config

    def take_source(self) -> torch.Tensor | None:
        """What the feed-forward layer read, where an adapter asks for it."""
        return None if self.slot is None else self.slot.take()

    def change(self, name: str, states: torch.Tensor, source: torch.Tensor | None) -> torch.Tensor:
        """One of the two formulas at the top."""
        config, down, up = self.bottleneck_config[name], self.bottleneck_down[name], self.bottleneck_up[name]
        read: Any = source if config.style == "parallel" else states
        added = up(ACTIVATIONS[config.activation](down(read.to(down.weight.dtype))))
        return torch.add(states, added, alpha=config.scaling).to(states.dtype)


class BottleneckModel(FrozenModel):
    """Bottleneck adapters as a tuner of PEFT; adapters of several styles may share a base."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def find_targets(self, config: Any, model: nn.Module) -> list[str]:
        """The layers of `find_sublayers`."""
        return find_sublayers(model, config.style, config.modules_to_save or ())

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, **options: Any
    ) -> None:
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, **options)
        layer = getattr(parent, target_name)
        if peft_config.style != "parallel" or layer.slot is not None:
            return
        last = options["current_key"]
        first = find_first(last, dict(self.model.named_modules()))
        if first is None:
            raise RecipeError(f"adapter.style: parallel must stand beside a feed-forward layer, got {last}.")
        layer.slot = Slot()
        owner, _, name = first.rpartition(".")
        setattr(self.model.get_submodule(owner), name, Tap(self.model.get_submodule(first), layer.slot))

    def _check_merge_allowed(self) -> None:
        raise UsageError(
            "adapter.method: must be linear to be merged into the base, got adapter: a bottleneck has an activation "
            "inside. Keep base and adapter apart, or train with adapter.method: lora."
        )


def find_sublayers(model: nn.Module, style: str, head: Sequence[str]) -> list[str]:
    """Full names of the layers that a style wraps: each is the last linear one of its sublayer.

    Args:
        model: a Hugging Face model; its weights are not read, so that shapes on the meta device do.
        style: houlsby, pfeiffer or parallel.
        head: names of the head's modules.

    Raises:
        RecipeError: a base with layers of other names.
    """
    names = [name for name, _ in list_base_layers(model, head)]
    known = set(names)
    found = {"feed-forward": [name for name in names if find_first(name, known)]}
    endings = {"feed-forward": [family.last for family in SUBLAYERS]}
    if style == "houlsby":
        endings["attention"] = [ending for family in SUBLAYERS for ending in family.attention]
        found["attention"] = [name for name in names if ends_with(name, endings["attention"])]
    for sublayer, wrapped in found.items():
        if not wrapped:
            raise RecipeError(
                f"adapter.style: {style} must find the base's {sublayer} layers by their names (they end in "
                f"{', '.join(endings[sublayer])}), got a base without ({type(model).__name__}). Set "
                "model.architecture: triad where the base has that form, or adapter.method: lora."
            )
    wanted = {name for wrapped in found.values() for name in wrapped}
    return [name for name in names if name in wanted]


def find_first(last: str, names: Container[str]) -> str | None:
    """The first linear layer of the feed-forward layer whose last one is called so; None if it is none."""
    for family in SUBLAYERS:
        if ends_with(last, [family.last]):
            first = last.removesuffix(family.last) + family.first
            if first in names:
                return first
    return None
