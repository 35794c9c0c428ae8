"""What attention costs: time and memory of forward and backward against the length of a row, beside the article's O.

Queries, keys and values have MiniLM's shape (12 heads of 32), one row, float32. The article counts O(N^2 d) operations
for each of H heads (table 1): forward and backward are six products, each of two operations for every head, feature and
pair of tokens that see each other. With logarithmic axes that is a slope of 2; within a window of w tokens, far above
w, of 1. The table counts only pairs that see each other, also where a variant computes more and hides it.

The second table finds the rule in `finetune.models.classifier.choose_attention`: packs of rows of one length, 2,048
tokens together, through one Triad layer of MiniLM's width, by plain products and by SDPA.

To repeat, on a machine that does nothing else:

    .venv/bin/python benchmarks/attention_cost.py --rounds 3 --plot attention_cost.svg --json attention_cost.json

Variants:
    full, plain      softmax(Q K^T / sqrt(d_k)) V as Triad's `attend` writes it, N^2 weights a head in memory
    full, SDPA       PyTorch's fused kernel, which keeps no weights
    window, masked   `attend` with a mask of N^2: what is outside of the window is computed, then hidden
    window, blocks   `attend` as Triad calls it: what is far outside of the window is not computed
    window, SDPA     the fused kernel with the same mask
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from measuring import describe_machine, get_device, read_clock, read_peak_mb, run_alone, run_rounds, write_json

from finetune.evaluation.charts import Scale

HEADS, HEAD_DIM, INNER = 12, 32, 1536
WINDOW = 256
"""A token sees those fewer than this many away, on both sides."""
SHORTEST, LONGEST = 256, 8192
REPEATS = 3
"""Of each measurement in a round; the fastest counts, as the least disturbed."""
SQUARES = 5
"""Matrices of N^2 for each head that plain products hold at their peak: products, weights, gradients, one more."""
PACK_TOKENS = 2048
SHORT_LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PAPER = ("full, plain", "window, blocks")
"""Variants whose operations on paper are drawn."""
GRID = 'stroke="#d8d8d8"'
DASHES = 'stroke="#000000" stroke-dasharray="3 4"'
COLOURS = ("#1f5fbf", "#d1661f", "#8a8a8a", "#2f8f4e", "#9b59b6")


@dataclass(frozen=True)
class Setting:
    """What all variants have in common."""

    lengths: tuple[int, ...]
    threads: int


@dataclass(frozen=True)
class Cost:
    """Forward and backward of one row; the memory is what came on top of an idle process."""

    length: int
    milliseconds: float
    peak_mb: float


@dataclass(frozen=True)
class PackCost:
    """Milliseconds of one layer on a pack of rows of one length; training is forward and backward."""

    length: int
    training_plain: float
    training_sdpa: float
    prediction_plain: float
    prediction_sdpa: float

    def compute_gain(self, use: str) -> float:
        """How many times as fast SDPA is in `training` or `prediction`."""
        return float(getattr(self, f"{use}_plain") / getattr(self, f"{use}_sdpa"))


def count_pairs(length: int, window: int | None) -> int:
    """Pairs of tokens that see each other: all, or those fewer than `window` apart."""
    if window is None or window >= length:
        return length**2
    return length * (2 * window - 1) - window * (window - 1)  # the ends lack 1 + 2 + ... + (window - 1) pairs each


def count_operations(length: int, window: int | None) -> int:
    """Of the six products of forward (2) and backward (4)."""
    return 6 * 2 * HEADS * HEAD_DIM * count_pairs(length, window)


def fit_slope(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through (x, y) with both axes logarithmic; NaN for fewer than two points."""
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*[(math.log(x), math.log(y)) for x, y in points], strict=True)).slope


def measure_row(setting: Setting, *, window: int | None, way: str) -> list[Cost]:
    """One variant, from short to long rows, up to what fits into the memory that is free."""
    import psutil
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from finetune.models.triad.modeling_triad import attend, build_bias

    torch.set_num_threads(setting.threads)
    module = SimpleNamespace(training=True, is_causal=False)
    free_mb = (torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available) / 2**20

    def run(length: int) -> float:
        leaves = [torch.randn(1, length, HEADS, HEAD_DIM, device=get_device(), requires_grad=True) for _ in range(3)]
        mask = None
        if window is not None and way != "blocks":
            places = torch.arange(length, device=get_device())
            mask = build_bias(places, places, torch.float32, is_causal=False, window=window)
        function = sdpa_attention_forward if way == "SDPA" else attend
        # Asked for its weights, `attend` neither works in blocks nor leaves long rows to SDPA.
        option = {"sliding_window": window} if way == "blocks" else {"output_attentions": way != "SDPA"}
        start = read_clock()
        heads, _ = function(module, *(leaf.transpose(1, 2) for leaf in leaves), mask, **option)
        heads.sum().backward()
        return 1000 * (read_clock() - start)

    run(64)
    idle_mb, costs = read_peak_mb(), []
    for length in setting.lengths:
        if way in ("plain", "masked") and SQUARES * HEADS * length**2 * 4 / 2**20 > free_mb:
            break
        milliseconds = min(run(length) for _ in range(REPEATS))
        costs.append(Cost(length, milliseconds, read_peak_mb() - idle_mb))
    return costs


VARIANTS: dict[str, Callable[[Setting], list[Cost]]] = {
    f"{'full' if window is None else 'window'}, {way}": partial(measure_row, window=window, way=way)
    for window, way in ((None, "plain"), (None, "SDPA"), (WINDOW, "masked"), (WINDOW, "blocks"), (WINDOW, "SDPA"))
}


def measure_packs(setting: Setting) -> list[PackCost]:
    """One layer on packs of rows of each length, plain products and SDPA by turns."""
    import torch

    from finetune.models.triad import TriadConfig, TriadModel

    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    config = TriadConfig(
        vocab_size=1000,
        hidden_size=HEADS * HEAD_DIM,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        activation="gelu",
        max_position_embeddings=PACK_TOKENS,
        dropout=0.0,
    )
    model = TriadModel(config).to(get_device())
    ids = torch.randint(1, 1000, (1, PACK_TOKENS), device=get_device())

    def run(length: int, implementation: str, *, training: bool) -> float:
        model.set_attn_implementation(implementation)
        positions = torch.arange(length, device=get_device()).repeat(PACK_TOKENS // length)[None]
        start = read_clock()
        with torch.set_grad_enabled(training):
            asked = implementation == "eager"  # for weights: else long rows take SDPA by themselves
            states = model(input_ids=ids, position_ids=positions, output_attentions=asked).last_hidden_state
            if training:
                states.sum().backward()
        return 1000 * (read_clock() - start)

    def take_turns(length: int, *, training: bool) -> list[float]:
        turns = [[run(length, way, training=training) for way in ("eager", "sdpa")] for _ in range(REPEATS)]
        return [min(times) for times in zip(*turns, strict=True)]

    return [PackCost(one, *take_turns(one, training=True), *take_turns(one, training=False)) for one in SHORT_LENGTHS]


def merge_rounds(rounds: Sequence[Sequence[Any]]) -> list[Any]:
    """Medians over rounds of `Cost` or `PackCost`, for the lengths that every round reached."""
    merged = []
    for turns in zip(*rounds, strict=False):
        medians = {name: statistics.median(getattr(one, name) for one in turns) for name in vars(turns[0])}
        merged.append(replace(turns[0], **medians | {"length": turns[0].length}))
    return merged


def find_crossover(costs: Sequence[PackCost], use: str) -> int | None:
    """The length from which SDPA is faster at every measured length; None where it is slower at the longest."""
    found = None
    for one in reversed(costs):
        if one.compute_gain(use) <= 1:
            break
        found = one.length
    return found


def build_row_table(found: Mapping[str, Sequence[Cost]]) -> str:
    """Operations on paper beside measured time and memory; the slope is that of time since the row above."""
    lines = [
        "| attention | tokens N | 10^9 operations | ms | 10^9 / s | slope | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, costs in found.items():
        window = WINDOW if name.startswith("window") else None
        for before, one in zip([None, *costs], costs, strict=False):
            billions = count_operations(one.length, window) / 1e9
            both = [] if before is None else [before, one]
            slope = f"{fit_slope([(cost.length, cost.milliseconds) for cost in both]):.2f}" if both else ""
            lines.append(
                f"| {name} | {one.length:,} | {billions:.2f} | {one.milliseconds:,.1f} "
                f"| {1000 * billions / one.milliseconds:.1f} | {slope} | {one.peak_mb:,.0f} |"
            )
    return "\n".join(lines)


def describe_slopes(found: Mapping[str, Sequence[Cost]]) -> str:
    """Slopes of operations and time over the longer half of the lengths, where fixed costs no longer count."""
    lines = []
    for name, costs in found.items():
        window, longer = WINDOW if name.startswith("window") else None, costs[(len(costs) - 1) // 2 :]
        paper = fit_slope([(one.length, count_operations(one.length, window)) for one in longer])
        time = fit_slope([(one.length, one.milliseconds) for one in longer])
        lines.append(f"{name:15} slope from N = {longer[0].length:,}: operations {paper:.2f}, time {time:.2f}")
    return "\n".join(lines)


def build_pack_table(costs: Sequence[PackCost]) -> str:
    """Plain products against SDPA in one layer, and the length from which SDPA is faster."""
    lines = [
        "| row of | training: plain ms | SDPA ms | x as fast | prediction: plain ms | SDPA ms | x as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in costs:
        gains = [one.compute_gain(use) for use in ("training", "prediction")]
        lines.append(
            f"| {one.length:,} | {one.training_plain:.1f} | {one.training_sdpa:.1f} | {gains[0]:.2f} "
            f"| {one.prediction_plain:.1f} | {one.prediction_sdpa:.1f} | {gains[1]:.2f} |"
        )
    for use in ("training", "prediction"):
        lines.append(f"\n{use}: SDPA is faster from rows of {find_crossover(costs, use) or 'no length measured'}")
    return "\n".join(lines)


# The plot


@dataclass(frozen=True)
class Panel:
    """A drawing area with two logarithmic axes, `left` pixels from the edge of the image."""

    title: str
    left: int
    x_scale: Scale
    y_scale: Scale

    WIDTH: ClassVar[int] = 380
    HEIGHT: ClassVar[int] = 300
    TOP: ClassVar[int] = 40

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Values -> pixels."""
        across, up = self.x_scale.share(math.log10(x)), self.y_scale.share(math.log10(y))
        return self.left + self.WIDTH * across, self.TOP + self.HEIGHT * (1 - up)

    def draw_line(self, points: Sequence[tuple[float, float]], style: str) -> str:
        """One polyline."""
        pixels = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*point) for point in points))
        return f'<polyline points="{pixels}" fill="none" {style}/>'

    def draw_axes(self, lengths: Sequence[int]) -> list[str]:
        """Title, a vertical line for each length, a horizontal one for each power of ten."""
        middle, bottom = self.left + self.WIDTH / 2, self.TOP + self.HEIGHT + 36
        parts = [
            f'<text x="{self.left}" y="{self.TOP - 14}" font-weight="bold">{self.title}</text>',
            f'<text x="{middle}" y="{bottom}" text-anchor="middle">tokens of the row</text>',
        ]
        low, high = self.y_scale.low, self.y_scale.high
        for length in lengths:
            x, y = self.place(length, 10**low)
            parts.append(self.draw_line([(length, 10**low), (length, 10**high)], GRID))
            parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{length:,}</text>')
        for power in range(math.ceil(low), math.floor(high) + 1):
            x, y = self.place(lengths[0], 10**power)
            parts.append(self.draw_line([(lengths[0], 10**power), (lengths[-1], 10**power)], GRID))
            parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{10**power:,g}</text>')
        return parts


def build_panel(title: str, left: int, curves: Sequence[Sequence[tuple[float, float]]]) -> Panel:
    """A panel with room for all points; both axes need at least one."""
    xs, ys = ([math.log10(point[axis]) for curve in curves for point in curve] for axis in (0, 1))
    return Panel(title, left, Scale(min(xs), max(xs)), Scale.around(ys))


def build_plot(found: Mapping[str, Sequence[Cost]]) -> str:
    """Time and memory against length as SVG, and the article's N^2 and N w, drawn through a measured end."""
    lengths = sorted({one.length for costs in found.values() for one in costs})
    times = {name: [(one.length, one.milliseconds) for one in costs] for name, costs in found.items()}
    memory = {name: [(one.length, one.peak_mb) for one in costs if one.peak_mb > 0] for name, costs in found.items()}
    parts = []
    for title, left, curves in (("milliseconds, forward and backward", 60, times), ("peak MB", 520, memory)):
        panel = build_panel(title, left, list(curves.values()))
        parts += panel.draw_axes(lengths)
        parts += [
            panel.draw_line(curve, f'stroke="{colour}" stroke-width="2"')
            for curve, colour in zip(curves.values(), COLOURS, strict=True)
        ]
        if curves is times:
            parts += [
                panel.draw_line(predict_times(name, costs), DASHES) for name, costs in found.items() if name in PAPER
            ]
    names = [*zip(found, COLOURS, strict=True), ("operations on paper (dashed)", "#000000")]
    for index, (name, colour) in enumerate(names):
        x, y = 60 + 310 * (index % 3), 408 + 22 * (index // 3)
        parts.append(f'<rect x="{x}" y="{y - 5}" width="18" height="3" fill="{colour}"/>')
        parts.append(f'<text x="{x + 26}" y="{y}">{name}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 446" font-family="sans-serif" font-size="12">'
        f'<title>Cost of attention against the length of a row</title><rect width="930" height="446" fill="#ffffff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def predict_times(name: str, costs: Sequence[Cost]) -> list[tuple[float, float]]:
    """Milliseconds at each length if time were proportional to operations, from the longest row measured."""
    window = WINDOW if name.startswith("window") else None
    pace = costs[-1].milliseconds / count_operations(costs[-1].length, window)
    return [(one.length, pace * count_operations(one.length, window)) for one in costs]


def list_lengths(longest: int) -> tuple[int, ...]:
    """Powers of two from the shortest length."""
    return tuple(length for length in (SHORTEST * 2**power for power in range(20)) if length <= longest)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=LONGEST, help=f"longest row, at least {SHORTEST}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, default=None, help="write the plot to this SVG file")
    parser.add_argument("--json", type=Path, default=None, help="write every round to this file")
    return parser


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    if options.max_length < SHORTEST:
        parser.error(f"--max-length must be at least {SHORTEST}, got {options.max_length}.")
    machine = run_alone(describe_machine) | {"threads": options.threads}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    setting = Setting(list_lengths(options.max_length), options.threads)
    rows = run_rounds(
        VARIANTS,
        [setting],
        options.rounds,
        lambda costs: f"{costs[-1].length:,} tokens: {costs[-1].milliseconds:,.1f} ms, {costs[-1].peak_mb:,.0f} MB",
    )
    packs = run_rounds({"packs": measure_packs}, [setting], options.rounds, lambda costs: f"{len(costs)} lengths")[
        "packs"
    ]
    found = {name: merge_rounds(rounds) for name, rounds in rows.items()}
    print(f"\n{build_row_table(found)}\n\n{describe_slopes(found)}\n\n{build_pack_table(merge_rounds(packs))}")
    if options.plot:
        options.plot.write_text(build_plot(found), encoding="utf-8")
    write_json(options.json, machine=machine, setting=setting, rows=rows, packs=packs)


if __name__ == "__main__":
    main()
