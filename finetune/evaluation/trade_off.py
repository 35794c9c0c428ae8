"""Score against trained parameters: one dot with its interval for each candidate, named where there is room.

Labels are placed for a drawing of `WIDTH` pixels. On a wider one they only get further apart; a narrower page scrolls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from finetune.evaluation.charts import Scale, format_tick
from finetune.evaluation.wording import format_number

WIDTH, HEIGHT = 680, 380
FAR = 3.0
"""Times the axis may grow to hold one more score; beyond that an arrow stands for it."""
LETTER, LINE = 6.6, 14
"""Width of a letter and height of a line of a label, in pixels; generous, so that labels do not touch."""
BESIDE = 10
"""Pixels between dots that would lie on each other, and from a dot to its label."""


@dataclass(frozen=True)
class Dot:
    """One candidate."""

    name: str
    size: float
    """Trained parameters, above 0."""
    value: float
    low: float | None = None
    high: float | None = None
    main: bool = False
    """Drawn in the accent colour."""


@dataclass(frozen=True)
class _Box:
    """A rectangle in pixels that no label may cover."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def is_inside(self) -> bool:
        return self.left >= 0 and self.right <= WIDTH and self.top >= 0 and self.bottom <= HEIGHT


@dataclass(frozen=True)
class _Placed:
    """A dot on the drawing."""

    dot: Dot
    share: float
    """Horizontal place in [0, 1]."""
    shift: float
    """Pixels to the side, beside dots of the same size."""
    y: float
    off: bool
    """Whether its score is off the scale."""

    @property
    def x(self) -> float:
        return WIDTH * self.share + self.shift

    @property
    def label(self) -> str:
        return f"{self.dot.name} {format_number(self.dot.value)}" if self.off else self.dot.name


@dataclass(frozen=True)
class _Place:
    """Where a label begins, in pixels from its dot; it runs to the left where that is to the left."""

    aside: int
    down: int

    def build_box(self, one: _Placed, width: float) -> _Box:
        start = one.x + self.aside - (width if self.aside < 0 else 0)
        return _Box(start, one.y + self.down - LINE / 2, start + width, one.y + self.down + LINE / 2)


def trade_off_chart(dots: Sequence[Dot], label: str, *, larger_is_better: bool = True) -> Markup:
    """Scores over the logarithm of the sizes, with both axes; an empty string without dots.

    Args:
        dots: any number of candidates.
        label: what the chart shows, for a screen reader.
        larger_is_better: which scores may leave the scale: the low ones, or the high ones.
    """
    if not dots:
        return Markup("")
    x_scale = Scale.around((math.log10(dot.size) for dot in dots), margin=0.08)
    near = _near(dots, larger_is_better)
    y_scale = Scale.around(end for dot in near for end in (dot.value, dot.low, dot.high))
    placed = _place_dots(dots, x_scale, y_scale)
    boxes = [_dot_box(one) for one in placed] + [_interval_box(one, y_scale) for one in placed]
    labels: list[Markup] = []
    for one in sorted(placed, key=lambda one: one.y):  # from the top, where it is most crowded
        text, box = _place_label(one, boxes)
        labels.append(text)
        boxes.append(box)
    marks = [_draw_dot(one, y_scale) for one in placed]
    parts = [*_draw_axes(x_scale, y_scale), *(line for line, _ in marks), *labels, *(dot for _, dot in marks)]
    return Markup(
        f'<svg class="chart trade" width="100%" height="{HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _near(dots: Sequence[Dot], larger_is_better: bool) -> list[Dot]:
    """The best half, and the others as long as they do not stretch the axis by `FAR`."""
    order = sorted(dots, key=lambda dot: dot.value, reverse=larger_is_better)
    near = order[: max(2, (len(order) + 1) // 2)]
    for dot in order[len(near) :]:
        if _span([*near, dot]) > FAR * _span(near):
            break
        near.append(dot)
    return near


def _span(dots: Sequence[Dot]) -> float:
    ends = [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None]
    return max(ends) - min(ends)


def _place_dots(dots: Sequence[Dot], x_scale: Scale, y_scale: Scale) -> list[_Placed]:
    """Dots whose intervals would lie on each other stand side by side."""
    shares = [x_scale.share(math.log10(dot.size)) for dot in dots]
    order = sorted(range(len(dots)), key=lambda i: (shares[i], -dots[i].value))
    groups: list[list[int]] = []
    for i in order:
        if groups and WIDTH * (shares[i] - shares[groups[-1][-1]]) < BESIDE:
            groups[-1].append(i)
        else:
            groups.append([i])
    shifts = {
        i: BESIDE * (place - (len(group) - 1) / 2) + WIDTH * (_middle(group, shares) - shares[i])
        for group in groups
        for place, i in enumerate(group)
    }
    return [
        _Placed(
            dot=dot,
            share=shares[i],
            shift=shifts[i],
            y=HEIGHT * (1 - y_scale.share(dot.value)),
            off=not y_scale.low <= dot.value <= y_scale.high,
        )
        for i, dot in enumerate(dots)
    ]


def _middle(group: Sequence[int], shares: Sequence[float]) -> float:
    return (shares[group[0]] + shares[group[-1]]) / 2


def _ends(one: _Placed, y_scale: Scale) -> tuple[float, float]:
    """Top and bottom of the interval in pixels; the dot's own place without one."""
    low, high = (one.dot.value if end is None else end for end in (one.dot.low, one.dot.high))
    return HEIGHT * (1 - y_scale.share(high)), HEIGHT * (1 - y_scale.share(low))


def _dot_box(one: _Placed) -> _Box:
    return _Box(one.x - 6, one.y - 6, one.x + 6, one.y + 6)


def _interval_box(one: _Placed, y_scale: Scale) -> _Box:
    top, bottom = _ends(one, y_scale)
    return _Box(one.x - 2, top, one.x + 2, bottom)


def _list_places() -> Iterator[_Place]:
    """Where a label may stand, the best place first."""
    for level in range(2 * HEIGHT // LINE):
        down = LINE * ((level + 1) // 2) * (-1 if level % 2 else 1)
        for aside in (BESIDE, 3 * BESIDE) if level else (BESIDE,):
            yield _Place(aside, down)
            yield _Place(-aside, down)


def _place_label(one: _Placed, taken: Sequence[_Box]) -> tuple[Markup, _Box]:
    """The name beside its dot, or a little off with a line to it, where it covers nothing else."""
    width = LETTER * len(one.label)
    places = [(place, place.build_box(one, width)) for place in _list_places()]
    free = (pair for pair in places if pair[1].is_inside() and not any(pair[1].overlaps(other) for other in taken))
    place, box = next(free, places[0])
    x, sign = one.shift + place.aside, math.copysign(1, place.aside)
    start = f"{one.shift + 5 * sign:.1f} {math.copysign(3, place.down):.1f}"
    leader = f'<path class="leader" d="M{start}L{x - 2 * sign:.1f} {place.down}"/>' if abs(place.down) > LINE else ""
    text = (
        f'<text class="{"name" if one.dot.main else ""}" x="{x:.1f}" y="{place.down + 4}" '
        f'text-anchor="{"start" if sign > 0 else "end"}">{escape(one.label)}</text>'
    )
    return _at(one, leader + text), box


def _draw_dot(one: _Placed, y_scale: Scale) -> tuple[Markup, Markup]:
    """The interval, and the dot with its numbers for a pointer that rests on it."""
    look = "main" if one.dot.main else "other"
    if one.off:
        up = "M-5 7L0 0L5 7" if one.y < HEIGHT / 2 else "M-5 -7L0 0L5 -7"
        return Markup(""), _at(one, f'<path class="arrow {look}" transform="translate({one.shift:.1f} 0)" d="{up}"/>')
    top, bottom = (end - one.y for end in _ends(one, y_scale))
    line = f'<line class="interval {look}" x1="{one.shift:.1f}" x2="{one.shift:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
    title = f"{one.dot.name}: {format_number(one.dot.value)}, {one.dot.size:,.0f} parameters"
    dot = f'<circle class="dot {look}" cx="{one.shift:.1f}" cy="0" r="4.5"><title>{escape(title)}</title></circle>'
    return _at(one, line), _at(one, dot)


def _at(one: _Placed, content: str) -> Markup:
    """Content in pixels around the dot's place, which is a share of the width."""
    return Markup(f'<svg x="{100 * one.share:.2f}%" y="{one.y:.1f}" overflow="visible">{content}</svg>')


def _draw_axes(x_scale: Scale, y_scale: Scale) -> list[Markup]:
    parts = []
    for tick in y_scale.ticks(6):
        y = HEIGHT * (1 - y_scale.share(tick))
        parts.append(
            f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="0" y="{y + 4:.1f}" dx="-8" text-anchor="end">{format_tick(tick)}</text>'
        )
    for size in _list_sizes(x_scale):
        x = 100 * x_scale.share(math.log10(size))
        parts.append(
            f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"/>'
            f'<text x="{x:.2f}%" y="{HEIGHT + 18}" text-anchor="middle">{format_parameters(size)}</text>'
        )
    return [Markup(part) for part in parts]


def _list_sizes(scale: Scale) -> list[float]:
    """Powers of ten inside the axis; where there are fewer than two, also twice and five times those."""
    for factors in ((1,), (1, 2, 5)):
        sizes = [
            factor * 10.0**power
            for power in range(math.floor(scale.low), math.ceil(scale.high) + 1)
            for factor in factors
            if scale.low <= math.log10(factor * 10.0**power) <= scale.high
        ]
        if len(sizes) > 1:
            return sizes
    return sizes


def format_parameters(count: float) -> str:
    """`500`, `20 k`, `1.5 M`."""
    unit, scale = next((pair for pair in ((" M", 1e6), (" k", 1e3)) if count >= pair[1]), ("", 1.0))
    return f"{count / scale:.3g}{unit}"
