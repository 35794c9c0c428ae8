"""Learning from few rows in two phases: features in which classes lie apart, then a head that is fitted to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from finetune.data.batches import Batch, Examples, list_inputs
from finetune.errors import DataError, RecipeError
from finetune.models.linear_head import find_head, fit_head, without_head
from finetune.models.prediction import compute_logits
from finetune.tasks.task import Outputs

TEMPERATURE = 0.1  # the paper's


def compute_contrastive_losses(
    features: torch.Tensor, labels: torch.Tensor, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """Supervised contrastive loss of each row, arXiv:2004.11362, equation 2.

    The other rows of a batch compete for being the row's neighbour, by softmax of cosine / temperature. The loss is the
    mean of -log of that share over the rows of the same class.

    Args:
        features: (B, D), of any length.
        labels: (B,).
        temperature: above 0.

    Returns:
        (B,); 0 for a row without another of its class.
    """
    units = nn.functional.normalize(features.float(), dim=-1)
    logits = units @ units.T / temperature  # (B, B)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    shares = logits.masked_fill(itself, -torch.inf).log_softmax(dim=1)
    same = (labels[:, None] == labels) & ~itself
    return -shares.masked_fill(~same, 0.0).sum(1) / same.sum(1).clamp(min=1)


def check_rows_per_class(examples: Examples, labels: Sequence[str]) -> None:
    """Every class needs a pair.

    Raises:
        DataError: a class has one row only.
    """
    counts = np.bincount(examples.labels, minlength=len(labels))
    if alone := [label for label, count in zip(labels, counts, strict=True) if count < 2]:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        raise DataError(
            "train: every class must have at least 2 rows for train.few_shot: contrastive, got 1 of "
            f"{', '.join(map(repr, alone[:3]))}{more}. Add rows, or set train.few_shot: none."
        )


class ContrastivePhase:
    """What the loop computes while the base is tuned by a contrastive loss, and the head that comes after it.

    The head takes no part in the loss: it is frozen, in no checkpoint, and fitted to the features of the train rows
    whenever validation is scored. So validation says what the model would be worth if training ended there.

    Args:
        model: with its adapter; its head is frozen here.
        train: encoded rows; each class occurs.
        pad_token_id: as for `compute_logits`.

    Raises:
        RecipeError: a head of another kind than one linear layer, or nothing to train beside it.
    """

    def __init__(self, model: nn.Module, train: Examples, pad_token_id: int | None) -> None:
        self._head = find_head(model).requires_grad_(False)
        self._train, self._pad_token_id = train, pad_token_id
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise RecipeError(
                "adapter.method: must change the base when train.few_shot is contrastive, got nothing to train beside "
                "the head. Set adapter.method: lora."
            )

    def compute_losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The contrastive loss of each row, (B,)."""
        with without_head(model):
            features = model(**list_inputs(batch)).logits
        return compute_contrastive_losses(features, batch["labels"])

    def compute_outputs(
        self,
        model: nn.Module,
        examples: Examples,
        pad_token_id: int | None,
        *,
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> Outputs:
        """Logits (N, K) with the head that fits the model as it is now; for the other arguments `compute_logits`."""
        self.fit_head(model)
        return compute_logits(model, examples, pad_token_id, share=share, advance=advance)

    def fit_head(self, model: nn.Module) -> None:
        """Fit the head to the train rows; the same model gives the same head."""
        with without_head(model):
            features = compute_logits(model, self._train, self._pad_token_id)
        fit_head(self._head, features, self._train.labels)
