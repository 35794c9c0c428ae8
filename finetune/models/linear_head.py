"""A head that is fitted, not trained: logistic regression on what reaches the last layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.errors import RecipeError

# scikit-learn's C, for features of mean length 1; on few rows of BANKING77 as good as 30, and better than 3.
C = 10.0
MAX_ITERATIONS = 100


def find_head(model: nn.Module) -> nn.Linear:
    """The linear layer that gives the logits; of an adapter's copies, the one that is trained.

    Args:
        model: a classifier, also one inside an adapter's wrapper.

    Raises:
        RecipeError: the head is of another kind.
    """
    head = _find_parent(model).get_submodule("classifier")
    linear = [module for module in head.modules() if isinstance(module, nn.Linear) and module.weight.requires_grad]
    # A head of several layers reads more than one vector a row.
    if len(linear) != 1 or any(isinstance(module, nn.Dropout) for module in head.modules()):
        raise RecipeError(
            "train.few_shot: contrastive must have a head of one linear layer, got "
            f"{type(head).__name__}. Set model.architecture: triad."
        )
    return linear[0]


@contextmanager
def without_head(model: nn.Module) -> Iterator[None]:
    """Within the block a model's logits are the features that its head would read, (B, D)."""
    parent = _find_parent(model)
    head = parent.get_submodule("classifier")
    parent.add_module("classifier", nn.Identity())
    try:
        yield
    finally:
        parent.add_module("classifier", head)


def fit_head(head: nn.Linear, features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
    """Set the layer to a multinomial logistic regression with an L2 penalty on its weights.

    The penalty is scikit-learn's at `C`, for features that are divided by their mean length.

    Args:
        head: (D) -> (K), changed in place.
        features: (N, D).
        labels: (N,), each class of [0, K) at least once.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    length = float(np.linalg.norm(features, axis=1).mean())
    model = LogisticRegression(C=C, max_iter=MAX_ITERATIONS, fit_intercept=head.bias is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # later steps hardly move a prediction
        model.fit(features / length, labels)
    weight, bias = torch.from_numpy(model.coef_) / length, torch.from_numpy(model.intercept_)
    if head.out_features == 2:  # scikit-learn gives what the second logit is above the first
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)


def _find_parent(model: nn.Module) -> nn.Module:
    """The module with the attribute `classifier`: Hugging Face's model inside whatever an adapter puts around it."""
    for module in model.modules():
        if "classifier" in dict(module.named_children()):
            return module
    raise RecipeError(
        "train.few_shot: contrastive must have a head called `classifier`, got a model without one. "
        "Set model.architecture: triad."
    )
