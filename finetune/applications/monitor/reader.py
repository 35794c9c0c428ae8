"""A finished run as the monitor's reader: tone and topic of many texts from one pass through one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from finetune.applications.monitor.records import ALL_TOPICS, Reading
from finetune.artifact.load import list_predictors, load
from finetune.artifact.predictor import MultiPredictor, Predictor
from finetune.artifact.run_folder import RunFolder
from finetune.artifact.saved import compute_model_fingerprint
from finetune.data.rows import Row
from finetune.errors import UsageError
from finetune.recipe.applications import MonitorSection

Scores = npt.NDArray[np.float64]


class TrainedReader:
    """What a trained model says of texts; see `Reader`.

    Args:
        loaded: the model.
        section: which of its tasks and classes are watched.
        fingerprint: of the model.
    """

    def __init__(self, loaded: Predictor | MultiPredictor, section: MonitorSection, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._loaded, self._section = loaded, section
        predictors = list_predictors(loaded, [section.sentiment])
        self._sentiments = predictors[section.sentiment].labels
        self._negative = self._sentiments.index(section.negative)
        self._topics = [ALL_TOPICS] if section.topic is None else predictors[section.topic].labels

    @property
    def topics(self) -> Sequence[str]:
        """The classes of the topic task; `ALL_TOPICS` alone without one."""
        return self._topics

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """Tone and topic of texts, in order, any number: the longest are computed first, together."""
        if not texts:
            return []
        scores = self._compute_scores(texts)
        sentiment = scores[self._section.sentiment]
        topic = np.zeros(len(texts), dtype=np.int64)
        if self._section.topic is not None:
            topic = scores[self._section.topic].argmax(axis=1)
        return [
            Reading(self._topics[place], self._sentiments[called], negative)
            for place, called, negative in zip(
                topic.tolist(), sentiment.argmax(axis=1).tolist(), sentiment[:, self._negative].tolist(), strict=True
            )
        ]

    def name_labels(self, task: str, rows: Sequence[Row]) -> dict[str, str | None]:
        """Row id -> its true class, as the task names it; None where a row has none."""
        predictor = list_predictors(self._loaded, [task])[task]
        return {row.id: row.values.get("label") for row in predictor.task.prepare_rows(rows)}

    def _compute_scores(self, texts: Sequence[str]) -> Mapping[str, Scores]:
        """Task -> calibrated probabilities, (N, K)."""
        scores = self._loaded.compute_scores(texts)
        return scores if isinstance(scores, dict) else {self._section.sentiment: scores}


def build_reader(run: RunFolder, section: MonitorSection, engine: str | None = None) -> TrainedReader:
    """The trained model of a run as the monitor's reader.

    Args:
        run: finished.
        section: of its recipe.
        engine: the format of an export of it that answers in its place; what was fitted stays that of the run.

    Raises:
        UsageError: the model has no such task or class; no such export.
        ModelError: a damaged model, or a base that is not at hand.
    """
    loaded = load(run.path, engine=engine)
    classes = list_predictors(loaded, [section.sentiment])[section.sentiment].labels
    if section.negative not in classes:
        raise UsageError(
            f"{run.path}: monitor.negative must be a class of task {section.sentiment!r} ({', '.join(classes)}), got "
            f"{section.negative!r}. Correct the recipe, and train again."
        )
    return TrainedReader(loaded, section, compute_model_fingerprint(run.model))
