"""A model as a graph of one pass: named inputs and outputs, any number of rows, any length."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune.artifact.export.engine import HEAD
from finetune.errors import ModelError

FILLERS = (2, 7)
"""Rows and tokens that the model is traced with: neither 0 nor 1, which torch takes for constants."""


@dataclass(frozen=True)
class Graph:
    """A traced model.

    Args:
        program: torch's.
        inputs: names, each (B, T) of int64.
        outputs: names, each float32 with B first.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Named(nn.Module):
    """A model with positional inputs and a tuple of outputs, as engines have them."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of `name_outputs`, in its order."""
        return tuple(name_outputs(self.model(**dict(zip(self.inputs, tensors, strict=True)))).values())


def name_outputs(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model's answer by the names that the graph gives them."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Mapping):
        return {f"{HEAD}{task}": tensor for task, tensor in logits.items()}
    names = ("logits", "embeddings", "start_logits", "end_logits")
    return {name: tensor for name in names if (tensor := getattr(output, name, None)) is not None}


def trace(model: nn.Module, *, reads_types: bool) -> Graph:
    """Trace a model in evaluation mode.

    Args:
        model: merged, on the CPU.
        reads_types: whether rows of two texts say which token belongs to which.

    Raises:
        ModelError: it does something that no graph says; the message names operator and layer.
    """
    inputs = ("input_ids", "attention_mask", *(["token_type_ids"] if reads_types else []))
    ids = torch.zeros(FILLERS, dtype=torch.int64)
    mask = torch.ones(FILLERS, dtype=torch.int64)
    mask[1, -2:] = 0  # what is traced sees padding
    tensors = (ids, mask, *([torch.zeros_like(ids)] if reads_types else []))
    size: Any = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = tuple(name_outputs(model(**dict(zip(inputs, tensors, strict=True)))))
            program = torch.export.export(
                _Named(model, inputs).eval(), tensors, dynamic_shapes=((size,) * len(inputs),)
            )
    except Exception as error:  # whatever the model does
        raise ModelError(f"export: {describe_failure(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which files would carry along
    return Graph(program, inputs, outputs)


def describe_failure(error: Exception, program: torch.export.ExportedProgram | None = None) -> str:
    """The sentence about a model that cannot be said as a graph: operator, layer, reason, fix.

    Args:
        error: of torch.
        program: what was traced, where it came so far.
    """
    causes = _list_causes(error)
    text = "\n".join(str(cause) for cause in causes)
    operator = next(iter(re.findall(r"\b(?:aten|prims|quantized|torchao)(?:\.|::)\w+", text)), None)
    layer = _find_layer(error) if program is None else _find_scope(program, operator or "")
    reason = next((line.strip() for line in str(causes[-1]).splitlines() if line.strip()), type(error).__name__)
    return (
        f"the model must be a graph of operators that the format knows, got {operator or 'code'} in "
        f"{layer or 'its forward pass'} that is none ({reason[:200]}). Export another format, or train with "
        "adapter: {method: lora}, which is merged into plain layers."
    )


def _find_scope(program: torch.export.ExportedProgram, operator: str) -> str | None:
    """Name of the first module that calls an operator, or one whose name goes on from it."""
    for node in program.graph.nodes:
        if operator and str(node.target).startswith(operator):
            scopes = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
            return scopes[-1].removeprefix("model.") if scopes else None
    return None


def _list_causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _find_layer(error: BaseException) -> str | None:
    """The innermost module whose `forward` was running, by its class."""
    found = None
    for link in _list_causes(error):
        traceback = link.__traceback__
        while traceback is not None:
            owner = traceback.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and not isinstance(owner, _Named):
                found = type(owner).__name__
            traceback = traceback.tb_next
    return found
