"""What goes through the monitor: an item, what the model makes of it, a window's tally, its share, an alert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

BINS = 64
"""Bins of equal width over the negative probability, [0, 1]: a tally's size does not depend on how much it counts."""
ALL_TOPICS = "all"
"""The topic of every text where the recipe names no task for topics."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Item:
    """One text of the stream, checked.

    Args:
        id: names it in its stream.
        time: when it was published, with UTC as its zone.
        text: as it came.
        source, ticker, link: as far as known.
        labels: task -> its true class, where the stream is labelled.
    """

    id: str
    time: datetime
    text: str
    source: str | None = None
    ticker: str | None = None
    link: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model makes of one item.

    Args:
        topic: the most likely topic; `ALL_TOPICS` where there is no such task.
        sentiment: the most likely class of the sentiment task.
        negative: calibrated probability of the negative class, in [0, 1].
    """

    topic: str
    sentiment: str
    negative: float


class Reader(Protocol):
    """What the monitor asks of a trained model."""

    @property
    def topics(self) -> Sequence[str]:
        """Every topic that a reading may have."""

    @property
    def fingerprint(self) -> str:
        """Of the model."""

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """Read texts, in order; they are cleaned as in training."""


@dataclass
class Tally:
    """What is kept of the items of one topic in one window.

    Args:
        bins: (BINS,) items by their negative probability.
        called: items of which negative is the most likely class: classify and count.
    """

    bins: Counts = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    called: int = 0

    @property
    def total(self) -> int:
        """Items."""
        return int(self.bins.sum())

    def add(self, negative: float, is_called: bool) -> None:
        """Count one item."""
        self.bins[find_bin(negative)] += 1
        self.called += is_called


def find_bin(negative: float) -> int:
    """The bin of a probability."""
    return min(BINS - 1, int(negative * BINS))


@dataclass(frozen=True, slots=True)
class Share:
    """The negative share of one topic in one window.

    Args:
        value: corrected for the model's own errors, in [0, 1].
        low, high: its interval.
        check: the same by the second method.
        counted: the share that the model calls negative, uncorrected.
        items: how many it is a share of.
    """

    value: float
    low: float
    high: float
    check: float
    counted: float
    items: int


Level = Literal["warning", "alarm", "recovery"]
Cause = Literal["share", "volume"]
"""Worse news, or more news."""


@dataclass(frozen=True, slots=True)
class Alert:
    """What a watcher is told.

    Args:
        id: the same for the same alert, also when it is raised again after a crash.
        topic: whose share or volume changed.
        cause: what changed.
        level: how much is known; `recovery` ends an alert.
        start: of the window in which it was found.
        end: of that window.
        before: the usual share.
        after: the share since the change.
        volume_before: the usual number of items of a window.
        volume_after: that of this window.
        test: `cusum`, `ewma` or `burst`; `reference` ends an alert that lasted so long that it is what is usual now.
        statistic: of the test, in its own unit.
        threshold: what it exceeded.
        items: the most telling ones, as id, time, text, link and negative probability.
    """

    id: str
    topic: str
    cause: Cause
    level: Level
    start: datetime
    end: datetime
    before: Share
    after: Share
    volume_before: float
    volume_after: int
    test: str
    statistic: float
    threshold: float
    items: Sequence[Mapping[str, Any]] = ()


class Watcher(Protocol):
    """What decides, window by window, whether a topic is alerted. Its state is data, so that it survives a crash."""

    stream: str
    """Names the stream in the ids of alerts."""

    def judge(self, topic: str, start: datetime, end: datetime, tally: Tally) -> tuple[Share, list[Alert]]:
        """Take the next closed window of a topic, also an empty one, in order of time; alerts come without items.

        Returns:
            The window's share and what it gives reason to say.
        """

    def to_state(self, topic: str) -> dict[str, Any]:
        """All that is remembered of a topic, as JSON values."""

    def set_state(self, topic: str, state: Mapping[str, Any]) -> None:
        """Go on from what `to_state` gave."""
