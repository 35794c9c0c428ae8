"""Text classification: one text, one of K classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import IGNORED, Batch, Examples, list_inputs
from finetune.data.cleaning import clean_text
from finetune.data.rows import Row
from finetune.data.turns import CONTEXT
from finetune.errors import DataError
from finetune.evaluation.baselines import BaselineData, BaselineResult, compute_baselines
from finetune.evaluation.calibration import apply_temperature, fit_temperature
from finetune.evaluation.metrics import compute_metric
from finetune.evaluation.outside import (
    OutsideRows,
    OutsideRule,
    OutsideScores,
    compute_outside_scores,
    compute_threshold,
    compute_uncertainty,
    fit_outside,
)
from finetune.evaluation.scoring import ScoredSplit, score_split
from finetune.models.base import BaseModel
from finetune.models.centroids import start_at_centroids
from finetune.models.classifier import (
    build_classifier,
    build_classifier_shape,
    get_padding,
    load_saved_classifier,
)
from finetune.models.embedding import compute_embeddings
from finetune.models.prediction import compute_logits
from finetune.recipe.messages import suggest
from finetune.recipe.schema import ModelSection, TaskSection, TextStep
from finetune.tasks.encoding import encode_texts, read_question
from finetune.tasks.shapes import OnBase
from finetune.tasks.task import HeldOut, Judgement, Outputs, TaskData

MISTAKES = 50
FEW_CLASSES = 10  # so many may be in as few rows as somebody likes


@dataclass(frozen=True)
class TextClassification(OnBase):
    """The shape of sentiment, intents and topics.

    Args:
        labels: class names in the order of the logits.
        values: value in the data -> class name, where the data hold codes.
        clean: steps on each text before it is encoded.
        reads_context: whether what was said before belongs to a text.
        out_of_scope: the label of rows that belong to none of `labels`; None where there are no such rows.
        exposure: what such rows count in the loss; 0 where they are not trained on.
    """

    labels: list[str]
    values: dict[str, str]
    clean: tuple[TextStep, ...] = ()
    reads_context: bool = False
    out_of_scope: str | None = None
    exposure: float = 0.0

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
        """Labels of rows: K, and one more for rows of no class that are trained on."""
        return len(self.labels) + (self.exposure > 0)

    @classmethod
    def build(cls, section: TaskSection, data: TaskData) -> TextClassification:
        """Settle the classes: the recipe's, else the card's, else the sorted values of the data.

        Raises:
            DataError: fewer than two classes, values that are no classes, or no row out of scope where there should be
                some.
        """
        labels, outside = section.labels if section.labels is not None else data.labels, section.out_of_scope
        found = {row.values["label"] for row in data.rows if row.values["label"]}
        values = labels if isinstance(labels, dict) else {}
        if outside is not None and outside not in (named := {values.get(label, label) for label in found}):
            raise DataError(
                f"{section.data}: out_of_scope must be a label of the data, got {outside!r}, which no row has."
                f"{suggest(outside, named)}"
            )
        classes = [name for name in dict.fromkeys(values.values() or labels or sorted(found)) if name != outside]
        if len(classes) < 2:
            raise DataError(
                f"{section.data}: the label column must hold at least 2 classes, got {classes}. Add rows of another "
                "class, or name another column."
            )
        if labels is None:
            _check_classes(classes, sum(bool(row.values["label"]) for row in data.rows), section)
        return cls(
            classes, dict(values), tuple(section.clean), CONTEXT in section.columns, outside, section.outlier_exposure
        )

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Clean each text, and put class names where the data hold codes."""
        return [replace(row, values={**row.values, **self._prepare_values(row.values)}) for row in rows]

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Encode prepared rows, cut at `max_length` tokens; labels are -100, or K, where a row has no class."""
        texts = [read_question(row, self.reads_context) for row in rows]
        encoded = encode_texts(texts, tokenizer, max_length, keep="end" if self.reads_context else "start")
        index: dict[Any, int] = {label: i for i, label in enumerate(self.labels)}
        if self.exposure:
            index[self.out_of_scope] = len(self.labels)
        return Examples.build(encoded, [index.get(row.values.get("label"), IGNORED) for row in rows])

    def build_model(self, base: BaseModel, section: ModelSection, tokenizer: Any, seed: int) -> nn.Module:
        """The base with a new classification head, in float32."""
        return build_classifier(base, self.labels, section, seed=seed)

    def build_shape(self, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
        """The same without weights."""
        return build_classifier_shape(base, self.labels, section)

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A whole model as `save_pretrained` wrote it, or the base with a saved adapter's configuration."""
        return load_saved_classifier(folder, base)

    def start(self, model: nn.Module, train: Examples, pad_token_id: int | None) -> None:
        """Start the head at the classes' centroids."""
        start_at_centroids(model, train.take(np.flatnonzero(self.has_class(train.labels))), pad_token_id)

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Cross-entropy of each row, (B,)."""
        return self.compute_loss(model(**list_inputs(batch)).logits, batch["labels"], label_smoothing)

    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Cross-entropy of each row, (B,), from its logits (B, K); of rows of no class, that of even probabilities."""
        is_outside = labels == len(self.labels)
        known = labels.masked_fill(is_outside, IGNORED)
        losses = nn.functional.cross_entropy(logits.float(), known, reduction="none", label_smoothing=label_smoothing)
        if not self.exposure:
            return losses
        even = -logits.float().log_softmax(-1).mean(-1)
        return torch.where(is_outside, self.exposure * even, losses)

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """1 for every row, or the weight of its class: n / (K * count), or the root of that."""
        if scheme == "none":
            return np.ones(len(examples), dtype=np.float32)
        known = self.has_class(examples.labels)
        counts = np.maximum(np.bincount(examples.labels[known], minlength=len(self.labels)), 1)
        balanced = known.sum() / (len(self.labels) * counts)
        weights = np.append(np.sqrt(balanced) if scheme == "sqrt_balanced" else balanced, 1.0)
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
        """Loss, and the named metrics of uncalibrated scores, of the rows that have a class."""
        outputs, references = outputs[self.has_class(references)], references[self.has_class(references)]
        scores = apply_temperature(outputs, 1.0)
        loss = nn.functional.cross_entropy(torch.from_numpy(outputs), torch.from_numpy(references)).item()
        return {"loss": loss} | {name: compute_metric(name, references, scores) for name in names}

    def judge(self, held_out: HeldOut) -> Judgement:
        """Calibrate on validation, fit the baselines, and score validation and test."""
        pad_token_id = get_padding(held_out.model, held_out.tokenizer)
        logits = {
            name: self.compute_outputs(held_out.model, held_out.examples[name], pad_token_id).astype(np.float64)
            for name in held_out.judged
        }
        temperature, rule = self._calibrate(held_out, logits)
        baselines = self._compute_baselines(held_out)
        scored = {
            name: score_split(
                self._select_split(held_out, name, logits[name], (temperature, rule), baselines),
                held_out.section,
            )
            for name in logits
        }
        rows, references = held_out.rows["test"], held_out.examples["test"].labels
        scores = self.compute_scores(logits["test"], temperature)
        predictions = self._list_predictions(rows, references, scores)
        if rule:
            predictions["outside_score"] = compute_outside_scores(logits["test"], rule.score)
        return Judgement(
            scored=scored,
            predictions=predictions,
            mistakes=self._list_mistakes(rows, references, scores),
            settings={"temperature": temperature, "outside": asdict(rule) if rule else None},
        )

    def _calibrate(self, held_out: HeldOut, logits: Mapping[str, Outputs]) -> tuple[float, OutsideRule | None]:
        """Temperature, and what tells rows of no class: fitted on validation, or as they were."""
        if held_out.settings is not None:
            outside = held_out.settings.get("outside")
            return float(held_out.settings["temperature"]), OutsideRule(**outside) if outside else None
        references = held_out.examples["validation"].labels
        known, temperature = self.has_class(references), 1.0
        if held_out.section.calibrate == "temperature":
            temperature = fit_temperature(logits["validation"][known], references[known])
        if self.out_of_scope is None:
            return temperature, None
        return temperature, fit_outside(logits["validation"], ~known, held_out.section.outside_score)

    def _select_split(
        self,
        held_out: HeldOut,
        name: str,
        logits: Outputs,
        fitted: tuple[float, OutsideRule | None],
        baselines: Mapping[str, BaselineResult],
    ) -> ScoredSplit:
        """The rows of a split that have a class; those that have none beside them."""
        references = held_out.examples[name].labels
        known = self.has_class(references)
        rows = [row for row, is_known in zip(held_out.rows[name], known, strict=True) if is_known]
        temperature, rule = fitted
        return ScoredSplit(
            name=name,
            labels=self.labels,
            references=references[known],
            logits=logits[known].astype(np.float64),
            texts=[row.values["text"] for row in rows],
            values=[row.values for row in rows],
            temperature=temperature,
            baselines={
                baseline: BaselineResult({name: result.scores[name][known]}, result.settings)
                for baseline, result in baselines.items()
            },
            outside=self._select_outside(held_out, name, logits, rule, baselines) if rule else None,
            resampling=held_out.resample(name).take(known),
            opened=held_out.opened if name == "test" else None,
        )

    def _select_outside(
        self,
        held_out: HeldOut,
        name: str,
        logits: Outputs,
        rule: OutsideRule,
        baselines: Mapping[str, BaselineResult],
    ) -> OutsideRows:
        """How far outside each row of a split looks to the model and to the baselines."""
        fitted_on = self.has_class(held_out.examples["validation"].labels)
        return OutsideRows(
            label=self.out_of_scope or "",
            is_outside=~self.has_class(held_out.examples[name].labels),
            resampling=held_out.resample(name),
            score=rule.score,
            model=OutsideScores(compute_outside_scores(logits, rule.score), rule.threshold),
            baselines={
                baseline: OutsideScores(
                    compute_uncertainty(result.scores[name]),
                    compute_threshold(compute_uncertainty(result.scores["validation"][fitted_on])),
                )
                for baseline, result in baselines.items()
            },
        )

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {
            "type": self.type,
            "labels": self.labels,
            "values": self.values,
            "clean": list(self.clean),
            "reads_context": self.reads_context,
            "out_of_scope": self.out_of_scope,
            "exposure": self.exposure,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextClassification:
        """Inverse of `to_config`."""
        return cls(
            list(config["labels"]),
            dict(config["values"]),
            tuple(config["clean"]),
            config.get("reads_context", False),  # models saved before there were such keys lack them
            config.get("out_of_scope"),
            config.get("exposure", 0.0),
        )

    def has_class(self, references: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which rows belong to a class, (N,)."""
        return (references >= 0) & (references < len(self.labels))

    def _prepare_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        label = values.get("label")
        prepared: dict[str, Any] = {"text": clean_text(values["text"], self.clean)}
        if label is not None:
            known = (*self.labels, self.out_of_scope)
            prepared["label"] = label if label in known else self.values.get(label, label)
        return prepared

    def _compute_baselines(self, held_out: HeldOut) -> dict[str, BaselineResult]:
        """Fit the recipe's baselines on train, tune them on validation, and score both held-out splits."""
        taught = np.flatnonzero(self.has_class(held_out.examples["train"].labels))  # the others have no class to fit
        rows = {**held_out.rows, "train": [held_out.rows["train"][i] for i in taught]}
        examples = {**held_out.examples, "train": held_out.examples["train"].take(taught)}
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
                texts=[read_question(row, self.reads_context) for row in rows[name]],
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
            "reference": [
                self.labels[i] if has else self.out_of_scope
                for i, has in zip(references, self.has_class(references), strict=True)
            ],
            "prediction": [self.labels[i] for i in scores.argmax(axis=1)],
        } | {f"score_{label}": scores[:, i] for i, label in enumerate(self.labels)}

    def _list_mistakes(
        self, rows: Sequence[Row], references: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]
    ) -> list[dict[str, Any]]:
        predictions, confidences = scores.argmax(axis=1), scores.max(axis=1)
        wrong = np.flatnonzero((predictions != references) & self.has_class(references))
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


def _check_classes(classes: Sequence[str], count: int, section: TaskSection) -> None:
    """Refuse values of a label column that nobody would call classes.

    Args:
        classes: its values.
        count: rows that have one.
        section: which column that is.
    """
    if is_fraction := all(map(_is_number, classes)) and not all(float(label).is_integer() for label in classes):
        got = "numbers with fractions"
    elif len(classes) > max(count / 2, FEW_CLASSES):
        got = "an id or free text"
    else:
        return
    values = ", ".join(map(repr, classes[:3]))
    out = "Regression is not offered: choose" if is_fraction else "Choose"
    raise DataError(
        f"{section.data}: column {section.columns.get('label', 'label')!r} must hold a class for each row, got"
        f" {len(classes):,} different values in {count:,} rows ({values}, ...), which look like {got}. {out} another"
        " column as label. If they are classes, list them in tasks.<name>.labels."
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
