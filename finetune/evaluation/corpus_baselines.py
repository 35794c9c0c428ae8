"""What a language model must beat: token frequencies, an n-gram model, a copied input, the nearest pair in train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune.data.cleaning import WORD
from finetune.errors import DataError
from finetune.evaluation.corpus_metrics import Floats
from finetune.evaluation.corpus_scoring import SystemOutput
from finetune.evaluation.metrics import Ints

Rows = Sequence[npt.NDArray[np.integer]]
"""The tokens of each row that are scored, ids below the vocabulary's size; negative ids are none."""

MAX_ORDER = 6
DISCOUNTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SIMILARITY_CELLS = 20_000_000  # rows x train rows compared at once: 250 MB at worst


def compute_unigram(train: Rows, rows: Rows, vocab_size: int, *, sizes: Floats | None = None) -> SystemOutput:
    """Every token has its share in train, whatever stands around it.

    So that no token is impossible, as many counts as train has different tokens are spread over all (Witten & Bell
    1991, method C).

    Args:
        train: Rows to count.
        rows: Rows to score.
        vocab_size: Tokens that there are.
        sizes: Bytes of each of `rows`, (N,), for `bits_per_byte`.
    """
    counts = np.bincount(_join(train), minlength=vocab_size)
    spread = max(1, int(np.count_nonzero(counts)))
    shares = (counts + spread / vocab_size) / (counts.sum() + spread)
    stream = _join(rows)
    return SystemOutput(_sum_by_row(rows, shares[stream], stream == counts.argmax(), sizes))


def compute_ngram(
    train: Rows,
    validation: Rows,
    rows: Rows,
    vocab_size: int,
    *,
    sizes: Floats | None = None,
) -> SystemOutput:
    """Each token from the few before it: interpolated Kneser-Ney smoothing (Chen & Goodman 1999, section 2.7).

    Rows are read as one stream, so that the first token of a row has those of the row before it as its context.

    Args:
        train: Rows to count.
        validation: Rows to choose the order, up to 6, and the discount on.
        rows: Rows to score.
        vocab_size: V, tokens that there are.
        sizes: Bytes of each of `rows`, (N,), for `bits_per_byte`.
    """
    levels = _build_levels(_join(train), MAX_ORDER, vocab_size)
    order, discount = _choose_settings(levels, _locate(levels, _join(validation), vocab_size), vocab_size)
    stream = _join(rows)
    tables = [*[level.continuation for level in levels[: order - 1]], levels[order - 1].raw]
    probabilities, guesses = np.full(len(stream), 1 / vocab_size), np.zeros(len(stream), dtype=np.int64)
    best = _find_best(levels[:order], tables, discount, vocab_size)
    for table, likeliest, (contexts, grams) in zip(
        tables, best, _locate(levels[:order], stream, vocab_size), strict=True
    ):
        probabilities = _interpolate(table, contexts, grams, probabilities, discount)
        guesses = np.where(contexts >= 0, likeliest[contexts], guesses)
    likelihood = _sum_by_row(rows, probabilities, stream == guesses, sizes)
    return SystemOutput(likelihood, settings={"order": order, "discount": discount})


def copy_source(texts: Sequence[str]) -> SystemOutput:
    """The input as it is: what is right without translating anything, such as names and numbers."""
    return SystemOutput(texts=list(texts))


def nearest_translation(sources: Sequence[str], targets: Sequence[str], texts: Sequence[str]) -> SystemOutput:
    """What a translation memory gives: the target of the most similar source in train.

    Similarity is the cosine of TF-IDF vectors of words and word pairs; of equals the first. A text without a known word
    gets an empty translation.

    Args:
        sources: Inputs of train, M texts.
        targets: Outputs of train, M texts.
        texts: Inputs to score, N texts.

    Raises:
        DataError: Train has no words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD, dtype=np.float32)
    try:
        known = vectorizer.fit_transform(sources).T.tocsr()  # (words, M)
    except ValueError as error:  # scikit-learn's way to say that the vocabulary is empty
        raise DataError(
            "train: texts must hold words for the baseline nearest, got none. "
            "Check the column that columns.text names, or remove the baseline from evaluate.baselines."
        ) from error
    written: list[str] = []
    step = max(1, SIMILARITY_CELLS // len(sources))
    for start in range(0, len(texts), step):
        similarity = vectorizer.transform(texts[start : start + step]) @ known
        nearest = np.asarray(similarity.argmax(axis=1)).ravel()
        largest = similarity.max(axis=1).toarray().ravel()
        written += [targets[i] if value > 0 else "" for i, value in zip(nearest, largest, strict=True)]
    return SystemOutput(texts=written)


def _join(rows: Rows) -> Ints:
    """One stream (T,) of the rows' tokens."""
    stream = np.concatenate([np.zeros(0, dtype=np.int64), *rows]).astype(np.int64)
    return stream[stream >= 0]


def _sum_by_row(rows: Rows, probabilities: Floats, correct: npt.NDArray[np.bool_], sizes: Floats | None) -> Floats:
    """Statistics of each row, (N, 4), from each token's probability, (T,), and whether it is the likeliest, (T,)."""
    counts = np.array([np.count_nonzero(row >= 0) for row in rows], dtype=np.int64)
    owners = np.repeat(np.arange(len(rows)), counts)
    nats = np.bincount(owners, weights=-np.log(probabilities), minlength=len(rows))
    right = np.bincount(owners, weights=correct, minlength=len(rows))
    return np.stack([nats, counts, right, np.zeros(len(rows)) if sizes is None else sizes], axis=1).astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Table:
    """How often each of G k-grams counts, summed for each of C contexts, its first k - 1 tokens."""

    counts: Floats
    """(G,)."""
    totals: Floats
    """(C,)."""
    distinct: Floats
    """k-grams of each context that count at all, (C,)."""

    @classmethod
    def build(cls, counts: Ints, contexts: Ints, n_contexts: int) -> _Table:
        return cls(
            counts.astype(np.float64),
            np.bincount(contexts, weights=counts, minlength=n_contexts).astype(np.float64),
            np.bincount(contexts[counts > 0], minlength=n_contexts).astype(np.float64),
        )


@dataclass(frozen=True, slots=True)
class _Level:
    """The G different k-grams of train. A k-gram's number is its place in `keys`."""

    keys: Ints
    """Number of the (k-1)-gram that it begins with, times V, plus its last token; ascending, (G,)."""
    contexts: Ints
    """Number of the (k-1)-gram that it begins with, (G,)."""
    suffixes: Ints
    """Number of the (k-1)-gram that it ends with, (G,)."""
    raw: _Table
    """Counts in train: what the highest order reads."""
    continuation: _Table
    """Behind how many different tokens it was seen: what lower orders read. Zeros at the highest level."""


def _build_levels(stream: Ints, order: int, vocab_size: int) -> list[_Level]:
    """Levels of 1-grams up to `order`, fewer where train is shorter.

    Numbers are exact, not hashes: a level counts pairs of a number of the level below and a token.
    """
    parts = [(np.arange(vocab_size), np.zeros(vocab_size, dtype=np.int64), np.bincount(stream, minlength=vocab_size))]
    grams = stream  # the number of the k-gram at each place, (T - k + 1,)
    for k in range(2, min(order, len(stream)) + 1):
        keys, first, numbers, counts = np.unique(
            grams[:-1] * vocab_size + stream[k - 1 :], return_index=True, return_inverse=True, return_counts=True
        )
        parts.append((keys, grams[1:][first], counts))
        grams = numbers
    levels = []
    for k, (keys, suffixes, counts) in enumerate(parts):
        contexts, n_contexts = keys // vocab_size, len(parts[k - 1][0]) if k else 1
        left = np.bincount(parts[k + 1][1], minlength=len(keys)) if k + 1 < len(parts) else np.zeros_like(counts)
        raw, continuation = (_Table.build(c, contexts, n_contexts) for c in (counts, left))
        levels.append(_Level(keys, contexts, suffixes, raw, continuation))
    return levels


def _locate(levels: Sequence[_Level], stream: Ints, vocab_size: int) -> list[tuple[Ints, Ints]]:
    """For each level: number of the context before each token, and of the k-gram that it ends, (T,); -1 if not seen."""
    found = [(np.zeros_like(stream), stream)]
    for level in levels[1:]:
        contexts = np.concatenate([[-1], found[-1][1]])[: len(stream)]
        keys = contexts * vocab_size + stream
        places = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
        found.append((contexts, np.where((contexts >= 0) & (level.keys[places] == keys), places, -1)))
    return found


def _interpolate(table: _Table, contexts: Ints, grams: Ints, lower: Floats, discount: float) -> Floats:
    """max(count - D, 0) / total + D distinct / total * lower; the lower order's where the context was not seen."""
    totals = np.where(contexts >= 0, table.totals[contexts], 0.0)
    own = np.where(grams >= 0, np.maximum(table.counts[grams] - discount, 0.0), 0.0)
    known = np.maximum(totals, 1.0)
    weights = np.where(totals > 0, discount * table.distinct[contexts] / known, 1.0)
    probabilities: Floats = own / known + weights * lower
    return probabilities


def _choose_settings(
    levels: Sequence[_Level], located: Sequence[tuple[Ints, Ints]], vocab_size: int
) -> tuple[int, float]:
    """Order and discount of the smallest loss; the first of equals."""
    losses = {}
    for discount in DISCOUNTS:
        lower = np.full(len(located[0][0]), 1 / vocab_size)
        for order, (level, (contexts, grams)) in enumerate(zip(levels, located, strict=True), start=1):
            highest = _interpolate(level.raw, contexts, grams, lower, discount)
            losses[order, discount] = -float(np.log(highest).sum())
            lower = _interpolate(level.continuation, contexts, grams, lower, discount)
    return min(losses, key=lambda settings: losses[settings])


def _find_best(levels: Sequence[_Level], tables: Sequence[_Table], discount: float, vocab_size: int) -> list[Ints]:
    """For each level: the likeliest token after each context, (C,).

    It is one that train has after the context, or else the likeliest after the shorter context.
    """
    best: list[Ints] = []
    tokens, peaks = np.zeros(1, dtype=np.int64), np.full(1, 1 / vocab_size)  # of the level below, by its context
    lower = peaks  # probability of each (k-1)-gram's last token
    shorter = np.zeros(1, dtype=np.int64)  # the level below's context that each context of this level ends with
    for level, table in zip(levels, tables, strict=True):
        lower = _interpolate(table, level.contexts, np.arange(len(level.keys)), lower[level.suffixes], discount)
        weights = np.where(table.totals > 0, discount * table.distinct / np.maximum(table.totals, 1.0), 1.0)
        tokens, peaks = tokens[shorter], weights * peaks[shorter]
        ascending = np.lexsort((lower, level.contexts))
        last = ascending[np.flatnonzero(np.diff(level.contexts[ascending], append=-1))]  # the likeliest of each context
        last = last[lower[last] >= peaks[level.contexts[last]]]
        tokens[level.contexts[last]], peaks[level.contexts[last]] = level.keys[last] % vocab_size, lower[last]
        best.append(tokens)
        shorter = level.suffixes
    return best
