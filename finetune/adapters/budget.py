"""What a method does while the loop trains: AdaLoRA's budget and penalty, LoRA+'s rates, EVA's start."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from finetune.data.batches import Batch, Examples, collate, plan_batches
from finetune.errors import RecipeError
from finetune.recipe.schema import AdapterSection

SCORES = ("exp_avg_ipt", "exp_avg_unc")
# EVA goes over batches of so many tokens until the directions of the states stand still, or gives up.
START_TOKENS, MOST_BATCHES = 1024, 500
_PART = "default"


class Budget:
    """AdaLoRA's schedule (arXiv:2303.10512): singular values that matter least are set to zero, more of them each step.

    Args:
        model: a `PeftModel` with AdaLoRA.
    """

    def __init__(self, model: Any) -> None:
        self._tuner, self._config = model.base_model, model.peft_config[_PART]
        self._allocator = self._tuner.rankallocator
        self._settled = False

    def after_step(self, step: int) -> None:
        """Score the weights by their gradients, which must still be there, and lower the ranks.

        Args:
            step: counted from 1.
        """
        last = self._config.total_step - self._config.tfinal  # from here on nothing is taken away
        if step < last:
            self._tuner.update_and_allocate(step)
        elif self._settled:
            self.constrain()
        else:  # at that step, or at the next one that was not skipped
            if not self._allocator.ipt:
                self._allocator.update_ipt(self._tuner.model)
            self._tuner.update_and_allocate(last)
            self._settled = True

    def constrain(self) -> None:
        """Set the singular values to zero again that were taken away."""
        if self._config.rank_pattern:
            self._allocator.mask_using_rank_pattern(self._tuner.model, self._config.rank_pattern)

    def compute_penalty(self) -> torch.Tensor:
        """How far the singular vectors are from orthogonal, times its weight: formula (4), mean over matrices."""
        parts = [
            weight @ weight.T if "lora_A" in name else weight.T @ weight
            for name, weight in self._tuner.model.named_parameters()
            if weight.requires_grad and ("lora_A" in name or "lora_B" in name)
        ]
        distances = [torch.linalg.matrix_norm(part - torch.eye(len(part)).to(part)) for part in parts]
        weight: float = self._config.orth_reg_weight
        return weight * torch.stack(distances).mean()

    def export_state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs besides the weights: the scores, and which singular values are left."""
        scores = {
            f"{kind}/{name}": tensor for kind in SCORES for name, tensor in getattr(self._allocator, kind).items()
        }
        kept = {f"kept/{name}": torch.tensor(flags) for name, flags in (self._config.rank_pattern or {}).items()}
        return scores | kept

    def import_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `export_state`."""
        self._allocator.reset_ipt()
        pattern = {}
        devices = {name: weight.device for name, weight in self._tuner.model.named_parameters()}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "kept":
                pattern[name] = tensor.tolist()
            else:
                getattr(self._allocator, kind)[name] = tensor.to(devices[name], copy=True)
                self._allocator.ipt[name] = torch.zeros_like(tensor, device=devices[name])
        self._config.rank_pattern = pattern or None
        self._settled = bool(pattern) and not self._allocator.ipt


def build_budget(model: nn.Module, section: AdapterSection) -> Budget | None:
    """What is done after each step to a model with an adapter attached; None where that is nothing."""
    return Budget(model) if section.method == "adalora" else None


def add_penalty(
    compute_losses: Callable[[nn.Module, Batch], torch.Tensor], budget: Budget | None
) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """The loss of each row, (B,), with the budget's penalty on top, where there is one."""
    if budget is None:
        return compute_losses
    return lambda model, batch: compute_losses(model, batch) + budget.compute_penalty()


def get_rate_factor(section: AdapterSection) -> Callable[[str], float]:
    """Name of a weight -> its learning rate as a multiple of the recipe's: LoRA+ trains B faster than A."""
    ratio = section.learning_rate_ratio
    return lambda name: ratio if ratio is not None and ".lora_B." in name else 1.0


def start_adapter(
    model: nn.Module,
    section: AdapterSection,
    examples: Examples,
    pad_token_id: int | None,
    run: Callable[[nn.Module, Batch], Any],
) -> None:
    """Let an adapter begin at what the data say: EVA, where the recipe asks for it; nothing otherwise.

    A of each layer becomes the main directions of that layer's inputs; B stays zero.

    Args:
        model: with the adapter attached.
        section: the recipe's `adapter`.
        examples: training rows.
        pad_token_id: None for a model that takes packed rows.
        run: (model, batch) -> anything; runs the model.
    """
    if section.init != "eva":
        return
    from peft import initialize_lora_eva_weights

    tokens = max(START_TOKENS, 2 * section.rank)  # a batch must hold as many tokens as directions are sought
    device = next(model.parameters()).device
    batches = [
        {name: tensor.to(device) for name, tensor in collate(examples, rows, pad_token_id).items()}
        for rows in plan_batches(examples.sizes, tokens, seed=0, epoch=0)
    ]
    counter = itertools.count(1)

    def forward(model: nn.Module, batch: Batch) -> None:
        if next(counter) > MOST_BATCHES:
            raise RecipeError(
                f"adapter.init: eva must find the main directions of every layer's inputs, got none that stand still "
                f"after {MOST_BATCHES} batches. Lower adapter.rank, or set adapter.init: default."
            )
        run(model, batch)

    was_training = model.training
    model.eval()
    with contextlib.redirect_stdout(io.StringIO()):  # PEFT prints there
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=forward,
            prepare_model_inputs_fn=lambda batch, _config: batch.get("attention_mask"),
            prepare_layer_inputs_fn=_take_tokens,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    model.train(was_training)


def _take_tokens(inputs: Any, mask: torch.Tensor | None, _layer: str) -> torch.Tensor:
    """The inputs of a layer, (B, T, D), as (tokens, D) without padding; all of them where they have another mask."""
    states: torch.Tensor = inputs[0] if isinstance(inputs, tuple) else inputs
    if mask is not None and states.shape[:2] == mask.shape:
        return states[mask.bool()]
    return states.flatten(0, -2)
