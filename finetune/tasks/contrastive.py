"""Learning from few rows in two phases: features in which classes lie apart, then a head that is fitted to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from finetune.adapters.attach import list_trained
from finetune.data.batches import Batch, Examples, list_inputs
from finetune.errors import DataError
from finetune.models.linear_head import find_head, fit_head, without_head
from finetune.models.prediction import compute_logits
from finetune.tasks.task import Outputs

TEMPERATURE = 0.1  # the paper's
# Few rows pull the base away from what it knew. Halfway back it tells classes apart better than at either end
# (docs/decisions/0018-few-shot-halfway-back.md).
START_SHARE = 0.5


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

    The model to be used is not the tuned one but the mean of its weights and those that it started from
    (arXiv:2109.01903), and its head takes no part in the loss: it is frozen, in no checkpoint, and fitted to that
    model's features of the train rows. Both happen whenever validation is scored, which so says what the model would be
    worth if training ended there.

    Args:
        model: with its adapter, as it starts, also where a run goes on; its head is frozen here.
        train: encoded rows; each class occurs.
        pad_token_id: as for `compute_logits`.

    Raises:
        RecipeError: a head of another kind than one linear layer.
    """

    def __init__(self, model: nn.Module, train: Examples, pad_token_id: int | None) -> None:
        self._head = find_head(model).requires_grad_(False)
        self._trained = list_trained(model)
        self._start = [parameter.detach().clone() for parameter in self._trained.values()]
        self._train, self._pad_token_id = train, pad_token_id

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
        """Logits (N, K) of the model that would be the result now; for the arguments see `compute_logits`."""
        tuned = [parameter.detach().clone() for parameter in self._trained.values()]
        self.finish(model)
        logits = compute_logits(model, examples, pad_token_id, share=share, advance=advance)
        with torch.no_grad():
            for parameter, weight in zip(self._trained.values(), tuned, strict=True):
                parameter.copy_(weight)
        return logits

    def finish(self, model: nn.Module) -> None:
        """Make the tuned model the one to be used: draw its weights back, and fit its head to the train rows."""
        with torch.no_grad():
            for parameter, start in zip(self._trained.values(), self._start, strict=True):
                parameter.lerp_(start.to(parameter.device), START_SHARE)
        with without_head(model):
            features = compute_logits(model, self._train, self._pad_token_id)
        fit_head(self._head, features, self._train.labels)
