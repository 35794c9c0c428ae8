"""Triad's parts and whole against torch.nn, transformers' own functions, numbers worked by hand, and invariances."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from finetune.models.triad import (
    TriadConfig,
    TriadForCausalLM,
    TriadForMaskedLM,
    TriadForSeq2SeqLM,
    TriadForSequenceClassification,
    TriadModel,
)
from finetune.models.triad.modeling_triad import (
    FUSED_FROM,
    TriadAttention,
    TriadFeedForward,
    attend,
    build_norm,
    build_rotation,
    build_sinusoids,
    rotate,
)

V, D, H = 50, 16, 4
SOURCE = torch.tensor([[5, 9, 14, 3, 0, 0], [7, 4, 22, 31, 8, 2], [6, 0, 0, 0, 0, 0]])
SOURCE_MASK = (SOURCE != 0).long()
TARGET = torch.tensor([[1, 17, 12, 9, 8], [1, 6, 40, 0, 0], [1, 3, 3, 21, 0]])
TARGET_MASK = (TARGET != 0).long()
IMPLEMENTATIONS = ("eager", "sdpa")


def build_config(**changes: Any) -> TriadConfig:
    settings: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": H,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
        "dropout": 0.0,
        "decoder_start_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return TriadConfig(**(settings | changes))


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> Any:
    """Every weight drawn anew, biases and norms too: at the start they are 0 and 1, and would hide a wrong one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return model.eval()


def build(model_class: type, implementation: str = "eager", **changes: Any) -> Any:
    model = fill(model_class(build_config(**changes)))
    model.set_attn_implementation(implementation)
    return model


def check_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# Attention


def test_attention_worked_by_hand() -> None:
    """Products / sqrt(4): 0 and 0, which weigh 1/2 and 1/2; 0 and ln 3, which weigh 1/4 and 3/4."""
    query = torch.tensor([[0.0, 0, 0, 0], [2, 0, 0, 0]])[None, None]
    key = torch.tensor([[0.0, 0, 0, 0], [math.log(3), 0, 0, 0]])[None, None]
    value = torch.tensor([[1.0, 0], [5.0, 8]])[None, None]
    mixed, weights = attend(nn.Identity(), query, key, value, None)
    check_close(weights[0, 0], torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    check_close(mixed[0, :, 0], torch.tensor([[3.0, 4.0], [4.0, 6.0]]))


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_attention_is_that_of_torch(key_heads: int, masked: bool, scaling: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 8) for heads, length in ((4, 5), (key_heads, 7), (key_heads, 7)))
    mask = torch.randn(2, 1, 5, 7) if masked else None
    found, weights = attend(nn.Identity(), query, key, value, mask, scaling=scaling)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    check_close(found, expected.transpose(1, 2), 1e-6)
    check_close(weights.sum(-1), torch.ones(2, 4, 5))


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
@torch.enable_grad()
def test_long_rows_are_the_same_products(key_heads: int, masked: bool) -> None:
    """Through the fused kernel, which gives no weights; through the products where the weights are asked for."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, FUSED_FROM, 8, requires_grad=True) for heads in (4, key_heads, key_heads)]
    mask = torch.randn(2, 1, FUSED_FROM, FUSED_FROM) if masked else None
    found, none = attend(nn.Identity(), *inputs, mask, scaling=0.3)
    expected, weights = attend(nn.Identity(), *inputs, mask, scaling=0.3, output_attentions=True)
    assert none is None
    assert weights is not None
    check_close(found, expected, 1e-5)
    upstream = torch.randn_like(found)
    pairs = (torch.autograd.grad(states, inputs, upstream) for states in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        check_close(ours, theirs, 1e-5)
    short = [states[:, :, : FUSED_FROM - 1] for states in inputs]
    assert attend(nn.Identity(), *short, None)[1] is not None


def test_long_rows_drop_weights_in_training_only() -> None:
    torch.manual_seed(0)
    states = torch.randn(1, 1, FUSED_FROM, 4)
    module = nn.Identity()
    kept, dropped = (
        attend(mode, states, states, states, None, dropout=0.9)[0] for mode in (module.eval(), nn.Identity())
    )
    check_close(kept, attend(module.eval(), states, states, states, None)[0])
    assert not torch.allclose(kept, dropped)


def test_attention_drops_weights_in_training_only() -> None:
    torch.manual_seed(0)
    query = key = value = torch.randn(1, 2, 6, 4)
    module = nn.Identity()
    kept = attend(module.eval(), query, key, value, None, dropout=0.5)[1]
    dropped = attend(module.train(), query, key, value, None, dropout=0.5)[1]
    assert (kept > 0).all()
    assert 0 < (dropped == 0).sum() < dropped.numel()
    check_close(dropped[dropped != 0], 2 * kept[dropped != 0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_queries_are_full_heads_with_repeated_weights(implementation: str, shape: str, masked: bool) -> None:
    grouped = build(TriadModel, implementation, shape=shape, num_key_value_heads=2, pooling="mean")
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            by_head = weight.unflatten(0, (2, D // H))
            weights[name] = by_head[torch.tensor([0, 0, 1, 1])].flatten(0, 1)  # heads 0 and 1 share the first
    full = build(TriadModel, implementation, shape=shape, pooling="mean")
    full.load_state_dict(weights)
    mask = SOURCE_MASK if masked else None
    check_close(grouped(SOURCE, mask).last_hidden_state, full(SOURCE, mask).last_hidden_state)


def sees(shape: str, window: int | None, query: int, key: int) -> bool:
    """What the configuration's words say, for one pair of places."""
    if shape == "decoder":
        return key <= query and (window is None or query - key < window)
    return window is None or abs(query - key) <= window


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("window", [1, 2, 5, 6])
@pytest.mark.parametrize("padded", [False, True])
def test_a_window_is_the_mask_that_its_words_say(
    implementation: str, shape: str, window: int | None, padded: bool
) -> None:
    windowed = build(TriadModel, implementation, shape=shape, sliding_window=window, pooling="mean")
    plain = build(TriadModel, implementation, pooling="mean")  # an encoder without a window, which the mask does for
    plain.load_state_dict({name.replace("decoder.", "encoder."): w for name, w in windowed.state_dict().items()})
    rows = SOURCE[:2]
    mask = SOURCE_MASK[:2] if padded else torch.ones_like(rows)
    allowed = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    for row in range(2):
        for query in range(6):
            for key in range(6):
                allowed[row, 0, query, key] = sees(shape, window, query, key) and bool(mask[row, key])
    by_hand = allowed if implementation == "sdpa" else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    found = windowed(rows, mask if padded else None).last_hidden_state
    expected = plain(rows, by_hand).last_hidden_state
    check_close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize(("window", "key_heads"), [(None, 4), (2, 2)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_implementations_agree(shape: str, window: int | None, key_heads: int) -> None:
    model = build(TriadModel, shape=shape, sliding_window=window, num_key_value_heads=key_heads, pooling="mean")
    packed = {"input_ids": SOURCE[1:2], "position_ids": torch.tensor([[0, 1, 0, 1, 0, 1]])}
    found = {}
    # FlexAttention compiles for a minute on a CPU: its uncompiled form computes the same.
    with torch.compiler.set_stance("force_eager"):
        for implementation in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(implementation)
            found[implementation] = (
                model(SOURCE[:2], SOURCE_MASK[:2]).last_hidden_state[SOURCE_MASK[:2].bool()],
                model(SOURCE[:2]).last_hidden_state,
                model(**packed).last_hidden_state,
            )
    for implementation in ("sdpa", "flex_attention"):
        for other, eager in zip(found[implementation], found["eager"], strict=True):
            check_close(other, eager)


def test_implementations_agree_on_an_encoder_and_a_decoder() -> None:
    model = build(TriadModel, shape="encoder_decoder")
    inputs = (SOURCE, SOURCE_MASK)
    eager = model(*inputs, decoder_input_ids=TARGET, decoder_attention_mask=TARGET_MASK).last_hidden_state
    model.set_attn_implementation("sdpa")
    sdpa = model(*inputs, decoder_input_ids=TARGET, decoder_attention_mask=TARGET_MASK).last_hidden_state
    check_close(sdpa[TARGET_MASK.bool()], eager[TARGET_MASK.bool()])


# Normalisation and the feed-forward layer


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norms_are_their_formulas(norm: str) -> None:
    layer = fill(build_norm(build_config(norm=norm, norm_eps=0.01)))
    layer.weight.copy_(torch.linspace(0.5, 2, D))
    states = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1)) + 1
    if norm == "layernorm":
        centred = states - states.mean(-1, keepdim=True)
        expected = centred / ((centred**2).mean(-1, keepdim=True) + 0.01).sqrt() * layer.weight + layer.bias
    else:
        expected = states / ((states**2).mean(-1, keepdim=True) + 0.01).sqrt() * layer.weight
    check_close(layer(states), expected)


ACTIVATIONS = {
    "relu": lambda x: max(0.0, x),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_is_formula_2(activation: str) -> None:
    layer = fill(TriadFeedForward(build_config(activation=activation)))
    states = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    inner = states @ layer.up_proj.weight.T + layer.up_proj.bias
    inner = inner.clone().apply_(ACTIVATIONS[activation])
    check_close(layer(states), inner @ layer.down_proj.weight.T + layer.down_proj.bias)


def test_swiglu_is_its_formula() -> None:
    layer = fill(TriadFeedForward(build_config(activation="swiglu", mlp_bias=False)))
    assert [name for name, _ in layer.named_parameters()] == ["up_proj.weight", "gate_proj.weight", "down_proj.weight"]
    states = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    gate = (states @ layer.gate_proj.weight.T).apply_(ACTIVATIONS["silu"])
    expected = (gate * (states @ layer.up_proj.weight.T)) @ layer.down_proj.weight.T
    check_close(layer(states), expected)


# Positions


def test_sinusoids_worked_by_hand() -> None:
    """Width 4: the second pair turns at a hundredth of the speed of the first, 1 / 10000^(2 / 4)."""
    table = [
        [0.0, 1.0, 0.0, 1.0],
        [0.841471, 0.540302, 0.009999833, 0.99995],
        [0.909297, -0.416147, 0.019998667, 0.99980001],
        [0.141120, -0.989992, 0.029995500, 0.99955003],
    ]
    found = build_sinusoids(torch.arange(4)[None], 4, "interleaved")[0]
    torch.testing.assert_close(found, torch.tensor(table), atol=1e-6, rtol=0)


def test_sinusoids_are_the_formula_at_every_place() -> None:
    positions, width = [0, 1, 2, 17, 63, 511, 4999], 12
    interleaved = build_sinusoids(torch.tensor([positions]), width, "interleaved")[0]
    halves = build_sinusoids(torch.tensor([positions]), width, "halves")[0]
    for row, position in enumerate(positions):
        for i in range(width // 2):
            angle = position / 10000 ** (2 * i / width)
            for found in (interleaved[row, 2 * i], halves[row, i]):
                assert found.item() == pytest.approx(math.sin(angle), abs=1e-6)
            for found in (interleaved[row, 2 * i + 1], halves[row, width // 2 + i]):
                assert found.item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_embeddings_are_tokens_times_the_root_of_the_width_plus_positions_and_types() -> None:
    choices = {"type_vocab_size": 2, "position": "learned", "position_offset": 3, "pad_token_id": None}
    model = build(TriadModel, **choices, embedding_norm=True)
    table = model.encoder.embeddings
    types = torch.tensor([[0, 0, 1, 1, 1, 0]]).expand(3, 6)
    summed = table.tokens.weight[SOURCE] * 4 + table.positions.weight[3:9] + table.token_types.weight[types]
    expected = nn.functional.layer_norm(summed, (D,), table.norm.weight, table.norm.bias, 1e-5)
    found = model(SOURCE, token_type_ids=types, output_hidden_states=True).hidden_states[0]
    check_close(found, expected)
    untyped = model(SOURCE, output_hidden_states=True).hidden_states[0]
    check_close(untyped, model(SOURCE, token_type_ids=types * 0, output_hidden_states=True).hidden_states[0])
    assert not torch.equal(untyped, found)


@pytest.mark.parametrize("scale", [False, True])
def test_embeddings_may_be_given_in_place_of_ids(scale: bool) -> None:
    model = build(TriadModel, scale_embeddings=scale)
    embeddings = model.get_input_embeddings()(SOURCE)
    given = model(inputs_embeds=embeddings, attention_mask=SOURCE_MASK).last_hidden_state
    check_close(given, model(SOURCE, SOURCE_MASK).last_hidden_state)


def test_rotation_worked_by_hand() -> None:
    """Width 4 has two pairs, (0, 2) and (1, 3); at position 3 they turn by 3 and by 0.03."""
    rotation = build_rotation(torch.tensor([[3]]), 4, 10000.0)
    found = rotate(torch.tensor([1.0, 2.0, 0.0, 0.0])[None, None, None], *rotation).flatten()
    expected = [math.cos(3), 2 * math.cos(0.03), math.sin(3), 2 * math.sin(0.03)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rotation_is_that_of_llama(theta: float) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    positions = torch.stack([torch.arange(9), torch.arange(9) + 4000])
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    expected = apply_rotary_pos_emb(query, key, *LlamaRotaryEmbedding(config)(query, positions))
    rotation = build_rotation(positions, 8, theta)
    check_close(rotate(query, *rotation), expected[0], 1e-6)
    check_close(rotate(key, *rotation), expected[1], 1e-6)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 8, generator=generator).expand(1, 1, 12, 8) for _ in range(2))
    rotation = build_rotation(torch.arange(12)[None], 8, 10000.0)
    products = (rotate(query, *rotation) @ rotate(key, *rotation).transpose(-1, -2))[0, 0]
    for distance in range(-11, 12):
        along = products.diagonal(distance)
        check_close(along, along[:1].expand_as(along))
    assert products[0].unique().numel() == 12


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_only_rotary_rows_may_begin_anywhere(shape: str) -> None:
    later = torch.arange(6)[None] + 9
    for position, is_relative in (("rotary", True), ("sinusoidal", False), ("learned", False)):
        model = build(TriadModel, shape=shape, position=position, pooling="mean")
        here, there = model(SOURCE).last_hidden_state, model(SOURCE, position_ids=later).last_hidden_state
        assert torch.allclose(here, there, atol=1e-5) is is_relative


# Whole stacks


def copy_attention(target: nn.MultiheadAttention, source: TriadAttention) -> None:
    projections = (source.q_proj, source.k_proj, source.v_proj)
    target.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
    target.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
    target.out_proj.load_state_dict(source.o_proj.state_dict())


def copy_layer(target: nn.Module, source: nn.Module) -> None:
    copy_attention(target.self_attn, source.attention)
    parts = [(target.linear1, source.mlp.up_proj), (target.linear2, source.mlp.down_proj)]
    norms = [source.attention_norm, source.mlp_norm]
    if source.crosses:
        copy_attention(target.multihead_attn, source.cross_attention)
        norms.insert(1, source.cross_attention_norm)
    for number, norm in enumerate(norms, start=1):
        parts.append((getattr(target, f"norm{number}"), norm))
    for to, part in parts:
        to.load_state_dict(part.state_dict())


def build_reference(stack: nn.Module, config: TriadConfig, kind: str) -> Any:
    """torch.nn's own stack with the weights of one of Triad's."""
    layer = getattr(nn, f"Transformer{kind}Layer")(
        D,
        H,
        config.intermediate_size,
        dropout=0.0,
        activation=config.activation,
        layer_norm_eps=config.norm_eps,
        batch_first=True,
        norm_first=config.norm_position == "pre",
    )
    options = {"enable_nested_tensor": False} if kind == "Encoder" else {}
    norm = nn.LayerNorm(D, eps=config.norm_eps) if config.norm_position == "pre" else None
    reference = getattr(nn, f"Transformer{kind}")(layer, len(stack.layers), norm, **options)
    for target, source in zip(reference.layers, stack.layers, strict=True):
        copy_layer(target, source)
    if norm is not None:
        reference.norm.load_state_dict(stack.norm.state_dict())
    return reference.eval()


def embed(stack: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    positions = build_sinusoids(torch.arange(input_ids.shape[1])[None], D, "interleaved")
    return stack.embeddings.tokens.weight[input_ids] * math.sqrt(D) + positions


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_the_encoder_is_that_of_torch(implementation: str, activation: str, norm_position: str) -> None:
    model = build(TriadModel, implementation, activation=activation, norm_position=norm_position)
    reference = build_reference(model.encoder, model.config, "Encoder")
    expected = reference(embed(model.encoder, SOURCE), src_key_padding_mask=SOURCE_MASK == 0)
    found = model(SOURCE, SOURCE_MASK).last_hidden_state
    check_close(found[SOURCE_MASK.bool()], expected[SOURCE_MASK.bool()])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_a_decoder_alone_is_an_encoder_of_torch_that_looks_back(implementation: str, norm_position: str) -> None:
    model = build(TriadModel, implementation, shape="decoder", norm_position=norm_position, pooling="mean")
    reference = build_reference(model.decoder, model.config, "Encoder")
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = reference(embed(model.decoder, TARGET), mask=later, src_key_padding_mask=TARGET_MASK == 0)
    found = model(TARGET, TARGET_MASK).last_hidden_state
    check_close(found[TARGET_MASK.bool()], expected[TARGET_MASK.bool()])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_encoder_and_decoder_are_those_of_torch(implementation: str, activation: str, norm_position: str) -> None:
    model = build(
        TriadModel,
        implementation,
        shape="encoder_decoder",
        num_decoder_layers=3,
        activation=activation,
        norm_position=norm_position,
    )
    encoder = build_reference(model.encoder, model.config, "Encoder")
    decoder = build_reference(model.decoder, model.config, "Decoder")
    memory = encoder(embed(model.encoder, SOURCE), src_key_padding_mask=SOURCE_MASK == 0)
    expected = decoder(
        embed(model.decoder, TARGET),
        memory,
        tgt_mask=torch.ones(5, 5, dtype=torch.bool).triu(1),
        tgt_key_padding_mask=TARGET_MASK == 0,
        memory_key_padding_mask=SOURCE_MASK == 0,
    )
    found = model(SOURCE, SOURCE_MASK, decoder_input_ids=TARGET, decoder_attention_mask=TARGET_MASK)
    check_close(found.last_hidden_state[TARGET_MASK.bool()], expected[TARGET_MASK.bool()])
    check_close(found.encoder_last_hidden_state[SOURCE_MASK.bool()], memory[SOURCE_MASK.bool()])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("place", [1, 3, 5])
def test_a_later_token_changes_nothing_before_it(implementation: str, window: int | None, place: int) -> None:
    model = build(TriadModel, implementation, shape="decoder", sliding_window=window, pooling="mean")
    changed = SOURCE.clone()
    changed[:, place] = 49
    before, after = model(SOURCE).last_hidden_state, model(changed).last_hidden_state
    check_close(after[:, :place], before[:, :place])
    assert (after[:, place] - before[:, place]).abs().amax(-1).min() > 1e-3


def test_a_later_target_token_changes_nothing_before_it() -> None:
    model = build(TriadModel, shape="encoder_decoder")
    changed = TARGET.clone()
    changed[:, 2] = 49
    before, after = (model(SOURCE, decoder_input_ids=ids).last_hidden_state for ids in (TARGET, changed))
    check_close(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2:], before[:, 2:], atol=1e-3)
    other = model(SOURCE.flip(1), decoder_input_ids=TARGET).last_hidden_state
    assert not torch.allclose(other[:, 0], before[:, 0], atol=1e-3)  # the source is seen from the first token on


# Decoding with a cache


LEFT_PADDED = torch.tensor([[0, 0, 5, 9, 14, 3, 11], [7, 4, 22, 31, 8, 2, 30], [0, 0, 0, 0, 0, 6, 12]])


def count_places(mask: torch.Tensor) -> torch.Tensor:
    """Positions of the real tokens from 0 on; padding gets 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("steps", [[1] * 7, [3, 2, 2]])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position": "learned", "norm_position": "pre"},
        {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "num_key_value_heads": 2},
        {"sliding_window": 3},
        {"sliding_window": 3, "position": "rotary", "num_key_value_heads": 2},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()) or "article",
)
@pytest.mark.parametrize("padded", [False, True])
def test_step_by_step_equals_all_at_once(
    implementation: str, steps: list[int], changes: dict[str, Any], padded: bool
) -> None:
    model = build(TriadForCausalLM, implementation, shape="decoder", pooling="mean", **changes)
    mask = (LEFT_PADDED != 0).long() if padded else torch.ones_like(LEFT_PADDED)
    places = count_places(mask)
    whole = model(LEFT_PADDED, mask, position_ids=places, use_cache=False)
    assert whole.past_key_values is None
    cache, parts, end = None, [], 0
    for step in steps:
        start, end = end, end + step
        step_inputs = {"position_ids": places[:, start:end]} if padded else {}
        ids, seen = LEFT_PADDED[:, start:end], mask[:, :end]
        output = model(ids, seen if padded else None, past_key_values=cache, use_cache=True, **step_inputs)
        cache = output.past_key_values
        parts.append(output.logits)
    assert cache.get_seq_length() == 7
    check_close(torch.cat(parts, 1)[mask.bool()], whole.logits[mask.bool()])
    if padded:  # and all of it is what each row gives alone
        for row in range(3):
            alone = model(LEFT_PADDED[row : row + 1, mask[row].bool()]).logits[0]
            check_close(whole.logits[row][mask[row].bool()], alone)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("position", ["sinusoidal", "learned"])
@pytest.mark.parametrize("source_side", ["left", "right"])
def test_step_by_step_behind_an_encoder(implementation: str, position: str, source_side: str) -> None:
    model = build(TriadForSeq2SeqLM, implementation, shape="encoder_decoder", position=position, num_decoder_layers=3)
    source = SOURCE if source_side == "right" else SOURCE.flip(1)
    source_mask = (source != 0).long()
    source_places = count_places(source_mask)
    mask = (LEFT_PADDED != 0).long()
    places = count_places(mask)
    encoded = {"input_ids": source, "attention_mask": source_mask, "position_ids": source_places}
    whole = model(
        **encoded,
        decoder_input_ids=LEFT_PADDED,
        decoder_attention_mask=mask,
        decoder_position_ids=places,
        use_cache=False,
    )
    encoder_outputs = model.get_encoder()(**encoded)
    cache, parts = None, []
    for end in range(1, 8):
        output = model(
            attention_mask=source_mask,
            encoder_outputs=encoder_outputs,
            decoder_input_ids=LEFT_PADDED[:, end - 1 : end],
            decoder_attention_mask=mask[:, :end],
            decoder_position_ids=places[:, end - 1 : end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        parts.append(output.logits)
    check_close(torch.cat(parts, 1)[mask.bool()], whole.logits[mask.bool()])
    for row in range(3):
        real, target = source_mask[row].bool(), mask[row].bool()
        alone = model(source[row : row + 1, real], decoder_input_ids=LEFT_PADDED[row : row + 1, target]).logits[0]
        check_close(whole.logits[row][target], alone)


GENERATION = [{"num_beams": 1}, {"num_beams": 3, "num_return_sequences": 2}]
GENERATION_IDS = ["greedy", "beam"]


def generate(model: Any, **options: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "no_repeat_ngram_size": 1}
    return model.generate(**(settings | options))


@pytest.mark.parametrize("options", GENERATION, ids=GENERATION_IDS)
@pytest.mark.parametrize("changes", [{"position": "learned"}, {"sliding_window": 3, "position": "rotary"}])
def test_generation_does_not_depend_on_the_cache(options: dict[str, Any], changes: dict[str, Any]) -> None:
    model = build(TriadForCausalLM, shape="decoder", pooling="mean", tie_word_embeddings=False, **changes)
    mask = (LEFT_PADDED != 0).long()
    inputs = {"input_ids": LEFT_PADDED, "attention_mask": mask, **options}
    cached = generate(model, **inputs, use_cache=True)
    assert torch.equal(cached, generate(model, **inputs, use_cache=False))
    copies = options.get("num_return_sequences", 1)
    for row in range(3):  # what lies beside a row does not matter either
        alone = generate(model, input_ids=LEFT_PADDED[row : row + 1, mask[row].bool()], **options)
        rows = cached[row * copies : (row + 1) * copies]
        assert torch.equal(rows[:, 7:], alone[:, int(mask[row].sum()) :])


@pytest.mark.parametrize("options", GENERATION, ids=GENERATION_IDS)
@pytest.mark.parametrize("decoder_layers", [1, 3])
def test_generation_behind_an_encoder_does_not_depend_on_the_cache(
    options: dict[str, Any], decoder_layers: int
) -> None:
    changes = {"shape": "encoder_decoder", "num_decoder_layers": decoder_layers, "tie_word_embeddings": False}
    model = build(TriadForSeq2SeqLM, **changes)
    inputs = {"input_ids": SOURCE, "attention_mask": SOURCE_MASK, **options}
    cached = generate(model, **inputs, use_cache=True)
    assert torch.equal(cached, generate(model, **inputs, use_cache=False))
    copies = options.get("num_return_sequences", 1)
    for row in range(3):
        alone = generate(model, input_ids=SOURCE[row : row + 1, SOURCE_MASK[row].bool()], **options)
        assert torch.equal(cached[row * copies : (row + 1) * copies], alone)


def test_greedy_generation_takes_the_likeliest_token_each_time() -> None:
    model = build(TriadForCausalLM, shape="decoder", pooling="mean", tie_word_embeddings=False)
    expected = SOURCE[1:2]
    for _ in range(9):
        expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, input_ids=SOURCE[1:2], no_repeat_ngram_size=0), expected)


# What is given back


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_a_stack_gives_its_states_and_weights(shape: str, norm_position: str) -> None:
    model = build(TriadModel, shape=shape, norm_position=norm_position, num_hidden_layers=3, pooling="mean")
    plain = model(SOURCE, SOURCE_MASK)
    assert plain.hidden_states is None
    assert plain.attentions is None
    full = model(SOURCE, SOURCE_MASK, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in full.hidden_states] == [(3, 6, D)] * 4
    check_close(full.hidden_states[-1], full.last_hidden_state, 0)
    assert [weights.shape for weights in full.attentions] == [(3, H, 6, 6)] * 3
    for weights in full.attentions:
        check_close(weights.sum(-1), torch.ones(3, H, 6))
        assert not weights[:2].masked_select(SOURCE_MASK[:2, None, None] == 0).any()
        assert weights.triu(1).any() == (shape == "encoder")
    assert not full.cross_attentions


def test_both_stacks_give_their_states_and_weights() -> None:
    model = build(TriadForSeq2SeqLM, shape="encoder_decoder", num_decoder_layers=3)
    full = model(SOURCE, SOURCE_MASK, decoder_input_ids=TARGET, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in full.encoder_hidden_states] == [(3, 6, D)] * 3
    assert [state.shape for state in full.decoder_hidden_states] == [(3, 5, D)] * 4
    assert [weights.shape for weights in full.encoder_attentions] == [(3, H, 6, 6)] * 2
    assert [weights.shape for weights in full.decoder_attentions] == [(3, H, 5, 5)] * 3
    assert [weights.shape for weights in full.cross_attentions] == [(3, H, 5, 6)] * 3
    for weights in full.cross_attentions:
        check_close(weights.sum(-1), torch.ones(3, H, 5))
        assert not weights.masked_select(SOURCE_MASK[:, None, None] == 0).any()


@pytest.mark.parametrize("model_class", [TriadModel, TriadForSequenceClassification])
def test_a_tuple_where_asked_for(model_class: type) -> None:
    model = build(model_class)
    found = model(SOURCE, SOURCE_MASK, return_dict=False)
    assert isinstance(found, tuple)
    check_close(found[0], model(SOURCE, SOURCE_MASK)[0], 0)


# Shared matrices


TOKENS = {
    TriadForMaskedLM: ["model.encoder.embeddings.tokens.weight"],
    TriadForCausalLM: ["model.decoder.embeddings.tokens.weight"],
    TriadForSeq2SeqLM: ["model.encoder.embeddings.tokens.weight", "model.decoder.embeddings.tokens.weight"],
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_class", TOKENS)
def test_tied_matrices_are_one_tensor(model_class: Any, tied: bool, tmp_path: Path) -> None:
    names = [*TOKENS[model_class], "lm_head.weight"]
    changes = {"shape": model_class.shape, "pooling": "mean", "tie_word_embeddings": tied}
    model = build(model_class, **changes)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len([name for name in names if name in file.keys()]) == (1 if tied else len(names))  # noqa: SIM118
    loaded = model_class.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for each in (model, loaded):
        places = {each.get_parameter(name).data_ptr() for name in names}
        assert len(places) == (1 if tied else len(names))
    inputs = {"input_ids": SOURCE, "attention_mask": SOURCE_MASK}
    if model_class is TriadForSeq2SeqLM:
        inputs["decoder_input_ids"] = TARGET
    check_close(loaded(**inputs).logits, model(**inputs).logits, 0)
    if tied:
        loaded.lm_head.weight[7].fill_(2.0)
        assert (loaded.get_parameter(names[0])[7] == 2.0).all()
