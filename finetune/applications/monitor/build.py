"""From a trained run to a monitor, and how far its shares are from the truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetune.applications.monitor.load import find_monitor_folder, load_section, save_monitor
from finetune.applications.monitor.reader import TrainedReader, build_reader
from finetune.applications.monitor.records import Reading, Share, Tally
from finetune.applications.monitor.shares import Quantifier, fit_quantifier
from finetune.applications.monitor.thresholds import choose_thresholds
from finetune.applications.monitor.truth import TrueWindow, score_shares
from finetune.applications.monitor.windows import WindowPlan, to_time
from finetune.artifact.run_folder import RunFolder, find_run, load_json, save_json
from finetune.data.sources import load_rows
from finetune.recipe import load_recipe
from finetune.recipe.applications import MonitorSection
from finetune.recipe.schema import Recipe

DRAWN_ITEMS, DRAWN_SHARES, DRAWS = 200, 21, 10
"""Of the artificial windows: items of each, shares evenly from 0 to 1, windows of each share."""
TIME = "time"
"""The column that says when a row was published, where the task is not split by another one."""


@dataclass(frozen=True)
class ReadRow:
    """A labelled row, read.

    Args:
        reading: what the model makes of it.
        is_negative: the truth.
        topic: the true one where the row tells it, else the model's.
        time: epoch seconds; None where the row has none.
    """

    reading: Reading
    is_negative: bool
    topic: str
    time: float | None


@dataclass(frozen=True)
class ShareJudge:
    """Estimates shares of labelled rows, and holds them against the truth.

    Args:
        quantifier: what corrects them.
        section: of the recipe.
        confidence: of the intervals.
    """

    quantifier: Quantifier
    section: MonitorSection
    confidence: float

    def judge(self, rows: Sequence[ReadRow], seed: int) -> dict[str, Any]:
        """The figures of a split.

        Returns:
            `artificial`: of windows drawn from the rows so that their negative share is anything from 0 to 1 (the
            artificial-prevalence protocol, Forman 2008), as `score_shares` gives them. `topics`: of each, the share
            of all its rows. `windows`: of the rows that have a time, by topic and window, as `score_shares` gives them.
        """
        drawn = [self._compare(group, group) for group in draw_windows(rows, np.random.default_rng(seed))]
        figures = {
            "rows": len(rows),
            "confidence": self.confidence,
            "artificial": {"items_per_window": DRAWN_ITEMS} | score_shares(drawn),
        }
        topics = sorted({row.topic for row in rows})
        figures["topics"] = {topic: _describe(*self._compare_topic(rows, topic)) for topic in topics}
        timed: dict[int, list[ReadRow]] = defaultdict(list)
        plan = WindowPlan(60 * self.section.window_minutes, lateness=0, max_silent=0)
        for row in rows:
            if row.time is not None:
                timed[plan.find_start(row.time)].append(row)
        if timed:
            pairs = [self._compare_topic(group, topic, start) for start, group in timed.items() for topic in topics]
            figures["windows"] = {"window_minutes": self.section.window_minutes} | score_shares(pairs)
        return figures

    def _compare_topic(self, rows: Sequence[ReadRow], topic: str, start: int = 0) -> tuple[Share, TrueWindow]:
        """The share of what is taken for the topic, and the truth of what is of it."""
        taken = [row for row in rows if row.reading.topic == topic]
        return self._compare(taken, [row for row in rows if row.topic == topic], start)

    def _compare(self, taken: Sequence[ReadRow], true: Sequence[ReadRow], start: int = 0) -> tuple[Share, TrueWindow]:
        tally = Tally()
        for row in taken:
            tally.add(row.reading.negative, row.reading.sentiment == self.section.negative)
        truth = TrueWindow(to_time(start), sum(row.is_negative for row in true), len(true))
        return self.quantifier.estimate(tally, self.confidence), truth


def build_monitor(run: str | Path) -> dict[str, Any]:
    """Build the monitor of a finished run on its validation rows, and judge its shares on its test rows.

    Args:
        run: the run's folder, or runs/<name> for its latest finished run.

    Returns:
        The figures of test, as in monitor/test.json; see `ShareJudge.judge`.

    Raises:
        UsageError: no such run, or its recipe has no `monitor`.
        DataError: validation rows of one class, or a model that does not tell them apart.
    """
    folder = find_run(run)
    section, recipe = load_section(folder), load_recipe(folder.recipe)
    reader, seed = build_reader(folder, section), recipe.train.seed
    rows = read_splits(folder, recipe, section, reader)
    known = rows["validation"]
    quantifier = fit_quantifier([row.reading.negative for row in known], [row.is_negative for row in known])
    thresholds = choose_thresholds(quantifier, section, seed)
    judge = ShareJudge(quantifier, section, recipe.evaluate.confidence)
    figures = {split: judge.judge(part, seed) for split, part in rows.items()}
    place = find_monitor_folder(folder)
    place.mkdir(exist_ok=True)
    for split, content in figures.items():
        save_json(place / f"{split}.json", content)
    save_monitor(folder, reader, quantifier, thresholds)  # last: what it writes says that all is there
    return figures["test"]


def read_splits(
    folder: RunFolder, recipe: Recipe, section: MonitorSection, reader: TrainedReader
) -> dict[str, list[ReadRow]]:
    """The validation and test rows of the sentiment task, read; their true topics if both tasks have the same data."""
    task, topic = recipe.tasks[section.sentiment], recipe.tasks.get(section.topic or "")
    source = load_rows(task.data, task.columns, relative_to=folder.recipe_folder)
    labels, topics = reader.name_labels(section.sentiment, source.rows), {}
    if section.topic is not None and topic is not None and topic.data == task.data:
        same = load_rows(topic.data, topic.columns, relative_to=folder.recipe_folder)
        topics = reader.name_labels(section.topic, same.rows)
    column = task.split.column if task.split.by == "time" and task.split.column else TIME
    rows = {row.id: row for row in source.rows}
    ids = load_json(folder.data / "ids.json")[section.sentiment]
    splits = {}
    for split in ("validation", "test"):
        chosen = [rows[name] for name in ids[split]]
        readings = reader.read([row.values["text"] for row in chosen])
        splits[split] = [
            ReadRow(
                reading,
                labels[row.id] == section.negative,
                topics.get(row.id) or reading.topic,
                _parse_time(row.values.get(column)),
            )
            for row, reading in zip(chosen, readings, strict=True)
        ]
    return splits


def draw_windows(rows: Sequence[ReadRow], generator: np.random.Generator) -> Iterator[list[ReadRow]]:
    """Windows of `DRAWN_ITEMS` rows, drawn with replacement, of every share; none where a class is missing."""
    groups = [[row for row in rows if row.is_negative == side] for side in (True, False)]
    if not all(groups):
        return
    for share in np.linspace(0, 1, DRAWN_SHARES):
        negatives = round(DRAWN_ITEMS * share)
        for _ in range(DRAWS):
            sizes = (negatives, DRAWN_ITEMS - negatives)
            yield [
                group[place]
                for group, size in zip(groups, sizes, strict=True)
                for place in generator.integers(len(group), size=size)
            ]


def _describe(share: Share, truth: TrueWindow) -> dict[str, float]:
    return {
        "items": truth.items,
        "true": truth.share,
        "corrected": share.value,
        "low": share.low,
        "high": share.high,
        "counted": share.counted,
    }


def _parse_time(value: Any) -> float | None:
    """Epoch seconds of ISO 8601 text, in UTC where it names no zone; None of anything else."""
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
