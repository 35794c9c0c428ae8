"""Load a finished model: a run's, a saved folder's or an export's, with all that it needs to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters.attach import can_merge, load_adapter, merge_adapter
from finetune.artifact.export.engine import load_engine
from finetune.artifact.export.formats import get_format
from finetune.artifact.export.opening import open_model
from finetune.artifact.predictor import MultiPredictor, Predictor, check_writes
from finetune.artifact.saved import Saved
from finetune.models.base import resolve_base
from finetune.models.multi_task import OneHead
from finetune.models.packed import pack_linear_layers
from finetune.recipe.schema import GenerateSection
from finetune.tasks import MultiTask


def load(reference: str | Path, *, engine: str | None = None, threads: int | None = None) -> Predictor | MultiPredictor:
    """Load a run (`runs/name`, its latest finished one), or a `model/` folder, or one that `finetune export` wrote.

    Args:
        reference: the run or folder.
        engine: the format of an export of that run, such as `onnx-int8`: its engine computes the answers.
        threads: that an export's engine uses; None for as many as torch.

    Returns:
        A `MultiPredictor` where the run has several tasks.

    Raises:
        UsageError: no such run, a folder of a newer toolkit; no such export, or one of another model.
        ResourceError: the engine is not installed.
        ModelError: a damaged folder, or the base that an adapter needs is not at hand.
    """
    saved = open_model(reference, engine)
    exported = saved.settings.get("engine")
    if exported and get_format(exported["format"]).runtime != "transformers":
        return _build(saved, load_engine(saved.folder, exported, threads))
    if saved.base is None:
        model = saved.task.load_model(saved.folder)
    else:
        model = saved.task.load_model(saved.folder, resolve_base(saved.base))
        model = load_adapter(model, saved.folder)
        if can_merge(model):  # one product a layer instead of three, and the same logits (tests/parity)
            model = merge_adapter(model)
    return _build(saved, pack_linear_layers(model.eval().requires_grad_(False).to(choose_device())))


def load_writer(reference: str | Path) -> Predictor:
    """Load a run that writes text.

    Raises:
        UsageError: it gives something else; and as `load`.
    """
    loaded = load(reference)
    check_writes(loaded.task)
    assert isinstance(loaded, Predictor)  # several tasks write no text
    return loaded


def list_predictors(loaded: Predictor | MultiPredictor, names: Sequence[str] = ()) -> dict[str, Predictor]:
    """Task name -> predictor, also of a run with one task, which keeps no name: then that of `names`."""
    if isinstance(loaded, MultiPredictor):
        return dict(loaded.predictors)
    return dict.fromkeys(names, loaded)


def _build(saved: Saved, model: nn.Module) -> Predictor | MultiPredictor:
    if not isinstance(saved.task, MultiTask):
        return build_predictor(saved, model)
    predictors = {name: build_predictor(saved, OneHead(model, name).eval(), name) for name in saved.task.tasks}
    return MultiPredictor(model, saved.task, predictors)


def build_predictor(saved: Saved, model: nn.Module, name: str | None = None) -> Predictor:
    """All but the weights comes from the model's folder.

    Args:
        saved: the folder.
        model: answers for the task.
        name: of the task, where the folder has several.
    """
    from transformers import AutoTokenizer

    several, settings = isinstance(saved.task, MultiTask), saved.settings
    return Predictor(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(saved.folder, trust_remote_code=False),
        task=saved.task.tasks[name or ""] if isinstance(saved.task, MultiTask) else saved.task,
        temperature=settings["temperatures"][name] if several else settings["temperature"],
        max_length=settings["max_length"],
        writing=GenerateSection(**settings.get("generate", {})),
        fitted=_find_fitted(settings.get("fitted", {}), name),
    )


def _find_fitted(fitted: Mapping[str, Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    """What was fitted for one task; a run with one task keeps no name. Nothing, where a run was not judged yet."""
    return fitted.get(name, {}) if name else next(iter(fitted.values()), {})


def choose_device() -> str:
    """Where predictions are computed."""
    return "cuda" if torch.cuda.is_available() else "cpu"
