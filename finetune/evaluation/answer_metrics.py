"""How near an answer comes to the reference: SQuAD's scores (arXiv:1606.05250, arXiv:1806.03822)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finetune.data.cleaning import SPACED_WORD

Floats = npt.NDArray[np.float64]

ANSWER_WIDTH = 5
"""Of a row: 1, whether the answer is exact, its F1, whether there is a reference, the F1 if there is one."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def split_answer(text: str) -> list[str]:
    """The words that count: in lower case, without ASCII punctuation and English articles. A Chinese or Japanese text
    has no spaces and would be one word, right or wrong as a whole: here each of its characters is one.
    """
    return SPACED_WORD.findall(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)))


def compute_answer_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, each as often as it occurs; of nothing, 1 for nothing."""
    given, wanted = split_answer(answer), split_answer(reference)
    if not given or not wanted:
        return float(given == wanted)
    both = (Counter(given) & Counter(wanted)).total()
    return 2 * both / (len(given) + len(wanted))


def compute_answer_statistics(answers: Sequence[str], references: Sequence[str]) -> Floats:
    """What the metrics of answers need of each row, (N, 5).

    Args:
        answers: N texts; "" says that there is no answer.
        references: N texts, the same.
    """
    exact = [split_answer(one) == split_answer(other) for one, other in zip(answers, references, strict=True)]
    f1 = [compute_answer_f1(one, other) for one, other in zip(answers, references, strict=True)]
    return build_answer_statistics(np.array(exact), np.array(f1), np.array([bool(text) for text in references]))


def build_answer_statistics(exact: npt.ArrayLike, f1: npt.ArrayLike, has_answer: npt.ArrayLike) -> Floats:
    """The same from each row's scores, (N,) each."""
    exact, f1, has = (np.asarray(values, dtype=np.float64) for values in (exact, f1, has_answer))
    return np.stack([np.ones_like(f1), exact, f1, has, has * f1], axis=1)


def exact_match(sums: Floats) -> Floats:
    """Sums (5, B) -> (B,)."""
    rows, exact, _, _, _ = sums
    return _ratio(exact, rows)


def answer_f1(sums: Floats) -> Floats:
    """Sums (5, B) -> (B,)."""
    rows, _, f1, _, _ = sums
    return _ratio(f1, rows)


def has_answer_f1(sums: Floats) -> Floats:
    """Sums (5, B) -> (B,); nan where no row has an answer."""
    _, _, _, has, f1 = sums
    return _ratio(f1, has)


def no_answer_accuracy(sums: Floats) -> Floats:
    """Sums (5, B) -> (B,); nan where every row has an answer. Without one the F1 is 1 for nothing, and else 0."""
    rows, _, f1, has, f1_of_answers = sums
    return _ratio(f1 - f1_of_answers, rows - has)


def tune_threshold(margins: Floats, answers: Sequence[str], references: Sequence[str]) -> float:
    """The margin above which giving an answer makes the mean F1 largest: the middle between two of `margins`, of equals
    the nearest to 0.

    Args:
        margins: how sure a system is that there is an answer, (N,), finite, N at least 1.
        answers: its answers, N texts, whether it is sure or not.
        references: N texts; "" where there is no answer.
    """
    given = np.array([compute_answer_f1(one, other) for one, other in zip(answers, references, strict=True)])
    withheld = np.array([compute_answer_f1("", other) for other in references])
    order = np.argsort(-margins, kind="stable")
    surest = margins[order]
    # With the k surest answers given, k from 0 to N.
    gains = np.concatenate([[0.0], np.cumsum((given - withheld)[order])])
    between = (surest[:-1] + surest[1:]) / 2
    thresholds = np.concatenate([[max(0.0, surest[0])], between, [min(0.0, surest[-1] - 1)]])
    parts = np.concatenate([[True], surest[:-1] > surest[1:], [True]])  # equal margins stay together
    best = np.flatnonzero(parts & (gains >= gains[parts].max() - 1e-9))
    return float(thresholds[best[np.abs(thresholds[best]).argmin()]])


def _ratio(over: Floats, under: Floats) -> Floats:
    # Sums over resampled rows may differ from a whole number in the last bit.
    return np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0.5)
