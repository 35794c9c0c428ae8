"""The story: recipe -> data -> model -> adapter -> train -> evaluate -> artifact.

`run` reads from top to bottom. Each phase leaves its result in the run's folder, so `resume` goes on from whatever is
there, and several processes need nothing but the folder's name to take part in training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters.attach import (
    ParameterCount,
    attach_adapter,
    check_adapter,
    count_parameters,
    plan_parameters,
)
from finetune.adapters.budget import add_penalty, build_budget, get_rate_factor, start_adapter
from finetune.adapters.targets import find_targets
from finetune.artifact.assess import assess, assess_held_out, choose_evaluation
from finetune.artifact.load import load
from finetune.artifact.predictor import MultiPredictor, Predictor
from finetune.artifact.run_folder import (
    RunFolder,
    create_run_folder,
    describe_host,
    find_run,
    is_run,
    load_json,
    save_json,
)
from finetune.artifact.save import forget_token_types, save_model
from finetune.artifact.starting import check_adapters, compute_fingerprints, settle_adapters, start_from_adapters
from finetune.artifact.teacher import ask_teacher
from finetune.data.batches import Batch, Examples
from finetune.data.checks import findings_to_json
from finetune.errors import DataError, GateError, Interrupted, ResourceError, UsageError
from finetune.evaluation.gates import join_gates, raise_on_failed_gates
from finetune.evaluation.metrics import is_larger_better
from finetune.evaluation.scoring import check_early_stop, check_section
from finetune.models.base import SCRATCH, BaseModel, load_tokenizer, resolve_base
from finetune.models.classifier import get_padding, has_head
from finetune.models.quantization import check_quantization, quantize_layers
from finetune.recipe import dump_recipe, find_recipe, load_recipe
from finetune.recipe.files import write_file_atomically
from finetune.recipe.schema import Recipe
from finetune.tasks import TASKS, MultiTask, Recommendation, Task, TextClassification, load_task
from finetune.tasks.contrastive import ContrastivePhase, check_rows_per_class
from finetune.tasks.distillation import compute_distilled_losses
from finetune.tasks.preparation import Prepared, prepare
from finetune.training.checkpoint import has_checkpoint, prune_checkpoints
from finetune.training.events import load_events
from finetune.training.loop import GivesUp, Problem, count_steps, fit, never
from finetune.training.memory import read_peak_memory_mb
from finetune.training.precision import choose_precision
from finetune.training.processes import agree_on, is_main_process, rebuild_error, start_workers, world_size
from finetune.training.progress import JudgingProgress
from finetune.training.session import build_session
from finetune.training.signals import name_stop

# A base at hand, and rows that passed every check.
Ready = tuple[BaseModel, Prepared]
Losses = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: RunFolder

    @property
    def tests(self) -> dict[str, dict[str, Any]]:
        """Task name -> the content of its test.json."""
        return {name: load_json(folder / "test.json") for name, folder in self.folder.evaluations().items()}

    @property
    def test(self) -> dict[str, Any]:
        """The content of evaluation/test.json; `tests` where there are several tasks."""
        return take_only(self.tests)

    @property
    def task_type(self) -> str:
        """The problem shape, as in the recipe; `multi_task` where there are several."""
        return str(load_json(self.folder.data / "task.json")["type"])

    def evaluate(self, data: str | None = None, task: str | None = None) -> dict[str, Any]:
        """Score the test splits again (counted), or another held-out set."""
        return evaluate(self.folder.path, data, task)

    def load(self) -> Predictor | MultiPredictor:
        """The trained model."""
        return load(self.folder.path)


def run(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    runs: str | Path | None = None,
    quiet: bool = False,
    open_test: bool = True,
) -> Run:
    """Run a recipe from its data to a judged model.

    Args:
        recipe: a YAML file, or the name of a recipe that ships with the toolkit.
        overrides: `key=value` pairs such as `train.epochs=1`, checked like the file.
        processes: workers for training; 1 per GPU, or several on a CPU.
        runs: where runs are kept; default ./runs.
        quiet: no progress bars.
        open_test: False stops after training: nothing is scored on the test split before `resume`.

    Returns:
        The finished run, or the trained one. Under `accelerate launch` every process returns it.

    Raises:
        FinetuneError: see `finetune.errors`; a missed gate is raised after everything was written.
    """
    path = find_recipe(recipe)
    loaded = load_recipe(path, overrides)
    ready: list[Ready] = []

    def begin() -> str:
        folder, made_ready = lay_out(loaded, path, runs)
        ready.append(made_ready)
        return str(folder.path)

    folder = RunFolder(Path(agree_on(begin)))  # one process checks and encodes; the others are told the folder
    return _carry_out(folder, processes, quiet, open_test, ready[0] if ready else None)


def resume(reference: str | Path, *, processes: int = 1, quiet: bool = False, open_test: bool = True) -> Run:
    """Go on with a run that was stopped or failed, from its last good checkpoint; `open_test` as in `run`.

    Raises:
        UsageError: no such run, or it is finished already.
    """
    folder = find_run(reference, finished=False)
    if folder.load_status().get("state") == "finished":
        raise UsageError(f"{folder.path}: must be a run that was stopped, got a finished one. Start a new run.")
    return _carry_out(folder, processes, quiet, open_test)


def check(recipe: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Check recipe, data and sizes; loads no weights and writes nothing.

    Returns:
        Findings, rows and tokens of each split, steps, parameters and an estimate of the memory for training.
    """
    path = find_recipe(recipe)
    loaded = settle_base(load_recipe(path, overrides))
    base, prepared = _prepare(loaded, path.parent)
    count = _plan_parameters(loaded, (base, prepared))
    return {
        "recipe": str(path),
        "name": loaded.name,
        "base": {"reference": base.reference, "origin": base.origin},
        "tasks": {
            name: {
                "data": part.source.origin,
                "labels": part.task.labels,
                "splits": {
                    split: {"rows": len(rows), "tokens": int(part.examples[split].lengths.sum())}
                    for split, rows in part.splits.items()
                },
            }
            for name, part in prepared.parts.items()
        },
        "findings": findings_to_json(prepared.findings),
        "parameters": {"trained": count.trained, "total": count.total},
        "steps": count_steps(prepared.examples["train"], loaded.train),
        # float32 weights, and for each trained one a gradient and AdamW's two moments; activations come on top.
        "memory_mb": round((4 * count.total + 12 * count.trained) / 2**20),
    }


def evaluate(reference: str | Path, data: str | None = None, task: str | None = None) -> dict[str, Any]:
    """Score a finished run again: on its test split (the opening is counted), or on another held-out set.

    Args:
        reference: the run.
        data: a card, path or Hub reference with the same columns; None for the run's own test split.
        task: whose rows the data are; needed where the run has several tasks.

    Returns:
        The scores, as in evaluation/test.json; of the test splits of several tasks, task name -> scores.

    Raises:
        UsageError: no such run, no such task, or a task that was not said.
    """
    folder = find_run(reference)
    lock = folder.hold()
    try:
        recipe = load_recipe(folder.recipe)
        base, prepared = prepare_again(folder, recipe)
        if data is None:
            return take_only(assess(folder, recipe, prepared, base))
        return assess_held_out(folder, recipe, prepared, base, _settle_task(folder, task), data)
    finally:
        lock.release()


def start(recipe: Recipe, text: bytes, recipe_folder: Path, ready: Ready, runs: str | Path | None) -> RunFolder:
    """Lay out the folder of a run whose data passed every check: recipe, rows, what a repetition needs.

    Args:
        recipe: resolved.
        text: the recipe as it was given.
        recipe_folder: for its relative paths.
        ready: its base and its rows.
        runs: where runs are kept.
    """
    base, prepared = ready
    folder = create_run_folder(recipe.name, dump_recipe(recipe), runs)
    write_file_atomically(folder.path / "recipe.yaml", text)
    write_file_atomically(folder.recipe, dump_recipe(recipe).encode())
    ids = {
        name: {split: [row.id for row in rows] for split, rows in part.splits.items()}
        for name, part in prepared.parts.items()
    }
    save_json(folder.data / "ids.json", ids)
    save_json(folder.data / "findings.json", findings_to_json(prepared.findings))
    save_json(folder.data / "task.json", prepared.task.to_config())
    if base.reference == SCRATCH.reference:
        prepared.tokenizer.save_pretrained(folder.tokenizer)
    for split, examples in prepared.examples.items():
        examples.save(folder.examples(split))
    save_json(
        folder.lock,
        describe_host()
        | {
            "seed": recipe.train.seed,
            "precision": choose_precision(recipe.train.precision),
            "base": {"reference": base.reference, "origin": base.origin, "sha256": base.compute_fingerprint()},
            "adapters": compute_fingerprints(recipe.model.adapters),
            "data": {"name": prepared.source_name, "sha256": prepared.fingerprint},
        },
    )
    folder.update_status(state="started", recipe_folder=str(recipe_folder.resolve()))
    return folder


def lay_out(recipe: Recipe, path: Path, runs: str | Path | None) -> tuple[RunFolder, Ready]:
    """Prepare the data of a recipe and lay out the folder of its run.

    Args:
        recipe: resolved.
        path: its file, for relative paths.
        runs: where runs are kept.
    """
    recipe = settle_base(recipe)
    ready = _prepare(recipe, path.parent)
    _plan_parameters(recipe, ready)  # what cannot be built leaves no folder
    if recipe.train.distill:
        ready = ready[0], ask_teacher(ready[1], recipe.train.distill)
    return start(recipe, path.read_bytes(), path.parent, ready, runs), ready


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


def train(folder: RunFolder, *, quiet: bool = False, gives_up: GivesUp = never) -> None:
    """Train what a run's folder describes, and write its `model/`; every worker process calls this."""
    recipe = load_recipe(folder.recipe)
    lock = load_json(folder.lock)
    task = load_task(load_json(folder.data / "task.json"))
    train_rows, validation_rows = (Examples.load(folder.examples(split)) for split in ("train", "validation"))
    model, new, tokenizer = _build_model(folder, recipe, task, train_rows, quiet)
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
        is_larger_better=lambda name: is_larger_better(name.rpartition(".")[2]),  # of several tasks, `<task>.<metric>`
        compute_outputs=phase.compute_outputs if phase else task.compute_outputs,
        head=new,
        pad_token_id=pad_token_id,
        rate_factor=get_rate_factor(recipe.adapter),
        rule=budget,
        gives_up=gives_up,
    )
    with closing(build_session(recipe.train, folder.path, lock["precision"])) as session:
        if session.accelerator.is_main_process and not quiet:
            _narrate(quiet, str(count))
        state = fit(model, problem, recipe.train, session, quiet=quiet)
        if phase:
            phase.finish(model)
            session.log.write("head_fitted", few_shot=recipe.train.few_shot, rows=len(train_rows))
        if session.accelerator.is_main_process:
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
                    "device": str(session.accelerator.device),
                    "processes": session.accelerator.num_processes,
                    "peak_memory_mb": read_peak_memory_mb(),
                    "parameters": {"trained": count.trained, "total": count.total},
                    "rows": len(train_rows),
                },
            )
        session.accelerator.wait_for_everyone()


def _build_model(
    folder: RunFolder, recipe: Recipe, task: Task | MultiTask, train_rows: Examples, quiet: bool
) -> tuple[nn.Module, list[str], Any]:
    """The model with its adapter, as training starts with it, the names of the modules that start at random, and the
    tokenizer.

    Where there is a checkpoint, all that is trained comes from there, and nothing needs a start; but for the
    contrastive phase, which goes halfway back to it.
    """
    base = resolve_base(recipe.model.base)
    tokenizer = _load_tokenizer(folder) or load_tokenizer(base)
    model = task.build_model(base, recipe.model, tokenizer, recipe.train.seed)
    is_contrastive = recipe.train.few_shot == "contrastive"
    is_fresh = is_contrastive or not has_checkpoint(folder.checkpoints)
    keeps_head = recipe.train.distill is not None and has_head(base, list(task.labels or []))
    if is_fresh and not is_contrastive and not keeps_head:  # the head of a contrastive phase is fitted
        task.start(model, train_rows, get_padding(model, tokenizer))
    new, head = task.list_modules(model)
    if recipe.model.quantize != "none":
        quantize_layers(model, find_targets(model, "all-linear", head), recipe.model.quantize)
    steps = count_steps(train_rows, recipe.train)
    model = attach_adapter(model, recipe.adapter, head, base.reference, task.peft_type, steps)
    pad_token_id = get_padding(model, tokenizer)
    if is_fresh:
        compute_losses = partial(task.compute_losses, label_smoothing=0.0)
        start_adapter(model, recipe.adapter, train_rows, pad_token_id, compute_losses)
    if is_fresh and recipe.model.adapters:
        _narrate(quiet, start_from_adapters(model, recipe.model.adapters, head, task, train_rows, pad_token_id))
    # From scratch all is new: no part needs a rate of its own.
    return model, [] if base.reference == SCRATCH.reference else new, tokenizer


def _carry_out(folder: RunFolder, processes: int, quiet: bool, open_test: bool, ready: Ready | None = None) -> Run:
    """Train and judge, keeping status.json true whatever happens."""
    if not is_main_process():
        train(folder, quiet=True)
        return Run(folder)
    held = folder.hold()
    try:
        recipe = load_recipe(folder.recipe)
        # Before training, so that rows that changed since the start cost no time.
        base, prepared = ready or prepare_again(folder, recipe)
        _narrate(quiet, f"{folder.path}: {_count_rows(prepared)} from {prepared.origin}")
        if folder.load_status().get("state") != "trained":
            folder.update_status(state="training", pid=os.getpid())
            if processes > 1 and world_size() == 1:
                _train_in_workers(folder, processes, quiet)
            else:
                train(folder, quiet=quiet)
        if not open_test:
            return Run(folder)
        _narrate(
            quiet, f"judging: {', '.join(recipe.evaluate.baselines) or 'no baselines'}, bootstrap intervals, report"
        )
        with JudgingProgress(quiet) as progress:
            scored = assess(folder, recipe, prepared, base, progress.track)
        folder.update_status(state="finished", error=None)
        _check_gates(folder, scored)
        return Run(folder)
    except GateError as error:
        if folder.load_status().get("state") != "finished":  # diverged, not judged
            folder.update_status(state="failed", error=str(error))
        raise
    except Interrupted as error:
        folder.update_status(state="stopped", error=str(error))
        raise Interrupted(f"{error} Go on with: finetune resume {folder.path}") from None
    except KeyboardInterrupt as error:
        stopped = f"stopped by {name_stop(error)}"
        folder.update_status(state="stopped", error=stopped)
        raise Interrupted(f"{stopped}. Go on with: finetune resume {folder.path}") from None
    except Exception as error:
        folder.update_status(state="failed", error=str(error))
        raise
    finally:
        held.release()


def _check_gates(folder: RunFolder, scored: Mapping[str, dict[str, Any]]) -> None:
    try:
        raise_on_failed_gates(join_gates(scored))
    except GateError as error:
        reports = ", ".join(str(place / "report.html") for place in folder.evaluations().values())
        raise GateError(f"{error}\n  Everything was written; see {reports}", folder.path) from None


def _count_rows(prepared: Prepared) -> str:
    counts = {
        name: ", ".join(f"{len(rows):,} {split}" for split, rows in part.splits.items())
        + (" people" if isinstance(part.task, Recommendation) else " rows")
        for name, part in prepared.parts.items()
    }
    return "; ".join(f"{name}: {count}" if len(counts) > 1 else count for name, count in counts.items())


def take_only(values: dict[str, Any]) -> dict[str, Any] | Any:
    """What belongs to the only task; what belongs to each of several, by name."""
    return next(iter(values.values())) if len(values) == 1 else values


def _settle_task(folder: RunFolder, task: str | None) -> str:
    names = list(folder.evaluations())
    if task is None and len(names) == 1:
        return names[0]
    if task not in names:
        got = "none" if task is None else repr(task)
        raise UsageError(f"--task: must be one of {', '.join(names)}, got {got}.")
    return task


def _narrate(quiet: bool, text: str) -> None:
    """Say what comes next, on standard error: long work must not look like no work."""
    if not quiet:
        sys.stderr.write(f"{text}\n")


def _list_validation_metrics(recipe: Recipe) -> list[str]:
    watched = [recipe.train.early_stop.metric.rpartition(".")[2]] if recipe.train.early_stop else []
    return [name for name in dict.fromkeys([*recipe.evaluate.metrics, *watched]) if name != "loss"]


def _train_in_workers(folder: RunFolder, processes: int, quiet: bool) -> None:
    folder.update_status(error_type=None, error=None)
    code = start_workers("finetune.worker", [str(folder.path), "quiet" if quiet else "loud"], processes)
    status = folder.load_status()
    if status.get("error_type"):
        raise rebuild_error(status["error_type"], status["error"])
    if code != 0:
        raise ResourceError(
            f"{folder.path}: {processes} workers must end well, got exit code {code}. Their own words are above."
        )


def _prepare(recipe: Recipe, recipe_folder: Path, tokenizer: Any = None) -> Ready:
    kinds = {name: TASKS[task.type].scored_by for name, task in recipe.tasks.items()}
    for name, kind in kinds.items():
        check_section(choose_evaluation(recipe, name), kind)
    if recipe.train.early_stop:
        check_early_stop(recipe.train.early_stop.metric, kinds)
    check_quantization(recipe.model.quantize)
    base = resolve_base(recipe.model.base)
    prepared = prepare(
        recipe.tasks,
        recipe.model,
        base,
        seed=recipe.train.seed,
        relative_to=recipe_folder,
        tokenizer=tokenizer,
    )
    if recipe.train.few_shot == "contrastive":
        check_rows_per_class(prepared.examples["train"], list(prepared.task.labels or []))
    return base, prepared


def _plan_parameters(recipe: Recipe, ready: Ready) -> ParameterCount:
    """Weights that would be trained, from shapes alone.

    Raises:
        RecipeError, ModelError: a model that cannot be built, or has nothing that the adapter could change.
    """
    base, prepared = ready
    task = prepared.task
    model = task.build_shape(base, recipe.model, prepared.tokenizer)
    check_adapter(model, recipe.adapter, recipe.model.max_length)
    head = task.list_modules(model)[1]
    count = plan_parameters(model, recipe.adapter, head, task.peft_type)
    if recipe.model.adapters:
        check_adapters(model, recipe.adapter, head, base, recipe.model.adapters)
    return count


def settle_base(recipe: Recipe) -> Recipe:
    """A recipe with the models of the runs that it starts from: a name may mean another run tomorrow."""
    model = recipe.model.model_copy(update={"adapters": settle_adapters(recipe.model.adapters)})
    train = recipe.train
    if train.distill and is_run(Path(train.distill.teacher)):
        teacher = str(find_run(train.distill.teacher).model.resolve())
        train = train.model_copy(update={"distill": train.distill.model_copy(update={"teacher": teacher})})
    recipe = recipe.model_copy(update={"model": model, "train": train})
    path = Path(recipe.model.base).expanduser()
    if not is_run(path):
        return recipe
    folder = str(find_run(path).model.resolve())
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": folder})})


def _load_tokenizer(folder: RunFolder) -> Any:
    """The tokenizer that a run learned at its start; None where it uses its base's."""
    path = folder.tokenizer
    return load_tokenizer(BaseModel(str(path), path, "this run")) if path.is_dir() else None


def prepare_again(folder: RunFolder, recipe: Recipe) -> Ready:
    """The rows of a run, read anew and held against what it was started with.

    Raises:
        DataError: the data changed since.
    """
    base, prepared = _prepare(recipe, folder.recipe_folder, _load_tokenizer(folder))
    expected, found = load_json(folder.lock)["data"]["sha256"], prepared.fingerprint
    if expected != found:
        raise DataError(
            f"{prepared.origin}: must be the data that {folder.name} was started with (sha256 {expected[:12]}), "
            f"got other rows (sha256 {found[:12]}). Restore the file, or start a new run."
        )
    return base, prepared
