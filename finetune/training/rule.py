"""What may be done to the weights besides the optimizer's steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class StepRule(Protocol):
    """Changes trained weights after each step, such as by setting some of them to zero; its state is resumed."""

    def after_step(self, step: int) -> None:
        """Look at the weights and their gradients after an optimizer step, counted from 1, and change weights."""

    def constrain(self) -> None:
        """Hold what the model has now to what the rule has decided so far: called on an average of the weights too."""

    def export_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold."""

    def import_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `export_state`; the weights are there already."""
