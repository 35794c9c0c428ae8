"""OpenVINO's files, made from an ONNX file, and OpenVINO, which runs them; NNCF makes them 8-bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.artifact.export.engine import Arrays

FILE = "model.xml"


class OpenVinoEngine:
    """A graph in OpenVINO, on the CPU.

    Args:
        folder: has `model.xml` and its weights, `model.bin`.
        threads: that compute one batch.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino

        # Products of float32 stay so where the processor could do them in 16 bits: one format, one answer.
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        self._request = openvino.Core().compile_model(folder / FILE, "CPU", options).create_infer_request()
        self._lock = Lock()  # a request is for one caller at a time

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        """Every output, by name."""
        with self._lock:
            found = self._request.infer(dict(inputs))
            return {output.any_name: np.array(array) for output, array in found.items()}


def write_openvino(source: Path, folder: Path) -> None:
    """Write an ONNX file as OpenVINO's pair of files, weights in float32."""
    import openvino

    openvino.save_model(openvino.Core().read_model(source), folder / FILE, compress_to_fp16=False)


def quantize_openvino(source: Path, folder: Path, float_nodes: Sequence[str], batches: Sequence[Arrays]) -> None:
    """Write it with matrix products of 8-bit integers, by NNCF's post-training quantization.

    Args:
        source: an ONNX file.
        folder: gets the files.
        float_nodes: names of ONNX nodes whose products stay as they are.
        batches: of train rows, for ranges and for moving outliers into weights (arXiv:2211.10438).
    """
    import nncf
    import openvino

    # A product with a bias in one node of ONNX is two nodes here, the first with that name.
    kept = [*float_nodes, *(f"{name}/WithoutBiases" for name in float_nodes)]
    quantized: Any = nncf.quantize(
        openvino.Core().read_model(source),
        nncf.Dataset(list(batches)),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(names=kept, validate=False),
    )
    openvino.save_model(quantized, folder / FILE, compress_to_fp16=False)
