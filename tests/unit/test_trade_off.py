"""The plot of a comparison: names do not touch, sizes keep their order, nothing leaves the drawing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluation.charts import Scale
from finetune.evaluation.trade_off import (
    BESIDE,
    WIDTH,
    Dot,
    _list_sizes,
    _place_dots,
    format_parameters,
    trade_off_chart,
)

sizes = st.lists(st.integers(1, 10**9), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_neighbours_keep_their_distance_and_their_order(counts: list[int]) -> None:
    dots = [Dot(str(i), count, 0.5) for i, count in enumerate(counts)]
    places = _place_dots(dots, Scale(0, 9))
    at = np.array([WIDTH * place.share + place.shift for place in places])
    order = np.argsort(at)
    assert (np.diff(at[order]) >= BESIDE - 1e-6).all()
    assert [counts[i] for i in order] == sorted(counts)


def test_dots_with_room_stay_at_their_size() -> None:
    places = _place_dots([Dot("a", 1e3, 0.5), Dot("b", 1e6, 0.6)], Scale(2, 7))
    assert [place.shift for place in places] == pytest.approx([0, 0])
    same = _place_dots([Dot("a", 1e3, 0.5), Dot("b", 1e3, 0.6), Dot("c", 1e3, 0.7)], Scale(2, 7))
    assert sorted(place.shift for place in same) == pytest.approx([-BESIDE, 0, BESIDE])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 10**9), st.floats(-1e3, 1e3), st.floats(0, 10), st.floats(0, 10)),
        min_size=1,
        max_size=25,
    ),
    st.booleans(),
)
def test_nothing_leaves_the_drawing(read_page: Any, drawn: list[tuple[int, float, float, float]], larger: bool) -> None:
    dots = [Dot(f"name {i}", n, v, v - low, v + high) for i, (n, v, low, high) in enumerate(drawn)]
    page = read_page(str(trade_off_chart(dots, "plot", larger_is_better=larger)))
    [outer] = [svg for svg in page.named("svg") if "trade" in (svg.get("class") or "")]
    height = float(outer["height"] or 0)
    for circle in page.named("circle"):
        assert 0 <= float(circle["cy"] or 0) <= height
    for svg in page.named("svg"):
        assert 0 <= float((svg.get("x") or "0%").rstrip("%")) <= 100
    assert len(page.named("circle")) + len(page.named("path")) == len(dots)
    names = [text for text in page.named("text") if "rotate" in (text.get("transform") or "")]
    for text in names:
        found = re.match(r"translate\(4 ([\d.]+)\)", text["transform"] or "")
        assert found
        assert 0 <= float(found[1]) <= height


def test_a_score_far_off_becomes_an_arrow_with_its_number(read_page: Any) -> None:
    near = [Dot(f"m{i}", 10.0 ** (3 + i), 0.85 + 0.005 * i, 0.84 + 0.005 * i, 0.86 + 0.005 * i) for i in range(4)]
    page = read_page(str(trade_off_chart([*near, Dot("prompt", 500, 0.123, 0.1, 0.14)], "plot")))
    assert len(page.named("circle")) == 4
    assert len(page.named("path")) == 1
    assert "prompt 0.123" in page.text
    assert "m0 0.85" not in page.text
    loss = [Dot(dot.name, dot.size, 1 - dot.value) for dot in near]
    page = read_page(str(trade_off_chart([*loss, Dot("prompt", 500, 9.0)], "plot", larger_is_better=False)))
    assert "prompt 9.000" in page.text


def test_names_are_escaped_and_no_dots_draw_nothing() -> None:
    assert "<b>" not in str(trade_off_chart([Dot("<b>", 10, 0.5)], '"<i>'))
    assert str(trade_off_chart([], "plot")) == ""


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(4.0, 6.5, [1e4, 1e5, 1e6]), (4.1, 5.2, [2e4, 5e4, 1e5]), (4.9, 5.0, [1e5])]
)
def test_sizes_on_the_axis_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert _list_sizes(Scale(low, high)) == pytest.approx(ticks)


def test_parameters_in_short() -> None:
    assert [format_parameters(n) for n in (500, 20_000, 1_500_000)] == ["500", "20 k", "1.5 M"]
