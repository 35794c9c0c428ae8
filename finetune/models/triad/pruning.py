"""What can be cut from a Triad of one stack: attention heads, feed-forward channels, layers, rows of the token table.

What is left is an ordinary Triad. Its configuration has one number of heads and one of channels for all layers, so that
each layer loses as many as any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.errors import ModelError

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Importance:
    """What the loss would change, to first order, if a part were not there; summed over rows.

    Args:
        heads: (layers, heads of keys and values): those that share keys go together.
        channels: (layers, channels of the feed-forward layer).
    """

    heads: torch.Tensor
    channels: torch.Tensor

    def choose(self, heads: int, channels: int) -> tuple[list[Numbers], list[Numbers]]:
        """The most important parts of each layer, in the order in which they stand."""
        return _choose(self.heads, heads), _choose(self.channels, channels)


def _choose(importance: torch.Tensor, count: int) -> list[Numbers]:
    return [np.sort(row.argsort(descending=True, stable=True)[:count].numpy()) for row in importance]


def check_prunable(model: Any) -> None:
    """Raise ModelError unless a model is a Triad of one stack."""
    if model.config.model_type != "triad" or model.config.shape == "encoder_decoder":
        raise ModelError(
            f"pruning: must get a Triad of one stack, got {type(model).__name__}. Train with model: "
            "{architecture: triad}."
        )


def compute_importance(model: Any, batches: Iterable[Any], compute_losses: Callable[[Any], torch.Tensor]) -> Importance:
    """How much the loss leans on each head and channel: |sum of w * dL/dw| of each row, over what a head or a channel
    is multiplied by on its way out (the columns of `o_proj` and `down_proj`).

    That is |dL/dm| at m = 1 of a factor m on the part (arXiv:1905.10650, equation 2; arXiv:1906.10771, section 3, by
    row and without the square). It is computed from what flows: the sum over a row's tokens of activation times its
    gradient is the same number for every row at once.

    Args:
        model: in evaluation mode, its weights without gradients.
        batches: padded, rows (B, T).
        compute_losses: batch -> loss of each row, (B,).
    """
    config, layers = model.config, model.model.first.layers
    flows: dict[tuple[str, int], torch.Tensor] = {}

    def keep(key: tuple[str, int], _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        flow = inputs[0].detach().requires_grad_() if not inputs[0].requires_grad else inputs[0]
        flow.retain_grad()
        flows[key] = flow
        return (flow,)

    hooks = []
    for number, layer in enumerate(layers):
        for kind, module in (("heads", layer.attention.o_proj), ("channels", layer.mlp.down_proj)):
            hooks.append(module.register_forward_pre_hook(partial(keep, (kind, number))))
    heads = torch.zeros(len(layers), config.num_key_value_heads, dtype=torch.float64)
    channels = torch.zeros(len(layers), config.intermediate_size, dtype=torch.float64)
    try:
        for batch in batches:
            with torch.enable_grad():
                compute_losses(batch).sum().backward()
            for (kind, number), flow in flows.items():
                assert flow.grad is not None
                leaning = (flow.detach() * flow.grad).sum(1).double().cpu()  # (B, T, width) -> (B, width)
                if kind == "heads":
                    heads[number] += leaning.unflatten(1, (config.num_key_value_heads, -1)).sum(2).abs().sum(0)
                else:
                    channels[number] += leaning.abs().sum(0)
            flows.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return Importance(heads, channels)


def prune(model: Any, heads: Sequence[Numbers], channels: Sequence[Numbers]) -> Any:
    """A Triad with some of its heads and channels; a part whose output is zero leaves every number as it was.

    Args:
        model: stays as it is.
        heads: numbers of the heads of keys and values to keep, for each layer as many; those of queries go with them.
        channels: the same of the feed-forward layers.
    """
    check_prunable(model)
    config = copy.deepcopy(model.config)
    groups = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads, config.intermediate_size = len(heads[0]), len(channels[0])
    config.num_attention_heads = groups * config.num_key_value_heads
    state = dict(model.state_dict())
    stack = _name_stack(model)
    for number, (of_heads, of_channels) in enumerate(zip(heads, channels, strict=True)):
        keys = _spread(of_heads, config.head_dim)
        queries = _spread(of_heads, groups * config.head_dim)
        layer = f"{stack}.layers.{number}"
        cuts = {
            "attention.q_proj": (queries, 0),
            "attention.k_proj": (keys, 0),
            "attention.v_proj": (keys, 0),
            "attention.o_proj": (queries, 1),
            "mlp.up_proj": (torch.from_numpy(of_channels), 0),
            "mlp.gate_proj": (torch.from_numpy(of_channels), 0),
            "mlp.down_proj": (torch.from_numpy(of_channels), 1),
        }
        for name, (kept, side) in cuts.items():
            for part in ("weight", "bias"):
                key = f"{layer}.{name}.{part}"
                if key in state and (part == "weight" or side == 0):
                    state[key] = state[key].index_select(side, kept.to(state[key].device))
    return _rebuild(model, config, state)


def _spread(numbers: Numbers, width: int) -> torch.Tensor:
    """The rows of a matrix that belong to parts of so many rows each."""
    return (torch.from_numpy(numbers)[:, None] * width + torch.arange(width)).flatten()


def drop_layers(model: Any, kept: Sequence[int]) -> Any:
    """A Triad with some of its layers (arXiv:2004.03844).

    Args:
        model: stays as it is.
        kept: their numbers, rising.
    """
    check_prunable(model)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    config.num_decoder_layers = len(kept)
    front = f"{_name_stack(model)}.layers."
    state = {}
    for name, tensor in model.state_dict().items():
        number, _, rest = name.removeprefix(front).partition(".")
        if not name.startswith(front):
            state[name] = tensor
        elif int(number) in kept:
            state[f"{front}{list(kept).index(int(number))}.{rest}"] = tensor
    return _rebuild(model, config, state)


def rank_layers(model: Any, least: int, measure: Callable[[Any], float]) -> list[int]:
    """The layers in the order in which to drop them: each time the one without which the model does best.

    Args:
        model: its layers are taken out for a moment, and put back.
        least: layers that stay, at least 1.
        measure: model -> how bad it is.

    Returns:
        Numbers of all layers but the last `least`.
    """
    check_prunable(model)
    stack = model.model.first
    layers, left, dropped = stack.layers, list(range(len(stack.layers))), []

    def try_without(number: int) -> float:
        stack.layers = nn.ModuleList(layers[i] for i in left if i != number)
        return measure(model)

    try:
        while len(left) > least:
            worst = min(left, key=try_without)
            left.remove(worst)
            dropped.append(worst)
    finally:
        stack.layers = layers
    return dropped


def trim_embeddings(model: Any, kept: Numbers) -> Any:
    """A Triad with the rows of its token table that go with a trimmed tokenizer; all else is the same.

    Args:
        model: with no matrix from states to tokens; it stays as it is.
        kept: number of each new token in the old vocabulary.
    """
    check_prunable(model)
    config = copy.deepcopy(model.config)
    config.vocab_size = len(kept)
    places = {int(old): number for number, old in enumerate(kept)}
    for role in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(old := getattr(config, role), int):
            setattr(config, role, places.get(old))
    name = f"{_name_stack(model)}.embeddings.tokens.weight"
    state = dict(model.state_dict())
    state[name] = state[name][torch.from_numpy(kept)]
    return _rebuild(model, config, state)


def _name_stack(model: Any) -> str:
    return "model.decoder" if model.config.shape == "decoder" else "model.encoder"


def _rebuild(model: Any, config: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """A model of the same class with another configuration and copies of these weights, in evaluation mode."""
    config._attn_implementation = model.config._attn_implementation
    built = type(model)(config)
    built.load_state_dict(state)
    return built.to(device=model.device, dtype=model.dtype).eval()
