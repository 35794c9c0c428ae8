"""Language models: from random weights in the recipe's size, or from a base, as a Triad or as the base's own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import ModelError, RecipeError
from finetune.models.base import SCRATCH, BaseModel, load_config
from finetune.models.classifier import (
    ModelClass,
    build_shape,
    choose_attention,
    load_saved,
    load_weights,
    set_dropout,
    settle_pooling,
)
from finetune.recipe.schema import ModelSection

# Task type -> shape of its model, and the classes.
LANGUAGE_SHAPES = {
    "causal_lm": ("decoder", ModelClass("TriadForCausalLM", "AutoModelForCausalLM", "a causal language model")),
    "masked_lm": ("encoder", ModelClass("TriadForMaskedLM", "AutoModelForMaskedLM", "a masked language model")),
    "completion": ("decoder", ModelClass("TriadForCausalLM", "AutoModelForCausalLM", "a causal language model")),
    "seq2seq": (
        "encoder_decoder",
        ModelClass("TriadForSeq2SeqLM", "AutoModelForSeq2SeqLM", "a sequence-to-sequence model"),
    ),
}
# What a tokenizer must have: the token that hides others, or the one at which a text ends.
NEEDED_TOKENS = {"causal_lm": "eos_token", "masked_lm": "mask_token", "completion": "eos_token", "seq2seq": "eos_token"}


def build_language_config(kind: str, base: BaseModel, section: ModelSection, tokenizer: Any) -> Any:
    """The configuration of a language model.

    Args:
        kind: key of `LANGUAGE_SHAPES`.
        base: `SCRATCH` for the size that the recipe says.
        section: the recipe's `model`.
        tokenizer: gives a model from scratch its vocabulary; must be the base's otherwise.

    Raises:
        RecipeError: a size that cannot work, a base of another shape.
        ModelError: a family that Triad has no form of; a tokenizer that does not fit the base or the task.
    """
    if base.reference == SCRATCH.reference:
        return _build_scratch_config(kind, section, tokenizer)
    config = load_config(base)
    _check_shape(kind, base, config)
    if section.architecture == "triad":
        from finetune.models.triad.conversion import convert_config

        config = convert_config(config)
    _check_tokenizer(kind, base, config, tokenizer)
    if config.model_type == "triad" and kind == "masked_lm":
        # Its head reads no pooled state, but a classifier made of it will.
        settle_pooling(config, base, section.pooling)
    set_dropout(config, section.dropout)
    return config


def build_language_model(kind: str, base: BaseModel, section: ModelSection, tokenizer: Any, *, seed: int) -> nn.Module:
    """Load the base, or make a model from random weights.

    Args:
        kind, base, section, tokenizer: as in `build_language_config`, with what it raises.
        seed: seeds all weights that the base lacks.

    Returns:
        A model in float32 whose forward returns `logits` (B, T, V).
    """
    config = build_language_config(kind, base, section, tokenizer)
    torch.manual_seed(seed)
    if base.reference != SCRATCH.reference:
        return load_weights(base.folder, config, LANGUAGE_SHAPES[kind][1])
    from finetune.models import triad

    config._attn_implementation = choose_attention()
    model: nn.Module = getattr(triad, LANGUAGE_SHAPES[kind][1].triad)(config)
    return model


def load_saved_language_model(kind: str, folder: Path, base: BaseModel | None) -> nn.Module:
    """A language model that was saved whole; with `base`, that base in the shape that the folder's adapter needs."""
    return load_saved(folder, base, LANGUAGE_SHAPES[kind][1])


def build_language_model_shape(kind: str, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
    """The model of `build_language_model` on the meta device: shapes without weights, for `finetune check`."""
    return build_shape(build_language_config(kind, base, section, tokenizer), LANGUAGE_SHAPES[kind][1])


def _build_scratch_config(kind: str, section: ModelSection, tokenizer: Any) -> Any:
    from finetune.models.triad import TriadConfig

    if section.architecture != "triad":
        raise RecipeError(
            f"model.architecture: must be triad where model.base is scratch, got {section.architecture}. "
            "Leave it out, or name a base."
        )
    shape = LANGUAGE_SHAPES[kind][0]
    size = section.scratch
    choices: dict[str, Any] = size.model_dump(exclude={"tokenizer", "vocab_size", "intermediate_size"})
    if size.position == "sinusoidal":
        # Sines are as large as 1. As in the article tokens are too: sqrt(D) times weights of this size.
        choices |= {"scale_embeddings": True, "initializer_range": size.hidden_size**-0.5}
    else:
        choices["scale_embeddings"] = False
    try:
        return TriadConfig(
            shape=shape,
            vocab_size=len(tokenizer),
            intermediate_size=size.intermediate_size or 4 * size.hidden_size,
            max_position_embeddings=section.max_length,
            dropout=section.dropout,
            pooling="last" if shape == "decoder" else "mean",
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.bos_token_id if shape == "encoder_decoder" else None,
            **choices,
        )
    except ValueError as error:
        raise RecipeError(f"model.scratch: {str(error).removeprefix('TriadConfig: ')}") from error


def _check_shape(kind: str, base: BaseModel, config: Any) -> None:
    """An encoder sees the future: as a causal language model it would only learn to copy, at no loss at all."""
    wanted, found = LANGUAGE_SHAPES[kind][0], _find_shape(config)
    if found != wanted:
        raise RecipeError(
            f"model.base: {kind} needs {_name(wanted)}, got {base.reference}, which is {_name(found)} "
            f"({config.model_type}). Name another base, or scratch."
        )


def _find_shape(config: Any) -> str:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if config.model_type == "triad":
        return str(config.shape)
    if config.is_encoder_decoder:
        return "encoder_decoder"
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return "encoder" if is_encoder else "decoder"


def _name(shape: str) -> str:
    return f"{'a' if shape == 'decoder' else 'an'} {shape.replace('_', '-')}"


def _check_tokenizer(kind: str, base: BaseModel, config: Any, tokenizer: Any) -> None:
    room = getattr(config, "vocab_size", len(tokenizer))  # a configuration of several models has none of its own
    if len(tokenizer) > room:
        raise ModelError(
            f"{base.reference}: tokenizer and weights must belong together, got {len(tokenizer)} tokens for a "
            f"vocabulary of {room}. Get both from where the weights came from."
        )
    if getattr(tokenizer, NEEDED_TOKENS[kind]) is None:
        raise ModelError(
            f"{base.reference}: {kind} needs a tokenizer with a {NEEDED_TOKENS[kind]}, got none. Name another base."
        )
