"""Folders of other families as a Triad: names old and new, new heads, adapters, settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    RobertaConfig,
)

from finetune.models.triad import (
    TriadConfig,
    TriadForCausalLM,
    TriadForMaskedLM,
    TriadForSentenceEmbedding,
    TriadForSequenceClassification,
    TriadForTokenClassification,
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
GPT2 = {"vocab_size": 40, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
IDS = torch.tensor([[5, 9, 14, 3], [7, 30, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def randomise(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def compute_logits(model: nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return logits


@torch.no_grad()
def compute_states(model: nn.Module) -> torch.Tensor:
    """Last hidden states of the real tokens."""
    states: torch.Tensor = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    return states[MASK.bool()]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a folder."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture
def bert(tmp_path: Path) -> BertModel:
    """A bare BERT, saved in `tmp_path / "bert"`."""
    model: BertModel = randomise(BertModel(BertConfig(**BERT)))
    model.save_pretrained(tmp_path / "bert")
    return model


# Names


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_base_loads_by_its_names_with_and_without_prefix(bert: BertModel, tmp_path: Path, prefix: str) -> None:
    rewrite(tmp_path / "bert", lambda state: {prefix + name: tensor for name, tensor in state.items()})
    config = convert_config(BertConfig(**BERT, num_labels=5))
    triad, report = TriadForSequenceClassification.from_pretrained(
        tmp_path / "bert", config=config, key_mapping=build_key_mapping("bert"), output_loading_info=True
    )
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert_close(compute_states(triad.model), compute_states(bert))
    assert torch.equal(triad.pooler.dense.weight, bert.pooler.dense.weight)


def test_the_configuration_carries_the_names_of_its_base(bert: BertModel, tmp_path: Path) -> None:
    config = convert_config(bert.config)
    assert config.base_key_mapping == build_key_mapping("bert")
    config.save_pretrained(tmp_path / "triad")
    read = TriadConfig.from_pretrained(tmp_path / "triad")
    triad = TriadModel.from_pretrained(tmp_path / "bert", config=read, key_mapping=read.base_key_mapping)
    assert_close(compute_states(triad), compute_states(bert))
    assert convert_config(GPT2Config(**GPT2)).base_key_mapping is None


def test_saved_again_it_is_a_triad(bert: BertModel, tmp_path: Path) -> None:
    triad = load_from_checkpoint(TriadForSequenceClassification, tmp_path / "bert", convert_config(bert.config))
    triad.save_pretrained(tmp_path / "triad")
    assert load_file(tmp_path / "triad" / "model.safetensors").keys() == triad.state_dict().keys()
    for model in (
        TriadForSequenceClassification.from_pretrained(tmp_path / "triad"),
        load_from_checkpoint(TriadForSequenceClassification, tmp_path / "triad", triad.config),
    ):
        assert torch.equal(compute_logits(model), compute_logits(triad))


def test_names_from_before_pytorch(bert: BertModel, tmp_path: Path) -> None:
    old = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))

    def age(name: str) -> str:
        for new, before in old:
            name = name.replace(new, before)
        return name

    rewrite(tmp_path / "bert", lambda state: {age(name): tensor for name, tensor in state.items()})
    assert "embeddings.LayerNorm.gamma" in load_file(tmp_path / "bert" / "model.safetensors")
    triad = load_from_checkpoint(TriadModel, tmp_path / "bert", convert_config(bert.config))
    assert_close(compute_states(triad), compute_states(bert))


def test_tables_that_old_checkpoints_saved_are_passed_over(tmp_path: Path) -> None:
    """openai-community/gpt2 has no prefix, and holds the causal masks."""
    model = randomise(GPT2LMHeadModel(GPT2Config(**GPT2)))
    model.save_pretrained(tmp_path)

    def age(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        return bare | {f"h.{layer}.attn.bias": torch.ones(1, 1, 12, 12) for layer in range(2)}

    rewrite(tmp_path, age)
    triad = load_from_checkpoint(TriadForCausalLM, tmp_path, convert_config(model.config))
    assert_close(compute_logits(triad)[MASK.bool()], compute_logits(model)[MASK.bool()])


def test_several_files_and_their_generation_settings(tmp_path: Path) -> None:
    model = randomise(GPT2LMHeadModel(GPT2Config(**GPT2)))
    model.generation_config.repetition_penalty = 1.7
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    triad = load_from_checkpoint(TriadForCausalLM, tmp_path, convert_config(model.config))
    assert_close(compute_logits(triad)[MASK.bool()], compute_logits(model)[MASK.bool()])
    assert triad.generation_config.repetition_penalty == 1.7


def test_generation_settings_from_before_they_had_a_file(tmp_path: Path) -> None:
    config = MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=12,
        pad_token_id=39, decoder_start_token_id=39,
    )  # fmt: skip
    model = randomise(MarianMTModel(config))
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"bad_words_ids": [[39]], "num_beams": 3}))
    triad = load_from_checkpoint(type(convert_to_triad(model)), tmp_path, convert_config(config))
    assert (triad.generation_config.bad_words_ids, triad.generation_config.num_beams) == ([[39]], 3)


def test_an_adapter_for_bert_works_on_the_triad(bert: BertModel, tmp_path: Path) -> None:
    model = randomise(BertForSequenceClassification.from_pretrained(tmp_path / "bert"))
    model.save_pretrained(tmp_path / "bert")
    before = compute_logits(model)
    lora = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    triad = load_from_checkpoint(TriadForSequenceClassification, tmp_path / "bert", convert_config(model.config))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    renamed = PeftModel.from_pretrained(triad, tmp_path / "adapter", config=lora, key_mapping=build_key_mapping("bert"))
    assert_close(compute_logits(renamed), compute_logits(adapted))
    assert (compute_logits(adapted) - before).abs().max() > 0.01


# Heads


@pytest.mark.parametrize("model_class", [TriadForMaskedLM, TriadForTokenClassification, TriadForSentenceEmbedding])
def test_any_class_takes_the_base(bert: BertModel, tmp_path: Path, model_class: type[PreTrainedModel]) -> None:
    config = convert_config(bert.config)
    config.pooling = "mean"
    triad = load_from_checkpoint(model_class, tmp_path / "bert", config)
    assert_close(compute_states(triad.base_model), compute_states(bert))
    assert {parameter.dtype for parameter in triad.parameters()} == {torch.float32}
    assert not triad.training


def test_a_head_with_other_labels_starts_anew(tmp_path: Path) -> None:
    model = randomise(BertForSequenceClassification(BertConfig(**BERT, num_labels=3)))
    model.save_pretrained(tmp_path)
    triad = load_from_checkpoint(
        TriadForSequenceClassification, tmp_path, convert_config(BertConfig(**BERT, num_labels=7))
    )
    assert compute_logits(triad).shape == (2, 7)
    assert triad.classifier.weight.std() < 0.05  # as new weights are; those of the folder have .2
    assert_close(compute_states(triad.model), compute_states(model.bert))
    assert torch.equal(triad.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_a_bare_pooler_is_left_out() -> None:
    model = randomise(BertModel(BertConfig(**BERT)))
    back = convert_from_triad(convert_to_triad(model), "bert")
    assert back.pooler is None
    assert_close(compute_states(back), compute_states(model))


def test_weights_are_not_shared() -> None:
    model = randomise(BertForMaskedLM(BertConfig(**BERT)))
    expected = compute_logits(model)
    randomise(convert_to_triad(model))
    assert torch.equal(compute_logits(model), expected)


def test_precision_is_kept() -> None:
    model = BertForMaskedLM(BertConfig(**BERT)).to(torch.bfloat16)
    triad = convert_to_triad(model)
    assert triad.dtype == convert_from_triad(triad, "bert").dtype == torch.bfloat16


def test_a_fine_tuned_triad_becomes_a_plain_bert(bert: BertModel, tmp_path: Path) -> None:
    config = convert_config(BertConfig(**BERT, num_labels=3, classifier_dropout=0.4, problem_type="regression"))
    triad = randomise(load_from_checkpoint(TriadForSequenceClassification, tmp_path / "bert", config))
    convert_from_triad(triad, "bert").save_pretrained(tmp_path / "plain")
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert (plain.config.classifier_dropout, plain.config.problem_type) == (0.4, "regression")
    assert_close(compute_logits(plain), compute_logits(triad))


def test_settings_that_the_class_does_not_read_do_not_matter() -> None:
    config = convert_config(BertConfig(**BERT))
    config.pooling, config.lm_head_bias, config.tie_word_embeddings = "mean", False, False
    triad = randomise(TriadForTokenClassification(config))
    assert_close(compute_logits(convert_from_triad(triad, "bert"))[MASK.bool()], compute_logits(triad)[MASK.bool()])


# Settings


def test_settings_are_carried_over() -> None:
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "classifier_dropout": 0.4}
    config = convert_config(
        RobertaConfig(**BERT, **rates, pad_token_id=1, eos_token_id=[2, 3], id2label=labels, problem_type="regression")
    )
    assert (config.num_labels, config.id2label, config.problem_type) == (3, labels, "regression")
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, [2, 3])
    assert (config.dropout, config.attention_dropout, config.classifier_dropout) == (0.3, 0.2, 0.4)
    assert config.position_offset == 2
    marian = convert_config(MarianConfig(activation_dropout=0.3))
    assert (marian.activation_dropout, marian.decoder_start_token_id) == (0.3, 58100)
    assert convert_config(LlamaConfig()).dropout == 0


def test_a_triad_stays_as_it_is() -> None:
    config = TriadConfig(pooling="cls", num_labels=4)
    copy = convert_config(config)
    assert copy == config
    assert copy is not config
