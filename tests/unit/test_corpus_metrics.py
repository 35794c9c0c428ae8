from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from finetune.evaluation.corpus_metrics import (
    CORPUS_METRICS,
    compute_corpus_metric,
    compute_rank_statistics,
    compute_text_scores,
    compute_text_statistics,
)
from finetune.evaluation.metrics import KINDS, METRICS, is_larger_better
from finetune.evaluation.wording import MEANINGS, NAMES

TEXT_METRICS: dict[str, Any] = {"bleu": BLEU(), "bleu_zh": BLEU(tokenize="zh"), "chrf": CHRF()}
LIKELIHOOD = np.array([[2.0, 4.0, 1.0, 8.0], [6.0, 4.0, 3.0, 8.0]])


def draw_texts(count: int, seed: int, words: str, longest: int = 12) -> tuple[list[str], list[str]]:
    """References of random words, and hypotheses in which some of them are replaced, dropped or said twice."""
    generator = np.random.default_rng(seed)
    vocabulary = words.split()
    references, hypotheses = [], []
    for _ in range(count):
        reference = list(generator.choice(vocabulary, generator.integers(1, longest)))
        hypothesis = [str(generator.choice(vocabulary)) if generator.random() < 0.3 else word for word in reference]
        hypothesis = [word for word in hypothesis for _ in range(generator.choice([0, 1, 1, 1, 2]))]
        references.append(" ".join(reference) + ".")
        hypotheses.append(" ".join(hypothesis) + str(generator.choice([".", " .", "!", ""])))
    return hypotheses, references


def test_likelihood_metrics_by_hand() -> None:
    assert compute_corpus_metric("loss", LIKELIHOOD) == pytest.approx(8 / 8)
    assert compute_corpus_metric("perplexity", LIKELIHOOD) == pytest.approx(math.e)
    assert compute_corpus_metric("bits_per_byte", LIKELIHOOD) == pytest.approx(8 / math.log(2) / 16)
    assert compute_corpus_metric("token_accuracy", LIKELIHOOD) == pytest.approx(4 / 8)
    # A mean over tokens, not over rows.
    assert compute_corpus_metric("loss", np.array([[1.0, 1.0, 0.0, 1.0], [0.0, 9.0, 0.0, 9.0]])) == pytest.approx(0.1)


def test_a_uniform_guess_over_bytes_takes_eight_bits() -> None:
    rows = np.array([[5 * math.log(256), 5, 0, 5]])
    assert compute_corpus_metric("bits_per_byte", rows) == pytest.approx(8)
    assert compute_corpus_metric("perplexity", rows) == pytest.approx(256)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize(
    "words", ["a man in the red hat sees two dogs , running don't 3.5 state-of-the-art", "我们 坐 火车 去 北京 GPT 3"]
)
@pytest.mark.parametrize("name", TEXT_METRICS)
def test_values_are_those_of_sacrebleu(name: str, words: str, count: int, seed: int) -> None:
    hypotheses, references = draw_texts(count, seed, words, longest=4 if count == 3 else 12)
    expected = TEXT_METRICS[name].corpus_score(hypotheses, [references]).score
    found = compute_corpus_metric(name, compute_text_statistics(name, hypotheses, references))
    assert found == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("hypotheses", "references"),
    [
        (["the same words as there"], ["the same words as there"]),
        (["", ""], ["some words", "and more"]),
        (["nothing of it is here at all"], ["xyz"]),
        (["one two three"], ["one two three"]),  # no 4-gram
        (["one two three four"], ["four three two one"]),  # words match, longer n-grams do not
        (["one two three four five"], ["one two x four five, and so it goes on for long"]),  # brevity
        (["words"], [""]),
        ([""], [""]),
    ],
)
@pytest.mark.parametrize("name", TEXT_METRICS)
def test_edge_cases_are_those_of_sacrebleu(name: str, hypotheses: list[str], references: list[str]) -> None:
    expected = TEXT_METRICS[name].corpus_score(hypotheses, [references]).score
    found = compute_corpus_metric(name, compute_text_statistics(name, hypotheses, references))
    assert found == pytest.approx(expected, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_a_resample_is_a_corpus_in_which_rows_occur_as_often_as_drawn(name: str) -> None:
    hypotheses, references = draw_texts(12, seed=0, words="the cat sat on a mat and the dog did not")
    weights = np.random.default_rng(0).integers(0, 3, size=(12, 5)).astype(np.float64)
    values = CORPUS_METRICS[name].compute(compute_text_statistics(name, hypotheses, references).T @ weights)
    for column, value in zip(weights.T.astype(int), values, strict=True):
        drawn = np.repeat(np.arange(12), column)
        expected = TEXT_METRICS[name].corpus_score([hypotheses[i] for i in drawn], [[references[i] for i in drawn]])
        assert value == pytest.approx(expected.score, rel=1e-13)


def test_scores_of_rows_are_those_of_rows_alone() -> None:
    hypotheses, references = draw_texts(6, seed=1, words="the cat sat on a mat and the dog did not")
    expected = [TEXT_METRICS["chrf"].sentence_score(h, [r]).score for h, r in zip(hypotheses, references, strict=True)]
    assert compute_text_scores("chrf", hypotheses, references) == pytest.approx(expected)
    assert compute_text_scores("chrf", [], []).shape == (0,)


def test_what_is_not_defined_is_none() -> None:
    assert compute_corpus_metric("loss", np.zeros((0, 4))) is None
    assert compute_corpus_metric("loss", np.zeros((3, 4))) is None  # no tokens
    assert compute_corpus_metric("bits_per_byte", LIKELIHOOD * [1, 1, 1, 0]) is None  # bytes were not counted
    assert compute_corpus_metric("bleu", LIKELIHOOD) is None
    assert compute_corpus_metric("loss", compute_text_statistics("chrf", ["a"], ["a"])) is None
    assert compute_corpus_metric("bleu", compute_text_statistics("bleu", [], [])) is None
    assert compute_corpus_metric("perplexity", np.array([[1e6, 1.0, 0.0, 1.0]])) == math.inf


def test_texts_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="hypotheses must be as many as references, 2, got 1"):
        compute_text_statistics("bleu", ["one"], ["one", "two"])


def test_direction_is_that_of_a_better_model() -> None:
    hypotheses, references = draw_texts(20, seed=2, words="the cat sat on a mat and the dog did not")
    hypotheses, references = [*hypotheses, "a cat"], [*references, ""]  # there is no answer
    for name, metric in CORPUS_METRICS.items():
        if metric.needs == "texts":
            better = compute_text_statistics(name, references, references)
            worse = compute_text_statistics(name, hypotheses, references)
        elif metric.needs == "ranks":
            better, worse = (compute_rank_statistics(name, [[1], [place]]) for place in (1, 17))
        else:
            better, worse = LIKELIHOOD * [0.5, 1, 1.2, 1], LIKELIHOOD
        gain = CORPUS_METRICS[name].compute(better.sum(0)[:, None]) - metric.compute(worse.sum(0)[:, None])
        assert (gain[0] > 0) == metric.larger_is_better == is_larger_better(name)


def test_kinds_name_every_metric_and_the_page_every_name() -> None:
    assert {name for kind in KINDS.values() for name in kind.metrics} == {*METRICS, *CORPUS_METRICS}
    assert set(CORPUS_METRICS) <= set(MEANINGS)
    assert {name for kind in KINDS.values() for name in kind.baselines} <= set(NAMES)


def test_sacrebleu_is_imported_when_a_text_is_scored() -> None:
    code = "import sys, finetune.evaluation.corpus_baselines; sys.exit('sacrebleu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
