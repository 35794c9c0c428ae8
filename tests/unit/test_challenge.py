"""The challenge set holds what it says, in its own sentences, and any run scores itself on it."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from finetune.data.cleaning import normalize_for_duplicates
from finetune.data.sources import load_rows
from finetune.evaluation.slices import PATTERNS
from finetune.runner import evaluate

CHALLENGE = Path(__file__).resolve().parents[1] / "challenge" / "market_tone.csv"
HOLDS = {
    "negation": ["negation"],
    "comparison": [],
    "percent": ["percent", "numbers"],
    "ticker": ["tickers"],
    "mixed": [],
}
"""Kind of row -> the slices that each of its rows belongs to."""


@pytest.fixture(scope="module")
def rows():
    with CHALLENGE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_kind_has_every_label(rows):
    counts = Counter((row["kind"], row["label"]) for row in rows)
    assert len(rows) == 70
    assert set(counts) == {(kind, label) for kind in HOLDS for label in ("negative", "neutral", "positive")}
    assert min(counts.values()) >= 4
    assert all(PATTERNS[name].search(row["text"]) for row in rows for name in HOLDS[row["kind"]])


def test_no_sentence_is_known(rows):
    samples = ("financial_headlines", "market_news", "market_stream")
    known = [row.values["text"] for name in samples for row in list_rows(name)]
    texts = [normalize_for_duplicates(row["text"]) for row in rows]
    assert len(set(texts)) == len(texts)
    assert not set(texts) & set(map(normalize_for_duplicates, known))


def list_rows(name):
    return load_rows(name, {}, roles=("text",)).rows


def test_a_run_is_scored_on_it(own_run):
    scored = evaluate(own_run, str(CHALLENGE))
    assert scored["split"] == "market_tone"
    assert scored["rows"] == 70
