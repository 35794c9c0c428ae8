from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from finetune.data.batches import Examples
from finetune.models import embedding
from finetune.models.base import BaseModel
from finetune.models.embedding import compute_embeddings


def build_examples(rows: int, seed: int) -> Examples:
    generator = np.random.default_rng(seed)
    encoded = [generator.integers(5, 100, size=generator.integers(2, 20)).tolist() for _ in range(rows)]
    return Examples.build(encoded, [0] * rows)


@pytest.mark.parametrize("tokens_per_batch", [30, 4096])
def test_mean_of_the_last_layer_row_by_row(tiny_base: Path, monkeypatch, tokens_per_batch):
    """Batches, padding and order leave no trace; each part comes back in its own order."""
    monkeypatch.setattr(embedding, "TOKENS_PER_BATCH", tokens_per_batch)
    parts = [build_examples(12, seed=0), build_examples(5, seed=1)]
    found = compute_embeddings(BaseModel("tiny", tiny_base, "local folder"), parts, 0)
    model = AutoModel.from_pretrained(tiny_base).eval()
    for examples, features in zip(parts, found, strict=True):
        assert (features.shape, features.dtype) == ((len(examples), 32), np.float32)
        for i, row in enumerate(np.split(examples.input_ids, examples.starts[1:-1])):
            with torch.no_grad():
                mean = model(torch.from_numpy(row[None]).long()).last_hidden_state[0].mean(0)
            np.testing.assert_allclose(features[i], mean / mean.norm(), atol=1e-6)


def test_a_split_without_rows_has_no_features(tiny_base: Path):
    [features] = compute_embeddings(BaseModel("tiny", tiny_base, "local folder"), [Examples.build([], [])], 0)
    assert features.shape == (0, 32)
