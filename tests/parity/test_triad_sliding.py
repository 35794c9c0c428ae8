"""A sliding window in blocks: the numbers of the masked square, at a cost that grows with the row only."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from finetune.models.triad import TriadConfig, TriadModel
from finetune.models.triad.modeling_triad import attend

HEADS, WIDTH = 4, 8
TOLERANCE = 1e-6  # the softmax is in float32
SHAPES = ["encoder", "decoder"]


def build_states(length: int, *, keys: int = HEADS) -> list[torch.Tensor]:
    """Query, key and value of two rows, in float64."""
    generator = torch.Generator().manual_seed(length)
    sizes = [(2, heads, length, WIDTH) for heads in (HEADS, keys, keys)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def see(length: int, window: int, *, is_causal: bool) -> torch.Tensor:
    """Which token sees which, (T, T), from the words: fewer than `window` away, and not later where it is causal."""
    return torch.tensor(
        [[abs(i - j) < window and (j <= i or not is_causal) for j in range(length)] for i in range(length)]
    )


def compute_gradients(output: torch.Tensor, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a sum in which every number counts differently."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return list(torch.autograd.grad((output * weights).sum(), states))


def build_model(shape: str, implementation: str, sliding_window: int | None = 5) -> TriadModel:
    torch.manual_seed(0)
    config = TriadConfig(
        vocab_size=40,
        hidden_size=HEADS * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=16,
        sliding_window=sliding_window,
        shape=shape,
        pooling="mean",
    )
    config._attn_implementation = implementation
    return TriadModel(config).eval()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(9, 4), (16, 4), (17, 4), (7, 1), (40, 3)])
@pytest.mark.parametrize("keys", [HEADS, 2])
def test_blocks_are_the_masked_square(is_causal: bool, length: int, window: int, keys: int):
    states = build_states(length, keys=keys)
    module = SimpleNamespace(training=False, is_causal=is_causal)
    found, weights = attend(module, *states, None, sliding_window=window)
    mask = see(length, window, is_causal=is_causal)
    expected = scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    for ours, theirs in zip(compute_gradients(found, states), compute_gradients(expected, states), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_a_mask_that_is_given_is_kept_in_blocks():
    """The mask hides three tokens at the end of the second row besides what is outside of the window."""
    length, window = 20, 4
    states = build_states(length)
    mask = see(length, window, is_causal=False).repeat(2, 1, 1, 1)
    mask[1, ..., -3:] = False
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    module = SimpleNamespace(training=False, is_causal=False)
    found, _ = attend(module, *states, bias, sliding_window=window)
    expected = scaled_dot_product_attention(*states, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1, :-3], expected[1, :-3], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_gives_the_same_by_blocks_and_by_the_masked_kernel(shape: str):
    """Packed rows around twice the window and far beyond it; and the longest of them alone, where the mask is given."""
    lengths = [31, 31, 4, 12, 13, 60]
    ids = torch.randint(1, 40, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    blocks, kernel = (build_model(shape, implementation) for implementation in ("eager", "sdpa"))
    with torch.no_grad():
        for inputs in ({"input_ids": ids, "position_ids": positions}, {"input_ids": ids[:, -lengths[-1] :]}):
            found, expected = (model(**inputs).last_hidden_state for model in (blocks, kernel))
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_that_are_asked_for_are_the_whole_square(shape: str):
    model, ids = build_model(shape, "eager"), torch.arange(30)[None]
    with torch.no_grad():
        plain = model(ids)
        asked = model(ids, output_attentions=True)
        model.config.output_attentions = True
        configured = model(ids)
    window = 6 if shape == "encoder" else 5  # five tokens on either side, or five with the token itself
    visible = see(30, window, is_causal=shape == "decoder")
    for output in (asked, configured):
        torch.testing.assert_close(output.last_hidden_state, plain.last_hidden_state, rtol=0, atol=TOLERANCE)
        assert [weights.shape for weights in output.attentions] == [(1, HEADS, 30, 30)] * 2
        assert all(torch.equal(weights[0, 0] > 0, visible) for weights in output.attentions)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[30, 30, 4, 12], [9, 9]])
def test_weights_of_packed_rows_are_those_of_each_row_alone(shape: str, window: int | None, lengths: list[int]):
    model = build_model(shape, "eager", sliding_window=window)
    ids = torch.randint(1, 40, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        asked = model(ids, position_ids=positions, output_attentions=True)
        model.config.output_attentions = True
        configured = model(ids, position_ids=positions)
        alone = [model(row) for row in ids.split(lengths, dim=1)]
    expected = torch.cat([row.last_hidden_state for row in alone], dim=1)
    for output in (asked, configured):
        torch.testing.assert_close(output.last_hidden_state, expected, rtol=0, atol=TOLERANCE)
        assert [weights.shape for weights in output.attentions] == [(1, HEADS, sum(lengths), sum(lengths))] * 2
        for layer, weights in enumerate(output.attentions):
            for head in range(HEADS):
                blocks = torch.block_diag(*(row.attentions[layer][0, head] for row in alone))
                torch.testing.assert_close(weights[0, head], blocks, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_rows_keep_their_window_where_the_compiler_wants_no_blocks(shape: str, monkeypatch: pytest.MonkeyPatch):
    model, ids = build_model(shape, "eager", sliding_window=3), torch.arange(30)[None]
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with torch.no_grad():
        expected = torch.cat([model(row).last_hidden_state for row in ids.split([12, 18], dim=1)], dim=1)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = model(ids, position_ids=positions).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def count_operations(length: int, window: int, *, is_causal: bool) -> int:
    query, key, value = build_states(length)
    with FlopCounterMode(display=False) as counter:
        attend(SimpleNamespace(training=False, is_causal=is_causal), query, key, value, None, sliding_window=window)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("is_causal", "seen"), [(False, 3 * 4 - 2), (True, 2 * 4 - 1)])
def test_the_cost_grows_with_the_row_and_not_with_its_square(is_causal: bool, seen: int):
    """Twelve more blocks of 4 queries, each with its own 4 keys and 3 on a side; two products of 2 d operations."""
    grown = count_operations(96, 4, is_causal=is_causal) - count_operations(48, 4, is_causal=is_causal)
    assert grown == 2 * HEADS * 12 * 4 * seen * 2 * (2 * WIDTH)
