"""Copies of rows with mistakes of typing, so that a model has seen some before people make them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from finetune.data.rows import Row

LEAST_LETTERS = 4
"""Of a word with a mistake: shorter ones would often become other words."""
WORDS_PER_MISTAKE = 5
"""Words of a text for one mistake; a text has at least one."""
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEAR = {key: row[max(0, i - 1) : i] + row[i + 1 : i + 2] for row in _KEYS for i, key in enumerate(row)}
_WORD = re.compile(rf"[^\W\d_]{{{LEAST_LETTERS},}}")


def add_typos(rows: Sequence[Row], share: float, *, seed: int) -> list[Row]:
    """The rows, and behind them copies of some with mistakes of typing in `text`.

    A mistake leaves the first letter of its word: two letters change places, one is missing, doubled, or a neighbour on
    the keyboard. Half of the copies are in lower case without punctuation at their end. Digits stay, so that numbers
    remain what they were.

    Args:
        rows: of the train split, N of them.
        share: of the rows that are copied, in [0, 1]; rounded to whole rows.
        seed: which rows, and which mistakes.
    """
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(len(rows))[: round(share * len(rows))])
    copies = [
        replace(rows[i], id=f"{rows[i].id}:typos", values={**rows[i].values, "text": mistype(text, generator)})
        for i in chosen.tolist()
        if _WORD.search(text := str(rows[i].values["text"]))
    ]
    return [*rows, *copies]


def mistype(text: str, generator: np.random.Generator) -> str:
    """The text with a mistake in one word of five, at least in one."""
    words = list(_WORD.finditer(text))
    count = max(1, len(text.split()) // WORDS_PER_MISTAKE)
    for place in sorted(generator.permutation(len(words))[:count].tolist(), reverse=True):
        word = words[place]
        text = text[: word.start()] + _mistype_word(word.group(), generator) + text[word.end() :]
    return text.lower().rstrip(".!?") if generator.random() < 0.5 else text


def _mistype_word(word: str, generator: np.random.Generator) -> str:
    place = int(generator.integers(1, len(word) - 1))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    near = _NEAR.get(letter.lower(), "")
    kinds = [before + after, before + letter * 2 + after]
    if after[0] != letter:
        kinds.append(before + after[0] + letter + after[1:])
    if near:
        kinds.append(before + near[int(generator.integers(len(near)))] + after)
    return kinds[int(generator.integers(len(kinds)))]
