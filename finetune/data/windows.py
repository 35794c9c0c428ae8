"""Questions and passages as token windows: a passage that is too long for one becomes several that overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.batches import Indices, Tokens


@dataclass(frozen=True)
class Windows:
    """What a model reads: the question and a part of the passage, with the tokenizer's special tokens.

    Args:
        input_ids: tokens of each of W windows.
        token_type_ids: which text each token belongs to, where the tokenizer tells; else None.
        owners: number of the row that each window is of, ascending, (W,).
        places: characters of the passage, (T, 2) start and end, that each token of a window stands for; -1 outside it.
        parts: first and last token of the passage in each window, (W, 2); last before first where there is none.
    """

    input_ids: list[Tokens]
    token_type_ids: list[Tokens] | None
    owners: Indices
    places: list[Indices]
    parts: Indices

    def locate(self, row: int, start: int, end: int) -> list[tuple[int, int] | None]:
        """First and last token of a place in a row's passage, in each of the row's windows that holds it whole.

        Args:
            row: its number.
            start, end: characters of the passage.

        Returns:
            None for a window that lacks a part of it.
        """
        first, stop = np.searchsorted(self.owners, [row, row + 1]).tolist()
        inside, held = [], []
        for places in self.places[first:stop]:
            tokens = np.flatnonzero((places[:, 1] > start) & (places[:, 0] < end) & (places[:, 0] >= 0))
            inside.append(tokens)
            held.append({tuple(place) for place in places[tokens].tolist()})
        whole = set().union(*held)
        return [
            (int(tokens[0]), int(tokens[-1])) if whole and part == whole else None
            for tokens, part in zip(inside, held, strict=True)
        ]


def encode_windows(
    questions: Sequence[str], passages: Sequence[str], tokenizer: Any, *, max_length: int, stride: int
) -> Windows:
    """Encode N rows of a question and a passage.

    Every token of a passage is in a window. A question is cut so that at least half of a window is left to the passage.

    Args:
        questions, passages: N texts each.
        tokenizer: a fast one, which knows the characters of its tokens.
        max_length: most tokens of a window.
        stride: tokens that a window shares with the one before it; below half of `max_length`.
    """
    if not questions:
        return Windows([], None, np.zeros(0, dtype=np.int64), [], np.zeros((0, 2), dtype=np.int64))
    room = max(1, max_length // 2 - tokenizer.num_special_tokens_to_add(pair=True))
    encoded = tokenizer(
        _cut(questions, tokenizer, room),
        list(passages),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    places, parts = [], []
    for window, offsets in enumerate(encoded["offset_mapping"]):
        of_passage = np.array([side == 1 for side in encoded.sequence_ids(window)])
        places.append(np.where(of_passage[:, None], np.asarray(offsets, dtype=np.int64), -1))
        tokens = np.flatnonzero(of_passage)
        parts.append((int(tokens[0]), int(tokens[-1])) if len(tokens) else (0, -1))
    return Windows(
        encoded["input_ids"],
        encoded.get("token_type_ids"),
        np.asarray(encoded["overflow_to_sample_mapping"], dtype=np.int64),
        places,
        np.asarray(parts, dtype=np.int64),
    )


def _cut(questions: Sequence[str], tokenizer: Any, room: int) -> list[str]:
    """Questions of at most `room` tokens."""
    encoded = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        question if len(offsets) <= room else question[: offsets[room - 1][1]]
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]
