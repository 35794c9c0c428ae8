"""BM25 against its formula, and reciprocal ranks by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.ranking import LexicalIndex, fuse_rankings

TEXTS = ["returns take thirty days", "delivery takes two days", "we sell shoes"]


def test_scores_are_those_of_the_formula():
    # Lucene's form: idf = ln(1 + (N - n + 0.5) / (n + 0.5)); tf / (tf + k1 (1 - b + b length / mean length)).
    lengths, k1, b = [4, 4, 3], 1.5, 0.75
    rare, common = (math.log(1 + (3 - n + 0.5) / (n + 0.5)) for n in (1, 2))

    def weigh(length):
        return 1 / (1 + k1 * (1 - b + b * length / np.mean(lengths)))

    expected = [(rare + common) * weigh(4), common * weigh(4), 0.0]
    assert LexicalIndex(TEXTS).compute_scores("Returns, days?") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("question", ["", "!!! \U0001f600", "unheard-of"])
def test_a_question_without_known_words_finds_nothing(question):
    assert not LexicalIndex(TEXTS).compute_scores(question).any()


def test_texts_without_words_can_be_indexed():
    assert LexicalIndex(["...", ""]).compute_scores("days").tolist() == [0.0, 0.0]


def test_each_chinese_character_is_a_word():
    assert LexicalIndex(["退货需要三十天", "我们卖鞋"]).compute_scores("退货").argmax() == 0


def test_fused_ranks_by_hand():
    # Ranks 1, 2, 3 and 3, 1, 2.
    fused = fuse_rankings([np.array([0.9, 0.5, 0.1]), np.array([1.0, 3.0, 2.0])])
    assert fused == pytest.approx([1 / 61 + 1 / 63, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62])


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20, unique=True))
def test_a_ranking_fused_with_itself_keeps_its_order(values):
    scores = np.array(values, dtype=np.float32)
    assert np.argsort(-fuse_rankings([scores, scores])).tolist() == np.argsort(-scores).tolist()
