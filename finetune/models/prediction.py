"""Rows in, logits out: batches by length, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import Batch, Examples, Indices, collate, list_inputs, plan_prediction

TOKENS_PER_BATCH = 4096


def get_budget(model: nn.Module) -> int:
    """Tokens of a batch of predictions: what the model asks for, or so many as most do well with."""
    return int(getattr(model, "tokens_per_batch", TOKENS_PER_BATCH))


@torch.inference_mode()
def compute_by_row(
    model: nn.Module,
    examples: Examples,
    pad_token_id: int | None,
    compute: Callable[[Batch, Indices], torch.Tensor],
    *,
    share: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda _rows: None,
) -> list[tuple[Indices, npt.NDArray[np.float32]]]:
    """Run a model in evaluation mode over encoded rows, longest first.

    Args:
        model: left in the mode that it came in.
        examples, pad_token_id, share, advance: as in `compute_logits`.
        compute: (batch on the model's device, numbers of its rows) -> something of each row, (B, K).

    Returns:
        Row numbers and values of each batch.
    """
    was_training, device = model.training, next(model.parameters()).device
    if was_training:  # walking through all modules takes longer than a layer of one short row
        model.eval()
    found: list[tuple[Indices, npt.NDArray[np.float32]]] = []
    for rows in _take_share(plan_prediction(examples.sizes, get_budget(model)), share):
        batch = {name: tensor.to(device) for name, tensor in collate(examples, rows, pad_token_id).items()}
        found.append((rows, compute(batch, rows).float().cpu().numpy()))
        advance(len(rows))
    if was_training:
        model.train()
    return found


def scatter_rows(
    found: Sequence[tuple[Indices, npt.NDArray[np.float32]]], n_rows: int, width: int
) -> npt.NDArray[np.float32]:
    """What `compute_by_row` found, in the order of the rows, (N, K); zeros where nothing was computed."""
    values = np.zeros((n_rows, width), dtype=np.float32)
    for rows, part in found:
        values[rows] = part
    return values


def compute_logits(
    model: nn.Module,
    examples: Examples,
    pad_token_id: int | None,
    *,
    share: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda _rows: None,
) -> npt.NDArray[np.float32]:
    """Score encoded rows.

    Args:
        model: anything with `logits` (B, K) in its output; left in the mode that it came in.
        examples: N rows.
        pad_token_id: the tokenizer's; None for a model that takes packed rows.
        share: (rank, processes): this process scores every n-th batch and leaves zeros elsewhere, so that the sum over
            processes is the whole.
        advance: called with the number of rows after each batch.

    Returns:
        (N, K) float32, in the order of `examples`.
    """
    found = compute_by_row(
        model,
        examples,
        pad_token_id,
        lambda batch, _rows: model(**list_inputs(batch)).logits,
        share=share,
        advance=advance,
    )
    width = found[0][1].shape[1] if found else int(model.config.num_labels)  # type: ignore[union-attr, arg-type]  # a transformers config
    return scatter_rows(found, len(examples), width)


def _take_share(batches: Sequence[Indices], share: tuple[int, int]) -> Sequence[Indices]:
    rank, processes = share
    return batches[rank::processes]
