"""The merged model as Hugging Face's own class saves it: it loads with transformers alone, and no code comes along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from finetune.errors import ModelError, UsageError
from finetune.models.quiet import quiet_transformers

PREFERRED = ("bert", "roberta", "distilbert", "gpt2", "llama")
"""Families to try for a Triad that does not say which it came from."""


def write_transformers(model: nn.Module, folder: Path) -> None:
    """Write weights (safetensors) and configuration.

    Args:
        model: merged: a Triad, or already a class of transformers.
        folder: of the export.

    Raises:
        UsageError: an adapter that cannot be merged; a model that no class of transformers expresses.
    """
    if hasattr(model, "peft_config"):
        method = str(next(iter(model.peft_config.values())).peft_type).rpartition(".")[2]  # type: ignore[operator]
        raise UsageError(
            f"transformers: the adapter must be merged into plain layers, got {method}, which cannot be. Take onnx or "
            "torch-export, or train with adapter: {method: lora}."
        )
    config: Any = model.config
    plain: Any = model if config.model_type != "triad" else convert(model)
    with quiet_transformers():
        plain.save_pretrained(folder)


def convert(model: Any) -> nn.Module:
    """A Triad as the class of the family that its base came from; of one without, the first that can express it.

    Raises:
        UsageError: there is none; the message says what it lacks.
    """
    from finetune.models.triad.conversion import build_key_mapping, convert_from_triad
    from finetune.models.triad.families import FAMILIES

    renamed = [name for name, family in FAMILIES.items() if family.split is None]
    of_base = [name for name in renamed if build_key_mapping(name) == model.config.base_key_mapping]
    reasons = []
    for name in of_base or PREFERRED:
        try:
            plain: nn.Module = convert_from_triad(model, name)
            return plain
        except ModelError as error:
            reasons.append(str(error))
    reason = min(reasons, key=len).partition(". ")[0]
    fix = "Train with model: {pooling: first}, or take onnx." if "pooling must be" in reason else "Take onnx."
    raise UsageError(
        f"transformers: a class of transformers must express the model, got one that none does: {reason}. {fix}"
    )
