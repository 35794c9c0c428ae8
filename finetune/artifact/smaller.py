"""A trained classifier cut down to several sizes: what each of them is before it learns from the whole one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.data.batches import Examples, Indices, collate, plan_prediction
from finetune.errors import UsageError
from finetune.models.prediction import compute_logits, get_budget
from finetune.models.triad.pruning import (
    Importance,
    compute_importance,
    drop_layers,
    prune,
    rank_layers,
    trim_embeddings,
)
from finetune.models.vocabulary import trim_tokenizer
from finetune.tasks import TextClassification
from finetune.tasks.task import Outputs

LAYER_ROWS = 512
"""Train rows that say which layer to drop: each is looked at once for every layer that could go."""
PART_ROWS = 2048
"""Train rows that say which heads and channels to keep."""
LEAST_TOKENS = 8000
"""Tokens that stay at least: few train rows use few words, and new texts have others (docs/decisions/0023)."""
SHARES = (
    *((1, 1), (1, 0.5), (1, 0.25)),
    *((2 / 3, 0.75), (2 / 3, 0.5)),
    *((1 / 2, 0.75), (1 / 2, 0.5)),
    *((1 / 3, 0.75), (1 / 3, 0.5)),
)
"""Share of the layers, and of each layer's heads and channels, of the sizes that are tried: from the vocabulary alone
to about a twelfth of the layers' weights."""


@dataclass(frozen=True)
class Size:
    """How much of a model stays, beside its vocabulary.

    Args:
        layers: how many.
        width: share of heads and channels in each, above 0 and at most 1.
    """

    layers: int
    width: float

    @property
    def name(self) -> str:
        """As people write it: `3x0.5`."""
        return f"{self.layers}x{self.width:g}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `3x0.5`.

        Raises:
            UsageError: something else.
        """
        found = re.fullmatch(r"(\d+)x(\d*\.?\d+)", text)
        if not found or not int(found[1]) or not 0 < float(found[2]) <= 1:
            raise UsageError(
                f"--size: must be LAYERSxSHARE with a share above 0 and at most 1, such as 3x0.5, got {text!r}."
            )
        return cls(int(found[1]), float(found[2]))


def list_sizes(layers: int) -> list[Size]:
    """The sizes to try of a model of so many layers, the largest first."""
    return list(dict.fromkeys(Size(max(1, round(layers * depth)), width) for depth, width in SHARES))


@dataclass(frozen=True)
class Whole:
    """The model that is made smaller.

    Args:
        model: merged, in evaluation mode, on the CPU.
        tokenizer: its own.
        task: what it was trained for.
        train: rows as it reads them.
        max_length: tokens after which a text is cut.
        seed: draws rows.
        least_tokens: of the smaller vocabulary, see `trim_tokenizer`.
    """

    model: Any
    tokenizer: Any
    task: TextClassification
    train: Examples
    max_length: int
    seed: int
    least_tokens: int = LEAST_TOKENS
    _importance: dict[int, Importance] = field(default_factory=dict)
    """Layers that are left -> what their heads and channels count for."""

    @cached_property
    def logits(self) -> Outputs:
        """What it says of its train rows, (N, K)."""
        return compute_logits(self.model, self.train, None)

    @cached_property
    def vocabulary(self) -> Any:
        """The tokenizer cut to the tokens of the train rows and common ones, and the numbers that they had."""
        return trim_tokenizer(self.tokenizer, np.unique(self.train.input_ids), self.least_tokens)

    @cached_property
    def trimmed(self) -> Any:
        """The model with that vocabulary: the same answers wherever no other token occurs."""
        return trim_embeddings(self.model, self.vocabulary.kept)

    @cached_property
    def dropped(self) -> list[int]:
        """All layers but one, the least useful first: those whose loss moves its scores least."""
        rows = self._draw(LAYER_ROWS)
        few, wanted = self.train.take(rows), torch.from_numpy(self.logits[rows]).log_softmax(-1)

        def measure(model: nn.Module) -> float:
            given = torch.from_numpy(compute_logits(model, few, None)).log_softmax(-1)
            return nn.functional.kl_div(given, wanted, reduction="batchmean", log_target=True).item()

        return rank_layers(self.model, 1, measure)

    def cut(self, size: Size) -> Any:
        """The model with the layers, heads, channels and tokens that it needs most, before it has learned again.

        Raises:
            UsageError: a size with more layers than there are.
        """
        config = self.model.config
        if size.layers > config.num_hidden_layers:
            raise UsageError(
                f"--size: must have at most the {config.num_hidden_layers} layers of the run, got {size.name}."
            )
        spared = config.num_hidden_layers - size.layers
        dropped = self.dropped[:spared] if spared else []
        model = drop_layers(self.trimmed, [i for i in range(config.num_hidden_layers) if i not in dropped])
        heads, channels = (
            max(1, round(size.width * whole)) for whole in (config.num_key_value_heads, config.intermediate_size)
        )
        if size.layers not in self._importance:
            self._importance[size.layers] = self._weigh(model)
        return prune(model, *self._importance[size.layers].choose(heads, channels))

    def _weigh(self, model: Any) -> Importance:
        """How much the loss on train rows leans on each part of a model with the trimmed vocabulary."""
        few = self.train.take(self._draw(PART_ROWS))
        ids = np.searchsorted(self.vocabulary.kept, few.input_ids).astype(np.int32)  # every one of them was kept
        few = Examples(ids, few.starts, few.labels)
        padding = int(self.vocabulary.tokenizer.pad_token_id)
        model.requires_grad_(False)
        return compute_importance(
            model,
            (collate(few, rows, padding) for rows in plan_prediction(few.lengths, get_budget(model))),
            lambda batch: self.task.compute_losses(model, batch, 0.0),
        )

    def _draw(self, most: int) -> Indices:
        """Rows of train, as many as there are or `most`."""
        generator = np.random.default_rng(self.seed)
        return np.sort(generator.permutation(len(self.train))[:most]).astype(np.int64)
