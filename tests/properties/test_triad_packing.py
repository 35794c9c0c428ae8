"""What a row gives depends neither on padding, nor on packing, nor on what lies beside it; gradients neither."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import find_packed_sequence_indices

from finetune.models.triad import TriadConfig, TriadForCausalLM, TriadForSequenceClassification, TriadModel
from finetune.models.triad.modeling_triad import Pack

PAD = 0
ENCODERS = [
    {"shape": "encoder", "position": position, "sliding_window": window}
    for position in ("sinusoidal", "learned", "rotary")
    for window in (None, 2)
]
DECODERS = [
    {"shape": "decoder", "position": "rotary", "sliding_window": 3, "num_key_value_heads": 2},
    {"shape": "decoder", "position": "learned", "norm_position": "pre"},
    {"shape": "decoder", "position": "sinusoidal"},
]
SHAPES = pytest.mark.parametrize(
    "changes", ENCODERS + DECODERS, ids=lambda changes: "-".join(str(value) for value in changes.values())
)

# Few lengths, so that equal ones often lie side by side.
rows_of_tokens = st.lists(st.lists(st.integers(1, 29), min_size=1, max_size=9), min_size=1, max_size=6)
poolings = st.sampled_from(["cls", "pooler", "mean", "last"])
implementations = st.sampled_from(["eager", "sdpa"])
few = settings(derandomize=True, deadline=None, max_examples=20)

Rows = list[list[int]]


def build_config(**changes: Any) -> TriadConfig:
    choices: dict[str, Any] = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 9,
        "dropout": 0.0,
        "num_labels": 3,
        "pooling": "mean",
    }
    return TriadConfig(**(choices | changes))


@cache
def build(model_class: Any, changes: tuple[tuple[str, Any], ...]) -> Any:
    """A model whose every weight is random: biases start at 0 and norms at 1."""
    model = model_class(build_config(**dict(changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return model.eval()


def build_classifier(changes: dict[str, Any], pooling: str = "mean", implementation: str = "sdpa") -> Any:
    if changes["shape"] == "decoder":  # refuses to read the first token
        pooling = "last" if pooling in ("last", "cls") else "mean"
    model = build(TriadForSequenceClassification, tuple((changes | {"pooling": pooling}).items()))
    model.set_attn_implementation(implementation)
    return model


def pad(rows: Rows, side: str = "right") -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows)
    batch = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(batch)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        batch[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return {"input_ids": batch, "attention_mask": mask}


def flatten(rows: Rows, with_lengths: bool = False) -> dict[str, Any]:
    """As Hugging Face's collator packs them: positions, and on request the cumulative lengths."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=with_lengths)
    batch = dict(collate([{"input_ids": row} for row in rows], return_tensors="pt"))
    del batch["labels"]
    return batch


def check_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def run(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """States of all tokens that are real, one after another, and the logits of the rows."""
    output = model(**batch, output_hidden_states=True)
    states = output.hidden_states[-1]
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(states.shape[:2], dtype=bool)
    return states[real], output.logits


@SHAPES
@given(rows=rows_of_tokens, pooling=poolings, implementation=implementations, with_lengths=st.booleans())
@few
def test_packed_padded_and_alone_are_the_same(
    changes: dict[str, Any], rows: Rows, pooling: str, implementation: str, with_lengths: bool
) -> None:
    model = build_classifier(changes, pooling, implementation)
    packed = flatten(rows, with_lengths)
    assert packed["input_ids"].shape == (1, sum(len(row) for row in rows))
    states, logits = run(model, packed)
    assert logits.shape == (len(rows), 3)
    padded_states, padded_logits = run(model, pad(rows))
    alone = [run(model, {"input_ids": torch.tensor([row])}) for row in rows]
    check_close(states, padded_states)
    check_close(logits, padded_logits)
    check_close(states, torch.cat([states_alone for states_alone, _ in alone]))
    check_close(logits, torch.cat([logits_alone for _, logits_alone in alone]))


@SHAPES
@given(rows=rows_of_tokens, pooling=poolings, data=st.data())
@few
def test_the_order_of_a_pack_does_not_matter(
    changes: dict[str, Any], rows: Rows, pooling: str, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    model = build_classifier(changes, pooling)
    _, logits = run(model, flatten(rows))
    _, permuted = run(model, flatten([rows[number] for number in order]))
    check_close(permuted, logits[order])


@SHAPES
@given(row=st.lists(st.integers(1, 29), min_size=1, max_size=9), one=rows_of_tokens, other=rows_of_tokens)
@few
def test_what_shares_a_pack_does_not_matter(changes: dict[str, Any], row: list[int], one: Rows, other: Rows) -> None:
    model = build_classifier(changes)
    _, logits = run(model, flatten([*one, row]))
    _, beside_others = run(model, flatten([*other, row]))
    check_close(logits[-1], beside_others[-1])


def compute_gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


@SHAPES
@given(rows=rows_of_tokens, pooling=poolings, implementation=implementations)
@settings(few, max_examples=6)
def test_gradients_are_the_same(changes: dict[str, Any], rows: Rows, pooling: str, implementation: str) -> None:
    model = build_classifier(changes, pooling, implementation)
    labels = torch.tensor([sum(row) % 3 for row in rows])
    packed, padded = (
        compute_gradients(model, nn.functional.cross_entropy(model(**batch).logits, labels, reduction="sum"))
        for batch in (flatten(rows), pad(rows))
    )
    apart = [
        compute_gradients(model, nn.functional.cross_entropy(model(torch.tensor([row])).logits, labels[number, None]))
        for number, row in enumerate(rows)
    ]
    assert packed["classifier.weight"].abs().sum() > 0
    for name, gradient in packed.items():
        check_close(gradient, padded[name])
        check_close(gradient, torch.stack([each[name] for each in apart]).sum(0))


@given(rows=st.lists(st.lists(st.integers(1, 29), min_size=2, max_size=9), min_size=1, max_size=6))
@settings(few, max_examples=10)
def test_the_loss_of_a_language_model_is_the_same(rows: Rows) -> None:
    """The first token of each row has label -100 in a pack: nothing before it says it."""
    model = build(TriadForCausalLM, tuple(DECODERS[0].items()))
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed = dict(collate([{"input_ids": row} for row in rows], return_tensors="pt"))
    padded = pad(rows)
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    found, expected = (model(**batch).loss for batch in (packed, padded | {"labels": labels}))
    check_close(found, expected)
    found, expected = (compute_gradients(model, loss) for loss in (found, expected))
    for name, gradient in found.items():
        check_close(gradient, expected[name])


@SHAPES
@given(rows=rows_of_tokens, pooling=poolings, implementation=implementations)
@few
def test_the_side_of_the_padding_does_not_matter(
    changes: dict[str, Any], rows: Rows, pooling: str, implementation: str
) -> None:
    model = build_classifier(changes, pooling, implementation)
    left = pad(rows, "left")
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    states, logits = run(model, left)
    right_states, right_logits = run(model, pad(rows))
    check_close(states, right_states)
    check_close(logits, right_logits)


# Where rows start


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
@settings(derandomize=True)
def test_rows_start_where_hugging_face_says(positions: list[int]) -> None:
    position_ids = torch.tensor([positions])
    numbers = find_packed_sequence_indices(position_ids)
    lengths = [1] if numbers is None else torch.bincount(numbers[0]).tolist()
    pack = Pack.find(position_ids, None)
    if len(lengths) == 1:
        assert pack is None
    else:
        assert pack is not None
        assert pack.lengths(torch.device("cpu")).tolist() == lengths


def test_neighbours_of_equal_length_are_one_run_and_views() -> None:
    pack = Pack.find(torch.tensor([[0, 1, 0, 1, 0, 0, 0, 1]]), None)
    assert pack == Pack([(2, 2), (2, 1), (1, 2)])
    packed = torch.arange(8.0)[None, None, :, None].expand(1, 4, 8, 3).contiguous()
    parts = pack.split(packed)
    assert [part.shape for part in parts] == [(2, 4, 2, 3), (2, 4, 1, 3), (1, 4, 2, 3)]
    assert [part[:, 0, :, 0].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4], [5]], [[6, 7]]]
    assert all(part.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr() for part in parts)


@pytest.mark.parametrize("rows", [[[7]], [[7], [8]], [[7, 8, 9]], [[7, 8], [7, 8]], [[7], [8, 9], [10]]])
@SHAPES
def test_short_rows_and_few(changes: dict[str, Any], rows: Rows) -> None:
    model = build_classifier(changes)
    alone = torch.cat([run(model, {"input_ids": torch.tensor([row])})[1] for row in rows])
    for with_lengths in (False, True):
        check_close(run(model, flatten(rows, with_lengths))[1], alone)


def test_positions_of_ones_own_need_the_lengths() -> None:
    """[5] and [6, 7], with positions 0 and 1, 2: from the positions alone they are one row."""
    model = build_classifier(ENCODERS[0])
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[0, 1, 2]])}
    assert len(run(model, batch)[1]) == 1
    _, found = run(model, batch | {"cu_seq_lens_q": torch.tensor([0, 1, 3])})
    second = {"input_ids": torch.tensor([[6, 7]]), "position_ids": torch.tensor([[1, 2]])}
    check_close(found, torch.cat([run(model, {"input_ids": torch.tensor([[5]])})[1], run(model, second)[1]]))


def test_one_line_of_positions_may_serve_many_rows() -> None:
    model = build_classifier(ENCODERS[0])
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    jumping = torch.tensor([[0, 4, 5]])  # a start in a pack, but these are two rows
    for positions in (torch.arange(3)[None], jumping):
        found = run(model, {"input_ids": ids, "position_ids": positions})[1]
        check_close(found, run(model, {"input_ids": ids, "position_ids": positions.expand(2, 3)})[1])


PACKED = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[0, 0, 1]])}
LENGTHS = torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": PACKED["input_ids"]},
        PACKED | {"attention_mask": torch.ones(1, 3)},
        {"input_ids": torch.zeros(2, 3).long(), "position_ids": PACKED["position_ids"]},
    ],
    ids=["without positions", "with a mask", "several lines"],
)
def test_lengths_without_a_pack_are_refused(batch: dict[str, torch.Tensor]) -> None:
    words = r"Packed rows \(cu_seq_lens_q\) come as \(1, total\) with position_ids and no attention_mask\."
    with pytest.raises(ValueError, match=words):
        build_classifier(ENCODERS[0])(**batch, cu_seq_lens_q=LENGTHS)


@pytest.mark.parametrize("lengths", [[0, 1, 2], [1, 3], [0, 1, 1, 3], [0, 2, 1, 3], [0, 1, 4]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    words = rf"cu_seq_lens_q must rise from 0 to the number of tokens \(3\), got \[{', '.join(map(str, lengths))}\]\."
    with pytest.raises(ValueError, match=words):
        build_classifier(ENCODERS[0])(**PACKED, cu_seq_lens_q=torch.tensor(lengths))


@pytest.mark.parametrize("part", ["position_ids", "decoder_position_ids"])
def test_an_encoder_and_a_decoder_refuse_packs(part: str) -> None:
    model = TriadModel(build_config(shape="encoder_decoder"))
    ids = PACKED["input_ids"]
    with pytest.raises(ValueError, match=r"Rows of an encoder_decoder cannot be packed: pad them, with attention_mask"):
        model(ids, decoder_input_ids=ids, **{part: PACKED["position_ids"]})


@pytest.mark.slow
def test_packs_survive_torch_compile() -> None:
    model = build_classifier(ENCODERS[0])
    batch = flatten([[5, 6, 7], [8, 9], [10, 11]])
    _, expected = run(model, batch)
    _, found = run(torch.compile(model, backend="eager"), batch)
    check_close(found, expected)
