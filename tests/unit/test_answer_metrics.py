"""Scores of answers against those of SQuAD's own script, the threshold against trying all, baselines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.evaluation.answer_baselines import (
    Questions,
    compute_answer_baselines,
    find_sentences,
    split_sentences,
)
from finetune.evaluation.answer_metrics import compute_answer_statistics, tune_threshold
from finetune.evaluation.corpus_metrics import CORPUS_METRICS, compute_corpus_metric, compute_text_statistics
from finetune.evaluation.metrics import KINDS
from finetune.evaluation.wording import MEANINGS

# Values of SQuAD's own script as transformers 4 carried it, in squad_metrics.py; version 5 has it no more.
SQUAD = [
    ("the 30 days", "30 days.", 1, 1.0),
    ("30 working days", "within 30 days", 0, 2 / 3),
    ("A point; a point!", "point", 0, 2 / 3),
    ("it's", "its", 1, 1.0),
    ("U.S.", "us", 1, 1.0),
    ("the", "a", 1, 1.0),
    ("The", "", 1, 1.0),
    ("", "x", 0, 0.0),
    ("", "", 1, 1.0),
    ("an-other day", "another day", 1, 1.0),
    ("three euros", "3 euros", 0, 0.5),
    ("état", "etat", 0, 0.0),
    ("theme of the day", "day theme", 0, 0.8),
    ("(3.90) euros", "390 euros", 1, 1.0),
]


@pytest.mark.parametrize(("answer", "reference", "exact", "f1"), SQUAD)
def test_scores_of_a_row_are_those_of_squad(answer: str, reference: str, exact: int, f1: float) -> None:
    has = float(bool(reference))
    assert compute_answer_statistics([answer], [reference])[0].tolist() == pytest.approx([1, exact, f1, has, has * f1])


def test_characters_of_chinese_are_words() -> None:
    """Four of the five characters of each are the other's."""
    assert compute_answer_statistics(["三十天以内"], ["三十天之内"])[0].tolist() == pytest.approx([1, 0, 0.8, 1, 0.8])
    assert compute_answer_statistics(["30 天"], ["30天"])[0].tolist() == [1, 1, 1, 1, 1]


def test_metrics_by_hand() -> None:
    answers = ["30 days", "the red box", "", "a fee", ""]
    references = ["30 days.", "box", "at noon", "", ""]
    values = {
        name: compute_corpus_metric(name, compute_text_statistics(name, answers, references))
        for name in KINDS["spans"].metrics
    }
    assert values == pytest.approx(
        {
            "answer_f1": (1 + 2 / 3 + 0 + 0 + 1) / 5,
            "exact_match": 2 / 5,
            "has_answer_f1": (1 + 2 / 3 + 0) / 3,
            "no_answer_accuracy": 1 / 2,
        }
    )


def test_a_metric_of_rows_that_there_are_none_of_is_not_defined() -> None:
    answered = compute_text_statistics("no_answer_accuracy", ["x"], ["x"])
    assert compute_corpus_metric("no_answer_accuracy", answered) is None
    assert compute_corpus_metric("has_answer_f1", compute_text_statistics("has_answer_f1", [""], [""])) is None


def test_resampled_values_are_the_metric_of_the_drawn_rows() -> None:
    answers, references = ["x y", "", "z", "q"], ["x", "", "z", ""]  # scores .67, 1, 1, 0
    drawn = np.array([[2, 0, 1, 1], [0, 3, 1, 1]])  # how often each row was drawn
    for name in KINDS["spans"].metrics:
        table = compute_text_statistics(name, answers, references)
        for counts, value in zip(drawn, CORPUS_METRICS[name].compute(table.T @ drawn.T.astype(float)), strict=True):
            rows = np.repeat(np.arange(4), counts)
            assert value == pytest.approx(compute_corpus_metric(name, table[rows]))


def test_every_metric_of_answers_is_explained() -> None:
    assert set(KINDS["spans"].metrics) <= set(MEANINGS)


WORTH = {"x": 1.0, "x y z": 0.5, "y": 0.0}
"""An answer where "x" is right -> its F1."""


@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.sampled_from(list(WORTH)), st.sampled_from(["x", ""])), min_size=1, max_size=8
    )
)
def test_no_threshold_is_better_than_the_tuned_one(rows: list[tuple[int, str, str]]) -> None:
    margins, answers, references = (list(column) for column in zip(*rows, strict=True))

    def score(threshold: float) -> float:
        said = [answer if margin > threshold else "" for margin, answer in zip(margins, answers, strict=True)]
        return sum(WORTH.get(text, 0.0) if right else not text for text, right in zip(said, references, strict=True))

    tuned = tune_threshold(np.array(margins, dtype=float), answers, references)
    best = max(score(threshold) for threshold in np.arange(-4, 4.5, 0.5))
    assert score(tuned) == pytest.approx(best)
    # In the middle between two margins, so that a small change of either changes no answer.
    inside = [margin for margin in margins if min(margins) < tuned < max(margins)]
    gaps = np.diff(np.unique(inside))
    assert not len(gaps) or min(abs(margin - tuned) for margin in inside) >= gaps.min() / 2


# Baselines


def test_sentences_are_parted_at_their_ends() -> None:
    assert split_sentences("It costs 3.90 euros. Is it free? Yes!\nGood.") == [
        "It costs 3.90 euros.",
        "Is it free?",
        "Yes!",
        "Good.",
    ]
    assert split_sentences("费用为三欧元。会员免费。") == ["费用为三欧元。", "会员免费。"]
    assert split_sentences("") == [""]


def test_the_sentence_that_shares_words_is_found() -> None:
    passage = "Returns are free for members. The fee is 3 euros. We open at noon."
    found, scores = find_sentences(["What is the fee?", "When do you open?", "xyz"], [passage] * 3)
    assert found == ["The fee is 3 euros.", "We open at noon.", "Returns are free for members."]
    assert scores[:2].min() > 0 == scores[2]


def test_sentences_far_from_their_question_are_withheld_as_validation_says() -> None:
    passage = "Returns are free for members. The fee is 3 euros."
    questions = Questions(["The fee?", "Members?", "Who pays?"], [passage] * 3, ["The fee is 3 euros", "members", ""])
    found = compute_answer_baselines(["bm25_sentence", "no_answer"], questions, questions)
    assert list(found["test"]) == ["bm25_sentence", "no_answer"]
    assert found["validation"]["no_answer"].texts == ["", "", ""]
    sentence = found["test"]["bm25_sentence"]
    assert sentence.texts == ["The fee is 3 euros.", "Returns are free for members.", ""]
    assert sentence.settings["threshold"] > 0
