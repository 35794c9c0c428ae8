"""Load a finished model and predict with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.adapters.attach import load_adapter, merge_adapter
from finetune.artifact.saved import Saved, open_saved
from finetune.data.batches import Examples
from finetune.data.rows import Row
from finetune.errors import UsageError
from finetune.models.base import resolve_base
from finetune.models.classifier import get_padding
from finetune.models.generation import generate_texts, stream_text
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import GenerateSection
from finetune.tasks import Task, TextClassification

WRITING = ("causal_lm", "seq2seq")
"""Task types whose models write text."""
USE_AS_BASE = "It is a base for other recipes: set model.base to this run, and train a task on it."


@dataclass(frozen=True)
class Prediction:
    """The answer for one text.

    Args:
        label: the most likely class.
        confidence: its calibrated probability.
        scores: class -> calibrated probability.
    """

    label: str
    confidence: float
    scores: dict[str, float]


def build_prediction(labels: Sequence[str], scores: npt.NDArray[np.float64]) -> Prediction:
    """The answer that a row of scores, (K,), means."""
    return Prediction(
        label=labels[int(scores.argmax())],
        confidence=float(scores.max()),
        scores={label: float(score) for label, score in zip(labels, scores, strict=True)},
    )


@dataclass(frozen=True)
class Predictor:
    """A model ready to answer.

    Args:
        model: in evaluation mode, on the best device.
        tokenizer: the base's.
        task: labels and text cleaning.
        temperature: fitted on validation; 1 where not calibrated.
        max_length: tokens after which a text is cut.
        writing: how text is written, where the task writes text.
    """

    model: nn.Module
    tokenizer: Any
    task: Task
    temperature: float
    max_length: int
    writing: GenerateSection = field(default_factory=GenerateSection)

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of the logits; UsageError where the task gives none."""
        return self._classify().labels

    def predict(self, texts: Sequence[str], *, advance: Callable[[int], None] = lambda _rows: None) -> list[Prediction]:
        """Score texts, in order.

        Args:
            texts: any number, as they come; the cleaning of the recipe is applied.
            advance: called with the number of texts after each batch.
        """
        if isinstance(texts, str):
            raise UsageError("predict: texts must be a list of texts, got one text. Write predict([text]).")
        return [build_prediction(self.labels, row) for row in self.compute_scores(texts, advance=advance)]

    def compute_scores(
        self, texts: Sequence[str], *, advance: Callable[[int], None] = lambda _rows: None
    ) -> npt.NDArray[np.float64]:
        """Calibrated probabilities, (N, K)."""
        return self._classify().compute_scores(self.compute_logits(self._clean(texts), advance), self.temperature)

    def compute_logits(
        self, rows: Sequence[Row], advance: Callable[[int], None] = lambda _rows: None
    ) -> npt.NDArray[np.float32]:
        """Raw outputs of a classifier for prepared rows, (N, K)."""
        examples = self._classify().build_examples(rows, self.tokenizer, self.max_length)
        return compute_logits(self.model, examples, get_padding(self.model, self.tokenizer), advance=advance)

    def encode(self, texts: Sequence[str]) -> Examples:
        """Texts as the classifier reads them."""
        return self._classify().build_examples(self._clean(texts), self.tokenizer, self.max_length)

    def generate(
        self,
        texts: Sequence[str],
        section: GenerateSection | None = None,
        *,
        seed: int = 0,
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> list[str]:
        """Translate texts, or go on with them.

        Args:
            texts: any number, as they come; the cleaning of the recipe is applied.
            section: how tokens are chosen; default the recipe's `evaluate.generate`.
            seed: of the sampling.
            advance: called with the number of texts after each batch.
        """
        if isinstance(texts, str):
            raise UsageError("generate: texts must be a list of texts, got one text. Write generate([text]).")
        return generate_texts(
            self.model,
            self.tokenizer,
            self._prepare_prompts(texts),
            section or self.writing,
            kind=self.task.type,
            max_length=self.max_length,
            seed=seed,
            advance=advance,
        )

    def stream(
        self, text: str, emit: Callable[[str], None], section: GenerateSection | None = None, *, seed: int = 0
    ) -> None:
        """Hand on what `generate` writes to one text piece by piece, as it comes.

        Args:
            text: as it comes; the cleaning of the recipe is applied.
            emit: takes each piece. What it raises ends the writing.
            section, seed: as in `generate`.
        """
        (prompt,) = self._prepare_prompts([text])
        stream_text(
            self.model,
            self.tokenizer,
            prompt,
            section or self.writing,
            emit,
            kind=self.task.type,
            max_length=self.max_length,
            seed=seed,
        )

    def check_writes(self) -> None:
        """Raise UsageError unless the task writes text."""
        if self.task.type not in WRITING:
            raise UsageError(
                f"generate: must get a run that writes text ({', '.join(WRITING)}), got {self.task.type}. "
                + ("Use finetune predict." if isinstance(self.task, TextClassification) else USE_AS_BASE)
            )

    def _prepare_prompts(self, texts: Sequence[str]) -> list[str]:
        """Cleaned texts; one that goes on with nothing begins where one does in training: behind what separates two."""
        self.check_writes()
        beginning = getattr(self.task, "separator", None) or ""
        return [row.values["text"] or beginning for row in self._clean(texts)]

    def _clean(self, texts: Sequence[str]) -> list[Row]:
        """The rows that a task makes of texts."""
        rows = [Row(id=str(i), split=None, number=i, values={"text": text}) for i, text in enumerate(texts, start=1)]
        return self.task.prepare_rows(rows)

    def _classify(self) -> TextClassification:
        """The task; UsageError unless it gives labels."""
        if isinstance(self.task, TextClassification):
            return self.task
        raise UsageError(
            f"predict: must get a run that gives labels, got {self.task.type}. "
            + ("Use finetune generate." if self.task.type in WRITING else USE_AS_BASE)
        )


def load(reference: str | Path) -> Predictor:
    """Load a run (`runs/name`, its latest finished one), or a `model/` folder.

    Raises:
        UsageError: no such run, or a folder of a newer toolkit.
        ModelError: a damaged folder, or the base that an adapter needs is not at hand.
    """
    saved = open_saved(reference)
    if saved.base is None:
        model = saved.task.load_model(saved.folder)
    else:
        model = saved.task.load_model(saved.folder, resolve_base(saved.base))
        # Merged: one product a layer instead of three, and the same logits (tests/parity).
        model = merge_adapter(load_adapter(model, saved.folder))
    return build_predictor(saved, model.eval().requires_grad_(False).to(choose_device()))


def build_predictor(saved: Saved, model: nn.Module) -> Predictor:
    """All but the weights comes from the model's folder."""
    from transformers import AutoTokenizer

    return Predictor(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(saved.folder, trust_remote_code=False),
        task=saved.task,
        temperature=saved.settings["temperature"],
        max_length=saved.settings["max_length"],
        writing=GenerateSection(**saved.settings.get("generate", {})),
    )


def choose_device() -> str:
    """Where predictions are computed."""
    return "cuda" if torch.cuda.is_available() else "cpu"
