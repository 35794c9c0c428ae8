"""What a smaller model may cost, and which of several sizes that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import UsageError

MAX_DROP = 0.01
"""What the chosen model may lose of the headline, where no budget is stated."""


@dataclass(frozen=True)
class Budget:
    """What is asked of the smaller model; one of the two.

    Args:
        max_drop: the most that it may lose of the headline on validation; the fastest of those is taken.
        min_speedup: times the rows per second of the run, at least; the best of those is taken.
    """

    max_drop: float | None = None
    min_speedup: float | None = None

    @classmethod
    def build(cls, max_drop: float | None, min_speedup: float | None) -> Budget:
        """Settle what was asked for.

        Raises:
            UsageError: both, or one that says nothing.
        """
        if max_drop is not None and min_speedup is not None:
            raise UsageError(
                f"compress: must get one budget, got --max-drop {max_drop:g} and --min-speedup {min_speedup:g}. "
                "Leave one out."
            )
        if min_speedup is not None:
            if not min_speedup >= 1:
                raise UsageError(f"--min-speedup: must be at least 1, got {min_speedup:g}.")
            return cls(min_speedup=min_speedup)
        max_drop = MAX_DROP if max_drop is None else max_drop
        if not 0 <= max_drop < 1:
            raise UsageError(f"--max-drop: must be at least 0 and below 1, got {max_drop:g}. .01 is one point.")
        return cls(max_drop=max_drop)

    def choose(self, points: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, str]:
        """The point that is taken, None where none keeps the budget; and the one that comes nearest to it.

        Args:
            points: name -> `lost`, of the headline, and `speedup`.
        """

        def rank(name: str) -> tuple[float, float]:
            lost, speedup = points[name]["lost"]["value"], points[name]["speedup"]["rows_per_second"]
            lost = float("inf") if lost is None else lost
            return (lost, -speedup) if (self.max_drop is None) == keeps(name) else (-speedup, lost)

        def keeps(name: str) -> bool:
            lost, speedup = points[name]["lost"]["value"], points[name]["speedup"]["rows_per_second"]
            if self.max_drop is not None:
                return lost is not None and lost <= self.max_drop
            return bool(speedup >= self.min_speedup)

        kept = [name for name in points if keeps(name)]
        best = min(kept or points, key=rank)
        return (best if kept else None), best

    def describe(self) -> str:
        """In words, behind "must"."""
        if self.max_drop is not None:
            return f"lose at most {self.max_drop:g} on validation"
        return f"be at least {self.min_speedup:g} times as fast as the run"
