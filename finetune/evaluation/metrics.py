"""The metrics of a classifier, over scikit-learn, by name.

Shapes: references (N,), labels in 0..K-1; predictions (N,), the same; scores (N, K), probabilities: rows sum to 1.
A metric that is not defined on its input (no rows, one class only for AUROC, scores that are not finite) is nan.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from finetune.errors import RecipeError
from finetune.evaluation.corpus_metrics import CORPUS_METRICS

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ECE_BINS = 15  # the number in arXiv:1706.04599, section 5
HUB_NAMESPACE = (
    "evaluate-metric"  # `evaluate`'s own metrics; a bare name would also run a script found in the working folder
)

logger = logging.getLogger(__name__)


def compute_predictions(scores: npt.ArrayLike) -> Ints:
    """The class with the highest score, (N, K) -> (N,); the first of equals."""
    predictions: Ints = np.asarray(scores).argmax(axis=1)
    return predictions


def compute_bins(confidences: Floats, bins: int = ECE_BINS) -> Ints:
    """Bin of each confidence in [0, 1], (N,): equal widths, (b / bins, (b + 1) / bins], the first with its 0."""
    inner_edges = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    return np.searchsorted(inner_edges, confidences, side="left").astype(np.int64)


def compute_brier_rows(references: Ints, scores: Floats) -> Floats:
    """Squared distance of each row's scores from its one-hot reference, in [0, 2], (N,)."""
    distances = scores.copy()
    distances[np.arange(len(references)), references] -= 1.0
    squares: Floats = np.square(distances).sum(axis=1)
    return squares


def compute_log_loss_rows(references: Ints, scores: Floats) -> Floats:
    """Minus the log of the reference's score, (N,); scores are at least float64's epsilon, as in scikit-learn."""
    eps = np.finfo(np.float64).eps
    return -np.log(np.clip(scores[np.arange(len(references)), references], eps, 1.0))


def compute_ece_rows(references: Ints, scores: Floats) -> tuple[Ints, Floats]:
    """Bin of each row (N,), and right (1 or 0) minus confidence (N,); ECE = sum over bins of |sum| / N."""
    confidences = scores.max(axis=1)
    return compute_bins(confidences), (compute_predictions(scores) == references) - confidences


def _sklearn() -> Any:
    """scikit-learn's metrics, imported late: `finetune check` can do without the second that this takes."""
    import sklearn.metrics

    return sklearn.metrics


def _accuracy(references: Ints, predictions: Ints) -> float:
    return float(_sklearn().accuracy_score(references, predictions))


def _macro_f1(references: Ints, predictions: Ints) -> float:
    return float(_sklearn().f1_score(references, predictions, average="macro", zero_division=0))


def _weighted_f1(references: Ints, predictions: Ints) -> float:
    return float(_sklearn().f1_score(references, predictions, average="weighted", zero_division=0))


def _mcc(references: Ints, predictions: Ints) -> float:
    if np.union1d(references, predictions).size < 2:
        return 0.0  # what scikit-learn returns too, but with a warning for each resample
    return float(_sklearn().matthews_corrcoef(references, predictions))


def _auroc(references: Ints, scores: Floats) -> float:
    values = [
        _sklearn().roc_auc_score(references == label, scores[:, label])
        for label in auroc_labels(scores.shape[1])
        if 0 < np.count_nonzero(references == label) < len(references)
    ]
    return float(np.mean(values)) if values else float("nan")


def auroc_labels(n_labels: int) -> list[int]:
    """Classes that are ranked against the rest: class 1 when there are two, otherwise each."""
    return [1] if n_labels == 2 else list(range(n_labels))


def _ece(references: Ints, scores: Floats) -> float:
    bins, gaps = compute_ece_rows(references, scores)
    return float(np.abs(np.bincount(bins, weights=gaps)).sum() / len(references))


def _brier(references: Ints, scores: Floats) -> float:
    return float(compute_brier_rows(references, scores).mean())


def _log_loss(references: Ints, scores: Floats) -> float:
    return float(compute_log_loss_rows(references, scores).mean())


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """One metric that a recipe can name."""

    name: str
    needs: Literal["predictions", "scores"]
    larger_is_better: bool
    formula: str
    """One line: the formula and where it comes from."""
    compute: Callable[[Ints, Any], float]
    """(references, predictions or scores) -> value."""


METRICS: dict[str, MetricInfo] = {
    info.name: info
    for info in (
        MetricInfo("accuracy", "predictions", True, "right rows / rows", _accuracy),
        MetricInfo(
            "macro_f1",
            "predictions",
            True,
            "mean of 2 tp / (2 tp + fp + fn) over the classes that occur in references or predictions",
            _macro_f1,
        ),
        MetricInfo("weighted_f1", "predictions", True, "F1 of each class weighted by its references", _weighted_f1),
        MetricInfo("mcc", "predictions", True, "correlation of references and predictions (Gorodkin 2004)", _mcc),
        MetricInfo(
            "auroc",
            "scores",
            True,
            "chance that a row of the class outranks another row; two classes: the second, more: mean one-vs-rest",
            _auroc,
        ),
        MetricInfo(
            "ece",
            "scores",
            False,
            "sum over 15 equal-width bins of share x |accuracy - confidence| of the top label (arXiv:1706.04599)",
            _ece,
        ),
        MetricInfo("brier", "scores", False, "mean squared distance from the one-hot reference (Brier 1950)", _brier),
        MetricInfo("log_loss", "scores", False, "mean of -log of the reference's score", _log_loss),
    )
}


KEPT_RATIO = 0.95
"""Share of the rows with a class that are not taken for outside."""
OUTSIDE_METRICS: dict[str, str] = {
    "outside_auroc": "chance that a row of no class looks more outside than a row with one (arXiv:2010.03759)",
    "outside_recall_at_95": "share of rows of no class above the threshold that keeps 95 % of the others on validation",
}
"""Metric -> formula, of tasks with `out_of_scope`, for gates; larger is better. They look at rows that no other metric
counts, and are computed wherever there are such rows."""


@dataclass(frozen=True, slots=True)
class TaskKind:
    """What tasks that are scored alike can be scored with."""

    words: str
    """As messages call these tasks."""
    metrics: tuple[str, ...]
    baselines: tuple[str, ...]


KINDS: dict[str, TaskKind] = {
    "labels": TaskKind("tasks with class labels", tuple(METRICS), ("majority", "tfidf_logreg", "frozen_logreg")),
    "likelihood": TaskKind(
        "language models",
        ("loss", "perplexity", "bits_per_byte", "token_accuracy"),
        ("unigram", "ngram"),
    ),
    "masked": TaskKind("masked language models", ("loss", "perplexity", "token_accuracy"), ("unigram",)),
    "texts": TaskKind(
        "tasks that write a text for a text",
        ("bleu", "bleu_zh", "chrf", "loss", "perplexity", "token_accuracy"),
        ("copy", "nearest"),
    ),
    "completions": TaskKind(
        "tasks that complete a prompt",
        ("bleu", "bleu_zh", "chrf", "loss", "perplexity", "token_accuracy"),
        ("copy", "nearest", "bm25_sentence"),
    ),
    "ranking": TaskKind(
        "tasks that rank entries",
        ("mrr", "recall_at_1", "recall_at_5", "ndcg_at_10"),
        ("bm25", "frozen", "fused"),
    ),
    "next_items": TaskKind(
        "recommenders",
        ("ndcg_at_10", "recall_at_10", "mrr"),
        ("popular", "popular_week", "own_history", "item_knn", "ease", "co_occurrence"),
    ),
    "spans": TaskKind(
        "tasks that find answers in passages",
        ("answer_f1", "exact_match", "has_answer_f1", "no_answer_accuracy"),
        ("no_answer", "bm25_sentence"),
    ),
}
"""By what the metrics look at: class scores, next tokens, hidden tokens, written texts and their references (for a
text, or behind a prompt), the places of what was looked for, or answers in passages."""


def list_foreign_names(kind: str, kinds: Iterable[str]) -> set[str]:
    """Metrics and baselines that are for other kinds of a recipe's tasks and not for this one."""
    foreign = {name for other in kinds for name in (*KINDS[other].metrics, *KINDS[other].baselines)}
    return foreign - {*KINDS[kind].metrics, *KINDS[kind].baselines}


def compute_metric(name: str, references: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Value of a metric by name: one of `METRICS`, or one that `evaluate` can load (computed on predictions).

    Args:
        name: Name that `check_metric_names` accepts.
        references: Labels, (N,).
        scores: Probabilities, (N, K).

    Returns:
        The value, or nan where the metric is not defined.

    Raises:
        RecipeError: No such metric, or one of `evaluate`'s that cannot be computed from labels.
    """
    labels, probabilities = np.asarray(references, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    if not len(labels) or not np.isfinite(probabilities).all():
        return float("nan")
    info = METRICS.get(name)
    if info is None:
        return _compute_loaded(name, labels, compute_predictions(probabilities))
    return float(
        info.compute(labels, compute_predictions(probabilities) if info.needs == "predictions" else probabilities)
    )


def compute_per_class(references: Ints, predictions: Ints, n_labels: int) -> list[dict[str, float]]:
    """Precision, recall, F1 and support (references) of each of the K classes; nan where the divisor is 0."""
    columns = _sklearn().precision_recall_fscore_support(
        references, predictions, labels=range(n_labels), average=None, zero_division=np.nan
    )
    keys = ("precision", "recall", "f1", "support")
    return [dict(zip(keys, map(float, values), strict=True)) for values in zip(*columns, strict=True)]


def compute_confusion(references: Ints, predictions: Ints, n_labels: int) -> Ints:
    """Counts, (K, K): row = reference, column = prediction."""
    counts: Ints = _sklearn().confusion_matrix(references, predictions, labels=range(n_labels))
    return counts


def is_larger_better(name: str) -> bool:
    """Whether a higher value is better; taken as given for `evaluate`'s own metrics."""
    info = METRICS.get(name) or CORPUS_METRICS.get(name)
    return info is None or info.larger_is_better


def check_metric_names(
    names: Iterable[str], *, key: str = "evaluate.metrics", also: Sequence[str] = (), kind: str = "labels"
) -> None:
    """Every name must be a metric of the kind or in `also`; for class labels `evaluate` may have it too.

    Args:
        names: Names out of a recipe.
        key: The recipe's key, for the message.
        also: Further names that this key takes, such as `loss`.
        kind: Of `KINDS`.

    Raises:
        RecipeError: Lists every unknown name, with the nearest known one.
    """
    known = sorted({*KINDS[kind].metrics, *also})
    problems = []
    for name in names:
        reason = None if name in known else _explain_unknown(name, known, kind)
        if reason is not None:
            problems.append(f"{key}: must name metrics out of {', '.join(known)}, got {name!r}.{reason}")
    if problems:
        raise RecipeError("\n".join(problems))


def _explain_unknown(name: str, known: Sequence[str], kind: str) -> str | None:
    """Which tasks the metric is for, or the nearest known one; None if `evaluate` has it for class labels."""
    if name in OUTSIDE_METRICS:
        return " It comes by itself with tasks.<name>.out_of_scope; evaluate.gates may name it."
    others = [other.words for other in KINDS.values() if name in other.metrics]
    if others:
        return f" It is for {' or '.join(others)}."
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if kind != "labels":
        return hint
    try:
        _load_metric(name)
    except RecipeError as error:
        return f"{hint} {error}"
    return None


@functools.cache
def _load_metric(name: str) -> Any:
    """A metric of Hugging Face's `evaluate`, from the Hub or its cache; RecipeError says why there is none."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise RecipeError("A metric of `evaluate` is given by its bare name, such as 'cohen_kappa'.")
    import evaluate  # takes seconds, and most recipes name none of its metrics

    try:
        metric = evaluate.load(f"{HUB_NAMESPACE}/{name}", module_type="metric")
    except Exception as error:  # downloads and imports other people's code: any exception may come out
        logger.debug("evaluate.load(%r) failed", name, exc_info=error)
        raise RecipeError(
            f"`evaluate` could not load {name!r} either ({type(error).__name__}): it needs the Hub or a filled cache."
        ) from error
    needed = set(metric.features) if isinstance(metric.features, dict) else set(metric.features[0])
    if needed != {"predictions", "references"}:
        raise RecipeError(f"`evaluate` has {name!r}, but it needs {', '.join(sorted(needed))} rather than labels.")
    return metric


def _compute_loaded(name: str, references: Ints, predictions: Ints) -> float:
    metric = _load_metric(name)
    # F1, precision and recall are binary unless told otherwise, and would refuse three classes.
    options = {"average": "macro"} if "average" in inspect.signature(metric._compute).parameters else {}
    try:
        values = metric.compute(predictions=predictions, references=references, **options)
        return float(values[name] if name in values else next(iter(values.values())))
    except (TypeError, ValueError, StopIteration) as error:
        raise RecipeError(
            f"evaluate.metrics: {name!r} of `evaluate` must give one number for class labels, got {error}. "
            f"Use one of {', '.join(METRICS)}."
        ) from error
