"""Encoded rows, and how they become batches: by token budget, in length buckets, in an order fixed by two integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save

from finetune.recipe.files import write_file_atomically

Indices = npt.NDArray[np.int64]
Batch = dict[str, torch.Tensor]

# Rows are sorted by length inside windows of this many batches. Larger windows pad less and mix less: at 50, BANKING77
# pads about 2 % of the tokens, and every window still holds thousands of rows in random order.
WINDOW_BATCHES = 50


@dataclass(frozen=True)
class Examples:
    """Encoded rows, stored end to end.

    Args:
        input_ids: all tokens, (total,) int32.
        starts: row i is `input_ids[starts[i]:starts[i + 1]]`, (N + 1,) int64.
        labels: class of each row, (N,) int64; -100 where unknown.
    """

    input_ids: npt.NDArray[np.int32]
    starts: Indices
    labels: Indices

    @classmethod
    def build(cls, encoded: Sequence[Sequence[int]], labels: Sequence[int]) -> Examples:
        """Lay token lists end to end."""
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        flat = np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum()))
        return cls(flat, np.concatenate([[0], np.cumsum(lengths)]), np.asarray(labels, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Indices:
        """Tokens of each row, (N,)."""
        return np.diff(self.starts)

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        write_file_atomically(path, save({"input_ids": self.input_ids, "starts": self.starts, "labels": self.labels}))

    @classmethod
    def load(cls, path: Path) -> Examples:
        """Read what `save` wrote."""
        return cls(**load_file(path))


def plan_batches(lengths: Indices, tokens_per_batch: int, *, seed: int, epoch: int) -> list[Indices]:
    """Order one epoch: which rows go into which optimizer step.

    Every row occurs once. A batch holds rows of similar length and at most `tokens_per_batch` tokens with padding (one
    row if that row alone is longer). The order comes from a counter-based generator keyed by (seed, epoch), so a
    resumed run needs no generator state and the number of workers does not matter.

    Args:
        lengths: tokens of each row, (N,).
        tokens_per_batch: budget of one step.
        seed: the run's seed.
        epoch: 0-based.

    Returns:
        Row indices of each batch.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(len(lengths))
    window = max(1, WINDOW_BATCHES * tokens_per_batch // max(1, int(lengths.mean())))
    batches: list[Indices] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        batches.extend(_cut(rows[np.argsort(lengths[rows], kind="stable")], lengths, tokens_per_batch))
    return [batches[i] for i in generator.permutation(len(batches))]


def plan_prediction(lengths: Indices, tokens_per_batch: int) -> list[Indices]:
    """Group rows for prediction, longest first, so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    return _cut(order, lengths, tokens_per_batch)


def _cut(order: Indices, lengths: Indices, tokens_per_batch: int) -> list[Indices]:
    """Cut rows sorted by length into runs whose padded size fits the budget."""
    batches, first, longest = [], 0, 0
    for position, row in enumerate(order):
        grown = max(longest, int(lengths[row]))
        if position > first and grown * (position - first + 1) > tokens_per_batch:
            batches.append(order[first:position])
            first, grown = position, int(lengths[row])
        longest = grown
    if first < len(order):
        batches.append(order[first:])
    return batches


def collate(examples: Examples, rows: Indices, pad_token_id: int | None) -> Batch:
    """Build the tensors of a batch: padded, or packed end to end where there is no padding token.

    Returns:
        `labels` (B,), and `input_ids` (B, T) with `attention_mask` (B, T), 1 = real. Packed: `input_ids` (1, total)
        with `position_ids` (1, total), which start again at each row, as Hugging Face's DataCollatorWithFlattening
        has it.
    """
    labels = torch.from_numpy(examples.labels[rows])
    lengths, starts = examples.lengths[rows], examples.starts[rows]
    tokens = np.concatenate(
        [examples.input_ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    )
    if pad_token_id is None:
        positions = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return {
            "input_ids": torch.from_numpy(tokens.astype(np.int64))[None],
            "position_ids": torch.from_numpy(positions)[None],
            "labels": labels,
        }
    mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
    input_ids = np.full(mask.shape, pad_token_id, dtype=np.int64)
    input_ids[mask] = tokens
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "labels": labels,
    }


def list_inputs(batch: Batch) -> Batch:
    """What of a batch the model takes: all but the labels."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
