"""`finetune compare FILE`: the same for all, rates chosen on validation, the test split closed for losers, resumed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune import comparison, runner
from finetune.artifact.candidates import Look
from finetune.artifact.run_folder import RunFolder
from finetune.cli.main import app
from finetune.comparison import compare_candidates, run_alone
from finetune.errors import DataError, FinetuneError, GateError, Interrupted, RecipeError, ResourceError, UsageError
from finetune.fitting import read_validation
from finetune.training.events import load_events
from finetune.training.session import Session

COMPARISON = """\
compare: 1
name: tones
recipe: recipe.yaml
set: {train.epochs: 2, evaluate.baselines: [], evaluate.slices: []}
seeds: [13, 17]
learning_rates: {default: [1.0e-4, 1.0e-2]}
reference: full
candidates:
  full: {adapter.method: full}
  lora: {adapter.method: lora, adapter.rank: 4}
"""
WINNERS = {"full": "0.0001", "lora": "0.01"}
"""With these rows each candidate has a rate of its own."""
LOSERS = ["full-0.01-13", "lora-0.0001-13"]
RUNS = sorted([*LOSERS, *(f"{name}-{rate}-{seed}" for name, rate in WINNERS.items() for seed in (13, 17))])


class Here:
    """Carries out the commands of runs in this process, where torch is loaded, and counts them."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, arguments: Sequence[str]) -> None:
        self.commands.append(list(arguments))
        app([*arguments, "--json"], standalone_mode=False)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, write_recipe: Any) -> Any:
    """A finished comparison, only to be read: its folder, its results and the commands it took."""
    folder = tmp_path_factory.mktemp("compared")
    here = Here()
    path = write_comparison(folder, write_recipe)
    results = compare_candidates(path, runs=folder / "runs", quiet=True, execute=here)
    return folder, results, here.commands


def write_comparison(folder: Path, write_recipe: Callable[..., Path], text: str = COMPARISON, **changes: Any) -> Path:
    write_recipe(folder, **changes)
    path = folder / "compare.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def find_runs(root: Path) -> dict[str, RunFolder]:
    """Name of a trial -> its run, each of which there must be once."""
    found = {}
    for path in root.glob("*/*/status.json"):
        assert path.parent.parent.name not in found
        found[path.parent.parent.name] = RunFolder(path.parent)
    return found


def copy_without(compared: Any, folder: Path, *names: str) -> tuple[Path, Any]:
    """The finished comparison without some of its runs and without its results; the file, and the scores to come to."""
    source, results, _ = compared
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for name in ("results.json", "comparison.html"):
        (folder / "runs" / "tones" / name).unlink()
    for name in names:
        shutil.rmtree(folder / "runs" / "tones" / name)
    return folder / "compare.yaml", list_scores(results)


def list_scores(results: dict[str, Any]) -> list[Any]:
    return [(one["learning_rate"], one["metrics"], one["share"]) for one in results["candidates"].values()]


def test_every_candidate_has_the_same_seeds_and_budget(compared: Any) -> None:
    folder, results, commands = compared
    assert sorted(find_runs(folder / "runs" / "tones")) == RUNS
    assert {name: f"{one['learning_rate']:g}" for name, one in results["candidates"].items()} == WINNERS
    assert [[look["rate"] for look in one["learning_rates"]] for one in results["candidates"].values()] == [
        [1e-4, 1e-2]
    ] * 2
    assert [[run["seed"] for run in one["seeds"]] for one in results["candidates"].values()] == [[13, 17]] * 2
    # Two rates with the test split closed, the winner judged, the other seed whole.
    words = [(command[0], "--no-test" in command) for command in commands]
    assert words == [("run", True), ("run", True), ("resume", False), ("run", False)] * 2


def test_the_test_split_stays_closed_for_losers_and_is_opened_once_for_winners(compared: Any) -> None:
    folder, results, _ = compared
    runs = find_runs(folder / "runs" / "tones")
    for name, run in runs.items():
        loser = name in LOSERS
        assert (run.evaluation / "test.json").exists() != loser
        assert (run.evaluation / "predictions.parquet").exists() != loser
        assert list(run.evaluation.iterdir()) == [] or not loser
        assert run.load_status()["state"] == ("trained" if loser else "finished")
        if not loser:
            assert json.loads((run.evaluation / "test.json").read_text())["opened"] == 1
    assert [run["opened"] for one in results["candidates"].values() for run in one["seeds"]] == [1] * 4


def test_rates_are_chosen_by_the_validation_score_of_the_saved_weights(compared: Any) -> None:
    folder, results, _ = compared
    runs = find_runs(folder / "runs" / "tones")
    for name, one in results["candidates"].items():
        assert one["chosen_by"] == "macro_f1"
        values = {look["rate"]: look["value"] for look in one["learning_rates"]}
        rate = one["learning_rate"]
        assert values[rate] == max(values.values()) > min(values.values())
        judged = json.loads((runs[f"{name}-{rate:g}-13"].evaluation / "validation.json").read_text())
        assert values[rate] == pytest.approx(judged["metrics"]["macro_f1"]["value"], abs=1e-6)


def test_results_are_those_of_the_runs(compared: Any) -> None:
    folder, results, _ = compared
    root = folder / "runs" / "tones"
    runs = find_runs(root)
    for name, one in results["candidates"].items():
        both = [runs[f"{name}-{WINNERS[name]}-{seed}"] for seed in (13, 17)]
        tests = [json.loads((run.evaluation / "test.json").read_text())["metrics"]["macro_f1"]["value"] for run in both]
        assert one["metrics"]["macro_f1"]["value"] == pytest.approx(sum(tests) / 2, abs=1e-6)
        assert one["metrics"]["macro_f1"]["low"] <= sum(tests) / 2 <= one["metrics"]["macro_f1"]["high"]
        training = [run.load_status()["training"] for run in both]
        assert one["parameters"] == training[0]["parameters"]
        assert one["seconds"] == pytest.approx(sum(record["seconds"] for record in training) / 2, abs=0.1)
        assert one["peak_memory_mb"] == max(record["peak_memory_mb"] for record in training) > 50
        assert one["model_bytes"] == sum(path.stat().st_size for path in both[0].model.rglob("*") if path.is_file())
        assert 0 < one["weights_bytes"] < one["model_bytes"]
    full, lora = results["candidates"]["full"], results["candidates"]["lora"]
    assert full["share"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    score, whole = lora["metrics"]["macro_f1"]["value"], full["metrics"]["macro_f1"]["value"]
    assert lora["share"]["value"] == pytest.approx(score / whole, abs=1e-5)
    assert results["failed"] == {}
    assert json.loads((root / "results.json").read_text()) | {"page": results["page"]} == results
    page = (root / "comparison.html").read_text(encoding="utf-8")
    assert "lora" in page
    assert f"{score:.3f}" in page


def test_what_is_there_is_not_done_again(compared: Any, tmp_path: Path) -> None:
    folder, results, _ = compared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    here = Here()
    again = compare_candidates(tmp_path / "compare.yaml", runs=tmp_path / "runs", quiet=True, execute=here)
    assert here.commands == []
    assert list_scores(again) == list_scores(results)


def test_a_changed_recipe_is_trained_anew(compared: Any, tmp_path: Path) -> None:
    """Only the candidate that changed; its former run stays, and another seed costs one run."""
    folder, _, _ = compared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    text = COMPARISON.replace("adapter.rank: 4", "adapter.rank: 2").replace("[13, 17]", "[17]")
    text = text.replace("[1.0e-4, 1.0e-2]", "[1.0e-2], full: [1.0e-4]")
    (tmp_path / "compare.yaml").write_text(text)
    here = Here()
    results = compare_candidates(tmp_path / "compare.yaml", runs=tmp_path / "runs", quiet=True, execute=here)
    assert [command[0] for command in here.commands] == ["run"]
    assert "adapter.rank=2" in here.commands[0]
    assert "--no-test" not in here.commands[0], "with one rate there is nothing to choose"
    assert len(list((tmp_path / "runs" / "tones" / "lora-0.01-17").iterdir())) == 2
    assert results["candidates"]["lora"]["seeds"][0]["opened"] == 1


def test_stopped_between_runs_it_goes_on(compared: Any, tmp_path: Path) -> None:
    path, expected = copy_without(compared, tmp_path, "lora-0.01-13", "lora-0.01-17")
    here = Here()

    def stop_at_the_third(arguments: Sequence[str]) -> None:
        if len(here.commands) == 2:
            raise KeyboardInterrupt
        here(arguments)

    with pytest.raises(Interrupted) as caught:
        compare_candidates(path, runs=tmp_path / "runs", quiet=True, execute=stop_at_the_third)
    words = f"stopped; what is done is kept. Go on with: finetune compare {path} --runs {tmp_path / 'runs'}"
    assert str(caught.value) == words
    assert not (tmp_path / "runs" / "tones" / "results.json").exists()
    rest = Here()
    results = compare_candidates(path, runs=tmp_path / "runs", quiet=True, execute=rest)
    assert [command[0] for command in here.commands + rest.commands] == ["run", "resume", "run"]
    assert list_scores(results) == expected


@pytest.mark.parametrize("kill", [KeyboardInterrupt, SystemExit], ids=["ctrl-c", "no word left"])
def test_stopped_within_a_run_it_goes_on_from_the_checkpoint(
    compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: type[BaseException]
) -> None:
    """A run is stopped behind its first checkpoint; the comparison comes to the same numbers."""
    path, expected = copy_without(compared, tmp_path, "lora-0.01-13")
    save = Session.save

    def save_and_die(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        raise kill

    monkeypatch.setattr(Session, "save", save_and_die)
    with pytest.raises((Interrupted, SystemExit)):
        compare_candidates(path, runs=tmp_path / "runs", quiet=True, execute=Here())
    monkeypatch.undo()
    stopped = find_runs(tmp_path / "runs" / "tones")["lora-0.01-13"]
    assert stopped.load_status()["state"] == ("stopped" if kill is KeyboardInterrupt else "training")
    rest = Here()
    results = compare_candidates(path, runs=tmp_path / "runs", quiet=True, execute=rest)
    assert rest.commands == [["resume", str(stopped.path), "--no-test"], ["resume", str(stopped.path)]]
    assert "resumed" in {event["event"] for event in load_events(stopped.events)}
    assert list_scores(results) == expected


def test_a_candidate_that_is_refused_is_shown_and_the_others_go_on(
    write_recipe: Any, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that the base does not have are found when the model is planned: one command, not one for each rate."""
    text = COMPARISON.replace("adapter.rank: 4", "adapter.targets: [nowhere]").replace("[13, 17]", "[13]")
    path = write_comparison(tmp_path, write_recipe, text)
    here = Here()
    monkeypatch.setattr(comparison, "run_alone", here)
    done = command("compare", path, "--runs", tmp_path / "runs", "--markdown", tmp_path / "table.md")
    assert done.code == 4
    assert [words[0] for words in here.commands] == ["run", "run", "resume", "run"]
    assert "finetune: compare: every candidate must end well, got 1 of 2 that did not:\n  lora: " in done.err
    assert "adapter.targets: each name must end the name of a linear layer of the base, got nowhere" in done.err
    assert done.err.endswith("The others were compared; run the same command again to try these once more.\n")
    assert re.search(r"^2 of 2  lora, rate 0\.0001, seed 13: failed: .*adapter\.targets", done.err, re.MULTILINE)
    results = json.loads((tmp_path / "runs" / "tones" / "results.json").read_text())
    assert list(results["failed"]) == ["lora"]
    assert results["candidates"]["lora"]["metrics"] == {}
    assert results["candidates"]["full"]["metrics"]["macro_f1"]["value"] > 0
    assert "adapter.targets" in (tmp_path / "runs" / "tones" / "comparison.html").read_text(encoding="utf-8")
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("| method | macro-F1 (95 % interval) | trained parameters | share of full |")
    assert "`lora` failed: " in table
    done = command("compare", path, "--runs", tmp_path / "runs", "--json")
    assert (done.code, done.err) == (4, "")
    assert "adapter.targets" in done.out


def test_a_missed_gate_keeps_its_score_and_exits_with_4(
    write_recipe: Any, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = COMPARISON.replace("[1.0e-4, 1.0e-2]", "[1.0e-2]").replace("[13, 17]", "[13]")
    path = write_comparison(tmp_path, write_recipe, text.replace("train.epochs: 2", 'evaluate.gates: {ece: "< 0"}'))
    monkeypatch.setattr(comparison, "run_alone", Here())
    done = command("compare", path, "--runs", tmp_path / "runs")
    assert done.code == 4
    assert "got 2 of 2 that did not:\n  full: evaluate.gates: 1 of 1 missed on test ece: must be < 0, got" in done.err
    assert re.search(r"^full +0\.\d{3} \(", done.out, re.MULTILINE)
    results = json.loads((tmp_path / "runs" / "tones" / "results.json").read_text())
    assert [one["error"] for one in results["candidates"].values()] == [None, None]
    assert all(one["metrics"]["macro_f1"]["value"] for one in results["candidates"].values())


def test_a_rate_that_fails_is_no_choice(compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = compared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "compare.yaml").write_text(COMPARISON.replace("[1.0e-4, 1.0e-2]", "[1.0e-2, 1], full: [1.0e-4, 1]"))

    def diverge(arguments: Sequence[str]) -> None:
        raise GateError("training, step 3: loss and gradient must be finite.")

    results = compare_candidates(tmp_path / "compare.yaml", runs=tmp_path / "runs", quiet=True, execute=diverge)
    for one in results["candidates"].values():
        assert one["learning_rate"] < 1
        assert one["learning_rates"][1]["error"] == "training, step 3: loss and gradient must be finite."
        assert one["error"] is None
    (tmp_path / "compare.yaml").write_text(COMPARISON.replace("[13, 17]", "[13, 17, 19]"))
    results = compare_candidates(tmp_path / "compare.yaml", runs=tmp_path / "runs", quiet=True, execute=diverge)
    words = "seed 19: training, step 3: loss and gradient must be finite."
    assert results["failed"] == {"full": words, "lora": words}


def test_rows_that_changed_in_between_are_not_compared(compared: Any, write_recipe: Any, tmp_path: Path) -> None:
    folder, _, _ = compared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs" / "tones" / "lora-0.01-17")
    rows = (tmp_path / "rows.csv").read_text().splitlines(keepends=True)
    (tmp_path / "rows.csv").write_text("".join(rows[:-30]))
    results = compare_candidates(tmp_path / "compare.yaml", runs=tmp_path / "runs", quiet=True, execute=Here())
    assert list(results["failed"]) == ["lora"]
    assert "must be tested on the same rows as " in results["failed"]["lora"]
    assert "Remove the run that was trained before the data changed" in results["failed"]["lora"]


def test_of_equal_scores_the_lower_loss_then_the_lower_rate_wins(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def choose(*looks: tuple[float, float | None, float | None], metric: str = "accuracy") -> float:
        best = comparison._choose(
            [Look(rate, run, {metric: value, "loss": loss}) for rate, value, loss in looks], metric
        )
        assert best is not None
        return best.rate

    assert choose((1e-3, 0.8, 0.5), (3e-3, 0.9, 0.9)) == 3e-3
    assert choose((1e-3, 0.9, 0.5), (3e-3, 0.9, 0.4)) == 3e-3
    assert choose((3e-3, 0.9, 0.5), (1e-3, 0.9, 0.5)) == 1e-3
    assert choose((3e-3, None, None), (1e-3, 0.1, 0.5)) == 1e-3
    assert choose((1e-3, 2.0, 2.0), (3e-3, 1.0, 1.0), metric="loss") == 3e-3
    assert comparison._choose([Look(1e-3, error="it diverged")], "accuracy") is None


def test_validation_is_read_at_the_saved_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    looks = [{"event": "evaluation", "step": step, "metrics": {"accuracy": step / 10}} for step in (2, 4, 6)]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in [{"event": "step", "step": 1}, *looks]))
    for best, value in ((4, 0.4), (None, 0.6)):
        run.update_status(training={"best_step": best})
        assert read_validation(run) == {"accuracy": value}


# The command


def test_it_prints_a_line_for_each_run_and_a_table(
    compared: Any, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results, _ = compared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("COLUMNS", "200")
    done = command("compare", tmp_path / "compare.yaml", "--runs", tmp_path / "runs")
    assert done.code == 0
    lines = done.err.splitlines()
    assert len(lines) == 8
    assert re.fullmatch(r"1 of 2  full, rate 0\.0001, seed 13: validation macro-F1 [01]\.\d{3}", lines[0])
    assert re.fullmatch(r"2 of 2  lora, rate 0\.01, seed 17: test macro-F1 [01]\.\d{3}", lines[-1])
    for name, one in results["candidates"].items():
        value, trained = one["metrics"]["macro_f1"]["value"], one["parameters"]["trained"]
        assert re.search(rf"^{name} +{value:.3f} \(.* to .*\) +{trained:,} \(", done.out, re.MULTILINE)
    assert "Scores are means over 2 training seeds." in done.out
    assert f"page    {tmp_path / 'runs' / 'tones' / 'comparison.html'}" in done.out
    done = command("compare", tmp_path / "compare.yaml", "--runs", tmp_path / "runs", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["candidates"]["lora"]["metrics"] == results["candidates"]["lora"]["metrics"]


def test_two_comparisons_do_not_share_a_folder_at_once(compared: Any, tmp_path: Path) -> None:
    folder, _, _ = compared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    held = RunFolder(tmp_path / "runs" / "tones").hold()
    with pytest.raises(UsageError, match="must be used by one process at a time, got a second"):
        finetune.compare(tmp_path / "compare.yaml", runs=tmp_path / "runs", quiet=True)
    held.release()


def test_a_folder_that_cannot_be_made_is_said(compared: Any, tmp_path: Path) -> None:
    folder, _, _ = compared
    (tmp_path / "runs").write_text("")
    with pytest.raises(ResourceError, match="must be written"):
        finetune.compare(folder / "compare.yaml", runs=tmp_path / "runs", quiet=True)


# A run in a process of its own


def test_the_words_and_the_kind_of_an_error_come_over_from_the_other_process() -> None:
    run_alone(["recipes", "list"])
    with pytest.raises(UsageError, match=r"^nowhere: must be a file or the name of a shipped file"):
        run_alone(["recipes", "show", "nowhere"])
    with pytest.raises(DataError, match=r"^data: must name a card, got 'nothing'"):
        run_alone(["data", "show", "nothing"])


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((-9, "", ""), FinetuneError, "run: the process must end well, got exit code -9: it said nothing. Is there"),
        ((70, "no json", "Traceback\nKeyError: 1\n"), FinetuneError, "must end well, got exit code 70: KeyError: 1"),
        ((75, "", ""), Interrupted, "got exit code 75"),
        ((5, '{"error": "disk: full.", "exit_code": 5}', ""), ResourceError, "disk: full."),
        ((4, '{"error": "a gate", "exit_code": 4}', ""), GateError, "a gate"),
    ],
)
def test_a_process_that_fails_without_words_gets_some(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str, str], kind: type[FinetuneError], words: str
) -> None:
    monkeypatch.setattr(comparison, "run_command", lambda _: answer)
    with pytest.raises(kind) as caught:
        run_alone(["run", "x"])
    assert type(caught.value) is kind
    assert words in str(caught.value)


@pytest.mark.slow
def test_with_processes_of_their_own_it_comes_to_the_same(compared: Any, write_recipe: Any, tmp_path: Path) -> None:
    _, expected, _ = compared
    path = write_comparison(tmp_path, write_recipe)
    results = finetune.compare(path, runs=str(tmp_path / "runs"), quiet=True)
    for name, one in results["candidates"].items():
        assert one["metrics"]["macro_f1"] == pytest.approx(
            expected["candidates"][name]["metrics"]["macro_f1"], abs=1e-4
        )
        assert one["peak_memory_mb"] > 50


# A run that keeps its test split closed


def test_a_run_without_test_is_judged_by_resume(write_recipe: Any, tmp_path: Path, command: Any) -> None:
    recipe, runs = write_recipe(tmp_path / "in"), tmp_path / "runs"
    done = command("run", recipe, "--runs", runs, "--no-test", "--set", "train.epochs=1")
    assert done.code == 0
    [folder] = (runs / "tiny").iterdir()
    assert done.out == f"{folder}: trained; the test split is closed. Judge it: finetune resume {folder}\n"
    assert list((folder / "evaluation").iterdir()) == []
    assert command("evaluate", folder).code == 2
    again = command("resume", folder, "--no-test", "--json")
    assert json.loads(again.out)["training"]["steps"] > 0
    assert not (folder / "evaluation" / "test.json").exists()
    assert command("resume", folder).code == 0
    assert json.loads((folder / "evaluation" / "test.json").read_text())["opened"] == 1
    whole = runner.run(recipe, ["train.epochs=1"], runs=tmp_path / "whole", quiet=True)
    assert json.loads((folder / "evaluation" / "test.json").read_text())["metrics"] == whole.test["metrics"]


def test_a_comparison_is_no_recipe(command: Any, tmp_path: Path, write_recipe: Any) -> None:
    path = write_comparison(tmp_path, write_recipe)
    for verb in ("run", "check"):
        done = command(verb, path)
        assert done.code == 2
        assert f"{path}: must be a recipe, got a comparison. Try: finetune compare {path}" in done.err
    with pytest.raises(RecipeError, match=r"must be a comparison, got a recipe\. Try: finetune run"):
        finetune.compare(tmp_path / "recipe.yaml")
