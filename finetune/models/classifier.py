"""Hugging Face's own sequence-classification class on a base model (`architecture: native`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finetune.errors import ModelError
from finetune.models.base import BaseModel, load_config


def build_classifier_config(base: BaseModel, labels: Sequence[str], dropout: float) -> Any:
    """The base's configuration with the recipe's classes and dropout."""
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
            setattr(config, key, dropout)
    return config


def build_classifier(base: BaseModel, labels: Sequence[str], *, dropout: float, seed: int) -> nn.Module:
    """Load the base with a new head of len(labels) classes.

    Args:
        base: where the weights lie.
        labels: class names in the order of the logits.
        dropout: rate for every dropout inside the base.
        seed: seeds the new head's weights.

    Returns:
        A model in float32 whose forward takes `input_ids`, `attention_mask` (B, T) and returns `logits` (B, K).
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    torch.manual_seed(seed)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the table of "newly initialized" weights: a new head is what we ask for
    logging.disable_progress_bar()
    try:
        return AutoModelForSequenceClassification.from_pretrained(  # type: ignore[no-any-return]  # untyped upstream
            base.folder,
            config=build_classifier_config(base, labels, dropout),
            attn_implementation=choose_attention(),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (ValueError, OSError) as error:
        raise ModelError(f"{base.reference}: must load as a sequence classifier; {error}") from error
    finally:
        logging.set_verbosity(level)


def count_classifier_parameters(base: BaseModel, labels: Sequence[str]) -> nn.Module:
    """The same model on the meta device: shapes without weights, for `finetune check`."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForSequenceClassification.from_config(build_classifier_config(base, labels, 0.0))  # type: ignore[no-any-return]  # untyped upstream


def choose_attention() -> str:
    """Plain matrix products on a CPU, SDPA elsewhere.

    For rows of some ten tokens the backward of SDPA's CPU kernel costs more than the products that it saves;
    benchmarks/train_speed.py measures both.
    """
    return "sdpa" if torch.cuda.is_available() or torch.backends.mps.is_available() else "eager"


def list_head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that make up the head: trained from scratch, and saved with every adapter.

    That is all beside the base, and the pooler between base and classifier, which sentence encoders such as MiniLM
    never trained.
    """
    prefix = str(model.base_model_prefix)
    weighted = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    names = [name for name in weighted if name != prefix]
    base = getattr(model, prefix)
    if getattr(base, "pooler", None) is not None:
        names.append(f"{prefix}.pooler")
    return names
