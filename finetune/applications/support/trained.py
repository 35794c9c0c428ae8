"""A finished run as the assistant's reader: three heads on one base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune.applications.support.reader import Floats, Reading
from finetune.artifact.run_folder import RunFolder
from finetune.errors import UsageError
from finetune.recipe.applications import ASSISTANT_TYPES

if TYPE_CHECKING:
    from finetune.artifact.predictor import MultiPredictor


class TrainedReader:
    """What a trained model says; see `Reader`.

    Args:
        loaded: the model.
        names: task type -> the task's name.
        fingerprint: of the model.
    """

    def __init__(self, loaded: MultiPredictor, names: dict[str, str], fingerprint: str) -> None:
        self._loaded, self.fingerprint = loaded, fingerprint
        self._intent, self._answer, self._rerank = (names[shape] for shape in ASSISTANT_TYPES)

    @property
    def intents(self) -> Sequence[str]:
        """The classes of the intent task."""
        return self._loaded[self._intent].labels

    def read(self, text: str, context: str) -> Reading:
        """Intent, scope and features from one pass through the base."""
        outputs = self._loaded.read(text, context)
        predictor = self._loaded[self._intent]
        (prediction,) = predictor.build_predictions(outputs[self._intent])
        scores = np.array([prediction.scores[name] for name in predictor.labels], dtype=np.float32)
        # Without a fit on rows out of scope the largest probability is all that is known of it.
        outside = 1 - prediction.confidence if prediction.outside is None else prediction.outside
        return Reading(scores, outside, outputs[self._answer][0].astype(np.float32))

    def embed(self, passages: Sequence[str]) -> Floats:
        """Features of passages."""
        return self._loaded[self._answer].embed(passages, entries=True)

    def rerank(self, text: str, context: str, passages: Sequence[str]) -> Floats:
        """The probability that each passage answers."""
        return self._loaded[self._rerank].score_pairs(text, passages, context).astype(np.float32)


def build_reader(run: RunFolder, engine: str | None = None) -> TrainedReader:
    """The trained model of a run as the assistant's reader.

    Args:
        run: finished.
        engine: the format of an export of it that answers in its place; its index and threshold stay those of the run.

    Raises:
        UsageError: the run has not the three tasks that an assistant stands on; no such export.
        ModelError: a damaged model, or a base that is not at hand.
    """
    from finetune.artifact.load import load
    from finetune.artifact.predictor import MultiPredictor
    from finetune.artifact.saved import compute_model_fingerprint

    loaded = load(run.path, engine=engine)
    types = {task.type: name for name, task in loaded.task.tasks.items()} if isinstance(loaded, MultiPredictor) else {}
    if not isinstance(loaded, MultiPredictor) or set(types) != set(ASSISTANT_TYPES):
        raise UsageError(
            f"{run.path}: must have the tasks of an assistant ({', '.join(ASSISTANT_TYPES)}), got "
            f"{', '.join(types) or loaded.task.type}. Train one: finetune run support"
        )
    return TrainedReader(loaded, types, compute_model_fingerprint(run.model))
