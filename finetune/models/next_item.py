"""Recommenders: a Triad decoder over item numbers, from random weights in the recipe's size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import RecipeError
from finetune.models.classifier import ModelClass, choose_attention, load_saved
from finetune.recipe.schema import ModelSection

NEXT_ITEM = ModelClass("TriadForNextItem", "", "a recommender")


@dataclass(frozen=True)
class ItemChoices:
    """What a recommender knows of an item; TriadConfig's words, without `item_`.

    Args:
        ids: an embedding of its own.
        dropout: share of items that speak by their text alone while training; counts where there are ids and texts.
        bias: a bias of its score.
    """

    ids: bool = True
    dropout: float = 0.0
    bias: bool = False


def build_next_item(
    section: ModelSection,
    num_items: int,
    text_vectors: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    choices: ItemChoices | None = None,
    *,
    seed: int,
) -> nn.Module:
    """Make a recommender from random weights, in float32.

    Args:
        section: the recipe's `model`: sizes from `scratch`, positions from `max_length`, and `dropout`.
        num_items: I.
        text_vectors: of each item's text, (I, S); None for items by their ids alone.
        known: the items that training sees, (I,) bool; None for all.
        choices: default `ItemChoices()`.
        seed: seeds the weights.

    Raises:
        RecipeError: a size that cannot work.
        ValueError: text vectors or `known` of another number of items.
    """
    from finetune.models.triad import TriadForNextItem

    text_size = 0 if text_vectors is None else text_vectors.shape[-1]
    config = _build_config(section, num_items, text_size, choices or ItemChoices())
    config._attn_implementation = choose_attention()
    torch.manual_seed(seed)
    model = TriadForNextItem(config)
    if text_vectors is not None:
        model.set_text_vectors(text_vectors)
    if known is not None:
        model.set_known(known)
    return model


def build_next_item_shape(
    section: ModelSection, num_items: int, text_size: int = 0, choices: ItemChoices | None = None
) -> nn.Module:
    """The model of `build_next_item` on the meta device: shapes without weights, for `finetune check`."""
    from finetune.models.triad import TriadForNextItem

    with torch.device("meta"):
        model: nn.Module = TriadForNextItem(_build_config(section, num_items, text_size, choices or ItemChoices()))
    return model


def load_next_item(folder: Path) -> nn.Module:
    """A recommender that was saved, in float32.

    Raises:
        ModelError: it cannot be made of the folder.
    """
    return load_saved(folder, None, NEXT_ITEM)


def _build_config(section: ModelSection, num_items: int, text_size: int, choices: ItemChoices) -> Any:
    from finetune.models.triad import TriadConfig

    size = section.scratch
    try:
        return TriadConfig(
            shape="decoder",
            num_items=num_items,
            item_ids=choices.ids,
            item_text_size=text_size,
            item_dropout=choices.dropout if choices.ids and text_size else 0.0,
            item_bias=choices.bias,
            intermediate_size=size.intermediate_size or 4 * size.hidden_size,
            max_position_embeddings=section.max_length,
            scale_embeddings=True,  # as SASRec does; vectors as small as new scores need would drown in positions
            dropout=section.dropout,
            pooling="last",
            **size.model_dump(
                include={
                    "hidden_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "activation",
                    "norm_position",
                    "norm",
                    "position",
                    "tie_word_embeddings",
                }
            ),
        )
    except ValueError as error:
        raise RecipeError(f"model.scratch: {str(error).removeprefix('TriadConfig: ')}") from error
