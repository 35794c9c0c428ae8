"""The fitted head is scikit-learn's logistic regression, in a linear layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from finetune.adapters.attach import attach_adapter
from finetune.errors import RecipeError
from finetune.models.base import BaseModel
from finetune.models.classifier import build_classifier, list_head_modules
from finetune.models.linear_head import C, find_head, fit_head, without_head
from finetune.recipe.schema import AdapterSection, ModelSection


def draw(classes: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    labels = np.arange(60) % classes
    features = generator.normal(size=(classes, 6))[labels] + generator.normal(size=(60, 6))
    return (scale * features).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    features, labels = draw(classes)
    head = nn.Linear(6, classes)
    fit_head(head, features, labels)
    scores = head(torch.from_numpy(features)).softmax(1).detach().numpy()
    units = features / np.linalg.norm(features, axis=1).mean()
    expected = LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit(units, labels).predict_proba(units)
    np.testing.assert_allclose(scores, expected, atol=5e-3)


def test_the_unit_of_the_features_does_not_count() -> None:
    one, thousand = nn.Linear(6, 3), nn.Linear(6, 3)
    features, labels = draw(3)
    fit_head(one, features, labels)
    fit_head(thousand, 1000 * features, labels)
    torch.testing.assert_close(one.weight, 1000 * thousand.weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.bias, thousand.bias, rtol=1e-3, atol=1e-3)


def test_a_layer_without_bias() -> None:
    features, labels = draw(3)
    head = nn.Linear(6, 3, bias=False)
    fit_head(head, features, labels)
    units = features / np.linalg.norm(features, axis=1).mean()
    expected = LogisticRegression(C=C, max_iter=5000, tol=1e-8, fit_intercept=False).fit(units, labels)
    logits = head(torch.from_numpy(features)).detach().numpy()
    np.testing.assert_allclose(logits - logits.mean(1, keepdims=True), expected.decision_function(units), atol=0.05)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_head_is_found_inside_an_adapter_and_taken_away_for_a_while(tiny_base: Path, method: str) -> None:
    section = ModelSection(base=str(tiny_base), pooling="mean")
    plain = build_classifier(BaseModel(str(tiny_base), tiny_base, "local folder"), ["a", "b", "c"], section, seed=0)
    model = attach_adapter(
        plain, AdapterSection.model_validate({"method": method}), list_head_modules(plain), str(tiny_base)
    )
    ids = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "position_ids": torch.tensor([[0, 1, 2, 3]])}
    head = find_head(model)
    logits = model(**ids).logits
    with without_head(model):
        features = model(**ids).logits
    assert features.shape == (1, 32)
    torch.testing.assert_close(head(features), logits)
    torch.testing.assert_close(model(**ids).logits, logits)


def test_a_head_of_several_layers_is_refused() -> None:
    config = RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30
    )
    with pytest.raises(RecipeError) as caught:
        find_head(RobertaForSequenceClassification(config))
    assert str(caught.value) == (
        "train.few_shot: contrastive must have a head of one linear layer, got RobertaClassificationHead. "
        "Set model.architecture: triad."
    )


def test_a_head_of_another_name_is_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        find_head(nn.Sequential(nn.Linear(2, 2)))
    assert str(caught.value) == (
        "train.few_shot: contrastive must have a head called `classifier`, got a model without one. "
        "Set model.architecture: triad."
    )
