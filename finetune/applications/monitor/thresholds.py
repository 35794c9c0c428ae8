"""Thresholds of the tests, for a stated rate of false alarms, by simulation.

Streams in which nothing changes are drawn from the validation rows, and go through the tests as a topic's windows do:
the usual share is estimated from the reference windows before, which move along, so that its error is part of what is
simulated. A threshold depends on how many items a window has and on the usual share, so there is a table of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from finetune.applications.monitor.detectors import (
    compute_surprise,
    judge_streams,
)
from finetune.applications.monitor.records import Counts, Level
from finetune.applications.monitor.shares import Quantifier
from finetune.artifact.run_folder import load_json, save_json
from finetune.errors import ResourceError
from finetune.evaluation.quantification import Floats
from finetune.recipe.applications import MonitorSection

LEVELS: tuple[Level, ...] = get_args(Level)[:2]
"""`warning` and `alarm`."""
RARER = 10
"""Nothing at all is said falsely more often than stated; an alarm is that many times as rare."""
VOLUME_PART = 0.25
"""Of the false alarms, those of the burst test; the two tests of the share have the rest."""
SIZES = (5, 20, 50, 100, 200, 400)
"""Items of a window. The share of a topic with fewer than the first is not judged: one text would decide."""
SHARES = (0.02, 0.1, 0.25, 0.5)
"""Usual shares."""
VOLUMES = (5, 50, 400)
"""Usual items of a window, for the burst test, whose threshold is the highest needed for any of them."""
DISPERSIONS = (0.0, 0.1, 0.5)
"""Variance of the rate behind the items of a window, in squares of its mean."""
POOL = 4096
"""Windows that are drawn once for a place in the table, and then again and again."""
MERGED = 12
"""Bins that texts are drawn in."""
BURSTS = 2000
"""References that are drawn for a burst test, each followed by `NEW_WINDOWS`."""
NEW_WINDOWS = 50
LEAST = 1e-6
"""No threshold is lower: a statistic of 0 must not exceed it."""
TAIL = 0.05
"""Rarer values than this share of streams reaches are extrapolated."""


@dataclass(frozen=True)
class Thresholds:
    """What each test must exceed.

    Args:
        cusum, ewma: level -> a threshold for each of `SIZES` and `SHARES`, (sizes, shares).
        burst: level -> a threshold.
        chosen_for: values of the recipe's section that they hold for.
    """

    cusum: Mapping[Level, Floats]
    ewma: Mapping[Level, Floats]
    burst: Mapping[Level, float]
    chosen_for: Mapping[str, float]

    def find(self, test: str, level: Level, items: float, share: float) -> float:
        """Between the places of the table, evenly in the log of the items and in the share; outside, as at its edge.

        Args:
            test: `cusum`, `ewma` or `burst`.
            level: how much is asked for.
            items: of a usual window.
            share: the usual one.
        """
        if test == "burst":
            return self.burst[level]
        table = {"cusum": self.cusum, "ewma": self.ewma}[test][level]
        by_size = [np.interp(share, SHARES, row) for row in table]
        return float(np.interp(np.log(max(items, 1.0)), np.log(SIZES), by_size))


def choose_thresholds(
    quantifier: Quantifier, section: MonitorSection, seed: int = 13, *, streams: int = 800, windows: int = 200
) -> Thresholds:
    """Choose them so that a topic in which nothing changes is alerted every `false_alarm_windows` windows, by any test.

    Args:
        quantifier: what texts of either class look like.
        section: the monitor's.
        seed: of the streams.
        streams: to simulate for each place in the table.
        windows: of each stream, at most.
    """
    generator = np.random.default_rng(seed)
    reference, target = section.reference_size, float(section.false_alarm_windows)
    cusum, ewma = ({level: np.zeros((len(SIZES), len(SHARES))) for level in LEVELS} for _ in range(2))
    length = max(8, min(windows, section.false_alarm_windows))
    shared = target / (1 - VOLUME_PART)
    chances = {level: _find_chance(length, shared * (RARER if level == "alarm" else 1)) for level in LEVELS}
    rates, ratios = merge_bins(quantifier)
    for place in np.ndindex(len(SIZES), len(SHARES)):
        shares = [SHARES[place[1]]] * (section.reference_size + length)
        counts = draw_streams(rates, SIZES[place[0]], shares, generator, streams)
        highest = [each.max(axis=0) for each in judge_streams(counts, ratios, reference, section.rise)]
        part = _find_part(highest, chances["warning"])
        for level in LEVELS:
            for table, values in zip((cusum, ewma), highest, strict=True):
                table[level][place] = _find_quantile(values, part * chances[level])
    burst = _choose_burst(section, target / VOLUME_PART, generator)
    return Thresholds(cusum, ewma, burst, list_choices(section))


def merge_bins(quantifier: Quantifier) -> tuple[Floats, Floats]:
    """Validation in fewer bins, `MERGED` of about equal mass, which simulate in a fraction of the time.

    Returns:
        The share of negative and of other rows in each, (2, M), and its likelihood ratio, (M,).
    """
    rates = np.stack([each / each.sum() for each in (quantifier.negatives, quantifier.others)])
    mass = rates.mean(axis=0)
    _, place = np.unique((MERGED * (mass.cumsum() - mass / 2)).astype(int), return_inverse=True)
    logs = mass * np.log(quantifier.ratios)
    merged = np.array([np.bincount(place, weights=each) for each in (*rates, mass, logs)], dtype=np.float64)
    merged = merged[:, merged[2] > 0]
    return merged[:2], np.asarray(np.exp(merged[3] / merged[2]))


def draw_streams(
    rates: Floats, size: int, shares: Sequence[float], generator: np.random.Generator, streams: int
) -> Counts:
    """Windows of streams, as counts in bins.

    Args:
        rates: share of negative and of other texts in each bin, (2, B).
        size: items of a window, on average; their number is Poisson.
        shares: of negative texts, of each window.
        generator: of the draws.
        streams: how many.

    Returns:
        (windows, streams, B).
    """
    drawn = np.empty((len(shares), streams, rates.shape[1]), dtype=np.int64)
    pools: dict[float, Counts] = {}
    for window, share in enumerate(shares):
        if share not in pools:
            sizes = generator.poisson(size, POOL)
            pools[share] = generator.multinomial(sizes, share * rates[0] + (1 - share) * rates[1])
        drawn[window] = pools[share][generator.integers(POOL, size=streams)]
    return drawn


def save_thresholds(path: Path, thresholds: Thresholds) -> None:
    """Write them as JSON."""
    content: dict[str, Any] = {"sizes": list(SIZES), "shares": list(SHARES), "chosen_for": dict(thresholds.chosen_for)}
    for name, tables in (("cusum", thresholds.cusum), ("ewma", thresholds.ewma)):
        content[name] = {level: tables[level].tolist() for level in LEVELS}
    save_json(path, content | {"burst": dict(thresholds.burst)})


def load_thresholds(path: Path) -> Thresholds:
    """Read what `save_thresholds` wrote.

    Raises:
        ResourceError: the file is missing, or does not hold what it should.
    """
    again = "Run the recipe's monitor again."
    if not path.is_file():
        raise ResourceError(f"{path}: must hold the thresholds of the tests, got nothing there. {again}")
    found = load_json(path)
    if (found.get("sizes"), found.get("shares")) != (list(SIZES), list(SHARES)):
        raise ResourceError(f"{path}: must be a table of sizes {SIZES} and shares {SHARES}, got another one. {again}")
    tables: dict[str, dict[Level, Floats]] = {}
    for name, shape in (("cusum", (len(SIZES), len(SHARES))), ("ewma", (len(SIZES), len(SHARES))), ("burst", ())):
        tables[name] = {level: _read_table(path, found, name, level, shape) for level in LEVELS}
    chosen_for = found.get("chosen_for")
    if not isinstance(chosen_for, dict):
        raise ResourceError(f"{path}: chosen_for must say what the thresholds hold for, got {chosen_for!r}. {again}")
    burst = {level: float(each) for level, each in tables["burst"].items()}
    return Thresholds(tables["cusum"], tables["ewma"], burst, chosen_for)


def list_choices(section: MonitorSection) -> dict[str, float]:
    """What of the recipe's section thresholds depend on."""
    chosen = {name: getattr(section, name) for name in ("false_alarm_windows", "rise")}
    return {"reference_windows": section.reference_size} | chosen


def _read_table(path: Path, found: Mapping[str, Any], name: str, level: Level, shape: tuple[int, ...]) -> Floats:
    tables = found.get(name)
    try:
        values = np.asarray(tables[level] if isinstance(tables, dict) else None, dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        values = np.full(1, np.nan)
    if values.shape != shape or not (np.isfinite(values) & (values > 0)).all():
        raise ResourceError(
            f"{path}: {name}.{level} must be {' x '.join(map(str, shape)) or 'a number'} above 0, got something else. "
            "Run the recipe's monitor again."
        )
    return values


def _find_chance(windows: int, run_length: float) -> float:
    """Of an alert within so many windows, where there is one every `run_length` windows on average."""
    return float(-np.expm1(-windows / run_length))


def _find_quantile(highest: Floats, chance: float) -> float:
    """What the highest value of a stream exceeds with that chance.

    Beyond what `TAIL` of the streams reach, the tail is taken for exponential: it is for the CUSUM and the surprise,
    and falls faster for the EWMA.
    """
    if chance >= TAIL:
        return max(LEAST, float(np.quantile(highest, 1 - chance)))
    base = float(np.quantile(highest, 1 - TAIL))
    excess = highest[highest > base] - base
    slope = float(excess.mean()) if len(excess) else 0.0  # a model that errs rarely gives few values, often the same
    return max(LEAST, base + slope * float(np.log(TAIL / chance)))


def _find_part(highest: Sequence[Floats], chance: float) -> float:
    """The part of a chance that each of two tests may have by itself, so that either has it: from 1/2, where they never
    agree, to 1, where they always do."""
    low, high = 0.5, 1.0
    for _ in range(20):
        part = (low + high) / 2
        either = np.logical_or(*(each > _find_quantile(each, part * chance) for each in highest)).mean()
        low, high = (low, part) if either > chance else (part, high)
    return low


def _choose_burst(section: MonitorSection, target: float, generator: np.random.Generator) -> dict[Level, float]:
    """For a burst every `target` windows."""
    found: list[dict[Level, float]] = []
    for volume in VOLUMES:
        for dispersion in DISPERSIONS:
            shape = (BURSTS, section.reference_size + NEW_WINDOWS)
            rate = np.full(shape, float(volume))
            if dispersion:
                rate = generator.gamma(1 / dispersion, volume * dispersion, size=shape)
            items = generator.poisson(rate)
            reference, new = np.split(items, [section.reference_size], axis=1)
            mean, variance = reference.mean(axis=1, keepdims=True), reference.var(axis=1, ddof=1, keepdims=True)
            surprises = compute_surprise(new, mean, variance).ravel()
            found.append(
                {
                    level: _find_quantile(surprises, 1 / (target * (RARER if level == "alarm" else 1)))
                    for level in LEVELS
                }
            )
    return {level: max(each[level] for each in found) for level in LEVELS}
