"""The page of a monitor: the negative share of each topic over time, what was alerted, and what was left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, PackageLoader

from finetune.applications.monitor.charts import SHAPES, describe_time, describe_window, topic_chart
from finetune.applications.monitor.items import check_link
from finetune.applications.monitor.records import Alert, Share
from finetune.applications.monitor.store import Store, WindowRecord
from finetune.evaluation.report import build_environment
from finetune.evaluation.wording import format_number, format_share, listed
from finetune.recipe.applications import MonitorSection
from finetune.recipe.files import write_file_atomically
from finetune.recipe.messages import count_of

FEW_ITEMS = 2.0
"""Items of a mean window below which a topic has no chart: its band would fill it."""
ALERTS_SHOWN = 20
"""The latest ones; the others are folded away."""
TESTS = {"cusum": "CUSUM", "ewma": "EWMA", "burst": "burst test"}
UNITS = {"day": 24 * 60, "hour": 60, "minute": 1}
STATES = {"warning": "care", "alarm": "bad", "recovery": "good"}
"""Level of an alert -> how the page marks it."""
LEFT_OUT = {
    "repeats": ("Repeated", "the id or the text of an item that came before"),
    "late": ("Late", "for a window that was closed already"),
}


def write_report(store: Store, section: MonitorSection, path: Path) -> None:
    """Write the page of a store as UTF-8: no script, and nothing that is fetched.

    Raises:
        ResourceError: the disk refuses.
    """
    write_file_atomically(path, render_report(store, section).encode(errors="replace"))


def render_report(store: Store, section: MonitorSection) -> str:
    """The page as one HTML text."""
    windows, alerts, counts = store.read_windows(), store.read_alerts(), store.read_counts()
    by_topic: dict[str, list[WindowRecord]] = defaultdict(list)
    for window in windows:
        by_topic[window.topic].append(window)
    topics = [
        _build_topic(topic, known, [alert for alert in alerts if alert.topic == topic])
        for topic, known in by_topic.items()
    ]
    topics.sort(key=lambda topic: -topic["items"])
    told = [describe_alert(alert) for alert in reversed(alerts)]
    view = {
        "watched": section.negative,
        "length": describe_length(section.window_minutes),
        "first": describe_time(min(window.start for window in windows)) if windows else "",
        "last": describe_time(max(window.end for window in windows)) if windows else "",
        "headline": describe_state(windows, alerts),
        "counts": counts,
        "open": len({window.start for window in windows if not window.is_closed}),
        "topics": [topic for topic in topics if topic["chart"]],
        "few": [topic for topic in topics if not topic["chart"]],
        "alerts": told[:ALERTS_SHOWN],
        "older": told[ALERTS_SHOWN:],
        "left_out": _list_left_out(counts),
        "rejections": store.read_rejections(),
        "shapes": SHAPES,
    }
    environment = build_environment()
    assert environment.loader is not None
    environment.loader = ChoiceLoader([PackageLoader("finetune", "applications/monitor"), environment.loader])
    return environment.get_template("report.html.j2").render(view)


def describe_length(minutes: int) -> str:
    """Of a window: `1 day`, `90 minutes`."""
    unit, size = next(((unit, size) for unit, size in UNITS.items() if minutes % size == 0))
    return count_of(minutes // size, unit)


def describe_state(windows: Sequence[WindowRecord], alerts: Sequence[Alert]) -> str:
    """The page's first sentence: what is unusual now, else what was last."""
    latest = {(alert.topic, alert.cause): alert for alert in alerts}
    is_open = [alert for alert in latest.values() if alert.level != "recovery"]
    if worse := [alert for alert in is_open if alert.cause == "share"]:
        parts = [
            f"{alert.topic} ({format_share(alert.after.value, 0)}, usually {format_share(alert.before.value, 0)})"
            for alert in worse
        ]
        return f"More of the news than usual is negative: {listed(parts)}."
    if is_open:
        return f"There is more news than usual, but no worse: {listed([alert.topic for alert in is_open])}."
    items = count_of(sum(window.total for window in windows), "item")
    if alerts:
        return f"All is as usual again; {count_of(len(alerts), 'alert')} in {items}."
    return f"Nothing unusual in {items}."


def describe_alert(alert: Alert) -> dict[str, Any]:
    """An alert in words, and its items.

    Returns:
        `title`, `words`, `when`, `state` as the page marks it, `test`, empty where none spoke, and `items`, none where
        all is over.
    """
    is_over, is_share = alert.level == "recovery", alert.cause == "share"
    found = ("as negative as usual again" if is_over else "worse news") if is_share else ""
    found = found or ("as much news as usual again" if is_over else "more news")
    is_renewed = alert.test == "reference"
    if is_renewed:
        found = "what was unusual is usual now"
    before, after = _format(alert.before), _format(alert.after)
    shares = f"The negative share is {after}; {before} is usual."
    if is_share and not is_over:
        shares = f"The negative share rose from {before} to {after}."
    if not (alert.before.items and alert.after.items):  # of no texts, a share is made up
        shares = f"The negative share is {after}." if alert.after.items else ""
    usual = format_number(alert.volume_before, 0 if alert.volume_before >= 10 else 1)
    volume = f"The window has {count_of(alert.volume_after, 'item')}; {usual} are usual."
    statistic, threshold = (format_number(number, 2) for number in (alert.statistic, alert.threshold))
    return {
        "title": f"{alert.topic}: {found}",
        "level": alert.level,
        "state": STATES[alert.level],
        "when": describe_window(alert.start, alert.end),
        "words": (f"{shares} {volume}" if is_share else f"{volume} {shares}").strip(),
        "test": "" if is_renewed else f"{TESTS.get(alert.test, alert.test)} {statistic}, threshold {threshold}",
        "items": [] if is_over else [_build_item(item) for item in alert.items],
    }


def _build_topic(topic: str, windows: Sequence[WindowRecord], alerts: Sequence[Alert]) -> dict[str, Any]:
    items = sum(window.total for window in windows)
    filled = [window for window in windows if window.total]
    label = f"{topic}: no items"
    if filled:
        least, most = (pick(filled, key=lambda window: window.share.value) for pick in (min, max))
        label = (
            f"Negative share of {topic} over {count_of(len(windows), 'window')}: from {least.share.value:.0%} on "
            f"{describe_time(least.start)} to {most.share.value:.0%} on {describe_time(most.start)}; "
            f"{count_of(len(alerts), 'alert')}."
        )
    return {
        "name": topic,
        "items": items,
        "alerts": len(alerts),
        "chart": topic_chart(windows, alerts, label) if items >= FEW_ITEMS * len(windows) else "",
    }


def _build_item(item: Mapping[str, Any]) -> dict[str, Any]:
    time = item.get("time")
    return {
        "text": str(item.get("text", "")),
        "link": check_link(item.get("link")),
        "time": describe_time(datetime.fromisoformat(time)) if isinstance(time, str) else "",
        "source": item.get("source") or "",
        "id": str(item.get("id", "")),
        "negative": format_share(item.get("negative"), 0),
    }


def _list_left_out(counts: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Name, meaning and number of what is not among the items."""
    rows = [(*LEFT_OUT[key], counts[key]) for key in LEFT_OUT if counts.get(key)]
    return rows + [
        ("Rejected", name.partition(": ")[2], number)
        for name, number in counts.items()
        if name.startswith("rejected: ")
    ]


def _format(share: Share) -> str:
    value, low, high = (format_share(each, 0) for each in (share.value, share.low, share.high))
    return f"{value} ({low} to {high})"
