"""The formats of an export, what each of them needs, and refusals before any work."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from finetune.errors import ResourceError, UsageError
from finetune.recipe.messages import suggest

Runtime = Literal["transformers", "torch", "onnxruntime", "openvino"]
TASKS = ("text_classification", "multi_task", "retrieval", "reranking", "question_answering")
"""Task types whose models answer in one pass."""


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        name: what the command line and `finetune.load` call it.
        runtime: what computes its answers; `transformers`: a model as any other, which `load` reads itself.
        is_quantized: whether its matrix products are of 8-bit integers.
        writes: modules that an export needs.
        reads: modules that a prediction needs.
    """

    name: str
    runtime: Runtime
    is_quantized: bool = False
    writes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


_ONNX = ("onnx", "onnxscript", "onnxruntime")
_OPENVINO = ("onnx", "onnxscript", "openvino")  # it reads the ONNX file that torch writes
FORMATS = {
    format_.name: format_
    for format_ in (
        Format("transformers", "transformers"),
        Format("onnx", "onnxruntime", writes=_ONNX, reads=("onnxruntime",)),
        Format("onnx-int8", "onnxruntime", True, writes=_ONNX, reads=("onnxruntime",)),
        Format("openvino", "openvino", writes=_OPENVINO, reads=("openvino",)),
        Format("openvino-int8", "openvino", True, writes=(*_OPENVINO, "nncf"), reads=("openvino",)),
        Format("torch-export", "torch"),
    )
}


def get_format(name: str, option: str = "--format", fix: str = "Take onnx-int8 for speed on a CPU.") -> Format:
    """The format of that name.

    Args:
        name: as a user gave it.
        option: where.
        fix: what to do where there is none.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        guess = suggest(name, FORMATS) or f" {fix}"
        raise UsageError(f"{option}: must be one of {', '.join(FORMATS)}, got {name!r}.{guess}")
    return FORMATS[name]


def check_installed(format_: Format, modules: tuple[str, ...]) -> None:
    """Raise ResourceError where a module is missing, with the command that installs it."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ResourceError(
            f"{format_.name}: {', '.join(missing)} must be installed, got no such package. Install "
            f"{'it' if len(missing) == 1 else 'them'}: pip install {' '.join(missing)}"
        )


def check_task(kind: str) -> None:
    """Raise UsageError for a task whose models answer in more than one pass."""
    if kind not in TASKS:
        raise UsageError(
            f"export: must get a run of type {', '.join(TASKS)}, got {kind}: its model answers token by token, "
            "ranks with counts and trees, or is a base for other recipes, which no graph of one pass says. Its run's "
            "model/ folder is what transformers loads."
        )
