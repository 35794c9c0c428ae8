"""What cannot be converted or loaded, and the words that say so; ' ... ' in them stands for anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    MarianConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
)

from finetune.errors import ModelError
from finetune.models.triad import (
    TriadForCausalLM,
    TriadForMaskedLM,
    TriadForMultiTask,
    TriadForSentenceEmbedding,
    TriadForSequenceClassification,
    TriadModel,
)
from finetune.models.triad.conversion import (
    build_key_mapping,
    convert_config,
    convert_from_triad,
    convert_to_triad,
    load_from_checkpoint,
)

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {"vocab_size": 40, "max_position_embeddings": 12, **SIZES}
GPT2 = {"vocab_size": 40, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
SUPPORTED = "model_type must be one of bert, distilbert, gpt2, llama, marian, roberta, got 't5'."
NATIVE = "Set model.architecture: native to take the family's own class."
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def assert_says(error: pytest.ExceptionInfo[ModelError], words: str) -> None:
    for part in words.split(" ... "):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (T5Config(), f"{SUPPORTED} {NATIVE}"),
        (
            BertConfig(is_decoder=True),
            f"BertConfig cannot become a Triad: is_decoder must be False, got True. {NATIVE}",
        ),
        (BertConfig(position_embedding_type="relative_key"), "position_embedding_type must be 'absolute', got 'relat"),
        (BertConfig(tie_word_embeddings=False), "tie_word_embeddings must be True, got False"),
        (BertConfig(hidden_act="mish"), "hidden_act must be one of gelu, gelu_new, relu, silu, ... got 'mish'"),
        (BertConfig(is_decoder=True, hidden_act="mish"), "is_decoder must be False, got True; hidden_act must be one"),
        (BertConfig(pad_token_id=99999), "cannot become a Triad: pad_token_id must ... 99999. Set model.architecture"),
        (RobertaConfig(hidden_act="relu"), "hidden_act must be one of gelu, got 'relu'"),
        (DistilBertConfig(activation="tanh"), "activation must be one of gelu, ... got 'tanh'"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx must be False, got True"),
        (GPT2Config(reorder_and_upcast_attn=True), "reorder_and_upcast_attn must be False, got True"),
        (GPT2Config(scale_attn_weights=False), "scale_attn_weights must be True, got False"),
        (GPT2Config(add_cross_attention=True), "add_cross_attention must be False, got True"),
        (GPT2Config(embd_pdrop=0.3), "embd_pdrop must be 0.1 like resid_pdrop, got 0.3"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act must be one of silu, swish, got 'gelu'"),
        (LlamaConfig(rope_parameters=LINEAR), "rope_parameters.rope_type must be 'default', got 'linear'"),
        (MarianConfig(encoder_ffn_dim=8, decoder_ffn_dim=16), "decoder_ffn_dim must be 8 like encoder_ffn_dim, got 16"),
        (MarianConfig(decoder_vocab_size=9), "decoder_vocab_size must be 58101 like vocab_size, got 9"),
        (MarianConfig(decoder_layerdrop=0.2), "decoder_layerdrop must be 0.0, got 0.2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_triad_cannot_express(config: PreTrainedConfig, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        convert_config(config)
    assert_says(caught, words)


@pytest.mark.parametrize(
    ("model_class", "words"),
    [
        (
            BertForMultipleChoice,
            "BertForMultipleChoice has no counterpart in Triad. Classes that have one: BertForMasked",
        ),
        (BertLMHeadModel, "BertLMHeadModel cannot become TriadForCausalLM: ... needs a config of shape decoder"),
        (
            BertForQuestionAnswering,
            "BertForQuestionAnswering cannot become ... only one has qa_outputs.bias, qa_outputs",
        ),
    ],
)
def test_models_without_a_counterpart(model_class: type[PreTrainedModel], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        convert_to_triad(model_class(BertConfig(**BERT, num_labels=3)))
    assert_says(caught, words)


HEADS = {"tone": {"type": "sequence_classification", "num_labels": 2}}


@pytest.mark.parametrize(
    ("model_class", "changes", "family", "words"),
    [
        (
            TriadForSequenceClassification,
            {"pooling": "mean"},
            "bert",
            "pooling must be 'pooler', got 'mean'. Keep it as",
        ),
        (
            TriadForSequenceClassification,
            {"normalize_pooled": True},
            "bert",
            "normalize_pooled must be False, got True",
        ),
        (TriadForSequenceClassification, {"classifier_bias": False}, "bert", "classifier_bias must be True, got False"),
        (
            TriadForSequenceClassification,
            {},
            "distilbert",
            "type_vocab_size must be 0, got 2 ... pooler_activation must",
        ),
        (TriadForSequenceClassification, {}, "roberta", "position_offset must be 1, got 0"),
        (TriadForSequenceClassification, {}, "llama", "cannot become llama: shape must be 'decoder', got 'encoder'; "),
        (TriadModel, {"sliding_window": 3}, "bert", "sliding_window must be None, got 3"),
        (TriadModel, {"head_dim": 6}, "bert", "head_dim must be 8, got 6"),
        (TriadModel, {"activation": "swiglu"}, "bert", "activation must be 'gelu', got 'swiglu'"),
        (TriadModel, {"type_vocab_size": 0}, "bert", "only one has embeddings.token_type_embeddings.weight"),
        (TriadModel, {}, "marian", "TriadModel cannot become marian: ... decoder_start_token_id"),
        (TriadModel, {}, "t5", SUPPORTED),
        (TriadForMaskedLM, {"lm_head_bias": False}, "bert", "lm_head_bias must be True, got False"),
        (TriadForMaskedLM, {}, "gpt2", "TriadForMaskedLM has no counterpart in gpt2. Classes that have one: GPT2ForQ"),
        (TriadForSentenceEmbedding, {}, "bert", "The base alone: convert_from_triad(model.model, ...)"),
        (TriadForMultiTask, {"heads": HEADS}, "bert", "TriadForMultiTask has no counterpart in bert"),
    ],
)
def test_models_that_a_family_cannot_express(
    model_class: type[PreTrainedModel], changes: dict[str, Any], family: str, words: str
) -> None:
    config = convert_config(BertConfig(**BERT))
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ModelError) as caught:
        convert_from_triad(model_class(config), family)
    assert_says(caught, words)


def test_families_whose_weights_need_more_than_names() -> None:
    with pytest.raises(ModelError) as caught:
        build_key_mapping("gpt2")
    assert_says(caught, "gpt2: its weights need more than new names. Load them with load_from_checkpoint")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"vocab_size": 41},
            ": vocab_size must be that of the weights, 40, got 41. Load with theirs, then call resize_",
        ),
        (
            {"max_position_embeddings": 20},
            "encoder.embeddings.positions.weight must have shape (20, 16), got (12, 16).",
        ),
        ({"hidden_size": 32}, " must have shape ( ... got ("),
        (
            {"num_hidden_layers": 3},
            ": must hold all weights of the base, lacks 16: model.encoder.layers.2.attention.k_pr",
        ),
        (
            {"num_hidden_layers": 1},
            "a place for all weights of the base, leaves out 16: model.encoder.layers.1.attention",
        ),
    ],
)
def test_a_configuration_that_the_weights_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    config = convert_config(BertConfig(**BERT | changes))
    with pytest.raises(ModelError) as caught:
        load_from_checkpoint(TriadForSequenceClassification, tmp_path, config)
    assert_says(caught, f"{tmp_path} ... {words}")


def test_a_vocabulary_that_does_not_match_a_gpt2(tmp_path: Path) -> None:
    GPT2Model(GPT2Config(**GPT2)).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_from_checkpoint(TriadForCausalLM, tmp_path, convert_config(GPT2Config(**GPT2 | {"vocab_size": 39})))
    assert_says(caught, "vocab_size must be that of the weights, 40, got 39.")


def test_weights_in_another_wrapper(tmp_path: Path) -> None:
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({f"student.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_from_checkpoint(TriadModel, tmp_path, convert_config(BertConfig(**BERT)))
    assert_says(caught, f"{tmp_path}: must hold all weights of the base, lacks 37: encoder.embeddings.norm.bias first.")


def test_a_class_of_another_shape(tmp_path: Path) -> None:
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_from_checkpoint(TriadForCausalLM, tmp_path, convert_config(BertConfig(**BERT)))
    assert_says(caught, "must load as TriadForCausalLM; ... needs a config of shape decoder, got encoder")


@pytest.mark.parametrize(("model_class", "config"), [(BertModel, BertConfig(**BERT)), (GPT2Model, GPT2Config(**GPT2))])
def test_files_that_cannot_be_read(model_class: Any, config: PreTrainedConfig, tmp_path: Path) -> None:
    model_class(config).save_pretrained(tmp_path)
    path, settings = tmp_path / "model.safetensors", tmp_path / "config.json"

    def get_words() -> str:
        with pytest.raises(ModelError) as caught:
            load_from_checkpoint(TriadForSequenceClassification, tmp_path, convert_config(config))
        return str(caught.value)

    path.write_bytes(path.read_bytes()[:500])
    assert get_words().startswith(f"{tmp_path}: must ")
    path.rename(tmp_path / "pytorch_model.bin")  # the name of a pickle
    assert "model.safetensors" in get_words()
    settings.write_text(json.dumps({"model_type": "t5"}))
    assert get_words() == f"{SUPPORTED} {NATIVE}"
    settings.write_text("{")
    assert get_words().startswith(f"{tmp_path}: must hold a config.json that can be read; ")
    settings.unlink()
    assert get_words().startswith(f"{tmp_path}: must hold a config.json that can be read; ")
