"""The added layer really is the mean over tokens, and the model around it stays Hugging Face's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertForSequenceClassification, DistilBertConfig, DistilBertModel

from finetune.errors import RecipeError
from finetune.models.base import BaseModel
from finetune.models.classifier import build_classifier, list_added_modules
from finetune.models.pooling import SCALE, wants_mean
from finetune.recipe.schema import ModelSection

LABELS = ["a", "b", "c"]
INPUT_IDS = torch.tensor([[2, 40, 41, 3, 0, 0], [2, 50, 51, 52, 53, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


@pytest.fixture
def base(tiny_base: Path) -> BaseModel:
    return BaseModel(str(tiny_base), tiny_base, "local folder")


def build(base: BaseModel, pooling: str) -> torch.nn.Module:
    section = ModelSection(base=base.reference, pooling=pooling)  # type: ignore[arg-type]  # a literal
    return build_classifier(base, LABELS, section, seed=0).eval()


@torch.no_grad()
def test_first_token_is_the_mean_that_is_computed_by_hand(base: BaseModel) -> None:
    model = build(base, "mean")
    hidden = AutoModel.from_pretrained(base.folder).eval()(input_ids=INPUT_IDS, attention_mask=MASK).last_hidden_state
    weights = MASK[..., None].float()
    mean = (hidden * weights).sum(1) / weights.sum(1)
    expected = torch.nn.functional.layer_norm(SCALE * mean + hidden[:, 0], mean.shape[-1:], eps=1e-12)
    found = model.bert(input_ids=INPUT_IDS, attention_mask=MASK).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_does_not_enter_the_mean(base: BaseModel) -> None:
    model = build(base, "mean")
    alone = model(input_ids=INPUT_IDS[:1, :4], attention_mask=MASK[:1, :4]).logits
    padded = model(input_ids=INPUT_IDS, attention_mask=MASK).logits[:1]
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=0)


def test_first_is_the_class_as_it_is(base: BaseModel) -> None:
    model = build(base, "first")
    assert type(model) is BertForSequenceClassification
    assert list_added_modules(model, base) == []


def test_mean_adds_one_layer_to_the_same_class(base: BaseModel) -> None:
    model = build(base, "mean")
    assert type(model) is BertForSequenceClassification
    assert list_added_modules(model, base) == ["bert.encoder.layer.2"]


@pytest.mark.parametrize(("says_mean", "expected"), [(True, True), (False, False), (None, False)])
def test_auto_follows_what_the_base_says(
    base: BaseModel, tmp_path: Path, says_mean: bool | None, expected: bool
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base.folder, folder)
    if says_mean is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": says_mean}))
    assert wants_mean(BaseModel(str(folder), folder, "local folder"), "auto") is expected


def test_other_families_are_refused_with_the_fix(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertModel(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.pooling: mean needs an encoder of BERT's family.*pooling: first"):
        build(BaseModel("distilbert", tmp_path, "local folder"), "mean")
