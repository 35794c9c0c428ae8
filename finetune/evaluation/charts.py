"""Inline SVG charts of the report page, drawn by hand so that the page needs no script and no network.

Horizontal positions are percentages and vertical ones pixels: a chart fills whatever width it gets, and its text keeps
its size from a phone to a printed page. Colours come from the page's style sheet through class names, so that a chart
follows dark mode. Every function drops values that are not finite and escapes every text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]
PAD_PERCENT = 2.0
"""Free space left and right of an interval plot, so that a dot at the edge is whole."""
MAX_POINTS = 400
"""Points drawn per curve; longer curves are averaged down to this many."""
ROW_HEIGHT = 34
CURVE_HEIGHT = 190
RELIABILITY_HEIGHT, HISTOGRAM_HEIGHT, HISTOGRAM_GAP = 220, 44, 46
MIN_OPACITY = 0.22
"""Of a heat-map cell with at least one row: a single mistake stays visible."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number; None, NaN, text and booleans are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def format_tick(value: float) -> str:
    """A number as an axis shows it: `0.5`, `20`, `2e-05`, `12,000`."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear axis from `low` to `high`, both finite."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Iterable[Any], *, margin: float = 0.06, within: tuple[float, float] | None = None) -> Scale:
        """The axis that holds every finite value and `margin` of their range more; (0, 1) if there is none.

        The margin does not cross an end of `within` unless a value does.
        """
        finite = [max(-1e300, min(1e300, float(value))) for value in values if is_number(value)]
        if not finite:
            return cls(0.0, 1.0)
        low, high = min(finite), max(finite)
        extra = (high - low) * margin or abs(high) * 0.1 or 0.5
        least, most = within or (-math.inf, math.inf)
        start = max(least, low - extra) if least <= low else low - extra
        return cls(start, min(most, high + extra) if high <= most else high + extra)

    def share(self, value: float) -> float:
        """Where `value` lies between the ends, cut to [0, 1]."""
        span = self.high / 2 - self.low / 2
        return min(1.0, max(0.0, (value / 2 - self.low / 2) / span)) if span > 0 else 0.5

    def percent(self, value: float) -> str:
        """Horizontal position inside the padding, such as `31.5%`."""
        return f"{PAD_PERCENT + (100 - 2 * PAD_PERCENT) * self.share(value):.2f}%"

    def ticks(self, count: int = 4) -> list[float]:
        """About `count` round numbers inside the axis, smallest first."""
        span = self.high - self.low
        if not (math.isfinite(span) and span > 1e-300):
            return [self.low]
        power = 10.0 ** math.floor(math.log10(span / count))
        step = next((factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= count), 10 * power)
        first = math.ceil(self.low / step - 1e-9)
        return [
            (first + index) * step for index in range(count + 2) if (first + index) * step <= self.high + step / 1e6
        ]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: `points` are (step, value); `look` is a line, a faint line, or a dashed line with dots."""

    points: Points
    look: Literal["line", "faint", "dots"] = "line"


def smooth(points: Points, weight: float = 0.9) -> list[tuple[float, float]]:
    """Exponential moving average with the start-up bias removed (Adam's correction, arXiv:1412.6980, section 3).

    Args:
        points: (step, value), in order; values that are not finite are dropped.
        weight: Share of the past in each value, in [0, 1).
    """
    average, out = 0.0, []
    for count, (step, value) in enumerate((point for point in points if is_number(point[1])), start=1):
        average = weight * average + (1 - weight) * value
        out.append((step, average / (1 - weight**count)))
    return out


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of neighbours; short curves come back as they are."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x / len(g) for x, _ in g), sum(y / len(g) for _, y in g)) for g in groups]


def interval_row(scale: Scale, score: Mapping[str, Any], *, reference: Any = None, main: bool = False) -> Markup:
    """One row of a dot-and-interval plot; the numbers stand beside it in the table, so it is hidden from readers.

    Args:
        scale: The axis that all rows share; a value outside it becomes an arrow at the edge.
        score: {"value", "low", "high"}; missing ends draw the dot alone, a missing value draws an empty row.
        reference: Value of the dashed vertical line, if any.
        main: Draw in the accent colour.
    """
    parts = [_vertical(scale.percent(tick), "grid") for tick in scale.ticks()]
    if is_number(reference):
        parts.append(_vertical(scale.percent(reference), "reference"))
    value, low, high = (float(score[key]) if is_number(score.get(key)) else None for key in ("value", "low", "high"))
    look = "main" if main else "other"
    if value is None:
        return _svg(parts, ROW_HEIGHT)
    if not scale.low <= value <= scale.high:
        x, path = ("0.8%", "M9 -5L0 0L9 5") if value < scale.low else ("99.2%", "M-9 -5L0 0L-9 5")
        arrow = Markup(f'<svg x="{x}" y="50%" overflow="visible"><path class="arrow {look}" d="{path}"/></svg>')
        return _svg([*parts, arrow], ROW_HEIGHT)
    if low is not None and high is not None:
        ends = f'x1="{scale.percent(low)}" x2="{scale.percent(high)}"'
        parts.append(Markup(f'<line class="interval {look}" {ends} y1="50%" y2="50%"/>'))
    parts.append(Markup(f'<circle class="dot {look}" cx="{scale.percent(value)}" cy="50%" r="4.5"/>'))
    return _svg(parts, ROW_HEIGHT)


def interval_axis(scale: Scale) -> Markup:
    """The numbers below a dot-and-interval plot."""
    return _svg([_text(format_tick(tick), scale.percent(tick), 12, "middle") for tick in scale.ticks()], 16)


def bar(share: Any) -> Markup:
    """A small bar for a share in [0, 1]; empty when there is no number."""
    width = min(1.0, max(0.0, share)) * 100 if is_number(share) else 0.0
    track = '<rect class="track" x="0" y="2" width="100%" height="6" rx="3"/>'
    return _svg([Markup(f'{track}<rect class="fill" x="0" y="2" width="{width:.1f}%" height="6" rx="3"/>')], 10)


def curve_chart(series: Sequence[Series], label: str, *, from_zero: bool = False, x_ticks: int = 4) -> Markup:
    """Curves over training steps with both axes; an empty string when no point is finite.

    Args:
        series: Drawn in order, the last on top.
        label: What the chart shows, for a screen reader.
        from_zero: Start the vertical axis at 0 when no value is below it.
        x_ticks: About so many numbers below the horizontal axis.
    """
    curves = [(one.look, thin([point for point in one.points if all(map(is_number, point))])) for one in series]
    curves = [(look, points) for look, points in curves if points]
    if not curves:
        return Markup("")
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    x_scale, y_scale = Scale(min(xs), max(xs)), Scale.around(ys)
    if from_zero and min(ys) >= 0:
        y_scale = Scale(0.0, y_scale.high)
    return _svg(
        _axes(x_scale, y_scale, x_ticks=x_ticks) + [_curve(look, points, x_scale, y_scale) for look, points in curves],
        CURVE_HEIGHT,
        label,
    )


def reliability_chart(bins: Sequence[Mapping[str, Any]], label: str) -> Markup:
    """Accuracy against confidence per bin, above a histogram of the counts (arXiv:1706.04599, figure 1).

    Args:
        bins: {"low", "high", "count", "confidence", "accuracy"}; each with at least one row.
        label: What the chart shows, for a screen reader.
    """
    axis, base = Scale(0.0, 1.0), RELIABILITY_HEIGHT + HISTOGRAM_GAP + HISTOGRAM_HEIGHT
    parts = _axes(axis, axis, height=RELIABILITY_HEIGHT)
    parts.append(Markup(f'<line class="reference" x1="0" y1="{RELIABILITY_HEIGHT}" x2="100%" y2="0"/>'))
    most = max((one["count"] for one in bins), default=1)
    for one in bins:
        parts.append(_count_bar(one, most, base))
        if is_number(one.get("confidence")) and is_number(one.get("accuracy")):
            parts.append(_reliability_dot(one, most))
    return _svg(parts, base, label)


def heat_map(matrix: Sequence[Sequence[int]], labels: Sequence[str], label: str) -> Markup:
    """A confusion matrix without numbers: rows are references, columns predictions, ink the share of the reference.

    Args:
        matrix: (K, K) counts.
        labels: K names, shown when the pointer rests on a cell.
        label: What the chart shows, for a screen reader.
    """
    size = len(matrix)
    cells = []
    for row, counts in enumerate(matrix):
        total = sum(counts)
        for column, count in enumerate(counts):
            if count:
                look = "right" if row == column else "wrong"
                opacity = MIN_OPACITY + (1 - MIN_OPACITY) * math.sqrt(count / total)
                title = escape(f"{labels[row]} \N{RIGHTWARDS ARROW} {labels[column]}: {count:,} of {total:,}")
                cells.append(
                    f'<rect class="{look}" x="{column}" y="{row}" width="1" height="1" '
                    f'fill-opacity="{opacity:.2f}"><title>{title}</title></rect>'
                )
    return Markup(
        f'<svg class="heat" viewBox="0 0 {size} {size}" role="img" aria-label="{escape(label)}">'
        f'<rect class="frame" x="0" y="0" width="{size}" height="{size}"/>{"".join(cells)}</svg>'
    )


def _svg(parts: Iterable[Markup], height: float, label: str | None = None) -> Markup:
    access = Markup('role="img" aria-label="{}"').format(label) if label else Markup('aria-hidden="true"')
    return Markup(f'<svg class="chart" width="100%" height="{height:g}" {access}>{"".join(parts)}</svg>')


def _text(text: str, x: str, y: float, anchor: str, shift: int = 0, *, look: str = "") -> Markup:
    return Markup(f'<text class="{look}" x="{x}" y="{y:.1f}" dx="{shift}" text-anchor="{anchor}">{escape(text)}</text>')


def _vertical(x: str, look: str) -> Markup:
    return Markup(f'<line class="{look}" x1="{x}" x2="{x}" y1="0" y2="100%"/>')


def _axes(x_scale: Scale, y_scale: Scale, height: float = CURVE_HEIGHT, x_ticks: int = 4) -> list[Markup]:
    parts = []
    for tick in y_scale.ticks():
        y = height * (1 - y_scale.share(tick))
        parts.append(Markup(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'))
        parts.append(_text(format_tick(tick), "0", y + 4, "end", shift=-8))
    parts += [
        _text(format_tick(tick), f"{100 * x_scale.share(tick):.2f}%", height + 18, "middle")
        for tick in x_scale.ticks(x_ticks)
    ]
    return parts


def _curve(look: str, points: Points, x_scale: Scale, y_scale: Scale) -> Markup:
    # The path lives in a stretched drawing of its own: 1000 units wide whatever the width of the page.
    path = "M" + "L".join(
        f"{1000 * x_scale.share(x):.1f} {CURVE_HEIGHT * (1 - y_scale.share(y)):.1f}" for x, y in points
    )
    line = (
        (
            f'<svg x="0" y="0" width="100%" height="{CURVE_HEIGHT}" viewBox="0 0 1000 {CURVE_HEIGHT}" '
            f'preserveAspectRatio="none"><path class="curve {look}" d="{path}"/></svg>'
        )
        if len(points) > 1
        else ""
    )
    dots = points if look == "dots" or len(points) == 1 else []
    marks = "".join(
        f'<circle class="mark {look}" cx="{100 * x_scale.share(x):.2f}%" '
        f'cy="{CURVE_HEIGHT * (1 - y_scale.share(y)):.1f}" r="4"><title>step {x:,.0f}: {y:.3f}</title></circle>'
        for x, y in dots
    )
    return Markup(line + marks)


def _count_bar(one: Mapping[str, Any], most: int, base: float) -> Markup:
    low, high = one["low"], one["high"]
    tall = max(1.0, HISTOGRAM_HEIGHT * one["count"] / most)
    shape = Markup(
        f'<rect class="count" x="{100 * low + 0.4:.2f}%" width="{max(0.2, 100 * (high - low) - 0.8):.2f}%" '
        f'y="{base - tall:.1f}" height="{tall:.1f}"><title>{one["count"]:,} rows</title></rect>'
    )
    short = f"{one['count'] / 1000:.1f}k" if one["count"] >= 1000 else str(one["count"])
    text = _text(short, f"{50 * (low + high):.2f}%", base - tall - 4, "middle", look="small")
    return shape + text


def _reliability_dot(one: Mapping[str, Any], most: int) -> Markup:
    x, accuracy = f"{100 * one['confidence']:.2f}%", RELIABILITY_HEIGHT * (1 - one["accuracy"])
    ideal, radius = RELIABILITY_HEIGHT * (1 - one["confidence"]), 3 + 4 * math.sqrt(one["count"] / most)
    title = f"confidence {one['confidence']:.3f}, accuracy {one['accuracy']:.3f}, {one['count']:,} rows"
    return Markup(
        f'<line class="gap" x1="{x}" x2="{x}" y1="{ideal:.1f}" y2="{accuracy:.1f}"/>'
        f'<circle class="dot main" cx="{x}" cy="{accuracy:.1f}" r="{radius:.1f}"><title>{title}</title></circle>'
    )
