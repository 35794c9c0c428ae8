from __future__ import annotations

import pytest

from finetune.data.cleaning import clean_text, normalize_for_duplicates


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("AT&amp;T  &gt; all", ["html"], "AT&T > all"),
        ("AT&amp;amp;T", ["html"], "AT&T"),
        ("up 3% https://t.co/x?y=1", ["urls"], "up 3%"),
        ("see WWW.site.com/a today", ["urls"], "see today"),
        ("a&nbsp;b", ["html"], "a b"),
        ("h&#116;tps://t.co/x gone", ["urls", "html"], "gone"),
        ("  kept &amp; as  is ", [], "  kept &amp; as  is "),
        ("https://t.co/x", ["urls"], "https://t.co/x"),
        ("awww.no-link", ["urls"], "awww.no-link"),
    ],
)
def test_clean_text_by_hand(text, steps, expected):
    assert clean_text(text, steps) == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Hello, World!", "hello world"),
        ("Don\u2019t  go", "don't go"),
        ("$BYND falls https://t.co/a", "$bynd falls: https://t.co/b"),
        ("STRASSE", "straße"),
        ("\uff21\uff22\uff23", "abc"),
        ("co-op", "co op"),
    ],
)
def test_same_text_normalises_alike(first, second):
    assert normalize_for_duplicates(first) == normalize_for_duplicates(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("up 3 %", "up 4 %"),
        ("$CAT rises", "cat rises"),
        ("margin +5%", "margin -5%"),
        ("fine 🙂", "fine 🙁"),
        ("https://t.co/a", "https://t.co/b"),
        ("!!!", "???"),
    ],
)
def test_different_texts_stay_different(first, second):
    assert normalize_for_duplicates(first) != normalize_for_duplicates(second)


def test_empty_text_normalises_to_nothing():
    assert normalize_for_duplicates(" \n") == ""
