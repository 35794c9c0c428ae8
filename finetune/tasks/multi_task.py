"""Several tasks on one base and one adapter, each with a head of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import IGNORED, Batch, Examples, Indices, list_inputs
from finetune.evaluation.metrics import list_foreign_names
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
from finetune.tasks.reranking import Reranking
from finetune.tasks.retrieval import Retrieval
from finetune.tasks.task import Outputs, Task
from finetune.tasks.text_classification import TextClassification


class Headed(Task, Protocol):
    """A task that needs no more of the base than what one head makes of each row."""

    @property
    def head(self) -> dict[str, Any]:
        """What `config.heads` of a Triad says of it."""

    @property
    def width(self) -> int | None:
        """Numbers that the head gives for a row; None for as many as the base is wide."""

    @property
    def codes(self) -> int:
        """Labels that rows may have: 0 to this, exclusive."""

    def compute_loss(self, outputs: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Loss of each row, (B,), from what the head made of it, (B, K)."""


SHAPES: dict[str, type[Headed]] = {shape.type: shape for shape in (TextClassification, Retrieval, Reranking)}
"""The tasks that may share a base."""


@dataclass(frozen=True)
class MultiTask:
    """What is trained where a recipe has several tasks.

    The rows of all tasks are one train split, and a batch mixes them. The labels of all tasks are numbered on end: the
    number of a label says its task.

    Args:
        tasks: task name -> task.
        weights: task name -> what its rows count in the loss.
    """

    tasks: Mapping[str, Headed]
    weights: Mapping[str, float]

    type: ClassVar[str] = "multi_task"
    peft_type: ClassVar[str] = "SEQ_CLS"

    @property
    def labels(self) -> dict[str, list[str]]:
        """Task with classes -> these in the order of the logits of its head."""
        return {name: task.labels for name, task in self.tasks.items() if task.labels}

    @property
    def heads(self) -> dict[str, dict[str, Any]]:
        """Task -> its head."""
        return {name: task.head for name, task in self.tasks.items()}

    def combine(self, examples: Mapping[str, Examples]) -> Examples:
        """The rows of all tasks, in the order of the tasks; their labels as numbered on end, -100 left as it is."""
        parts = [examples[name] for name in self.tasks]
        firsts = [codes.start for codes in self._list_codes().values()]
        labels = [
            np.where(part.labels == IGNORED, IGNORED, part.labels + first)
            for part, first in zip(parts, firsts, strict=True)
        ]
        companions, companion_starts = _join_companions(parts)
        return Examples(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]),
            np.concatenate(labels),
            companions=companions,
            companion_starts=companion_starts,
        )

    def build_model(self, base: BaseModel, section: ModelSection, tokenizer: Any, seed: int) -> nn.Module:
        """The base with a new head for each task, in float32."""
        return build_several_heads(base, self.heads, section, seed=seed)

    def build_shape(self, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
        """The same without weights."""
        return build_several_heads_shape(base, self.heads, section)

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A whole model as `save_pretrained` wrote it, or the base with a saved adapter's configuration."""
        return load_several_heads(folder, base)

    def list_modules(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """The heads one by one, as PEFT takes no dictionary of modules; saved are also layers before them."""
        heads = [f"classifiers.{name}" for name, task in self.tasks.items() if "num_labels" in task.head]

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
        for name, codes in self._list_codes().items():
            # Also where it is no row's task: every process must have a gradient for every head.
            rows = torch.nonzero((labels >= codes.start) & (labels < codes.stop)).squeeze(1)
            part = self.tasks[name].compute_loss(logits[name][rows], labels[rows] - codes.start, label_smoothing)
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
        """What all heads give side by side, (N, K of all)."""

        def compute(batch: Batch, _rows: Indices) -> torch.Tensor:
            logits = model(**list_inputs(batch)).logits
            return torch.cat([logits[name] for name in self.tasks], dim=-1)

        found = compute_by_row(model, examples, pad_token_id, compute, share=share, advance=advance)
        widths = [task.width or int(model.config.hidden_size) for task in self.tasks.values()]  # type: ignore[union-attr, arg-type]  # a transformers config
        return scatter_rows(found, len(examples), sum(widths))

    def compute_metrics(
        self, outputs: Outputs, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Each metric of each task that has it as `<task>.<metric>`, and before them its mean over these tasks."""
        values: dict[str, dict[str, float]] = {}
        columns = self._list_columns(outputs.shape[1])
        kinds = {task.scored_by for task in self.tasks.values()}
        for name, codes in self._list_codes().items():
            task, rows = self.tasks[name], self._find_rows(references, name)
            foreign = list_foreign_names(task.scored_by, kinds)
            own = [metric for metric in names if metric not in foreign]
            values[name] = task.compute_metrics(
                np.ascontiguousarray(outputs[rows][:, columns[name]]), references[rows] - codes.start, own
            )
        metrics = dict.fromkeys(metric for part in values.values() for metric in part)
        means = {
            metric: float(np.mean([part[metric] for part in values.values() if metric in part])) for metric in metrics
        }
        return means | {f"{name}.{metric}": value for name, part in values.items() for metric, value in part.items()}

    def split_outputs(self, outputs: Outputs) -> Iterator[tuple[str, Outputs]]:
        """Each task with its own columns of `compute_outputs`."""
        for name, columns in self._list_columns(outputs.shape[1]).items():
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
        tasks = {name: SHAPES[task["type"]].from_config(task) for name, task in config["tasks"].items()}
        return cls(tasks, config["weights"])  # type: ignore[arg-type]  # from_config gives what it is called on

    def _list_codes(self) -> dict[str, slice]:
        """Task -> the numbers of its labels."""
        return self._lay_on_end([task.codes for task in self.tasks.values()])

    def _list_columns(self, total: int) -> dict[str, slice]:
        """Task -> its columns of the outputs, of which there are `total`."""
        widths = [task.width for task in self.tasks.values()]
        open_width = (total - sum(width or 0 for width in widths)) // max(1, widths.count(None))
        return self._lay_on_end([open_width if width is None else width for width in widths])

    def _lay_on_end(self, sizes: Sequence[int]) -> dict[str, slice]:
        ends = np.cumsum([0, *sizes]).tolist()
        return {name: slice(first, end) for name, (first, end) in zip(self.tasks, pairwise(ends), strict=True)}

    def _find_rows(self, labels: npt.NDArray[np.int64], name: str) -> npt.NDArray[np.int64]:
        codes = self._list_codes()[name]
        return np.flatnonzero((labels >= codes.start) & (labels < codes.stop))

    def _take(self, examples: Examples, name: str) -> Examples:
        """One task's rows, with labels of its own."""
        part = examples.take(self._find_rows(examples.labels, name))
        return replace(part, labels=part.labels - self._list_codes()[name].start)


def _join_companions(parts: Sequence[Examples]) -> tuple[Indices | None, Indices | None]:
    """The companions of all parts, under the numbers that the rows have together."""
    if all(part.companions is None for part in parts):
        return None, None
    firsts = np.cumsum([0, *(len(part) for part in parts)])
    needed = [
        first + part.get_companions(row) for first, part in zip(firsts, parts, strict=False) for row in range(len(part))
    ]
    return np.concatenate(needed), np.cumsum([0, *(len(rows) for rows in needed)])
