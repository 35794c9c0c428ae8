"""Hugging Face's own sequence-classification class on a base model (`architecture: native`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from finetune.errors import ModelError
from finetune.models.base import BaseModel, load_config
from finetune.models.pooling import add_pooling_layer, set_pooling_weights, wants_mean
from finetune.recipe.schema import ModelSection


def build_classifier_config(base: BaseModel, labels: Sequence[str], section: ModelSection) -> Any:
    """The base's configuration with the recipe's classes, dropout and pooling."""
    config = load_config(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="single_label_classification",
    )
    # Families name their rates differently (hidden_dropout_prob, attention_dropout, seq_classif_dropout ...).
    for key, value in config.to_dict().items():
        if "dropout" in key and isinstance(value, float):
            setattr(config, key, section.dropout)
    if wants_mean(base, section.pooling):
        add_pooling_layer(config)
    return config


def build_classifier(base: BaseModel, labels: Sequence[str], section: ModelSection, *, seed: int) -> nn.Module:
    """Load the base with a new head of len(labels) classes.

    Args:
        base: where the weights lie.
        labels: class names in the order of the logits.
        section: the recipe's `model`.
        seed: seeds the new head's weights.

    Returns:
        A model in float32 whose forward takes `input_ids`, `attention_mask` (B, T) and returns `logits` (B, K).
    """
    torch.manual_seed(seed)
    model = load_classifier(base.folder, build_classifier_config(base, labels, section))
    if wants_mean(base, section.pooling):
        set_pooling_weights(model)
    return model


def load_classifier(folder: Path, config: Any) -> nn.Module:
    """Hugging Face's class with the weights of a folder; what the folder lacks starts at random.

    Raises:
        ModelError: no sequence classifier can be made of it.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the table of "newly initialized" weights: a new head is what we ask for
    logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            attn_implementation=choose_attention(),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
        return model
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: must load as a sequence classifier; {error}") from error
    finally:
        logging.set_verbosity(level)


def build_classifier_shape(base: BaseModel, labels: Sequence[str], section: ModelSection) -> nn.Module:
    """The model of `build_classifier` on the meta device: shapes without weights, for `finetune check`."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = AutoModelForSequenceClassification.from_config(
            build_classifier_config(base, labels, section)
        )
        return model


def choose_attention() -> str:
    """Plain matrix products on a CPU, SDPA elsewhere.

    For rows of some ten tokens the backward of SDPA's CPU kernel costs more than the products that it saves;
    benchmarks/train_speed.py measures both.
    """
    return "sdpa" if torch.cuda.is_available() or torch.backends.mps.is_available() else "eager"


def list_head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that make up the head: always trained whole, and saved with every adapter.

    That is all beside the base, and the pooler between base and classifier, which sentence encoders such as MiniLM
    never trained.
    """
    prefix = str(model.base_model_prefix)
    pooler = [f"{prefix}.pooler"] if getattr(getattr(model, prefix), "pooler", None) is not None else []
    return list_new_modules(model) + pooler


def list_new_modules(model: nn.Module) -> list[str]:
    """Names of the modules that start at random: all with weights beside the base. They learn at the head's rate."""
    weighted = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    return [name for name in weighted if name != str(model.base_model_prefix)]


def list_added_modules(model: nn.Module, base: BaseModel) -> list[str]:
    """Names of the encoder layers that the base itself lacks: the one that pools.

    They are constant but for full tuning, and saved with every adapter, because the base's files do not have them.
    """
    own = getattr(load_config(base), "num_hidden_layers", 0)
    prefix = str(model.base_model_prefix)
    total = int(getattr(model.config, "num_hidden_layers", own))
    return [f"{prefix}.encoder.layer.{i}" for i in range(own, total)]
