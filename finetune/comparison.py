"""A fair comparison: the same data, seeds and tuning budget for each candidate, and one page with what came out.

Every run is the toolkit's own command in a process of its own: its peak memory is its own, and a crash stays there.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import errors
from finetune.artifact.candidates import Candidate, Look, build_results
from finetune.artifact.compare_runs import compare_runs
from finetune.artifact.run_folder import RUNS_FOLDER, RunFolder, load_json, save_json
from finetune.errors import DataError, FinetuneError, GateError, Interrupted, RecipeError, UsageError
from finetune.evaluation.comparison_page import write_page
from finetune.evaluation.metrics import is_larger_better
from finetune.evaluation.wording import decimals_of, format_number, name_of
from finetune.fitting import read_validation
from finetune.layout import settle_base, settle_splits
from finetune.recipe import load_recipe
from finetune.recipe.comparison import LoadedComparison, Trial, load_comparison
from finetune.recipe.files import build_disk_error
from finetune.recipe.schema import Recipe
from finetune.training.processes import run_command

RESULTS, PAGE = "results.json", "comparison.html"

Execute = Callable[[Sequence[str]], None]
"""Carries out a `finetune` command; raises FinetuneError where it fails."""


def compare(
    what: str | Path | Sequence[str | Path], *, runs: str | Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Compare the candidates of a comparison file, or finished runs with each other.

    Args:
        what: a comparison file or its shipped name; or a list of runs, held against the first.
        runs: where runs are kept; default ./runs. The comparison's lie in a folder of its name.
        quiet: no line for each run.

    Returns:
        For a file what is in results.json; candidates that failed, and what they said, are in "failed". For runs see
        `finetune.artifact.compare_runs.compare_runs`.

    Raises:
        RecipeError, UsageError: what is compared cannot be meant.
        Interrupted: stopped; the same call goes on.
    """
    if isinstance(what, str | Path):
        return compare_candidates(what, runs=runs, quiet=quiet)
    return compare_runs(what)


def compare_candidates(
    name_or_path: str | Path, *, runs: str | Path | None = None, quiet: bool = False, execute: Execute | None = None
) -> dict[str, Any]:
    """Train, choose, judge and compare the candidates of a comparison file; what is there already is not done again.

    Args:
        name_or_path, runs, quiet: as in `compare`.
        execute: carries out the command of a run; default a process of its own.
    """
    loaded = load_comparison(name_or_path)
    root = Path(runs or RUNS_FOLDER) / loaded.section.name
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise build_disk_error(root, error, needed_bytes=0) from error
    work = _Work(loaded, root, quiet, execute or run_alone)
    held = RunFolder(root).hold()
    try:
        tried = [work.try_candidate(name) for name in loaded.section.candidates]
        results = build_results(loaded.section, loaded.recipe_path.name, tried)
        save_json(root / RESULTS, results)
        write_page(root / PAGE, results)
    except (Interrupted, KeyboardInterrupt):
        place = f" --runs {runs}" if runs else ""
        raise Interrupted(
            f"stopped; what is done is kept. Go on with: finetune compare {name_or_path}{place}"
        ) from None
    finally:
        held.release()
    return results | {"page": str(root / PAGE)}


def run_alone(arguments: Sequence[str]) -> None:
    """Carry out a `finetune` command in a process of its own.

    Raises:
        FinetuneError: it failed; the message and the exit code are its own.
    """
    code, out, err = run_command([*arguments, "--json"])
    if code == 0:
        return
    try:
        words = str(json.loads(out)["error"])
    except (ValueError, LookupError, TypeError):
        last = (err.strip().splitlines() or ["it said nothing"])[-1]
        words = f"{arguments[0]}: the process must end well, got exit code {code}: {last}"
        words += ". Is there enough memory?" if code < 0 else ""
    kinds = (errors.UsageError, errors.DataError, errors.GateError, errors.ResourceError, errors.Interrupted)
    kind = next((kind for kind in kinds if kind.exit_code == code), FinetuneError)
    raise kind(words)


@dataclass(frozen=True)
class _Work:
    """The runs of a comparison: which are there, and which are still to do."""

    loaded: LoadedComparison
    root: Path
    quiet: bool
    execute: Execute

    def try_candidate(self, name: str) -> Candidate:
        """Choose the learning rate on validation with the first seed, then judge one run for each seed."""
        section = self.loaded.section
        rates, seeds = section.list_rates(name), section.seeds
        recipe = self.loaded.build_trial(name, rates[0], seeds[0]).recipe
        looks = list(self._look_at(name, rates, seeds[0]))
        watched = _choose_metric(recipe, [look.metrics for look in looks])
        best = _choose(looks, watched)
        if best is None:
            return Candidate(name, recipe, looks, watched, error=looks[0].error)
        runs: list[RunFolder] = []
        for seed in seeds:
            trial = self.loaded.build_trial(name, best.rate, seed)
            try:
                runs.append(self._carry_out(trial, judge=True))
            except Interrupted:
                raise
            except FinetuneError as error:
                self._say(trial, f"failed: {_join(error)}")
                return Candidate(name, recipe, looks, watched, best.rate, runs, f"seed {seed}: {error}")
            self._say(trial, _describe_test(runs[-1]))
        return Candidate(name, recipe, looks, watched, best.rate, runs)

    def _look_at(self, name: str, rates: Sequence[float], seed: int) -> Iterator[Look]:
        """Train with each rate; the test split stays closed, unless there is nothing to choose."""
        for rate in rates:
            trial = self.loaded.build_trial(name, rate, seed)
            try:
                run = self._carry_out(trial, judge=len(rates) == 1)
            except Interrupted:
                raise
            except FinetuneError as error:
                self._say(trial, f"failed: {_join(error)}")
                yield Look(rate, error=str(error))
                if isinstance(error, UsageError | RecipeError | DataError):
                    return  # it was refused, whatever the rate
                continue
            look = Look(rate, run, read_validation(run))
            metric = _choose_metric(trial.recipe, [look.metrics])
            value = format_number(look.metrics.get(metric), decimals_of(metric))
            self._say(trial, f"validation {name_of(metric)} {value}")
            yield look

    def _carry_out(self, trial: Trial, *, judge: bool) -> RunFolder:
        """The run of a trial, trained or judged; only what is missing is done."""
        run = self._find(trial)
        state = run.load_status()["state"] if run else None
        if run and (state == "finished" or (state == "trained" and not judge)):
            return run
        closed = [] if judge else ["--no-test"]
        try:
            if run:
                self.execute(["resume", str(run.path), *closed])
            else:
                changes = [word for override in trial.overrides for word in ("--set", override)]
                self.execute(["run", str(self.loaded.recipe_path), "--runs", str(self.root), *closed, *changes])
        except GateError:
            found = self._find(trial)
            if found is None or found.load_status()["state"] != "finished":  # diverged, not judged
                raise
        run = self._find(trial)
        if run is None:
            raise FinetuneError(f"{self.root / trial.recipe.name}: the run must be there after its command, got none.")
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # nothing resumes from them any more, and there are many
        return run

    def _find(self, trial: Trial) -> RunFolder | None:
        """The latest run of just this recipe."""
        expected = settle_base(trial.recipe)  # full tuning does not write down the rank that it was given
        for path in sorted((self.root / trial.recipe.name).glob("*"), reverse=True):
            run = RunFolder(path)
            try:
                if not run.status.exists():
                    continue
                found = load_recipe(run.recipe)
                ways = {name: task.split.by for name, task in found.tasks.items()}
                if found.to_dict() == settle_splits(expected, ways).to_dict():
                    return run
            except RecipeError:  # of another version of the toolkit
                continue
        return None

    def _say(self, trial: Trial, words: str) -> None:
        """A line for each run, on standard error."""
        if not self.quiet:
            names = list(self.loaded.section.candidates)
            place = f"{names.index(trial.candidate) + 1} of {len(names)}"
            sys.stderr.write(f"{place}  {trial.candidate}, rate {trial.rate:g}, seed {trial.seed}: {words}\n")


def _choose_metric(recipe: Recipe, known: Sequence[Mapping[str, Any]]) -> str:
    """What a rate is chosen by: the first metric of the recipe that is known while training, else the loss."""
    names = set().union(*known)
    return next((name for name in recipe.evaluate.metrics if name in names), "loss")


def _choose(looks: Sequence[Look], metric: str) -> Look | None:
    """The best look on validation; of equals the one with the lower loss, then the lower rate."""
    sign = 1.0 if is_larger_better(metric) else -1.0

    def rank(look: Look) -> tuple[float, float, float]:
        value, loss = look.metrics.get(metric), look.metrics.get("loss")
        # None stands for what was not finite.
        return (
            -math.inf if value is None else sign * value,
            -math.inf if loss is None else -loss,
            -look.rate,
        )

    return max((look for look in looks if look.run), key=rank, default=None)


def _join(error: FinetuneError) -> str:
    """A message of several lines in one."""
    return " ".join(str(error).split())


def _describe_test(run: RunFolder) -> str:
    metric, score = next(iter(load_json(run.evaluation / "test.json")["metrics"].items()))
    return f"test {name_of(metric)} {format_number(score['value'], decimals_of(metric))}"
