"""The page of a compression: its words, its numbers, and nothing that is fetched."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune.evaluation.compression_page import describe_budget, describe_choice, list_cells, render_page

SIZES = {"6x1": (60, 0.001, 1.0), "3x0.5": (18, 0.008, 2.5), "2x0.25": (9, 0.21, 4.0)}
MEGABYTE = 10**6
MARK = re.compile(r'<circle class="dot|<path class="arrow')


def make_point(size: str, **changes: Any) -> dict[str, Any]:
    megabytes, lost, times = SIZES[size]
    return {
        "layers": int(size[0]),
        "heads": 6,
        "channels": 768,
        "tokens": 8000,
        "parameters": megabytes * MEGABYTE // 4,
        "bytes": megabytes * MEGABYTE,
        "score": {"value": 0.87 - lost, "low": 0.85 - lost, "high": 0.89 - lost},
        "lost": {"value": lost, "low": lost - 0.01, "high": lost + 0.012},
        "speed": {"rows_per_second": 100 * times, "p50_ms": 20 / times, "p95_ms": 30 / times},
        "speedup": {"rows_per_second": times, "p50": times},
    } | changes


def make_results(**changes: Any) -> dict[str, Any]:
    score = {"value": 0.87, "low": 0.85, "high": 0.89}
    speed = {"rows_per_second": 100.0, "p50_ms": 20.0, "p95_ms": 30.0}
    whole = {"layers": 6, "tokens": 30522, "parameters": 22 * MEGABYTE, "bytes": 90 * MEGABYTE}
    test = {"opened": 1, "metrics": {"macro_f1": score}}
    return {
        "name": "tone-compressed",
        "created": "2026-11-23T10:00:00+00:00",
        "run": whole | {"name": "tone/<first>", "score": score, "speed": speed},
        "metric": "macro_f1",
        "rows": 1200,
        "confidence": 0.95,
        "resamples": 1000,
        "budget": {"max_drop": 0.01, "min_speedup": None},
        "points": {size: make_point(size) for size in SIZES},
        "chosen": "3x0.5",
        "nearest": "3x0.5",
        "pipeline": {"speed": speed, "speedup": {"rows_per_second": 0.4, "p50": 0.9}},
        "timed": {"rows": 192, "tokens_per_row": 18.9},
        "machine": {"processor": "A & B", "cores": 2, "threads": 1, "instructions": "AVX2"},
        "test": {"run": test, "chosen": test, "others": []},
    } | changes


def read_text(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


def test_the_page_says_whose_test_split_was_opened_before():
    results = make_results()
    results["test"] |= {"others": ["6x1", "20261124-100000-0a1b2c3d"]}
    words = (
        "for the chosen size, and for 6x1, 20261124-100000-0a1b2c3d too: choose on validation, and do not shop around"
    )
    assert words in read_text(render_page(results))


def test_the_page_says_what_was_chosen_and_what_it_cost():
    page = render_page(make_results())
    text = read_text(page)
    assert "3x0.5 loses 0.0080 of macro-F1, has 20.0% of the bytes and is 2.5 times as fast." in text
    assert "The fastest size that loses at most 0.01 of macro-F1 on validation." in text
    assert "opened 1 time for the chosen size, and for no other" in text
    assert len(MARK.findall(page)) == 4  # the run too, and one off the scale
    assert len(re.findall(r'<circle class="dot main"', page)) == 1
    assert re.findall(r'<tr class="main"><th scope="row">(.*?)</th>', page) == ["3x0.5"]
    assert re.findall(r'<th scope="row">(.*?)</th>', page) == ["run", "6x1", "3x0.5", "2x0.25"]
    assert "tone/&lt;first&gt;" in page
    assert "A &amp; B" in page
    assert not re.search(r"<script|https?://|src=", page)


def test_a_budget_that_nothing_keeps():
    results = make_results(chosen=None, nearest="6x1", budget={"max_drop": None, "min_speedup": 9.0})
    del results["test"]
    assert describe_choice(results).startswith("No size keeps the budget. The nearest: 6x1 loses 0.0010 of macro-F1")
    assert describe_budget(results) == "The best size that is at least 9 times as fast as the run."
    text = read_text(render_page(results))
    assert "Test split Closed." in text
    assert 'class="main"' not in render_page(results).split("<tbody>")[1]


def test_a_size_without_a_score_has_a_row_and_no_dot():
    none = {"value": None, "low": None, "high": None}
    results = make_results()
    results["points"]["6x1"] |= {"score": none, "lost": none}
    page = render_page(results)
    assert len(MARK.findall(page)) == 3
    assert describe_choice(results | {"chosen": "6x1"}).startswith("6x1 has no score, has 66.7% of the bytes")
    assert list_cells(results)[1][2] == "not defined"


def test_what_was_lost_on_one_row_has_no_interval():
    results = make_results()
    results["points"]["6x1"]["lost"] = {"value": 0.25, "low": None, "high": None}
    assert list_cells(results)[1][2] == "+0.2500"


@pytest.mark.parametrize(("row", "name", "lost"), [(0, "run", ""), (2, "3x0.5 *", "+0.0080 [-0.002, +0.020]")])
def test_the_table_for_a_terminal(row, name, lost):
    cells = list_cells(make_results())[row]
    assert (cells[0], cells[2]) == (name, lost)
    assert cells[3] == {0: "90.0 MB (100.0%)", 2: "18.0 MB (20.0%)"}[row]
    assert cells[4] == {0: "100.0 (1 x)", 2: "250.0 (2.5 x)"}[row]
