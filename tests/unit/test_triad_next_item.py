"""A decoder of items: vectors from ids and texts, histories padded and packed, scores, new items, and bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional

from finetune.models.triad import TriadConfig, TriadForCausalLM, TriadForNextItem

ITEMS, TEXT_SIZE, WIDTH = 20, 6, 16
SMALL: dict[str, Any] = {
    "shape": "decoder",
    "num_items": ITEMS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 8,
    "norm_position": "pre",
    "dropout": 0.0,
    "pooling": "last",
    "initializer_range": 0.3,
}
BOTH = {"item_text_size": TEXT_SIZE, "item_bias": True}
KINDS: dict[str, dict[str, Any]] = {
    "ids": {"position": "rotary"},
    "text": {"position": "sinusoidal", "item_ids": False, "item_text_size": TEXT_SIZE},
    "both": {"position": "learned", **BOTH},
    "both, untied": {"position": "rotary", **BOTH, "tie_word_embeddings": False},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
KNOWN = torch.arange(ITEMS) < 15
ROWS = [torch.tensor(row) for row in ([3, 0, 19, 4], [7], [16, 2, 2, 0, 5])]
PACKED = torch.cat(ROWS)[None]
PLACES = torch.cat([torch.arange(len(row)) for row in ROWS])[None]


def build(kind: str, **changes: Any) -> TriadForNextItem:
    """A model whose weights are all random, biases and norms too, with texts, that does not know the last items."""
    torch.manual_seed(0)
    model = TriadForNextItem(TriadConfig(**(SMALL | KINDS[kind] | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if model.text_vectors is not None:
        model.set_text_vectors(torch.randn(ITEMS, TEXT_SIZE))
    model.set_known(KNOWN)
    return model


# Items


def test_a_vector_mixes_id_and_text_by_the_gate() -> None:
    model = build("both")
    ids, texts = model.items.id_embeddings.weight, model.text_vectors @ model.items.text_projection.weight.T
    sums = torch.cat([ids, texts], 1) @ model.items.gate.weight.T + model.items.gate.bias
    gate = 1 / (1 + torch.exp(-sums))
    expected = torch.where(KNOWN[:, None], gate * ids + (1 - gate) * texts, texts)
    found = model.compute_item_vectors()
    torch.testing.assert_close(found, expected)
    some = torch.tensor([[19, 0], [3, 3]])
    torch.testing.assert_close(model.compute_item_vectors(some), expected[some])


def test_unknown_items_have_no_id() -> None:
    assert not build("ids").compute_item_vectors()[15:].any()
    model = build("both")
    before, bias = model.compute_item_vectors(), model.compute_item_bias()
    assert not bias[15:].any()
    assert bias[:15].all()
    with torch.no_grad():
        model.items.id_embeddings.weight.normal_()
    changed = (model.compute_item_vectors() != before).any(1)
    assert torch.equal(changed, KNOWN)


def test_tied_items_are_read_as_they_are_scored() -> None:
    tied, untied = build("both"), build("both, untied")
    assert torch.equal(tied.compute_item_vectors(as_input=True), tied.compute_item_vectors())
    assert not torch.isclose(untied.compute_item_vectors(as_input=True), untied.compute_item_vectors()).any()
    assert untied.num_parameters() > tied.num_parameters()


def test_item_dropout_lets_the_text_alone_speak() -> None:
    model = build("both", item_dropout=0.4)
    known, texts = model.compute_item_vectors(), model.items.text_projection(model.text_vectors)
    model.train()
    torch.manual_seed(3)
    dropped = []
    for _ in range(100):
        vectors = model.compute_item_vectors()
        is_text = torch.isclose(vectors, texts).all(1)
        assert (is_text | torch.isclose(vectors, known).all(1)).all()
        dropped.append(is_text[KNOWN].float().mean())
    assert torch.stack(dropped).mean().item() == pytest.approx(0.4, abs=0.05)  # of 1,500: four standard errors


def test_scores() -> None:
    model = build("both")
    hidden = torch.randn(3, WIDTH)
    expected = hidden @ model.compute_item_vectors().T + model.item_bias * KNOWN
    torch.testing.assert_close(model.score(hidden), expected)
    some = torch.tensor([18, 2, 5])
    torch.testing.assert_close(model.score(hidden, some), expected[:, some])
    torch.testing.assert_close(model.score(hidden, item_vectors=model.compute_item_vectors()), expected)


# Histories


def test_with_ids_alone_it_is_a_language_model_of_items() -> None:
    """The same weights in the class for tokens, which is compared with GPT-2 and Llama elsewhere."""
    model = build("ids")
    model.set_known(torch.ones(ITEMS, dtype=torch.bool))
    options = {key: value for key, value in (SMALL | KINDS["ids"]).items() if key != "num_items"}
    language = TriadForCausalLM(TriadConfig(**options, vocab_size=ITEMS, pad_token_id=None)).eval()
    state = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("model.")}
    tokens = model.items.id_embeddings.weight
    state |= {"model.decoder.embeddings.tokens.weight": tokens, "lm_head.weight": tokens}
    language.load_state_dict(state)
    for options in ({}, {"position_ids": PLACES}):
        expected = language(PACKED, **options).logits
        torch.testing.assert_close(model(PACKED, logits_to_keep=0, **options).logits, expected)


@every_kind
def test_padding_and_packing_change_nothing(kind: str) -> None:
    model = build(kind)
    alone = torch.cat([model.encode(row[None]) for row in ROWS])
    torch.testing.assert_close(model.encode(PACKED, position_ids=PLACES), alone, atol=1e-5, rtol=1e-5)
    for side in ("left", "right"):
        padded = torch.nn.utils.rnn.pad_sequence(ROWS, batch_first=True, padding_value=9, padding_side=side)
        places = torch.arange(5)
        lengths = torch.tensor([[len(row)] for row in ROWS])
        mask = (places < lengths if side == "right" else places >= 5 - lengths).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = model.encode(padded, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
        vectors = model.compute_item_vectors()
        again = model.encode(padded, attention_mask=mask, position_ids=positions, item_vectors=vectors)
        torch.testing.assert_close(again, alone, atol=1e-5, rtol=1e-5)
    states = model(PACKED, position_ids=PLACES).last_hidden_state[0]
    torch.testing.assert_close(states[[3, 4, 9]], alone, atol=1e-5, rtol=1e-5)


@every_kind
def test_what_comes_later_changes_nothing_before(kind: str) -> None:
    model = build(kind)
    row = torch.tensor([[3, 0, 19, 4, 1]])
    states = model(row).last_hidden_state
    for place in range(1, 5):
        changed = row.clone()
        changed[0, place] = 11
        found = model(changed).last_hidden_state
        torch.testing.assert_close(found[:, :place], states[:, :place], atol=1e-6, rtol=1e-6)
        assert not torch.isclose(found[:, place], states[:, place]).all()


@every_kind
def test_the_loss_and_logits_that_are_asked_for(kind: str) -> None:
    model = build(kind)
    row, labels = torch.tensor([[3, 0, 19, 4]]), torch.tensor([[0, -100, 4, 12]])
    bare = model(row)
    assert bare.logits is None
    assert bare.loss is None
    expected = model.score(bare.last_hidden_state)
    output = model(row, labels=labels)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, functional.cross_entropy(expected[0, [0, 2, 3]], torch.tensor([0, 4, 12])))
    for kept, places in ((0, [0, 1, 2, 3]), (2, [2, 3]), (torch.tensor([1, 3]), [1, 3])):
        torch.testing.assert_close(model(row, logits_to_keep=kept).logits, expected[:, places])
    last = model(row, labels=labels, logits_to_keep=1)
    torch.testing.assert_close(last.loss, functional.cross_entropy(expected[:, 3], torch.tensor([12])))
    torch.testing.assert_close(model(row, labels=labels, num_items_in_batch=6).loss, output.loss / 2)
    assert type(model(row, labels=labels, return_dict=False)) is tuple


@every_kind
def test_every_weight_learns(kind: str) -> None:
    model = build(kind).train()
    model(PACKED, position_ids=PLACES, labels=PACKED.roll(-1)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


# Saving


@every_kind
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded, problems = TriadForNextItem.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values())
    found, expected = loaded.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]) for key in expected)
    assert ("text_vectors" in expected) is (kind != "ids")
    assert torch.equal(loaded(PACKED[:, :5], logits_to_keep=0).logits, model(PACKED[:, :5], logits_to_keep=0).logits)


def test_what_a_checkpoint_lacks_starts_as_new(tmp_path: Path) -> None:
    build("ids").save_pretrained(tmp_path)
    config = TriadConfig.from_pretrained(tmp_path)
    config.item_text_size, config.item_bias = TEXT_SIZE, True
    loaded, problems = TriadForNextItem.from_pretrained(tmp_path, config=config, output_loading_info=True)
    missing = {"item_bias", "text_vectors", "items.text_projection.weight", "items.gate.weight", "items.gate.bias"}
    assert problems["missing_keys"] == missing
    assert not loaded.item_bias.any()
    assert not loaded.text_vectors.any()
    assert torch.equal(loaded.known, KNOWN)


@every_kind
def test_half_precision_is_near(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    half = TriadForNextItem.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.known.dtype == torch.bool
    expected = model(PACKED, position_ids=PLACES, logits_to_keep=0).logits
    found = half(PACKED, position_ids=PLACES, logits_to_keep=0).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05 * expected.abs().max().item(), rtol=0.1)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(PACKED, position_ids=PLACES, labels=PACKED.roll(-1)).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# New items


@every_kind
@torch.no_grad()
def test_new_items(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    old, biases = model.compute_item_vectors(), model.compute_item_bias()
    expected = model(PACKED, position_ids=PLACES, logits_to_keep=0).logits
    texts = None if model.text_vectors is None else torch.randn(3, TEXT_SIZE)
    assert model.extend(texts, count=None if texts is not None else 3) == range(20, 23)
    assert model.config.num_items == model.config.vocab_size == 23
    vectors = model.compute_item_vectors()
    torch.testing.assert_close(vectors[:20], old)
    scorer = model.output_items or model.items
    wanted = torch.zeros(3, WIDTH) if texts is None else scorer.text_projection(texts)
    torch.testing.assert_close(vectors[20:], wanted)
    assert biases is None or torch.equal(model.compute_item_bias(), torch.cat([biases, torch.zeros(3)]))
    found = model(PACKED, position_ids=PLACES, logits_to_keep=0).logits
    torch.testing.assert_close(found[..., :20], expected)
    history = torch.tensor([[3, 22, 20]])
    model.save_pretrained(tmp_path)
    loaded = TriadForNextItem.from_pretrained(tmp_path)
    assert torch.equal(loaded(history, logits_to_keep=0).logits, model(history, logits_to_keep=0).logits)


def test_a_new_item_is_scored_as_a_known_twin_without_its_id() -> None:
    model = build("both", item_bias=False)
    (new,) = model.extend(model.text_vectors[4:5].clone())
    known = model.known.clone()
    known[4] = False
    model.set_known(known)
    scores = model.score(model.encode(PACKED, position_ids=PLACES))
    torch.testing.assert_close(scores[:, new], scores[:, 4])


# PEFT


def test_lora_on_the_decoder(tmp_path: Path) -> None:
    model = build("both")
    config = LoraConfig(r=2, target_modules=r".*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)")
    tuned = get_peft_model(model, config)
    before = tuned(input_ids=PACKED, position_ids=PLACES).last_hidden_state
    loss = tuned(input_ids=PACKED, position_ids=PLACES, labels=PACKED.roll(-1)).loss
    loss.backward()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    assert len(trained) == 2 * 6 * 2
    assert all(".lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = tuned(input_ids=PACKED, position_ids=PLACES).last_hidden_state
    assert not torch.isclose(expected, before).all()
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("both"), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=PACKED, position_ids=PLACES).last_hidden_state, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(PACKED, position_ids=PLACES).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


# What cannot work


def check_refused(call: Any, words: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        call()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_items": -1}, "num_items must be at least 0, got -1."),
        ({"item_text_size": -2}, "item_text_size must be at least 0, got -2."),
        (
            {"shape": "encoder"},
            "num_items is for a model that reads items in order: shape must be decoder, got encoder.",
        ),
        (
            {"item_ids": False},
            "items need a vector: set item_ids to true, or item_text_size to the width of their texts' vectors.",
        ),
        (
            {"item_dropout": 1.0, "item_text_size": 4},
            "item_dropout must lie in 0 to 1, 1 left out, got 1.0.",
        ),
        (
            {"item_dropout": 0.1},
            "item_dropout leaves text alone: it needs item_ids true and item_text_size above 0. Set it to 0.",
        ),
    ],
)
def test_a_config_that_cannot_work(changes: dict[str, Any], words: str) -> None:
    check_refused(lambda: TriadConfig(**(SMALL | changes)), f"TriadConfig: {words}")


def test_a_model_needs_items_and_a_decoder() -> None:
    check_refused(
        lambda: TriadForNextItem(TriadConfig(**(SMALL | {"num_items": 0}))),
        "TriadForNextItem needs config.num_items of at least 1, got 0.",
    )
    check_refused(
        lambda: TriadForNextItem(TriadConfig(**(SMALL | {"num_items": 0, "shape": "encoder"}))),
        "TriadForNextItem needs a config of shape decoder, got encoder.",
    )


@pytest.mark.parametrize(("numbers", "low", "high"), [([5, 20], 5, 20), ([-1, 3], -1, 3)])
def test_item_numbers_out_of_range(numbers: list[int], low: int, high: int) -> None:
    model, rows = build("both"), torch.tensor([numbers])
    words = (
        f"Item numbers must lie in 0 to 19, got {low} to {high}: the catalogue and the model do not belong together."
    )
    check_refused(lambda: model(rows), words)
    check_refused(lambda: model(rows, item_vectors=model.compute_item_vectors()), words)
    check_refused(lambda: model.compute_item_vectors(rows), words)
    check_refused(lambda: model(rows[:, :0]), "Items must be at least one, got shape (1, 0).")


def test_texts_and_flags_that_do_not_fit() -> None:
    ids, both = build("ids"), build("both")
    words = "Text vectors are for a model that reads texts, got config.item_text_size 0."
    check_refused(lambda: ids.set_text_vectors(torch.zeros(ITEMS, 3)), words)
    words = "Text vectors must have shape (20, 6), items x item_text_size, got (19, 6)."
    check_refused(lambda: both.set_text_vectors(torch.zeros(19, 6)), words)
    words = "Text vectors must have shape (2, 6), items x item_text_size, got (2, 5)."
    check_refused(lambda: both.extend(torch.zeros(2, 5)), words)
    words = "Text vectors must be finite, got NaN or infinity."
    check_refused(lambda: both.set_text_vectors(torch.full((ITEMS, 6), torch.nan)), words)
    words = "known must say of each of 20 items, got shape (21,)."
    check_refused(lambda: both.set_known(torch.ones(21, dtype=torch.bool)), words)
    check_refused(lambda: both.extend(count=2), "extend needs text_vectors: config.item_text_size is 6.")
    check_refused(lambda: ids.extend(torch.zeros(2, 5)), "extend needs count: config.item_text_size is 0.")
    check_refused(lambda: ids.extend(), "extend needs count: config.item_text_size is 0.")
    check_refused(
        lambda: ids.resize_token_embeddings(30),
        "The items of a TriadForNextItem are changed by extend, not resize_token_embeddings.",
        NotImplementedError,
    )
