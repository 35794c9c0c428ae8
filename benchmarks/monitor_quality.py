"""How good the monitor's numbers are on texts that the model was not trained on.

    python benchmarks/monitor_quality.py runs/monitor_twitter --json monitor.json
    python benchmarks/monitor_quality.py --rehearse /data/twitter_fin_sentiment

Shares: the artificial-prevalence protocol. For each of 21 shares from 0 to 1 it draws windows of 200 test rows with
exactly that share and compares SLD, PACC and classify-and-count. Coverage is that of the 95 % intervals over windows
from a source with that share.

Detection: streams of test rows through the watcher as it is used. The delay is counted in windows from a rise of 10
points to the first alert, and to the first alarm; runs without change give the windows between two alerts, of any
test. `Statistics` compares tests one by one, each with a threshold for the same run length.

--rehearse takes no run: a logistic regression on TF-IDF of one half of the rows, calibrated on some of them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.applications.monitor.detectors import compute_gain, compute_usual, count_guard, judge_streams
from finetune.applications.monitor.records import BINS, Counts, Tally, find_bin
from finetune.applications.monitor.shares import Quantifier, fit_quantifier, load_quantifier
from finetune.applications.monitor.thresholds import Thresholds, choose_thresholds, draw_streams, load_thresholds
from finetune.applications.monitor.watcher import TopicWatcher
from finetune.artifact.predictions import SCORE, load_predictions
from finetune.artifact.run_folder import find_run, save_json
from finetune.evaluation.quantification import Floats, estimate_sld
from finetune.recipe.applications import MonitorSection
from finetune.recipe.loading import load_recipe

HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Rows:
    """Held-out rows, (N,) each: their bin, whether the model calls them negative, whether they are."""

    bins: npt.NDArray[np.int64]
    called: npt.NDArray[np.bool_]
    truths: npt.NDArray[np.bool_]

    def draw(self, generator: np.random.Generator, size: int, negatives: int) -> Tally:
        """A window with so many negative rows, drawn with replacement."""
        places = [np.flatnonzero(self.truths), np.flatnonzero(~self.truths)]
        rows = np.concatenate([generator.choice(places[0], negatives), generator.choice(places[1], size - negatives)])
        return Tally(np.bincount(self.bins[rows], minlength=BINS), int(self.called[rows].sum()))

    @property
    def rates(self) -> Floats:
        """Share of negative and of other rows in each bin, (2, BINS)."""
        counts = [np.bincount(self.bins[self.truths == side], minlength=BINS) for side in (True, False)]
        return np.stack([each / each.sum() for each in counts])


def make_rows(negatives: Floats, called: npt.ArrayLike, truths: npt.ArrayLike) -> Rows:
    return Rows(np.array([find_bin(each) for each in negatives]), np.asarray(called, bool), np.asarray(truths, bool))


def load_run(path: str) -> tuple[Rows, Quantifier, Thresholds, MonitorSection]:
    """The test rows of a finished run, and its monitor."""
    run = find_run(path)
    section = load_recipe(run.recipe).monitor
    if section is None:
        raise SystemExit(f"{path}: must have a monitor. Add `monitor: {{}}` to its recipe.")
    tasks = run.evaluations()
    columns = load_predictions(run, section.sentiment if len(tasks) > 1 else None).columns
    name = section.negative
    truths = [each == name for each in columns["reference"]]
    called = [each == name for each in columns["prediction"]]
    rows = make_rows(np.array(columns[f"{SCORE}{name}"]), called, truths)
    folder = run.path / "monitor"
    return rows, load_quantifier(folder / "quantifier.json"), load_thresholds(folder / "thresholds.json"), section


def rehearse(folder: str) -> tuple[Rows, Quantifier, Thresholds, MonitorSection]:
    """The same of a logistic regression: trained on half of the rows but 950, which calibrate it; judged on the
    others."""
    import html
    import re

    import pandas
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    from finetune.evaluation.calibration import apply_temperature, fit_temperature

    table = pandas.concat([pandas.read_csv(Path(folder) / f"sent_{part}.csv") for part in ("train", "valid")])
    texts = table.text.map(lambda text: re.sub(r"https?://\S+", "", html.unescape(text)).strip())
    kept = ~texts.duplicated().to_numpy()
    order = np.random.default_rng(0).permutation(int(kept.sum()))
    text, label = texts.to_numpy()[kept][order], table.label.to_numpy()[kept][order]
    half = len(text) // 2
    train, validation, test = slice(0, half - 950), slice(half - 950, half), slice(half, None)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit(text[train])
    model = LogisticRegression(C=10, max_iter=500).fit(words.transform(text[train]), label[train])
    raw = {part: model.decision_function(words.transform(text[rows])) for part, rows in enumerate((validation, test))}
    temperature = fit_temperature(raw[0], label[validation])
    known, new = (apply_temperature(raw[part], temperature) for part in (0, 1))
    section = MonitorSection(reference_windows=48)
    quantifier = fit_quantifier(known[:, 0], label[validation] == 0)
    rows = make_rows(new[:, 0], new.argmax(axis=1) == 0, label[test] == 0)
    return rows, quantifier, choose_thresholds(quantifier, section), section


def measure_shares(rows: Rows, quantifier: Quantifier, size: int, draws: int, seed: int) -> dict[str, Any]:
    """The artificial-prevalence protocol."""
    generator = np.random.default_rng(seed)
    errors, covered, widths = [], [], []
    for share in np.linspace(0, 1, 21):
        for _ in range(draws):
            found = quantifier.estimate(rows.draw(generator, size, round(size * share)))
            errors.append([abs(each - share) for each in (found.value, found.check, found.counted)])
            source = quantifier.estimate(rows.draw(generator, size, generator.binomial(size, share)))
            covered.append(source.low <= share <= source.high)
            widths.append(source.high - source.low)
    table = np.array(errors)
    result: dict[str, Any] = {"size": size, "windows": len(table), "coverage": float(np.mean(covered))}
    result["interval_width"] = float(np.mean(widths))
    for place, name in enumerate(("sld", "pacc", "counted")):
        # Windows of one share are draws from the same rows: the interval is over draws, not over other test sets.
        by_draw = table[:, place].reshape(21, draws).mean(axis=0)
        error = 1.96 * by_draw.std(ddof=1) / np.sqrt(draws)
        mean = float(by_draw.mean())
        result[name] = {"mae": mean, "low": float(mean - error), "high": float(mean + error)}
    return result


def watch(watcher: TopicWatcher, tallies: list[Tally]) -> list[tuple[int, str, str]]:
    """Window, cause and level of every alert."""
    start, found = datetime(2026, 1, 1, tzinfo=UTC), []
    for window, tally in enumerate(tallies):
        _, alerts = watcher.judge("all", start + window * HOUR, start + (window + 1) * HOUR, tally)
        found += [(window, alert.cause, alert.level) for alert in alerts]
    return found


def measure_detection(
    rows: Rows, quantifier: Quantifier, thresholds: Thresholds, section: MonitorSection, options: argparse.Namespace
) -> dict[str, Any]:
    """Delay and run length of the watcher."""
    generator = np.random.default_rng(options.seed)
    usual = float(rows.truths.mean())

    def draw(share: float) -> Tally:
        size = int(generator.poisson(options.window))
        return rows.draw(generator, size, generator.binomial(size, share))

    quiet = section.reference_size + count_guard(section.reference_size)
    delays: dict[str, list[float]] = {"alert": [], "alarm": []}
    while len(delays["alert"]) < options.streams:
        shares = [usual] * quiet + [usual + options.rise] * 30
        found = watch(TopicWatcher(quantifier, thresholds, section), [draw(share) for share in shares])
        if any(window < quiet for window, *_ in found):
            continue  # a false alarm before the rise: the delay is of those without
        for name, levels in (("alert", ("warning", "alarm")), ("alarm", ("alarm",))):
            hits = [window for window, cause, level in found if cause == "share" and level in levels]
            delays[name].append(hits[0] - quiet + 1 if hits else np.inf)
    counts = {"alert": 0, "alarm": 0, "share": 0, "volume": 0}
    for _ in range(options.streams):
        tallies = [draw(usual) for _ in range(section.reference_size + options.windows)]
        going: set[str] = set()
        for _, cause, level in watch(TopicWatcher(quantifier, thresholds, section), tallies):
            if level == "recovery":
                going.discard(cause)
                continue
            counts["alarm"] += level == "alarm"
            if cause not in going:  # a warning that becomes an alarm is one false alert
                going.add(cause)
                counts["alert"] += 1
                counts[cause] += 1
    watched = options.streams * options.windows
    return {
        "usual_share": usual,
        "rise": options.rise,
        "items": options.window,
        "streams": options.streams,
        "delay": {
            name: {"median": float(np.median(each)), "p90": float(np.quantile(each, 0.9, method="higher"))}
            for name, each in delays.items()
        },
        "windows_without_change": watched,
        "alerts_without_change": counts,
        "run_length": {name: watched / max(counts[name], 1) for name in ("alert", "alarm")},
    }


def compare_statistics(
    rows: Rows, quantifier: Quantifier, section: MonitorSection, options: argparse.Namespace
) -> dict[str, Any]:
    """Each statistic alone, with a threshold for one alert in `false_alarm_windows` on the test rows themselves."""
    generator = np.random.default_rng(options.seed)
    usual, first, length = float(rows.truths.mean()), section.reference_size, 200
    quiet = count_guard(first)
    results = {}
    for rise in (options.rise, options.rise / 2):
        drawn = [
            draw_streams(rows.rates, options.window, shares, generator, 600)
            for shares in ([usual] * (first + length), [usual] * (first + quiet) + [usual + rise] * 40)
        ]
        same, risen = (compute_statistics(counts, quantifier, section) for counts in drawn)
        for name in same:
            chance = -np.expm1(-length / section.false_alarm_windows)
            over = risen[name][quiet:] > np.quantile(same[name].max(axis=0), 1 - chance)
            delay = np.where(over.any(axis=0), over.argmax(axis=0) + 1, 40)
            results[f"{name}, rise {rise:g}"] = {"median": float(np.median(delay)), "mean": float(delay.mean())}
    return results


def compute_statistics(counts: Counts, quantifier: Quantifier, section: MonitorSection) -> dict[str, Floats]:
    """Of streams, (windows, streams, BINS), behind the first reference; (windows, streams) each."""
    first, ratios = section.reference_size, quantifier.ratios
    cusum, ewma = judge_streams(counts, ratios, first, section.rise)
    usual = compute_usual(counts[:first].sum(axis=0), ratios)
    new = counts[first:]
    items = np.maximum(new.sum(axis=-1), 1)
    called = new[..., BINS // 2 :].sum(axis=-1) / items
    before = np.clip(counts[:first, :, BINS // 2 :].sum(axis=(0, 2)) / usual.items, 0.005, 0.995)
    # A rise of the share shows in the counted share only by what recall exceeds the false calls by.
    seen = np.stack([each / each.sum() for each in (quantifier.negatives, quantifier.others)])[:, BINS // 2 :].sum(1)
    steps = {
        "log-likelihood ratio, fixed reference": compute_gain(new, ratios, usual, section.rise),
        "corrected share": (estimate_sld(new, ratios) - usual.share - section.rise / 2)
        * np.sqrt(items * usual.information),
        "counted share": (called - before - section.rise * (seen[0] - seen[1]) / 2)
        / np.sqrt(before * (1 - before) / items),
    }
    results = {"log-likelihood ratio": cusum, "EWMA of the score": ewma}
    for name, each in steps.items():
        value, path = np.zeros(each.shape[1]), []
        for step in each:
            value = np.maximum(0, value + step)
            path.append(value)
        results[name] = np.array(path)
    return results


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a finished run with a monitor")
    parser.add_argument("--rehearse", metavar="FOLDER", help="no run: a logistic regression on the rows of this folder")
    parser.add_argument("--size", type=int, default=200, help="rows of a window, for the shares")
    parser.add_argument("--draws", type=int, default=100, help="windows for each share")
    parser.add_argument("--window", type=int, default=100, help="items of a window, for detection")
    parser.add_argument("--rise", type=float, default=0.1)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--windows", type=int, default=300, help="of each stream without change")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser


def main() -> None:
    """Measure and print."""
    parser = build_parser()
    options = parser.parse_args()
    if (options.run is None) == (options.rehearse is None):
        parser.error("must have a run, or --rehearse FOLDER, and not both.")
    rows, quantifier, thresholds, section = load_run(options.run) if options.run else rehearse(options.rehearse)
    shares = measure_shares(rows, quantifier, options.size, options.draws, options.seed)
    print(f"Shares, {shares['windows']} windows of {shares['size']} test rows: mean absolute error")
    for name in ("sld", "pacc", "counted"):
        print(f"  {name:8} {shares[name]['mae']:.4f} [{shares[name]['low']:.4f}, {shares[name]['high']:.4f}]")
    print(f"  coverage of 95 % intervals {shares['coverage']:.3f}, mean width {shares['interval_width']:.3f}")
    statistics = compare_statistics(rows, quantifier, section, options)
    print("Statistics, each alone: windows to the first alert, median (mean)")
    for name, found in statistics.items():
        print(f"  {name:50} {found['median']:.0f} ({found['mean']:.1f})")
    detection = measure_detection(rows, quantifier, thresholds, section, options)
    print(f"Detection, from {detection['usual_share']:.3f} by {options.rise} at {options.window} items a window")
    for name, delay in detection["delay"].items():
        print(f"  first {name:6} after {delay['median']:.0f} windows (median), {delay['p90']:.0f} (90 %)")
    for name, run_length in detection["run_length"].items():
        print(f"  without change one {name:6} in {run_length:.0f} windows ({detection['alerts_without_change'][name]})")
    if options.json:
        save_json(options.json, {"shares": shares, "statistics": statistics, "detection": detection})


if __name__ == "__main__":
    main()
