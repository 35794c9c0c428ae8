"""Losses of a recommender: how far the item that came next lies behind the others.

Shapes: N targets, I items, K negatives, D width. Each loss takes states (N, D), the number of the item that came next
at each (N,), the vectors of all items (I, D) and their biases (I,) or None, and returns a loss for each target (N,), in
float32. A bias of minus infinity leaves an item out, such as one that training must not see.

    full_softmax     all items compete; best where their logits, N x I, are affordable
    sampled_softmax  K drawn items stand for all, each counted as often as it was unlikely to be drawn
    gbce             the target against each of K drawn items, as if they were all
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, linear, logsigmoid

# Logits that are computed at once. On a CPU they stay near its cache: with 10,000 items, 4,096 targets and D = 64 on
# one core a gradient takes two thirds of the time that one matrix of all logits takes.
MOST_LOGITS = {"cpu": 2**22}
MOST_LOGITS_ELSEWHERE = 2**26


def full_softmax(
    hidden: torch.Tensor, targets: torch.Tensor, item_vectors: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy over all items: -s_target + log sum_i exp(s_i). Its logits, N x I, are never all in memory.

    Args:
        hidden, targets, item_vectors, bias: as above.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        apply: Callable[..., torch.Tensor] = _FullSoftmax.apply
        return apply(hidden.to(dtype), targets, item_vectors.to(dtype), bias)


class _FullSoftmax(torch.autograd.Function):
    """Some targets after another, forwards and again backwards: no logits are kept in between."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, vectors: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        sums = torch.cat([torch.logsumexp(_score(hidden[rows], vectors, bias), 1) for rows in _split(hidden, vectors)])
        ctx.save_for_backward(hidden, targets, vectors, bias)
        return sums - _score_targets(hidden, targets, vectors, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, targets, vectors, bias = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_vectors = torch.zeros_like(vectors, dtype=torch.float32)
        to_bias = None if bias is None else torch.zeros_like(bias)
        for rows in _split(hidden, vectors):
            # Of a logit the loss's derivative is its probability, less 1 for the target.
            slopes = torch.softmax(_score(hidden[rows], vectors, bias), 1)
            slopes[torch.arange(len(slopes), device=slopes.device), targets[rows]] -= 1
            if to_bias is not None:
                to_bias += gradient[rows] @ slopes
            slopes, weights = slopes.to(hidden.dtype), gradient[rows, None].to(hidden.dtype)
            to_hidden[rows] = slopes @ vectors * weights
            to_vectors += slopes.T @ (hidden[rows] * weights)
        return to_hidden, None, to_vectors.to(vectors.dtype), to_bias


def _split(hidden: torch.Tensor, vectors: torch.Tensor) -> list[slice]:
    """Targets whose logits are computed at once."""
    size = max(1, MOST_LOGITS.get(hidden.device.type, MOST_LOGITS_ELSEWHERE) // len(vectors))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def sampled_softmax(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    item_vectors: torch.Tensor,
    negatives: torch.Tensor,
    log_counts: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy with a sum over drawn items in place of all (Bengio and Senecal 2008, importance sampling).

    -s_target + log(exp(s_target) + sum_j exp(s_j - log c_j)) over the negatives j that are not the target. The sum's
    expectation is that over all other items. The target is not drawn, so nothing is taken off its score, which the
    usual correction does (arXiv:2507.09331). With each item once, and c = 1, this is `full_softmax`.

    Args:
        hidden, targets, item_vectors, bias: as above.
        negatives: items (K,) that all targets share; an item may come more than once.
        log_counts: (K,), the logarithm of c_j, how often the item is expected among them: K q_j for K independent draws
            with probability q_j. `draw_negatives` returns both.
    """
    drawn = _score(hidden, item_vectors[negatives], None if bias is None else bias[negatives]) - log_counts
    drawn = drawn.masked_fill(negatives == targets[:, None], -torch.inf)
    wanted = _score_targets(hidden, targets, item_vectors, bias)
    return torch.logsumexp(torch.cat([wanted[:, None], drawn], dim=1), dim=1) - wanted


def gbce(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    item_vectors: torch.Tensor,
    negatives: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    t: float = 0.75,
) -> torch.Tensor:
    """Generalised binary cross-entropy (arXiv:2308.07192): few negatives without overconfidence.

    -(beta log sigmoid(s_target) + sum_j log(1 - sigmoid(s_j))) / (k + 1), where beta = alpha (t (1 - 1 / alpha) +
    1 / alpha) = 1 - t (1 - alpha) and alpha = k / (I - 1), the share of the other items that was drawn.

    The article draws negatives for each target. Where targets share them, k counts those that are not the target.

    Args:
        hidden, targets, item_vectors, bias: as above.
        negatives: items (K,) that all targets share, or (N, K), drawn uniformly.
        t: in [0, 1]. 0 is binary cross-entropy, as in SASRec; 1 gives probabilities that are calibrated.

    Raises:
        ValueError: t out of range.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t must lie in 0 to 1, got {t}.")
    wanted = _score_targets(hidden, targets, item_vectors, bias)
    if negatives.ndim == 1:
        drawn = _score(hidden, item_vectors[negatives], None if bias is None else bias[negatives])
    else:
        drawn = torch.einsum("nd,nkd->nk", hidden, embedding(negatives, item_vectors)).float()
        drawn = drawn if bias is None else drawn + bias[negatives]
    others = negatives != targets[:, None]  # (N, K)
    count = others.sum(1)
    beta = 1 - t * (1 - count / max(1, len(item_vectors) - 1))
    against = (logsigmoid(-drawn) * others).sum(1)
    return -(beta * logsigmoid(wanted) + against) / (count + 1)


def draw_negatives(
    weights: torch.Tensor, count: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw items independently, for all targets of a batch.

    Args:
        weights: (I,), at least 0: ones for uniform, or how often each item occurs, to some power. 0 leaves an item out.
        count: K.
        generator: what draws.

    Returns:
        Items (K,) and, for `sampled_softmax`, the logarithm of how often each is expected among them, (K,).
    """
    chances = weights.double() / weights.sum()
    negatives = torch.multinomial(chances, count, replacement=True, generator=generator)
    return negatives, (count * chances[negatives]).log().float()


def _score(hidden: torch.Tensor, vectors: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(N, D) and (K, D) -> (N, K)."""
    scores = linear(hidden, vectors).float()
    return scores if bias is None else scores + bias


def _score_targets(
    hidden: torch.Tensor, targets: torch.Tensor, item_vectors: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(N,)."""
    scores = (hidden * embedding(targets, item_vectors)).sum(1).float()
    return scores if bias is None else scores + bias[targets]
