"""Texts without markup and links, and the form in which two texts count as duplicates."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence

from finetune.recipe.schema import TextStep

CJK = "\u3040-\u30ff\u3400-\u9fff"
WORD = rf"(?u)[{CJK}]|[^\W{CJK}]+"
"""A word; Chinese and Japanese are written without spaces, so each character is one and 2-grams make words."""

SPACED_WORD = re.compile(rf"[{CJK}]|[^\s{CJK}]+")
"""What stands between two spaces, with its signs; of Chinese and Japanese each character too."""

_URL = re.compile(r"\b(?:https?://|www\.)\S+", re.IGNORECASE)
_NESTED_AMPERSAND = re.compile(r"&(?:amp;)+")
_NEGATIVE_NUMBER = re.compile(r"(?<!\w)[-\u2212](?=\.?\d)")


class _Folding(dict[int, str]):
    """Punctuation, spaces and control characters become a space; letters, digits, signs, `$` and emoji stay."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = " " if unicodedata.category(character)[0] in "PZC" else character
        return self[code]


_FOLDING = _Folding()


def clean_text(text: str, steps: Sequence[TextStep]) -> str:
    """Apply the steps of a recipe's `clean` to one text; cleaning twice changes nothing more.

    Entities are decoded before links are removed, whatever the order of `steps`, because a link may hide behind
    entities. Text that was escaped several times (`&amp;amp;`) is decoded fully. A text of nothing but links keeps
    them, for an empty text could not be used at all. White space is collapsed when any step ran; without steps the text
    is returned as it is.
    """
    if not steps:
        return text
    if "html" in steps:
        text = _NESTED_AMPERSAND.sub("&", text)
        while (decoded := html.unescape(text)) != text:  # ends: every entity is longer than what it stands for
            text = decoded
    without_links = _URL.sub(" ", text) if "urls" in steps else text
    return " ".join((without_links if without_links.strip() else text).split())


def normalize_for_duplicates(text: str) -> str:
    """Reduce a text to what makes it the same text: case, links, punctuation and spacing do not count.

    Digits, `$TICKER`, the sign of a number and emoji do count. A text of which nothing would be left, such as a bare
    link, is only case-folded, so that two different links stay different. An empty text gives "".
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = _NEGATIVE_NUMBER.sub(
        "\u2212", _URL.sub(" ", folded)
    )  # the minus sign, unlike the hyphen, is no punctuation
    return " ".join(folded.translate(_FOLDING).split()) or " ".join(text.casefold().split())
