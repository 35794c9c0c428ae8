"""Several adapters on one base, and rows of different adapters in one forward pass.

PEFT routes by dimension 0 (`adapter_names`), which a pack of rows, (1, total), does not have. Here each token has an
adapter: a layer computes its base once for all of them, and adds to each token the update of its own (the batched LoRA
of arXiv:2310.18547, without its kernels; `FrozenLayer` does so for the in-tree methods). Each head computes its own
rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from finetune.adapters.attach import load_adapter
from finetune.adapters.fast_lora import FastLinear, change_class, speed_up_lora
from finetune.adapters.frozen import FrozenLayer, Routes, UnroutableError, route_layers
from finetune.errors import UsageError


@dataclass(frozen=True)
class Route:
    """Which adapter each part of a batch belongs to.

    Args:
        shape: of the tokens, (B, T), or (1, total) packed.
        tokens: adapter -> places of its tokens in the flattened batch.
        rows: adapter -> numbers of its rows.
    """

    shape: torch.Size
    tokens: dict[str, torch.Tensor]
    rows: dict[str, torch.Tensor]


_ROUTE: ContextVar[Route | None] = ContextVar("route", default=None)


@contextmanager
def route_rows(
    layers: Sequence[FrozenLayer], names: Sequence[str], batch: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Let a model from `load_several`, such that `can_route`, compute each row of a batch with the adapter of its name.

    Args:
        layers: of the in-tree methods, as `list_frozen_layers` finds them once for all batches.
        names: of each row.
        batch: padded or packed, as `data.batches.collate` makes it.

    Raises:
        UnroutableError: within, from a layer that sees something else than the tokens of the batch.
    """
    shape, device = batch["input_ids"].shape, batch["input_ids"].device
    known = list(dict.fromkeys(names))
    owners = torch.tensor([known.index(name) for name in names], device=device)  # (rows,)
    if "attention_mask" in batch:
        of_tokens = owners[:, None].expand(shape).flatten()
    else:
        of_tokens = owners[(batch["position_ids"][0] == 0).cumsum(0) - 1]
    places = [{name: (of == i).nonzero()[:, 0] for i, name in enumerate(known)} for of in (of_tokens, owners)]
    masks = {name: (of_tokens == i).view(shape) for i, name in enumerate(known)}
    with ExitStack() as stack:
        stack.callback(_ROUTE.reset, _ROUTE.set(Route(shape, *places)))
        stack.enter_context(route_layers(layers, Routes(masks)))
        yield


class RoutedLinear(FastLinear):
    """PEFT's LoRA layer; inside of `route_rows` each token gets the update of its own adapter."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x (..., in) to (..., out)."""
        route = _ROUTE.get()
        if route is None:
            return super().forward(x, *args, **kwargs)
        if x.shape[:-1] != route.shape:
            raise UnroutableError
        y = self.base_layer(x, *args, **kwargs)
        inputs, outputs = x.flatten(0, -2), y.flatten(0, -2)  # (T, in), (T, out)
        for name, places in route.tokens.items():
            if name in self.lora_variant:  # DoRA scales what the base says, too
                x, y_of = inputs[places].to(self.lora_A[name].weight.dtype), outputs[places]
                changed = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=y_of)
                outputs.index_copy_(0, places, changed.to(outputs.dtype))
            elif name in self.lora_A:  # else this layer is no target of the adapter
                down, up = self.lora_A[name], self.lora_B[name]
                update = up(down(inputs[places].to(down.weight.dtype))) * self.scaling[name]
                outputs.index_add_(0, places, update.to(outputs.dtype))
        return cast(torch.Tensor, outputs.view_as(y))


class RoutedHead(ModulesToSaveWrapper):  # type: ignore[misc]  # PEFT has no types
    """PEFT's heads; inside of `route_rows` each row gets the output of its own, with -inf for classes that it lacks."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the active head says, or (rows, ..., classes of the largest)."""
        route = _ROUTE.get()
        if route is None:
            return cast(torch.Tensor, super().forward(*args, **kwargs))
        parts = {name: self.modules_to_save[name](*args, **kwargs) for name in route.rows}
        widest = max(parts.values(), key=lambda part: int(part.shape[-1]))
        if len(widest) != sum(map(len, route.rows.values())):
            raise UnroutableError
        routed = torch.full_like(widest, -torch.inf)
        for name, rows in route.rows.items():
            routed[rows, ..., : parts[name].shape[-1]] = parts[name][rows]
        return routed


def load_several(
    model: nn.Module, folders: Mapping[str, Path], heads: Mapping[str, Mapping[str, nn.Module]]
) -> nn.Module:
    """Put several saved adapters on one freshly loaded base, each under its name with its own head.

    Args:
        model: the base with a head in the shape of the first adapter's.
        folders: name -> adapter; the names have no dots.
        heads: name -> module of the head -> a module of its shape, whose weights do not matter.

    Returns:
        A `PeftModel`; nothing is trainable. `set_adapter` chooses one; where `can_route` says so `route_rows` mixes.

    Raises:
        UsageError: adapters of different methods.
        ModelError: the files of one do not fit the base.
    """
    methods = {folder: PeftConfig.from_pretrained(str(folder)).peft_type.value.lower() for folder in folders.values()}
    if len(set(methods.values())) > 1:
        raise UsageError(
            "adapters: must share one method to stand on one base, got "
            + ", ".join(f"{method} ({folder})" for folder, method in methods.items())
            + ". Load the others alone."
        )
    wrapped: Any = None
    for name, folder in folders.items():
        if wrapped is None:
            wrapped = load_adapter(model, folder, name)
            continue
        for part, shaped in heads[name].items():
            # PEFT copies this module for a new adapter, before it reads the weights from the file.
            wrapped.base_model.model.get_submodule(part).original_module = shaped
        load_adapter(wrapped, folder, name)
    change_class(speed_up_lora(wrapped), FastLinear, RoutedLinear)
    return change_class(wrapped, ModulesToSaveWrapper, RoutedHead).requires_grad_(False)


def can_route(model: nn.Module) -> bool:
    """Whether all that the adapters of a model add are updates by LoRA or DoRA, in-tree layers, and heads."""
    parts = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    routed = all(isinstance(part, RoutedHead | RoutedLinear | FrozenLayer) for part in parts)
    variants = [variant for part in parts for variant in getattr(part, "lora_variant", {}).values()]
    routed = routed and all(isinstance(variant, DoraLinearVariant) for variant in variants)
    return routed and isinstance(model, PeftModel) and not model.active_peft_config.is_prompt_learning
