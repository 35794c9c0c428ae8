"""From the folder of a run to its `model/`: the base, the adapter, the loop; in one process or several."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import nn

from finetune.adapters.attach import attach_adapter, count_parameters
from finetune.adapters.budget import add_penalty, build_budget, get_rate_factor, start_adapter
from finetune.adapters.targets import find_targets
from finetune.artifact.run_folder import RunFolder, load_json
from finetune.artifact.save import forget_token_types, save_model
from finetune.artifact.starting import start_from_adapters
from finetune.data.batches import Batch, Examples
from finetune.errors import Interrupted, ResourceError
from finetune.evaluation.metrics import is_larger_better
from finetune.layout import load_learned_tokenizer
from finetune.models.base import SCRATCH, load_tokenizer, resolve_base
from finetune.models.classifier import get_padding, has_head
from finetune.models.quantization import quantize_layers
from finetune.recipe import load_recipe
from finetune.recipe.schema import Recipe
from finetune.recipe.together import find_comparison
from finetune.tasks import MultiTask, Task, TextClassification, load_task
from finetune.tasks.contrastive import ContrastivePhase
from finetune.tasks.distillation import compute_distilled_losses
from finetune.training.checkpoint import has_checkpoint, prune_checkpoints
from finetune.training.events import load_events
from finetune.training.loop import GivesUp, Problem, count_steps, fit, never
from finetune.training.memory import read_peak_memory_mb
from finetune.training.processes import rebuild_error, start_workers
from finetune.training.progress import narrate
from finetune.training.session import build_session
from finetune.training.shortage import naming_shortages

Losses = Callable[[nn.Module, Batch], torch.Tensor]


def train(folder: RunFolder, *, quiet: bool = False, gives_up: GivesUp = never) -> None:
    """Train what a run's folder describes, and write its `model/`; every worker process calls this."""
    recipe = load_recipe(folder.recipe)
    lock = load_json(folder.lock)
    task = load_task(load_json(folder.data / "task.json"))
    train_rows, validation_rows = (Examples.load(folder.examples(split)) for split in ("train", "validation"))
    with naming_shortages(folder.path), closing(build_session(recipe.train, folder.path, lock["precision"])) as session:
        is_main, device = session.accelerator.is_main_process, session.accelerator.device
        quiet = quiet or not is_main
        model, new, tokenizer = _build_model(folder, recipe, task, train_rows, device, quiet)
        pad_token_id = get_padding(model, tokenizer)
        compute_losses: Losses = partial(task.compute_losses, label_smoothing=recipe.train.label_smoothing)
        phase = ContrastivePhase(model, train_rows, pad_token_id) if recipe.train.few_shot == "contrastive" else None
        if phase:
            compute_losses = phase.compute_losses
        if recipe.train.distill:
            assert isinstance(task, TextClassification)  # the schema lets no other in
            compute_losses = partial(
                compute_distilled_losses, task, recipe.train.distill, label_smoothing=recipe.train.label_smoothing
            )
        budget = build_budget(model, recipe.adapter)
        count = count_parameters(model)
        problem = Problem(
            train=train_rows,
            validation=validation_rows,
            row_weights=task.compute_row_weights(train_rows, recipe.train.class_weights),
            compute_losses=add_penalty(compute_losses, budget),
            compute_metrics=partial(task.compute_metrics, names=_list_validation_metrics(recipe)),
            # Of several tasks, `<task>.<metric>`.
            is_larger_better=lambda name: is_larger_better(name.rpartition(".")[2]),
            compute_outputs=phase.compute_outputs if phase else task.compute_outputs,
            head=new,
            pad_token_id=pad_token_id,
            compares_rows=find_comparison(recipe) is not None,
            rate_factor=get_rate_factor(recipe.adapter),
            rule=budget,
            gives_up=gives_up,
        )
        narrate(quiet, str(count))
        state = fit(model, problem, recipe.train, session, quiet=quiet)
        if phase:
            phase.finish(model)
            session.log.write("head_fitted", few_shot=recipe.train.few_shot, rows=len(train_rows))
        if is_main:
            settings = {
                "task": task.to_config(),
                "temperature": 1.0,
                "temperatures": dict.fromkeys(recipe.tasks, 1.0),
                "max_length": recipe.model.max_length,
                "generate": recipe.evaluate.generate.model_dump(mode="json"),
            }
            if train_rows.token_type_ids is None:
                forget_token_types(tokenizer)
            save_model(model, tokenizer, folder.model, settings)
            prune_checkpoints(folder.checkpoints, 1, state.best_step)
            folder.update_status(
                state="trained",
                training={
                    "steps": state.step,
                    "best_step": state.best_step,
                    "seconds": round(state.seconds, 1),
                    "skipped_steps": state.skipped_steps,
                    "micro_steps": state.micro_steps,
                    "stopped_early": state.stopped_early,
                    "device": str(device),
                    "processes": session.accelerator.num_processes,
                    "peak_memory_mb": read_peak_memory_mb(),
                    "parameters": {"trained": count.trained, "total": count.total},
                    "rows": len(train_rows),
                },
            )
        session.accelerator.wait_for_everyone()


def _build_model(
    folder: RunFolder, recipe: Recipe, task: Task | MultiTask, train_rows: Examples, device: torch.device, quiet: bool
) -> tuple[nn.Module, list[str], Any]:
    """The model with its adapter on the device, as training starts with it, the names of the modules that start at
    random, and the tokenizer.

    Where there is a checkpoint, all that is trained comes from there, and nothing needs a start; but for the
    contrastive phase, which goes halfway back to it.
    """
    base = resolve_base(recipe.model.base)
    tokenizer = load_learned_tokenizer(folder) or load_tokenizer(base)
    model = task.build_model(base, recipe.model, tokenizer, recipe.train.seed)
    if recipe.model.quantize == "none":  # else it may fit the device only in fewer bits
        model.to(device)
    is_contrastive = recipe.train.few_shot == "contrastive"
    is_fresh = is_contrastive or not has_checkpoint(folder.checkpoints)
    keeps_head = recipe.train.distill is not None and has_head(base, list(task.labels or []))
    if is_fresh and not is_contrastive and not keeps_head:  # the head of a contrastive phase is fitted
        if task.labels:  # a pass over all of them
            narrate(quiet, f"starting the head from {len(train_rows):,} rows")
        task.start(model, train_rows, get_padding(model, tokenizer))
    new, head = task.list_modules(model)
    if recipe.model.quantize != "none":
        quantize_layers(model, find_targets(model, "all-linear", head, takes_conv1d=False), recipe.model.quantize)
    steps = count_steps(train_rows, recipe.train)
    model = attach_adapter(model, recipe.adapter, head, base.reference, task.peft_type, steps).to(device)
    pad_token_id = get_padding(model, tokenizer)
    if is_fresh:
        compute_losses = partial(task.compute_losses, label_smoothing=0.0)
        start_adapter(model, recipe.adapter, train_rows, pad_token_id, compute_losses)
    if is_fresh and recipe.model.adapters:
        narrate(quiet, start_from_adapters(model, recipe.model.adapters, head, task, train_rows, pad_token_id))
    # From scratch all is new: no part needs a rate of its own.
    return model, [] if base.reference == SCRATCH.reference else new, tokenizer


def _list_validation_metrics(recipe: Recipe) -> list[str]:
    watched = [recipe.train.early_stop.metric.rpartition(".")[2]] if recipe.train.early_stop else []
    return [name for name in dict.fromkeys([*recipe.evaluate.metrics, *watched]) if name != "loss"]


def train_in_workers(folder: RunFolder, processes: int, quiet: bool) -> None:
    """`train` in several processes on this machine.

    Raises:
        FinetuneError: the main worker's own.
        Interrupted: a signal came before the workers had begun to listen for it.
        ResourceError: another worker's error, which it has printed.
    """
    folder.update_status(error_type=None, error=None)
    code = start_workers("finetune.worker", [str(folder.path), "quiet" if quiet else "loud"], processes)
    status = folder.load_status()
    if status.get("error_type"):
        raise rebuild_error(status["error_type"], status["error"])
    if code == Interrupted.exit_code:
        raise Interrupted("stopped by a signal.")
    if code != 0:
        raise ResourceError(
            f"{folder.path}: {processes} workers must end well, got exit code {code}. Their own words are above."
        )


def search(folder: RunFolder, *, gives_up: GivesUp = never, quiet: bool = False) -> dict[str, Any]:
    """Train what a run's folder describes, or go on with it, and leave its test split closed.

    Args:
        folder: laid out by `lay_out`.
        gives_up: see `training.loop.Problem`.
        quiet: no progress bar.

    Returns:
        What status.json says of the training, and `validation`: the metrics of the weights that it kept.
    """
    if folder.load_status().get("state") != "trained":
        train(folder, quiet=quiet, gives_up=gives_up)
    return dict(folder.load_status()["training"]) | {"validation": read_validation(folder)}


def read_validation(folder: RunFolder) -> dict[str, Any]:
    """The validation metrics of the weights that a trained run saved, as measured while training."""
    best_step = folder.load_status()["training"]["best_step"]
    evaluations = [event for event in load_events(folder.events) if event["event"] == "evaluation"]
    kept = [event for event in evaluations if event["step"] == best_step] or evaluations
    return dict(kept[-1]["metrics"])
