"""Encoded rows, and how they become batches: by token budget, in length buckets, in an order fixed by two integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save

from finetune.recipe.files import write_file_atomically

Indices = npt.NDArray[np.int64]
Batch = dict[str, torch.Tensor]
Tokens = Sequence[int] | npt.NDArray[np.int32]

IGNORED = -100
"""A label that counts for nothing, Hugging Face's convention."""

# Rows are sorted by length inside windows of this many batches. Larger windows pad less and mix less: at 50, BANKING77
# pads about 2 % of the tokens, and every window still holds thousands of rows in random order.
WINDOW_BATCHES = 50

# Enough pairs of one class, and a batch of 50 short rows still holds ten classes to tell apart.
ROWS_PER_GROUP = 4


@dataclass(frozen=True)
class Examples:
    """Encoded rows, stored end to end.

    Args:
        input_ids: all tokens, (total,) int32.
        starts: row i is `input_ids[starts[i]:starts[i + 1]]`, (N + 1,) int64.
        labels: class of each row, (N,) int64; -100 where there is none.
        target_ids: for tasks that say tokens, what is to be said, laid end to end like `input_ids`; else None.
        target_starts: as `starts`, for `target_ids`.
        companions: for tasks that compare rows, those that a row must find in its batch, laid end to end; they are
            dealt with the rows that need them, and not by themselves.
        companion_starts: as `starts`, for `companions`.
        token_type_ids: of rows of two texts, which of them each token belongs to, laid out as `input_ids`; else None.
        teacher_logits: what another model says of each row, (N, K) float32, where one is learned from; else None.
    """

    input_ids: npt.NDArray[np.int32]
    starts: Indices
    labels: Indices
    target_ids: npt.NDArray[np.int32] | None = None
    target_starts: Indices | None = None
    companions: Indices | None = None
    companion_starts: Indices | None = None
    token_type_ids: npt.NDArray[np.int32] | None = None
    teacher_logits: npt.NDArray[np.float32] | None = None

    @classmethod
    def build(
        cls,
        encoded: Sequence[Tokens],
        labels: Sequence[int] | None = None,
        *,
        targets: Sequence[Tokens] | None = None,
        companions: Sequence[Sequence[int]] | None = None,
        types: Sequence[Tokens] | None = None,
    ) -> Examples:
        """Lay token lists end to end."""
        known = np.full(len(encoded), IGNORED) if labels is None else np.asarray(labels)
        target_ids, target_starts = (None, None) if targets is None else _lay_end_to_end(targets)
        built = cls(*_lay_end_to_end(encoded), known.astype(np.int64), target_ids, target_starts)
        if types is not None:
            built = replace(built, token_type_ids=_lay_end_to_end(types)[0])
        if companions is not None:
            rows, starts = _lay_end_to_end(companions)
            built = replace(built, companions=rows.astype(np.int64), companion_starts=starts)
        return built

    @classmethod
    def concatenate(cls, parts: Sequence[Examples]) -> Examples:
        """Rows of several sets, without targets, in order."""
        starts = np.cumsum([0, *np.concatenate([part.lengths for part in parts])])
        ids, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
        return cls(ids, starts, labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Indices:
        """Tokens of each row, (N,)."""
        return np.diff(self.starts)

    @property
    def target_lengths(self) -> Indices:
        """Tokens of each row's target, (N,); zeros where there are none."""
        return np.zeros_like(self.labels) if self.target_starts is None else np.diff(self.target_starts)

    @property
    def sizes(self) -> Indices:
        """What each row counts against a batch's budget, (N,): the longer of its two sides."""
        return np.maximum(self.lengths, self.target_lengths)

    def take(self, rows: Indices) -> Examples:
        """Some of the rows, in that order; without targets, companions and a teacher."""
        starts, lengths = self.starts[rows], self.lengths[rows]
        types = None if self.token_type_ids is None else _take(self.token_type_ids, starts, lengths)
        tokens = _take(self.input_ids, starts, lengths)
        return Examples(tokens, np.concatenate([[0], np.cumsum(lengths)]), self.labels[rows], token_type_ids=types)

    def get_companions(self, row: int) -> Indices:
        """The rows that one row must find in its batch."""
        if self.companions is None or self.companion_starts is None:
            return np.zeros(0, dtype=np.int64)
        return self.companions[self.companion_starts[row] : self.companion_starts[row + 1]]

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        write_file_atomically(path, save({name: array for name, array in arrays.items() if array is not None}))

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
        lengths: tokens of each row, (N,); `Examples.sizes`.
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


def plan_batches_with_companions(examples: Examples, tokens_per_batch: int, *, seed: int, epoch: int) -> list[Indices]:
    """Order one epoch so that every row finds its companions in its batch, each of them once.

    Args:
        examples: rows; those that are companions of others occur only as such.
        tokens_per_batch: at most so many in one step, padding not counted, unless one row's companions alone are more.
        seed, epoch: as for `plan_batches`.

    Returns:
        Row indices of each batch, short rows first.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    lengths, batches = examples.sizes, []
    chosen: set[int] = set()
    tokens = 0
    for row in generator.permutation(_list_leaders(examples, np.arange(len(examples)))).tolist():
        added = {row, *examples.get_companions(row).tolist()} - chosen
        cost = int(lengths[list(added)].sum())
        if chosen and tokens + cost > tokens_per_batch:
            batches.append(chosen)
            chosen, tokens = set(), 0
            added = {row, *examples.get_companions(row).tolist()}
            cost = int(lengths[list(added)].sum())
        chosen, tokens = chosen | added, tokens + cost
    return [_sort_by_length(batch, lengths) for batch in [*batches, *([chosen] if chosen else [])]]


def split_batch(examples: Examples, rows: Indices, parts: int) -> list[Indices]:
    """A batch in parts of about equally many rows, some perhaps none; companions go with each row that needs them."""
    if examples.companions is None:
        return np.array_split(rows, parts)
    shares = np.array_split(_list_leaders(examples, rows), parts)
    wholes = [
        {row for leader in share.tolist() for row in (leader, *examples.get_companions(leader))} for share in shares
    ]
    return [_sort_by_length(whole, examples.sizes) for whole in wholes]


def _list_leaders(examples: Examples, rows: Indices) -> Indices:
    """Those of `rows` that are no other row's companions."""
    return rows[~np.isin(rows, examples.companions)] if examples.companions is not None else rows


def _sort_by_length(rows: set[int], lengths: Indices) -> Indices:
    order = np.array(sorted(rows), dtype=np.int64)
    return order[np.argsort(lengths[order], kind="stable")]


def plan_class_batches(
    labels: Indices, lengths: Indices, tokens_per_batch: int, *, seed: int, epoch: int
) -> list[Indices]:
    """Order one epoch so that each row finds rows of its own class in its batch, for losses that compare rows.

    Every row occurs once. The rows of a class are dealt into groups of about `ROWS_PER_GROUP`, the groups are shuffled,
    and the epoch is cut into batches of about equal size. The order comes from (seed, epoch) as in `plan_batches`.

    Args:
        labels: class of each row, (N,).
        lengths: tokens of each row, (N,).
        tokens_per_batch: aim for one step, padding not counted: the rows of a class differ in length.
        seed, epoch: as for `plan_batches`.

    Returns:
        Row indices of each batch, short rows first.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(len(labels))
    of_class = [order[labels[order] == label] for label in np.unique(labels)]
    groups = [group for rows in of_class for group in np.array_split(rows, max(1, len(rows) // ROWS_PER_GROUP))]
    groups = [groups[i] for i in generator.permutation(len(groups))]
    before = np.cumsum([0, *(int(lengths[group].sum()) for group in groups)])[:-1]  # tokens before each group
    count = max(1, round(int(lengths.sum()) / tokens_per_batch))
    owner = before * count // max(1, int(lengths.sum()))  # the batch that a group begins in
    batches = [np.concatenate([groups[i] for i in np.flatnonzero(owner == batch)]) for batch in np.unique(owner)]
    return [rows[np.argsort(lengths[rows], kind="stable")] for rows in batches]


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
        `input_ids` (B, T) with `attention_mask` (B, T), 1 = real. Packed: `input_ids` (1, total) with `position_ids`
        (1, total), which start again at each row, as Hugging Face's DataCollatorWithFlattening has it. `labels`: (B,),
        or the targets where rows have them, (B, T) padded with -100, packed (1, total). `token_type_ids`, laid out like
        `input_ids`, where rows have them. `teacher_logits`: (B, K), where rows have them.
    """
    lengths = examples.lengths[rows]
    tokens = _take(examples.input_ids, examples.starts[rows], lengths)
    labels: npt.NDArray[np.integer[Any]] = examples.labels[rows]
    if examples.target_ids is not None and examples.target_starts is not None:
        target_lengths = examples.target_lengths[rows]
        targets = _take(examples.target_ids, examples.target_starts[rows], target_lengths)
        labels = targets[None] if pad_token_id is None else _pad(targets, target_lengths, IGNORED)
    arrays: dict[str, npt.NDArray[Any]]
    if pad_token_id is None:
        positions = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        arrays = {"input_ids": tokens[None], "position_ids": positions[None], "labels": labels}
    else:
        mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
        arrays = {"input_ids": _pad(tokens, lengths, pad_token_id), "attention_mask": mask, "labels": labels}
    if examples.token_type_ids is not None:
        types = _take(examples.token_type_ids, examples.starts[rows], lengths)
        arrays["token_type_ids"] = types[None] if pad_token_id is None else _pad(types, lengths, 0)
    batch = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    if examples.teacher_logits is not None:
        batch["teacher_logits"] = torch.from_numpy(examples.teacher_logits[rows])
    return batch


def _lay_end_to_end(rows: Sequence[Tokens]) -> tuple[npt.NDArray[np.int32], Indices]:
    lengths = np.array([len(ids) for ids in rows], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(lengths.sum()))
    return flat, np.concatenate([[0], np.cumsum(lengths)])


def _take(flat: npt.NDArray[np.int32], starts: Indices, lengths: Indices) -> npt.NDArray[np.int32]:
    """The chosen rows, end to end; there may be none."""
    chosen = [flat[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    return np.concatenate([flat[:0], *chosen])


def _pad(tokens: npt.NDArray[np.int32], lengths: Indices, value: int) -> Indices:
    """Rows end to end -> (B, T)."""
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(mask.shape, value, dtype=np.int64)
    padded[mask] = tokens
    return padded


def list_inputs(batch: Batch) -> Batch:
    """What of a batch the model takes: all but what it is to answer."""
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "teacher_logits")}
