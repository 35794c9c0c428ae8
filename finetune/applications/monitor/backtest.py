"""Labelled history through the monitor: how far its shares were from the truth, and when its alerts were right."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune.applications.monitor.items import ItemError, read_item
from finetune.applications.monitor.load import Monitor, load_monitor
from finetune.applications.monitor.records import Alert, Item, Reading, Share
from finetune.applications.monitor.sources import FileSource, Record
from finetune.applications.monitor.store import Store, WindowRecord
from finetune.applications.monitor.truth import TrueWindow, score_alerts, score_shares
from finetune.applications.monitor.watch import Options, watch
from finetune.applications.monitor.windows import WindowPlan
from finetune.errors import DataError
from finetune.evaluation.wording import format_number, format_share
from finetune.recipe.messages import count_of

ALL = "all topics"
Table = tuple[str, list[str], list[list[str]]]
"""Title, head, rows."""


def run_backtest(run: Monitor | str | Path, path: Path) -> dict[str, Any]:
    """Replay a labelled file through the loop that watches a stream, from an empty state.

    Args:
        run: a finished run, or its monitor before it has seen anything.
        path: JSON lines as `finetune monitor` reads them, each with `labels`: the sentiment task's class, and the topic
            task's. Without the latter, an item is of the topic that the model takes it for.

    Returns:
        `counts`: what became of the lines. `windows`: closed ones. `shares`: `ALL` and, where there are several, each
        topic -> as `score_shares` gives it. `alerts`: as `score_alerts` gives it, and what was `raised`.

    Raises:
        UsageError: no such run or file, or a run without a monitor.
        DataError: items that cannot be held against a truth.
    """
    monitor = run if isinstance(run, Monitor) else load_monitor(run)
    history = _History(monitor, path)
    with TemporaryDirectory() as folder, Store(Path(folder) / "state.db") as store:
        watch(
            history,
            Monitor(history, monitor.watcher, monitor.section),
            store,
            options=Options(clock=lambda: math.inf, is_complete=True),
        )
        windows = [window for window in store.read_windows() if window.is_closed]
        alerts, counts = store.read_alerts(), store.read_counts()
    truths = history.count_truths(windows)
    shares: dict[str, list[Share]] = {topic: [] for topic in truths}
    for window in windows:
        shares[window.topic].append(window.share)
    pairs = {topic: list(zip(shares[topic], truths[topic], strict=True)) for topic in truths}
    everything = {ALL: [pair for part in pairs.values() for pair in part]}
    section = monitor.section
    scored = score_alerts(truths, alerts, section.rise, section.reference_size)
    return {
        "counts": counts,
        "windows": len({window.start for window in windows}),
        "window_minutes": section.window_minutes,
        "rise": section.rise,
        "shares": {name: score_shares(part) for name, part in (everything | (pairs if len(pairs) > 1 else {})).items()},
        "alerts": scored | {"raised": list(map(_describe, alerts))},
    }


def build_tables(found: dict[str, Any]) -> list[Table]:
    """What `run_backtest` gives, for people."""
    shares = [
        [
            topic,
            f"{part['windows']:,}",
            *(format_number(part[key]) for key in ("corrected", "counted")),
            format_share(part["coverage"]),
        ]
        for topic, part in found["shares"].items()
        if part["windows"]
    ]
    alerts = found["alerts"]
    changes = [
        [
            change["topic"],
            change["start"],
            f"{change['windows']}",
            f"{format_number(change['before'], 2)} to {format_number(change['after'], 2)}",
            "missed" if change["delay"] is None else f"in window {change['delay']}",
        ]
        for change in alerts["changes"]
    ]
    raised = [
        [one["level"], one["cause"], one["topic"], one["start"], f"{one['test']} {format_number(one['statistic'], 2)}"]
        for one in alerts["raised"]
    ]
    rate = format_number(alerts["false_alarms_per_1000"], 1)
    title = (
        f"true rises of {format_share(found['rise'], 0)} or more: {alerts['found']} of {len(changes)} found; "
        f"{count_of(alerts['false_alarms'], 'false alarm')}, {rate} per 1,000 windows without one"
    )
    head = ["topic", "windows", "error, corrected", "error, counted", "intervals that hold"]
    return [
        ("mean absolute error of the negative share, by window", head, shares),
        (title, ["topic", "from", "windows", "true share", "alerted"], changes),
        ("alerts", ["level", "cause", "topic", "window", "test"], raised),
    ]


class _History:
    """The file as a source, and the model as a reader that learns which items it is asked about: those that count."""

    def __init__(self, monitor: Monitor, path: Path) -> None:
        self._reader, self._section, self._path = monitor.reader, monitor.section, path
        self._plan = WindowPlan(60 * self._section.window_minutes, 60 * self._section.lateness_minutes, max_silent=0)
        self._passed: deque[Item] = deque()
        self._negatives: Counter[tuple[str, int]] = Counter()
        self._items: Counter[tuple[str, int]] = Counter()

    @property
    def topics(self) -> Sequence[str]:
        """The model's."""
        return self._reader.topics

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self._reader.fingerprint

    def __iter__(self) -> Iterator[Record | None]:
        for record in FileSource(self._path):
            if record is not None and record.content is not None:
                with suppress(ItemError):  # the loop counts it
                    self._passed.append(read_item(record.content, now=math.inf).item)
            yield record

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """Read texts, and note the truth of the items that they are of."""
        readings = self._reader.read(texts)
        for text, reading in zip(texts, readings, strict=True):
            while (item := self._passed.popleft()).text != text:  # a repeat, late, or in the future
                pass
            self._note(item, reading)
        return readings

    def count_truths(self, windows: Sequence[WindowRecord]) -> dict[str, list[TrueWindow]]:
        """The truth about each topic's windows, in their order."""
        truths: dict[str, list[TrueWindow]] = {topic: [] for topic in self.topics}
        for window in windows:
            key = (window.topic, int(window.start.timestamp()))
            truths[window.topic].append(TrueWindow(window.start, self._negatives[key], self._items[key]))
        return truths

    def _note(self, item: Item, reading: Reading) -> None:
        """Count the truth of an item.

        Raises:
            DataError: it has none, or one that the model does not know.
        """
        section = self._section
        sentiment, topic = item.labels.get(section.sentiment), item.labels.get(section.topic or "", reading.topic)
        if sentiment is None:
            raise DataError(
                f"{self._path}: item {item.id!r}: labels.{section.sentiment} must be there, got "
                f"{', '.join(item.labels) or 'no labels'}. A backtest needs the truth of every item."
            )
        if topic not in self.topics:
            raise DataError(
                f"{self._path}: item {item.id!r}: labels.{section.topic} must be one of {', '.join(self.topics)}, got "
                f"{topic!r}."
            )
        key = (topic, self._plan.find_start(item.time.timestamp()))
        self._items[key] += 1
        self._negatives[key] += sentiment == section.negative


def _describe(alert: Alert) -> dict[str, Any]:
    shares = {"before": alert.before.value, "after": alert.after.value}
    numbers = {"test": alert.test, "statistic": alert.statistic, "threshold": alert.threshold}
    what = {"topic": alert.topic, "cause": alert.cause, "level": alert.level, "start": alert.start.isoformat()}
    return what | shares | {"volume_before": alert.volume_before, "volume_after": alert.volume_after} | numbers
