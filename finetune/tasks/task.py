"""What a task is: a problem shape. The rest of the house talks to this protocol, so a new shape is one new file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import Batch, Examples
from finetune.data.rows import Row
from finetune.models.base import BaseModel
from finetune.recipe.schema import ModelSection

Logits = npt.NDArray[np.floating[Any]]


class Task(Protocol):
    """A problem shape whose labels are settled."""

    type: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]  # the columns that training data must have

    @property
    def labels(self) -> list[str]:
        """Names of the classes in the order of the logits."""

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Rows as the task reads them: texts cleaned, label codes replaced by class names."""

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Encode prepared rows, cut at `max_length` tokens."""

    def build_model(self, base: BaseModel, section: ModelSection, seed: int) -> nn.Module:
        """The base with this task's new head, in float32."""

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A model that was saved whole; with `base`, that base in the shape that a saved adapter needs."""

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Loss of each row, (B,)."""

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """How much each row counts in the loss, (N,)."""

    def compute_scores(self, logits: Logits, temperature: float) -> npt.NDArray[np.float64]:
        """Probabilities, (N, K)."""

    def compute_metrics(
        self, logits: Logits, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Point values for validation while training: `loss`, then the named metrics."""

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights, as plain JSON."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Task:
        """Inverse of `to_config`."""
