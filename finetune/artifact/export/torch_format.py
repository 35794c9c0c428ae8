"""torch's own form of a graph, a .pt2 file, and torch, which runs it without the model's code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from finetune.artifact.export.engine import Arrays
from finetune.artifact.export.graph import Graph

FILE = "model.pt2"


class TorchEngine:
    """A graph in torch.

    Reading a .pt2 file runs what stands in it: weights may be pickles, sizes are evaluated. `open_export` lets through
    only files whose checksum the folder knows, and only where the caller asked for this engine by name.

    Args:
        folder: has `model.pt2`.
        outputs: names of what the graph gives, in order.
    """

    def __init__(self, folder: Path, outputs: tuple[str, ...]) -> None:
        self._outputs = outputs
        self._model = torch.export.load(folder / FILE).module()

    @torch.inference_mode()
    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        """Every output, by name."""
        found = self._model(*(torch.from_numpy(array) for array in inputs.values()))
        return {name: tensor.numpy() for name, tensor in zip(self._outputs, found, strict=True)}


def write_torch(graph: Graph, folder: Path) -> None:
    """Write a graph as one file."""
    torch.export.save(graph.program, folder / FILE)
