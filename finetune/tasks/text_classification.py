"""Text classification: one text, one of K classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import Batch, Examples, list_inputs
from finetune.data.cleaning import clean_text
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.evaluation.calibration import apply_temperature
from finetune.evaluation.metrics import compute_metric
from finetune.models.base import BaseModel
from finetune.models.classifier import build_classifier, load_saved_classifier
from finetune.recipe.schema import ModelSection, TaskSection, TextStep
from finetune.tasks.task import Logits

UNKNOWN = -100


@dataclass(frozen=True)
class TextClassification:
    """The shape of sentiment, intents and topics.

    Args:
        labels: class names in the order of the logits.
        values: value in the data -> class name, where the data hold codes.
        clean: steps on each text before it is encoded.
    """

    labels: list[str]
    values: dict[str, str]
    clean: tuple[TextStep, ...] = ()

    type: ClassVar[str] = "text_classification"
    roles: ClassVar[tuple[str, ...]] = ("text", "label")

    @classmethod
    def build(
        cls, section: TaskSection, card_labels: list[str] | dict[str, str] | None, rows: Sequence[Row]
    ) -> TextClassification:
        """Settle the classes: the recipe's, else the card's, else the sorted values of the data.

        Raises:
            DataError: fewer than two classes.
        """
        labels = section.labels if section.labels is not None else card_labels
        if labels is None:
            labels = sorted({row.values["label"] for row in rows if row.values["label"]})
            if len(labels) < 2:
                raise DataError(f"{section.data}: the label column must hold at least 2 classes, got {labels}.")
        if isinstance(labels, list):
            return cls(list(labels), {}, tuple(section.clean))
        return cls(list(dict.fromkeys(labels.values())), dict(labels), tuple(section.clean))

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Clean each text, and put class names where the data hold codes."""
        return [replace(row, values={**row.values, **self._prepare_values(row.values)}) for row in rows]

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Encode prepared rows, cut at `max_length` tokens; labels are -100 where a row has none."""
        texts = [row.values["text"] for row in rows]
        encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
        index: dict[Any, int] = {label: i for i, label in enumerate(self.labels)}
        return Examples.build(encoded, [index.get(row.values.get("label"), UNKNOWN) for row in rows])

    def build_model(self, base: BaseModel, section: ModelSection, seed: int) -> nn.Module:
        """The base with a new classification head, in float32."""
        return build_classifier(base, self.labels, section, seed=seed)

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A whole model as `save_pretrained` wrote it, or the base with a saved adapter's configuration."""
        return load_saved_classifier(folder, base)

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Cross-entropy of each row, (B,)."""
        logits = model(**list_inputs(batch)).logits
        return nn.functional.cross_entropy(
            logits.float(), batch["labels"], reduction="none", label_smoothing=label_smoothing
        )

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """1 for every row, or the weight of its class: n / (K * count), or the root of that."""
        if scheme == "none":
            return np.ones(len(examples), dtype=np.float32)
        counts = np.maximum(np.bincount(examples.labels, minlength=len(self.labels)), 1)
        balanced = len(examples) / (len(self.labels) * counts)
        weights = np.sqrt(balanced) if scheme == "sqrt_balanced" else balanced
        return weights[examples.labels].astype(np.float32)

    def compute_scores(self, logits: Logits, temperature: float) -> npt.NDArray[np.float64]:
        """Softmax of logits / temperature, (N, K)."""
        return apply_temperature(logits, temperature)

    def compute_metrics(
        self, logits: Logits, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Loss, and the named metrics of uncalibrated scores."""
        scores = apply_temperature(logits, 1.0)
        loss = nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(references)).item()
        return {"loss": loss} | {name: compute_metric(name, references, scores) for name in names}

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {"type": self.type, "labels": self.labels, "values": self.values, "clean": list(self.clean)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextClassification:
        """Inverse of `to_config`."""
        return cls(list(config["labels"]), dict(config["values"]), tuple(config["clean"]))

    def _prepare_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        label = values.get("label")
        prepared: dict[str, Any] = {"text": clean_text(values["text"], self.clean)}
        if label is not None:
            prepared["label"] = label if label in self.labels else self.values.get(label, label)
        return prepared
