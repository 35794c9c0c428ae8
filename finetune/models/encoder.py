"""Sentence encoders on a base model: one vector of length 1 for each text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.models.base import BaseModel, load_config
from finetune.models.classifier import ModelClass, load_saved, load_weights, set_dropout, settle_pooling
from finetune.recipe.schema import ModelSection

ENCODER = ModelClass("TriadForSentenceEmbedding", "", "a sentence encoder")


def build_encoder(base: BaseModel, section: ModelSection) -> nn.Module:
    """Load the base as a sentence encoder, in float32; no weight of it is new.

    Raises:
        ModelError: a family that Triad has no form of.
    """
    return load_weights(base.folder, _build_config(base, section), ENCODER)


def build_encoder_shape(base: BaseModel, section: ModelSection) -> nn.Module:
    """The model of `build_encoder` on the meta device: shapes without weights, for `finetune check`."""
    from finetune.models.triad import TriadForSentenceEmbedding

    with torch.device("meta"):
        model: nn.Module = TriadForSentenceEmbedding(_build_config(base, section))
    return model


def load_saved_encoder(folder: Path, base: BaseModel | None) -> nn.Module:
    """An encoder that was saved whole; with `base`, that base in the shape that the folder's adapter needs."""
    return load_saved(folder, base, ENCODER)


def read_features(output: Any) -> torch.Tensor:
    """The vectors in what an encoder, or one head of several, answered: (B, D)."""
    features: torch.Tensor = output.logits if hasattr(output, "logits") else output.embeddings
    return features


def _build_config(base: BaseModel, section: ModelSection) -> Any:
    from finetune.models.triad.conversion import convert_config

    config: Any = convert_config(load_config(base))
    settle_pooling(config, base, section.pooling)
    if config.pooling == "pooler":  # made for classifiers; encoders such as bge take the first token as it is
        config.pooling = "cls"
    config.normalize_embeddings = True
    set_dropout(config, section.dropout)
    return config
