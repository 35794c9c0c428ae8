"""Losses of a recommender: how far the item that came next lies behind the others.

Shapes: N targets, I items, K negatives, D width. Each loss takes states (N, D), the number of the item that came next
at each (N,), the vectors of all items (I, D) and their biases (I,) or None, and returns a loss for each target (N,), in
float32. A bias of minus infinity leaves an item out, such as one that training must not see.

    full_softmax     all items compete; best where their logits, N x I, are affordable
    sampled_softmax  K drawn items stand for all, each counted as often as it was unlikely to be drawn
    gbce             the target against each of K drawn items, as if they were all
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding, logsigmoid
from torch.utils.checkpoint import checkpoint

# Logits that are kept at once, 256 MiB in float32. More are computed in parts, and again on the way back.
MOST_LOGITS = 2**26


def full_softmax(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    item_vectors: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    most_logits: int = MOST_LOGITS,
) -> torch.Tensor:
    """Cross-entropy over all items: -s_target + log sum_i exp(s_i).

    Args:
        hidden, targets, item_vectors, bias: as above.
        most_logits: above so many, N x I, memory is bounded by computing each part twice.
    """
    rows = max(1, most_logits // len(item_vectors))
    if len(hidden) <= rows:
        return _compute_cross_entropy(hidden, targets, item_vectors, bias)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat(
        [
            checkpoint(_compute_cross_entropy, *part, item_vectors, bias, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
    )


def _compute_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, item_vectors: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return cross_entropy(_score(hidden, item_vectors, bias), targets, reduction="none")


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
    return nn.functional.linear(hidden, vectors, bias).float()


def _score_targets(
    hidden: torch.Tensor, targets: torch.Tensor, item_vectors: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(N,)."""
    scores = (hidden * embedding(targets, item_vectors)).sum(1).float()
    return scores if bias is None else scores + bias[targets]
