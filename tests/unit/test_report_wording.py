"""How the report writes numbers, conditions and names."""

from __future__ import annotations

import math
from typing import Any

import pytest

from finetune.evaluation import wording


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.8424, "0.842"),
        (-0.0004, "0.000"),
        (-0.25, "\N{MINUS SIGN}0.250"),
        (1234.5678, "1,234.568"),
        (None, "\N{EN DASH}"),
        (math.inf, "\N{EN DASH}"),
        (True, "\N{EN DASH}"),
    ],
)
def test_numbers_are_written_with_three_decimals(value: Any, written: str) -> None:
    assert wording.format_number(value) == written


@pytest.mark.parametrize(
    ("condition", "written"),
    [
        (">= 0.80", "\N{GREATER-THAN OR EQUAL TO} 0.80"),
        ("macro_f1 above tfidf_logreg's 0.789", "macro-F1 above 0.789 (TF-IDF + logistic regression)"),
        ("perplexity below ngram's 6.21345", "perplexity below 6.21 (n-gram model)"),
        ("bleu above copy's -0", "BLEU above 0.0 (The input, copied)"),
        ("mcc above every baseline, and there is none", "correlation (MCC) above every baseline, and there is none"),
        ("<= 0.00005", "\N{LESS-THAN OR EQUAL TO} 0.00005"),
        (True, ""),
        (None, ""),
    ],
)
def test_conditions_are_written_with_the_names_of_the_page(condition: Any, written: str) -> None:
    assert wording.format_condition(condition) == written


def test_long_names_may_break_after_an_underscore() -> None:
    assert str(wording.mark_breaks("card_<b>")) == "card_<wbr>&lt;b&gt;"


@pytest.mark.parametrize(
    ("metric", "written"),
    [
        ("macro_f1", "33.417 (32.104 to 34.731)"),
        ("loss", "33.417 (32.104 to 34.731)"),
        ("bleu", "33.4 (32.1 to 34.7)"),
        ("bleu_zh", "33.4 (32.1 to 34.7)"),
        ("chrf", "33.4 (32.1 to 34.7)"),
        ("perplexity", "33.42 (32.10 to 34.73)"),
    ],
)
def test_a_score_has_the_decimals_of_its_metric(metric: str, written: str) -> None:
    score = {"value": 33.4171, "low": 32.1039, "high": 34.7312}
    assert wording.format_score(score, wording.decimals_of(metric)) == written


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ({"rows": 1}, "1 row"),
        ({"rows": 1800}, "1,800 rows"),
        ({"rows": 106, "groups": 12}, "106 rows in 12 groups"),
        ({"rows": 182, "lists": {"requests": 1119, "people": 182}}, "1,119 requests of 182 people"),
        ({"rows": 1, "lists": {"requests": 1, "people": 1}}, "1 request of 1 person"),
    ],
)
def test_a_score_says_what_it_is_over(test: dict[str, Any], words: str) -> None:
    assert wording.describe_tested(test) == words
