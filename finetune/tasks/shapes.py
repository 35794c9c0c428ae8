"""What several tasks do alike; each adds what only it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import Batch, Examples, Indices
from finetune.data.rows import Row
from finetune.models.base import BaseModel, load_tokenizer
from finetune.models.classifier import list_head_modules, list_new_modules
from finetune.models.language import build_language_model, build_language_model_shape, load_saved_language_model
from finetune.recipe.schema import ModelSection
from finetune.tasks import language
from finetune.tasks.task import Outputs


class OnBase:
    """A task whose model is a pretrained base and a head."""

    def build_tokenizer(self, base: BaseModel, rows: Sequence[Row], section: ModelSection) -> Any:
        """The base's."""
        return load_tokenizer(base)

    def bind(self, tokenizer: Any) -> Self:
        """Nothing is left to the tokenizer."""
        return self

    def list_modules(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """The head; saved are also layers between base and head."""
        return list_new_modules(model), list_head_modules(model)

    def start(self, model: nn.Module, train: Examples, pad_token_id: int | None) -> None:
        """Nothing to start."""


class OnLanguageModel:
    """A task whose model gives the likelihood of tokens."""

    type: ClassVar[str]

    def bind(self, tokenizer: Any) -> Self:
        """Nothing is left to the tokenizer."""
        return self

    def build_model(self, base: BaseModel, section: ModelSection, tokenizer: Any, seed: int) -> nn.Module:
        """A language model."""
        return build_language_model(self.type, base, section, tokenizer, seed=seed)

    def build_shape(self, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
        """The same without weights."""
        return build_language_model_shape(self.type, base, section, tokenizer)

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A whole model as `save_pretrained` wrote it, or the base with a saved adapter's configuration."""
        return load_saved_language_model(self.type, folder, base)

    def list_modules(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Nothing stands beside the base."""
        return [], []

    def start(self, model: nn.Module, train: Examples, pad_token_id: int | None) -> None:
        """Nothing to start."""

    def compute_token_logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Logits where the batch's labels stand, (B, T, V)."""
        return language.compute_causal_logits(model, batch)

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Mean over the scored tokens of each row, (B,)."""
        logits = self.compute_token_logits(model, batch)
        return language.compute_mean_losses(logits, batch["labels"], batch, label_smoothing)

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """Scored tokens of each row."""
        return language.count_target_tokens(examples)

    def compute_outputs(
        self,
        model: nn.Module,
        examples: Examples,
        pad_token_id: int | None,
        *,
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> Outputs:
        """Likelihoods, (N, 4)."""

        def measure(batch: Batch, _rows: Indices) -> torch.Tensor:
            return language.measure_tokens(self.compute_token_logits(model, batch), batch["labels"])

        return language.compute_likelihoods(model, examples, pad_token_id, measure, share=share, advance=advance)

    def compute_metrics(
        self, outputs: Outputs, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Loss, and those of the named metrics that need no written text: writing takes too long while training."""
        return language.compute_metrics(outputs, names)
