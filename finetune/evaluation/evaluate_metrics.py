"""The metrics of `metrics.py` as classes of Hugging Face's `evaluate`, for people who compose metrics with it."""

from __future__ import annotations

from typing import Any

import evaluate
import numpy as np
import numpy.typing as npt
from evaluate.module import Features, Value  # the names that `evaluate.Metric` is declared with
from evaluate.module import Sequence as ListOf

from finetune.evaluation.metrics import METRICS, compute_per_class


class _LabelMetric(evaluate.Metric):  # type: ignore[misc]  # `evaluate` has no type information
    """Base of the metrics below: `compute(predictions=..., references=...)`, or `scores=` in place of predictions."""

    key: str

    def _info(self) -> evaluate.MetricInfo:
        needs, formula = self._describe()
        value = Value("int64") if needs == "predictions" else ListOf(Value("float64"))
        return evaluate.MetricInfo(
            description=formula,
            citation="",
            inputs_description=f"{needs}: of each row; references: labels in 0..K-1.",
            features=Features({needs: value, "references": Value("int64")}),
        )

    def _describe(self) -> tuple[str, str]:
        return METRICS[self.key].needs, METRICS[self.key].formula

    def _compute(self, *, references: npt.ArrayLike, **given: npt.ArrayLike) -> dict[str, Any]:
        info = METRICS[self.key]
        return {self.key: float(info.compute(np.asarray(references), np.asarray(given[info.needs])))}


class Accuracy(_LabelMetric):
    """Share of right rows."""

    key = "accuracy"


class MacroF1(_LabelMetric):
    """Mean F1 of the classes."""

    key = "macro_f1"


class WeightedF1(_LabelMetric):
    """Mean F1 of the classes, by support."""

    key = "weighted_f1"


class Mcc(_LabelMetric):
    """Matthews correlation."""

    key = "mcc"


class Auroc(_LabelMetric):
    """Area under the ROC curve; `scores=` (N, K)."""

    key = "auroc"


class Ece(_LabelMetric):
    """Expected calibration error; `scores=` (N, K)."""

    key = "ece"


class Brier(_LabelMetric):
    """Multiclass Brier score; `scores=` (N, K)."""

    key = "brier"


class LogLoss(_LabelMetric):
    """Cross-entropy; `scores=` (N, K)."""

    key = "log_loss"


class PerClassF1(_LabelMetric):
    """F1 of each class, a list; reported for every run, so it is no name for a recipe."""

    key = "per_class"

    def _describe(self) -> tuple[str, str]:
        return "predictions", "2 tp / (2 tp + fp + fn) of each class"

    def _compute(self, *, references: npt.ArrayLike, **given: npt.ArrayLike) -> dict[str, Any]:
        labels, predictions = np.asarray(references), np.asarray(given["predictions"])
        n_labels = int(np.max([labels, predictions])) + 1
        return {self.key: [values["f1"] for values in compute_per_class(labels, predictions, n_labels)]}
