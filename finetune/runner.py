"""The story: recipe -> data -> model -> adapter -> train -> evaluate -> artifact.

`run` reads from top to bottom. Each phase leaves its result in the run's folder, so `resume` goes on from whatever is
there, and several processes need nothing but the folder's name to take part in training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.adapters.attach import ParameterCount, attach_adapter, count_parameters, plan_parameters
from finetune.artifact.assess import assess, assess_held_out
from finetune.artifact.load import Predictor, load
from finetune.artifact.run_folder import (
    RunFolder,
    create_run_folder,
    describe_host,
    find_run,
    is_run,
    load_json,
    save_json,
)
from finetune.artifact.save import save_model
from finetune.data.batches import Examples
from finetune.data.checks import findings_to_json
from finetune.errors import DataError, GateError, Interrupted, ResourceError, UsageError
from finetune.evaluation.gates import raise_on_failed_gates
from finetune.evaluation.metrics import is_larger_better
from finetune.evaluation.scoring import check_early_stop, check_section
from finetune.models.base import SCRATCH, BaseModel, load_tokenizer, resolve_base
from finetune.models.classifier import get_padding
from finetune.recipe import dump_recipe, find_recipe, load_recipe
from finetune.recipe.files import write_file_atomically
from finetune.recipe.schema import Recipe
from finetune.tasks import TASKS
from finetune.tasks.preparation import Prepared, prepare
from finetune.training.checkpoint import has_checkpoint, prune_checkpoints
from finetune.training.loop import Problem, count_steps, fit
from finetune.training.memory import read_peak_memory_mb
from finetune.training.precision import choose_precision
from finetune.training.processes import agree_on, is_main_process, rebuild_error, start_workers, world_size
from finetune.training.session import build_session

# A base at hand, and rows that passed every check.
Ready = tuple[BaseModel, Prepared]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: RunFolder

    @property
    def test(self) -> dict[str, Any]:
        """The content of evaluation/test.json."""
        return load_json(self.folder.evaluation / "test.json")

    @property
    def task_type(self) -> str:
        """The problem shape, as in the recipe."""
        return str(load_json(self.folder.data / "task.json")["type"])

    def evaluate(self, data: str | None = None) -> dict[str, Any]:
        """Score the test split again (counted), or another held-out set."""
        return evaluate(self.folder.path, data)

    def load(self) -> Predictor:
        """The trained model."""
        return load(self.folder.path)


def run(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    runs: Path | None = None,
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
    loaded = settle_base(load_recipe(path, overrides))
    ready: list[Ready] = []

    def begin() -> str:
        ready.append(_prepare(loaded, path.parent))
        _plan_parameters(loaded, ready[0])  # what cannot be built leaves no folder
        return str(start(loaded, path, ready[0], runs).path)

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
        "data": prepared.source.origin,
        "base": {"reference": base.reference, "origin": base.origin},
        "labels": prepared.task.labels,
        "splits": {
            name: {"rows": len(rows), "tokens": int(prepared.examples[name].lengths.sum())}
            for name, rows in prepared.splits.items()
        },
        "findings": findings_to_json(prepared.findings),
        "parameters": {"trained": count.trained, "total": count.total},
        "steps": count_steps(prepared.examples["train"], loaded.train),
        # float32 weights, and for each trained one a gradient and AdamW's two moments; activations come on top.
        "memory_mb": round((4 * count.total + 12 * count.trained) / 2**20),
    }


def evaluate(reference: str | Path, data: str | None = None) -> dict[str, Any]:
    """Score a finished run again: on its test split (the opening is counted), or on another held-out set.

    Args:
        reference: the run.
        data: a card, path or Hub reference with the same columns; None for the run's own test split.

    Returns:
        The scores, as in evaluation/test.json.
    """
    folder = find_run(reference)
    lock = folder.hold()
    try:
        recipe = load_recipe(folder.recipe)
        base, prepared = _prepare_again(folder, recipe)
        if data is not None:
            return assess_held_out(folder, recipe, prepared, base, data)
        return assess(folder, recipe, prepared, base)
    finally:
        lock.release()


def start(recipe: Recipe, path: Path, ready: Ready, runs: Path | None) -> RunFolder:
    """Lay out the folder of a run whose data passed every check: recipe, rows, what a repetition needs."""
    base, prepared = ready
    folder = create_run_folder(recipe.name, dump_recipe(recipe), runs)
    write_file_atomically(folder.path / "recipe.yaml", path.read_bytes())
    write_file_atomically(folder.recipe, dump_recipe(recipe).encode())
    save_json(folder.data / "ids.json", {name: [row.id for row in rows] for name, rows in prepared.splits.items()})
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
            "data": {"name": prepared.source.name, "sha256": prepared.source.fingerprint},
        },
    )
    folder.update_status(state="started", recipe_folder=str(path.parent.resolve()))
    return folder


def train(folder: RunFolder, *, quiet: bool = False) -> None:
    """Train what a run's folder describes, and write its `model/`; every worker process calls this."""
    recipe = load_recipe(folder.recipe)
    lock = load_json(folder.lock)
    task = TASKS[recipe.task.type].from_config(load_json(folder.data / "task.json"))
    base = resolve_base(recipe.model.base)
    tokenizer = _load_tokenizer(folder) or task.build_tokenizer(base, [], recipe.model)
    train_rows, validation_rows = (Examples.load(folder.examples(split)) for split in ("train", "validation"))
    model = task.build_model(base, recipe.model, tokenizer, recipe.train.seed)
    pad_token_id = get_padding(model, tokenizer)
    if not has_checkpoint(folder.checkpoints):
        task.start(model, train_rows, pad_token_id)
    new, head = task.list_modules(model)
    new = [] if base.reference == SCRATCH.reference else new  # all is new: no part needs a rate of its own
    model = attach_adapter(model, recipe.adapter, head, base.reference, task.peft_type)
    count = count_parameters(model)
    problem = Problem(
        train=train_rows,
        validation=validation_rows,
        row_weights=task.compute_row_weights(train_rows, recipe.train.class_weights),
        compute_losses=lambda model, batch: task.compute_losses(model, batch, recipe.train.label_smoothing),
        compute_metrics=partial(task.compute_metrics, names=_list_validation_metrics(recipe)),
        is_larger_better=is_larger_better,
        compute_outputs=task.compute_outputs,
        head=new,
        pad_token_id=pad_token_id,
    )
    with closing(build_session(recipe.train, folder.path, lock["precision"])) as session:
        if session.accelerator.is_main_process and not quiet:
            _narrate(quiet, str(count))
        state = fit(model, problem, recipe.train, session, quiet=quiet)
        if session.accelerator.is_main_process:
            settings = {
                "task": task.to_config(),
                "temperature": 1.0,
                "max_length": recipe.model.max_length,
                "generate": recipe.evaluate.generate.model_dump(mode="json"),
            }
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


def _carry_out(folder: RunFolder, processes: int, quiet: bool, open_test: bool, ready: Ready | None = None) -> Run:
    """Train and judge, keeping status.json true whatever happens."""
    if not is_main_process():
        train(folder, quiet=True)
        return Run(folder)
    held = folder.hold()
    try:
        recipe = load_recipe(folder.recipe)
        # Before training, so that rows that changed since the start cost no time.
        base, prepared = ready or _prepare_again(folder, recipe)
        _narrate(quiet, f"{folder.path}: {_count_rows(prepared)} from {prepared.source.origin}")
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
        scored = assess(folder, recipe, prepared, base)
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
    except KeyboardInterrupt:
        folder.update_status(state="stopped", error="stopped by Ctrl-C")
        raise Interrupted(f"stopped by Ctrl-C. Go on with: finetune resume {folder.path}") from None
    except Exception as error:
        folder.update_status(state="failed", error=str(error))
        raise
    finally:
        held.release()


def _check_gates(folder: RunFolder, scored: dict[str, Any]) -> None:
    try:
        raise_on_failed_gates(scored["gates"])
    except GateError as error:
        raise GateError(f"{error}\n  Everything was written; see {folder.evaluation / 'report.html'}") from None


def _count_rows(prepared: Prepared) -> str:
    return ", ".join(f"{len(rows):,} {name}" for name, rows in prepared.splits.items()) + " rows"


def _narrate(quiet: bool, text: str) -> None:
    """Say what comes next, on standard error: long work must not look like no work."""
    if not quiet:
        sys.stderr.write(f"{text}\n")


def _list_validation_metrics(recipe: Recipe) -> list[str]:
    watched = [recipe.train.early_stop.metric] if recipe.train.early_stop else []
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
    task = TASKS[recipe.task.type]
    check_section(recipe.evaluate, task.scored_by)
    if recipe.train.early_stop:
        check_early_stop(recipe.train.early_stop.metric, task.scored_by)
    base = resolve_base(recipe.model.base)
    prepared = prepare(
        recipe.task,
        recipe.model,
        base,
        seed=recipe.train.seed,
        relative_to=recipe_folder,
        tokenizer=tokenizer,
    )
    return base, prepared


def _plan_parameters(recipe: Recipe, ready: Ready) -> ParameterCount:
    """Weights that would be trained, from shapes alone.

    Raises:
        RecipeError, ModelError: a model that cannot be built, or has nothing that the adapter could change.
    """
    base, prepared = ready
    model = prepared.task.build_shape(base, recipe.model, prepared.tokenizer)
    return plan_parameters(model, recipe.adapter, prepared.task.list_modules(model)[1])


def settle_base(recipe: Recipe) -> Recipe:
    """A recipe whose base is a run, with that run's model in its place: its name may mean another run tomorrow."""
    path = Path(recipe.model.base).expanduser()
    if not is_run(path):
        return recipe
    folder = str(find_run(path).model.resolve())
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": folder})})


def _load_tokenizer(folder: RunFolder) -> Any:
    """The tokenizer that a run learned at its start; None where it uses its base's."""
    path = folder.tokenizer
    return load_tokenizer(BaseModel(str(path), path, "this run")) if path.is_dir() else None


def _prepare_again(folder: RunFolder, recipe: Recipe) -> Ready:
    """The rows of a run, read anew and held against what it was started with.

    Raises:
        DataError: the data changed since.
    """
    recipe_folder = Path(folder.load_status().get("recipe_folder", "."))
    base, prepared = _prepare(recipe, recipe_folder, _load_tokenizer(folder))
    expected, found = load_json(folder.lock)["data"]["sha256"], prepared.source.fingerprint
    if expected != found:
        raise DataError(
            f"{prepared.source.origin}: must be the data that {folder.name} was started with (sha256 {expected[:12]}), "
            f"got other rows (sha256 {found[:12]}). Restore the file, or start a new run."
        )
    return base, prepared
