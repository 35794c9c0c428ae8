from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from finetune.data.duplicates import SIMILARITY, compute_similarity, find_near_duplicates


def test_similarity_by_hand():
    # "abcdef" has the shingles abcde, bcdef; "abcdeg" has abcde, bcdeg: one of three in common.
    assert compute_similarity("abcdef", "abcdeg") == pytest.approx(1 / 3)
    assert compute_similarity("abcdef", "abcdef") == 1.0
    assert compute_similarity("abc", "abc") == 0.0


def test_headline_with_one_changed_word_is_found():
    texts = [
        "shares of the maker of plant based burgers fall after weak guidance for the year",
        "central bank keeps its rate unchanged",
        "shares of the maker of plant based burgers fell after weak guidance for the year",
    ]
    (found,) = find_near_duplicates(texts, [0, 0, 2])
    assert (found.index, found.other) == (0, 2)
    assert found.similarity == pytest.approx(compute_similarity(f" {texts[0]} ", f" {texts[2]} "))


def test_same_group_is_not_compared():
    assert find_near_duplicates(["the very same text"] * 3, [1, 1, 1]) == []


@pytest.mark.parametrize("texts", [[], [""], ["", "a"], ["ab", "ab"]])
def test_short_texts_are_never_found(texts):
    assert find_near_duplicates(texts, list(range(len(texts)))) == []


@pytest.mark.parametrize("seed", range(5))
def test_finds_what_comparing_all_pairs_finds(seed):
    generator = np.random.default_rng(seed)
    words = ["".join(generator.choice(list("abcdeé你"), 4)) for _ in range(40)]
    texts = [" ".join(generator.choice(words, generator.integers(3, 25))) for _ in range(150)]
    for index in range(100):  # a copy with one character changed
        text = texts[int(generator.integers(len(texts)))]
        place = int(generator.integers(len(text)))
        texts.append(text[:place] + "z" * (index % 3) + text[place + 1 :])
    groups = generator.integers(3, size=len(texts)).tolist()
    best: dict[int, float] = {}
    for one, two in product(range(len(texts)), repeat=2):
        if groups[one] < groups[two]:
            best[one] = max(best.get(one, 0.0), compute_similarity(f" {texts[one]} ", f" {texts[two]} "))
    expected = {index: similarity for index, similarity in best.items() if similarity >= SIMILARITY}
    found = {pair.index: pair.similarity for pair in find_near_duplicates(texts, groups)}
    assert len(expected) > 20
    assert found == pytest.approx(expected)


def test_texts_from_one_template_are_found_without_comparing_all_pairs():
    texts = [f"please send the refund for order {i} to my bank account as soon as possible" for i in range(3000)]
    found = find_near_duplicates(texts, [0] * 2000 + [2] * 1000)
    assert len(found) > 1900
