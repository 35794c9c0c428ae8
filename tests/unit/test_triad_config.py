"""What a Triad can be made of, what is refused and in which words, and what the models say to bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from finetune.models.triad import (
    TriadConfig,
    TriadForCausalLM,
    TriadForMaskedLM,
    TriadForMultiTask,
    TriadForQuestionAnswering,
    TriadForSentenceEmbedding,
    TriadForSeq2SeqLM,
    TriadForSequenceClassification,
    TriadForTokenClassification,
    TriadModel,
)

SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 8,
    "dropout": 0.0,
}
IDS = torch.tensor([[5, 6, 7, 8]])


def build(model_class: type, **changes: Any) -> Any:
    torch.manual_seed(0)
    return model_class(TriadConfig(**(SMALL | changes))).eval()


# The defaults


def test_the_defaults_are_the_base_model_of_the_article() -> None:
    config = TriadConfig()
    article = {
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_decoder_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2048,
        "activation": "relu",
        "norm": "layernorm",
        "norm_position": "post",
        "position": "sinusoidal",
        "sinusoid_layout": "interleaved",
        "scale_embeddings": True,
        "tie_word_embeddings": True,
        "dropout": 0.1,
        "sliding_window": None,
    }
    assert {name: getattr(config, name) for name in article} == article


def test_the_defaults_have_as_many_weights_as_the_transformer_of_torch() -> None:
    with torch.device("meta"):
        model = TriadForSeq2SeqLM(TriadConfig(shape="encoder_decoder", vocab_size=37000))
        reference = nn.Transformer(
            batch_first=True
        )  # the article's sizes; with a norm behind each stack, which the article has not
    final_norms = [*reference.encoder.norm.parameters(), *reference.decoder.norm.parameters()]
    expected = sum(p.numel() for p in reference.parameters()) - sum(p.numel() for p in final_norms) + 37000 * 512
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "shape": "encoder_decoder",
            "num_decoder_layers": 3,
            "position": "learned",
            "position_offset": 2,
            "decoder_start_token_id": 1,
            "eos_token_id": [2, 3],
            "tie_word_embeddings": False,
        },
        {
            "shape": "decoder",
            "num_key_value_heads": 2,
            "head_dim": 6,
            "position": "rotary",
            "norm": "rmsnorm",
            "norm_position": "pre",
            "activation": "swiglu",
            "sliding_window": 5,
            "pooling": "last",
            "pad_token_id": None,
        },
        {"heads": {"tone": {"type": "sequence_classification", "num_labels": 3}}, "id2label": {0: "a", 1: "b"}},
    ],
)
def test_a_config_survives_the_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    config = TriadConfig(**(SMALL | changes))
    for name, value in (SMALL | changes).items():
        assert getattr(config, name) == value
    config.save_pretrained(tmp_path)
    expected = config.to_dict()
    copies = (
        TriadConfig.from_dict(expected),
        TriadConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    )
    for found in copies:
        assert type(found) is TriadConfig
        found = found.to_dict()
        for loaded_from in ("_name_or_path", "transformers_version"):
            found.pop(loaded_from, None)
            expected.pop(loaded_from, None)
        assert found == expected


def test_a_cache_reads_the_layers_of_the_stack_that_decodes() -> None:
    config = TriadConfig(**SMALL, shape="encoder_decoder", num_decoder_layers=3)
    assert config.is_encoder_decoder
    assert config.get_text_config(decoder=True).num_hidden_layers == 3
    assert config.get_text_config(encoder=True).num_hidden_layers == 1
    assert config.get_text_config() is config
    alone = TriadConfig(**SMALL, shape="decoder", pooling="mean")
    assert not alone.is_encoder_decoder
    assert alone.get_text_config(decoder=True) is alone


# What does not go together

CHOICES = {
    "shape": "encoder, decoder, encoder_decoder",
    "norm_position": "post, pre",
    "norm": "layernorm, rmsnorm",
    "position": "sinusoidal, learned, rotary",
    "sinusoid_layout": "interleaved, halves",
    "activation": "relu, gelu, gelu_tanh, silu, swiglu",
    "pooling": "cls, pooler, mean, last",
    "pooler_activation": "tanh, relu",
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_decoder_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)


def check_refused(words: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('TriadConfig: ' + words)}$"):
        TriadConfig(**(SMALL | changes))


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_refused_with_those_there_are(name: str) -> None:
    check_refused(f"{name} must be one of {CHOICES[name]}, got 'other'.", **{name: "other"})


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_must_be_at_least_1(name: str, value: int) -> None:
    check_refused(f"{name} must be at least 1, got {value}.", **{name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads (4) must be a multiple of num_key_value_heads (3).",
        ),
        (
            {"hidden_size": 18, "num_attention_heads": 4},
            "hidden_size (18) must be a multiple of num_attention_heads (4), or head_dim be given.",
        ),
        (
            {"position": "rotary", "head_dim": 5},
            "rotary positions turn pairs of features: head_dim must be even, got 5.",
        ),
        (
            {"hidden_size": 15, "num_attention_heads": 3},
            "sinusoidal positions come in pairs: hidden_size must be even, got 15.",
        ),
        (
            {"position": "rotary", "shape": "encoder_decoder"},
            "rotary positions say nothing about tokens of the other stack: take sinusoidal or learned ones.",
        ),
        (
            {"sliding_window": 4, "shape": "encoder_decoder"},
            "sliding_window is for a single stack: a decoder must see all of its encoder. Set it to null.",
        ),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0. Null is for no window."),
        (
            {"shape": "decoder", "pooling": "cls"},
            "pooling cls reads the first token, which sees no other in a decoder: take last or mean.",
        ),
        (
            {"shape": "decoder", "pooling": "pooler"},
            "pooling pooler reads the first token, which sees no other in a decoder: take last or mean.",
        ),
        (
            {"shape": "decoder", "type_vocab_size": 2},
            "token types are for an encoder: type_vocab_size must be 0, got 2.",
        ),
        (
            {"shape": "encoder_decoder", "type_vocab_size": 2},
            "token types are for an encoder: type_vocab_size must be 0, got 2.",
        ),
        ({"position_offset": 8}, "position_offset must lie in 0 to 7, got 8."),
        ({"position_offset": -1}, "position_offset must lie in 0 to 7, got -1."),
        ({"pad_token_id": 20}, "pad_token_id must lie in 0 to 19, got 20."),
        ({"pad_token_id": -1}, "pad_token_id must lie in 0 to 19, got -1."),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    check_refused(words, **changes)


def test_what_looks_odd_and_works_is_not_refused() -> None:
    ids = torch.tensor([[5, 6, 7]])
    for changes in (
        {"hidden_size": 18, "head_dim": 6},
        {"hidden_size": 15, "num_attention_heads": 3, "position": "learned"},
        {"num_key_value_heads": 1, "head_dim": 5},
        {"pad_token_id": None},
        {"sliding_window": 100},
    ):
        states = build(TriadModel, **changes)(ids).last_hidden_state
        assert states.isfinite().all()
        assert states.shape == (1, 3, changes.get("hidden_size", 16))


def test_all_problems_are_named_at_once() -> None:
    check_refused(
        "shape must be one of encoder, decoder, encoder_decoder, got 'both'. norm must be one of layernorm, rmsnorm, "
        "got 'batchnorm'. vocab_size must be at least 1, got 0.",
        shape="both",
        norm="batchnorm",
        vocab_size=0,
    )
    check_refused(
        "rotary positions turn pairs of features: head_dim must be even, got 5. sliding_window must be at least 1, "
        "got -2. Null is for no window. pooling cls reads the first token, which sees no other in a decoder: take "
        "last or mean. pad_token_id must lie in 0 to 19, got 99.",
        position="rotary",
        head_dim=5,
        sliding_window=-2,
        shape="decoder",
        pooling="cls",
        pad_token_id=99,
    )


# A model and a config that do not fit


@pytest.mark.parametrize("shape", ["encoder", "decoder", "encoder_decoder"])
@pytest.mark.parametrize(
    ("model_class", "needed"),
    [(TriadForMaskedLM, "encoder"), (TriadForCausalLM, "decoder"), (TriadForSeq2SeqLM, "encoder_decoder")],
)
def test_a_language_model_needs_its_shape(model_class: type, needed: str, shape: str) -> None:
    if shape == needed:
        build(model_class, shape=shape)
        return
    words = f"^{model_class.__name__} needs a config of shape {needed}, got {shape}.$"
    with pytest.raises(ValueError, match=words):
        build(model_class, shape=shape)


@pytest.mark.parametrize(
    "model_class",
    [
        TriadForSequenceClassification,
        TriadForTokenClassification,
        TriadForQuestionAnswering,
        TriadForSentenceEmbedding,
        TriadForMultiTask,
    ],
)
def test_a_head_for_labels_needs_one_stack(model_class: type) -> None:
    words = f"^{model_class.__name__} needs a config of one stack, got shape encoder_decoder.$"
    with pytest.raises(ValueError, match=words):
        build(model_class, shape="encoder_decoder")


GOOD = {"type": "token_classification", "num_labels": 2}


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ({}, "TriadForMultiTask needs at least one head in config.heads, got none."),
        (
            {"good": GOOD, "tone": {"type": "regression", "num_labels": 1}},
            "heads.tone.type must be one of sequence_classification, token_classification, "
            "sentence_embedding, got 'regression'.",
        ),
        (
            {"tone": {"num_labels": 2}},
            "heads.tone.type must be one of sequence_classification, token_classification, "
            "sentence_embedding, got None.",
        ),
        ({"tone": {"type": "token_classification"}}, "heads.tone.num_labels must be at least 1, got None."),
        ({"tone": GOOD | {"num_labels": 0}}, "heads.tone.num_labels must be at least 1, got 0."),
        ({"tone": GOOD | {"num_labels": "two"}}, "heads.tone.num_labels must be at least 1, got 'two'."),
        (
            {"tone": {"type": "sentence_embedding", "num_labels": 2}},
            "heads.tone.num_labels must be left out for an embedding, which has no labels.",
        ),
        ({"a.b": GOOD}, "heads: a head cannot be called 'a.b'; torch keeps such names for itself."),
        ({"keys": GOOD}, "heads: a head cannot be called 'keys'; torch keeps such names for itself."),
        ({"training": GOOD}, "heads: a head cannot be called 'training'; torch keeps such names for itself."),
        ({"": GOOD}, "heads: a head cannot be called ''; torch keeps such names for itself."),
    ],
)
def test_heads_that_cannot_work_are_refused(heads: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        build(TriadForMultiTask, heads=heads)


# Input that cannot work


@pytest.mark.parametrize(("ids", "low", "high"), [([5, 20], 5, 20), ([-1, 3], -1, 3), ([-7, 99], -7, 99)])
def test_ids_out_of_range_are_named(ids: list[int], low: int, high: int) -> None:
    words = f"^Token ids must lie in 0 to 19, got {low} to {high}: the tokenizer and the model do not belong together.$"
    with pytest.raises(ValueError, match=words):
        build(TriadModel)(torch.tensor([ids]))
    model = build(TriadForSeq2SeqLM, shape="encoder_decoder")
    with pytest.raises(ValueError, match=words):
        model(IDS, decoder_input_ids=torch.tensor([ids]))


@pytest.mark.parametrize("offset", [0, 2])
def test_a_row_longer_than_the_learned_positions_is_refused(offset: int) -> None:
    model = build(TriadModel, position="learned", position_offset=offset)
    room = 8 - offset
    longest = torch.full((1, room), 5)
    assert model(longest).last_hidden_state.isfinite().all()
    words = rf"^A row must have at most {room} tokens \(max_position_embeddings\), got {{}}. Cut or split it.$"
    with pytest.raises(ValueError, match=words.format(room + 1)):
        model(torch.full((1, room + 1), 5))
    with pytest.raises(ValueError, match=words.format(31)):  # the second row of a pack, at places of its own
        model(torch.full((1, 4), 5), position_ids=torch.tensor([[0, 1, 29, 30]]))
    with pytest.raises(ValueError, match=f"^position_ids must be at least {-offset}, got {-offset - 1}.$"):
        model(torch.full((1, 2), 5), position_ids=torch.tensor([[-offset - 1, 0]]))


@pytest.mark.parametrize("position", ["sinusoidal", "rotary"])
def test_computed_positions_have_no_end(position: str) -> None:
    assert build(TriadModel, position=position)(torch.full((1, 30), 5)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_empty_batch_is_refused(shape: tuple[int, int], implementation: str) -> None:
    model = build(TriadForSequenceClassification)
    model.set_attn_implementation(implementation)
    words = rf"^input_ids must hold a row of at least one token, got shape \({shape[0]}, {shape[1]}\).$"
    with pytest.raises(ValueError, match=words):
        model(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("given", [{}, {"input_ids": IDS, "inputs_embeds": torch.zeros(1, 4, 16)}])
def test_either_ids_or_embeddings(given: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^Give either input_ids or inputs_embeds, and not both\.$"):
        build(TriadModel)(**given)


@pytest.mark.parametrize("given", [{}, {"decoder_input_ids": IDS, "decoder_inputs_embeds": torch.zeros(1, 4, 16)}])
def test_either_ids_or_embeddings_for_the_decoder(given: dict[str, torch.Tensor]) -> None:
    words = "^Give either decoder_input_ids or decoder_inputs_embeds, and not both.$"
    with pytest.raises(ValueError, match=words):
        build(TriadForSeq2SeqLM, shape="encoder_decoder")(IDS, **given)


@pytest.mark.parametrize("missing", ["decoder_start_token_id", "pad_token_id"])
def test_decoder_inputs_need_a_start_and_padding(missing: str) -> None:
    changes = {"decoder_start_token_id": 1, "pad_token_id": 0} | {missing: None}
    model = build(TriadForSeq2SeqLM, shape="encoder_decoder", **changes)
    words = "^TriadConfig must hold decoder_start_token_id and pad_token_id to make decoder inputs.$"
    with pytest.raises(ValueError, match=words):
        model(IDS, labels=IDS)
    assert model(IDS, decoder_input_ids=IDS, labels=IDS).loss.isfinite()


# A row of padding alone

PADDED = {"input_ids": torch.tensor([[5, 6, 7], [0, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(
    ("shape", "pooling"),
    [("encoder", pooling) for pooling in ("cls", "pooler", "mean", "last")]
    + [("decoder", "mean"), ("decoder", "last")],
)
def test_a_row_of_padding_is_finite_and_harms_no_other(
    implementation: str, window: int | None, shape: str, pooling: str
) -> None:
    changes = {"shape": shape, "pooling": pooling, "sliding_window": window}
    for model_class in (TriadForSequenceClassification, TriadForSentenceEmbedding):
        model = build(model_class, **changes)
        model.set_attn_implementation(implementation)
        found = model(**PADDED)[0]
        assert found.isfinite().all()
        torch.testing.assert_close(found[:1], model(PADDED["input_ids"][:1])[0], atol=1e-6, rtol=1e-6)
        found.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        if pooling == "mean" and model_class is TriadForSentenceEmbedding:
            assert not found[1].any()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_source_of_padding_is_finite(implementation: str) -> None:
    model = build(TriadForSeq2SeqLM, shape="encoder_decoder")
    model.set_attn_implementation(implementation)
    output = model(**PADDED, decoder_input_ids=PADDED["input_ids"], decoder_attention_mask=PADDED["attention_mask"])
    assert output.logits.isfinite().all()
    output.logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
