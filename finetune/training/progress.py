"""Progress bars of the loop, and of judging."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Part = TypeVar("Part")

SMOOTHING = 0.95


class TrainingProgress:
    """A bar with smoothed loss, rate and time left, and one line for each validation; silent if asked."""

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        """Start at `done` of `total` steps."""
        self._loss: float | None = None
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  rate {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self._progress.add_task("train", total=total, completed=done, loss="-", rate="-")

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, *, loss: float, rate: float) -> None:
        """One step done."""
        self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        self._progress.update(self._task, advance=1, loss=f"{self._loss:.3f}", rate=f"{rate:.1e}")

    def stop_early(self, step: int, best_step: int | None) -> None:
        """Say why the bar goes no further."""
        kept = f"; the weights of step {best_step}, the best on validation, are kept" if best_step is not None else ""
        self._say(f"stopped early after step {step}{kept}")

    def _say(self, line: str) -> None:
        if not self._progress.disable:
            self._progress.console.print(line, highlight=False, soft_wrap=True)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print a validation line above the bar."""
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._say(f"step {step}  validation  {values}")


class JudgingProgress:
    """A bar for each stage of judging, from the first one that says how far it is; silent if asked."""

    def __init__(self, quiet: bool) -> None:
        self._progress = Progress(
            TextColumn("judge  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )

    def __enter__(self) -> JudgingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def track(self, stage: str, parts: Sequence[Part]) -> Iterator[Part]:
        """The parts of a stage; one is done when the next is asked for."""
        self._progress.start()
        task = self._progress.add_task(stage, total=len(parts))
        for part in parts:
            yield part
            self._progress.advance(task)


def narrate(quiet: bool, text: str) -> None:
    """Say what comes next, on standard error: long work must not look like no work."""
    if not quiet:
        sys.stderr.write(f"{text}\n")
