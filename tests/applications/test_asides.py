"""Messages that ask for nothing, and those that only look like one."""

from __future__ import annotations

import pytest

from finetune.applications.support.asides import find_aside


@pytest.mark.parametrize(
    ("text", "aside"),
    [
        *((text, "greeting") for text in ("hi", "Hello!", "good morning", "hello?", "hi there, I have a question")),
        *((text, "thanks") for text in ("thanks!", "Thank you, bye", "ok", "Okay, thank you very much for your help")),
        *(
            (text, "value")
            for text in ("PW-204518", "ok PW-204518", "order PW-204518", "it's 1234567", "a@example.org")
        ),
        *((text, "value") for text in ("hi, a question about order PW-204518", "PW-204518 and PW-204519?")),
    ],
)
def test_what_asks_for_nothing(text, aside):
    assert find_aside(text) == aside


@pytest.mark.parametrize(
    "text",
    [
        *("", "?!", "no", "yes please", "this one", "12", "is that ok?", "thanks, but where is it", "hello, cancel it"),
        *("cancel PW-204518", "PW-204518 is late", "question about returns", "12 Rose Street, Leeds", "hello moon"),
    ],
)
def test_what_may_ask_for_something(text):
    assert find_aside(text) is None
