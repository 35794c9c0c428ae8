"""The story: recipe -> data -> model -> adapter -> train -> evaluate -> artifact.

`run` reads from top to bottom. Each phase leaves its result in the run's folder, so `resume` goes on from whatever is
there, and several processes need nothing but the folder's name to take part in training.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.artifact.assess import assess, assess_held_out
from finetune.artifact.load import load
from finetune.artifact.predictor import MultiPredictor, Predictor
from finetune.artifact.run_folder import RunFolder, find_run, load_json
from finetune.data.checks import findings_to_json
from finetune.errors import DataError, GateError, Interrupted, UsageError
from finetune.evaluation.gates import join_gates, raise_on_failed_gates
from finetune.fitting import train, train_in_workers
from finetune.layout import Ready, estimate_memory, lay_out, plan_weights, prepare_again, prepare_rows, settle_base
from finetune.recipe import find_recipe, load_recipe
from finetune.recipe.schema import Recipe
from finetune.recipe.together import find_comparison
from finetune.tasks import Recommendation
from finetune.tasks.preparation import Part, Prepared
from finetune.training.loop import count_steps
from finetune.training.processes import agree_on, is_main_process, world_size
from finetune.training.progress import JudgingProgress, narrate
from finetune.training.shortage import naming_shortages
from finetune.training.signals import name_stop


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

    def evaluate(
        self, data: str | Path | None = None, task: str | None = None, columns: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Score the test splits again (counted), or another held-out set."""
        return evaluate(self.folder.path, data, task, columns)

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
    _check_processes(loaded, processes)
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
        UsageError: no such run, it is finished already, or it cannot be trained in several processes.
    """
    folder = find_run(reference, finished=False)
    if folder.load_status().get("state") == "finished":
        raise UsageError(f"{folder.path}: must be a run that was stopped, got a finished one. Start a new run.")
    _check_processes(load_recipe(folder.recipe), processes)
    return _carry_out(folder, processes, quiet, open_test)


def check(recipe: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Check recipe, data and sizes; loads no weights and writes nothing.

    Returns:
        Findings, rows and tokens of each split, rows of each class in all splits together, steps, parameters and an
        estimate of the memory for training.
    """
    path = find_recipe(recipe)
    loaded = settle_base(load_recipe(path, overrides))
    base, prepared = prepare_rows(loaded, path.parent)
    count = plan_weights(loaded, (base, prepared))
    return {
        "recipe": str(path),
        "name": loaded.name,
        "base": {"reference": base.reference, "origin": base.origin},
        "tasks": {
            name: {
                "data": part.source.origin,
                "labels": part.task.labels,
                "classes": _count_classes(part),
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
        "memory_mb": round(estimate_memory(loaded, (base, prepared), count) / 2**20),  # activations come on top
    }


def evaluate(
    reference: str | Path,
    data: str | Path | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score a finished run again: on its test split (the opening is counted), or on another held-out set.

    Args:
        reference: the run.
        data: a card, path or Hub reference with the same columns; None for the run's own test split.
        task: whose rows the data are; needed where the run has several tasks.
        columns: role -> column of the data, where they are not called as in the recipe.

    Returns:
        The scores, as in evaluation/test.json; of the test splits of several tasks, task name -> scores.

    Raises:
        UsageError: no such run, no such task, or a task that was not said.
    """
    folder = find_run(reference)
    lock = folder.hold()
    try:
        recipe = load_recipe(folder.recipe)
        try:
            base, prepared = prepare_again(folder, recipe)
        except DataError as error:
            if data is None:
                raise
            raise _explain_own_rows(error, folder, recipe, data, task) from error
        if data is None:
            return take_only(assess(folder, recipe, prepared, base))
        return assess_held_out(folder, recipe, prepared, base, _settle_task(folder, task), str(data), columns or {})
    finally:
        lock.release()


def _explain_own_rows(
    error: DataError, folder: RunFolder, recipe: Recipe, data: str | Path, task: str | None
) -> DataError:
    """Whoever asked for other rows is told which are missing."""
    alone = f"finetune evaluate --model {folder.path} --data {data}{f' --task {task}' if task else ''}"
    is_alone = not any(section.type == Recommendation.type for section in recipe.tasks.values())
    return DataError(
        f"{folder.path}: must find the rows that it was trained on, too, to fit baselines and to see whether {data}"
        f" repeats any, got: {error} Put them back{f', or score the model without them: {alone}' if is_alone else '.'}"
    )


def _count_classes(part: Part) -> dict[str, int] | None:
    """Class -> its rows in all splits, the largest first; None for a task without classes."""
    if part.task.labels is None:
        return None
    counts = Counter(row.values.get("label") for rows in part.splits.values() for row in rows)
    return dict(sorted(((label, counts[label]) for label in part.task.labels), key=lambda pair: -pair[1]))


def _carry_out(folder: RunFolder, processes: int, quiet: bool, open_test: bool, ready: Ready | None = None) -> Run:
    """Train and judge, keeping status.json true whatever happens."""
    if not is_main_process():
        if agree_on(str) != "trained":
            train(folder, quiet=True)
        return Run(folder)
    held = folder.hold()
    try:
        recipe = load_recipe(folder.recipe)
        # Before training, so that rows that changed since the start cost no time.
        base, prepared = ready or prepare_again(folder, recipe)
        narrate(quiet, f"{folder.path}: {_count_rows(prepared)} from {prepared.origin}")
        if agree_on(lambda: str(folder.load_status().get("state"))) != "trained":
            folder.update_status(state="training", pid=os.getpid())
            if processes > 1 and world_size() == 1:
                train_in_workers(folder, processes, quiet)
            else:
                train(folder, quiet=quiet)
        if not open_test:
            return Run(folder)
        narrate(
            quiet, f"judging: {', '.join(recipe.evaluate.baselines) or 'no baselines'}, bootstrap intervals, report"
        )
        with naming_shortages(folder.path), JudgingProgress(quiet) as progress:
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


def _check_processes(recipe: Recipe, processes: int) -> None:
    """Several processes share each batch, and some losses need it whole."""
    started = max(processes, world_size())
    if started > 1 and (what := find_comparison(recipe)):
        raise UsageError(
            f"processes: must be 1 with {what}, which compares the rows of a batch, got {started}: each would see a "
            "part of them. Train in one process."
        )


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
