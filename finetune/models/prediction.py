"""Rows in, logits out: batches by length, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import Examples, Indices, collate, list_inputs, plan_prediction

TOKENS_PER_BATCH = 4096


@torch.no_grad()
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
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    found: list[tuple[Indices, npt.NDArray[np.float32]]] = []
    for rows in _take_share(plan_prediction(examples.lengths, TOKENS_PER_BATCH), share):
        inputs = list_inputs(collate(examples, rows, pad_token_id))
        output = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        found.append((rows, output.logits.float().cpu().numpy()))
        advance(len(rows))
    model.train(was_training)
    width = found[0][1].shape[1] if found else int(model.config.num_labels)  # type: ignore[union-attr, arg-type]  # a transformers config
    logits = np.zeros((len(examples), width), dtype=np.float32)
    for rows, values in found:
        logits[rows] = values
    return logits


def _take_share(batches: Sequence[Indices], share: tuple[int, int]) -> Sequence[Indices]:
    rank, processes = share
    return batches[rank::processes]
