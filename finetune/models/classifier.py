"""Sequence classifiers on a base model: the project's own Triad, or Hugging Face's class for the base's family."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from finetune.errors import ModelError, RecipeError
from finetune.models.base import BaseModel, load_config
from finetune.models.quiet import quiet_transformers
from finetune.recipe.schema import ModelSection


class ModelClass(NamedTuple):
    """The two classes of one kind of model.

    Args:
        triad: name in `finetune.models.triad`.
        native: name of transformers' Auto class, for the base's own.
        words: how messages call it.
    """

    triad: str
    native: str
    words: str


CLASSIFIER = ModelClass("TriadForSequenceClassification", "AutoModelForSequenceClassification", "a sequence classifier")


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
        # One number a row is what transformers calls regression, whatever the loss.
        problem_type="single_label_classification" if len(labels) > 1 else "regression",
    )
    if section.architecture == "triad":
        from finetune.models.triad.conversion import convert_config

        config = convert_config(config)
        settle_pooling(config, base, section.pooling)
        config.normalize_pooled = section.normalize_features
    elif section.pooling == "mean":
        raise RecipeError(
            f"model.pooling: mean needs model.architecture: triad, got native: {config.model_type}'s own class reads "
            "one token. Set model.pooling: first, or model.architecture: triad."
        )
    set_dropout(config, section.dropout)
    return config


def settle_pooling(config: Any, base: BaseModel, pooling: str) -> None:
    """Put the recipe's `model.pooling` into a Triad's configuration, made from the base's.

    `auto` leaves what it has, such as the mean in a Triad that was trained further, unless `wants_mean`.
    """
    if wants_mean(base, pooling):
        config.pooling = "mean"
    elif pooling == "first" and config.pooling == "mean":
        config.pooling = "last" if config.shape == "decoder" else "cls"  # a decoder's first token sees no other


def wants_mean(base: BaseModel, pooling: str) -> bool:
    """Settle `auto`: the mean where the base says so itself, as sentence-transformers' models do."""
    if pooling != "auto":
        return pooling == "mean"
    path = base.folder / "1_Pooling" / "config.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens") is True


def set_dropout(config: Any, rate: float) -> None:
    """Families name their rates differently (hidden_dropout_prob, attention_dropout, attn_pdrop ...). A recommender's
    `item_dropout` is another thing."""
    for key, value in config.to_dict().items():
        if ("dropout" in key or key.endswith("pdrop")) and key != "item_dropout" and isinstance(value, float):
            setattr(config, key, rate)


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
    return load_weights(base.folder, build_classifier_config(base, labels, section), CLASSIFIER)


def load_weights(folder: Path, config: Any, classes: ModelClass) -> nn.Module:
    """A model in float32 with the weights of a folder; what the folder lacks starts at random.

    Args:
        folder: safetensors.
        config: Triad's or the folder's own: it decides between the two classes.
        classes: what to make of it.

    Raises:
        ModelError: it cannot be made of it.
    """
    import transformers

    if config.model_type == "triad":
        from finetune.models import triad
        from finetune.models.triad.conversion import load_from_checkpoint

        config._attn_implementation = choose_attention()
        loaded: nn.Module = load_from_checkpoint(getattr(triad, classes.triad), folder, config)
        return loaded
    try:
        with quiet_transformers():
            model: nn.Module = getattr(transformers, classes.native).from_pretrained(
                folder,
                config=config,
                attn_implementation=choose_native_attention(),
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
            )
        return model
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: must load as {classes.words}; {error}") from error


def has_head(base: BaseModel, labels: Sequence[str]) -> bool:
    """Whether a base is itself a Triad that gives these classes, in this order."""
    config = load_config(base)
    return CLASSIFIER.triad in (config.architectures or []) and list(config.id2label.values()) == list(labels)


def load_saved_classifier(folder: Path, base: BaseModel | None) -> nn.Module:
    """A classifier that was saved; see `load_saved`."""
    return load_saved(folder, base, CLASSIFIER)


def load_saved(folder: Path, base: BaseModel | None, classes: ModelClass) -> nn.Module:
    """A model that was saved whole; with `base`, that base in the shape that the folder's adapter needs."""
    config = load_config(BaseModel(str(folder), folder, "saved model"))
    return load_weights(base.folder if base else folder, config, classes)


def build_classifier_shape(base: BaseModel, labels: Sequence[str], section: ModelSection) -> nn.Module:
    """The model of `build_classifier` on the meta device: shapes without weights, for `finetune check`."""
    return build_shape(build_classifier_config(base, labels, section), CLASSIFIER)


def load_saved_classifier_shape(folder: Path) -> nn.Module:
    """The model of `load_saved_classifier` on the meta device."""
    return build_shape(load_config(BaseModel(str(folder), folder, "saved model")), CLASSIFIER)


def build_shape(config: Any, classes: ModelClass) -> nn.Module:
    """A model on the meta device, which has no weights."""
    import transformers

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = getattr(transformers, classes.native).from_config(config)
        return model


def choose_attention() -> str:
    """SDPA on an accelerator. On a CPU plain matrix products, of which Triad's `attend` leaves long rows to SDPA."""
    return "sdpa" if torch.cuda.is_available() or torch.backends.mps.is_available() else "eager"


def choose_native_attention() -> str | None:
    """The same for a family's own class. None leaves it to transformers, which takes SDPA where a class has it:
    DeBERTa's, MPNet's and Longformer's do not."""
    return None if choose_attention() == "sdpa" else "eager"


def get_padding(model: nn.Module, tokenizer: Any) -> int | None:
    """The padding token for a model's batches; None for a Triad of one stack, which takes rows without padding.

    A model with `packs_rows` False gets padding all the same: with it, something stands in front of each row.
    """
    config: Any = model.config
    packs = config.model_type == "triad" and config.shape != "encoder_decoder"
    return None if packs and getattr(model, "packs_rows", True) else int(tokenizer.pad_token_id)


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
