"""The story of an export: finished run -> graph -> engine -> held against the run -> folder, or a refusal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from finetune.artifact.assess import choose_evaluation
from finetune.artifact.export import onnx_format, openvino_format
from finetune.artifact.export.engine import load_engine
from finetune.artifact.export.formats import Format, check_installed, check_task, get_format
from finetune.artifact.export.graph import Graph, trace
from finetune.artifact.export.int8 import (
    RANKING_ROWS,
    Calibration,
    Candidate,
    Scheme,
    choose_quantization,
    rank_layers,
)
from finetune.artifact.export.parity import (
    Answers,
    Judged,
    check_drop,
    check_equality,
    compare_answers,
    compute_answers,
    count_bytes,
    list_differences,
    list_excesses,
    settle_max_drop,
)
from finetune.artifact.export.speed import Contender, describe_machine, measure
from finetune.artifact.export.torch_format import write_torch
from finetune.artifact.export.transformers_format import write_transformers
from finetune.artifact.load import list_predictors, load
from finetune.artifact.run_folder import RunFolder, find_run, now, save_json
from finetune.artifact.save import seal_folder
from finetune.artifact.saved import Saved, compute_model_fingerprint, open_saved
from finetune.data.batches import Examples
from finetune.errors import UsageError
from finetune.recipe.loading import load_recipe
from finetune.recipe.schema import Recipe

PARITY = "parity.json"
FLOATS = ".float"
"""Where the ONNX file lies that other formats are made of, with its weights."""


@dataclass(frozen=True)
class Exported:
    """An export that was written.

    Args:
        folder: what `load` and `finetune predict` take.
        parity: the content of its parity.json.
    """

    folder: Path
    parity: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """What is exported, and what it is held against.

    Args:
        run: finished.
        saved: its `model/`.
        model: of it, merged.
        tokenizer: its.
        examples: validation, encoded.
        judged: task name -> how it is scored.
        before: task name -> what the model gives for validation.
        max_drop: task name -> metric -> what may be lost.
    """

    run: RunFolder
    saved: Saved
    model: nn.Module
    tokenizer: Any
    examples: Examples
    judged: Mapping[str, Judged]
    before: Mapping[str, Answers]
    max_drop: Mapping[str, Mapping[str, float]]

    def compare(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Task name -> what became of its validation rows."""
        after = compute_answers(self.saved.task, model, self.examples, self.tokenizer, self.judged)
        return {name: compare_answers(one, self.before[name], after[name]) for name, one in self.judged.items()}


def export_run(
    reference: str | Path,
    name: str,
    output: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    narrate: Callable[[str], None] = lambda _text: None,
) -> Exported:
    """Write a finished run in a format, unless it loses more than `export.max_drop` on validation or, in
    float32, is not the run's equal.

    Args:
        reference: the run.
        name: of the format.
        output: a folder; default `export/<format>` in the run's.
        overrides: of the recipe, such as `export.max_drop={macro_f1: 0.01}`.
        narrate: told what comes next.

    Raises:
        UsageError: no such run or format, a task without such a graph, a folder that is no export.
        ResourceError: what the format needs is not installed.
        ModelError: the model cannot be said as a graph.
        GateError: the export would be worse than allowed; nothing is written, and an older one stays.
    """
    format_ = get_format(name)
    run = find_run(reference)
    folder = Path(output).resolve() if output is not None else run.export(name)
    _check_output(folder)
    saved = open_saved(run.model)
    check_task(saved.task.type)
    check_installed(format_, format_.writes)
    source = _open_source(run, saved, load_recipe(run.recipe, overrides))
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        parity = _write(source, format_, temporary, folder, narrate)
        seal_folder(temporary, folder, saved.own_settings | {"engine": parity["engine"]})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder, parity)


def _check_output(folder: Path) -> None:
    if folder == Path.cwd():  # it is replaced as a whole, and who stands in it would see the old one
        raise UsageError(
            f"{folder}: must be another folder than the one that you are in, got that one. Choose another --output."
        )
    if folder.exists() and not (folder / PARITY).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder}: must be a new folder or an older export, got something else. Choose another --output."
        )


def _open_source(run: RunFolder, saved: Saved, recipe: Recipe) -> Source:
    loaded = load(run.model)
    predictors = list_predictors(loaded, list(recipe.tasks))
    judged = {
        name: Judged(
            one.task,
            choose_evaluation(recipe, name),
            one.temperature,
            recipe.train.seed,
            one.fitted.get("threshold", 0.0),
        )
        for name, one in predictors.items()
    }
    max_drop = settle_max_drop(recipe.export.max_drop, judged)
    examples = Examples.load(run.examples("validation"))
    tokenizer = next(iter(predictors.values())).tokenizer
    model = loaded.model.cpu()
    before = compute_answers(saved.task, model, examples, tokenizer, judged)
    return Source(run, saved, model, tokenizer, examples, judged, before, max_drop)


def _write(
    source: Source, format_: Format, temporary: Path, folder: Path, narrate: Callable[[str], None]
) -> dict[str, Any]:
    """Fill a folder, hold it against the run, and say what became of it: the content of parity.json."""
    engine: dict[str, Any] = {"format": format_.name, "source": compute_model_fingerprint(source.run.model)}
    candidates: list[Candidate] = []
    source.tokenizer.save_pretrained(temporary)
    if format_.runtime == "transformers":
        narrate(f"writing {source.run.name} as a class of transformers")
        write_transformers(source.model, temporary)
        model = source.saved.task.load_model(temporary).eval()
    else:
        narrate(f"tracing {source.run.name}")
        graph = trace(source.model, reads_types=source.examples.token_type_ids is not None)
        engine |= {"inputs": list(graph.inputs), "outputs": list(graph.outputs)}
        config: Any = source.model.config
        config.save_pretrained(temporary)
        candidates = _write_graph(source, format_, graph, engine, temporary, narrate)
        model = load_engine(temporary, engine)
    narrate("holding it against the run on validation")
    tasks = source.compare(model)
    where, kept = str(source.run.path), (folder / PARITY).exists()
    if not format_.is_quantized:
        check_equality(where, list_differences(tasks), kept)
    check_drop(where, list_excesses(tasks, source.max_drop), kept)
    narrate("measuring its speed")
    max_length = int(source.saved.settings["max_length"])
    contenders = {"run": Contender(source.model, source.tokenizer), "export": Contender(model, source.tokenizer)}
    parity = {
        "format": format_.name,
        "created": now(),
        "engine": engine,
        "versions": {module: version(module) for module in format_.writes} | {"torch": version("torch")},
        "tasks": tasks,
        "max_drop": {name: dict(limits) for name, limits in source.max_drop.items()},
        "candidates": [candidate.describe() for candidate in candidates],
        "bytes": {
            "before": count_bytes(source.model),
            "after": sum(p.stat().st_size for p in _list_weights(temporary)),
        },
        "machine": describe_machine(),
        "speed": measure(source.saved.task, contenders, source.examples, max_length),
    }
    save_json(temporary / PARITY, parity)
    return parity


def _list_weights(folder: Path) -> list[Path]:
    # torch puts large weights beside the graph of an ONNX file, into model.onnx.data.
    kinds = (".onnx", ".data", ".xml", ".bin", ".pt2", ".safetensors")
    return [path for path in folder.iterdir() if path.suffix in kinds]


def _write_graph(
    source: Source,
    format_: Format,
    graph: Graph,
    engine: Mapping[str, Any],
    folder: Path,
    narrate: Callable[[str], None],
) -> list[Candidate]:
    """Write the files of an engine; of an 8-bit one what was tried, the taken one first."""
    if format_.runtime == "torch":
        write_torch(graph, folder)
        return []
    is_kept = format_.runtime == "onnxruntime" and not format_.is_quantized
    floats = folder if is_kept else folder / FLOATS
    floats.mkdir(exist_ok=True)
    plain = floats / onnx_format.FILE
    onnx_format.write_onnx(graph, plain)
    if not format_.is_quantized:
        if format_.runtime == "openvino":
            openvino_format.write_openvino(plain, folder)
            shutil.rmtree(floats)
        return []
    pad_token_id = int(source.tokenizer.pad_token_id)
    seed = next(iter(source.judged.values())).seed
    calibration = Calibration.draw(Examples.load(source.run.examples("train")), pad_token_id, seed)
    narrate("looking for the layers that 8 bits change most")
    ranked = rank_layers(source.model, calibration, Calibration.draw(source.examples, pad_token_id, seed, RANKING_ROWS))
    batches = calibration.list_arrays(graph.inputs)

    def write(scheme: Scheme, left: Sequence[str], place: Path) -> None:
        narrate(f"8 bits, {scheme} ranges, {len(left)} of {len(ranked)} layers left in float")
        layers = [name for name in ranked if name not in left]
        if format_.runtime == "openvino":
            openvino_format.quantize_openvino(plain, place, onnx_format.list_other_products(plain, layers), batches)
        else:
            onnx_format.quantize_onnx(plain, place / onnx_format.FILE, scheme, layers, batches)

    def read(place: Path) -> nn.Module:
        for path in folder.glob("*config*.json"):
            shutil.copy(path, place)
        return load_engine(place, engine)

    def judge(model: nn.Module) -> tuple[dict[str, dict[str, Any]], list[str]]:
        tasks = source.compare(model)
        return tasks, list_excesses(tasks, source.max_drop)

    schemes: tuple[Scheme, ...] = ("static", "dynamic") if format_.runtime == "onnxruntime" else ("static",)
    candidates = choose_quantization(schemes, ranked, write, read, judge, calibration, folder)
    shutil.rmtree(floats)
    return candidates
