"""The probability that an entry answers, from all that is known of the two: fitted on validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.artifact.run_folder import load_json, save_json
from finetune.data.ranking import COSINE_SCALE
from finetune.errors import ResourceError

Numbers = npt.NDArray[np.float64]

EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Relevance:
    """A logistic regression on the evidence for an entry; as it stands, the model's second look alone."""

    intercept: float = 0.0
    cosine: float = 0.0
    share: float = 0.0
    reread: float = 1.0

    def compute_probabilities(self, evidence: Numbers) -> Numbers:
        """In [0, 1], (n,), from evidence (n, 3)."""
        weights = np.array([self.cosine, self.share, self.reread])
        return np.asarray(1 / (1 + np.exp(-np.clip(self.intercept + evidence @ weights, -50, 50))))


def collect_evidence(cosines: npt.ArrayLike, first: npt.ArrayLike, reread: npt.ArrayLike) -> Numbers:
    """What speaks for some entries, (n, 3).

    Args:
        cosines: of the question with all entries, (E,).
        first: numbers of the entries, (n,).
        reread: the probability that the model gives each of them when it reads it with the question, (n,).

    Returns:
        The cosine; the log of the entry's share in the softmax over all; the log odds of the second look.
    """
    every = np.asarray(cosines, dtype=np.float64)
    chosen = every[np.asarray(first)]
    shares = COSINE_SCALE * (chosen - every.max()) - np.log(np.exp(COSINE_SCALE * (every - every.max())).sum())
    odds = np.clip(np.asarray(reread, dtype=np.float64), EPSILON, 1 - EPSILON)
    return np.column_stack([chosen, shares, np.log(odds / (1 - odds))])


def fit_relevance(evidence: Sequence[Numbers], right: Sequence[npt.NDArray[np.bool_]]) -> Relevance:
    """Logistic regression over the candidates of validation questions.

    Args:
        evidence: of each question's candidates, (n, 3).
        right: whether each of them answers, (n,).

    Returns:
        The fit; the second look alone where all candidates are right, or none.
    """
    from sklearn.linear_model import LogisticRegression

    known, truth = np.concatenate(list(evidence)), np.concatenate(list(right))
    if truth.all() or not truth.any():
        return Relevance()
    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(known, truth)
    return Relevance(float(fitted.intercept_[0]), *map(float, fitted.coef_[0]))


def save_relevance(path: Path, relevance: Relevance) -> None:
    """Write it as JSON."""
    save_json(path, asdict(relevance))


def load_relevance(path: Path) -> Relevance:
    """Read what `save_relevance` wrote.

    Raises:
        ResourceError: the file is missing, or does not hold its four numbers.
    """
    if not path.is_file():
        raise ResourceError(f"{path}: must hold how entries are weighed, got nothing there. Build the assistant again.")
    found = load_json(path)
    numbers = isinstance(found, dict) and all(isinstance(value, int | float) for value in found.values())
    if not numbers or sorted(found) != sorted(Relevance.__slots__):
        raise ResourceError(f"{path}: must hold the numbers {', '.join(Relevance.__slots__)}, got {found}.")
    return Relevance(**found)
