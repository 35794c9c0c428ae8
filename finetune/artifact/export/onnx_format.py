"""ONNX files, by torch's exporter, and ONNX Runtime, which runs them."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune.artifact.export.engine import Arrays
from finetune.artifact.export.graph import Graph, describe_failure
from finetune.artifact.export.int8 import Scheme
from finetune.errors import ModelError

FILE = "model.onnx"
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter says which module a node comes from."""

SLOW_FUSIONS = ["SkipLayerNormFusion"]
"""The sum and the norm in one: on one core of an AVX-512 processor MiniLM in 8 bits took 42 ms for 32 rows of 14 tokens
with it and 35 ms without (ONNX Runtime 1.32; 2.3 and 2.1 ms for one row)."""


class OnnxEngine:
    """A graph in ONNX Runtime, on the CPU.

    Args:
        folder: has `model.onnx`.
        threads: that compute one batch.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Without it, processors that lack VNNI add 8-bit products in 16 bits, which overflow.
        options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = onnxruntime.InferenceSession(
            folder / FILE, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        """Every output, by name."""
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))


def write_onnx(graph: Graph, path: Path) -> None:
    """Write a graph as an ONNX file; above 1.5 GB its weights lie beside it, in `<file>.data`.

    Raises:
        ModelError: an operator that ONNX does not have.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it names each operator of libraries that are not installed
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                graph.program,
                dynamo=True,
                verbose=False,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
            )
    except Exception as error:  # the exporter's own classes are private
        raise ModelError(f"export: {describe_failure(error, graph.program)}") from error
    finally:
        logger.setLevel(level)
    assert written is not None  # None only where it writes a file itself
    written.save(path, external_data=False)


def quantize_onnx(source: Path, target: Path, scheme: Scheme, layers: Sequence[str], batches: Sequence[Arrays]) -> None:
    """Make matrix products of an ONNX file 8-bit: weights by output channel, what goes in by tensor.

    Tables of embeddings become 8-bit too, by row: they are most of a small model's bytes.

    Args:
        source: as `write_onnx` wrote it.
        target: the new file.
        scheme: `static`: ranges from `batches`; `dynamic`: from each batch as it comes.
        layers: modules whose products become 8-bit.
        batches: of train rows.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
        """The batches, one a call."""

        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> Any:
            return next(self._batches, None)

    chosen = list_products(onnx.load(source, load_external_data=False), layers)
    shared = {"nodes_to_quantize": chosen, "per_channel": True, "weight_type": QuantType.QInt8}
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends a pass that changes nothing here
    try:
        if scheme == "dynamic":
            quantize_dynamic(source, target, op_types_to_quantize=["MatMul"], **shared)
        else:
            quantize_static(
                source,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                op_types_to_quantize=["MatMul"],
                **shared,
            )
    finally:
        logger.setLevel(level)
    quantized = onnx.load(target)
    round_embeddings(quantized)
    for node in quantized.graph.node:
        del node.metadata_props[:]  # which module it came from: that was for choosing
    onnx.save(quantized, target)


def round_embeddings(model: Any) -> None:
    """Put 8-bit integers and a scale for each row in the place of float tables that nothing else reads.

    ONNX Runtime's own quantizer has one scale for the whole table, which its largest number decides.
    """
    from onnx import TensorProto, helper, numpy_helper

    tables = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    nodes = []
    for node in model.graph.node:
        name = node.input[0] if node.input else ""
        table = tables.get(name)
        if node.op_type != "Gather" or table is None or len(table.dims) != 2 or uses[name] > 1:
            nodes.append(node)
            continue
        weights = numpy_helper.to_array(table)
        scales = np.maximum(np.abs(weights).max(axis=1, keepdims=True), 1e-12).astype(np.float32) / 127
        model.graph.initializer.remove(table)
        for suffix, array in (("rows", np.rint(weights / scales).astype(np.int8)), ("scales", scales)):
            model.graph.initializer.append(numpy_helper.from_array(array, f"{name}.{suffix}"))
            nodes.append(helper.make_node("Gather", [f"{name}.{suffix}", node.input[1]], [f"{node.name}.{suffix}"]))
        nodes.append(helper.make_node("Cast", [f"{node.name}.rows"], [f"{node.name}.floats"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{node.name}.floats", f"{node.name}.scales"], node.output))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def list_products(model: Any, layers: Sequence[str]) -> list[str]:
    """Names of the nodes that multiply with the weights of some layers."""
    wanted = {f"model.{name}" for name in layers}  # the traced module holds the model as `model`
    found = []
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
        if node.op_type == "MatMul" and wanted & set(ast.literal_eval(scopes)):
            found.append(node.name)
    return found


def list_other_products(path: Path, layers: Sequence[str]) -> list[str]:
    """Names of the nodes of an ONNX file that multiply with other weights than those of some layers."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    constants, chosen = {tensor.name for tensor in model.graph.initializer}, set(list_products(model, layers))
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants and node.name not in chosen
    ]
