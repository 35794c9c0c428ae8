"""AdamW with separate rates for head and base, and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from finetune.recipe.schema import TrainSection

# The second-moment horizon of short fine-tuning runs: 0.999 averages over more steps than many of them have.
BETAS = (0.9, 0.98)
HEAD_RATE_FACTOR = 3.0


def build_optimizer(
    trained: Mapping[str, nn.Parameter],
    head: Sequence[str],
    section: TrainSection,
    rate_factor: Callable[[str], float] = lambda _name: 1.0,
) -> torch.optim.AdamW:
    """Group weights by rate (head or not) and by decay (matrices only, not biases, norms and factors).

    Args:
        trained: name -> weight.
        head: names of the head's modules.
        section: the recipe's `train`.
        rate_factor: name of a weight beside the head -> its rate as a multiple of `learning_rate`.
    """
    head_rate = section.head_learning_rate or HEAD_RATE_FACTOR * section.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        in_head = is_in_head(name, head)
        rate = head_rate if in_head else rate_factor(name) * section.learning_rate
        # Outside of a head a matrix of one column is a vector: (IA)^3's factors start at 1 and must not be drawn to 0.
        is_matrix = parameter.ndim > 1 and (in_head or parameter.numel() > max(parameter.shape))
        decay = section.weight_decay if is_matrix else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        betas=BETAS,
        fused=True,
    )


def is_in_head(parameter: str, head: Sequence[str]) -> bool:
    """Whether a parameter belongs to one of the head's modules, also under PEFT's longer names."""
    return any(f".{module}." in f".{parameter}" for module in head)


def compute_rate_factor(step: int, total: int, warmup_ratio: float, schedule: str) -> float:
    """Learning rate at a step as a share of its peak.

    Args:
        step: 0-based, below `total`.
        total: planned optimizer steps.
        warmup_ratio: share of `total` in which the factor climbs linearly to 1.
        schedule: linear | cosine | constant.
    """
    warmup = max(1, round(warmup_ratio * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's peak rate; returns the largest rate now in force."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    return max(float(group["lr"]) for group in optimizer.param_groups)
