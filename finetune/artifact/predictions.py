"""What a run said about each row of its test split, and its metrics on resamples of those rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from finetune.artifact.run_folder import RunFolder, load_json
from finetune.data.files import quote_reason
from finetune.errors import UsageError
from finetune.evaluation.corpus_metrics import (
    CORPUS_METRICS,
    LIKELIHOOD_WIDTH,
    Floats,
    compute_rank_statistics,
    compute_text_statistics,
)
from finetune.evaluation.corpus_scoring import compute_corpus_estimates
from finetune.evaluation.intervals import Estimate, Resampling, compute_estimates
from finetune.evaluation.metrics import METRICS, OUTSIDE_METRICS
from finetune.evaluation.outside import OutsideScores, compute_outside_estimates
from finetune.evaluation.recommending import average_by_person

SCORE = "score_"
"""What stands before a class in the name of the column with its scores."""
PERSON = "user"
"""The column of whose request a row is, where scores are means over people."""
GROUP = "group"
"""The column of the number of a row's group, where rows were split by group."""
COLUMNS = {"texts": "prediction", "ranks": "places", "likelihood": "nats"}
"""What a metric without classes needs -> a column that tells whether it is there."""


@dataclass(frozen=True)
class Predictions:
    """The test rows of a finished run, in the order of their keys, and what the run said about them."""

    run: RunFolder
    test: Mapping[str, Any]
    """The content of evaluation/test.json."""
    columns: Mapping[str, Sequence[Any]]

    @property
    def keys(self) -> list[tuple[Any, ...]]:
        """What makes a row the same in two runs: its id and its truth; text and tokens where the model is scored by
        token, whose rows have no id."""
        names = ("id", "reference") if "id" in self.columns else ("text", "tokens")
        rows = zip(*(self.columns[name] for name in names), strict=True)
        return [tuple(tuple(value) if isinstance(value, list) else value for value in row) for row in rows]

    @property
    def count(self) -> int:
        """What a resample draws from: rows, or the people whose requests they are."""
        return len(set(self.columns[PERSON])) if PERSON in self.columns else len(self.keys)

    @property
    def labels(self) -> list[str]:
        """The classes that it is judged by, sorted; none of a task without classes. A row of another label counts in no
        score of the classes."""
        return sorted(self.test.get("labels", ()))

    @property
    def metrics(self) -> list[str]:
        """The metrics of the run that can be computed again from its predictions, the headline first."""
        return [name for name in self.test["metrics"] if self._can_compute(name)]

    def resample(self, resamples: int, seed: int) -> Resampling:
        """How its rows are drawn again; for runs that are compared, the first one's says it for all."""
        return Resampling(resamples, seed, np.array(self.columns[GROUP]) if GROUP in self.columns else None)

    def compute_estimates(self, names: Sequence[str], resampling: Resampling) -> dict[str, Estimate]:
        """Value and resampled values of each metric."""
        if self._is_classifier:
            labels = list(self.test["labels"])
            index = {label: i for i, label in enumerate(labels)}
            found = np.array([index.get(label, -1) for label in self.columns["reference"]], dtype=np.int64)
            known = found >= 0  # the others belong to no class
            scores = np.column_stack([self.columns[f"{SCORE}{label}"] for label in labels]).astype(np.float64)
            own = [name for name in names if name not in OUTSIDE_METRICS]
            estimates = compute_estimates(found[known], scores[known], own, resampling=resampling.take(known))
            if len(own) < len(names):
                estimates |= compute_outside_estimates(~known, self._read_outside_scores(), resampling)
            return {name: estimates[name] for name in names}
        if PERSON in self.columns:
            _, person = np.unique(self.columns[PERSON], return_inverse=True)
            tables = average_by_person(self.columns["places"], person, names)
        else:
            tables = {name: self._build_table(name) for name in names}
        return compute_corpus_estimates(tables, resampling)

    @property
    def _is_classifier(self) -> bool:
        return "labels" in self.test

    def _can_compute(self, name: str) -> bool:
        if self._is_classifier:
            return name in METRICS or (name in OUTSIDE_METRICS and "outside_score" in self.columns)
        metric = CORPUS_METRICS.get(name)
        # The file holds no bytes of the rows.
        return metric is not None and COLUMNS[metric.needs] in self.columns and name != "bits_per_byte"

    def _read_outside_scores(self) -> OutsideScores:
        scores = np.array(self.columns["outside_score"], dtype=np.float64)
        return OutsideScores(scores, float(self.test["outside"]["threshold"]))

    def _build_table(self, name: str) -> Floats:
        """Statistics of each row for a metric of a language task, (N, S)."""
        if CORPUS_METRICS[name].needs == "ranks":
            return compute_rank_statistics(name, self.columns["places"])
        if CORPUS_METRICS[name].needs == "texts":
            return compute_text_statistics(name, self.columns["prediction"], self.columns["reference"])
        table = np.zeros((len(self.columns["nats"]), LIKELIHOOD_WIDTH))
        for place, column in enumerate(("nats", "tokens", "right")):
            table[:, place] = self.columns[column]
        return table


def load_predictions(run: RunFolder, task: str | None = None) -> Predictions:
    """Read what a finished run said about its test split, rows in the order of their ids.

    Args:
        run: its folder.
        task: whose test split; needed where the run has several tasks.

    Raises:
        UsageError: the run has no predictions, no such task, or several and none was named.
    """
    place = run.evaluation
    if task is not None or not (place / "predictions.parquet").exists():
        place = _find_place(run, task)
    path = place / "predictions.parquet"
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        must = "must be the predictions of a finished run"
        raise UsageError(f"{path}: {must}, got {quote_reason(error)}. Restore it, or use another run.") from error
    columns = table.to_pydict()
    if "id" in columns:  # two runs may have split the rows in another order
        order = sorted(range(table.num_rows), key=lambda row: columns["id"][row])
        columns = {name: [values[row] for row in order] for name, values in columns.items()}
    return Predictions(run, load_json(place / "test.json"), columns)


def _find_place(run: RunFolder, task: str | None) -> Path:
    places = run.evaluations() if (run.data / "ids.json").exists() else {}
    if task is None and len(places) > 1:
        raise UsageError(f"{run.path}: must come with one of its tasks, {', '.join(places)}. Write RUN:TASK.")
    if task is not None and task not in places:
        raise UsageError(f"{run.path}: must have the task, {', '.join(places)}, got {task!r}.")
    return places[task] if task else run.evaluation
