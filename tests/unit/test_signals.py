from __future__ import annotations

import os
import signal
import threading

import pytest

from finetune.training.signals import StopRequest

BOTH = (signal.SIGTERM, signal.SIGINT)


def send(number: signal.Signals) -> None:
    """Python runs the handler before os.kill returns to the caller's next line."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_sets_the_flag(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert (stop.requested, stop.signal_name) == (False, None)
        send(number)
        assert (stop.requested, stop.signal_name) == (True, number.name)
    assert stop.requested, "the loop asks after the block as well"


@pytest.mark.parametrize("first", BOTH)
def test_a_second_interrupt_does_not_wait(first: signal.Signals) -> None:
    with StopRequest() as stop:
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert stop.signal_name == first.name


def test_a_second_termination_is_no_hurry() -> None:
    with StopRequest() as stop:
        send(signal.SIGINT)
        send(signal.SIGTERM)
    assert stop.signal_name == "SIGINT"


def test_the_former_handlers_come_back_also_after_an_error() -> None:
    def own(*_: object) -> None: ...

    former = {number: signal.signal(number, own) for number in BOTH}
    try:
        with pytest.raises(ZeroDivisionError), StopRequest():
            raise ZeroDivisionError
        assert all(signal.getsignal(number) is own for number in BOTH)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_a_handler_that_was_not_set_from_python_becomes_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: calls.append(handler))
    with StopRequest():
        pass
    assert calls[2:] == [signal.SIG_DFL, signal.SIG_DFL]


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = [signal.getsignal(number) for number in BOTH]
    inside: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            inside.extend([*(signal.getsignal(number) for number in BOTH), stop.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [*before, False]
