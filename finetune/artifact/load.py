"""Load a finished model and predict with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.adapters.attach import load_adapter, merge_adapter, read_adapter_base
from finetune.artifact.run_folder import find_run, load_json
from finetune.artifact.save import FORMAT, SETTINGS
from finetune.data.rows import Row
from finetune.errors import ModelError, UsageError
from finetune.models.base import resolve_base
from finetune.models.classifier import get_padding
from finetune.models.generation import generate_texts, stream_text
from finetune.models.multi_task import OneHead
from finetune.models.prediction import compute_logits
from finetune.recipe.files import compute_sha256
from finetune.recipe.schema import GenerateSection
from finetune.tasks import MultiTask, Task, TextClassification, load_task

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
        check_texts(texts)
        return self.list_predictions(self.compute_scores(texts, advance=advance))

    def list_predictions(self, scores: npt.NDArray[np.float64]) -> list[Prediction]:
        """The likeliest class of each row of calibrated probabilities, (N, K)."""
        labels = self.labels
        return [
            Prediction(
                label=labels[int(row.argmax())],
                confidence=float(row.max()),
                scores={label: float(score) for label, score in zip(labels, row, strict=True)},
            )
            for row in scores
        ]

    def compute_scores(
        self, texts: Sequence[str], *, advance: Callable[[int], None] = lambda _rows: None
    ) -> npt.NDArray[np.float64]:
        """Calibrated probabilities, (N, K)."""
        task = self._classify()
        return task.compute_scores(
            self.compute_logits(task.prepare_rows(_build_rows(texts)), advance), self.temperature
        )

    def compute_logits(
        self, rows: Sequence[Row], advance: Callable[[int], None] = lambda _rows: None
    ) -> npt.NDArray[np.float32]:
        """Raw outputs of a classifier for prepared rows, (N, K)."""
        examples = self._classify().build_examples(rows, self.tokenizer, self.max_length)
        return compute_logits(self.model, examples, get_padding(self.model, self.tokenizer), advance=advance)

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

    def _prepare_prompts(self, texts: Sequence[str]) -> list[str]:
        """Cleaned texts; one that goes on with nothing begins where one does in training: behind what separates two."""
        _check_writes(self.task)
        rows = _build_rows(texts)
        beginning = getattr(self.task, "separator", None) or ""
        return [row.values["text"] or beginning for row in self.task.prepare_rows(rows)]

    def _classify(self) -> TextClassification:
        """The task; UsageError unless it gives labels."""
        if isinstance(self.task, TextClassification):
            return self.task
        raise UsageError(
            f"predict: must get a run that gives labels, got {self.task.type}. "
            + ("Use finetune generate." if self.task.type in WRITING else USE_AS_BASE)
        )


@dataclass(frozen=True)
class MultiPredictor:
    """A model with several heads: one pass through the base answers for every task.

    Args:
        model: in evaluation mode, on the best device.
        task: the tasks on it.
        predictors: task name -> what answers for that task alone.
    """

    model: nn.Module
    task: MultiTask
    predictors: Mapping[str, Predictor]

    def __getitem__(self, name: str) -> Predictor:
        """The predictor of one task."""
        if name not in self.predictors:
            raise UsageError(f"task: must be one of {', '.join(self.predictors)}, got {name!r}.")
        return self.predictors[name]

    def predict(
        self, texts: Sequence[str], *, advance: Callable[[int], None] = lambda _rows: None
    ) -> dict[str, list[Prediction]]:
        """Score texts, in order.

        Args:
            texts, advance: as in `Predictor.predict`.

        Returns:
            Task name -> a prediction for each text.
        """
        check_texts(texts)
        return {
            name: self[name].list_predictions(scores)
            for name, scores in self.compute_scores(texts, advance=advance).items()
        }

    def compute_scores(
        self, texts: Sequence[str], *, advance: Callable[[int], None] = lambda _rows: None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Task name -> calibrated probabilities, (N, K). Texts are cleaned once if the tasks agree how."""
        tasks = self.task.tasks
        first, predictor = next((task, self.predictors[name]) for name, task in tasks.items())
        if any(task.clean != first.clean for task in tasks.values()):
            return {name: part.compute_scores(texts, advance=advance) for name, part in self.predictors.items()}
        rows = first.prepare_rows(_build_rows(texts))
        examples = first.build_examples(rows, predictor.tokenizer, predictor.max_length)
        pad_token_id = get_padding(self.model, predictor.tokenizer)
        outputs = self.task.compute_outputs(self.model, examples, pad_token_id, advance=advance)
        return {
            name: tasks[name].compute_scores(logits, self.predictors[name].temperature)
            for name, logits in self.task.split_outputs(outputs)
        }


def check_texts(texts: Sequence[str]) -> None:
    """Raise UsageError for one text in place of a list."""
    if isinstance(texts, str):
        raise UsageError("predict: texts must be a list of texts, got one text. Write predict([text]).")


def load_writer(reference: str | Path) -> Predictor:
    """Load a run that writes text.

    Raises:
        UsageError: it gives something else; and as `load`.
    """
    loaded = load(reference)
    _check_writes(loaded.task)
    assert isinstance(loaded, Predictor)  # several tasks write no text
    return loaded


def _check_writes(task: Task | MultiTask) -> None:
    """Raise UsageError unless the task writes text."""
    if task.type not in WRITING:
        gives_labels = isinstance(task, TextClassification | MultiTask)
        raise UsageError(
            f"generate: must get a run that writes text ({', '.join(WRITING)}), got {task.type}. "
            + ("Use finetune predict." if gives_labels else USE_AS_BASE)
        )


def list_predictors(loaded: Predictor | MultiPredictor, names: Sequence[str] = ()) -> dict[str, Predictor]:
    """Task name -> predictor, also of a run with one task, which keeps no name: then that of `names`."""
    if isinstance(loaded, MultiPredictor):
        return dict(loaded.predictors)
    return dict.fromkeys(names, loaded)


def load(reference: str | Path) -> Predictor | MultiPredictor:
    """Load a run (`runs/name`, its latest finished one), or a `model/` folder.

    Returns:
        A `MultiPredictor` where the run has several tasks.

    Raises:
        UsageError: no such run, or a folder of a newer toolkit.
        ModelError: a damaged folder, or the base that an adapter needs is not at hand.
    """
    from transformers import AutoTokenizer

    folder = Path(reference)
    if not (folder / SETTINGS).exists():
        folder = find_run(reference).model
    settings = load_json(folder / SETTINGS)
    if settings.get("format") != FORMAT:
        raise UsageError(
            f"{folder}: must be in format {FORMAT}, got {settings.get('format')}. "
            "Update the toolkit: pip install -U finetune-toolkit"
        )
    _check_files(folder, settings.get("files", {}))
    task = load_task(settings["task"])
    base = read_adapter_base(folder)
    if base is None:
        model = task.load_model(folder)
    else:
        model = task.load_model(folder, resolve_base(base))
        # Merged: one product a layer instead of three, and the same logits (tests/parity).
        model = merge_adapter(load_adapter(model, folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().requires_grad_(False).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if isinstance(task, MultiTask):
        predictors = {
            name: Predictor(
                model=OneHead(model, name).eval(),
                tokenizer=tokenizer,
                task=part,
                temperature=settings["temperatures"][name],
                max_length=settings["max_length"],
            )
            for name, part in task.tasks.items()
        }
        return MultiPredictor(model, task, predictors)
    return Predictor(
        model=model,
        tokenizer=tokenizer,
        task=task,
        temperature=settings["temperature"],
        max_length=settings["max_length"],
        writing=GenerateSection(**settings.get("generate", {})),
    )


def _build_rows(texts: Sequence[str]) -> list[Row]:
    return [Row(id=str(i), split=None, number=i, values={"text": text}) for i, text in enumerate(texts, start=1)]


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compare each file with its sha256 from the time it was saved."""
    for name, sha256 in files.items():
        path = folder / name
        found = compute_sha256(path) if path.is_file() else "no file"
        if found != sha256:
            raise ModelError(
                f"{path}: must be as it was saved (sha256 {sha256[:12]}), got {found[:12]}. Get the folder again; "
                f"if you changed it on purpose, take its line out of `files` in {SETTINGS}."
            )
