"""Sentence encoders give the vectors that the base was made to give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from finetune.models.base import resolve_base
from finetune.models.encoder import build_encoder
from finetune.recipe.schema import ModelSection


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_vectors_are_those_of_the_bases_own_class(tiny_base: Path, pooling: str) -> None:
    """The first token as it is, without BERT's tanh pooler; or the mean over tokens; of length 1."""
    ids = torch.tensor([[2, 7, 9, 11, 3]])
    with torch.inference_mode():
        found = build_encoder(resolve_base(str(tiny_base)), ModelSection(pooling=pooling)).eval()(input_ids=ids)
        states = AutoModel.from_pretrained(tiny_base).eval()(input_ids=ids).last_hidden_state
    expected = states[:, 0] if pooling == "first" else states.mean(dim=1)
    torch.testing.assert_close(found.embeddings, torch.nn.functional.normalize(expected), atol=1e-5, rtol=0)
