"""What a labelled stream says a monitor should have seen: shares as they were, changes, and when an alert was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from scipy.stats import hypergeom

from finetune.applications.monitor.records import Alert, Share

HOLD = 3
"""Windows that a change must hold, counting the first; so long after its end an alert still belongs to it."""
CHANCE = 0.001
"""How likely chance alone may give a change so many negatives."""
FEWEST_ITEMS = 5
"""Items without which a window's true share is not compared: it is nearly all chance."""


@dataclass(frozen=True, slots=True)
class TrueWindow:
    """One topic in one window, by the labels.

    Args:
        start: of the window.
        negatives, items: how many.
    """

    start: datetime
    negatives: int
    items: int

    @property
    def share(self) -> float:
        """Negative share; 0 of nothing."""
        return self.negatives / self.items if self.items else 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """A rise of a topic's true share, by the places of its windows.

    Args:
        first, stop: the windows that it lasts are first, ..., stop - 1.
        before, after: the true share that was usual, and that of these windows together.
    """

    first: int
    stop: int
    before: float
    after: float


def find_changes(windows: Sequence[TrueWindow], rise: float, reference: int) -> list[Change]:
    """The rises of a topic's true negative share.

    A change begins at the first window of which two things hold. Its share is at least half of `rise` above what was
    usual, and it and the next `HOLD` - 1 windows together have a share at least `rise` above it, with so many negatives
    that chance gives them with a probability of at most `CHANCE` (Fisher's exact test, one-sided). Usual is the share
    of the last `reference` windows outside of changes, all their items together; before there are so many, no change is
    looked for. The change ends before the first window that is less than half of `rise` above that, and the `HOLD`
    windows from it on together as well.

    Args:
        windows: of one topic, every window from the first to the last, also empty ones.
        rise: of the share, in (0, 1).
        reference: windows that say what is usual.
    """
    changes: list[Change] = []
    quiet: list[TrueWindow] = []
    place = 0
    while place < len(windows):
        usual = _pool(quiet[-reference:])
        if len(quiet) < reference or not _begins(windows[place : place + HOLD], usual, rise):
            quiet.append(windows[place])
            place += 1
            continue
        stop = place + 1
        while stop < len(windows) and not _ends(windows[stop : stop + HOLD], usual, rise):
            stop += 1
        changes.append(Change(place, stop, usual.share, _pool(windows[place:stop]).share))
        place = stop
    return changes


def score_shares(pairs: Sequence[tuple[Share, TrueWindow]]) -> dict[str, Any]:
    """How far shares are from the truth: over windows with at least `FEWEST_ITEMS` items by the labels, and one read.

    Returns:
        Windows and items compared; mean absolute error of the `corrected`, the `counted` and the `checked` share, and
        `coverage`, the part of the intervals that hold the true share; None of no windows.
    """
    kept = [(share, truth) for share, truth in pairs if truth.items >= FEWEST_ITEMS and share.items]
    found: dict[str, Any] = {"windows": len(kept), "items": sum(truth.items for _, truth in kept)}
    if not kept:
        return found | dict.fromkeys(("corrected", "counted", "checked", "coverage"))
    truths = np.array([truth.share for _, truth in kept])
    errors = {
        name: float(np.abs(np.array([getattr(share, key) for share, _ in kept]) - truths).mean())
        for name, key in (("corrected", "value"), ("counted", "counted"), ("checked", "check"))
    }
    # Ends come from a search that stops short of them by less than this.
    held = [share.low - 1e-6 <= truth.share <= share.high + 1e-6 for share, truth in kept]
    return found | errors | {"coverage": float(np.mean(held))}


def score_alerts(
    topics: Mapping[str, Sequence[TrueWindow]], alerts: Sequence[Alert], rise: float, reference: int
) -> dict[str, Any]:
    """Alerts of the share held against the changes of the true share.

    The first warning or alarm of a topic from a change's first window to `HOLD` - 1 windows after its last one finds
    the change; its delay is 1 where that first window gave it. One in any other window is a false alarm.

    Args:
        topics: topic -> its windows, as for `find_changes`.
        alerts: what was raised; those of volume and recoveries are left out.
        rise, reference: as for `find_changes`.

    Returns:
        `changes` with topic, start, end, shares and delay (None where missed), their number `found`, the median
        `delay`, `false_alarms`, the `quiet_windows` (those with items behind the first `reference` ones), and
        `false_alarms_per_1000` of these.
    """
    changes: list[dict[str, Any]] = []
    false_alarms = quiet_windows = 0
    for topic, windows in topics.items():
        places = {window.start: place for place, window in enumerate(windows)}
        raised = [
            places[alert.start]
            for alert in alerts
            if alert.topic == topic and alert.cause == "share" and alert.level != "recovery" and alert.start in places
        ]
        loud: set[int] = set()
        for change in find_changes(windows, rise, reference):
            span = range(change.first, min(change.stop + HOLD - 1, len(windows)))
            loud.update(span)
            delays = [place - change.first + 1 for place in raised if place in span]
            changes.append(
                {
                    "topic": topic,
                    "start": windows[change.first].start.isoformat(),
                    "windows": change.stop - change.first,
                    "before": change.before,
                    "after": change.after,
                    "delay": min(delays, default=None),
                }
            )
        false_alarms += sum(place not in loud for place in raised)
        behind = range(reference, len(windows))
        quiet_windows += sum(place not in loud and windows[place].items > 0 for place in behind)
    delays = [change["delay"] for change in changes if change["delay"] is not None]
    return {
        "changes": changes,
        "found": len(delays),
        "delay": float(np.median(delays)) if delays else None,
        "false_alarms": false_alarms,
        "quiet_windows": quiet_windows,
        "false_alarms_per_1000": 1000 * false_alarms / quiet_windows if quiet_windows else None,
    }


def _pool(windows: Sequence[TrueWindow]) -> TrueWindow:
    """Windows as one; it starts when the first does."""
    start = windows[0].start if windows else datetime.min
    return TrueWindow(start, sum(window.negatives for window in windows), sum(window.items for window in windows))


def _begins(windows: Sequence[TrueWindow], usual: TrueWindow, rise: float) -> bool:
    if not usual.items or not windows[0].items or windows[0].share < usual.share + rise / 2:
        return False
    held = _pool(windows)
    if held.share < usual.share + rise:
        return False
    total, negatives = held.items + usual.items, held.negatives + usual.negatives
    return bool(hypergeom.sf(held.negatives - 1, total, negatives, held.items) <= CHANCE)


def _ends(windows: Sequence[TrueWindow], usual: TrueWindow, rise: float) -> bool:
    least = usual.share + rise / 2
    return windows[0].share < least and _pool(windows).share < least
