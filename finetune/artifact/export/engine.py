"""A model whose forward pass is another engine's: whatever predicts with a model predicts with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.artifact.export.formats import check_installed, get_format
from finetune.errors import ModelError

Arrays = Mapping[str, npt.NDArray[Any]]
HEAD = "logits."
"""What stands before a task's name in the name of an output, where there are several tasks."""


class Engine(Protocol):
    """What runs an exported graph."""

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        """Every output of the graph, by name, for int64 inputs (B, T). May be called from several threads."""


class EngineModel(nn.Module):
    """Takes the place of a model in evaluation mode: takes padded batches and gives what the model would give.

    Args:
        engine: runs the graph.
        inputs: names of the graph's inputs.
        config: of the model that was exported.
    """

    packs_rows = False  # the graph wants padding
    # Engines keep a batch's intermediate values; where these leave the processor's cache, rows take longer. On one core
    # ONNX Runtime took 107 rows/s of 19 tokens in batches of 256 tokens, 65 in batches of 4,096.
    tokens_per_batch = 512

    def __init__(self, engine: Engine, inputs: Sequence[str], config: Any) -> None:
        super().__init__()
        self.engine, self.inputs, self.config = engine, tuple(inputs), config
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # says where batches are wanted
        self.eval()

    def forward(self, task: str | None = None, **batch: torch.Tensor) -> Any:
        """What the model gives: `logits` (of one task, or task -> logits), `embeddings`, or logits of spans.

        Args:
            task: whose logits, where there are several; None for all.
            batch: tensors (B, T); what the graph does not read is left out, types that are not given are 0.
        """
        given = {"token_type_ids": torch.zeros_like(batch["input_ids"])} | batch
        found = self.engine.run({name: given[name].numpy() for name in self.inputs})
        outputs = {name: torch.from_numpy(array) for name, array in found.items()}
        heads = {name.removeprefix(HEAD): tensor for name, tensor in outputs.items() if name.startswith(HEAD)}
        if not heads:
            return SimpleNamespace(**outputs)
        return SimpleNamespace(logits=heads if task is None else heads[task])


def load_engine(folder: Path, settings: Mapping[str, Any], threads: int | None = None) -> nn.Module:
    """The model of an exported folder.

    Args:
        folder: as `export_run` wrote it.
        settings: the content of its `engine` in finetune.json.
        threads: that compute one answer; None for as many as torch uses, which a graph in torch always does.

    Raises:
        ResourceError: the engine is not installed.
        ModelError: it cannot read the file.
    """
    from finetune.models.base import BaseModel, load_config

    format_ = get_format(settings["format"])
    check_installed(format_, format_.reads)
    count = threads or torch.get_num_threads()
    try:
        engine = _OPENERS[format_.runtime](folder, count, settings)
    except ModelError:
        raise
    except Exception as error:  # each engine has its own
        raise ModelError(f"{folder}: must be a graph that {format_.runtime} reads, got: {error}") from error
    config = load_config(BaseModel(str(folder), folder, "exported model"))
    return EngineModel(engine, settings["inputs"], config)


def _open_onnx(folder: Path, threads: int, _settings: Mapping[str, Any]) -> Engine:
    from finetune.artifact.export.onnx_format import OnnxEngine

    return OnnxEngine(folder, threads)


def _open_openvino(folder: Path, threads: int, _settings: Mapping[str, Any]) -> Engine:
    from finetune.artifact.export.openvino_format import OpenVinoEngine

    return OpenVinoEngine(folder, threads)


def _open_torch(folder: Path, _threads: int, settings: Mapping[str, Any]) -> Engine:
    from finetune.artifact.export.torch_format import TorchEngine

    return TorchEngine(folder, tuple(settings["outputs"]))


_OPENERS = {"onnxruntime": _open_onnx, "openvino": _open_openvino, "torch": _open_torch}
