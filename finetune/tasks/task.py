"""What a task is: a problem shape. The rest of the house talks to its protocols, so a new shape is one new file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import Batch, Examples
from finetune.data.knowledge import Entry
from finetune.data.rows import Row, Splits, number_groups
from finetune.evaluation.intervals import Resampling
from finetune.models.base import BaseModel
from finetune.recipe.schema import EvaluateSection, ModelSection, TaskSection

Outputs = npt.NDArray[np.floating[Any]]
Part = TypeVar("Part")


class Track(Protocol):
    """What a task says how far its judging is by."""

    def __call__(self, stage: str, parts: Sequence[Part], /) -> Iterable[Part]:
        """The parts of a stage, to go through them."""


def keep_silent(_stage: str, parts: Sequence[Part]) -> Iterable[Part]:
    """A `Track` that says nothing."""
    return parts


@dataclass(frozen=True)
class HeldOut:
    """A trained model, and the rows it is judged on.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        rows: prepared rows of train, validation and test.
        examples: the same, encoded.
        base: for baselines on the untouched base.
        section: the recipe's `evaluate`.
        max_length: tokens after which a text is cut.
        seed: the run's.
        group_column: the column whose values were split as wholes; None where rows were split one by one.
        opened: how often the test split was opened; None for another held-out set in its place.
        settings: what was fitted on validation when the run was judged; None when that is still to do.
        track: for judging that takes long: says how far it is.
    """

    model: nn.Module
    tokenizer: Any
    rows: Splits
    examples: Mapping[str, Examples]
    base: BaseModel
    section: EvaluateSection
    max_length: int
    seed: int
    opened: int | None
    settings: Mapping[str, Any] | None = None
    track: Track = keep_silent
    group_column: str | None = None

    def resample(self, name: str | None = None) -> Resampling:
        """How a split's rows are drawn again for intervals: as wholes where they were split as wholes.

        Args:
            name: of the split; None for examples that are no rows, such as blocks of a text.
        """
        return Resampling(
            self.section.resamples, self.seed, number_groups(self.rows[name], self.group_column) if name else None
        )

    @property
    def judged(self) -> list[str]:
        """The splits to score: validation too, where something is still to be fitted on it."""
        return ["test"] if self.settings is not None else ["validation", "test"]


@dataclass(frozen=True)
class Judgement:
    """What is known about a model after it was judged.

    Args:
        scored: each split that was judged -> the content of evaluation/<split>.json.
        predictions: column -> value for each test row.
        mistakes: wrong predictions, most confident first, for the report.
        samples: inputs and what the model writes, for the report.
        samples_title: what the report calls them.
        settings: fitted on validation; prediction needs them.
        files: name -> content of what else was fitted, for the model's folder.
    """

    scored: Mapping[str, dict[str, Any]]
    predictions: Mapping[str, Any]
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    samples_title: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


class Trainable(Protocol):
    """What the loop trains: the model, its losses, its scores on validation."""

    type: ClassVar[str]
    peft_type: ClassVar[str]
    """PEFT's name for it."""

    def build_model(self, base: BaseModel, section: ModelSection, tokenizer: Any, seed: int) -> nn.Module:
        """The model before training, in float32."""

    def build_shape(self, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
        """The same on the meta device: shapes without weights, for `finetune check`."""

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A model that was saved whole; with `base`, that base in the shape that a saved adapter needs."""

    def list_modules(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Names of the modules that start at random, and of those that are saved whole with every adapter."""

    def start(self, model: nn.Module, train: Examples, pad_token_id: int | None) -> None:
        """Give new weights a better start than a random one, from the train split; nothing where there is no way."""

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Loss of each row, (B,); the mean over its tokens where it is scored by token."""

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """How much each row counts in the loss, (N,)."""

    def compute_outputs(
        self,
        model: nn.Module,
        examples: Examples,
        pad_token_id: int | None,
        *,
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> Outputs:
        """What the metrics need of each row, (N, K); zeros for rows of other processes' shares."""

    def compute_metrics(
        self, outputs: Outputs, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Point values for validation while training: `loss`, then the named metrics."""

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights, as plain JSON."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Trainable:
        """Inverse of `to_config`."""


@dataclass(frozen=True)
class TaskData:
    """What a task is built from beside its section of the recipe.

    Args:
        rows: of all splits.
        labels: the classes that the card names, or value in the data -> class; None where it names none.
        entries: the knowledge, for tasks that look for entries.
    """

    rows: Sequence[Row]
    labels: list[str] | dict[str, str] | None = None
    entries: Sequence[Entry] = ()


class Task(Trainable, Protocol):
    """A problem shape with all that the data settle, such as labels: what is trained, and how its rows are read."""

    roles: ClassVar[tuple[str, ...]]
    """The columns that training data must have."""
    optional_roles: ClassVar[tuple[str, ...]]
    """The columns that it reads where a recipe or a card names them."""
    scored_by: ClassVar[str]
    """What its metrics look at, a key of `evaluation.metrics.KINDS`."""
    cuts_rows: ClassVar[bool]
    """Whether what is beyond `max_length` is lost; then row i gives example i."""

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes in the order of the logits; None where there are none."""

    @classmethod
    def build(cls, section: TaskSection, data: TaskData) -> Task:
        """Settle what the recipe leaves to the data.

        Args:
            section: of the recipe; `columns` has all roles that are read.
            data: what was read.
        """

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Rows as the task reads them: texts cleaned, label codes replaced by class names."""

    def build_tokenizer(self, base: BaseModel, rows: Sequence[Row], section: ModelSection) -> Any:
        """The base's tokenizer; learned from the train rows where the base is `scratch`."""

    def bind(self, tokenizer: Any) -> Task:
        """The task with what it needs to know of its tokenizer."""

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Encode prepared rows, at most `max_length` tokens each."""

    def judge(self, held_out: HeldOut) -> Judgement:
        """Score validation and test, with baselines and intervals."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Task:
        """Inverse of `to_config`."""
