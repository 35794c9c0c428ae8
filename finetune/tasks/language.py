"""What tasks that are scored by token share: losses, likelihoods, and what the report shows of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import IGNORED, Batch, Examples, Indices, Tokens, list_inputs
from finetune.evaluation.corpus_metrics import CORPUS_METRICS, compute_corpus_metric
from finetune.models.base import BaseModel, load_tokenizer
from finetune.models.prediction import compute_by_row, scatter_rows
from finetune.models.tokenizer import train_tokenizer
from finetune.recipe.reference import SCRATCH_BASE
from finetune.recipe.schema import ModelSection
from finetune.tasks.task import Outputs

LIKELIHOOD_WIDTH = 4
"""Nats, scored tokens, right tokens and bytes of a row."""


def build_tokenizer(
    base: BaseModel,
    texts: Sequence[str],
    section: ModelSection,
    *,
    appends_end: bool,
    pads_with_end: bool = False,
    reads_special: bool = False,
) -> Any:
    """The base's tokenizer, or one that is learned from texts where the base is `scratch`."""
    if base.reference != SCRATCH_BASE:
        return load_tokenizer(base, pads_with_end=pads_with_end)
    scratch = section.scratch
    return train_tokenizer(
        texts,
        scratch.tokenizer,
        scratch.vocab_size,
        section.max_length,
        appends_end=appends_end,
        reads_special=reads_special,
    )


def compute_token_losses(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of each token: logits (..., V), labels (...) -> (...); 0 where the label is -100."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )
    return losses.view_as(labels)


def number_rows(batch: Batch) -> torch.Tensor:
    """Number of the row that each token belongs to, laid out like the batch's labels, (B, T) or (1, total)."""
    labels = batch["labels"]
    if "position_ids" in batch:
        return (batch["position_ids"] == 0).cumsum(1) - 1
    return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)


def sum_by_row(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum a value of each token, (B, T), or (1, total) of packed rows, over rows: (B,)."""
    if "position_ids" not in batch:
        return values.sum(dim=1)
    rows = number_rows(batch)[0]
    return values.new_zeros(int(rows[-1]) + 1).index_add_(0, rows, values[0])


def compute_causal_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of each token, (B, T, V), without those of virtual tokens in front of the rows."""
    logits: torch.Tensor = model(**list_inputs(batch)).logits
    return logits[:, -batch["labels"].shape[1] :]


def compute_mean_losses(
    logits: torch.Tensor, labels: torch.Tensor, batch: Batch, label_smoothing: float
) -> torch.Tensor:
    """Mean loss of each row over its scored tokens, (B,)."""
    losses = sum_by_row(compute_token_losses(logits, labels, label_smoothing), batch)
    return losses / sum_by_row((labels != IGNORED).float(), batch).clamp(min=1)


def measure_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Score tokens: logits (..., V), labels (...), -100 where nothing is scored.

    Returns:
        (4, ...): nats, whether it is scored, whether the likeliest guess is right, and 0, where `count_bytes` goes.
    """
    scored = labels != IGNORED
    right = (logits.argmax(-1) == labels) & scored
    losses = compute_token_losses(logits, labels)
    return torch.stack([losses, scored.to(losses), right.to(losses), torch.zeros_like(losses)])


def compute_likelihoods(
    model: nn.Module,
    examples: Examples,
    pad_token_id: int | None,
    measure: Callable[[Batch, Indices], torch.Tensor],
    *,
    share: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda _rows: None,
) -> Outputs:
    """Score each row's tokens.

    Args:
        model, examples, pad_token_id, share, advance: as in `compute_logits`.
        measure: (batch, numbers of its rows) -> what `measure_tokens` gives, laid out like the batch's labels.

    Returns:
        (N, 4): sums over each row's tokens.
    """

    def compute(batch: Batch, rows: Indices) -> torch.Tensor:
        return torch.stack([sum_by_row(values, batch) for values in measure(batch, rows)], dim=1)

    found = compute_by_row(model, examples, pad_token_id, compute, share=share, advance=advance)
    return scatter_rows(found, len(examples), LIKELIHOOD_WIDTH)


def compute_metrics(outputs: Outputs, names: Sequence[str]) -> dict[str, float]:
    """Loss, and those of the named metrics that likelihoods give."""
    known = [name for name in ("loss", *names) if CORPUS_METRICS[name].needs == "likelihood"]
    values = {name: compute_corpus_metric(name, outputs.astype(np.float64)) for name in known}
    return {name: value for name, value in values.items() if value is not None}  # bytes are counted at the end


def count_target_tokens(examples: Examples) -> npt.NDArray[np.float32]:
    """Weight of each row in the loss, (N,): its scored tokens, so that a batch's loss is the mean over tokens."""
    return np.array([len(ids) for ids in list_scored(examples)], dtype=np.float32)


def count_bytes(tokenizer: Any, rows: Sequence[Tokens]) -> npt.NDArray[np.float64]:
    """Bytes of UTF-8 that each row of tokens stands for, (N,)."""
    texts = tokenizer.batch_decode([list(ids) for ids in rows], skip_special_tokens=True)
    return np.array([len(text.encode("utf-8", errors="replace")) for text in texts], dtype=np.float64)


def list_targets(examples: Examples) -> list[npt.NDArray[np.int32]]:
    """The targets of each row."""
    if examples.target_ids is None or examples.target_starts is None:
        return []
    return list_tokens(examples.target_ids, examples.target_starts)


def list_scored(examples: Examples) -> list[npt.NDArray[np.int32]]:
    """The targets of each row that are scored."""
    return [ids[ids != IGNORED] for ids in list_targets(examples)]


def list_tokens(flat: npt.NDArray[np.int32], starts: Indices) -> list[npt.NDArray[np.int32]]:
    """Rows that were laid end to end, as a list."""
    return np.split(flat, starts[1:-1])


def spread_rows(rows: Sequence[object], count: int) -> list[int]:
    """Numbers of `count` rows from all over a split."""
    if not rows or not count:
        return []
    return [int(place) for place in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round())]
