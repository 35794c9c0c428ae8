"""Bottleneck adapters against their formulas, worked layer by layer in plain torch."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, relu, silu
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MarianConfig,
    MarianModel,
    T5Config,
    T5Model,
)

from finetune.adapters.bottleneck import BottleneckConfig, Slot, find_sublayers
from finetune.adapters.frozen import register
from finetune.errors import RecipeError, UsageError
from finetune.models.triad import TriadConfig, TriadModel

WIDTH, INNER = 8, 12
SIZE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": INNER,
    "vocab_size": 20,
    "max_position_embeddings": 16,
}
IDS = torch.tensor([[4, 5, 6, 7], [9, 8, 7, 6]])

register()


def attach(model: nn.Module, **options: Any) -> Any:
    """The model with an adapter of random weights."""
    wrapped = get_peft_model(model.eval(), BottleneckConfig(**options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.5)
    return wrapped


def add_bottleneck(layer: Any, states: torch.Tensor, read: torch.Tensor, activate: Any, scaling: float) -> torch.Tensor:
    """states + s up(act(down(read))), with the weights of a wrapped layer."""
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    return states + scaling * linear(activate(linear(read, down.weight, down.bias)), up.weight, up.bias)


def apply(norm: nn.LayerNorm, states: torch.Tensor) -> torch.Tensor:
    return layer_norm(states, (WIDTH,), norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize(
    ("style", "activation", "activate", "scaling"),
    [
        ("houlsby", "silu", silu, None),
        ("pfeiffer", "relu", relu, None),
        ("pfeiffer", "tanh", torch.tanh, 0.5),
        ("parallel", "relu", relu, None),
        ("parallel", "gelu", gelu, 2.0),
    ],
)
def test_formulas_in_a_post_norm_layer(style, activation, activate, scaling):
    """BERT: h = norm(x + attention), norm(h + feed-forward); the bottleneck stands inside of the sums."""
    torch.manual_seed(0)
    model = attach(
        BertModel(BertConfig(**SIZE), add_pooling_layer=False),
        style=style,
        activation=activation,
        scaling=scaling,
        reduction=2,
    )
    used = {"houlsby": 1.0, "pfeiffer": 1.0, "parallel": 4.0}[style] if scaling is None else scaling
    layer, x = model.base_model.model.encoder.layer[0], model.base_model.model.embeddings(IDS)
    out = layer.attention.output
    dense = out.dense.base_layer if style == "houlsby" else out.dense
    attended = linear(layer.attention.self(x)[0], dense.weight, dense.bias)
    if style == "houlsby":
        attended = add_bottleneck(out.dense, attended, attended, activate, used)
    h = apply(out.LayerNorm, x + attended)
    first = layer.intermediate.dense
    first = first.base_layer if style == "parallel" else first
    last = layer.output.dense
    fed = linear(gelu(linear(h, first.weight, first.bias)), last.base_layer.weight, last.base_layer.bias)
    fed = add_bottleneck(last, fed, h if style == "parallel" else fed, activate, used)
    torch.testing.assert_close(model(IDS).last_hidden_state, apply(layer.output.LayerNorm, h + fed))


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer", "parallel"])
def test_formulas_in_a_pre_norm_layer(style):
    """Triad as a decoder: h = x + attention(norm(x)), h + feed-forward(norm(h)), gated; beside it is norm(h)."""
    torch.manual_seed(0)
    config = TriadConfig(shape="decoder", norm_position="pre", activation="swiglu", dropout=0.0, **SIZE)
    model = attach(TriadModel(config), style=style, reduction=4)
    stack = model.base_model.model.decoder
    layer, x = stack.layers[0], stack.embeddings(stack.embeddings.tokens(IDS), torch.arange(4)[None], None)
    attention = layer.attention
    z = apply(layer.attention_norm, x)
    q, k, v = (
        (projection(z)).unflatten(-1, (2, 4)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    output = attention.o_proj.base_layer if style == "houlsby" else attention.o_proj
    attended = linear(heads, output.weight, output.bias)
    if style == "houlsby":
        attended = add_bottleneck(attention.o_proj, attended, attended, relu, 1.0)
    h = x + attended
    z = apply(layer.mlp_norm, h)
    up, gate, down = layer.mlp.up_proj, layer.mlp.gate_proj, layer.mlp.down_proj
    up = up.base_layer if style == "parallel" else up
    gated = silu(linear(z, gate.weight, gate.bias)) * linear(z, up.weight, up.bias)
    fed = linear(gated, down.base_layer.weight, down.base_layer.bias)
    fed = add_bottleneck(down, fed, *((z, relu, 4.0) if style == "parallel" else (fed, relu, 1.0)))
    torch.testing.assert_close(model(IDS).last_hidden_state, apply(stack.norm, h + fed))


# Layers with a bottleneck, of one layer of the encoder and of the decoder: houlsby, pfeiffer or parallel.
PLACES = {"encoder": (2, 1), "decoder": (2, 1), "encoder_decoder": (2 + 3, 1 + 1)}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 20).map(lambda half: 2 * half),
    layers=st.integers(1, 3),
    reduction=st.one_of(st.integers(1, 64), st.floats(1, 64)),
    style=st.sampled_from(["houlsby", "pfeiffer", "parallel"]),
    shape=st.sampled_from(list(PLACES)),
)
def test_counts_by_formula(width, layers, reduction, style, shape):
    """A bottleneck of m has D m + m weights down and m D + D up; m is D / reduction, rounded down, and at least 1."""
    sizes = {"hidden_size": width, "num_attention_heads": 1, "intermediate_size": 3, "vocab_size": 5}
    with torch.device("meta"):
        model = TriadModel(TriadConfig(shape=shape, num_hidden_layers=layers, **sizes))
    plain = sum(parameter.numel() for parameter in model.parameters())
    wrapped = get_peft_model(model, BottleneckConfig(style=style, reduction=reduction))
    m = max(1, int(width / reduction))
    places = layers * PLACES[shape][0 if style == "houlsby" else 1]
    added = places * (2 * width * m + m + width)
    assert wrapped.get_nb_trainable_parameters() == (added, plain + added)


FAMILIES = {
    "triad": (lambda: TriadModel(TriadConfig(shape="encoder_decoder", **SIZE)), 5, 2),
    "bert": (lambda: BertModel(BertConfig(**SIZE)), 2, 1),
    "bert decoder": (lambda: BertModel(BertConfig(**SIZE, is_decoder=True, add_cross_attention=True)), 3, 1),
    "gpt2": (lambda: GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16)), 2, 1),
    "gpt2 across": (lambda: GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, add_cross_attention=True)), 3, 1),
    "llama": (lambda: LlamaModel(LlamaConfig(**SIZE)), 2, 1),
    "marian": (
        lambda: MarianModel(
            MarianConfig(
                d_model=8,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                vocab_size=20,
                pad_token_id=0,
            )
        ),
        5,
        2,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_sublayers(family):
    build, houlsby, pfeiffer = FAMILIES[family]
    with torch.device("meta"):
        model = build()
    assert len(find_sublayers(model, "houlsby", [])) == houlsby
    assert len(find_sublayers(model, "pfeiffer", [])) == len(find_sublayers(model, "parallel", [])) == pfeiffer
    assert len(set(find_sublayers(model, "houlsby", []))) == houlsby


def test_a_head_with_such_names_is_no_sublayer():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(2, 3), "down_proj": nn.Linear(3, 2)})})
    both = nn.ModuleDict({"base": model, "head": nn.ModuleDict(dict(model))})
    assert find_sublayers(both, "pfeiffer", ["head"]) == ["base.mlp.down_proj"]


def test_words_for_a_base_without_such_layers():
    with torch.device("meta"):
        t5 = T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=10))
    with pytest.raises(RecipeError) as caught:
        get_peft_model(t5, BottleneckConfig())
    assert str(caught.value) == (
        "adapter.style: pfeiffer must find the base's feed-forward layers by their names (they end in mlp.down_proj, "
        "output.dense, ffn.lin2, mlp.c_proj, fc2), got a base without (T5Model). Set model.architecture: triad where "
        "the base has that form, or adapter.method: lora."
    )
    lone = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(2, 3), "down_proj": nn.Linear(3, 2)})})
    assert find_sublayers(lone, "pfeiffer", []) == ["mlp.down_proj"]
    with pytest.raises(
        RecipeError, match=r"^adapter\.style: houlsby must find the base's attention layers by their name"
    ):
        find_sublayers(lone, "houlsby", [])


def test_words_for_a_place_that_has_nothing_beside_it():
    model = BertModel(BertConfig(**SIZE))
    config = BottleneckConfig(style="parallel", target_modules=["attention.output.dense"])
    with pytest.raises(RecipeError) as caught:
        get_peft_model(model, config)
    assert str(caught.value) == (
        "adapter.style: parallel must stand beside a feed-forward layer, got encoder.layer.0.attention.output.dense."
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"style": "compacter"}, "adapter.style: must be one of houlsby, pfeiffer, parallel, got 'compacter'."),
        ({"activation": "mish"}, "adapter.activation: must be one of relu, gelu, silu, tanh, got 'mish'."),
        ({"reduction": 0.5}, "adapter.reduction: must be at least 1, got 0.5."),
    ],
)
def test_words_for_what_a_bottleneck_cannot_be(options, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the words are compared whole)
        BottleneckConfig(**options)
    assert str(caught.value) == words


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_words_for_a_merge(merge):
    model = attach(BertModel(BertConfig(**SIZE)), style="houlsby")
    before = model(IDS).last_hidden_state
    with pytest.raises(UsageError) as caught:
        getattr(model, merge)()
    assert str(caught.value) == (
        "adapter.method: must be linear to be merged into the base, got adapter: a bottleneck has an activation "
        "inside. Keep base and adapter apart, or train with adapter.method: lora."
    )
    assert torch.equal(model(IDS).last_hidden_state, before)


def test_what_a_thread_reads_stays_with_it():
    """A service answers in several threads with one model."""
    slot, seen = Slot(), []
    slot.states = torch.ones(2)
    thread = threading.Thread(target=lambda: seen.append(slot.take()))
    thread.start()
    thread.join()
    assert seen == [None]
    assert torch.equal(slot.take(), torch.ones(2))
    assert slot.take() is None


def test_nothing_is_held_after_a_pass():
    model = attach(BertModel(BertConfig(**SIZE)), style="parallel")
    model(IDS)
    slots = [module.slot for module in model.modules() if hasattr(module, "slot")]
    assert [slot.states for slot in slots] == [None, None]
    with model.disable_adapter():
        model(IDS)
    assert [slot.states for slot in slots] == [None, None]
