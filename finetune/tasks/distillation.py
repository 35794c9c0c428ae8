"""Learn from another model's scores, beside the labels (arXiv:1503.02531)."""

from __future__ import annotations

import torch
from torch import nn

from finetune.data.batches import Batch, list_inputs
from finetune.recipe.schema import DistillSection
from finetune.tasks.text_classification import TextClassification


def compute_distilled_losses(
    task: TextClassification, section: DistillSection, model: nn.Module, batch: Batch, label_smoothing: float
) -> torch.Tensor:
    """weight * T^2 * KL(teacher || model) at temperature T, and for the rest the task's own loss; of each row, (B,).

    The gradient of the divergence shrinks with T^2: the factor keeps both parts in proportion (section 2 there).

    Args:
        task: whose loss the labels have.
        section: temperature and weight.
        model: gives logits (B, K).
        batch: with `teacher_logits` (B, K).
        label_smoothing: of the labels' part.
    """
    logits = model(**list_inputs(batch)).logits.float()
    wanted = (batch["teacher_logits"].float() / section.temperature).log_softmax(-1)
    given = (logits / section.temperature).log_softmax(-1)
    divergence = nn.functional.kl_div(given, wanted, reduction="none", log_target=True).sum(-1)
    hard = task.compute_loss(logits, batch["labels"], label_smoothing)
    return section.weight * section.temperature**2 * divergence + (1 - section.weight) * hard
