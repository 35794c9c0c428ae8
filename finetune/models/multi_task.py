"""One base with several heads, each for one task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import RecipeError
from finetune.models.base import BaseModel, load_config
from finetune.models.classifier import ModelClass, load_saved, load_weights, set_dropout, settle_pooling
from finetune.models.prediction import get_budget
from finetune.recipe.schema import ModelSection

SEVERAL_HEADS = ModelClass("TriadForMultiTask", "", "a model with several heads")


class OneHead(nn.Module):
    """A model with several heads as that of one of its tasks: `logits` are (B, K) of that head.

    Args:
        model: with several heads, perhaps inside of a `PeftModel`.
        task: which head answers.
    """

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def packs_rows(self) -> bool:
        """The model's; see `get_padding`."""
        return bool(getattr(self.model, "packs_rows", True))

    @property
    def tokens_per_batch(self) -> int:
        """The model's; see `get_budget`."""
        return get_budget(self.model)

    @property
    def layer(self) -> str:
        """Name of the head's linear layer."""
        return f"model.classifiers.{self.task}"

    def forward(self, **inputs: torch.Tensor) -> Any:
        """The model's answer for the task."""
        return self.model(**inputs, task=self.task)


def build_several_heads(
    base: BaseModel, heads: Mapping[str, Mapping[str, Any]], section: ModelSection, *, seed: int
) -> nn.Module:
    """Load the base with a new head for each task.

    Args:
        base: where the weights lie.
        heads: task -> what `config.heads` of a Triad says of its head.
        section: the recipe's `model`.
        seed: seeds the new heads' weights.

    Returns:
        A model in float32 whose forward returns `logits`: task -> (B, K), or vectors of length 1 (B, D).
    """
    torch.manual_seed(seed)
    return load_weights(base.folder, _build_config(base, heads, section), SEVERAL_HEADS)


def build_several_heads_shape(
    base: BaseModel, heads: Mapping[str, Mapping[str, Any]], section: ModelSection
) -> nn.Module:
    """The model of `build_several_heads` on the meta device: shapes without weights, for `finetune check`.

    Raises:
        RecipeError: a task whose name no head can have.
    """
    from finetune.models.triad import TriadForMultiTask

    config = _build_config(base, heads, section)
    try:
        with torch.device("meta"):
            model: nn.Module = TriadForMultiTask(config)
    except ValueError as error:
        raise RecipeError(f"tasks: must have names that heads can have; {error}") from error
    return model


def load_several_heads(folder: Path, base: BaseModel | None) -> nn.Module:
    """A model that was saved whole; with `base`, that base in the shape that the folder's adapter needs."""
    return load_saved(folder, base, SEVERAL_HEADS)


def _build_config(base: BaseModel, heads: Mapping[str, Mapping[str, Any]], section: ModelSection) -> Any:
    from finetune.models.triad.conversion import convert_config

    config: Any = convert_config(load_config(base))
    config.heads = {name: dict(head) for name, head in heads.items()}
    settle_pooling(config, base, section.pooling)
    set_dropout(config, section.dropout)
    return config
