"""Triad: one Transformer in three shapes, from the article's formulas to the heads.

Read from top to bottom: attention, positions, the layer, a stack of layers, the model of one or two stacks, and a head
for each task. Formula numbers are those of "Attention Is All You Need" (arXiv:1706.03762).

Shapes: B rows, T tokens of a row, S tokens that are looked at, D width, H heads, V vocabulary, K classes.

Rows come padded, (B, T) with `attention_mask`, or packed without padding, (1, total) with `position_ids` that start
again at each row (`cu_seq_lens_q` saves looking for the starts). A packed row never sees another: rows of equal length
that lie side by side are computed together, as views and without a mask.

This file and its configuration import nothing but torch and transformers: `save_pretrained` copies them beside the
weights, where they load without this toolkit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_triad import TriadConfig

IGNORED = -100  # a label that counts for nothing


# Attention, section 3.2


# Rows of so many tokens or more go through PyTorch's fused kernel, which keeps no weights. On one core in float32 it is
# within noise of the products below 256 tokens, 1.4 times as fast to train at 512 and 1.6 at 2,048, where prediction is
# 2.5 times as fast (benchmarks/attention_cost.py).
FUSED_FROM = 512


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot-product attention, formula (1): softmax(Q K^T / sqrt(d_k)) V.

    Args:
        module: says whether it is training, and how many queries share a key (`num_key_value_groups`).
        query: (B, H, T, d_k).
        key, value: (B, H or fewer, S, d_k).
        attention_mask: added to the products, broadcast to (B, H, T, S). None: all is seen; with a window and T = S,
            all but what the window hides, and what comes later where the module is causal.
        scaling: default 1 / sqrt(d_k).
        dropout: rate on the weights.
        sliding_window: tokens so many away, or more, are hidden: rows of several windows are computed in blocks.
        output_attentions: the weights are wanted, so neither blocks nor PyTorch's fused kernel.

    Returns:
        (B, T, H, d_k), and the weights (B, H, T, S); None from blocks and from long rows.
    """
    may_choose = not output_attentions and not torch.compiler.is_compiling()
    if sliding_window is not None and query.shape[2] == key.shape[2]:
        if may_choose and query.shape[2] > 2 * sliding_window:
            return attend_in_blocks(module, query, key, value, attention_mask, scaling, dropout, sliding_window), None
        if attention_mask is None:
            places = torch.arange(query.shape[2], device=query.device)
            is_causal = bool(module.is_causal)
            attention_mask = build_bias(places, places, query.dtype, is_causal=is_causal, window=sliding_window)
    if may_choose and query.shape[2] >= FUSED_FROM:
        rate, fused = dropout if module.training else 0.0, nn.functional.scaled_dot_product_attention
        enable_gqa = query.shape[1] != key.shape[1]
        heads = fused(query, key, value, attention_mask, rate, scale=scaling, enable_gqa=enable_gqa)
        return heads.transpose(1, 2), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    products = torch.matmul(query * scaling, key.transpose(-1, -2))  # scaling T x d_k costs less than T x S
    if attention_mask is not None:
        products = products + attention_mask
    weights = products.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attend_in_blocks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    window: int,
) -> torch.Tensor:
    """`attend` to what lies in the window, O(T window d_k) operations: the rest is neither computed nor masked."""
    is_causal = bool(module.is_causal)
    places, ahead = torch.arange(query.shape[2], device=query.device), 0 if is_causal else window - 1
    parts = []
    for start in range(0, len(places), window):
        block, near = slice(start, start + window), slice(max(0, start + 1 - window), start + window + ahead)
        if attention_mask is None:
            mask = build_bias(places[block], places[near], query.dtype, is_causal=is_causal, window=window)
        else:
            mask = attention_mask[:, :, block, near]
        parts.append(attend(module, query[:, :, block], key[:, :, near], value[:, :, near], mask, scaling, dropout)[0])
    return torch.cat(parts, dim=1)


def build_bias(
    queries: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype, *, is_causal: bool, window: int | None
) -> torch.Tensor:
    """What a token may not see of its own row, as a bias (1, 1, T, S), from places (T,) and (S,)."""
    distance = queries[:, None] - keys
    hidden = distance < 0 if is_causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance.abs() >= window)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


@dataclass(frozen=True)
class Pack:
    """Where the rows of a pack lie: runs of neighbours of equal length, (rows, length) each."""

    runs: list[tuple[int, int]]

    @classmethod
    def find(cls, position_ids: torch.Tensor, cu_seq_lens: torch.Tensor | None) -> Pack | None:
        """The rows of a pack; None for ordinary positions, which are one row.

        Without `cu_seq_lens` a row starts wherever the position does not go on by one, as in Hugging Face's masks. A
        row whose positions go on from those of the row before it needs them.

        Raises:
            ValueError: `cu_seq_lens` that do not fit the positions.
        """
        if cu_seq_lens is None:
            if position_ids.shape[0] != 1:
                return None
            starts = torch.nonzero(torch.diff(position_ids[0]) != 1).flatten().tolist()
            edges = [0, *(start + 1 for start in starts), position_ids.shape[1]]
        else:
            edges = cu_seq_lens.tolist()
            total = position_ids.shape[1]
            if (edges[0], edges[-1]) != (0, total) or any(start >= end for start, end in pairwise(edges)):
                raise ValueError(f"cu_seq_lens_q must rise from 0 to the number of tokens ({total}), got {edges}.")
        runs: list[tuple[int, int]] = []
        for start, end in pairwise(edges):
            length = end - start
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        return cls(runs) if len(edges) > 2 else None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(rows for rows, _ in self.runs)

    def lengths(self, device: torch.device) -> torch.Tensor:
        """Tokens of each row, (rows,)."""
        return torch.tensor([length for rows, length in self.runs for _ in range(rows)], device=device)

    def split(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """(1, H, total, d) -> one (rows, H, length, d) per run, as views."""
        heads, width = packed.shape[1], packed.shape[3]
        parts = packed.squeeze(0).split([rows * length for rows, length in self.runs], dim=1)
        return [
            part.reshape(heads, rows, length, width).transpose(0, 1)
            for part, (rows, length) in zip(parts, self.runs, strict=True)
        ]


class PackedAttention(torch.autograd.Function):
    """`attend` for packed rows that see all of their own row, forward and backward.

    The products are so small that what lies between them counts: autograd would keep a node for every operation of
    every run, and join and part the runs by copies of their own.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: list[tuple[int, int]], scale: float
    ) -> torch.Tensor:
        """Queries, keys and values (1, H, total, d) and the runs of a `Pack` -> (1, total, H * d)."""
        _, heads, total, width = query.shape
        joined = query.new_empty(1, total, heads, width)
        kept: list[torch.Tensor] = []
        with torch.autocast(query.device.type, enabled=False):
            for run in _list_places(runs):
                q, k, v = (_fold(states.transpose(1, 2), *run) for states in (query, key, value))
                weights = torch.bmm(q.mul_(scale), k.transpose(1, 2)).softmax(-1)
                _unfold(torch.bmm(weights, v), joined, *run)
                kept += (q, k, v, weights)
        ctx.runs, ctx.scale = runs, scale
        ctx.save_for_backward(*kept)
        return joined.flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        kept = ctx.saved_tensors
        (_, total, _), heads, width = grad.shape, len(kept[0]) // ctx.runs[0][0], kept[0].shape[2]
        grad = grad.unflatten(2, (heads, width))
        grads = [grad.new_empty(1, total, heads, width) for _ in range(3)]
        with torch.autocast(grad.device.type, enabled=False):
            for place, run in enumerate(_list_places(ctx.runs)):
                q, k, v, weights = kept[4 * place : 4 * place + 4]
                own = _fold(grad, *run)
                products = torch._softmax_backward_data(torch.bmm(own, v.transpose(1, 2)), weights, -1, weights.dtype)
                _unfold(torch.bmm(products, k).mul_(ctx.scale), grads[0], *run)
                _unfold(torch.bmm(products.transpose(1, 2), q), grads[1], *run)
                _unfold(torch.bmm(weights.transpose(1, 2), own), grads[2], *run)
        return *(part.transpose(1, 2) for part in grads), None, None


def _list_places(runs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(first token, rows, length) of each run."""
    ends = accumulate((rows * length for rows, length in runs), initial=0)
    return [(start, *run) for start, run in zip(ends, runs, strict=False)]


def _fold(states: torch.Tensor, start: int, rows: int, length: int) -> torch.Tensor:
    """A run of (1, total, H, d) as (rows * H, length, d), a copy."""
    part = states[0, start : start + rows * length].unflatten(0, (rows, length)).transpose(1, 2)
    return part.clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _unfold(part: torch.Tensor, states: torch.Tensor, start: int, rows: int, length: int) -> None:
    """Write a run (rows * H, length, d) to its place in (1, total, H, d)."""
    own = states[0, start : start + rows * length].unflatten(0, (rows, length))
    own.copy_(part.unflatten(0, (rows, -1)).transpose(1, 2))


class TriadAttention(nn.Module):
    """Multi-head attention, section 3.2.2.

    Concat(head_1, ..., head_H) W^O with head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V).
    """

    def __init__(self, config: TriadConfig, layer_idx: int, *, is_causal: bool) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        # An encoder sees so many tokens on either side (Hugging Face's masks); the kernels count the token itself.
        window = config.sliding_window
        self.sliding_window = window if window is None or is_causal else window + 1
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        pack: Pack | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the weights where the implementation gives them.

        Keys and values come from `encoder_hidden_states` (B, S, D) where given, else from the tokens themselves.
        """
        crosses = encoder_hidden_states is not None
        query = self._split_heads(self.q_proj(hidden_states))
        cache: Any = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.cross_attention_cache if crosses else past_key_values.self_attention_cache
        if crosses and past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            source = encoder_hidden_states if crosses else hidden_states
            key, value = self._split_heads(self.k_proj(source)), self._split_heads(self.v_proj(source))
            if rotation is not None:
                query, key = rotate(query, *rotation), rotate(key, *rotation)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if crosses:
                    past_key_values.is_updated[self.layer_idx] = True

        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attend)
        options = {
            "dropout": self.config.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            "sliding_window": self.sliding_window,
            "output_attentions": self.config.output_attentions,
            **kwargs,
        }
        wants_weights = attention is attend and options["output_attentions"]
        if pack is None:
            heads, weights = attention(self, query, key, value, attention_mask, **options)
            heads = heads.flatten(2)
        elif attention is attend and not wants_weights and self._sees_whole_rows(pack):
            heads, weights = PackedAttention.apply(query, key, value, pack.runs, self.scaling), None
        else:
            parts, squares = [], []
            for q, k, v in zip(pack.split(query), pack.split(key), pack.split(value), strict=True):
                part, weights = attention(self, q, k, v, self._build_row_mask(q), **options)
                parts.append(part.flatten(2).flatten(0, 1))
                if wants_weights:
                    squares.append(weights)
            heads = torch.cat(parts)[None]
            weights = _join_weights(squares) if wants_weights else None
        return self.o_proj(heads), weights

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, T, H * d) -> (B, H, T, d)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _sees_whole_rows(self, pack: Pack) -> bool:
        """Whether formula (1) is all there is to do for a pack: no mask and no dropout."""
        longest = max(length for _, length in pack.runs)
        return (
            self._hides_nothing(longest)
            and longest < FUSED_FROM
            and self.num_key_value_groups == 1
            and not (self.training and self.config.attention_dropout)
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        )

    def _hides_nothing(self, length: int) -> bool:
        """Whether every token of a row of that length sees all others."""
        return not self.is_causal and (self.sliding_window is None or self.sliding_window >= length)

    def _build_row_mask(self, query: torch.Tensor) -> torch.Tensor | None:
        """The mask of packed rows of one length, (B, 1, T, T); None where they see all, or `attend` knows the rest."""
        length, window = query.shape[2], self.sliding_window
        if self._hides_nothing(length) or (window is not None and self.config._attn_implementation == "eager"):
            return None
        places = torch.arange(length, device=query.device)
        bias = build_bias(places, places, query.dtype, is_causal=self.is_causal, window=window)
        return bias.expand(query.shape[0], -1, -1, -1)  # FlexAttention looks a row up in the mask


def _join_weights(runs: list[torch.Tensor]) -> torch.Tensor:
    """Weights of the runs of a pack, (rows, H, length, length) each -> (1, H, total, total), 0 between the rows."""
    rows = (row for weights in runs for row in weights)
    return torch.stack([torch.block_diag(*squares) for squares in zip(*rows, strict=True)])[None]


# Positions, section 3.5


def build_sinusoids(position_ids: torch.Tensor, width: int, layout: str) -> torch.Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i / D)) and PE(pos, 2i + 1) = cos(pos / 10000^(2i / D)).

    Args:
        position_ids: (B, T).
        width: D.
        layout: `interleaved`, as written above, or `halves`: all sines first.

    Returns:
        (B, T, D) in float32.
    """
    # In float32 the sine at position 500 is off by 3e-5; MPS knows nothing wider.
    dtype = torch.float32 if position_ids.device.type == "mps" else torch.float64
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=position_ids.device, dtype=dtype) / width)
    angles = position_ids[..., None].to(dtype) * rates
    sines, cosines = angles.sin().float(), angles.cos().float()
    return torch.cat([sines, cosines], -1) if layout == "halves" else torch.stack([sines, cosines], -1).flatten(-2)


def build_rotation(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions (arXiv:2104.09864, formula 34), each (B, 1, T, d) in float32."""
    # In float32 and in this order, as Llama's: another rounding is off by 1e-4 at position 2000.
    rates = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim)
    angles = position_ids[:, None, :, None].float() * rates
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + d / 2) of queries or keys, (B, H, T, d), by the angle of their position."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines.to(states.dtype) + torch.cat([-second, first], dim=-1) * sines.to(states.dtype)


class TriadEmbeddings(nn.Module):
    """The sum of token, position and token-type embeddings, section 3.4: tokens times sqrt(D)."""

    def __init__(self, config: TriadConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.type_vocab_size:
            self.token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = build_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, token_type_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Token embeddings (B, T, D) and positions (B, T) or (1, T) -> (B, T, D)."""
        config = self.config
        summed = inputs_embeds * math.sqrt(config.hidden_size) if config.scale_embeddings else inputs_embeds
        places = position_ids + config.position_offset
        if config.position == "learned":
            summed = summed + self.positions(places)
        elif config.position == "sinusoidal":
            summed = summed + build_sinusoids(places, config.hidden_size, config.sinusoid_layout).to(summed.dtype)
        if config.type_vocab_size:
            types = self.token_types.weight[0] if token_type_ids is None else self.token_types(token_type_ids)
            summed = summed + types
        return self.dropout(self.norm(summed))


# The layer, sections 3.1 and 3.3


def build_norm(config: TriadConfig) -> nn.Module:
    """LayerNorm (arXiv:1607.06450) or RMSNorm."""
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda states: nn.functional.gelu(states, approximate="tanh"),
    "silu": nn.functional.silu,
    "swiglu": nn.functional.silu,
}


class TriadFeedForward(nn.Module):
    """Formula (2): FFN(x) = max(0, x W_1 + b_1) W_2 + b_2; gated: (silu(x W_g) * (x W_1)) W_2."""

    def __init__(self, config: TriadConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        if config.activation == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.is_gated = config.activation == "swiglu"
        self.activate = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        inner = self.up_proj(hidden_states)
        inner = self.activate(self.gate_proj(hidden_states)) * inner if self.is_gated else self.activate(inner)
        return self.down_proj(self.dropout(inner))


class TriadLayer(GradientCheckpointingLayer):
    """Self-attention, attention to the encoder where there is one, and the feed-forward layer, each with a residual.

    Post-norm is the article's LayerNorm(x + Sublayer(x)); pre-norm is x + Sublayer(LayerNorm(x)) (arXiv:2002.04745).
    """

    def __init__(self, config: TriadConfig, layer_idx: int, *, is_causal: bool, crosses: bool) -> None:
        super().__init__()
        self.is_pre = config.norm_position == "pre"
        self.attention = TriadAttention(config, layer_idx, is_causal=is_causal)
        self.attention_norm = build_norm(config)
        if crosses:
            self.cross_attention = TriadAttention(config, layer_idx, is_causal=False)
            self.cross_attention_norm = build_norm(config)
        self.crosses = crosses
        self.mlp = TriadFeedForward(config)
        self.mlp_norm = build_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        pack: Pack | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""

        def attend_to_self(states: torch.Tensor) -> torch.Tensor:
            return self.attention(states, attention_mask, rotation, past_key_values, pack=pack, **kwargs)[0]

        def attend_to_encoder(states: torch.Tensor) -> torch.Tensor:
            return self.cross_attention(
                states, encoder_attention_mask, None, past_key_values, encoder_hidden_states, **kwargs
            )[0]

        hidden_states = self._add(hidden_states, attend_to_self, self.attention_norm)
        if self.crosses:
            hidden_states = self._add(hidden_states, attend_to_encoder, self.cross_attention_norm)
        return self._add(hidden_states, self.mlp, self.mlp_norm)

    def _add(self, states: torch.Tensor, sublayer: Callable[..., torch.Tensor], norm: nn.Module) -> torch.Tensor:
        if self.is_pre:
            return states + self.dropout(sublayer(norm(states)))
        return norm(states + self.dropout(sublayer(states)))


# The model


class TriadPreTrainedModel(PreTrainedModel):
    """What all Triad models share: weights at the start, and what Hugging Face may ask of them."""

    config_class = TriadConfig
    config: TriadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("TriadLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        resized = super()._resize_token_embeddings(*args, **kwargs)
        decoder = getattr(self.base_model, "decoder", None)
        if decoder is not None and decoder.get_input_embeddings() is not resized:  # one of its own
            own = self._get_resized_embeddings(decoder.get_input_embeddings(), resized.weight.shape[0])
            decoder.set_input_embeddings(own)
        return resized

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save under Triad's names; transformers would turn back the `key_mapping` that they were loaded with."""
        self._weight_conversions = None
        super().save_pretrained(*args, **kwargs)


class TriadStack(TriadPreTrainedModel):
    """Embeddings and layers: the encoder, or the decoder."""

    _can_record_outputs = {  # noqa: RUF012  (read by the base class)
        "hidden_states": TriadLayer,
        "attentions": OutputRecorder(TriadAttention, index=1, layer_name="attention"),
        "cross_attentions": OutputRecorder(TriadAttention, index=1, layer_name="cross_attention"),
    }

    def __init__(self, config: TriadConfig, *, is_decoder: bool) -> None:
        super().__init__(config)
        self.is_causal = is_decoder
        crosses = is_decoder and config.shape == "encoder_decoder"
        layers = config.num_decoder_layers if crosses else config.num_hidden_layers
        self.embeddings = TriadEmbeddings(config)
        self.layers = nn.ModuleList(
            TriadLayer(config, index, is_causal=is_decoder, crosses=crosses) for index in range(layers)
        )
        self.norm = build_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.embeddings.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.embeddings.tokens = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run one stack.

        Args:
            input_ids: (B, T), or `inputs_embeds` (B, T, D) in their place.
            attention_mask: (B, T) ones and zeros for padding, or None.
            token_type_ids: (B, T); default 0.
            position_ids: (B, T) or (1, T); default 0, 1, ..., of ids in an encoder with a `position_offset` without
                the padding. Starting again within a row means packed rows.
            encoder_hidden_states, encoder_attention_mask: what a decoder looks at, (B, S, D) and (B, S).
            past_key_values: of the tokens before.
            use_cache: return keys and values.
            kwargs: `cu_seq_lens_q` (rows + 1,) for packed rows, and whatever the attention implementation takes.

        Raises:
            ValueError: neither or both of ids and embeddings, ids or positions out of range.
        """
        if (input_ids is None) == (inputs_embeds is None):
            prefix = "decoder_" if self.is_causal and self.config.shape == "encoder_decoder" else ""
            raise ValueError(f"Give either {prefix}input_ids or {prefix}inputs_embeds, and not both.")
        if inputs_embeds is None:
            _check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embeddings.tokens(input_ids)
        if use_cache and past_key_values is None and self.is_causal:  # an encoder may be given a prefix to look at
            past_key_values = DynamicCache(config=self.config)
            if self.config.shape == "encoder_decoder":
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))
        is_single = position_ids is not None and attention_mask is None and inputs_embeds.shape[0] == 1
        if kwargs.get("cu_seq_lens_q") is not None and not is_single:
            raise ValueError("Packed rows (cu_seq_lens_q) come as (1, total) with position_ids and no attention_mask.")
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        pack = None
        if position_ids is None:
            places = self._count_positions(input_ids, inputs_embeds, seen)
        else:
            places = position_ids
            if is_single and not seen and not torch.compiler.is_exporting():
                pack = self._find_pack(position_ids, kwargs.get("cu_seq_lens_q"))
        self._check_positions(places)

        hidden_states = self.embeddings(inputs_embeds, places, token_type_ids)
        config = self.config
        rotation = None
        if config.position == "rotary":
            rotation = build_rotation(places, config.head_dim, config.rope_theta)
        mask = None if pack else self._build_mask(inputs_embeds, attention_mask, places, past_key_values)
        if encoder_hidden_states is not None:
            encoder_attention_mask = create_bidirectional_mask(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                mask,
                encoder_hidden_states,
                encoder_attention_mask,
                rotation=rotation,
                past_key_values=past_key_values,
                pack=pack,
                position_ids=position_ids,  # as given: flash attention looks for packed rows in them
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def _count_positions(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, seen: int) -> torch.Tensor:
        """(B, T) or (1, T); as RoBERTa, which alone has an offset, counts no padding and puts it before the first."""
        config = self.config
        counts_tokens = config.position == "learned" and config.position_offset and not self.is_causal
        if counts_tokens and input_ids is not None and config.pad_token_id is not None:
            real = (input_ids != config.pad_token_id).long()
            return (real.cumsum(1) + seen) * real - 1
        return torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device)[None]

    def _find_pack(self, position_ids: torch.Tensor, cu_seq_lens: torch.Tensor | None) -> Pack | None:
        """Rows of a pack, for the implementations that know nothing of packs (flash attention does)."""
        crosses = self.config.shape == "encoder_decoder"
        if "flash" in str(self.config._attn_implementation) and not crosses:
            return None
        pack = Pack.find(position_ids, cu_seq_lens)
        if pack and crosses:
            raise ValueError("Rows of an encoder_decoder cannot be packed: pad them, with attention_mask.")
        return pack

    def _build_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
    ) -> torch.Tensor | None:
        cache = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.self_attention_cache
        shared = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": cache,
        }
        has_window = self.config.sliding_window is not None
        if not self.is_causal:
            build = create_bidirectional_sliding_window_mask if has_window else create_bidirectional_mask
            return build(**shared)
        build = create_sliding_window_causal_mask if has_window else create_causal_mask
        return build(**shared, position_ids=position_ids)

    def _check_positions(self, position_ids: torch.Tensor) -> None:
        """A table of learned positions ends somewhere; the error of a bare index says neither where nor what to do."""
        is_silent = torch.compiler.is_compiling() or position_ids.is_cuda or not position_ids.numel()
        if self.config.position != "learned" or is_silent:
            return
        room = self.config.max_position_embeddings - self.config.position_offset
        first, last = (int(position) for position in torch.aminmax(position_ids))
        if last >= room:
            raise ValueError(
                f"A row must have at most {room} tokens (max_position_embeddings), got {last + 1}. Cut or split it."
            )
        if first + self.config.position_offset < 0:
            raise ValueError(f"position_ids must be at least {-self.config.position_offset}, got {first}.")


def _check_ids(input_ids: Any, vocab_size: int) -> None:
    """Ids out of range crash a GPU for good and say little on a CPU; looking is cheap where it does not synchronise."""
    if torch.compiler.is_compiling():
        return
    if not input_ids.numel():
        raise ValueError(f"input_ids must hold a row of at least one token, got shape {tuple(input_ids.shape)}.")
    if input_ids.is_cuda:
        return
    low, high = torch.aminmax(input_ids)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"Token ids must lie in 0 to {vocab_size - 1}, got {int(low)} to {int(high)}: the tokenizer and the model "
            "do not belong together."
        )


class TriadModel(TriadPreTrainedModel):
    """The bare model: an encoder, a decoder, or both (figure 1 of the article)."""

    def __init__(self, config: TriadConfig) -> None:
        super().__init__(config)
        if config.shape != "decoder":
            self.encoder = TriadStack(config, is_decoder=False)
        if config.shape != "encoder":
            self.decoder = TriadStack(config, is_decoder=True)
        if config.shape == "encoder_decoder":
            self._tied_weights_keys = {"decoder.embeddings.tokens.weight": "encoder.embeddings.tokens.weight"}
        self.post_init()

    @property
    def first(self) -> TriadStack:
        """The stack that reads `input_ids`."""
        return self.decoder if self.config.shape == "decoder" else self.encoder

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings of the stack that reads `input_ids`."""
        return self.first.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace them, in both stacks where they share."""
        self.first.set_input_embeddings(value)
        if self.config.shape == "encoder_decoder" and self.config.tie_word_embeddings:
            self.decoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions | Seq2SeqModelOutput:
        """Run the stacks that there are; the arguments are those of `TriadStack.forward`, for each of the two.

        Returns:
            `last_hidden_state` (B, T, D) of the last stack, and what was asked for.
        """
        kwargs["return_dict"] = True  # of the stacks; the decorator makes the tuple
        if self.config.shape != "encoder_decoder":
            return self.first(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )


# Language models


class TriadLanguageModel(TriadPreTrainedModel):
    """What the three language models share: the bare model and the matrix from states to tokens."""

    shape: str

    def __init__(self, config: TriadConfig) -> None:
        if config.shape != self.shape:
            raise ValueError(f"{type(self).__name__} needs a config of shape {self.shape}, got {config.shape}.")
        super().__init__(config)
        self.model = TriadModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        stack = "decoder" if config.shape == "decoder" else "encoder"
        self._tied_weights_keys = {"lm_head.weight": f"model.{stack}.embeddings.tokens.weight"}
        if config.shape == "encoder_decoder":
            self._tied_weights_keys["model.decoder.embeddings.tokens.weight"] = "model.encoder.embeddings.tokens.weight"

    def get_output_embeddings(self) -> nn.Linear:
        """The matrix from states to tokens."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace it."""
        self.lm_head = value


class TriadForMaskedLM(TriadLanguageModel):
    """An encoder that fills in masked tokens (arXiv:1810.04805): dense layer, activation and norm before the tokens."""

    shape = "encoder"

    def __init__(self, config: TriadConfig) -> None:
        super().__init__(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_norm = build_norm(config)
        self.activate = ACTIVATIONS[config.activation]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits (B, T, V), and the loss over labels (B, T) that are not -100.

        With `logits_to_keep` (M,), indices of the positions that are asked for, both are (B, M).
        """
        outputs = self.model(input_ids, attention_mask, token_type_ids, position_ids, **_split_loss(kwargs))
        states = outputs.last_hidden_state if logits_to_keep is None else outputs.last_hidden_state[:, logits_to_keep]
        states = self.transform_norm(self.activate(self.transform(states)))
        logits = self.lm_head(states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TriadForCausalLM(TriadLanguageModel, GenerationMixin):
    """A decoder that says the next token."""

    shape = "decoder"

    def __init__(self, config: TriadConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits (B, T, V) of the next tokens, and the loss over labels (B, T), which are shifted here.

        Args:
            input_ids, attention_mask: as in `TriadStack.forward`, with all of its other arguments.
            position_ids: named here because `generate` looks for them: rows padded on the left begin at 0 only so.
            labels: the tokens themselves; -100 counts for nothing.
            logits_to_keep: the last so many positions, or their indices; 0 for all.
        """
        outputs = self.model(input_ids, attention_mask, position_ids=position_ids, **_split_loss(kwargs))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TriadForSeq2SeqLM(TriadLanguageModel, GenerationMixin):
    """An encoder and a decoder that turn one sequence into another: the article's own model."""

    shape = "encoder_decoder"

    def __init__(self, config: TriadConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # labels are what the decoder should say: nothing is shifted in the loss
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) moved right by one, behind the start token; -100 becomes padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError("TriadConfig must hold decoder_start_token_id and pad_token_id to make decoder inputs.")
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == IGNORED, pad)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits (B, T, V) of the decoder, and the loss over labels (B, T)."""
        if labels is not None and decoder_input_ids is None and kwargs.get("decoder_inputs_embeds") is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            **_split_loss(kwargs),
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


def _split_loss(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the model takes of a head's arguments: all but what only the loss knows; it answers by name."""
    taken = {name: value for name, value in kwargs.items() if name not in ("num_items_in_batch", "shift_labels")}
    return taken | {"return_dict": True}


# Heads for labels


class TriadPooler(nn.Module):
    """One vector for each row."""

    def __init__(self, config: TriadConfig, pooling: str | None = None) -> None:
        super().__init__()
        self.pooling = pooling or config.pooling
        if self.pooling == "pooler":
            self.dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.activate = torch.tanh if config.pooler_activation == "tanh" else nn.functional.relu

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pack: Pack | None
    ) -> torch.Tensor:
        """(B, T, D), or (1, total, D) packed -> (rows, D). A row of padding alone gives zeros, not NaN, as its mean."""
        if pack is not None:
            states = hidden_states[0]
            if self.pooling == "mean":
                parts = states.split([rows * length for rows, length in pack.runs])
                return torch.cat([part.unflatten(0, run).mean(1) for part, run in zip(parts, pack.runs, strict=True)])
            lengths = pack.lengths(hidden_states.device)
            ends = lengths.cumsum(0)
            pooled = states[ends - 1] if self.pooling == "last" else states[ends - lengths]
        elif self.pooling == "mean":
            if attention_mask is None:
                return hidden_states.mean(1)
            mask = attention_mask[..., None].to(hidden_states.dtype)
            return (hidden_states * mask).sum(1) / mask.sum(1).clamp(min=1)
        elif attention_mask is not None:  # with padding on either side
            real = attention_mask.int()
            if self.pooling == "last":
                real = real * torch.arange(real.shape[1], device=real.device)
            places = real.argmax(dim=1)
            pooled = hidden_states[torch.arange(places.shape[0], device=places.device), places]
        else:
            pooled = hidden_states[:, -1 if self.pooling == "last" else 0]
        return self.activate(self.dense(pooled)) if self.pooling == "pooler" else pooled


class TriadLabeler(TriadPreTrainedModel):
    """What the models with a head for labels share: the bare model, dropout, and how a row is pooled."""

    def __init__(self, config: TriadConfig) -> None:
        if config.shape == "encoder_decoder":
            raise ValueError(f"{type(self).__name__} needs a config of one stack, got shape encoder_decoder.")
        super().__init__(config)
        self.model = TriadModel(config)
        rate = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(rate)

    def run(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Callable[[TriadPooler], torch.Tensor]]:
        """The bare model's outputs, and how to pool them."""
        options = _split_loss(kwargs) | {"use_cache": False}
        outputs = self.model(input_ids, attention_mask, token_type_ids, position_ids, **options)
        pack = None
        may_pack = attention_mask is None and not torch.compiler.is_exporting()
        if position_ids is not None and may_pack and len(outputs.last_hidden_state) == 1:
            pack = Pack.find(position_ids, kwargs.get("cu_seq_lens_q"))
        if attention_mask is not None:  # of the tokens, without a prefix
            attention_mask = attention_mask[:, -outputs.last_hidden_state.shape[1] :]
        elif self.config.pooling == "last" and input_ids is not None and position_ids is None:
            pad = self.config.pad_token_id  # as Hugging Face's decoders look for the last token
            attention_mask = None if pad is None else input_ids != pad
        return outputs, lambda pooler: pooler(outputs.last_hidden_state, attention_mask, pack)


class TriadForSequenceClassification(TriadLabeler):
    """A label, or a number, for each row."""

    def __init__(self, config: TriadConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.pooler = TriadPooler(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, bias=config.classifier_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (rows, K), and the loss over labels (rows,): cross-entropy, or what `problem_type` says."""
        kwargs["past_key_values"] = past_key_values  # named because PEFT's prefix tuning looks for it
        outputs, pool = self.run(input_ids, attention_mask, token_type_ids, position_ids, kwargs)
        pooled = pool(self.pooler)  # (rows, D)
        if self.config.normalize_pooled:
            pooled = nn.functional.normalize(pooled, dim=-1)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TriadForTokenClassification(TriadLabeler):
    """A label for each token."""

    def __init__(self, config: TriadConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits (B, T, K), and the loss over labels (B, T) that are not -100."""
        kwargs["past_key_values"] = past_key_values
        outputs, _ = self.run(input_ids, attention_mask, token_type_ids, position_ids, kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TriadForQuestionAnswering(TriadLabeler):
    """Where in a passage the answer starts and ends."""

    def __init__(self, config: TriadConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)  # PEFT knows the head of answers by this name
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Logits (B, T) of start and end, and the mean of both losses over positions (B,)."""
        kwargs["past_key_values"] = past_key_values
        outputs, _ = self.run(input_ids, attention_mask, token_type_ids, position_ids, kwargs)
        starts, ends = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(starts, ends, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=starts,
            end_logits=ends,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@dataclass
class SentenceEmbeddingOutput(ModelOutput):
    """Embeddings of whole rows.

    Args:
        embeddings: (rows, D).
        hidden_states, attentions: where asked for.
    """

    embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class TriadForSentenceEmbedding(TriadLabeler):
    """One vector for each row, near those of rows that mean the same (arXiv:1908.10084)."""

    def __init__(self, config: TriadConfig) -> None:
        super().__init__(config)
        self.pooler = TriadPooler(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SentenceEmbeddingOutput:
        """Embeddings (rows, D), of length 1 where `normalize_embeddings`."""
        outputs, pool = self.run(input_ids, attention_mask, token_type_ids, position_ids, kwargs)
        embeddings = pool(self.pooler)
        if self.config.normalize_embeddings:
            embeddings = nn.functional.normalize(embeddings, dim=-1)
        return SentenceEmbeddingOutput(embeddings, outputs.hidden_states, outputs.attentions)


@dataclass
class MultiTaskOutput(ModelOutput):
    """What every head says.

    Args:
        loss: of the named task's labels.
        logits: of the named task; else name -> logits of each.
        hidden_states, attentions: where asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | dict[str, torch.Tensor] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class TriadForMultiTask(TriadLabeler):
    """Several named heads on one base: `config.heads` says which."""

    def __init__(self, config: TriadConfig) -> None:
        super().__init__(config)
        types = ("sequence_classification", "token_classification", "sentence_embedding")
        if not config.heads:
            raise ValueError("TriadForMultiTask needs at least one head in config.heads, got none.")
        for name, head in config.heads.items():
            if head.get("type") not in types:
                raise ValueError(f"heads.{name}.type must be one of {', '.join(types)}, got {head.get('type')!r}.")
            if head["type"] == "sentence_embedding":
                if "num_labels" in head:
                    raise ValueError(f"heads.{name}.num_labels must be left out for an embedding, which has no labels.")
            elif not isinstance(head.get("num_labels"), int) or head["num_labels"] < 1:
                raise ValueError(f"heads.{name}.num_labels must be at least 1, got {head.get('num_labels')!r}.")
            if not name or "." in name or hasattr(nn.ModuleDict, name) or name == "training":
                raise ValueError(f"heads: a head cannot be called {name!r}; torch keeps such names for itself.")
        self.loss_type = "ForMaskedLM"  # plain cross-entropy over the last dimension
        self.pooler = TriadPooler(config)
        self.classifiers = nn.ModuleDict(  # in the order in which a saved config comes back
            {
                name: nn.Linear(config.hidden_size, head["num_labels"])
                for name, head in sorted(config.heads.items())
                if head["type"] != "sentence_embedding"  # has no weights of its own
            }
        )
        self.post_init()

    def answer(self, name: str, kind: str, pooled: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        """What one head makes of rows, (rows, D), or of tokens, (B, T, D)."""
        if kind == "token_classification":
            answered: torch.Tensor = self.classifiers[name](self.dropout(tokens))
        elif kind == "sentence_embedding" and pooled is not None:
            answered = nn.functional.normalize(pooled, dim=-1)
        else:
            answered = self.classifiers[name](self.dropout(pooled))
        return answered

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        task: str | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MultiTaskOutput:
        """Logits of one task, or of all; of an embedding the vectors of length 1, (rows, D).

        Args:
            input_ids, attention_mask: as in `TriadStack.forward`, with all of its other arguments.
            task: name of a head; None for all of them, from one pass through the base.
            labels: of that task, (rows,) or (B, T); -100 counts for nothing.

        Raises:
            ValueError: no such task, or labels without a task.
        """
        types = {name: head["type"] for name, head in sorted(self.config.heads.items())}
        if task is not None and task not in types:
            raise ValueError(f"task must be one of {', '.join(types)}, got {task!r}.")
        if labels is not None and task is None:
            raise ValueError("labels need to come with the task that they belong to.")
        outputs, pool = self.run(input_ids, attention_mask, token_type_ids, position_ids, kwargs)
        names = list(types) if task is None else [task]
        pooled = None
        if any(types[name] != "token_classification" for name in names):
            pooled = pool(self.pooler)  # (rows, D)
        logits = {name: self.answer(name, types[name], pooled, outputs.last_hidden_state) for name in names}
        loss = None
        if task is not None and labels is not None:
            loss = self.loss_function(logits[task], labels, vocab_size=logits[task].shape[-1], **kwargs)
        return MultiTaskOutput(
            loss=loss,
            logits=logits if task is None else logits[task],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AUTO_CLASSES = {
    TriadModel: "AutoModel",
    TriadForMaskedLM: "AutoModelForMaskedLM",
    TriadForCausalLM: "AutoModelForCausalLM",
    TriadForSeq2SeqLM: "AutoModelForSeq2SeqLM",
    TriadForSequenceClassification: "AutoModelForSequenceClassification",
    TriadForTokenClassification: "AutoModelForTokenClassification",
    TriadForQuestionAnswering: "AutoModelForQuestionAnswering",
    TriadForSentenceEmbedding: "AutoModel",
    TriadForMultiTask: "AutoModel",
}
for model_class, auto_class in AUTO_CLASSES.items():
    model_class.register_for_auto_class(auto_class)
