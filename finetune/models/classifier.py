"""Sequence classifiers on a base model: the project's own Triad, or Hugging Face's class for the base's family."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from finetune.errors import ModelError, RecipeError
from finetune.models.base import BaseModel, load_config
from finetune.recipe.schema import ModelSection


def build_classifier_config(base: BaseModel, labels: Sequence[str], section: ModelSection) -> Any:
    """The base's configuration, as Triad's where the recipe says so, with the recipe's classes, dropout and pooling.

    Raises:
        ModelError: a family that Triad has no form of.
        RecipeError: a pooling that the base's own class does not have.
    """
    config = load_config(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="single_label_classification",
    )
    if section.architecture == "triad":
        from finetune.models.triad.conversion import convert_config

        config = convert_config(config)
        if wants_mean(base, section.pooling):
            config.pooling = "mean"
    elif section.pooling == "mean":
        raise RecipeError(
            f"model.pooling: mean needs model.architecture: triad, got native: {config.model_type}'s own class reads "
            "one token. Set model.pooling: first, or model.architecture: triad."
        )
    # Families name their rates differently (hidden_dropout_prob, attention_dropout, seq_classif_dropout ...).
    for key, value in config.to_dict().items():
        if "dropout" in key and isinstance(value, float):
            setattr(config, key, section.dropout)
    return config


def wants_mean(base: BaseModel, pooling: str) -> bool:
    """Settle `auto`: the mean where the base says so itself, as sentence-transformers' models do."""
    if pooling != "auto":
        return pooling == "mean"
    path = base.folder / "1_Pooling" / "config.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens") is True


def build_classifier(base: BaseModel, labels: Sequence[str], section: ModelSection, *, seed: int) -> nn.Module:
    """Load the base with a new head of len(labels) classes.

    Args:
        base: where the weights lie.
        labels: class names in the order of the logits.
        section: the recipe's `model`.
        seed: seeds the new head's weights.

    Returns:
        A model in float32 whose forward returns `logits` (B, K).
    """
    torch.manual_seed(seed)
    return load_classifier(base.folder, build_classifier_config(base, labels, section))


def load_classifier(folder: Path, config: Any) -> nn.Module:
    """A classifier of the configuration's class with the weights of a folder; what the folder lacks starts at random.

    Raises:
        ModelError: no sequence classifier can be made of it.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    if config.model_type == "triad":
        from finetune.models.triad import TriadForSequenceClassification
        from finetune.models.triad.conversion import load_from_checkpoint

        config._attn_implementation = choose_attention()
        triad: nn.Module = load_from_checkpoint(TriadForSequenceClassification, folder, config)
        return triad
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


def load_saved_classifier(folder: Path, base: BaseModel | None) -> nn.Module:
    """A classifier that was saved whole; with `base`, that base in the shape that the folder's adapter needs."""
    config = load_config(BaseModel(str(folder), folder, "saved model"))
    return load_classifier(base.folder if base else folder, config)


def build_classifier_shape(base: BaseModel, labels: Sequence[str], section: ModelSection) -> nn.Module:
    """The model of `build_classifier` on the meta device: shapes without weights, for `finetune check`."""
    from transformers import AutoModelForSequenceClassification

    config = build_classifier_config(base, labels, section)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = AutoModelForSequenceClassification.from_config(config)
        return model


def choose_attention() -> str:
    """Plain matrix products on a CPU, SDPA elsewhere.

    One layer of MiniLM's width, one thread, float32 (benchmarks/attention_cost.py): below 256 tokens a row the two are
    within noise of each other; from 512 on SDPA is 1.3 to 1.8 times as fast to train.
    """
    return "sdpa" if torch.cuda.is_available() or torch.backends.mps.is_available() else "eager"


def get_padding(model: nn.Module, tokenizer: Any) -> int | None:
    """The padding token for a model's batches; None where it takes rows packed without padding."""
    return None if model.config.model_type == "triad" else int(tokenizer.pad_token_id)  # type: ignore[union-attr]  # a transformers config


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
