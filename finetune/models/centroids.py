"""Start a classification head from what the base already knows: the mean features of each class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune.data.batches import Examples
from finetune.models.prediction import compute_logits

# Logits start as SCALE times a cosine: enough to tell classes apart, too little to be sure of any.
SCALE = 16.0


@torch.no_grad()
def start_at_centroids(model: nn.Module, examples: Examples, pad_token_id: int | None) -> bool:
    """Set the last linear layer so that a row's first guess is the class whose centroid is nearest by cosine.

    Features and centroids are taken relative to the mean of all rows. A random head would send noise through the base
    in the first steps; this one sends what is still missing. It is the imprinting of arXiv:1712.07136, with a bias.

    Args:
        model: on any device; its last linear layer, (D) -> (K), is changed in place: `classifier`, or what the model
            names as its `layer`.
        examples: training rows, labels in [0, K).
        pad_token_id: as for `compute_logits`.

    Returns:
        False, with nothing changed, where the model has no such layer.
    """
    layer = getattr(model, "layer", "classifier")
    classifier: Any = dict(model.named_modules()).get(layer)
    if not isinstance(classifier, nn.Linear):
        return False
    features = _compute_features(model, layer, examples, pad_token_id)  # (N, D)
    labels = torch.from_numpy(examples.labels)
    center = features.mean(0)
    features = features - center
    centroids = torch.zeros(classifier.out_features, features.shape[1]).index_add_(0, labels, features)  # (K, D)
    weight = SCALE / features.norm(dim=1).mean() * nn.functional.normalize(centroids, dim=1)
    classifier.weight.copy_(weight)
    classifier.bias.copy_(-weight @ center)
    return True


def _compute_features(model: nn.Module, layer: str, examples: Examples, pad_token_id: int | None) -> torch.Tensor:
    """What reaches the last layer: with the identity in its place, a model's logits are its features."""
    classifier: Any = model.get_submodule(layer)
    model.set_submodule(layer, nn.Identity())
    try:
        logits = compute_logits(model, examples, pad_token_id)
    finally:
        model.set_submodule(layer, classifier)
    return torch.from_numpy(logits).reshape(len(examples), classifier.in_features)
