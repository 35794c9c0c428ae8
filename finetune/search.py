"""Search over values of a recipe, judged on validation; the test split stays closed.

A trial is a run that is trained and not judged on test. Its state is in `runs/<name>/study.db`, so that a sweep that
was stopped or killed goes on in the middle of a trial, and comes to the same end as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import fitting, layout, runner
from finetune.artifact.run_folder import RUNS_FOLDER, SPLITS, RunFolder
from finetune.data.catalog import card_names
from finetune.errors import DivergedError, GateError, Interrupted, RecipeError, ResourceError, UsageError
from finetune.evaluation.metrics import is_larger_better
from finetune.recipe import Recipe, find_recipe, load_recipe
from finetune.recipe.files import build_disk_error, write_file_atomically
from finetune.recipe.loading import dump_values, read_document
from finetune.recipe.sweep import Choice, Sweep, Values, format_override, is_whole, load_sweep
from finetune.training.loop import derive_seed
from finetune.training.signals import name_stop

if TYPE_CHECKING:
    import optuna

STUDY = "study.db"
BEST = "best.yaml"
PROGRESS = 100
"""Steps of a trial as Optuna counts them, so that trials of different lengths are compared at the same share."""
WARM_UP = PROGRESS // 2 + 1
"""No trial is pruned in its first half: with a warm learning rate validation falls before it rises."""
COMPARED = 4
"""Finished trials before the first is pruned."""
DRAWN = 4
"""Trials drawn evenly before the sampler has a model, at least; a third of a long sweep, and no more than ten."""
DIGITS = 3
"""Significant digits of a drawn number: what lies between changes no score, and is hard to read."""


@dataclass(frozen=True)
class Trial:
    """One set of values that was tried."""

    number: int
    state: str
    """complete, pruned or failed."""
    values: dict[str, Choice]
    """Key of the recipe -> value."""
    score: float | None = None
    """The metric on validation of the weights that the run kept; None where there is none."""
    seconds: float | None = None
    error: str | None = None
    """Why it failed."""


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep."""

    folder: Path
    metric: str
    trials: list[Trial]
    best: Trial
    recipe: Path
    """The best trial as a recipe."""


@dataclass(frozen=True)
class _Plan:
    """What all trials of a sweep share."""

    section: Sweep
    metric: str
    recipe: Path
    overrides: list[str]
    """What the recipe is changed by in every trial."""
    folder: Path
    total: int
    quiet: bool
    tell: Callable[[str], None] = field(default=lambda _text: None)

    def load(self, values: Mapping[str, Choice]) -> Recipe:
        """The recipe with the values of a trial."""
        return load_recipe(self.recipe, self.override(values))

    def override(self, values: Mapping[str, Choice]) -> list[str]:
        """The changes of a trial as `--set` would make them."""
        return [*self.overrides, *(format_override(key, value) for key, value in values.items())]


def sweep(
    sweep: str | Path,
    overrides: Sequence[str] = (),
    *,
    trials: int | None = None,
    runs: str | Path | None = None,
    quiet: bool = False,
) -> SweepResult:
    """Search the values that a sweep declares, or go on with it.

    Args:
        sweep: a YAML file (see `recipe.sweep.Sweep`), or the name of one that ships with the toolkit.
        overrides: `key=value` pairs for the recipe in every trial.
        trials: how many in all; default the sweep's.
        runs: where runs are kept; default ./runs.
        quiet: no progress on standard error.

    Returns:
        Every trial, and the best one as a recipe in `runs/<name>/best.yaml`.

    Raises:
        RecipeError: problems in the sweep or its recipe.
        UsageError: another search under the same name, or a second process on this one.
        ResourceError: Optuna is not installed.
        GateError: no trial came to an end.
        Interrupted: stopped; the message says how to go on.
    """
    _check_optuna()
    path = find_recipe(sweep, "sweep")
    plan = _build_plan(path, overrides, trials, runs, quiet)
    command = _build_command(path, overrides, trials, runs)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise build_disk_error(plan.folder, error, needed_bytes=0) from error
    held = RunFolder(plan.folder).hold()
    try:
        study = _open_study(plan)
        while len(_list_ended(study)) < plan.total:
            _try_next(study, plan)
        return _conclude(study, plan, path)
    except Interrupted as error:
        raise Interrupted(f"{error} Go on with: {command}") from None
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped by {name_stop(error)}. Go on with: {command}") from None
    finally:
        held.release()


def _check_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise ResourceError(
            "sweep: optuna must be installed to search, got no such package. pip install optuna"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _build_plan(
    path: Path, overrides: Sequence[str], trials: int | None, runs: str | Path | None, quiet: bool
) -> _Plan:
    """Check everything that can be checked before the first trial, the rows included."""
    section, recipe_path = load_sweep(path, overrides)
    if twice := [key for key in section.search if any(given.split("=")[0].strip() == key for given in overrides)]:
        raise UsageError(f"--set {twice[0]}: must be left out where {path} searches it. Change its values there.")
    recipe = load_recipe(recipe_path, overrides)
    stop = recipe.train.early_stop
    metric = section.metric or (stop.metric if stop else recipe.evaluate.metrics[0])
    shared = list(overrides)
    if stop is None and metric not in (known := [*recipe.evaluate.metrics, "loss"]):
        raise RecipeError(
            f"{path}: metric: must be one of {', '.join(known)} where train.early_stop is null, got {metric!r}. "
            "Add it to the recipe's evaluate.metrics."
        )
    if stop and metric != stop.metric:  # the weights that are kept are those that the sweep judges by
        shared.append(format_override("train.early_stop.metric", metric))
    try:
        runner.check(recipe_path, shared)
    except RecipeError as error:
        raise RecipeError(str(error).replace("train.early_stop.metric:", f"{path}: metric:")) from error
    folder = Path(runs or RUNS_FOLDER) / section.name
    tell = (lambda _text: None) if quiet else (lambda text: sys.stderr.write(f"{text}\n"))
    return _Plan(section, metric, recipe_path, shared, folder, trials or section.trials, quiet, tell)  # type: ignore[arg-type]


def _build_command(path: Path, overrides: Sequence[str], trials: int | None, runs: str | Path | None) -> str:
    words = ["finetune", "sweep", str(path), *(word for given in overrides for word in ("--set", given))]
    words += ["--trials", str(trials)] if trials else []
    words += ["--runs", str(runs)] if runs else []
    return shlex.join(words)


# The study


def _open_study(plan: _Plan) -> optuna.Study:
    """The study of this search, made where there is none; trials that were cut off are put back in line."""
    import optuna

    file = plan.folder / STUDY
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{file}",
            study_name=plan.section.name,
            direction="maximize" if is_larger_better(plan.metric) else "minimize",
            # Not Hyperband: it stops most trials by their first scores, which say little here (see WARM_UP).
            pruner=optuna.pruners.MedianPruner(n_startup_trials=COMPARED, n_warmup_steps=WARM_UP),
            load_if_exists=True,
        )
    except Exception as error:  # SQLAlchemy's, of many types
        reason = str(error).strip().splitlines()[0][:200].rstrip(".")
        raise ResourceError(
            f"{file}: must be a study that Optuna reads, got '{reason}'. Restore it, or remove {plan.folder} to start "
            "anew."
        ) from error
    identity = _compute_identity(plan)
    if study.user_attrs.setdefault("identity", identity) != identity:
        raise UsageError(
            f"{plan.folder}: must go on with the search that it was started with, got other values, another recipe or "
            "metric. Give the sweep another name, or remove the folder."
        )
    study.set_user_attr("identity", identity)
    if not study.trials:
        study.enqueue_trial(_list_own_values(plan))
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        _tell(study, trial.number, trial.user_attrs)
        if "state" not in trial.user_attrs:
            reported = {str(step): value for step, value in trial.intermediate_values.items()}
            kept = {"run": trial.user_attrs.get("run"), "reported": reported}
            study.enqueue_trial(trial.params, user_attrs=kept)
    return study


def _compute_identity(plan: _Plan) -> str:
    search = {key: values.model_dump() for key, values in plan.section.search.items()}
    content = [plan.load({}).to_dict(), search, plan.metric, plan.section.seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _list_own_values(plan: _Plan) -> dict[str, Choice]:
    """The recipe's own values where they lie in the search: the first trial shows what there is to gain."""
    own = {}
    for key, values in plan.section.search.items():
        value: Any = plan.load({}).to_dict()
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if values.choices is not None:
            inside = value in values.choices
        else:
            inside = isinstance(value, int | float) and values.low <= value <= values.high  # type: ignore[operator]
        if inside:
            own[key] = value
    return own


def _list_ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that came to a verdict; one that was cut off has none, and is tried again."""
    return [trial for trial in study.trials if "state" in trial.user_attrs]


def _tell(study: optuna.Study, number: int, attributes: Mapping[str, Any]) -> None:
    """Close a trial in the study, as its attributes say; without a state it was cut off."""
    from optuna.trial import TrialState

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    state = states.get(attributes.get("state", ""), TrialState.FAIL)
    study.tell(number, attributes["score"] if state == TrialState.COMPLETE else None, state)


# A trial


def _try_next(study: optuna.Study, plan: _Plan) -> None:
    import optuna

    number = len(_list_ended(study))
    # A sampler for each trial, seeded by what came before: a sweep that goes on draws what it would have drawn.
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=max(DRAWN, min(10, plan.total // 3)), seed=derive_seed(plan.section.seed, number)
    )
    trial = study.ask()
    values = {key: _suggest(trial, key, choices) for key, choices in plan.section.search.items()}
    trial.set_user_attr("values", values)
    said = ", ".join(f"{key} {value}" for key, value in values.items())
    plan.tell(f"trial {number + 1} of {plan.total}: {said}")
    state, score, error = "failed", 0.0, None
    try:
        training = _train(trial, values, plan)
        state = "pruned" if training["stopped_early"] and trial.should_prune() else "complete"
        score = training["validation"][plan.metric]
        trial.set_user_attr("score", score)
        trial.set_user_attr("seconds", training["seconds"])
    except (RecipeError, DivergedError) as refused:  # values that do not go together: a finding, and no end
        error = str(refused)
        trial.set_user_attr("error", error)
    trial.set_user_attr("state", state)  # last: with it the rest is there
    _tell(study, trial.number, trial.user_attrs)
    if run := trial.user_attrs.get("run"):
        _remove_weights(RunFolder(plan.folder / run))
    plan.tell(f"  {state}: {error or f'{plan.metric} {score:.4f} on validation'}")


def _suggest(trial: optuna.Trial, key: str, values: Values) -> Choice:
    if values.choices is not None:
        chosen: Choice = trial.suggest_categorical(key, values.choices)
        return chosen
    low, high = values.list_ends(is_whole(key))
    if is_whole(key):
        return trial.suggest_int(key, low, high, log=values.log)  # type: ignore[arg-type]
    drawn = trial.suggest_float(key, low, high, log=values.log)  # type: ignore[arg-type]
    return min(max(float(f"{drawn:.{DIGITS}g}"), float(low)), float(high))  # type: ignore[arg-type]


def _train(trial: optuna.Trial, values: Mapping[str, Choice], plan: _Plan) -> dict[str, Any]:
    """Train one trial, or go on with it, as long as the pruner lets it."""
    recipe = plan.load(values)
    folder = RunFolder(plan.folder / (trial.user_attrs.get("run") or "-"))
    if not folder.status.exists():
        folder, _ = layout.lay_out(recipe, plan.recipe, plan.folder)
        trial.set_user_attr("run", folder.path.relative_to(plan.folder).as_posix())
    reported = {int(step): value for step, value in trial.user_attrs.get("reported", {}).items()}
    for step, value in reported.items():
        trial.report(value, step)

    def gives_up(share: float, metrics: Mapping[str, float]) -> bool:
        step = round(PROGRESS * share)
        if step not in reported:  # before the trial was cut off
            reported[step] = metrics[plan.metric]
            trial.report(reported[step], step)
        return share < 1 and bool(trial.should_prune())  # else a NumPy boolean, which no checkpoint holds

    training = fitting.search(folder, gives_up=gives_up, quiet=plan.quiet)
    if training["validation"][plan.metric] is None:
        raise DivergedError(f"{plan.metric} must be a number on validation, got none.")
    return training


def _remove_weights(folder: RunFolder) -> None:
    """Keep what tells about a trial, and not its weights and rows: the best one is a recipe away."""
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    shutil.rmtree(folder.model, ignore_errors=True)
    for split in SPLITS:
        folder.examples(split).unlink(missing_ok=True)


# The end


def _conclude(study: optuna.Study, plan: _Plan, path: Path) -> SweepResult:
    trials = [_describe(number, trial) for number, trial in enumerate(_list_ended(study), start=1)]
    finished = [trial for trial in trials if trial.state == "complete"]
    if not finished:
        raise GateError(
            f"{plan.folder}: at least one trial must come to an end, got {len(trials)} that failed; the last: "
            f"{trials[-1].error} Change the values of search in {path}."
        )
    sign = 1 if is_larger_better(plan.metric) else -1
    best = max(finished, key=lambda trial: (sign * (trial.score or 0.0), -trial.number))
    recipe = plan.folder / BEST
    write_file_atomically(recipe, _write_best(best, trials, plan).encode())
    return SweepResult(plan.folder, plan.metric, trials, best, recipe)


def _describe(number: int, trial: optuna.trial.FrozenTrial) -> Trial:
    attributes = trial.user_attrs
    names = ("state", "values", "score", "seconds", "error")
    return Trial(number, **{name: attributes.get(name) for name in names})  # type: ignore[arg-type]


def _write_best(best: Trial, trials: Sequence[Trial], plan: _Plan) -> str:
    """The recipe as it was written, with the best values in it."""
    values = read_document(plan.recipe, Recipe, plan.override(best.values)).values
    values["name"] = plan.section.name
    for task in values["tasks"].values():
        for key in ("data", "knowledge"):
            if task.get(key):
                task[key] = _relocate(task[key], plan)
    seed = plan.load(best.values).train.seed
    counts = [f"{sum(trial.state == state for trial in trials)} {state}" for state in ("complete", "pruned", "failed")]
    score = f"{plan.metric} {best.score:.4f} on validation, seed {seed}"
    own = _list_own_values(plan)
    first = trials[0] if trials[0].score is not None and own == trials[0].values else None
    lines = [
        f"Best of {len(trials)} trials ({', '.join(counts)}): {score}.",
        *([f"The recipe's own values: {plan.metric} {first.score:.4f}."] if first else []),
        f"Searched: {', '.join(best.values)}. The best of many flatters itself; the test split is still closed.",
    ]
    return "".join(f"# {line}\n" for line in lines) + dump_values(values)


def _relocate(data: str, plan: _Plan) -> str:
    """A path relative to the recipe's folder, as it is written in the sweep's."""
    beside = plan.recipe.parent / data
    if data in card_names() or data.startswith("hub:") or Path(data).expanduser().exists() or not beside.exists():
        return data
    return Path(os.path.relpath(beside, plan.folder)).as_posix()
