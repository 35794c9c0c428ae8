"""The moving average of the trained weights, which scores better than the weights of any single step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from finetune.training.rule import StepRule


class WeightAverage:
    """Exponential moving average: average = d * average + (1 - d) * weights after each step.

    Small batches make the weights jitter around where they are heading; their average does not (Polyak and Juditsky
    1992, "Acceleration of stochastic approximation by averaging"). d climbs as (1 + step) / (10 + step) up to `decay`,
    so that a short run is not held back by its start.

    Args:
        trained: name -> weight; the average starts from their values.
        decay: largest d in (0, 1); None keeps no average, and every method does nothing.
        rule: what the average is held to once it is in the model.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float | None, rule: StepRule | None = None) -> None:
        self._trained = trained
        self._decay = decay
        self._rule = rule
        self.tensors = {} if decay is None else {name: weight.detach().clone() for name, weight in trained.items()}

    def update(self, step: int) -> None:
        """Take in the weights after an optimizer step, counted from 1."""
        if self._decay is not None:
            decay = min(self._decay, (1 + step) / (10 + step))
            weights = [weight.detach() for weight in self._trained.values()]
            update: Callable[..., None] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            update(list(self.tensors.values()), weights, step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model holds the average."""
        self._swap()
        self._constrain()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def keep(self) -> None:
        """Put the average into the model for good."""
        for name, average in self.tensors.items():
            self._trained[name].copy_(average)
        self._constrain()

    def _constrain(self) -> None:
        if self._rule is not None and self.tensors:
            self._rule.constrain()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.tensors.items():
            weight = self._trained[name]
            self.tensors[name] = weight.clone()
            weight.copy_(average)
