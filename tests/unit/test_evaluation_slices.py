from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from finetune.errors import DataError
from finetune.evaluation.intervals import Resampling
from finetune.evaluation.metrics import compute_metric
from finetune.evaluation.slices import SliceRows, check_slice_columns, compute_slices, group_rows

OPTIONS: dict[str, Any] = {"confidence": 0.95, "resampling": Resampling(100, 0)}


def make_rows(column: str, values: list[Any], texts: list[str] | None = None) -> SliceRows:
    generator = np.random.default_rng(0)
    scores = generator.dirichlet(np.ones(3), len(values))
    references = generator.integers(0, 3, len(values))
    return SliceRows(references, scores, texts or ["a text"] * len(values), [{column: value} for value in values])


def sizes(column: str, rows: SliceRows) -> dict[str, int]:
    return {value: len(chosen) for value, chosen in group_rows(column, rows.texts, rows.values)}


def test_metrics_are_those_of_the_rows_of_the_value() -> None:
    values = ["web", "app"] * 15 + ["web"] * 10
    rows = make_rows("channel", values)
    found = compute_slices(rows, ["channel"], ["accuracy", "macro_f1"], **OPTIONS)["channel"]
    assert [(s["value"], s["rows"]) for s in found] == [("web", 25), ("app", 15)]
    web = np.array(values) == "web"
    for name, interval in found[0]["metrics"].items():
        assert interval["value"] == pytest.approx(compute_metric(name, rows.references[web], rows.scores[web]))
        assert interval["low"] <= interval["value"] <= interval["high"]


def test_length_is_cut_into_quartiles_of_words() -> None:
    texts = [" ".join(["word"] * (1 + i % 40)) for i in range(80)]
    assert sizes("length", make_rows("x", [0] * 80, texts)) == {
        "1-10 words": 20,
        "11-20 words": 20,
        "21-30 words": 20,
        "31-40 words": 20,
    }


def test_length_counts_chinese_characters_as_words() -> None:
    rows = make_rows("x", [0] * 20, ["我要退款 now"] * 10 + ["don't"] * 10)
    assert sizes("length", rows) == {"1 word": 10, "5 words": 10}


def test_equal_lengths_share_a_slice() -> None:
    assert sizes("length", make_rows("x", [0] * 60, ["two words"] * 60)) == {"2 words": 60}


def test_numbers_with_many_values_are_cut_into_quartiles() -> None:
    assert sizes("price", make_rows("price", [0.5 + i for i in range(40)])) == {
        "0.5 to 9.5": 10,
        "10.5 to 19.5": 10,
        "20.5 to 29.5": 10,
        "30.5 to 39.5": 10,
    }
    assert next(iter(sizes("price", make_rows("price", [str(i - 20) for i in range(40)])))) == "-20 to -11"


def test_numbers_with_few_values_stand_for_themselves() -> None:
    assert sizes("stars", make_rows("stars", [1] * 12 + [5] * 30)) == {"5": 30, "1": 12}
    assert sizes("spam", make_rows("spam", [True] * 12 + [False] * 30)) == {"False": 30, "True": 12}


def test_the_twelve_most_frequent_values_stand_alone() -> None:
    values = [f"v{i:02d}" for i in range(15) for _ in range(30 - i)]
    found = sizes("topic", make_rows("topic", values))
    assert list(found) == [f"v{i:02d}" for i in range(12)] + ["other"]
    assert found["other"] == 18 + 17 + 16


def test_slices_under_ten_rows_are_merged() -> None:
    assert sizes("topic", make_rows("topic", ["a"] * 20 + ["b"] * 9 + ["c"] * 4 + ["other"] * 11)) == {
        "a": 20,
        "other": 24,
    }
    assert sizes("topic", make_rows("topic", ["a", "b"])) == {"other": 2}


def test_missing_values_are_a_slice() -> None:
    assert sizes("topic", make_rows("topic", ["a"] * 20 + [None] * 6 + [""] * 6)) == {"a": 20, "(missing)": 12}


def test_rows_without_a_number_are_a_slice_beside_the_quartiles() -> None:
    numbers = [0.5 + i for i in range(40)]
    missing = [None, "", float("nan"), None, "", float("nan"), None, "", None, ""]
    assert sizes("price", make_rows("price", [*missing, *numbers])) == {
        "0.5 to 9.5": 10,
        "10.5 to 19.5": 10,
        "20.5 to 29.5": 10,
        "30.5 to 39.5": 10,
        "(missing)": 10,
    }
    assert sizes("price", make_rows("price", [*numbers[:20], "", *numbers[20:]]))["other"] == 1
    assert sizes("price", make_rows("price", missing * 2)) == {"(missing)": 20}


def test_every_row_is_in_one_slice() -> None:
    values = [i % 17 for i in range(200)]
    groups = group_rows("n", ["a text"] * 200, [{"n": value} for value in values])
    positions = np.concatenate([chosen for _, chosen in groups])
    assert sorted(positions) == list(range(200))


def test_no_rows_no_slices() -> None:
    rows = SliceRows(np.zeros(0, dtype=np.int64), np.zeros((0, 2)), [], [])
    assert compute_slices(rows, ["length"], ["accuracy"], **OPTIONS) == {"length": []}


def test_missing_column() -> None:
    with pytest.raises(DataError) as caught:
        compute_slices(make_rows("channel", ["web"] * 3), ["chanel", "lenght", "zzz"], ["accuracy"], **OPTIONS)
    assert str(caught.value).splitlines() == [
        "evaluate.slices: column 'chanel' must exist, got columns channel. Did you mean 'channel'?",
        "evaluate.slices: column 'lenght' must exist, got columns channel. Did you mean 'length'?",
        "evaluate.slices: column 'zzz' must exist, got columns channel. Use one of these, or length, numbers, tickers, "
        "percent, negation.",
    ]
    check_slice_columns(["channel", "length", "negation"], ["channel"])


WITH = {
    "numbers": ["Sales up 8 pct", "Q3 results", "a loss of 1,200"],
    "tickers": ["$AAPL slides", "buy $brk.b, sell $T", "($ODRA) late"],
    "percent": ["up 3%", "up 3 %", "eight percent", "rose 4 per cent", "PCT of sales", "down 2\uff05"],
    "negation": ["No dividend", "it isn't over", "didn\u2019t pay", "is not falling", "without a loss", "CANNOT"],
}
WITHOUT = {
    "numbers": ["eight plants close", ""],
    "tickers": ["costs $5 bn", "US$ bonds", "A$AP", "five $", "$toolongname"],
    "percent": ["a percentile", "per centimetre", "8 points"],
    "negation": ["Norrvind notes a knot", "nobles and cannons", "announces cuts", "want"],
}


@pytest.mark.parametrize("name", list(WITH))
def test_texts_with_and_without(name) -> None:
    texts = [text for text in WITH[name] for _ in range(10)] + [text for text in WITHOUT[name] for _ in range(10)]
    found = dict(group_rows(name, texts, [{}] * len(texts)))
    assert list(found) == [f"with {name}", f"without {name}"]
    assert {texts[i] for i in found[f"with {name}"]} == set(WITH[name])
    assert {texts[i] for i in found[f"without {name}"]} == set(WITHOUT[name])
