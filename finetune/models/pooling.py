"""Mean pooling for Hugging Face classes that read the first token only.

`BertForSequenceClassification` and its relatives classify the last layer's first token. Sentence encoders such as
MiniLM were trained on the mean over all tokens, and their first token knows less: on BANKING77, logistic regression
scores .901 on the frozen first token and .929 on the frozen mean (validation). One more encoder layer brings the mean
to the first token without leaving the class, so that a saved model still loads with plain transformers:

    queries = keys = 0          every token attends evenly to all real tokens
    values, output = identity   what it gets is the mean
    feed-forward output = 0     and nothing else happens

The first token leaves that layer as LayerNorm(SCALE * mean + first token).
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from finetune.errors import RecipeError
from finetune.models.base import BaseModel

# How much more the mean weighs than the first token's own state.
SCALE = 8.0
# The pooler's tanh must start where it is nearly linear: LayerNorm gives values of about 1.
POOLER_GAIN = 0.5


def wants_mean(base: BaseModel, pooling: str) -> bool:
    """Settle `auto`: the mean where the base says so itself, as sentence-transformers' models do."""
    if pooling != "auto":
        return pooling == "mean"
    path = base.folder / "1_Pooling" / "config.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens") is True


def add_pooling_layer(config: Any) -> None:
    """Ask for one more encoder layer.

    Raises:
        RecipeError: an architecture without such layers.
    """
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "intermediate_size"):
        raise RecipeError(
            f"model.pooling: mean needs an encoder of BERT's family, got {config.model_type}. Set model.pooling: first."
        )
    config.num_hidden_layers += 1


@torch.no_grad()
def set_pooling_weights(model: nn.Module) -> None:
    """Give the last encoder layer, fresh from `add_pooling_layer`, the weights that average.

    Raises:
        RecipeError: layers that are not built like BERT's.
    """
    base: Any = getattr(model, str(model.base_model_prefix))
    try:
        layer = base.encoder.layer[-1]
        attention, output, norm = layer.attention.self, layer.attention.output.dense, layer.attention.output.LayerNorm
        query, key, value = attention.query, attention.key, attention.value
        last = layer.output
    except AttributeError:
        raise RecipeError(
            f"model.pooling: mean needs an encoder of BERT's family, got {type(model).__name__}. "
            "Set model.pooling: first."
        ) from None
    for linear in (query, key, value, output, last.dense):
        linear.weight.zero_()
        linear.bias.zero_()
    value.weight.fill_diagonal_(1.0)
    output.weight.fill_diagonal_(SCALE)
    for layer_norm in (norm, last.LayerNorm):
        layer_norm.weight.fill_(1.0)
        layer_norm.bias.zero_()
    if getattr(base, "pooler", None) is not None:
        base.pooler.dense.weight.zero_().fill_diagonal_(POOLER_GAIN)
        base.pooler.dense.bias.zero_()
