"""Score against trained parameters: one dot with its interval for each candidate, and its name above it.

The drawing is laid out for `WIDTH` pixels. On a wider one dots only get further apart; a narrower page scrolls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from sklearn.isotonic import isotonic_regression

from finetune.evaluation.charts import Scale, format_tick
from finetune.evaluation.wording import format_number

WIDTH, HEIGHT = 880, 400
FAR = 3.0
"""Times the axis may grow to hold one more score; beyond that an arrow stands for it."""
BESIDE = 14
"""Pixels between neighbours, so that the upright names above them do not touch."""
LETTER = 6.6
"""Pixels that a letter of a name takes up, at most."""
GAP = 8
"""Pixels between an interval and the name above it."""


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
class _Place:
    """Where a dot stands."""

    share: float
    """Of the width, in [0, 1]."""
    shift: float
    """Pixels to the side of that, where others would be in its way."""


def trade_off_chart(dots: Sequence[Dot], label: str, *, larger_is_better: bool = True) -> Markup:
    """Scores over the logarithm of the sizes, with both axes; an empty string without dots.

    Args:
        dots: any number of candidates.
        label: what the chart shows, for a screen reader.
        larger_is_better: which scores may leave the scale: the low ones, or the high ones.
    """
    if not dots:
        return Markup("")
    x_scale = Scale.around((math.log10(dot.size) for dot in dots), margin=0.06)
    y_scale = _build_score_scale(dots, _select_near(dots, larger_is_better))
    parts = _draw_axes(x_scale, y_scale)
    for dot, place in zip(dots, _place_dots(dots, x_scale), strict=True):
        content = _draw_dot(dot, y_scale)
        # A place in percent of the width, and around it everything in pixels.
        parts.append(
            f'<svg x="{100 * place.share:.2f}%" y="0" overflow="visible">'
            f'<g transform="translate({place.shift:.1f} 0)">{content}</g></svg>'
        )
    return Markup(
        f'<svg class="chart trade" width="100%" height="{HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def format_parameters(count: float) -> str:
    """`500`, `20 k`, `1.5 M`."""
    unit, scale = next((pair for pair in ((" M", 1e6), (" k", 1e3)) if count >= pair[1]), ("", 1.0))
    return f"{count / scale:.3g}{unit}"


def _select_near(dots: Sequence[Dot], larger_is_better: bool) -> list[Dot]:
    """The better half, and the others as long as they do not stretch the axis by `FAR`."""
    order = sorted(dots, key=lambda dot: dot.value, reverse=larger_is_better)
    near = order[: max(2, (len(order) + 1) // 2)]
    for dot in order[len(near) :]:
        if _span([*near, dot]) > FAR * _span(near):
            break
        near.append(dot)
    return near


def _list_ends(dots: Sequence[Dot]) -> list[float]:
    return [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None]


def _span(dots: Sequence[Dot]) -> float:
    ends = _list_ends(dots)
    return max(ends) - min(ends)


def _build_score_scale(dots: Sequence[Dot], near: Sequence[Dot]) -> Scale:
    """The axis of the near scores, with room for the longest name at its upper end."""
    scale = Scale.around(_list_ends(near))
    room = min(0.5, (LETTER * max(len(dot.name) for dot in dots) + 2 * GAP) / HEIGHT)
    return Scale(scale.low, scale.high + (scale.high - scale.low) * room / (1 - room))


def _place_dots(dots: Sequence[Dot], scale: Scale) -> list[_Place]:
    """Each dot at its size, moved aside as little as keeps `BESIDE` between neighbours (least squares)."""
    shares = np.array([scale.share(math.log10(dot.size)) for dot in dots])
    order = np.lexsort((np.array([-dot.value for dot in dots]), shares))
    steps = BESIDE * np.arange(len(dots))
    moved = np.empty(len(dots))
    moved[order] = isotonic_regression(WIDTH * shares[order] - steps) + steps
    return [_Place(float(share), float(x - WIDTH * share)) for share, x in zip(shares, moved, strict=True)]


def _draw_dot(dot: Dot, scale: Scale) -> str:
    """Interval, dot and name, in pixels from the dot's place; an arrow at the edge for a score off the scale."""
    look, words = "main" if dot.main else "other", "name" if dot.main else ""
    title = f"<title>{escape(f'{dot.name}: {format_number(dot.value)}, {dot.size:,.0f} parameters')}</title>"
    y = _compute_y(dot.value, scale)
    if scale.low <= dot.value <= scale.high:
        low, high = (dot.value if end is None else end for end in (dot.low, dot.high))
        top, bottom, name = _compute_y(high, scale), _compute_y(low, scale), dot.name
        mark = (
            f'<line class="interval {look}" x1="0" x2="0" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            f'<circle class="dot {look}" cx="0" cy="{y:.1f}" r="4.5">{title}</circle>'
        )
    else:
        down = -7 if dot.value < scale.low else 7
        top, name = min(y, y + down), f"{dot.name} {format_number(dot.value)}"
        mark = f'<path class="arrow {look}" d="M-5 {y + down:.1f}L0 {y:.1f}L5 {y + down:.1f}">{title}</path>'
    at = f'transform="translate(4 {max(0.0, top - GAP):.1f}) rotate(-90)"'
    return f'{mark}<text class="{words}" {at}>{escape(name)}</text>'


def _compute_y(value: float, scale: Scale) -> float:
    return HEIGHT * (1 - scale.share(value))


def _draw_axes(x_scale: Scale, y_scale: Scale) -> list[str]:
    parts = []
    for tick in y_scale.ticks(6):
        y = _compute_y(tick, y_scale)
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
    return parts


def _list_sizes(scale: Scale) -> list[float]:
    """Powers of ten inside the axis; where there are fewer than two, also twice and five times those."""
    powers = range(math.floor(scale.low), math.ceil(scale.high) + 1)
    sizes: list[float] = []
    for factors in ((1,), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        sizes = [size for size in found if scale.low <= math.log10(size) <= scale.high]
        if len(sizes) > 1:
            break
    return sizes
