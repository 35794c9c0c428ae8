"""LoRA's update in few operations, for PEFT's linear layers.

PEFT computes y = x W^T + b + s (x A^T) B^T (arXiv:2106.09685, section 4.1) as five operations, and autograd answers
with ten more. On a CPU each of them reads and writes tensors of the size of y that are too large for its caches. Here
forward and backward are one function, which adds the update to what it holds already.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]


def speed_up_lora(model: nn.Module) -> nn.Module:
    """Let the model's plain LoRA layers compute by `LoraFunction`, in place; nothing else about them changes."""
    return change_class(model, Linear, FastLinear)


def speed_up_frozen(model: nn.Module) -> nn.Module:
    """Let plain linear layers that nothing trains or wraps remember their cast weights, in place."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            continue
        for child in module.children():
            if _is_plain(child) and not child.weight.requires_grad:
                child.__class__ = FrozenLinear
    return model


def restore_lora(model: nn.Module) -> nn.Module:
    """Undo `speed_up_lora`, in place."""
    return change_class(model, FastLinear, Linear)


def change_class(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> nn.Module:
    """Give modules of exactly one class the forward of another, in place."""
    # A class, not a forward of the instance: copies and pickles of a module would keep the first module's forward.
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
    return model


class CastOnce:
    """A frozen weight in autocast's dtype, kept until the weight changes; autocast remembers only what is trained."""

    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()
        self.kept = torch.empty(0)

    def get(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight in that dtype, without a gradient."""
        state = (weight.data_ptr(), weight._version, weight.device, dtype)
        if self.state != state:
            with torch.inference_mode(mode=False):  # what is validated first may train next
                self.state, self.kept = state, weight.detach().to(dtype)
        return self.kept


class FrozenLinear(nn.Linear):
    """A layer of the base that stays as it is, whose weight autocast need not cast in every step."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (torch's name)
        """Map (..., in) to (..., out)."""
        frozen = self.weight.dtype == torch.float32 and not self.weight.requires_grad
        if not frozen or is_compiling() or not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        weight = self._cast.get(self.weight, torch.get_autocast_dtype(input.device.type))
        return nn.functional.linear(input, weight, self.bias)

    @cached_property
    def _cast(self) -> CastOnce:
        return CastOnce()


class FastLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's LoRA layer with a faster forward; all that `_can_be_fast` does not name goes PEFT's own way."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x (..., in) to (..., out)."""
        # PEFT's own keywords arrive here too, such as adapter_names for mixed batches.
        if args or kwargs or not self._can_be_fast(x):
            return cast(torch.Tensor, super().forward(x, *args, **kwargs))
        base, (name,) = self.base_layer, self.active_adapters
        weight, tensors = base.weight, [x, base.bias, self.lora_A[name].weight, self.lora_B[name].weight]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            weight = self._cast.get(weight, dtype)
            tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        x, *others = tensors
        return cast(torch.Tensor, LoraFunction.apply(x, weight, *others, self.scaling[name]))  # type: ignore[no-untyped-call]

    @cached_property
    def _cast(self) -> CastOnce:
        return CastOnce()

    def _can_be_fast(self, x: torch.Tensor) -> bool:
        # A compiler fuses PEFT's operations itself; a subclass (fake, distributed, quantized) may mean anything.
        if is_compiling() or is_tracing() or type(x) is not torch.Tensor or x.is_meta:  # type: ignore[no-untyped-call]
            return False
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (name,) = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant:
            return False
        base, down, up, dropout = self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        return (
            (isinstance(dropout, nn.Identity) or not dropout.training)
            and all(_is_plain(linear) for linear in (base, down, up))
            and up.bias is None
            and not base.weight.requires_grad
            and _fit_together(x, base.weight, base.bias, down.weight, up.weight)
        )


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer is no more than its weight and bias: not quantized, parametrized or watched by hooks."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and "forward" not in vars(linear)
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
    )


def _fit_together(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether all have one dtype, or get one from autocast, which leaves float64 as it is."""
    dtypes = {x.dtype, *(tensor.dtype for tensor in others if tensor is not None)}
    if torch.is_autocast_enabled(x.device.type):
        return torch.float64 not in dtypes
    return len(dtypes) == 1


def is_merging_cheaper(tokens: int, weight: torch.Tensor) -> bool:
    """Whether x (W + s B A)^T costs less than x W^T + s (x A^T) B^T.

    B A takes rank * in * out multiplications, the products with x take tokens * rank * (in + out). Measured on one core
    (384 x 384, 384 x 1536 and 1536 x 384, rank 8 and 16), the two break even at 0.5 to 1.5 times the tokens that this
    says. Only on a CPU and in full precision: bf16 would round a small update away.

    Args:
        tokens: number of vectors in x.
        weight: W, (out, in), in the dtype of the computation.
    """
    out_features, in_features = weight.shape
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and tokens * (in_features + out_features) > in_features * out_features
    )


class LoraFunction(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T, with gradients for x, b, A and B.

    Products of rank r are taken in the layout (r, T): for r < 16 they are up to four times as fast as in (T, r).
    """

    @staticmethod
    def forward(  # noqa: PLR0913  (the terms of the formula)
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Compute y.

        Args:
            ctx: autograd's.
            x: (..., in).
            weight: W, (out, in); frozen.
            bias: b, (out).
            down: A, (r, in).
            up: B, (out, r).
            scale: s.
        """
        rows = x.reshape(-1, x.shape[-1])  # (T, in)
        low = None
        ctx.merged = is_merging_cheaper(len(rows), weight)
        if ctx.merged:
            weight = torch.addmm(weight, up, down, alpha=scale)
        y = nn.functional.linear(x, weight, bias)
        if not ctx.merged:
            low = down @ rows.t()  # (r, T)
            y.view(-1, y.shape[-1]).addmm_(low.t(), up.t(), alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, down, up, low)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients that are asked for from that of y, (..., out)."""
        x, weight, down, up, low = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # (T, in), (T, out)
        needs_x, _, needs_bias, needs_down, needs_up, _ = ctx.needs_input_grad
        grad_x = grad_bias = grad_down = grad_up = None
        # A backward pass inside of an autocast region would cast some of these products and not others.
        with torch.autocast(x.device.type, enabled=False):
            grad_low = up.t() @ grad_rows.t()  # (r, T)
            if needs_x:
                grad_x = grad_rows @ weight
                if not ctx.merged:
                    grad_x.addmm_(grad_low.t(), down, alpha=ctx.scale)
                grad_x = grad_x.view(x.shape)
            if needs_bias:
                grad_bias = grad_rows.sum(0)
            if needs_down:
                grad_down = (grad_low @ rows).mul_(ctx.scale)
            if needs_up:
                low = down @ rows.t() if low is None else low
                grad_up = (low @ grad_rows).mul_(ctx.scale).t()
        return grad_x, None, grad_bias, grad_down, grad_up, None
