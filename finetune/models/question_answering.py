"""Models that point at an answer: Triad or the base's own class, and the likeliest span that their logits say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.data.batches import IGNORED, Batch, list_inputs
from finetune.errors import RecipeError
from finetune.models.base import BaseModel, load_config
from finetune.models.classifier import ModelClass, build_shape, load_saved, load_weights, set_dropout
from finetune.recipe.schema import ModelSection

ANSWERER = ModelClass(
    "TriadForQuestionAnswering", "AutoModelForQuestionAnswering", "a model that points at an answer in a passage"
)


def build_answerer_config(base: BaseModel, section: ModelSection) -> Any:
    """The base's configuration, as Triad's where the recipe says so, with the recipe's dropout.

    Raises:
        ModelError: a family that Triad has no form of.
        RecipeError: a base that is no encoder.
    """
    config = load_config(base, num_labels=2)  # a start and an end
    if section.architecture == "triad":
        from finetune.models.triad.conversion import convert_config

        config = convert_config(config)
    if getattr(config, "shape", "encoder") != "encoder" or config.is_encoder_decoder:
        raise RecipeError(
            f"model.base: question_answering needs an encoder, which sees the passage on both sides of a token, got "
            f"{base.reference} ({config.model_type}). Name another base."
        )
    set_dropout(config, section.dropout)
    return config


def build_answerer(base: BaseModel, section: ModelSection, *, seed: int) -> nn.Module:
    """Load the base with a new head, seeded, in float32; what it raises: see `build_answerer_config`."""
    torch.manual_seed(seed)
    return load_weights(base.folder, build_answerer_config(base, section), ANSWERER)


def build_answerer_shape(base: BaseModel, section: ModelSection) -> nn.Module:
    """The same on the meta device: shapes without weights, for `finetune check`."""
    return build_shape(build_answerer_config(base, section), ANSWERER)


def load_saved_answerer(folder: Path, base: BaseModel | None) -> nn.Module:
    """A model that was saved whole; with `base`, that base in the shape that the folder's adapter needs."""
    return load_saved(folder, base, ANSWERER)


def compute_span_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of each token of a row being the first, and the last, of the answer.

    Returns:
        Two of (B, T) in float32, also where the batch is packed; -inf behind a row's end.
    """
    outputs = model(**list_inputs(batch))
    starts, ends = (_lay_out(logits.float(), batch) for logits in (outputs.start_logits, outputs.end_logits))
    return starts, ends


def _lay_out(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    if "position_ids" not in batch:
        real = batch["attention_mask"]
        # Without those of virtual tokens in front of the rows.
        return logits[:, -real.shape[1] :].masked_fill(real == 0, -torch.inf)
    positions = batch["position_ids"][0]  # (total,)
    rows = (positions == 0).cumsum(0) - 1
    padded = logits.new_full((int(rows[-1]) + 1, int(positions.max()) + 1), -torch.inf)
    return padded.index_put((rows, positions), logits[0])


def compute_span_losses(
    starts: torch.Tensor, ends: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Mean cross-entropy of the first and the last token of each row's answer.

    Args:
        starts, ends: logits, (B, T), -inf behind a row's end.
        targets: first and last token, (B, 2); -100 for a row that says nothing.
        label_smoothing: share of the target spread over all tokens of the row.

    Returns:
        (B,); 0 for a row that says nothing.
    """
    parts = []
    for logits, places in ((starts, targets[:, 0]), (ends, targets[:, 1])):
        logs = logits.log_softmax(dim=1)
        losses = nn.functional.nll_loss(logs, places, reduction="none", ignore_index=IGNORED)
        if label_smoothing:
            real = logits > -torch.inf
            spread = -logs.masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)
            losses = (1 - label_smoothing) * losses + label_smoothing * spread * (places != IGNORED)
        parts.append(losses)
    return (parts[0] + parts[1]) / 2


def find_best_spans(
    starts: torch.Tensor, ends: torch.Tensor, parts: torch.Tensor, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The span of each row with the largest sum of its first token's start logit and its last token's end logit.

    Args:
        starts, ends: logits, (B, T).
        parts: first and last token between which spans may lie, (B, 2).
        max_tokens: most tokens of a span.

    Returns:
        Sum, first and last token of each row's span, (B,) each; -inf where there is none.
    """
    places = torch.arange(starts.shape[1], device=starts.device)
    allowed = (places >= parts[:, :1]) & (places <= parts[:, 1:])  # (B, T)
    starts, ends = starts.masked_fill(~allowed, -torch.inf), ends.masked_fill(~allowed, -torch.inf)
    best = torch.full_like(starts[:, 0], -torch.inf)
    first, last = torch.zeros_like(parts[:, 0]), torch.zeros_like(parts[:, 0])
    for extra in range(min(max_tokens, starts.shape[1])):  # tokens behind the first
        sums, place = (starts[:, : starts.shape[1] - extra] + ends[:, extra:]).max(dim=1)
        better = sums > best
        best = torch.where(better, sums, best)
        first, last = torch.where(better, place, first), torch.where(better, place + extra, last)
    return best, first, last
