"""A converted model gives the numbers of the class it came from, and comes back bit for bit.

All weights are random, biases, norms and biases of logits too, so that one that is dropped is seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from finetune.models.triad import TriadForCausalLM, TriadForSeq2SeqLM
from finetune.models.triad.conversion import (
    convert_config,
    convert_from_triad,
    convert_to_triad,
    load_from_checkpoint,
)

TOLERANCE = 1e-5
VOCABULARY = 50
LENGTHS = (9, 4, 6)

# Values that are not the defaults of either side.
ENCODER = {"vocab_size": VOCABULARY, "num_labels": 4, "initializer_range": 0.05}
BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 17,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": ENCODER | BERT,
    "Roberta": ENCODER | BERT | {"pad_token_id": 1},
    "DistilBert": ENCODER | {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "max_position_embeddings": 17},
    "GPT2": ENCODER
    | {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 17, "layer_norm_epsilon": 1e-3}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": VOCABULARY - 1},
    "Llama": ENCODER
    | {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "pad_token_id": 0,
    },
    "Marian": {
        "vocab_size": VOCABULARY,
        "d_model": 24,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "scale_embedding": True,
        "max_position_embeddings": 17,
        "activation_function": "swish",
        "pad_token_id": VOCABULARY - 1,
        "decoder_start_token_id": VOCABULARY - 1,
    },
}
LABELS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
MODELS = {
    "Bert": ("Model", "ForMaskedLM", *LABELS),
    "Roberta": ("Model", "ForMaskedLM", *LABELS),
    "DistilBert": ("Model", "ForMaskedLM", *LABELS),
    "GPT2": ("Model", "LMHeadModel", *LABELS),
    "Llama": ("Model", "ForCausalLM", *LABELS),
    "Marian": ("Model", "MTModel"),
}


class Case(NamedTuple):
    """A class of transformers, with settings on top of CONFIGS."""

    family: str
    model: str
    changes: dict[str, Any]

    def __str__(self) -> str:
        return self.family + self.model + "".join(f", {name} {value}" for name, value in self.changes.items())


CASES = [Case(family, model, {}) for family, models in MODELS.items() for model in models]
CASES += [
    *(Case("Bert", "ForMaskedLM", {"hidden_act": name}) for name in ("relu", "silu", "gelu_new")),
    Case("DistilBert", "ForMaskedLM", {"tie_word_embeddings": False}),
    Case("GPT2", "LMHeadModel", {"tie_word_embeddings": False, "n_inner": 32, "activation_function": "relu"}),
    Case("Llama", "ForCausalLM", {"tie_word_embeddings": True, "head_dim": 10}),
    Case("Llama", "ForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    Case("Marian", "MTModel", {"activation_function": "gelu", "scale_embedding": False}),
    Case("Marian", "MTModel", {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}),
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def build_config(case: Case) -> PreTrainedConfig:
    labels = {"num_labels": 2} if case.model == "ForQuestionAnswering" else {}  # a start and an end
    config: PreTrainedConfig = getattr(transformers, f"{case.family}Config")(
        **CONFIGS[case.family] | labels | case.changes
    )
    return config


@torch.no_grad()
def build(case: Case) -> PreTrainedModel:
    """The model with all weights random; not the table of sinusoids, which is computed."""
    options = {"add_pooling_layer": False} if case.model == "Model" and case.family in ("Bert", "Roberta") else {}
    model: PreTrainedModel = getattr(transformers, case.family + case.model)(build_config(case), **options)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and "embed_positions" not in name and "inv_freq" not in name:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def draw_tokens(config: PreTrainedConfig, *, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of LENGTHS, padded on one side."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(LENGTHS), max(LENGTHS))
    tokens = torch.randint(2, VOCABULARY - 2, shape, generator=generator)
    places = torch.arange(shape[1]) if side == "right" else torch.arange(shape[1]).flip(0)
    mask = (places < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": tokens.masked_fill(mask == 0, int(config.pad_token_id)), "attention_mask": mask}


def draw_inputs(case: Case, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Padded rows, with token types for BERT and with tokens for the decoder for Marian."""
    inputs = draw_tokens(config)
    generator = torch.Generator().manual_seed(7)
    if case.family == "Bert":
        inputs["token_type_ids"] = torch.randint(0, 3, inputs["input_ids"].shape, generator=generator)
    if case.family == "Marian":
        inputs["decoder_input_ids"] = torch.randint(0, VOCABULARY, (len(LENGTHS), 7), generator=generator)
    return inputs


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def assert_same_outputs(found: Any, expected: Any, mask: torch.Tensor) -> None:
    """All floating-point outputs are the same, on real tokens where there is one for each token of the input."""
    compared = 0
    for name, value in expected.items():
        if name in ("past_key_values", "pooler_output"):
            continue
        assert name in found, name
        pairs = zip(found[name], value, strict=True) if isinstance(value, tuple) else [(found[name], value)]
        for ours, theirs in pairs:
            real = mask.bool() if theirs.shape[:2] == mask.shape else slice(None)
            assert_close(ours[real], theirs[real])
            compared += 1
    assert compared >= 1


def list_differences(found: nn.Module, expected: nn.Module) -> list[str]:
    ours, theirs = found.state_dict(), expected.state_dict()
    names = ours.keys() | theirs.keys()
    return sorted(
        name for name in names if not (name in ours and name in theirs and torch.equal(ours[name], theirs[name]))
    )


@by_case
@torch.no_grad()
def test_logits_and_hidden_states_are_those_of_the_original(case: Case) -> None:
    model = build(case)
    inputs = draw_inputs(case, model.config)
    expected = model(**inputs, output_hidden_states=True)
    found = convert_to_triad(model)(**inputs, output_hidden_states=True)
    hidden = "decoder_hidden_states" if case.family == "Marian" else "hidden_states"
    assert len(expected[hidden]) == {"Marian": 4}.get(case.family, 3)
    assert_same_outputs(found, expected, inputs["attention_mask"])


@by_case
def test_there_and_back_every_bit_is_the_same(case: Case) -> None:
    model = build(case)
    back = convert_from_triad(convert_to_triad(model), model.config.model_type)
    assert type(back) is type(model)
    assert list_differences(back, model) == []


@by_case
@torch.no_grad()
def test_a_saved_folder_loads_as_the_same_triad(case: Case, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path)
    converted = convert_to_triad(model)
    config = convert_config(type(model.config).from_pretrained(tmp_path))
    loaded = load_from_checkpoint(type(converted), tmp_path, config)
    assert list_differences(loaded, converted) == []


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", [Case("GPT2", "LMHeadModel", {}), Case("Llama", "ForCausalLM", {})], ids=str)
@torch.no_grad()
def test_decoders_with_padding_on_either_side(model: Case, side: str) -> None:
    original = build(model)
    inputs = draw_tokens(original.config, side=side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = original(**inputs, output_hidden_states=True)
    found = convert_to_triad(original)(**inputs, output_hidden_states=True)
    assert_same_outputs(found, expected, inputs["attention_mask"])


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
@torch.no_grad()
def test_encoders_with_padding_on_either_side(family: str, side: str, with_mask: bool) -> None:
    """RoBERTa counts positions by the tokens that are not padding, whatever the mask says; the others from the left."""
    original = build(Case(family, "ForMaskedLM", {}))
    inputs = draw_tokens(original.config, side=side)
    mask = inputs["attention_mask"]
    if not with_mask:
        del inputs["attention_mask"]
        mask = torch.ones_like(mask)
    expected = original(**inputs, output_hidden_states=True)
    found = convert_to_triad(original)(**inputs, output_hidden_states=True)
    assert_same_outputs(found, expected, mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
@torch.no_grad()
def test_decoders_without_a_mask_label_the_last_token_that_is_no_padding(family: str, side: str) -> None:
    original = build(Case(family, "ForSequenceClassification", {}))
    tokens = draw_tokens(original.config, side=side)["input_ids"]
    assert_close(convert_to_triad(original)(tokens).logits, original(tokens).logits)


@pytest.mark.parametrize("case", [Case("GPT2", "LMHeadModel", {}), Case("Llama", "ForCausalLM", {})], ids=str)
@torch.no_grad()
def test_token_by_token_with_a_cache(case: Case) -> None:
    original = build(case)
    triad = convert_to_triad(original)
    assert isinstance(triad, TriadForCausalLM)
    tokens = draw_tokens(original.config)["input_ids"]
    caches: list[Any] = [None, None]
    steps = []
    for place in range(tokens.shape[1]):
        column = tokens[:, place : place + 1]
        expected, found = (
            model(column, past_key_values=cache, use_cache=True)
            for model, cache in zip((original, triad), caches, strict=True)
        )
        caches = [expected.past_key_values, found.past_key_values]
        assert_close(found.logits, expected.logits)
        steps.append(found.logits)
    assert_close(torch.cat(steps, 1), original(tokens).logits)


@torch.no_grad()
def test_a_translator_decodes_token_by_token_with_a_cache() -> None:
    original = build(Case("Marian", "MTModel", {}))
    triad = convert_to_triad(original)
    assert isinstance(triad, TriadForSeq2SeqLM)
    inputs = draw_inputs(Case("Marian", "MTModel", {}), original.config)
    tokens = inputs.pop("decoder_input_ids")
    encoded = [model.get_encoder()(**inputs) for model in (original, triad)]
    caches: list[Any] = [None, None]
    steps = []
    for place in range(tokens.shape[1]):
        expected, found = (
            model(
                encoder_outputs=outputs,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=tokens[:, place : place + 1],
                past_key_values=cache,
                use_cache=True,
            )
            for model, outputs, cache in zip((original, triad), encoded, caches, strict=True)
        )
        caches = [expected.past_key_values, found.past_key_values]
        assert_close(found.logits, expected.logits)
        steps.append(found.logits)
    assert_close(torch.cat(steps, 1), original(**inputs, decoder_input_ids=tokens).logits)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "case",
    [Case("GPT2", "LMHeadModel", {}), Case("Llama", "ForCausalLM", {}), Case("Marian", "MTModel", {})],
    ids=str,
)
def test_generated_tokens_and_their_settings_are_the_same(case: Case, beams: int) -> None:
    original = build(case)
    original.generation_config.repetition_penalty = 1.5
    inputs = draw_tokens(original.config, side="left")
    options = {"num_beams": beams, "max_new_tokens": 8, "do_sample": False}
    expected = original.generate(**inputs, **options)
    assert torch.equal(convert_to_triad(original).generate(**inputs, **options), expected)
