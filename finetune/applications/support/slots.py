"""What fills a template's slots: order numbers, dates, amounts and more, found in what the customer wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.applications.support.asides import FILLERS, find_aside
from finetune.applications.support.personal_data import EMAIL, MONEY, NUMBER, Span, find_order_ids, find_personal_data
from finetune.data.ranking import split_words

MAX_FREE_CHARACTERS = 200

_MONTHS = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DAYS = r"(?:mon|tues|wednes|thurs|fri|satur|sun)day"
PATTERNS: dict[str, re.Pattern[str]] = {
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
KINDS = ("order_id", *PATTERNS)

# What makes a number with nothing else about it an order's, or something else's.
_CLAUSE = re.compile(r"(?:[^.,;:!?\n]|[.,;:](?!\s))+")
_ORDER = set(
    split_words(
        "order orders ordered purchase parcel package shipment delivery invoice return refund cancel stop track where"
    )
)
_OTHERS = set(
    split_words(
        "phone telephone mobile cell tel fax call text zip postcode postal code street live house flat card account "
        "bank iban customer member"
    )
)
_PLACE = re.compile(r"(?i:\b(?:in|at|near|to|from)\s)$")

_ASKS = re.compile(
    r"^(?:what|why|how|when|who|whose|which|where)\b"
    r"|^(?:can|could|would|will|do|does|did|is|are|am|should|must) (?:you|i|we|it|this|that|there|they)\b"
)
_REFUSES = re.compile(
    r"\b(?:do not|don t|dont|cannot|can not|can t|cant) (?:know|remember|recall|say|tell|find (?:it|that))\b"
    r"|\b(?:(?:no|not) (?:idea|clue|sure)|dunno|never ?mind|forget it|unsure|not decided|haven t decided)\b|\bnot yet$"
    r"|^(?:no|none|nothing|yes|ok|okay|later|skip|wait)$"
)


def find_kind(slot: str) -> str | None:
    """What kind of thing fills a slot; None where only the customer's own words can, as for an address."""
    return next((kind for kind in KINDS if slot == kind or slot.endswith(f"_{kind}")), None)


def find_values(slot: str, texts: Sequence[str], *, asked: bool = False) -> list[str]:
    """The different values of a slot in the first of the texts that holds any; empty where none does.

    Args:
        slot: its name.
        texts: what the customer wrote, newest first.
        asked: the newest answers a question for this slot.
    """
    kind = find_kind(slot)
    for place, text in enumerate(texts if kind else ()):
        if kind == "order_id":
            found = _find_order_ids(text, asked and place == 0, place == 0)
        else:
            found = [match.group() for match in PATTERNS[str(kind)].finditer(text)]
        if found:
            return list(dict.fromkeys(" ".join(value.split()) for value in found))
    return []


def is_answer(text: str) -> bool:
    """Whether a text can fill a slot that takes the customer's own words: it asks nothing, does not refuse, and is no
    number that other slots take.

    How much it looks out of scope says nothing: an address alone looks so to every model.
    """
    if find_aside(text):
        return False
    said = " ".join(split_words(text))
    return not (text.rstrip().endswith("?") or _ASKS.search(said) or _REFUSES.search(said))


def _find_order_ids(text: str, asked: bool, is_newest: bool) -> list[str]:
    """The numbers of orders in a text, in its order.

    A number without a form of its own may as well be a postcode: it counts in the newest text only, in a clause that
    speaks of an order or of nothing else, or in an answer to the question for it.
    """
    if asked and (alone := re.fullmatch(r"\W*(\d{4,12})\W*", text)):
        return [alone[1]]
    others = find_personal_data(text)
    sure = [other for other in others if other[2] != "phone"]  # order 0012384212 looks like one
    said = [(*span, "order_id") for span in find_order_ids(text) if not _lies_in(span, sure)]
    bare = []
    for clause in _CLAUSE.finditer(text) if is_newest else ():
        words = set(split_words(NUMBER.sub(" ", clause.group())))
        if words & _OTHERS or not (asked or words & _ORDER or words <= FILLERS):
            continue
        numbers = (match.span() for match in NUMBER.finditer(text, clause.start(), clause.end()))
        bare += [span for span in numbers if not (_PLACE.search(text[: span[0]]) or _lies_in(span, [*others, *said]))]
    return [text[start:stop] for start, stop in sorted([*bare, *(span[:2] for span in said)])]


def _lies_in(span: tuple[int, int], others: Sequence[Span]) -> bool:
    return any(first <= span[0] and span[1] <= last for first, last, _ in others)


def describe_slot(slot: str) -> str:
    """A slot as it is asked for: `order_id` is the "order number"."""
    return re.sub(r"\bid\b", "number", slot.replace("_", " "))
