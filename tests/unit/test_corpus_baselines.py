from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from finetune.errors import DataError
from finetune.evaluation import corpus_baselines
from finetune.evaluation.corpus_baselines import compute_ngram, compute_unigram, copy_source, nearest_translation
from finetune.evaluation.corpus_scoring import SystemOutput

Stream = npt.NDArray[np.int64]
V = 5


def draw_stream(length: int, seed: int, memory: int = 2) -> Stream:
    """Tokens out of V that mostly follow from the `memory` before; the last token of V is rare."""
    generator = np.random.default_rng(seed)
    likely = np.random.default_rng(99).integers(0, V - 1, size=(V,) * memory)
    stream = list(generator.integers(0, V, memory))
    while len(stream) < length:
        follows = likely[tuple(stream[-memory:])]
        stream.append(
            int(follows if generator.random() < 0.7 else generator.integers(0, V - 1 + (len(stream) % 9 == 0)))
        )
    return np.array(stream[:length])


def cut(stream: Stream) -> list[Stream]:
    """A row for each token, so that statistics are those of tokens."""
    return list(stream[:, None])


def probabilities_of(output: SystemOutput) -> npt.NDArray[np.float64]:
    assert output.likelihood is not None
    return np.exp(-output.likelihood[:, 0])


def compute_kneser_ney(train: list[int], context: list[int], order: int, discount: float) -> list[float]:
    """The distribution after a context, from counts in plain lists and the formula, one order at a time."""
    values = [1 / V] * V
    for k in range(1, min(order, len(context) + 1) + 1):
        grams = [tuple(train[i : i + k]) for i in range(len(train) - k + 1)]
        if k < order:
            longer = {tuple(train[i : i + k + 1]) for i in range(len(train) - k)}
            grams = [gram[1:] for gram in longer]  # each as often as there are different tokens before it
        after = [gram[-1] for gram in grams if list(gram[:-1]) == context[len(context) - k + 1 :]]
        if after:
            spread = discount * len(set(after)) / len(after)
            values = [max(after.count(t) - discount, 0) / len(after) + spread * values[t] for t in range(V)]
    return values


def test_unigram_by_hand() -> None:
    rows = [np.array([0, 0]), np.array([1, 3]), np.zeros(0, dtype=np.int64)]
    output = compute_unigram([np.array([0, 0, 1]), np.array([0, -100])], rows, V, sizes=np.array([2.0, 5.0, 0.0]))
    # Two different tokens: two more counts, over five tokens, beside four.
    often, once, never = (3 + 0.4) / 6, (1 + 0.4) / 6, 0.4 / 6
    assert often + once + 3 * never == pytest.approx(1)
    expected = [[-2 * math.log(often), 2, 2, 2], [-math.log(once * never), 2, 0, 5], [0, 0, 0, 0]]
    assert output.likelihood == pytest.approx(np.array(expected))
    assert output.texts is None


def test_bytes_are_zero_where_they_are_not_counted() -> None:
    train = draw_stream(50, 0)
    for output in (compute_unigram([train], [train], V), compute_ngram([train], [train], [train], V)):
        assert output.likelihood is not None
        assert output.likelihood[:, 3].tolist() == [0]


@pytest.mark.parametrize(("memory", "seed"), [(1, 0), (1, 1), (2, 2), (3, 3)])
def test_ngram_is_kneser_neys_formula(memory: int, seed: int) -> None:
    train, validation, test = (draw_stream(n, seed + i, memory) for i, n in enumerate((300, 150, 120)))
    output = compute_ngram([train[:100], train[100:]], [validation], cut(test), V)
    found, order, discount = probabilities_of(output), output.settings["order"], output.settings["discount"]
    assert order >= memory + 1
    for i, token in enumerate(test):
        context = test[max(0, i - order + 1) : i].tolist()
        assert found[i] == pytest.approx(compute_kneser_ney(train.tolist(), context, order, discount)[token])


@pytest.mark.parametrize("seed", range(5))
def test_ngram_probabilities_sum_to_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    train, validation = generator.integers(0, V, 200), generator.integers(0, V, 50)
    context = generator.integers(0, V, generator.integers(0, 8))
    tokens = [compute_ngram([train], [validation], [context, np.array([token])], V) for token in range(V)]
    assert sum(probabilities_of(output)[1] for output in tokens) == pytest.approx(1)


def test_the_likeliest_token_is_that_of_the_whole_distribution() -> None:
    train, validation, test = (draw_stream(n, 7 + i) for i, n in enumerate((300, 150, 200)))
    output = compute_ngram([train], [validation], cut(test), V)
    assert output.likelihood is not None
    right = output.likelihood[:, 2]
    assert 0.5 < right.mean() < 0.9
    for i, token in enumerate(test):
        context = test[max(0, i - output.settings["order"] + 1) : i].tolist()
        values = compute_kneser_ney(train.tolist(), context, output.settings["order"], output.settings["discount"])
        if right[i]:
            assert values[token] >= max(values) - 1e-12
        else:
            assert values[token] < max(values) or values.count(max(values)) > 1


def test_rows_are_one_stream() -> None:
    train, test = draw_stream(200, 0), draw_stream(60, 1)
    whole = compute_ngram([train], [train], [test], V).likelihood
    parts = compute_ngram(np.split(train, [50, 70]), [train], np.split(test, [1, 30]), V).likelihood
    assert whole is not None
    assert parts is not None
    assert parts.sum(axis=0) == pytest.approx(whole[0])


def test_settings_are_chosen_on_validation_alone() -> None:
    train, validation, noise = draw_stream(400, 0), draw_stream(200, 1), np.random.default_rng(1).integers(0, V, 200)
    settings = compute_ngram([train], [validation], [noise], V).settings
    assert settings == compute_ngram([train], [validation], [validation], V).settings
    assert settings["order"] >= 3
    assert compute_ngram([train], [noise], [validation], V).settings["order"] == 1


def test_chosen_settings_have_the_smallest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = draw_stream(400, 0), draw_stream(200, 1)
    chosen = compute_ngram([train], [validation], [validation], V)
    assert chosen.likelihood is not None
    for order in (1, 2, 6):
        for discount in (0.3, 0.9):
            monkeypatch.setattr(corpus_baselines, "MAX_ORDER", order)
            monkeypatch.setattr(corpus_baselines, "DISCOUNTS", (discount,))
            other = compute_ngram([train], [validation], [validation], V)
            assert other.likelihood is not None
            assert chosen.likelihood[0, 0] <= other.likelihood[0, 0] + 1e-9


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_train_may_be_shorter_than_the_order(length: int) -> None:
    test = draw_stream(20, 0)
    found = probabilities_of(compute_ngram([test[:length]], [test], cut(test), V))
    assert ((found > 0) & (found <= 1)).all()


def test_no_rows() -> None:
    train = draw_stream(20, 0)
    for output in (compute_unigram([train], [], V), compute_ngram([train], [train], [], V)):
        assert output.likelihood is not None
        assert output.likelihood.shape == (0, 4)


def test_ngram_beats_unigram_where_tokens_depend_on_each_other() -> None:
    train, validation, test = (draw_stream(n, i) for i, n in enumerate((2000, 400, 400)))
    ngram, unigram = compute_ngram([train], [validation], [test], V), compute_unigram([train], [test], V)
    assert ngram.likelihood is not None
    assert unigram.likelihood is not None
    # Seven in ten tokens are known; the others are nearly uniform over four.
    entropy = -(0.775 * math.log(0.775) + 3 * 0.075 * math.log(0.075))
    assert entropy < ngram.likelihood[0, 0] / 400 < entropy + 0.15 < unigram.likelihood[0, 0] / 400


def test_copy_is_the_input() -> None:
    assert copy_source(("Anna", "a dog")) == SystemOutput(texts=["Anna", "a dog"])


@pytest.mark.parametrize("cells", [1, 1_000_000])
def test_nearest_translation_by_hand(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_baselines, "SIMILARITY_CELLS", cells)  # whatever is compared at once
    sources = ["a dog runs", "a cat sleeps", "two dogs run", "a dog runs", "我 坐 火车"]
    targets = ["ein Hund rennt", "eine Katze schläft", "zwei Hunde rennen", "ein Hund läuft", "I take the train"]
    asked = ["A cat sleeps!", "the dog runs", "坐火车", "xyz", "two dogs run", ""]
    assert nearest_translation(sources, targets, asked).texts == [
        "eine Katze schläft",
        "ein Hund rennt",  # the first of equal sources
        "I take the train",
        "",
        "zwei Hunde rennen",
        "",
    ]
    assert nearest_translation(sources, targets, []).texts == []


def test_nearest_needs_words() -> None:
    with pytest.raises(DataError, match="train: texts must hold words for the baseline nearest, got none"):
        nearest_translation(["!", "..."], ["a", "b"], ["c"])
