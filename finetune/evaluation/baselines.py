"""What a fine-tuned model must beat: the class prior, TF-IDF and frozen embeddings, each in seconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.cleaning import WORD
from finetune.errors import DataError, RecipeError
from finetune.evaluation.metrics import Floats, Ints, compute_metric

C_GRID = (1.0, 10.0, 100.0)

Features = Callable[[], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class BaselineData:
    """One split as a baseline sees it."""

    texts: Sequence[str]
    labels: Ints | None = None
    """(N,); below 0 for a row of no class, which validation may have; None for test, whose labels no baseline may
    see."""
    features: Features | None = None
    """Gives the frozen base's embeddings, (N, D); called only if `frozen_logreg` is asked for."""


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """A fitted baseline's scores."""

    scores: Mapping[str, Floats]
    """"validation" and "test" -> probabilities, (N, K)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was chosen on validation."""


def compute_baselines(
    names: Sequence[str], train: BaselineData, validation: BaselineData, test: BaselineData, n_labels: int, seed: int
) -> dict[str, BaselineResult]:
    """Fit each baseline on train, choose its settings on validation, and score validation and test.

    Args:
        names: Out of `majority`, `tfidf_logreg`, `frozen_logreg`.
        train: Rows to fit on, with labels.
        validation: Rows to choose the regularisation on, with labels.
        test: Rows to score.
        n_labels: K; a class that train lacks scores 0.
        seed: Of the solver that draws rows at random.

    Raises:
        DataError: Train has one class only, or no words.
        RecipeError: `frozen_logreg` without a base that gives features.
    """
    results = {}
    for name in names:
        if name == "majority":
            results[name] = _build_majority(train, validation, test, n_labels)
        elif name == "tfidf_logreg":
            # saga is the one solver whose step costs only a row's own words: ten times faster than lbfgs at 77 classes.
            options = {"solver": "saga", "max_iter": 50, "random_state": seed}
            results[name] = _choose_c(_build_tfidf(train, validation, test), train, validation, n_labels, options)
        else:
            options = {"solver": "lbfgs", "max_iter": 100}
            results[name] = _choose_c(_build_frozen(train, validation, test), train, validation, n_labels, options)
    return results


def _labels(data: BaselineData) -> Ints:
    if data.labels is None:
        raise ValueError("train and validation must come with labels")
    return np.asarray(data.labels, dtype=np.int64)


def _build_majority(train: BaselineData, validation: BaselineData, test: BaselineData, n_labels: int) -> BaselineResult:
    """Every row gets the shares of the classes in train, so the prediction is the largest class."""
    prior = np.bincount(_labels(train), minlength=n_labels) / max(1, len(train.texts))
    return BaselineResult(
        {n: np.tile(prior, (len(d.texts), 1)) for n, d in (("validation", validation), ("test", test))}
    )


def build_vectorizer() -> Any:
    """scikit-learn's TF-IDF over words and word pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1, token_pattern=WORD, dtype=np.float32)


def _build_tfidf(*splits: BaselineData) -> list[Any]:
    """Sparse matrices of words and word pairs; the vocabulary is that of the first split."""
    vectorizer = build_vectorizer()
    try:
        vectorizer.fit(splits[0].texts)
    except ValueError as error:  # scikit-learn's way to say that the vocabulary is empty
        raise DataError(
            "train: texts must hold words for the baseline tfidf_logreg, got none. "
            "Check the column that columns.text names, or remove the baseline from evaluate.baselines."
        ) from error
    return [vectorizer.transform(split.texts) for split in splits]


def _build_frozen(*splits: BaselineData) -> list[Any]:
    """The base's embeddings at length 1."""
    loaders = [split.features for split in splits if split.features is not None]
    if len(loaders) < len(splits):
        raise RecipeError(
            "evaluate.baselines: frozen_logreg must have a pretrained base to embed texts with, got none. "
            "Remove frozen_logreg or set model.base to a pretrained model."
        )
    from sklearn.preprocessing import normalize

    return [normalize(load()) for load in loaders]


def _choose_c(
    matrices: Sequence[Any], train: BaselineData, validation: BaselineData, n_labels: int, options: dict[str, Any]
) -> BaselineResult:
    """Logistic regression with the C of best macro-F1 on validation (the smaller of equals), fitted on train alone."""
    references, validation_references = _labels(train), _labels(validation)
    known = validation_references >= 0
    if np.unique(references).size < 2:
        raise DataError(
            f"train: must hold at least 2 classes for a baseline with logistic regression, "
            f"got {np.unique(references).size}. Check the split, or keep only majority in evaluate.baselines."
        )
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    best_f1, best = -1.0, BaselineResult({})
    model = LogisticRegression(warm_start=True, **options)  # each C starts from the one before: half the time
    for c in C_GRID:
        model.set_params(C=c)
        with warnings.catch_warnings():
            # The step limit is on purpose: more steps move the score by less than its interval and take minutes.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(matrices[0], references)
        scores = {}
        for name, matrix in zip(("validation", "test"), matrices[1:], strict=True):
            scores[name] = np.zeros((matrix.shape[0], n_labels))
            scores[name][:, model.classes_] = model.predict_proba(matrix)
        f1 = compute_metric("macro_f1", validation_references[known], scores["validation"][known])
        if f1 > best_f1:
            best_f1, best = f1, BaselineResult(scores, {"C": c})
    return best
