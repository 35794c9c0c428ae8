"""When something is said about a topic: levels, cool-down and recovery."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.applications.monitor.records import Level

RANKS: dict[Level | None, int] = {None: 0, "warning": 1, "alarm": 2}


@dataclass
class Episode:
    """One cause of a topic's alerts, from the first window that exceeds a threshold to the first calm one.

    Args:
        is_open: whether it lasts.
        level: the highest that was said of it; None where the cool-down kept all of it back.
        test: the one that the level was said for.
        since: level -> windows since it was last said.
    """

    is_open: bool = False
    level: Level | None = None
    test: str | None = None
    since: dict[Level, int] = field(default_factory=dict)

    def advance(self, exceeded: Level | None, test: str, is_calm: bool, cooldown: int) -> Level | None:
        """Take the next window.

        Args:
            exceeded: the highest level that a test exceeds.
            test: which one.
            is_calm: whether all of them lie well below their lowest thresholds.
            cooldown: windows after something was said in which it is not said again, nor is a lower level.

        Returns:
            What is to be said. An episode that was kept back is said as soon as it may be, and has no recovery if it
            ends before.
        """
        self.since = {level: windows + 1 for level, windows in self.since.items()}
        if exceeded is not None:
            self.is_open = True
            if RANKS[exceeded] > RANKS[self.level] and self.since.get(exceeded, cooldown + 1) > cooldown:
                self.level, self.test = exceeded, test
                self.since |= {level: 0 for level in ("alarm", "warning") if RANKS[level] <= RANKS[exceeded]}
                return exceeded
            return None
        return self.end() if self.is_open and is_calm else None

    def end(self) -> Level | None:
        """Close it: `recovery` where something was said of it."""
        was_said = self.level is not None
        self.is_open, self.level = False, None
        return "recovery" if was_said else None

    def to_state(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
