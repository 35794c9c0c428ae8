"""Inline SVG of a topic over time: its negative share with a band and alert marks, and its volume below.

Laid out like the charts of a run's report: horizontal positions are percentages, vertical ones pixels, colours come
from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from markupsafe import Markup, escape

from finetune.applications.monitor.records import Alert
from finetune.applications.monitor.store import WindowRecord
from finetune.evaluation.wording import format_count
from finetune.recipe.messages import count_of

SHARE_HEIGHT, VOLUME_HEIGHT, GAP, TICK_HEIGHT = 150, 44, 26, 18
HEIGHT = SHARE_HEIGHT + GAP + VOLUME_HEIGHT + TICK_HEIGHT
MAX_POINTS = 400
"""Windows drawn; more are put together."""
MAX_TICKS = 5
STEPS = (
    *(timedelta(hours=hours) for hours in (1, 3, 6, 12)),
    *(timedelta(days=days) for days in (1, 2, 7, 14, 28, 91)),
)
EPOCH = datetime(2024, 1, 1, tzinfo=UTC)  # a Monday
SHAPES = {
    "share": "M-6 5L0 -6L6 5Z",  # a triangle
    "volume": "M-5 -5H5V5H-5Z",  # a square
    "recovery": "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0 -5 0Z",  # a circle
}


@dataclass(frozen=True, slots=True)
class Point:
    """One window, or several put together: shares in [0, 1], None where there are no items."""

    start: datetime
    end: datetime
    value: float | None
    low: float
    high: float
    counted: float
    items: float


def topic_chart(windows: Sequence[WindowRecord], alerts: Sequence[Alert], label: str) -> Markup:
    """A topic's closed and open windows, in order; empty without any.

    Args:
        windows: of one topic.
        alerts: of the same.
        label: what the chart shows, for a screen reader.
    """
    if not windows:
        return Markup("")
    points = list(_put_together(windows))
    axis = _Axis(windows[0].start, windows[-1].end)
    parts = [*_share_axis(), *_time_axis(axis)]
    parts += [part for run in _list_runs(points) for part in _share_curves(run, axis)]
    parts += _volume_bars(points, axis)
    parts += [_mark(alert, axis) for alert in alerts]
    return Markup('<svg class="chart" width="100%" height="{}" role="img" aria-label="{}">{}</svg>').format(
        HEIGHT, label, Markup("").join(parts)
    )


@dataclass(frozen=True, slots=True)
class _Axis:
    """Time from left to right."""

    first: datetime
    last: datetime

    def share(self, time: datetime) -> float:
        return (time - self.first) / (self.last - self.first)

    def list_ticks(self) -> list[datetime]:
        """Round times inside the axis, at most `MAX_TICKS`."""
        span = self.last - self.first
        step = next(
            (step for step in STEPS if span / step <= MAX_TICKS), STEPS[-1] * math.ceil(span / STEPS[-1] / MAX_TICKS)
        )
        tick = EPOCH + math.ceil((self.first - EPOCH) / step) * step
        ticks = []
        while tick < self.last:
            ticks.append(tick)
            tick += step
        return ticks


def _put_together(windows: Sequence[WindowRecord]) -> Iterator[Point]:
    """At most `MAX_POINTS` points; of several windows the mean, weighted by items."""
    size = math.ceil(len(windows) / MAX_POINTS)
    for start in range(0, len(windows), size):
        group = windows[start : start + size]
        items = sum(window.total for window in group)
        means = [
            sum(window.total * getattr(window.share, key) for window in group if window.total) / max(1, items)
            for key in ("value", "low", "high", "counted")
        ]
        value, low, high, counted = means
        yield Point(group[0].start, group[-1].end, value if items else None, low, high, counted, items / len(group))


def _list_runs(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Neighbouring points with items."""
    run: list[Point] = []
    for point in points:
        if point.value is not None:
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _share_axis() -> list[Markup]:
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = SHARE_HEIGHT * (1 - percent / 100)
        parts.append(Markup(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'))
        if percent % 50 == 0:
            parts.append(Markup(f'<text x="0" y="{y + 4:.1f}" dx="-8" text-anchor="end">{percent}%</text>'))
    return parts


def _time_axis(axis: _Axis) -> list[Markup]:
    ticks = axis.list_ticks()
    with_hours = any(tick.hour for tick in ticks)
    parts = []
    for tick in ticks:
        x = f"{100 * axis.share(tick):.2f}%"
        words = f"{tick.day} {tick:%b}" + (f" {tick:%H:%M}" if with_hours else "")
        parts.append(Markup(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{HEIGHT - TICK_HEIGHT}"/>'))
        parts.append(Markup(f'<text x="{x}" y="{HEIGHT - 4}" text-anchor="middle">{words}</text>'))
    return parts


def _share_curves(run: Sequence[Point], axis: _Axis) -> Iterator[Markup]:
    """Band, counted share and corrected share of neighbouring windows, each as wide as its windows."""

    edges = [1000 * axis.share(time) for point in run for time in (point.start, point.end)]

    def path(values: Sequence[float]) -> list[str]:
        heights = [SHARE_HEIGHT * (1 - value) for value in values for _ in range(2)]
        return [f"{x:.1f} {y:.1f}" for x, y in zip(edges, heights, strict=True)]

    high, low = path([point.high for point in run]), path([point.low for point in run])
    band = "L".join(high + low[::-1])
    counted = "L".join(path([point.counted for point in run]))
    value = "L".join(path([point.value or 0.0 for point in run]))
    yield Markup(
        f'<svg x="0" y="0" width="100%" height="{SHARE_HEIGHT}" viewBox="0 0 1000 {SHARE_HEIGHT}" '
        f'preserveAspectRatio="none"><path class="band" d="M{band}Z"/>'
        f'<path class="curve counted" d="M{counted}"/><path class="curve" d="M{value}"/></svg>'
    )


def _volume_bars(points: Sequence[Point], axis: _Axis) -> Iterator[Markup]:
    base, most = SHARE_HEIGHT + GAP + VOLUME_HEIGHT, max(1.0, *(point.items for point in points))
    yield Markup(
        f'<line class="grid" x1="0" x2="100%" y1="{base}" y2="{base}"/>'
        f'<text x="0" y="{base - VOLUME_HEIGHT + 9}" dx="-8" text-anchor="end">{format_count(round(most))}</text>'
        f'<text x="0" y="{base + 4}" dx="-8" text-anchor="end">0</text>'
    )
    for point in points:
        left, right, tall = axis.share(point.start), axis.share(point.end), VOLUME_HEIGHT * point.items / most
        words = f"{describe_window(point.start, point.end)}: {count_of(round(point.items), 'item')}"
        if point.value is not None:
            words += f", {point.value:.0%} negative ({point.low:.0%} to {point.high:.0%}); {point.counted:.0%} counted"
        yield Markup(
            f'<rect class="count" x="{100 * left:.2f}%" width="{max(0.05, 92 * (right - left)):.2f}%" '
            f'y="{base - tall:.1f}" height="{tall:.1f}"></rect>'
            # Over the whole height, so that the pointer finds it on the curve as well.
            f'<rect class="hover" x="{100 * left:.2f}%" width="{100 * (right - left):.2f}%" y="0" height="{base}">'
            f"<title>{escape(words)}</title></rect>"
        )


def _mark(alert: Alert, axis: _Axis) -> Markup:
    """A sign above its window: what changed is told by its shape, how grave it is by its filling."""
    x = f"{100 * axis.share(alert.start + (alert.end - alert.start) / 2):.2f}%"
    shape = SHAPES["recovery" if alert.level == "recovery" else alert.cause]
    y, foot = (-10, SHARE_HEIGHT) if alert.cause == "share" else (SHARE_HEIGHT + GAP - 9, HEIGHT - TICK_HEIGHT)
    title = escape(f"{describe_window(alert.start, alert.end)}: {alert.level}, {alert.cause}")
    return Markup(
        f'<line class="at {alert.level}" x1="{x}" x2="{x}" y1="{y + 6}" y2="{foot}"/>'
        f'<svg x="{x}" y="{y}" overflow="visible"><path class="sign {alert.level}" d="{shape}">'
        f"<title>{title}</title></path></svg>"
    )


def describe_window(start: datetime, end: datetime) -> str:
    """`25 September 2025` of a whole day, else both ends; in UTC."""
    first, last = (time.astimezone(UTC) for time in (start, end))
    if first.date() != last.date():
        is_day = (first.hour, first.minute) == (0, 0) and last - first == timedelta(days=1)
        return describe_time(first) if is_day else f"{describe_time(first)} to {describe_time(last)} UTC"
    return f"{first.day} {first:%B %Y, %H:%M} to {last:%H:%M} UTC"


def describe_time(time: datetime) -> str:
    """`25 September 2025`, with the hour where it is not midnight, in UTC."""
    utc = time.astimezone(UTC)
    return f"{utc.day} {utc:%B %Y}" + ("" if (utc.hour, utc.minute) == (0, 0) else f", {utc:%H:%M}")
