"""Triad inside Hugging Face's Trainer and under PEFT: people are not locked in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from finetune.models import triad

VOCABULARY = 61
DECODER = {
    "shape": "decoder",
    "position": "rotary",
    "norm": "rmsnorm",
    "norm_position": "pre",
    "activation": "swiglu",
    "num_key_value_heads": 2,
    "pooling": "last",
}
SEQ2SEQ = {"shape": "encoder_decoder", "decoder_start_token_id": 1}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rows": (triad.TriadForSequenceClassification, {"type_vocab_size": 2}),
    "tokens": (triad.TriadForTokenClassification, {}),
    "answers": (triad.TriadForQuestionAnswering, {}),
    "causal": (triad.TriadForCausalLM, DECODER),
    "causal, sinusoidal": (triad.TriadForCausalLM, {"shape": "decoder", "pooling": "last"}),
    "seq2seq": (triad.TriadForSeq2SeqLM, SEQ2SEQ),
    "items": (triad.TriadForNextItem, DECODER | {"num_items": VOCABULARY, "item_text_size": 6}),
}
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def build(name: str, attention: str = "sdpa", **choices: Any) -> Any:
    cls, own = MODELS[name]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "max_position_embeddings": 40, "initializer_range": 0.2, "num_labels": 3}
    torch.manual_seed(0)
    config = triad.TriadConfig(**sizes | more | {"dropout": 0.0, "bos_token_id": 1} | own | choices)
    return cls._from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
def compute(model: Any) -> torch.Tensor:
    options = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, attention_mask=MASK, **options)[0]


# Gradient checkpointing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["rows", "causal", "seq2seq", "items"])
def test_checkpointing_changes_memory_only(name: str, attention: str) -> None:
    model = build(name, attention, dropout=0.1, attention_dropout=0.1).train()
    labels = torch.tensor([0, 2]) if name == "rows" else IDS
    calls = []
    for module in model.modules():
        if type(module).__name__ == "TriadFeedForward":
            module.register_forward_hook(lambda *_: calls.append(1))

    def compute_gradients() -> tuple[int, torch.Tensor, list[torch.Tensor]]:
        calls.clear()
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(input_ids=IDS, attention_mask=MASK, labels=labels).loss
        loss.backward()
        return len(calls), loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    once, loss, gradients = compute_gradients()
    model.gradient_checkpointing_enable()
    twice, loss_again, gradients_again = compute_gradients()
    assert twice == 2 * once
    torch.testing.assert_close(loss_again, loss, atol=0, rtol=1e-6)
    torch.testing.assert_close(gradients_again, gradients, atol=1e-5, rtol=1e-5)


# Trainer


def make_rows(labelled: bool) -> list[dict[str, Any]]:
    """Rows of 3 to 11 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 12, (16,), generator=generator).tolist()
    rows = [{"input_ids": torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]
    return [{**row, "labels": i % 3} for i, row in enumerate(rows)] if labelled else rows


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right; their tokens are their labels where they have no others."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    labels = (
        torch.tensor([row["labels"] for row in rows]) if "labels" in rows[0] else padded.masked_fill(mask == 0, -100)
    )
    return {"input_ids": padded, "attention_mask": mask, "labels": labels}


def train(model: Any, folder: Path, collate: Callable[..., Any], rows_per_batch: int) -> Trainer:
    """Three steps of plain SGD on 8 rows each."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows_per_batch,
        gradient_accumulation_steps=8 // rows_per_batch,
        max_steps=3,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = make_rows(isinstance(model, triad.TriadForSequenceClassification))
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return trainer


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["rows", "causal", "seq2seq"])
def test_small_batches_add_up_to_the_big_one(name: str, tmp_path: Path) -> None:
    start = build(name)
    big, small = copy.deepcopy(start), copy.deepcopy(start)
    train(big, tmp_path, pad, 8)
    trainer = train(small, tmp_path, pad, 2)
    assert_same_weights(big, small)
    moved = [(one - other).abs().max() for one, other in zip(big.parameters(), start.parameters(), strict=True)]
    assert max(moved) > 0.01

    trainer.save_model(str(tmp_path / "model"))
    loaded = type(small).from_pretrained(tmp_path / "model")
    assert torch.equal(compute(loaded), compute(small.eval()))


@pytest.mark.parametrize("with_lengths", [False, True])
def test_packed_rows_train_as_padded_ones(with_lengths: bool, tmp_path: Path) -> None:
    padded = build("causal")
    packed = copy.deepcopy(padded)
    train(padded, tmp_path, pad, 8)
    train(packed, tmp_path, DataCollatorWithFlattening(return_flash_attn_kwargs=with_lengths), 8)
    assert_same_weights(padded, packed)


def test_no_column_is_lost_on_the_way_to_the_model(tmp_path: Path) -> None:
    """Trainer drops the columns that `forward` does not name."""
    model = build("rows")
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    columns = {"input_ids": IDS[:1], "attention_mask": MASK[:1], "token_type_ids": types}
    rows = Dataset.from_dict({name: column.tolist() for name, column in columns.items()} | {"labels": [1]})
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    found = Trainer(model=model, args=arguments).predict(rows).predictions
    with torch.no_grad():
        expected = model(**columns).logits
        without = model(**columns | {"token_type_ids": None}).logits
    torch.testing.assert_close(torch.tensor(found), expected)
    assert not torch.allclose(expected, without, atol=1e-3)


# PEFT

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
EVERY = {"r": 4, "target_modules": "all-linear"}
SOME = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
SCALED = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
ADAPTERS: dict[str, tuple[str, PeftConfig]] = {
    "rows, all linear": ("rows", LoraConfig(task_type="SEQ_CLS", **EVERY)),
    "rows, query and value": ("rows", LoraConfig(task_type="SEQ_CLS", **SOME)),
    "rows, IA3": ("rows", IA3Config(task_type="SEQ_CLS", **SCALED)),
    # PEFT leaves only the heads of whole rows out of all-linear by itself, BERT's too.
    "tokens, all linear": ("tokens", LoraConfig(task_type="TOKEN_CLS", exclude_modules=["classifier"], **EVERY)),
    "answers, query and value": ("answers", LoraConfig(task_type="QUESTION_ANS", **SOME)),
    "causal, all linear": ("causal", LoraConfig(task_type="CAUSAL_LM", **EVERY)),
    "causal, query and value": ("causal", LoraConfig(task_type="CAUSAL_LM", **SOME)),
    "causal, IA3": ("causal", IA3Config(task_type="CAUSAL_LM", **SCALED)),
    "seq2seq, all linear": ("seq2seq", LoraConfig(task_type="SEQ_2_SEQ_LM", **EVERY)),
}
HEADS = {"rows": "classifier", "tokens": "classifier", "answers": "qa_outputs"}
PROMPTS: dict[str, tuple[str, PeftConfig]] = {
    "prefix, causal": ("causal", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt, causal": ("causal", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt, sinusoidal": ("causal, sinusoidal", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix, seq2seq": ("seq2seq", PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)),
    "prefix, rows": ("rows", PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "prompt, rows": ("rows", PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
}


def adapt(name: str, config: PeftConfig) -> PeftModel:
    """An adapter on the model, after training that moved all that is trained."""
    model = get_peft_model(build(name), copy.deepcopy(config)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def reload(name: str, adapted: PeftModel, folder: Path) -> PeftModel:
    """The saved adapter on another copy of its base, whose head is not yet the trained one."""
    adapted.save_pretrained(folder)
    base = build(name)
    if name in HEADS:
        nn.init.zeros_(base.get_submodule(HEADS[name]).weight)
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter_saved_loaded_merged_disabled(case: str, tmp_path: Path) -> None:
    name, config = ADAPTERS[case]
    base, adapted = compute(build(name)), adapt(name, config)
    logits = compute(adapted)
    assert (logits - base).abs().max() > 0.05
    with adapted.disable_adapter():
        assert torch.equal(compute(adapted), base)
    loaded = reload(name, adapted, tmp_path)
    assert torch.equal(compute(loaded), logits)
    torch.testing.assert_close(compute(loaded.merge_and_unload()), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in ADAPTERS if "all linear" in case])
def test_all_linear_means_the_layers(case: str) -> None:
    name, config = ADAPTERS[case]
    adapted = get_peft_model(build(name), copy.deepcopy(config))
    trained = [part for part, parameter in adapted.named_parameters() if parameter.requires_grad]
    layers = {part.split(".lora_")[0].rpartition(".")[2] for part in trained if ".lora_" in part}
    assert layers == (LINEAR | {"gate_proj"} if name == "causal" else LINEAR)
    heads = {part.split(".modules_to_save")[0].rpartition(".")[2] for part in trained if ".lora_" not in part}
    assert heads == ({HEADS[name]} if name in HEADS else set())


@pytest.mark.parametrize("case", PROMPTS)
def test_virtual_tokens(case: str, tmp_path: Path) -> None:
    name, config = PROMPTS[case]
    adapted = adapt(name, config)
    logits = compute(adapted)
    base = compute(build(name))
    own = logits[..., -base.shape[-2] :, :]  # without the logits of virtual tokens
    assert (own - base).abs().max() > 0.05
    assert torch.equal(compute(reload(name, adapted, tmp_path)), logits)
    with torch.no_grad():  # the second row without its padding
        options = {"decoder_input_ids": IDS[1:, :5]} if name == "seq2seq" else {}
        alone = adapted(input_ids=IDS[1:, :6], **options)[0]
    torch.testing.assert_close(logits[1:, : alone.shape[1]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["causal, all linear", "causal, IA3", "prefix, causal", "prompt, causal"])
def test_an_adapted_decoder_generates(case: str) -> None:
    name, config = (ADAPTERS | PROMPTS)[case]
    adapted = adapt(name, config)
    known = IDS[:, :4]
    for _ in range(5):
        with torch.no_grad():
            logits = adapted(input_ids=known).logits[:, -1:]
        known = torch.cat([known, logits.argmax(-1)], dim=1)
    assert torch.equal(adapted.generate(input_ids=IDS[:, :4], max_new_tokens=5, do_sample=False), known)
