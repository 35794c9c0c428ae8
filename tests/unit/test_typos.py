"""Mistakes of typing: what they change and what they leave."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.rows import Row
from finetune.data.typos import LEAST_LETTERS, add_typos, mistype


def make(text, number=1):
    return Row(f"train:{number}", "train", number, {"text": text, "label": "a", "context": "Customer: before"})


@given(st.text(max_size=60), st.integers(0, 2**32 - 1))
def test_short_words_and_what_is_no_letter_stay(text, seed):
    text += " ordinary PW-650231 at 12:30"
    changed = mistype(text, np.random.default_rng(seed))
    kept = changed.casefold()
    assert "650231" in kept
    assert "12:30" in kept
    assert " at " in kept
    assert len(changed.split()) == len(text.split())


def test_a_mistake_is_one_slip_of_the_fingers_and_leaves_the_first_letter():
    seen = {mistype("cancel", np.random.default_rng(seed)) for seed in range(400)}
    assert all(word[0] == "c" and 5 <= len(word) <= 7 and word != "cancel" for word in seen)
    assert {"acncel", "cancle", "cnacel", "cacel", "canncel", "cancwl"} & seen == {
        "cancle",
        "cnacel",
        "cacel",
        "canncel",
        "cancwl",
    }


def test_one_word_in_five_has_a_mistake():
    text = "please cancel ordinary delivery items before sending another parcel today"  # ten words
    pairs = zip(text.split(), mistype(text, np.random.default_rng(3)).split(), strict=True)
    assert sum(one != other for one, other in pairs) == 2


def test_copies_stand_behind_the_rows_and_keep_all_but_the_text():
    rows = [make(f"my delivery number {number} is missing", number) for number in range(1, 41)]
    found = add_typos(rows, 0.25, seed=5)
    assert found[:40] == rows
    copies = found[40:]
    assert len(copies) == 10
    by_id = {row.id: row for row in rows}
    for copy in copies:
        original = by_id[copy.id.removesuffix(":typos")]
        assert copy.values["text"] != original.values["text"]
        assert {**copy.values, "text": ""} == {**original.values, "text": ""}
    assert add_typos(rows, 0.25, seed=5) == found
    assert add_typos(rows, 0.25, seed=6) != found


def test_a_text_without_a_longer_word_is_not_copied():
    assert LEAST_LETTERS == 4
    assert add_typos([make("is it on"), make("12 34")], 1.0, seed=1) == [make("is it on"), make("12 34")]
