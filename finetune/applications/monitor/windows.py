"""Which window an item belongs to, and when a window is closed, by the items' own times.

While items come, and where they end, the clock of the machine plays no part: one that jumps changes nothing. All of it
depends on the order in which items come and not on how they are batched or cut into files and calls, so that a stream
that was cut off and goes on closes the same windows. Only silence and the word that nothing is to come close more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

_STATE = ("newest", "next_start", "silent", "passed", "judged")


@dataclass
class WindowPlan:
    """The windows of a stream; times are epoch seconds.

    Args:
        seconds: length of a window.
        lateness: how long after its end a window takes items.
        max_silent: windows in a row without any item, of any topic, that are still judged. What follows of such a gap
            is passed over, so that a gap of a year costs what a gap of this length costs.
        newest: the largest time of an item so far.
        next_start: the first window that is not closed; None before the first one closes.
        silent: windows without any item that were closed last.
        passed: windows that were passed over.
        judged: windows that were closed since the last ones were passed over. While they are fewer than `max_silent`,
            only half as many silent ones are judged: an item that is dated far too early, and what is missing behind
            it, must not become what is usual.
    """

    seconds: int
    lateness: int
    max_silent: int
    newest: float | None = None
    next_start: int | None = None
    silent: int = 0
    passed: int = 0
    judged: int = 0

    @property
    def watermark(self) -> float:
        """No item before this is waited for."""
        return float("-inf") if self.newest is None else self.newest - self.lateness

    def find_start(self, time: float) -> int:
        """The start of the window that a time is in."""
        return int(time // self.seconds) * self.seconds

    def is_late(self, time: float) -> bool:
        """Whether the window of an item is closed, or about to be."""
        start = self.find_start(time)
        return start + self.seconds <= self.watermark or (self.next_start is not None and start < self.next_start)

    def is_closed_early(self, time: float) -> bool:
        """Whether an item is late only because its window was closed before the watermark came to its end."""
        return self.is_late(time) and self.find_start(time) + self.seconds > self.watermark

    def see(self, time: float) -> float:
        """The largest time, after an item that is not late."""
        self.newest = time if self.newest is None else max(self.newest, time)
        return self.newest

    def close(self, filled: Sequence[int], until: float | None = None) -> Iterator[int]:
        """Close the windows that have ended, in order; the caller judges each before it asks for the next.

        Args:
            filled: starts of the open windows that hold items, ascending.
            until: windows that end by then are closed, beside those before the watermark.
        """
        limit = self.watermark if until is None else max(self.watermark, until)
        if self.next_start is None:
            if not filled or filled[0] + self.seconds > limit:
                return
            self.next_start = filled[0]
        while self.next_start + self.seconds <= limit:
            start = self.next_start
            if start in filled:
                self.silent = 0
            elif self.silent < (self.max_silent if self.judged >= self.max_silent else self.max_silent // 2):
                self.silent += 1
            else:
                self.judged = 0
                self.next_start = min([at for at in filled if at > start] + [self.find_start(limit)])
                self.passed += (self.next_start - start) // self.seconds
                continue
            self.next_start = start + self.seconds
            self.judged += 1
            yield start

    def to_state(self) -> dict[str, Any]:
        """All that must survive a crash, as JSON values."""
        return {name: getattr(self, name) for name in _STATE}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_state` gave."""
        for name in _STATE:
            setattr(self, name, state.get(name, 0))  # a state of an earlier version has no `judged`


def to_time(seconds: float) -> datetime:
    """Epoch seconds as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)
