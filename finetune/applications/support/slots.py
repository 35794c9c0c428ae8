"""What fills a template's slots: order numbers, dates, amounts and more, found in what the customer wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.applications.support.personal_data import EMAIL, MONEY, ORDER_ID

MAX_FREE_CHARACTERS = 200

_MONTHS = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DAYS = r"(?:mon|tues|wednes|thurs|fri|satur|sun)day"
PATTERNS: dict[str, re.Pattern[str]] = {
    "order_id": ORDER_ID,
    "email": EMAIL,
    "date": re.compile(
        rf"\b\d{{4}}-\d{{2}}-\d{{2}}\b|\b\d{{1,2}}[./]\d{{1,2}}[./]\d{{2,4}}\b"
        rf"|(?i:\b\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTHS}(?: \d{{4}})?"
        rf"|\b{_MONTHS} \d{{1,2}}(?:st|nd|rd|th)?\b(?:,? \d{{4}})?"
        rf"|\b(?:today|tomorrow|yesterday|(?:(?:next|last|this) )?{_DAYS})\b)"
    ),
    "amount": re.compile(rf"[$€£¥]\s?\d[\d,.]*\d|[$€£¥]\s?\d|\b\d[\d,.]*\s?{MONEY}"),
    "quantity": re.compile(
        r"(?i:(?<![.,/:\d])\b(?:\d{1,3}|one|two|three|four|five|six|seven|eight|nine|ten)\b)(?![.,/:]\d)"
    ),
    "postcode": re.compile(r"\b(?:[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}|\d{5}(?:-\d{4})?)\b"),
}
"""Slot -> what fills it. A name that ends in one of these, such as `new_email`, is filled alike."""


def find_pattern(slot: str) -> re.Pattern[str] | None:
    """What fills a slot; None where only the customer's own words can, as for an address."""
    return next((PATTERNS[kind] for kind in PATTERNS if slot == kind or slot.endswith(f"_{kind}")), None)


def find_values(slot: str, texts: Sequence[str]) -> list[str]:
    """The different values of a slot in the first of the texts that holds any; empty where none does.

    Args:
        slot: its name.
        texts: what the customer wrote, newest first.
    """
    pattern = find_pattern(slot)
    if pattern is None:
        return []
    for text in texts:
        if found := list(dict.fromkeys(" ".join(match.group().split()) for match in pattern.finditer(text))):
            return found
    return []


def describe_slot(slot: str) -> str:
    """A slot as it is asked for: `order_id` is the "order number"."""
    return re.sub(r"\bid\b", "number", slot.replace("_", " "))
