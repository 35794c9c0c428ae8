"""Text classification: one text, one of K classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import IGNORED, Batch, Examples, list_inputs
from finetune.data.cleaning import clean_text
from finetune.data.knowledge import Entry
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.evaluation.baselines import BaselineData, BaselineResult, compute_baselines
from finetune.evaluation.calibration import apply_temperature, fit_temperature
from finetune.evaluation.metrics import compute_metric
from finetune.evaluation.scoring import ScoredSplit, score_split
from finetune.models.base import BaseModel, load_tokenizer
from finetune.models.centroids import start_at_centroids
from finetune.models.classifier import (
    build_classifier,
    build_classifier_shape,
    get_padding,
    list_head_modules,
    list_new_modules,
    load_saved_classifier,
)
from finetune.models.embedding import compute_embeddings
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import ModelSection, TaskSection, TextStep
from finetune.tasks.encoding import CONTEXT, encode_texts, read_question
from finetune.tasks.task import HeldOut, Judgement, Outputs

MISTAKES = 50


@dataclass(frozen=True)
class TextClassification:
    """The shape of sentiment, intents and topics.

    Args:
        labels: class names in the order of the logits.
        values: value in the data -> class name, where the data hold codes.
        clean: steps on each text before it is encoded.
        reads_context: whether what was said before belongs to a text.
    """

    labels: list[str]
    values: dict[str, str]
    clean: tuple[TextStep, ...] = ()
    reads_context: bool = False

    type: ClassVar[str] = "text_classification"
    roles: ClassVar[tuple[str, ...]] = ("text", "label")
    optional_roles: ClassVar[tuple[str, ...]] = (CONTEXT,)
    scored_by: ClassVar[str] = "labels"
    peft_type: ClassVar[str] = "SEQ_CLS"
    cuts_rows: ClassVar[bool] = True

    @property
    def head(self) -> dict[str, Any]:
        """The head beside those of other tasks."""
        return {"type": "sequence_classification", "num_labels": len(self.labels), "labels": list(self.labels)}

    @property
    def width(self) -> int:
        """Logits of a row, K."""
        return len(self.labels)

    @property
    def codes(self) -> int:
        """Labels of rows, K."""
        return len(self.labels)

    @classmethod
    def build(
        cls,
        section: TaskSection,
        card_labels: list[str] | dict[str, str] | None,
        rows: Sequence[Row],
        entries: Sequence[Entry] = (),
    ) -> TextClassification:
        """Settle the classes: the recipe's, else the card's, else the sorted values of the data.

        Raises:
            DataError: fewer than two classes.
        """
        labels = section.labels if section.labels is not None else card_labels
        reads_context = CONTEXT in section.columns
        if labels is None:
            labels = sorted({row.values["label"] for row in rows if row.values["label"]})
            if len(labels) < 2:
                raise DataError(f"{section.data}: the label column must hold at least 2 classes, got {labels}.")
        if isinstance(labels, list):
            return cls(list(labels), {}, tuple(section.clean), reads_context)
        return cls(list(dict.fromkeys(labels.values())), dict(labels), tuple(section.clean), reads_context)

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Clean each text, and put class names where the data hold codes."""
        return [replace(row, values={**row.values, **self._prepare_values(row.values)}) for row in rows]

    def bind(self, tokenizer: Any) -> TextClassification:
        """Nothing is left to the tokenizer."""
        return self

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Encode prepared rows, cut at `max_length` tokens; labels are -100 where a row has none."""
        texts = [read_question(row, self.reads_context) for row in rows]
        encoded = encode_texts(texts, tokenizer, max_length, keep="end" if self.reads_context else "start")
        index: dict[Any, int] = {label: i for i, label in enumerate(self.labels)}
        return Examples.build(encoded, [index.get(row.values.get("label"), IGNORED) for row in rows])

    def build_tokenizer(self, base: BaseModel, rows: Sequence[Row], section: ModelSection) -> Any:
        """The base's."""
        return load_tokenizer(base)

    def build_model(self, base: BaseModel, section: ModelSection, tokenizer: Any, seed: int) -> nn.Module:
        """The base with a new classification head, in float32."""
        return build_classifier(base, self.labels, section, seed=seed)

    def build_shape(self, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
        """The same without weights."""
        return build_classifier_shape(base, self.labels, section)

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A whole model as `save_pretrained` wrote it, or the base with a saved adapter's configuration."""
        return load_saved_classifier(folder, base)

    def list_modules(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """The head; saved are also layers between base and head."""
        return list_new_modules(model), list_head_modules(model)

    def start(self, model: nn.Module, train: Examples, pad_token_id: int | None) -> None:
        """Start the head at the classes' centroids."""
        start_at_centroids(model, train, pad_token_id)

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Cross-entropy of each row, (B,)."""
        return self.compute_loss(model(**list_inputs(batch)).logits, batch["labels"], label_smoothing)

    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Cross-entropy of each row, (B,), from its logits (B, K)."""
        return nn.functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """1 for every row, or the weight of its class: n / (K * count), or the root of that."""
        if scheme == "none":
            return np.ones(len(examples), dtype=np.float32)
        counts = np.maximum(np.bincount(examples.labels, minlength=len(self.labels)), 1)
        balanced = len(examples) / (len(self.labels) * counts)
        weights = np.sqrt(balanced) if scheme == "sqrt_balanced" else balanced
        return weights[examples.labels].astype(np.float32)

    def compute_outputs(
        self,
        model: nn.Module,
        examples: Examples,
        pad_token_id: int | None,
        *,
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> Outputs:
        """Logits, (N, K)."""
        return compute_logits(model, examples, pad_token_id, share=share, advance=advance)

    def compute_scores(self, logits: Outputs, temperature: float) -> npt.NDArray[np.float64]:
        """Softmax of logits / temperature, (N, K)."""
        return apply_temperature(logits, temperature)

    def compute_metrics(
        self, outputs: Outputs, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Loss, and the named metrics of uncalibrated scores."""
        scores = apply_temperature(outputs, 1.0)
        loss = nn.functional.cross_entropy(torch.from_numpy(outputs), torch.from_numpy(references)).item()
        return {"loss": loss} | {name: compute_metric(name, references, scores) for name in names}

    def judge(self, held_out: HeldOut) -> Judgement:
        """Calibrate on validation, fit the baselines, and score validation and test."""
        section, rows = held_out.section, held_out.rows
        pad_token_id = get_padding(held_out.model, held_out.tokenizer)
        logits, references = {}, {}
        for name in held_out.judged:
            examples = held_out.examples[name]
            logits[name] = self.compute_outputs(held_out.model, examples, pad_token_id).astype(np.float64)
            references[name] = examples.labels
        if held_out.settings is not None:
            temperature = float(held_out.settings["temperature"])
        elif section.calibrate == "temperature":
            temperature = fit_temperature(logits["validation"], references["validation"])
        else:
            temperature = 1.0
        baselines = self._compute_baselines(held_out)
        scored = {
            name: score_split(
                ScoredSplit(
                    name=name,
                    labels=self.labels,
                    references=references[name],
                    logits=logits[name],
                    texts=[row.values["text"] for row in rows[name]],
                    values=[row.values for row in rows[name]],
                    temperature=temperature,
                    baselines=baselines,
                    opened=held_out.opened if name == "test" else None,
                ),
                section,
                held_out.seed,
            )
            for name in logits
        }
        scores = self.compute_scores(logits["test"], temperature)
        return Judgement(
            scored=scored,
            predictions=self._list_predictions(rows["test"], references["test"], scores),
            mistakes=self._list_mistakes(rows["test"], references["test"], scores),
            settings={"temperature": temperature},
        )

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {"type": self.type, "labels": self.labels, "values": self.values, "clean": list(self.clean)} | (
            {"reads_context": True} if self.reads_context else {}
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextClassification:
        """Inverse of `to_config`."""
        return cls(
            list(config["labels"]),
            dict(config["values"]),
            tuple(config["clean"]),
            config.get("reads_context", False),
        )

    def _prepare_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        label = values.get("label")
        prepared: dict[str, Any] = {"text": clean_text(values["text"], self.clean)}
        if label is not None:
            prepared["label"] = label if label in self.labels else self.values.get(label, label)
        return prepared

    def _compute_baselines(self, held_out: HeldOut) -> dict[str, BaselineResult]:
        """Fit the recipe's baselines on train, tune them on validation, and score both held-out splits."""
        examples = held_out.examples
        embedded: dict[str, npt.NDArray[np.float32]] = {}

        def embed(name: str) -> Callable[[], npt.NDArray[np.float32]]:
            def features() -> npt.NDArray[np.float32]:
                if not embedded:  # the base is loaded once, for all splits
                    parts = compute_embeddings(held_out.base, list(examples.values()), held_out.tokenizer.pad_token_id)
                    embedded.update(zip(examples, parts, strict=True))
                return embedded[name]

            return features

        data = {
            name: BaselineData(
                texts=[row.values["text"] for row in held_out.rows[name]],
                labels=None if name == "test" else examples[name].labels,
                features=embed(name),
            )
            for name in examples
        }
        return compute_baselines(
            held_out.section.baselines,
            data["train"],
            data["validation"],
            data["test"],
            n_labels=len(self.labels),
            seed=held_out.seed,
        )

    def _list_predictions(
        self, rows: Sequence[Row], references: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]
    ) -> dict[str, Any]:
        return {
            "id": [row.id for row in rows],
            "text": [row.values["text"] for row in rows],
            "reference": [self.labels[i] for i in references],
            "prediction": [self.labels[i] for i in scores.argmax(axis=1)],
        } | {f"score_{label}": scores[:, i] for i, label in enumerate(self.labels)}

    def _list_mistakes(
        self, rows: Sequence[Row], references: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]
    ) -> list[dict[str, Any]]:
        predictions, confidences = scores.argmax(axis=1), scores.max(axis=1)
        wrong = np.flatnonzero(predictions != references)
        return [
            {
                "id": rows[i].id,
                "text": rows[i].values["text"],
                "reference": self.labels[references[i]],
                "prediction": self.labels[predictions[i]],
                "confidence": float(confidences[i]),
            }
            for i in wrong[np.argsort(-confidences[wrong], kind="stable")][:MISTAKES]
        ]
