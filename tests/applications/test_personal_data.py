"""Personal data that must not reach a log, and words that must."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.applications.support.personal_data import mask_personal_data


def add_check_digit(digits: str) -> str:
    """Luhn's digit, from its definition: every second digit from the right doubled, its digits added."""
    total = sum(sum(divmod(int(d) * (2 if place % 2 == 0 else 1), 10)) for place, d in enumerate(reversed(digits)))
    return digits + str(-total % 10)


CARDS = st.builds(
    lambda first, rest: add_check_digit(first + rest),
    st.sampled_from("23456"),
    st.text("0123456789", min_size=11, max_size=17),
)


@settings(max_examples=60, deadline=None)
@given(CARDS, st.lists(st.sampled_from(["", " ", "-", "\u00a0", "."]), min_size=19, max_size=19), st.text(), st.text())
def test_a_valid_card_number_anywhere_is_masked(card, gaps, before, after):
    written = "".join(digit + gap for digit, gap in zip(card[:-1], gaps, strict=False)) + card[-1]
    before, after = (re.sub(r"\d", "x", part) for part in (before, after))
    masked = mask_personal_data(before + written + after)
    assert not re.search(r"\d", masked)


@given(CARDS, st.text("0123456789 ", max_size=12), st.text("0123456789 ", max_size=12))
def test_also_inside_longer_numbers(card, before, after):
    assert card not in mask_personal_data(before + card + after)


# The registry's examples, with spaces and without.
@pytest.mark.parametrize(
    "iban",
    [
        "GB29 NWBK 6016 1331 9268 19",
        "DE89370400440532013000",
        "fr14 2004 1010 0505 0001 3m02 606",
        "NO9386011117947",
        "MT84MALT011000012345MTLCAST001S",
        "NL91 ABNA 0417 1643 00",
    ],
)
def test_an_iban_is_masked(iban):
    assert mask_personal_data(f"Refund {iban}, please.") == "Refund [iban], please."


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to anna.b+shop@mail.example.org today", "Write to [email] today"),
        ("Call +44 20 7946 0958 or (212) 555-0123.", "Call [phone] or [phone]."),
        ("030 901820-55 bzw. 13812345678", "[phone] bzw. [phone]"),
        ("Where is order 12345?", "Where is order [order_id]?"),
        ("ORD-99812 and #4711 are late", "[order_id] and [order_id] are late"),
        ("4111 1111 1111 1111 12/27", "[card] 12/27"),
    ],
)
def test_what_is_masked_as_what(text, masked):
    assert mask_personal_data(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "I bought 2 pairs on 2026-11-03 at 14:30 for $1,299.00 and 12000 yen.",
        "In 24 hours after my order is 3 days late, size 42, 100% cotton, 1/2 price.",
        "Delivered 01.02.2026 10:30 to door 17, floor 3.",
        "我的包裹在哪里？",  # noqa: RUF001
        "",
    ],
)
def test_an_ordinary_sentence_is_untouched(text):
    assert mask_personal_data(text) == text


@given(
    st.lists(st.one_of(st.text("abcdefghijklmnopqrstuvwxyzäß", min_size=1), st.integers(0, 999).map(str)), max_size=6)
)
def test_words_and_small_numbers_stay(words):
    text = ", ".join(words)
    assert mask_personal_data(text) == text


@given(st.text(st.sampled_from("0123456789 -.@aAorder#+()")))
def test_masking_twice_changes_nothing_more(text):
    once = mask_personal_data(text)
    assert mask_personal_data(once) == once
