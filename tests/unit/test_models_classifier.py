"""The two architectures behind `model.architecture`, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import DebertaV2Config, MPNetConfig, MPNetForSequenceClassification

from finetune.data.batches import Examples
from finetune.errors import ModelError, RecipeError
from finetune.models.base import BaseModel
from finetune.models.classifier import build_classifier, build_classifier_config, get_padding, list_head_modules
from finetune.models.embedding import compute_embeddings
from finetune.recipe.schema import ModelSection

LABELS = ["low", "high"]
both = pytest.mark.parametrize("architecture", ["triad", "native"])


@pytest.fixture
def base(tiny_base: Path) -> BaseModel:
    return BaseModel("tiny", tiny_base, "local folder")


@both
def test_words_for_weights_that_are_none(tiny_base, tmp_path, architecture):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    broken = BaseModel("acme/broken", folder, "local folder")
    with pytest.raises(ModelError, match=r": must load as (a sequence classifier|TriadFor\w+); .*header"):
        build_classifier(broken, LABELS, ModelSection(architecture=architecture), seed=0)


@both
def test_the_classifier_carries_classes_dropout_and_float32(base, architecture):
    model = build_classifier(base, LABELS, ModelSection(architecture=architecture, dropout=0.3), seed=0)
    assert model.config.id2label == {0: "low", 1: "high"}
    assert model.config.label2id == {"low": 0, "high": 1}
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    config = build_classifier_config(base, LABELS, ModelSection(architecture=architecture)).to_dict()
    assert {value for key, value in config.items() if "dropout" in key} <= {0.0, None}


@both
def test_the_seed_decides_the_head_and_nothing_else(base, architecture):
    section = ModelSection(architecture=architecture)
    first, same, other = (build_classifier(base, LABELS, section, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {"classifier.weight"}


def test_triad_gives_the_logits_of_the_native_class(base):
    triad, native = (
        build_classifier(base, LABELS, ModelSection(architecture=name), seed=0).eval() for name in ("triad", "native")
    )
    native.classifier.load_state_dict(triad.classifier.state_dict())
    ids = torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids).index_fill(1, torch.arange(6, 9), 0)
    with torch.no_grad():
        torch.testing.assert_close(triad(ids, mask).logits, native(ids, mask).logits, atol=1e-6, rtol=0)
    assert list_head_modules(triad) == ["pooler", "classifier"]


def test_on_an_accelerator_each_class_gets_the_attention_that_it_has(base, tmp_path, monkeypatch):
    """MPNet's class has no SDPA."""
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    MPNetForSequenceClassification(MPNetConfig(vocab_size=100, **size)).save_pretrained(tmp_path)
    mpnet = BaseModel("acme/mpnet", tmp_path, "local folder")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    settings = [(mpnet, "native"), (base, "native"), (base, "triad")]
    models = [build_classifier(one, LABELS, ModelSection(architecture=name), seed=0) for one, name in settings]
    assert [model.config._attn_implementation for model in models] == ["eager", "sdpa", "sdpa"]
    no_rows = Examples.build([], [])
    assert compute_embeddings(mpnet, [no_rows], 0)[0].shape == (0, 32)


def test_the_mean_where_the_base_says_so(tiny_base, tmp_path, base):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    encoder = BaseModel("acme/sentences", folder, "local folder")
    settings = [(encoder, "auto"), (encoder, "first"), (base, "auto"), (base, "mean")]
    found = [build_classifier_config(one, LABELS, ModelSection(pooling=pooling)).pooling for one, pooling in settings]
    assert found == ["mean", "pooler", "pooler", "mean"]
    assert list_head_modules(build_classifier(encoder, LABELS, ModelSection(), seed=0)) == ["classifier"]


def test_a_triad_is_a_base_too(base, tmp_path):
    """Such as the folder of a model that was trained further on other texts."""
    first = build_classifier(base, LABELS, ModelSection(), seed=0)
    first.save_pretrained(tmp_path)
    again = build_classifier(BaseModel("mine", tmp_path, "local folder"), ["a", "b", "c"], ModelSection(), seed=0)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert again.config.num_labels == 3


@both
def test_what_fills_a_batch(base, architecture):
    class Tokenizer:
        pad_token_id = 7

    model = build_classifier(base, LABELS, ModelSection(architecture=architecture), seed=0)
    assert get_padding(model, Tokenizer()) == (None if architecture == "triad" else 7)


def test_words_for_a_family_that_triad_has_no_form_of(tmp_path):
    DebertaV2Config(hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        build_classifier_config(BaseModel("acme/deberta", tmp_path, "local folder"), LABELS, ModelSection())
    assert str(caught.value) == (
        "model_type must be one of bert, distilbert, gpt2, llama, marian, roberta, got 'deberta-v2'. "
        "Set model.architecture: native to take the family's own class."
    )


def test_words_for_a_mean_that_the_native_class_does_not_have(base):
    with pytest.raises(RecipeError) as caught:
        build_classifier_config(base, LABELS, ModelSection(architecture="native", pooling="mean"))
    assert str(caught.value) == (
        "model.pooling: mean needs model.architecture: triad, got native: bert's own class reads one token. "
        "Set model.pooling: first, or model.architecture: triad."
    )
