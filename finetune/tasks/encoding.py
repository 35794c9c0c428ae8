"""Texts as tokens, perhaps behind what was said before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from finetune.data.rows import Row
from finetune.data.turns import CONTEXT

Side = Literal["start", "end"]


def join_context(text: str, context: str | None) -> str:
    """A text behind its context, where it has one."""
    return f"{context}\n{text}" if context else text


def read_question(row: Row, reads_context: bool) -> str:
    """What a model is to read of a row."""
    return join_context(str(row.values["text"]), row.values.get(CONTEXT) if reads_context else None)


def encode_texts(texts: Sequence[str], tokenizer: Any, max_length: int, *, keep: Side = "start") -> list[list[int]]:
    """Token ids of each text, at most `max_length`.

    Args:
        texts: as the model is to read them.
        tokenizer: the base's.
        max_length: tokens, special ones included.
        keep: what stays of a text that is longer: its `start`, or its `end`, where the newest words are.
    """
    if not texts:
        return []
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "right" if keep == "start" else "left"
    try:
        encoded: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    finally:
        tokenizer.truncation_side = side
    return encoded
