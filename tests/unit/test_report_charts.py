"""The geometry of the report's charts: whatever the numbers are, nothing leaves the drawing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluation import charts

anything = st.one_of(st.none(), st.floats(), st.integers(-(10**9), 10**9))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=30), st.booleans())
def test_curves_stay_on_the_drawing(read_page: Any, points: list[tuple[float, float]], from_zero: bool) -> None:
    looks = [charts.Series(points, "faint"), charts.Series(charts.smooth(points)), charts.Series(points, "dots")]
    page = read_page(str(charts.curve_chart(looks, "curve", from_zero=from_zero)))
    for path in page.named("path"):
        for x, y in (pair.split() for pair in re.split("[ML]", path["d"] or "")[1:]):
            assert 0 <= float(x) <= 1000
            assert 0 <= float(y) <= charts.CURVE_HEIGHT


@settings(max_examples=150, deadline=None)
@given(st.lists(st.fixed_dictionaries({"value": anything, "low": anything, "high": anything}), min_size=1, max_size=5))
def test_intervals_stay_on_the_drawing(read_page: Any, scores: list[dict[str, Any]]) -> None:
    scale = charts.Scale.around(end for one in scores for end in one.values())
    html = "".join(charts.interval_row(scale, one, reference=scores[0]["value"]) for one in scores)
    page = read_page(html + charts.interval_axis(scale))
    for _, attributes in page.tags:
        for key in ("x1", "x2", "cx"):
            assert 0 <= float((attributes.get(key) or "0%").rstrip("%")) <= 100


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_even_and_inside(low: float, span: float) -> None:
    scale = charts.Scale(low, low + span)
    ticks = scale.ticks()
    assert len(ticks) <= 6
    assert all(scale.low - 1e-6 * span <= tick <= scale.high + 1e-5 * span for tick in ticks)
    if len(ticks) > 2:
        assert np.diff(ticks) == pytest.approx(np.diff(ticks)[0], rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e3, 1e3), st.integers(1, 60))
def test_smoothing_keeps_a_constant(value: float, count: int) -> None:
    assert [y for _, y in charts.smooth([(step, value) for step in range(count)])] == pytest.approx([value] * count)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000))
def test_thinning_keeps_the_mean_step(count: int) -> None:
    thinned = charts.thin([(float(step), float(step)) for step in range(count)], limit=100)
    assert len(thinned) <= 100
    assert all(x == pytest.approx(y) for x, y in thinned)


def test_names_in_charts_are_escaped(read_page: Any) -> None:
    matrix = np.ones((13, 13), dtype=int).tolist()
    page = read_page(str(charts.heat_map(matrix, ['"><script>'] * 13, '" onload="x')))
    assert not page.named("script")
    assert page.named("svg")[0]["aria-label"] == '" onload="x'


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.5, 0.99], 0.4706, 1.0),
        ([0.01, 0.5], 0.0, 0.5294),
        ([-0.2, 0.8], -0.26, 0.86),  # a correlation
        ([0.9, 33.4], 0.0, 35.35),  # BLEU
        ([4.93, 27.1], 3.5998, 28.4302),  # perplexity
    ],
)
def test_an_axis_leaves_the_usual_range_only_where_a_value_does(values: list[float], low: float, high: float) -> None:
    # A margin of 6 % of the range at each end, worked by hand.
    scale = charts.Scale.around(values, within=(0.0, 1.0))
    assert (scale.low, scale.high) == (pytest.approx(low), pytest.approx(high))
