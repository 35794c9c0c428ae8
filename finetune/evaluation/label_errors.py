"""Likely label errors: rows whose given label a model, trained on the other rows, finds unlikely.

Confident learning (Northcutt et al., arXiv:1911.00068) through cleanlab, on cross-validated probabilities.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.errors import ResourceError
from finetune.evaluation.metrics import Floats, Ints

FOLDS = 5
DENSE_C, SPARSE_C = 3.0, 10.0
"""Of embeddings at length 1, and of TF-IDF: near the smallest log loss on easy sets and on hard ones."""


@dataclass(frozen=True, slots=True)
class LabelErrors:
    """What confident learning says about N rows."""

    quality: Floats
    """(N,) probability of the given label, in [0, 1]; the smallest is the likeliest error."""
    flagged: npt.NDArray[np.bool_]
    """(N,) whether the row is among the estimated number of errors."""


def check_cleanlab() -> None:
    """cleanlab is an extra; to be called before slow work.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import cleanlab  # noqa: F401
    except ImportError:
        raise ResourceError(
            "data audit: cleanlab must be installed to look for label errors, got no such package. pip install cleanlab"
        ) from None


def compute_out_of_fold(matrix: Any, labels: Ints, groups: Ints, seed: int) -> Floats:
    """Probabilities of each row by logistic regression on the folds that it is not in.

    Args:
        matrix: Features, (N, D), dense or sparse.
        labels: (N,) in 0..K-1, each class in at least `FOLDS` groups.
        groups: (N,) rows of one group share a fold, such as those of the same text: one would give the other away.
        seed: Deals out the folds.

    Returns:
        (N, K).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if isinstance(matrix, np.ndarray):
        model = LogisticRegression(C=DENSE_C, max_iter=100)
    else:
        model = LogisticRegression(C=SPARSE_C, solver="saga", max_iter=50, random_state=seed)
    folds = _deal_folds(labels, groups, seed)
    probabilities = np.zeros((len(labels), int(labels.max()) + 1))
    for fold in range(FOLDS):
        train, held_out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        with warnings.catch_warnings():
            # Solvers and their limits are those of the baselines: more steps take minutes and change little.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(matrix[train], labels[train])
        probabilities[np.ix_(held_out, model.classes_)] = model.predict_proba(matrix[held_out])
    return probabilities


def _deal_folds(labels: Ints, groups: Ints, seed: int) -> Ints:
    """The fold of each row, (N,); stratified by the label of each group's first row.

    Not scikit-learn's StratifiedGroupKFold: it weighs every group against every fold, in minutes where groups are many.
    """
    from sklearn.model_selection import StratifiedKFold

    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    fold_of_group = np.zeros(len(first), dtype=np.int64)
    dealt = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(first, labels[first])
    for fold, (_, members) in enumerate(dealt):
        fold_of_group[members] = fold
    return fold_of_group[group_of]


def find_label_errors(labels: Ints, probabilities: Floats) -> LabelErrors:
    """Judge the given labels by out-of-fold probabilities.

    Args:
        labels: (N,) in 0..K-1.
        probabilities: (N, K).
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    # As many as the confident joint counts, from the worst on: of cleanlab's filters it found most of what was planted,
    # at the fewest false alarms. One process: its own pool costs more than it saves, and warns.
    flagged = find_label_issues(labels, probabilities, filter_by="low_self_confidence", n_jobs=1)
    quality = get_label_quality_scores(labels, probabilities, method="self_confidence")
    return LabelErrors(np.asarray(quality, dtype=np.float64), np.asarray(flagged, dtype=np.bool_))
