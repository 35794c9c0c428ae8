"""The metrics of tasks without classes. Each is a formula over sums of statistics that every row has a few of.

So a metric of any choice of rows, a slice or a resample, is its formula on their summed statistics. Statistics of N
rows are (N, S); sums over rows, of B choices of rows at once, are (S, B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from finetune.evaluation.answer_metrics import (
    ANSWER_WIDTH,
    answer_f1,
    compute_answer_statistics,
    exact_match,
    has_answer_f1,
    no_answer_accuracy,
)

Floats = npt.NDArray[np.float64]

BLEU_ORDER = 4
CHRF_ORDER = 6
NDCG_PLACES = 10
CHRF_BETA = 2  # recall counts so many times as much as precision


def _ratio(over: Floats, under: Floats) -> Floats:
    return np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)


def _loss(sums: Floats) -> Floats:
    nats, tokens, _, _ = sums
    return _ratio(nats, tokens)


def _perplexity(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):  # infinity is the right answer
        values: Floats = np.exp(_loss(sums))
    return values


def _bits_per_byte(sums: Floats) -> Floats:
    nats, _, _, size = sums
    return _ratio(nats / np.log(2), size)


def _token_accuracy(sums: Floats) -> Floats:
    _, tokens, correct, _ = sums
    return _ratio(correct, tokens)


def _bleu(sums: Floats) -> Floats:
    """sacreBLEU's `BLEU.compute_bleu` with its defaults: the k-th order without a match counts 1 / 2^k matches."""
    hypothesis, reference = sums[:2]
    right, total = sums[2 : 2 + BLEU_ORDER], sums[2 + BLEU_ORDER :]
    defined = (right.sum(axis=0) > 0) & (total[-1] > 0)  # otherwise 0, as where no text has four words
    matches = np.where(right > 0, right, 0.5 ** np.cumsum(right == 0, axis=0))
    precisions = np.divide(matches, total, out=np.ones_like(matches), where=defined)
    lengths = np.divide(reference, hypothesis, out=np.ones_like(reference), where=hypothesis > 0)
    brevity = np.exp(np.minimum(0.0, 1.0 - lengths))
    return np.where(defined, 100.0 * brevity * np.exp(np.log(precisions).mean(axis=0)), 0.0)


def _chrf(sums: Floats) -> Floats:
    """sacreBLEU's `CHRF` with its defaults: orders that a side lacks are left out of the means."""
    hypothesis, reference, both = sums[0::3], sums[1::3], sums[2::3]
    used = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(1, used.sum(axis=0))
    precision = np.divide(both, hypothesis, out=np.zeros_like(both), where=used).sum(axis=0) / orders
    recall = np.divide(both, reference, out=np.zeros_like(both), where=used).sum(axis=0) / orders
    weight = CHRF_BETA**2
    over, under = 100 * (1 + weight) * precision * recall, weight * precision + recall
    values: Floats = np.divide(over, under, out=np.zeros_like(over), where=under > 0)
    return values


def _mean(sums: Floats) -> Floats:
    total, rows = sums
    return _ratio(total, rows)


@dataclass(frozen=True, slots=True)
class CorpusMetric:
    """One metric that a recipe of a task without classes can name."""

    name: str
    needs: Literal["likelihood", "texts", "ranks"]
    """Statistics of the reference's tokens, of a written text, or of the places of what was looked for."""
    width: int
    """S, of its statistics."""
    larger_is_better: bool
    formula: str
    """One line: the formula and where it comes from."""
    compute: Callable[[Floats], Floats]
    """Sums (S, B) -> values (B,)."""


LIKELIHOOD_WIDTH = 4
"""Of a row: nats, tokens, tokens that were the likeliest, UTF-8 bytes (0 where they are not counted)."""
BLEU_WIDTH = 2 + 2 * BLEU_ORDER
"""Of a row: words of the hypothesis and of the reference, n-grams of each order in both, in the hypothesis."""
CHRF_WIDTH = 3 * CHRF_ORDER
"""Of a row, for each order: n-grams of the hypothesis, of the reference, in both."""
RANKS_WIDTH = 2
"""Of a row: its value, and 1."""

CORPUS_METRICS: dict[str, CorpusMetric] = {
    metric.name: metric
    for metric in (
        CorpusMetric(
            "loss", "likelihood", LIKELIHOOD_WIDTH, False, "mean of -log of the reference's token, in nats", _loss
        ),
        CorpusMetric("perplexity", "likelihood", LIKELIHOOD_WIDTH, False, "exp(loss)", _perplexity),
        CorpusMetric(
            "bits_per_byte",
            "likelihood",
            LIKELIHOOD_WIDTH,
            False,
            "sum of -log2 of the reference's tokens / their UTF-8 bytes; compares models with different tokens",
            _bits_per_byte,
        ),
        CorpusMetric(
            "token_accuracy",
            "likelihood",
            LIKELIHOOD_WIDTH,
            True,
            "tokens of the reference that are the likeliest / tokens",
            _token_accuracy,
        ),
        CorpusMetric(
            "bleu",
            "texts",
            BLEU_WIDTH,
            True,
            "sacreBLEU (arXiv:1804.08771), 0 to 100: nrefs:1, case:mixed, eff:no, tok:13a, smooth:exp",
            _bleu,
        ),
        CorpusMetric(
            "bleu_zh", "texts", BLEU_WIDTH, True, "the same with tok:zh, where each Chinese character is a word", _bleu
        ),
        CorpusMetric(
            "chrf",
            "texts",
            CHRF_WIDTH,
            True,
            "sacreBLEU's chrF2 (Popovic 2015), 0 to 100: nrefs:1, case:mixed, eff:yes, nc:6, nw:0, space:no",
            _chrf,
        ),
        CorpusMetric("mrr", "ranks", RANKS_WIDTH, True, "mean of 1 / place of the first right entry", _mean),
        CorpusMetric(
            "recall_at_1",
            "ranks",
            RANKS_WIDTH,
            True,
            "right entries among the first / min(1, right entries): the share of questions with a right entry on top",
            _mean,
        ),
        CorpusMetric(
            "recall_at_5",
            "ranks",
            RANKS_WIDTH,
            True,
            "right entries among the first 5 / min(5, right entries), mean over questions",
            _mean,
        ),
        CorpusMetric(
            "recall_at_10",
            "ranks",
            RANKS_WIDTH,
            True,
            "right entries among the first 10 / min(10, right entries), mean over questions or people",
            _mean,
        ),
        CorpusMetric(
            "ndcg_at_10",
            "ranks",
            RANKS_WIDTH,
            True,
            "sum of 1 / log2(1 + place) of the right entries among the first 10 / the most that it can be "
            "(Jarvelin & Kekalainen 2002)",
            _mean,
        ),
        CorpusMetric(
            "answer_f1",
            "texts",
            ANSWER_WIDTH,
            True,
            "mean F1 of words as for SQuAD (arXiv:1806.03822); where there is no answer, 1 if none is given, else 0",
            answer_f1,
        ),
        CorpusMetric(
            "exact_match",
            "texts",
            ANSWER_WIDTH,
            True,
            "rows with the words of their reference / rows",
            exact_match,
        ),
        CorpusMetric("has_answer_f1", "texts", ANSWER_WIDTH, True, "mean F1 of rows with an answer", has_answer_f1),
        CorpusMetric(
            "no_answer_accuracy",
            "texts",
            ANSWER_WIDTH,
            True,
            "rows without an answer that got none / rows without an answer",
            no_answer_accuracy,
        ),
    )
}


def compute_corpus_metric(name: str, statistics: Floats) -> float | None:
    """Value of a metric of `CORPUS_METRICS` over the rows of statistics (N, S).

    Returns:
        The value; None where it is not defined: no rows, nothing in them to count, or another metric's statistics.
    """
    metric = CORPUS_METRICS[name]
    if not len(statistics) or statistics.shape[1] != metric.width:
        return None
    value = float(metric.compute(statistics.sum(axis=0)[:, None])[0])
    return None if np.isnan(value) else value


def compute_text_statistics(name: str, hypotheses: Sequence[str], references: Sequence[str]) -> Floats:
    """What a metric of texts, such as `bleu` or `answer_f1`, needs of each row, (N, S).

    Args:
        name: The metric.
        hypotheses: What a system wrote, N texts as people write them: sacreBLEU splits words itself.
        references: What it should have written, N texts.

    Raises:
        ValueError: The two are not equally many.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"hypotheses must be as many as references, {len(references)}, got {len(hypotheses)}")
    if CORPUS_METRICS[name].width == ANSWER_WIDTH:
        return compute_answer_statistics(hypotheses, references)
    # sacreBLEU's own significance tests take the statistics of rows from the same function.
    rows = _build_sacrebleu(name)._extract_corpus_statistics(hypotheses, [references])
    return np.array(rows, dtype=np.float64).reshape(len(references), CORPUS_METRICS[name].width)


def compute_rank_statistics(name: str, places: Sequence[npt.ArrayLike]) -> Floats:
    """What a metric of places, such as `mrr` or `recall_at_5`, needs of each row, (N, 2).

    Args:
        name: The metric.
        places: Of each row, the places of its right entries in the ranking, from 1, in any order; at least one.
    """
    values = [_score_places(name, np.sort(np.asarray(row, dtype=np.float64))) for row in places]
    return np.column_stack([values, np.ones(len(places))])


def _score_places(name: str, places: Floats) -> float:
    if name == "mrr":
        return float(1 / places[0])
    if name == "ndcg_at_10":
        ideal = np.arange(1, min(NDCG_PLACES, len(places)) + 1)
        gains = 1 / np.log2(1 + places[places <= NDCG_PLACES])
        return float(gains.sum() / (1 / np.log2(1 + ideal)).sum())
    first = int(name.rpartition("_")[2])
    return float((places <= first).sum() / min(first, len(places)))


def compute_text_scores(name: str, hypotheses: Sequence[str], references: Sequence[str]) -> Floats:
    """The metric of each row alone, (N,), to put rows in order; BLEU of one row says little."""
    return CORPUS_METRICS[name].compute(compute_text_statistics(name, hypotheses, references).T)


def _build_sacrebleu(name: str) -> Any:
    """sacreBLEU's metric, imported late: `finetune check` can do without."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if name == "chrf":
        return CHRF(char_order=CHRF_ORDER, beta=CHRF_BETA)
    # `force` leaves out a warning about texts that look split into words; the score is the same.
    return BLEU(tokenize="zh" if name == "bleu_zh" else "13a", force=True)
