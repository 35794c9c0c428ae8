"""`finetune sweep`: validation decides, the test split stays closed, and a killed sweep comes to the same end."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import finetune
from finetune import fitting, layout, runner, search
from finetune.artifact.run_folder import RunFolder
from finetune.data.batches import Examples
from finetune.errors import DivergedError, GateError, RecipeError, ResourceError, UsageError
from finetune.recipe import load_recipe
from finetune.recipe.loading import read_document
from finetune.recipe.schema import Recipe
from finetune.training.events import load_events

SEARCH = """
search:
  train.learning_rate: {low: 1.0e-6, high: 0.02, log: true}
  adapter.rank: [4, 8]
"""
TRAIN = {"epochs": 4, "learning_rate": 1.0e-5}


def write_sweep(folder: Path, body: str = SEARCH, **keys: Any) -> Path:
    """A sweep beside the recipe that `write_recipe` makes."""
    head = {"sweep": 1, "name": "found", "recipe": "recipe.yaml", "metric": "macro_f1", "trials": 5, "seed": 2, **keys}
    path = folder / "sweep.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()) + body, encoding="utf-8")
    return path


def tell_apart(result: search.SweepResult) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.state, trial.values, trial.score) for trial in result.trials]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[..., Path]) -> dict[str, Any]:
    """A finished sweep, with what was read and judged on its way."""
    folder = tmp_path_factory.mktemp("swept")
    write_recipe(folder / "in", train=TRAIN)
    loaded: list[str] = []
    load = Examples.load.__func__  # type: ignore[attr-defined]

    def record(cls: type[Examples], path: Path) -> Examples:
        loaded.append(path.stem)
        return load(cls, path)

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("the test split was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "COMPARED", 1)
        patch.setattr(Examples, "load", classmethod(record))
        for name in ("assess", "assess_held_out"):
            patch.setattr(runner, name, refuse)
        result = finetune.sweep(write_sweep(folder / "in"), runs=str(folder / "runs"), quiet=True)
    return {"folder": folder, "result": result, "loaded": loaded}


def test_the_first_trial_has_the_recipes_own_values_and_the_best_the_largest_score(swept) -> None:
    result = swept["result"]
    assert result.folder == swept["folder"] / "runs" / "found"
    assert [trial.number for trial in result.trials] == [1, 2, 3, 4, 5]
    assert result.trials[0].values == {"train.learning_rate": 1e-5, "adapter.rank": 8}
    assert result.best.number > 1
    complete = [trial for trial in result.trials if trial.state == "complete"]
    assert result.best.score == max(trial.score for trial in complete)
    assert {trial.values["adapter.rank"] for trial in result.trials} == {4, 8}
    assert all(1e-6 <= trial.values["train.learning_rate"] <= 0.02 for trial in result.trials)
    assert len({trial.values["train.learning_rate"] for trial in result.trials}) == 5


def test_the_test_split_stays_closed(swept) -> None:
    assert set(swept["loaded"]) == {"train", "validation"}
    left = {path.name for path in (swept["folder"] / "runs").rglob("*") if path.is_file()}
    assert left & {"test.json", "validation.json", "predictions.parquet", "test.safetensors"} == set()
    assert "events.jsonl" in left


def test_weights_of_trials_are_not_kept(swept) -> None:
    assert list((swept["folder"] / "runs").rglob("*.safetensors")) == []


def test_a_trial_without_hope_is_pruned_in_its_second_half(swept) -> None:
    states = [trial.state for trial in swept["result"].trials]
    assert set(states) == {"complete", "pruned"}
    steps = {}
    for path in (swept["folder"] / "runs").rglob("status.json"):
        values = load_recipe(path.parent / "recipe.resolved.yaml").train.learning_rate
        evaluations = [event for event in load_events(path.parent / "events.jsonl") if event["event"] == "evaluation"]
        steps[values] = len(evaluations)
    for trial in swept["result"].trials:
        assert steps[trial.values["train.learning_rate"]] == (3 if trial.state == "pruned" else 4)


def test_the_best_recipe_finds_every_file_that_the_recipe_names(write_support_recipe, tmp_path) -> None:
    write_support_recipe(tmp_path / "in")
    sweep = write_sweep(tmp_path / "in", metric="mrr")
    plan = search._build_plan(sweep, [], None, tmp_path / "runs", quiet=True)
    best = search.Trial(1, "complete", {"adapter.rank": 4}, 0.5, 1.0, None)
    written = YAML().load(search._write_best(best, [best], plan))["tasks"]
    for task in ("answer", "rerank"):
        for key in ("data", "knowledge"):
            assert (plan.folder / written[task][key]).resolve().parent == tmp_path / "in"


def test_the_best_recipe_is_short_and_runs_to_the_score_that_was_found(swept, monkeypatch) -> None:
    result, folder = swept["result"], swept["folder"]
    text = result.recipe.read_text(encoding="utf-8")
    assert text.startswith("# Best of 5 trials (")
    assert f"macro_f1 {result.best.score:.4f} on validation, seed 13.\n" in text
    assert f"# The recipe's own values: macro_f1 {result.trials[0].score:.4f}.\n" in text
    written, given = (read_document(path, Recipe).values for path in (result.recipe, folder / "in" / "recipe.yaml"))
    assert written["train"] == {**given["train"], "learning_rate": result.best.values["train.learning_rate"]}
    assert written["adapter"] == {**given["adapter"], "rank": result.best.values["adapter.rank"]}
    assert written.keys() == given.keys()
    assert "/" not in written["tasks"]["tone"]["data"].replace("../", "").replace("in/", "")
    monkeypatch.chdir(folder.parent)  # paths are the recipe's, not the working folder's
    run = finetune.run(result.recipe, runs=folder / "again", quiet=True)
    scores = [event["metrics"] for event in load_events(run.folder.events) if event["event"] == "evaluation"]
    assert max(score["macro_f1"] for score in scores) == result.best.score


class Killed(BaseException):
    """Nothing in the toolkit catches it, as nothing catches SIGKILL."""


def test_a_killed_sweep_goes_on_inside_its_trial_and_comes_to_the_same_end(
    swept, write_recipe, tmp_path, monkeypatch
) -> None:
    write_recipe(tmp_path / "in", train=TRAIN)
    path = write_sweep(tmp_path / "in")
    monkeypatch.setattr(search, "COMPARED", 1)
    real, calls = fitting.search, []

    def kill_the_second(folder: RunFolder, *, gives_up: Callable[..., bool], quiet: bool) -> dict[str, Any]:
        calls.append(folder)

        def gives_up_or_dies(share: float, metrics: dict[str, float]) -> bool:
            if len(calls) == 2 and share > 0.6:
                raise Killed
            return gives_up(share, metrics)

        return real(folder, gives_up=gives_up_or_dies, quiet=quiet)

    monkeypatch.setattr(fitting, "search", kill_the_second)
    with pytest.raises(Killed):
        finetune.sweep(path, runs=tmp_path / "runs", quiet=True)
    result = finetune.sweep(path, runs=tmp_path / "runs", quiet=True)
    assert calls[1] == calls[2]
    assert "resumed" in [event["event"] for event in load_events(calls[1].events)]
    assert tell_apart(result) == tell_apart(swept["result"])
    again = finetune.sweep(path, runs=tmp_path / "runs", quiet=True)
    assert tell_apart(again) == tell_apart(result)
    assert len(calls) == 6, "a finished sweep trains nothing more"


# Trials that cost nothing


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, write_recipe: Callable[..., Path], tmp_path: Path) -> list[float]:
    """Learning rates that were tried; a trial is a formula: the best rate is 1e-3."""
    write_recipe(tmp_path / "in")
    rates: list[float] = []

    def lay_out(recipe: Any, path: Path, runs: Path) -> tuple[RunFolder, None]:
        folder = RunFolder(runs / recipe.name / f"{len(list(runs.glob('*/*')))}")
        folder.data.mkdir(parents=True)
        folder.update_status(rate=recipe.train.learning_rate)
        return folder, None

    def train(folder: RunFolder, *, gives_up: Any, quiet: bool) -> dict[str, Any]:
        rates.append(folder.load_status()["rate"])
        score = 1 - abs(math.log10(rates[-1]) + 3) / 4
        gives_up(1.0, {"macro_f1": score, "loss": 1 - score, "ece": math.nan})
        validation = {"macro_f1": score, "loss": 1 - score, "ece": None}  # in JSON, NaN is null
        return {"validation": validation, "stopped_early": False, "seconds": 1.0}

    monkeypatch.setattr(layout, "lay_out", lay_out)
    monkeypatch.setattr(fitting, "search", train)
    return rates


def test_the_search_closes_in_on_the_best_values(trials, tmp_path) -> None:
    result = finetune.sweep(write_sweep(tmp_path / "in"), trials=16, runs=tmp_path, quiet=True)
    assert len(trials) == 16
    assert 5e-4 < result.best.values["train.learning_rate"] < 2e-3
    errors = [abs(math.log10(rate) + 3) for rate in trials]
    assert sum(errors[10:]) < sum(errors[:6])
    assert all(rate == float(f"{rate:.3g}") for rate in trials)


def test_an_error_is_made_small_and_more_trials_go_on(trials, tmp_path) -> None:
    path = write_sweep(tmp_path / "in", metric="loss")
    first = finetune.sweep(path, trials=3, runs=tmp_path, quiet=True)
    assert first.best.score == min(trial.score for trial in first.trials)
    assert load_recipe(first.recipe).train.early_stop.metric == "loss"
    more = finetune.sweep(path, trials=5, runs=tmp_path, quiet=True)
    assert tell_apart(more)[:3] == tell_apart(first)
    assert len(trials) == 5


def test_whole_numbers_are_drawn_for_keys_that_hold_them(trials, tmp_path) -> None:
    body = "search:\n  train.epochs: {low: 1, high: 9}\n  train.weight_decay: {low: 0, high: 1}\n"
    result = finetune.sweep(write_sweep(tmp_path / "in", body), runs=tmp_path, quiet=True)
    assert {type(trial.values["train.epochs"]) for trial in result.trials} == {int}
    drawn = {trial.values["train.weight_decay"] for trial in result.trials}
    assert len(drawn - {0.0, 1.0}) >= 4


def test_values_that_do_not_go_together_are_a_failed_trial(trials, tmp_path, monkeypatch) -> None:
    real = fitting.search

    def refuse(folder: RunFolder, **options: Any) -> dict[str, Any]:
        if folder.load_status()["rate"] < 1e-4:
            raise DivergedError("training, step 3: loss and gradient must be finite.")
        return real(folder, **options)

    monkeypatch.setattr(fitting, "search", refuse)
    result = finetune.sweep(write_sweep(tmp_path / "in"), trials=12, runs=tmp_path, quiet=True)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert failed
    assert {trial.error for trial in failed} == {"training, step 3: loss and gradient must be finite."}
    assert all((trial.values["train.learning_rate"] < 1e-4) == (trial in failed) for trial in result.trials)


def test_a_sweep_without_a_finished_trial_is_an_error(trials, tmp_path) -> None:
    path = write_sweep(tmp_path / "in", metric="ece", trials=2)
    with pytest.raises(GateError) as caught:
        finetune.sweep(path, runs=tmp_path, quiet=True)
    assert str(caught.value) == (
        f"{tmp_path / 'found'}: at least one trial must come to an end, got 2 that failed; the last: ece must be a "
        f"number on validation, got none. Change the values of search in {path}."
    )


def test_another_search_under_the_same_name_is_refused(trials, tmp_path) -> None:
    finetune.sweep(write_sweep(tmp_path / "in", trials=1), runs=tmp_path, quiet=True)
    other = write_sweep(tmp_path / "in", SEARCH.replace("0.02", "0.03"))
    with pytest.raises(UsageError, match="must go on with the search that it was started with, got other values"):
        finetune.sweep(other, runs=tmp_path, quiet=True)
    same = write_sweep(tmp_path / "in")
    with pytest.raises(UsageError, match=r"Give the sweep another name, or remove the folder\."):
        finetune.sweep(same, ["train.epochs=3"], runs=tmp_path, quiet=True)


def test_a_damaged_study_is_refused(trials, tmp_path) -> None:
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "study.db").write_bytes(b"no database" * 100)
    with pytest.raises(ResourceError, match=r"study\.db: must be a study that Optuna reads, got '.*not a database"):
        finetune.sweep(write_sweep(tmp_path / "in"), runs=tmp_path, quiet=True)


def test_without_optuna_the_message_says_what_to_install(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ResourceError) as caught:
        finetune.sweep("sweep_sentiment", runs=tmp_path)
    assert str(caught.value) == ("sweep: optuna must be installed to search, got no such package. pip install optuna")
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


# Before the first trial


@pytest.mark.parametrize(
    ("keys", "overrides", "words"),
    [
        (
            {"metric": "macro_f2"},
            [],
            r"sweep\.yaml: metric: must name metrics out of .*, got 'macro_f2'\. Did you mean",
        ),
        ({"metric": "bleu"}, ["train.early_stop=null"], r"metric: must be one of macro_f1, accuracy, ece, loss where"),
        ({}, ["adapter.rank=4"], r"--set adapter\.rank: must be left out where .* searches it\."),
        ({}, ["train.epochs=0"], r"recipe\.yaml: 1 problem\n  --set  train\.epochs: must be at least 1, got 0\."),
    ],
)
def test_what_cannot_be_searched_leaves_no_folder(keys, overrides, words, write_recipe, tmp_path) -> None:
    write_recipe(tmp_path / "in")
    with pytest.raises((RecipeError, UsageError), match=words):
        finetune.sweep(write_sweep(tmp_path / "in", **keys), overrides, runs=tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


# The command


def test_the_command_shows_every_trial_and_what_to_do_next(trials, command, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    done = command("sweep", write_sweep(tmp_path / "in", trials=3))
    assert done.code == 0
    assert (
        "trial 1 of 3: train.learning_rate 0.01, adapter.rank 8\n  complete: macro_f1 0.7500 on validation" in done.err
    )
    assert "run     finetune run runs/found/best.yaml\n" in done.out
    assert (
        sum(line.split()[:1] != ["validation;"] and line.split()[1:2] == ["*"] for line in done.out.splitlines()) == 1
    )
    content = json.loads(command("sweep", tmp_path / "in" / "sweep.yaml", "--json").out)
    assert content.keys() == {"folder", "recipe", "metric", "best", "trials"}
    assert content["best"] in content["trials"]
    assert len(content["trials"]) == 3


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_exits_with_75_and_the_command_to_go_on(trials, command, tmp_path, monkeypatch, number, name) -> None:
    def stop(*_arguments: Any, **_options: Any) -> None:
        signal.raise_signal(number)

    path = write_sweep(tmp_path / "in")
    real = fitting.search
    monkeypatch.setattr(fitting, "search", stop)
    words = ["sweep", path, "--set", "train.epochs=1", "--trials", 2, "--runs", tmp_path / "runs"]
    done = command(*words)
    assert done.code == 75
    said = f"sweep {path} --set train.epochs=1 --trials 2 --runs {tmp_path / 'runs'}"
    assert done.err.endswith(f"finetune: stopped by {name}. Go on with: finetune {said}\n")
    monkeypatch.setattr(fitting, "search", real)
    assert command(*words).code == 0
    assert len(trials) == 2
