"""What the in-tree methods share: a base that stays as it is, layers that add to it, and the method that adds nothing.

They are tuners of PEFT, so that one path serves every method: `get_peft_model`, a folder of `adapter_config.json` and
`adapter_model.safetensors`, several adapters on one base, `set_adapter`, `disable_adapter`. PEFT's own registration
takes members of its enum only; `register` writes into the tables behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from finetune.errors import UsageError


class InTreeType(StrEnum):
    """`peft_type` of the in-tree methods; each equals its name, like the members of PEFT's own enum."""

    BOTTLENECK = "BOTTLENECK"
    BITFIT = "BITFIT"
    HEAD = "HEAD"


def register() -> None:
    """Make the in-tree methods known to PEFT; needed before it meets one of their configurations or folders."""
    from finetune.adapters.bias import BiasConfig, BiasModel
    from finetune.adapters.bottleneck import BottleneckConfig, BottleneckModel

    methods = {
        InTreeType.BOTTLENECK: (BottleneckConfig, BottleneckModel),
        InTreeType.BITFIT: (BiasConfig, BiasModel),
        InTreeType.HEAD: (HeadConfig, HeadModel),
    }
    for name, (config, model) in methods.items():
        PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
        PEFT_TYPE_TO_TUNER_MAPPING[name] = model
        PEFT_TYPE_TO_PREFIX_MAPPING[name] = model.prefix


@dataclass
class FrozenConfig(PeftConfig):  # type: ignore[misc]  # PEFT has no types
    """What every in-tree configuration says.

    Args:
        target_modules: full names of the layers that are wrapped; None lets the method find them in the model.
        modules_to_save: names of the head's modules, trained and saved whole.
    """

    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None


class UnroutableError(UsageError):
    """A layer sees something else than the tokens of the batch; the adapters must run one after another."""


@dataclass(frozen=True)
class Routes:
    """Which part of a batch takes which adapter.

    Args:
        masks: adapter -> True where it applies: (B,) for rows, (B, T) for tokens, such as (1, total) for packed rows.
            What no mask covers gets the base alone.
        beams: rows that generation makes of each row, side by side.
    """

    masks: Mapping[str, torch.Tensor]
    beams: int = 1

    def fit(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """The mask of an adapter for states (B, T, D), or for those of all beams, (B * beams, T, D).

        Raises:
            UnroutableError: a mask of another shape.
        """
        mask = self.masks[name]
        if mask.ndim == 1 and len(states) == len(mask) * self.beams:
            mask = mask.repeat_interleave(self.beams)
        if mask.shape != states.shape[: mask.ndim]:
            raise UnroutableError(
                f"adapter_names: must say for each row which adapter it takes, got {tuple(mask.shape)} for a batch of "
                f"{tuple(states.shape[:-1])} tokens. Give one name a row; packed rows need a mask of tokens each."
            )
        return mask


class FrozenLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer of the base, and what each adapter makes of its output.

    Subclasses keep their weights in dictionaries by adapter, named in `adapter_layer_names`.
    """

    active_adapters: list[str]  # these four are PEFT's
    get_base_layer: Callable[[], Any]
    unmerge: Callable[[], None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.routes: Routes | None = None

    def update_layer(self, name: str, config: Any) -> None:
        """Add the weights of an adapter, such that the output starts as the base's."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether an adapter changes this layer."""
        raise NotImplementedError

    def change(self, name: str, states: torch.Tensor, source: torch.Tensor | None) -> torch.Tensor:
        """The output (..., D) after an adapter, from that before it and, (..., D) too, from `take_source`."""
        raise NotImplementedError

    def take_source(self) -> torch.Tensor | None:
        """What else `change` reads in this forward pass."""
        return None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output, changed by the active adapters one after the other, or as `routes` says."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        states: torch.Tensor = self.base_layer(x, *args, **kwargs)
        source = self.take_source()
        if self.disable_adapters or self.merged:
            return states
        if self.routes is None:
            for name in filter(self.has, self.active_adapters):
                states = self.change(name, states, source)
            return states
        for name in filter(self.has, self.routes.masks):
            mask = self.routes.fit(name, states)
            part = self.change(name, states[mask], None if source is None else source[mask])
            states = states.index_put((mask,), part)
        return states


class FrozenModel(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner for layers of one class, `tuner_layer_cls`, around what `find_targets` finds."""

    tuner_layer_cls = FrozenLayer

    def find_targets(self, config: Any, model: nn.Module) -> list[str]:
        """Full names of the layers to wrap.

        Raises:
            RecipeError: a base that has none.
        """
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, _model_config: dict[str, Any]) -> Any:
        return peft_config  # PEFT would look for targets in its tables of model types

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = self.find_targets(peft_config, model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap, as in PEFT, which turns long lists of targets into sets; the saved file keeps one order."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, **_: Any
    ) -> None:
        if not isinstance(target, self.tuner_layer_cls):
            wrapped = self.tuner_layer_cls(target)
            self._replace_module(parent, target_name, wrapped, target)
            target = wrapped
        target.update_layer(adapter_name, peft_config)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, _child: nn.Module) -> None:
        # PEFT's own also moves weights about, and stumbles over a head that is more than one layer when it unloads.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """What `model(..., adapter_names=[...])` runs in: an adapter for each row, or `__base__`."""
        names: Sequence[str] | None = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise UsageError("adapter_names: must come in evaluation mode, got a model that trains. Call model.eval().")
        device = next(self.model.parameters()).device
        masks = {
            name: torch.tensor([row == name for row in names], device=device) for name in set(names) - {"__base__"}
        }
        with route(self, masks, beams=kwargs.get("num_beams") or 1):
            yield


@contextmanager
def route(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor],
    head_masks: Mapping[str, torch.Tensor] | None = None,
    *,
    beams: int = 1,
) -> Iterator[None]:
    """Let the in-tree layers of a model, and the heads that PEFT saves, serve several adapters in one batch.

    For inference: what is computed anew in a backward pass, with gradient checkpointing, would not see the masks.

    Args:
        model: with adapters.
        masks, beams: as in `Routes`, on the model's device.
        head_masks: for heads, which make one output of each packed row, (rows,); default `masks`.

    Raises:
        UsageError: an adapter that the model does not have, or a mask that does not fit its batch.
    """
    known = list(getattr(model, "peft_config", {}))
    unknown = sorted({*masks, *(head_masks or ())} - set(known))
    if unknown:
        raise UsageError(f"adapter_names: must be among {', '.join(known)}, got {', '.join(unknown)}.")
    layers = list_frozen_layers(model)
    if any(layer.merged for layer in layers):
        raise UsageError(
            "adapter_names: must meet a base without merged adapters, got one. Call unmerge_adapter first."
        )
    head_routes = Routes(masks if head_masks is None else head_masks, beams)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                hook = partial(_compute_heads, routes=head_routes)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(route_layers(layers, Routes(masks, beams)))
        yield


def list_frozen_layers(model: nn.Module) -> list[FrozenLayer]:
    """The layers of the in-tree methods."""
    return [module for module in model.modules() if isinstance(module, FrozenLayer)]


@contextmanager
def route_layers(layers: Sequence[FrozenLayer], routes: Routes) -> Iterator[None]:
    """What `route` does to the layers alone, which have no merged adapters."""
    for layer in layers:
        layer.routes = routes
    try:
        yield
    finally:
        for layer in layers:
            layer.routes = None


def _compute_heads(
    head: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor, routes: Routes
) -> torch.Tensor:
    """Instead of one head's output: each head's, where its mask says."""
    if head.disable_adapters:
        return output
    output = head.original_module(*args, **kwargs)
    for name in filter(head.modules_to_save.__contains__, routes.masks):
        mask = routes.fit(name, output)
        output = output.index_put((mask,), head.modules_to_save[name](*args, **kwargs)[mask])
    return output


def list_base_layers(model: nn.Module, head: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the base as it was: without the head, and without what PEFT put around and beside it."""
    outside = tuple(f"{name}." for name in head)
    for name, module in model.named_modules():
        if f"{name}.".startswith(outside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            outside += (f"{name}.",)
        if isinstance(module, BaseTunerLayer):
            yield name, module.get_base_layer()
        elif not isinstance(module, AuxiliaryTrainingWrapper):
            yield name, module


@dataclass
class HeadConfig(FrozenConfig):
    """Train the head alone, on what the frozen base makes of a row (a linear probe where the head is linear)."""

    target_modules: list[str] | str | None = field(default=DUMMY_TARGET_MODULES)  # PEFT's word for none

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = InTreeType.HEAD


class HeadModel(FrozenModel):
    """A tuner that wraps no layer; PEFT saves and loads `modules_to_save` with it."""

    prefix = "frozen_"

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a head; PEFT, which looks for the next one in layers, would leave none active."""
        left = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        for name in (left or list(self.peft_config))[:1]:
            self.set_adapter(name, inference_mode=self.peft_config[name].inference_mode)
