"""Sentence embeddings of a frozen base, for the `frozen_logreg` baseline."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from finetune.data.batches import Examples, collate, plan_prediction
from finetune.models.base import BaseModel
from finetune.models.classifier import choose_native_attention
from finetune.models.quiet import quiet_transformers

TOKENS_PER_BATCH = 4096


@torch.inference_mode()
def compute_embeddings(base: BaseModel, parts: list[Examples], pad_token_id: int) -> list[npt.NDArray[np.float32]]:
    """Mean over the real tokens of the last hidden state, L2-normalised.

    Returns:
        One (N, D) array for each part.
    """
    from transformers import AutoModel

    with quiet_transformers():
        model = AutoModel.from_pretrained(
            base.folder, attn_implementation=choose_native_attention(), dtype=torch.float32, use_safetensors=True
        )
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return [_embed(model, examples, pad_token_id) for examples in parts]


def _embed(model: torch.nn.Module, examples: Examples, pad_token_id: int) -> npt.NDArray[np.float32]:
    width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]  # a transformers config
    features = np.zeros((len(examples), width), dtype=np.float32)
    device = next(model.parameters()).device
    for rows in plan_prediction(examples.lengths, TOKENS_PER_BATCH):
        batch = collate(examples, rows, pad_token_id)
        mask = batch["attention_mask"].to(device)
        hidden = model(input_ids=batch["input_ids"].to(device), attention_mask=mask).last_hidden_state  # (B, T, D)
        weights = mask[..., None].float()
        pooled = (hidden * weights).sum(1) / weights.sum(1)  # (B, D)
        features[rows] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
    return features
