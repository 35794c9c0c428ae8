"""Personal data made unreadable before a text is logged: cards, IBANs, e-mail addresses, phone and order numbers.

Numbers with a checksum are masked wherever they stand, whatever stands around them. Everything else is masked by its
form, and so that dates, amounts and ordinary words stay. Names and addresses of people have no form and are not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate, chain

MONEY = r"(?i:[$€£¥]|euros?\b|dollars?\b|pounds?\b|yuan\b|yen\b|eur\b|usd\b|gbp\b|元)"
# The bound (RFC 5321) keeps the time linear: each letter of a long word is tried as the start of an address.
EMAIL = re.compile(r"[\w.+%-][\w.+%'!#$&*/=?^`{|}~-]{0,63}@[\w-]+(?:\.[\w-]+)+")
_ALONE, _ENDS = r"(?<![\w.,/:+$€£¥-])", rf"(?![\w/:-]|[.,]\d|\s?{MONEY})"  # no part of a date, a time or an amount
_IN_YEAR = (  # mid-2026, Nov2026
    r"(?i:mid|early|late|pre|post|spring|summer|autumn|fall|winter|(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*)"
    r"-?(?:19|20)\d\d\b"
)
_RANGE = r"\d{3,4}-\d{3,4}\b|\d*0-\d*0\b"
# To order 1000 cups is no number of an order, and to add something to order 1000 is.
_NOUN = r"\b(?:purchase|(?<!\bto )(?<!\bwe )(?<!\bi )order|order(?!\s\d+\b (?!this\b)[a-z]{3,}s\b))"
_ORDER_ID = re.compile(
    rf"(?i:{_NOUN}(?:[ -](?:number|no|nr|id)\b\.?(?: (?:is|was)\b)?)?[\s:#]{{1,3}})"  # order number: 4711
    rf"((?:\d{{4,20}}|\d{{3}}-\d{{4,7}})(?:[/-]\d{{1,7}})*)\b(?![.,]\d{{1,2}}\b|\s?{MONEY})"
    r"|#\s?\d{4,12}\b"  # #12345
    rf"|\b(?!{_IN_YEAR}|(?i:eur|usd|gbp)-?\d)"
    r"(?:[A-Za-z]{1,5}|[A-Za-z]{1,12}-)\d{4,12}(?:-\d{1,6})*\b"  # ORD-12345, AB123456
)
NUMBER = re.compile(
    r"(?i:(?<=\bnumber ))\d{4,12}(?:-\d{1,7})*\b"
    rf"|{_ALONE}(?:\d{{5,20}}|(?!{_RANGE})(?=(?:-?\d){{8}})\d{{3,7}}(?:-\d{{3,7}})+){_ENDS}"  # 113-4567890-1234567
)
"""A number of its own that is no date, amount or range: an order's, a postcode, anything."""

_GAP = r"[\s.\u00ad\u2010-\u2015-]{0,2}"  # what people write between the groups of a number
_DIGITS = re.compile(rf"\d(?:{_GAP}\d){{12,}}")
_FOURS = re.compile(r"\d{4}(?:[/_]\d{4}){3}")  # between groups of four alone: 2026/11/03 is a date
_IBAN = re.compile(r"(?=((?:[A-Z]{2}[ -]?|[A-Za-z]{2})\d[ -]?\d(?:[ -]?[A-Za-z\d]){11,30}))")
_DATE = r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}\b"
_PHONE = re.compile(
    r"(?<![\w.,+])(?:"
    r"(?:\+|00)[1-9](?:[\s()./-]{0,2}\d){6,13}"  # international
    rf"|(?!{_DATE}|(?:0\d/|(?<=\d-)0\d-)(?:\d\d){{1,2}}\b)"  # no date or part of one, but
    r"\(?0\d(?:[\s()./-]{0,2}\d){7,10}"  # national, with its leading zero
    r"|\(?[2-9]\d\d\)?[\s.-]{1,2}\d{3}[\s.-]\d{4}"  # North America
    r"|1[3-9]\d[\s-]?\d{4}[\s-]?\d{4}"  # Chinese mobile
    rf"|(?<![$€£¥])(?<![$€£¥]\s)(?<!\bsize )(?<!\bsizes )(?:[6-9]\d\d(?: \d{{3}}){{2}}|\d\d(?: \d\d){{3}})"
    rf"(?! ?\d|[.,/:-]\d|\s?{MONEY})"  # groups of three, or pairs
    r")(?!\d)"
)
CARD_DIGITS = range(13, 20)  # ISO/IEC 7812: what card numbers in use have
CARD_STARTS = "23456"  # the industries that issue payment cards
IBAN_CHARACTERS = range(15, 35)  # ISO 13616: the shortest in use, the longest allowed
MIN_IBAN_DIGITS = 10  # every country's has them; sentences such as "in 24 hours after my order" do not

LONGEST = 320
"""Characters that what is masked takes at most: an e-mail address, RFC 5321."""

Span = tuple[int, int, str]


def mask_personal_data(text: str, most: int | None = None) -> str:
    """The text with `[card]`, `[iban]`, `[email]`, `[phone]` and `[order_id]` in the place of such data.

    Masking twice changes nothing more. Where two kinds overlap, all of it is masked, under the first of them in this
    order: email, iban, card, phone, order_id.

    Args:
        text: of any length; what is read of it, and so the time, is bounded by `most`.
        most: how many of its characters are kept, masked; None for all. What is masked is never cut in two.
    """
    most = len(text) if most is None else most
    text = text[: most + LONGEST]  # half a number would not be known as one
    spans = [*find_personal_data(text), *((start, stop, "order_id") for start, stop in find_order_ids(text))]
    spans += [(*match.span(), "order_id") for match in NUMBER.finditer(text)]
    pieces, end = [], 0
    for start, stop, kind in _merge(spans):
        if start >= most:
            break
        pieces += [text[end:start], f"[{kind}]"]
        end = stop
    return "".join([*pieces, text[end:most]])


def find_personal_data(text: str) -> list[Span]:
    """Start, end and kind of what is a person's own, numbers of orders aside."""
    spans: list[Span] = [(*match.span(), "email") for match in EMAIL.finditer(text)]
    spans += [(*span, "iban") for span in _find_ibans(text)]
    spans += [(*span, "card") for span in _find_cards(text)]
    return [*spans, *((*match.span(), "phone") for match in _PHONE.finditer(text))]


def find_order_ids(text: str) -> Iterator[tuple[int, int]]:
    """The numbers that are an order's by their form, or by a word before them; not those of `NUMBER`."""
    for match in _ORDER_ID.finditer(text):
        yield match.span(match.lastindex or 0)


def _find_cards(text: str) -> Iterator[tuple[int, int]]:
    """Each stretch of 13 to 19 digits that passes Luhn's check (ISO/IEC 7812-1), also inside longer ones."""
    for run in chain(_DIGITS.finditer(text), _FOURS.finditer(text)):
        places = [index for index in range(*run.span()) if text[index].isdecimal()]
        digits = [int(text[index]) for index in places]
        doubled = [2 * digit - 9 * (digit > 4) for digit in digits]
        # Running sums with the even, and with the odd, places doubled: the sum of a stretch is one difference.
        sums = [[0, *accumulate(_alternate(digits, doubled, odd))] for odd in (0, 1)]
        for start in range(len(digits) - CARD_DIGITS[0] + 1):
            if str(digits[start]) not in CARD_STARTS:
                continue
            for stop in range(start + CARD_DIGITS[0], min(start + CARD_DIGITS[-1], len(digits)) + 1):
                row = sums[stop % 2]  # the last digit stays, the one before it is doubled
                if (row[stop] - row[start]) % 10 == 0:
                    yield places[start], places[stop - 1] + 1


def _alternate(digits: list[int], doubled: list[int], odd: int) -> Iterator[int]:
    """The doubled digit at odd (1) or even (0) places, the plain one at the others."""
    for place, pair in enumerate(zip(digits, doubled, strict=True)):
        yield pair[place % 2 == odd]


def _find_ibans(text: str) -> Iterator[tuple[int, int]]:
    """From each place that can be the start of an IBAN the longest stretch whose remainder by 97 is 1 (ISO 13616)."""
    for match in _IBAN.finditer(text):
        places = [index for index in range(*match.span(1)) if text[index].isalnum()]
        characters = "".join(text[index] for index in places)
        for length in reversed(IBAN_CHARACTERS):
            part = characters[:length]
            digits = sum(character.isdecimal() for character in part)
            if len(part) == length and digits >= MIN_IBAN_DIGITS and _compute_remainder(part) == 1:
                yield places[0], places[length - 1] + 1
                break


def _compute_remainder(characters: str) -> int:
    """By 97, of the characters with the first four moved to the end and letters as 10 to 35."""
    return int("".join(str(int(character, 36)) for character in characters[4:] + characters[:4])) % 97


def _merge(spans: list[Span]) -> list[Span]:
    """Overlapping spans as one, with the kind that was looked for first."""
    order = {kind: rank for rank, kind in enumerate(("email", "iban", "card", "phone", "order_id"))}
    merged: list[Span] = []
    for start, stop, kind in sorted(spans):
        if merged and start < merged[-1][1]:
            former = merged.pop()
            start, stop, kind = former[0], max(stop, former[1]), min(kind, former[2], key=order.__getitem__)
        merged.append((start, stop, kind))
    return merged
