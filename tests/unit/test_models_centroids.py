"""The head starts where scikit-learn's centroids would put it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestCentroid
from transformers import RobertaConfig, RobertaForSequenceClassification

from finetune.data.batches import Examples
from finetune.models.base import BaseModel
from finetune.models.centroids import start_at_centroids
from finetune.models.classifier import build_classifier
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import ModelSection

PACKED = None  # no padding token: rows lie end to end


@pytest.fixture
def model(tiny_base: Path) -> torch.nn.Module:
    base = BaseModel(str(tiny_base), tiny_base, "local folder")
    return build_classifier(base, ["a", "b", "c"], ModelSection(base=str(tiny_base), pooling="mean"), seed=0)


@pytest.fixture
def examples() -> Examples:
    generator = np.random.default_rng(5)
    encoded = [[2, *generator.integers(5, 300, size=generator.integers(2, 9)), 3] for _ in range(60)]
    return Examples.build(encoded, [i % 3 for i in range(60)])


def test_first_guess_is_the_nearest_centroid_by_cosine(model: torch.nn.Module, examples: Examples) -> None:
    head = model.classifier
    model.classifier = torch.nn.Identity()
    features = compute_logits(model, examples, PACKED)
    model.classifier = head
    centered = features - features.mean(0)
    centroids = NearestCentroid().fit(centered, examples.labels).centroids_
    expected = cosine_similarity(centered, centroids)  # (N, K)

    assert start_at_centroids(model, examples, PACKED)
    logits = compute_logits(model, examples, PACKED)
    np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))
    ratios = logits / (expected * np.linalg.norm(centered, axis=1, keepdims=True))
    np.testing.assert_allclose(ratios, ratios[0, 0], rtol=1e-3)  # the same scale for every row and class


def test_only_the_last_layer_changes_and_the_mode_stays(model: torch.nn.Module, examples: Examples) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_at_centroids(model, examples, PACKED)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert model.training


def test_a_class_without_rows_starts_at_zero(model: torch.nn.Module, examples: Examples) -> None:
    two = Examples(examples.input_ids, examples.starts, np.minimum(examples.labels, 1))
    start_at_centroids(model, two, PACKED)
    assert torch.equal(model.classifier.weight[2], torch.zeros_like(model.classifier.weight[2]))
    assert torch.isfinite(model.classifier.weight).all()


def test_a_head_of_several_layers_is_left_alone(examples: Examples) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=300, num_labels=3, **sizes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert start_at_centroids(model, examples, 0) is False
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
