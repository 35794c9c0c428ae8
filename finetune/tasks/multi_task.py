"""Several classifications on one base and one adapter, each with a head of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import IGNORED, Batch, Examples, Indices, list_inputs
from finetune.models.base import BaseModel
from finetune.models.classifier import list_head_modules, list_new_modules
from finetune.models.multi_task import (
    OneHead,
    build_several_heads,
    build_several_heads_shape,
    load_several_heads,
)
from finetune.models.prediction import compute_by_row, scatter_rows
from finetune.recipe.schema import ModelSection
from finetune.tasks.task import Outputs
from finetune.tasks.text_classification import TextClassification


@dataclass(frozen=True)
class MultiTask:
    """What is trained where a recipe has several tasks.

    The rows of all tasks are one train split, and a batch mixes them. The classes of all tasks are numbered on end:
    the number of a class says its task, and its column in the outputs.

    Args:
        tasks: task name -> task.
        weights: task name -> what its rows count in the loss.
    """

    tasks: Mapping[str, TextClassification]
    weights: Mapping[str, float]

    type: ClassVar[str] = "multi_task"
    peft_type: ClassVar[str] = "SEQ_CLS"

    @property
    def labels(self) -> dict[str, list[str]]:
        """Task -> its classes in the order of the logits of its head."""
        return {name: task.labels for name, task in self.tasks.items()}

    def combine(self, examples: Mapping[str, Examples]) -> Examples:
        """The rows of all tasks, in the order of the tasks; their labels as numbered on end."""
        parts = [examples[name] for name in self.tasks]
        firsts = [columns.start for columns in self._list_columns().values()]
        return Examples(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]),
            np.concatenate(
                [
                    np.where(part.labels == IGNORED, IGNORED, part.labels + first)
                    for part, first in zip(parts, firsts, strict=True)
                ]
            ),
        )

    def build_model(self, base: BaseModel, section: ModelSection, tokenizer: Any, seed: int) -> nn.Module:
        """The base with a new head for each task, in float32."""
        return build_several_heads(base, self.labels, section, seed=seed)

    def build_shape(self, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
        """The same without weights."""
        return build_several_heads_shape(base, self.labels, section)

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A whole model as `save_pretrained` wrote it, or the base with a saved adapter's configuration."""
        return load_several_heads(folder, base)

    def list_modules(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """The heads one by one, as PEFT takes no dictionary of modules; saved are also layers before them."""
        heads = [f"classifiers.{name}" for name in self.tasks]

        def name_heads(names: list[str]) -> list[str]:
            return [*(name for name in names if name != "classifiers"), *heads]

        return name_heads(list_new_modules(model)), name_heads(list_head_modules(model))

    def start(self, model: nn.Module, train: Examples, pad_token_id: int | None) -> None:
        """Start each head as its task does."""
        for name, task in self.tasks.items():
            task.start(OneHead(model, name), self._take(train, name), pad_token_id)

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Each row's loss from its own task's head, (B,); one pass through the base for all."""
        logits, labels = model(**list_inputs(batch)).logits, batch["labels"]
        losses = torch.zeros(len(labels), device=labels.device)
        for name, columns in self._list_columns().items():
            # Also where it is no row's task: every process must have a gradient for every head.
            rows = torch.nonzero((labels >= columns.start) & (labels < columns.stop)).squeeze(1)
            part = self.tasks[name].compute_loss(logits[name][rows], labels[rows] - columns.start, label_smoothing)
            losses = losses.index_add(0, rows, part)
        return losses

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """Each task's own weights, times the task's."""
        weights = np.zeros(len(examples), dtype=np.float32)
        for name, task in self.tasks.items():
            rows = self._find_rows(examples.labels, name)
            weights[rows] = self.weights[name] * task.compute_row_weights(self._take(examples, name), scheme)
        return weights

    def compute_outputs(
        self,
        model: nn.Module,
        examples: Examples,
        pad_token_id: int | None,
        *,
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> Outputs:
        """Logits of all heads side by side, (N, K of all)."""

        def compute(batch: Batch, _rows: Indices) -> torch.Tensor:
            logits = model(**list_inputs(batch)).logits
            return torch.cat([logits[name] for name in self.tasks], dim=-1)

        found = compute_by_row(model, examples, pad_token_id, compute, share=share, advance=advance)
        return scatter_rows(found, len(examples), sum(len(task.labels) for task in self.tasks.values()))

    def compute_metrics(
        self, outputs: Outputs, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Each metric of each task as `<task>.<metric>`, and before them its mean over the tasks."""
        values: dict[str, dict[str, float]] = {}
        for name, columns in self._list_columns().items():
            rows = self._find_rows(references, name)
            values[name] = self.tasks[name].compute_metrics(
                np.ascontiguousarray(outputs[rows][:, columns]), references[rows] - columns.start, names
            )
        means = {metric: float(np.mean([part[metric] for part in values.values()])) for metric in ("loss", *names)}
        return means | {f"{name}.{metric}": value for name, part in values.items() for metric, value in part.items()}

    def split_outputs(self, outputs: Outputs) -> Iterator[tuple[str, Outputs]]:
        """Each task with its own columns of `compute_outputs`."""
        for name, columns in self._list_columns().items():
            yield name, np.ascontiguousarray(outputs[:, columns])

    def to_config(self) -> dict[str, Any]:
        """Of each task what it needs."""
        return {
            "type": self.type,
            "tasks": {name: task.to_config() for name, task in self.tasks.items()},
            "weights": dict(self.weights),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MultiTask:
        """Inverse of `to_config`."""
        tasks = {name: TextClassification.from_config(task) for name, task in config["tasks"].items()}
        return cls(tasks, config["weights"])

    def _list_columns(self) -> dict[str, slice]:
        """Task -> its columns of the outputs, and the numbers of its classes."""
        ends = np.cumsum([0, *(len(task.labels) for task in self.tasks.values())]).tolist()
        return {name: slice(first, end) for name, (first, end) in zip(self.tasks, pairwise(ends), strict=True)}

    def _find_rows(self, labels: npt.NDArray[np.int64], name: str) -> npt.NDArray[np.int64]:
        columns = self._list_columns()[name]
        return np.flatnonzero((labels >= columns.start) & (labels < columns.stop))

    def _take(self, examples: Examples, name: str) -> Examples:
        """One task's rows, with labels of its own."""
        part = examples.take(self._find_rows(examples.labels, name))
        return Examples(part.input_ids, part.starts, part.labels - self._list_columns()[name].start)
