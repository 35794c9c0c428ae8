"""Personal data that must not reach a log, and words that must."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.applications.support.personal_data import LONGEST, mask_personal_data


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
        ("It is ann.o'neil@ex-ample.co.uk", "It is [email]"),
        ("or 'a!#$&*/=?^`{|}~b@example.org'", "or '[email]'"),
        ("Call +44 20 7946 0958 or (212) 555-0123.", "Call [phone] or [phone]."),
        ("030 901820-55 bzw. 13812345678", "[phone] bzw. [phone]"),
        ("Where is order 12345?", "Where is order [order_id]?"),
        ("ORD-99812 and #4711 are late", "[order_id] and [order_id] are late"),
        ("4111 1111 1111 1111 12/27", "[card] 12/27"),
        ("0171/1234567, 030/12345678 or +49/171/1234567", "[phone], [phone] or [phone]"),
        ("Call 612 345 678 or 12 34 56 78 or 02/123 45 67.", "Call [phone] or [phone] or [phone]."),
        ("4111/1111/1111/1111 and 4111_1111_1111_1111", "[card] and [card]"),
        ("INVOICE-12345 of order number: 4711", "[order_id] of order number: [order_id]"),
        (
            "order no. 4711, order id 4711-22, my order: 4711",
            "order no. [order_id], order id [order_id], my order: [order_id]",
        ),
        (
            "Add it to order 4711, or we order 4711 this time",
            "Add it to order [order_id], or we order [order_id] this time",
        ),
        ("order 4711/22 (4711), call 1-800-555-0123", "order [order_id] (4711), call 1-[phone]"),
        ("purchase 113542617735902 or 00123842", "purchase [order_id] or [order_id]"),
        ("12345-678 and 111-1111111-1111111", "[order_id] and [order_id]"),
        ("113-4567890-1234567", "[card]"),  # from the second digit on it could be one
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
        "In mid-2026, not by 25-Jun-2026, from 2024-2025 or 10000-12000 or 1050-1250 on, EUR1200 or GBP-1200 at most.",
        "We want to order 1000 cups; the last order was 1500 euros, in sizes 36 38 40 42, for 612 345 678 yen.",
        "Valid 02/2026 03/2027, 05/26 06/27 and 2026-01-02 1030.",
        "我的包裹在哪里？",  # noqa: RUF001
        "",
    ],
)
def test_an_ordinary_sentence_is_untouched(text):
    assert mask_personal_data(text) == text


COUNTS = st.integers(1, 9999).map(str)
YEARS = st.integers(1950, 2049)
MONTHS = st.sampled_from(["Jan", "Feb", "March", "May", "June", "July", "Sept", "October", "Dec"])
CENTS = st.integers(0, 99).map("{:02}".format)
AMOUNTS = st.one_of(
    st.builds("{}{}.{}".format, st.sampled_from("$€£¥"), COUNTS, CENTS),
    st.builds("{:,} {}".format, st.integers(1, 10**7), st.sampled_from(["euros", "dollars", "pounds", "yen", "EUR"])),
    st.builds("{},{} €".format, COUNTS, CENTS),
)
DATES = st.one_of(
    st.dates().map(str),
    st.dates().map("{:%d.%m.%Y}".format),
    st.dates().map("{:%m/%d/%y}".format),
    st.builds("{} {} {}".format, st.integers(1, 31), MONTHS, YEARS),
    st.builds("{} {}, {}".format, MONTHS, st.integers(1, 31), YEARS),
    st.builds("{}-{}".format, st.sampled_from(["mid", "early", "late", "summer"]), YEARS),
    st.builds("{:02}/{}".format, st.integers(1, 12), YEARS),
    st.builds("{}-{}".format, YEARS, YEARS),
)
TIMES = st.times().map("{:%H:%M}".format)
SENTENCES = st.one_of(
    st.builds("I paid {} for {} cups on {}.".format, AMOUNTS, COUNTS, DATES),
    st.builds("The order of {} came at {} and cost {}!".format, DATES, TIMES, AMOUNTS),
    st.builds("Can we order {} plates, {} x {} cm, before {}?".format, COUNTS, COUNTS, COUNTS, DATES),
    st.builds("It is {}% cheaper than in {}, and {} km away.".format, COUNTS, YEARS, COUNTS),
    st.builds("Size {}, not {}; between {} and {}, by {}".format, COUNTS, COUNTS, AMOUNTS, AMOUNTS, TIMES),
)


@settings(max_examples=300, deadline=None)
@given(SENTENCES, SENTENCES)
def test_amounts_years_dates_and_quantities_stay(first, second):
    text = f"{first} {second}"
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


DATA = ["anna@example.org", "4111 1111 1111 1111", "GB29 NWBK 6016 1331 9268 19", "+44 20 7946 0958", "ORD-99812"]


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from(DATA), st.text("abc ,\n", min_size=1)), max_size=40), st.integers(0, 400))
def test_what_is_kept_of_a_long_text_cuts_nothing_in_two(parts, most):
    """However much shorter the masks are, nothing that begins behind the cut comes to light."""
    text = " ; ".join(parts)
    masked = mask_personal_data(text, most)
    assert mask_personal_data(text).startswith(masked)
    assert not re.search(r"\d|@", masked)
    assert masked == mask_personal_data(text[: most + LONGEST], most)


@pytest.mark.parametrize(
    "part", ["a", "a1", "aa11", "a@", "a.", "1", "1-", "123-", "1,", "1 ", "0/", "+", "order : ", "#"]
)
def test_a_long_line_is_no_way_to_hang_the_log(part):
    """Work that grew with the square of the length would take a hundred seconds, of this process alone, and more."""
    start = time.process_time()
    mask_personal_data(part * (200_000 // len(part)))
    assert time.process_time() - start < 20  # less than one is what it takes
