"""Stopping on request: a signal sets a flag, and the loop saves and ends at the next step; elsewhere it is an error."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context manager that turns SIGTERM and SIGINT into a flag.

    The first signal sets `requested`; a SIGINT after that raises KeyboardInterrupt at once, for a person who will not
    wait. The former handlers come back on exit. Outside the main thread, where Python allows no handlers, it does
    nothing.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        """`SIGTERM` or `SIGINT`, whichever came first; None before that."""
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._former.items():
            # None: the former handler was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  (the signature is Python's)
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name


def name_stop(error: KeyboardInterrupt) -> str:
    """What stopped the work outside the loop: the signal that the command's handler named, else Ctrl-C."""
    return str(error) or "Ctrl-C"
