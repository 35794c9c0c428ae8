"""`finetune compress`: what a run becomes, what is chosen, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import f1_score

import finetune
from finetune import compression, fitting, layout
from finetune.artifact.card import build_model_card
from finetune.artifact.export import speed
from finetune.artifact.export.export_run import export_run
from finetune.artifact.push import push
from finetune.artifact.run_folder import RunFolder
from finetune.compression import compress
from finetune.errors import GateError, Interrupted, UsageError
from finetune.evaluation.budget import Budget
from finetune.recipe import load_recipe

SPEEDUPS = {"2x1": 1.1, "1x0.5": 3.0}
TWO = {"sizes": list(SPEEDUPS), "tokens": 0, "overrides": ["train.epochs=1"], "quiet": True}


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_texts(run: Path, split: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a split, in order."""
    folder = RunFolder(run)
    _, prepared = layout.prepare_again(folder, load_recipe(folder.recipe))
    rows = prepared.parts["tone"].splits[split]
    return [row.values["text"] for row in rows], [row.values["label"] for row in rows]


@pytest.fixture(scope="module", autouse=True)
def fixed_speed() -> Iterator[None]:
    """Clocks are not what these tests are about: a few rows are timed, and the ratios are set."""

    def measure(*arguments: Any, **options: Any) -> dict[str, Any]:
        found = speed.measure(*arguments, **options)
        assert set(found["ratios"]) == {*found, "pipeline"} - {"run", "rows", "tokens_per_row", "ratios"}
        for name, ratio in found["ratios"].items():
            ratio["rows_per_second"] = SPEEDUPS.get(name, 0.2)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "ROWS", 4)
        patch.setattr(speed, "SINGLE_ROWS", 2)
        patch.setattr(compression, "measure", measure)
        yield


@pytest.fixture(scope="module")
def parent(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("parent") / "runs" / "tiny" / finished_run.name))


@pytest.fixture(scope="module")
def results(parent: Path) -> dict[str, Any]:
    """Two sizes of the finished run, the budget kept by both."""
    before = read_all(parent)
    made = compress(parent, max_drop=0.99, **TWO)
    kept = {name: content for name, content in read_all(parent).items() if name != ".lock"}
    assert kept == {name: content for name, content in before.items() if name != ".lock"}
    return made


def test_the_frontier_is_written_down_and_the_fastest_within_the_budget_is_chosen(results, parent):
    root = parent.parents[1] / "tiny-compressed"
    assert results["chosen"] == "1x0.5"
    assert json.loads((root / "compress.json").read_text()) == {k: v for k, v in results.items() if k != "page"}
    assert Path(results["page"]) == root / "compress.html"
    whole, (large, small) = results["run"], results["points"].values()
    assert whole["bytes"] > large["bytes"] > small["bytes"]
    assert whole["tokens"] > large["tokens"] == small["tokens"]
    assert (small["layers"], small["heads"], small["channels"]) == (1, 1, 32)
    assert whole["score"]["value"] == pytest.approx(small["score"]["value"] + small["lost"]["value"], abs=2e-6)
    saved = load_file(Path(small["run"]) / "model" / "model.safetensors")
    assert sum(array.size for array in saved.values()) == small["parameters"]


def test_the_test_split_is_opened_once_for_the_chosen_one_alone(results):
    large, small = (RunFolder(Path(point["run"])) for point in results["points"].values())
    assert not (large.evaluation / "test.json").exists()
    assert large.load_status()["state"] == "trained"
    assert json.loads((small.evaluation / "test.json").read_text())["opened"] == 1
    assert results["test"]["chosen"]["opened"] == 1
    assert results["test"]["run"]["opened"] == 1


def test_scores_are_those_of_the_saved_models_on_validation(results, parent):
    texts, labels = read_texts(parent, "validation")
    assert results["rows"] == len(texts)
    for point in results["points"].values():
        found = [prediction.label for prediction in finetune.load(Path(point["run"]) / "model").predict(texts)]
        assert point["score"]["value"] == pytest.approx(f1_score(labels, found, average="macro"), abs=1e-6)


def test_the_result_is_an_ordinary_run_that_names_its_parent(results, parent, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = Path(results["points"]["1x0.5"]["run"])
    lock = json.loads((run / "run.lock").read_text())
    assert lock["parent"]["run"] == f"tiny/{parent.name}"
    assert lock["parent"]["size"] == "1x0.5"
    card = (run / "MODEL_CARD.md").read_text()
    assert (
        f"Made of the run `tiny/{parent.name}`: layers, attention heads, feed-forward channels and tokens were" in card
    )
    assert "tiny/" in load_recipe(run / "recipe.yaml").description
    assert not (run / "checkpoints").exists()
    texts, _ = read_texts(parent, "test")
    predictor = finetune.load(run.parent)  # the only finished one
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    read = AutoTokenizer.from_pretrained(run / "model")
    inputs = read(texts, padding=True, truncation=True, max_length=predictor.max_length, return_tensors="pt")
    with torch.inference_mode():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.numpy()
    np.testing.assert_allclose(predictor.compute_text_logits(texts), logits, atol=1e-4)
    own = Path(shutil.copytree(run, tmp_path / "runs" / "own"))
    assert finetune.evaluate(own)["opened"] == 2
    assert push(own, "me/tiny", dry_run=True)["weights"] == "whole"
    assert export_run(own, "torch-export").parity["tasks"]["tone"]["equal_decisions"] == 1


def test_the_card_names_the_base_on_the_hub_through_all_generations(results):
    run = RunFolder(Path(results["points"]["1x0.5"]["run"]))
    lock = json.loads(run.lock.read_text())
    lock["parent"]["base"] = "org/encoder"
    test = {"tone": json.loads((run.evaluation / "test.json").read_text())}
    card = build_model_card(load_recipe(run.recipe), {"tone": None}, test, run.load_status(), lock)
    assert "base_model: org/encoder" in card
    assert f"Made of the run `{lock['parent']['run']}` on `org/encoder`: layers" in card


def test_again_nothing_is_trained_and_another_budget_takes_another_size(results, parent, monkeypatch):
    monkeypatch.setattr(fitting, "train", lambda *_, **__: pytest.fail("it is trained already"))
    monkeypatch.setattr(Budget, "choose", lambda *_: ("2x1", "2x1"))
    again = compress(parent, min_speedup=1, **TWO)
    assert again["points"]["1x0.5"]["run"] == results["points"]["1x0.5"]["run"]
    assert (again["test"]["chosen"]["opened"], again["test"]["others"]) == (1, ["1x0.5"])
    assert (Path(again["points"]["2x1"]["run"]) / "evaluation" / "test.json").exists()


def test_the_vocabulary_alone_changes_no_answer_and_the_head_is_kept(own_run):
    """Every step is taken, and none of them goes anywhere."""
    still = ["train.learning_rate=1.0e-12", "train.head_learning_rate=1.0e-12", "train.epochs=1"]
    made = compress(own_run, max_drop=0.99, sizes=["2x1"], tokens=0, overrides=still, quiet=True)
    point = made["points"]["2x1"]
    start = next((own_run.parents[1] / "tiny-compressed" / "starts").glob("*/2x1-*/"))
    texts, _ = read_texts(own_run, "train")
    logits = finetune.load(own_run).compute_text_logits(texts)
    np.testing.assert_allclose(finetune.load(start).compute_text_logits(texts), logits, atol=1e-4)
    np.testing.assert_allclose(finetune.load(point["run"]).compute_text_logits(texts), logits, atol=1e-4)
    learned_from = load_file(Path(point["run"]) / "data" / "train.safetensors")["teacher_logits"]
    np.testing.assert_allclose(learned_from, logits, atol=1e-4)


def test_what_was_stopped_goes_on(own_run, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted("stopped by SIGTERM after step 1 of 9; saved.")

    options = {"max_drop": 0.99, "sizes": ["1x0.5"], "overrides": ["train.epochs=1"], "quiet": True}
    search = fitting.search
    monkeypatch.setattr(fitting, "search", stop)
    with pytest.raises(Interrupted, match=r"what is done is kept\. Go on with: finetune compress "):
        compress(own_run, **options)
    monkeypatch.setattr(fitting, "search", search)
    (begun,) = own_run.parents[1].glob("*-compressed/*/status.json")
    assert compress(own_run, **options)["points"]["1x0.5"]["run"] == str(begun.parent)


def test_a_budget_that_no_size_keeps(command, own_run, monkeypatch):
    output = own_run.parents[2] / "elsewhere"
    options = ("--size", "1x0.5", "--set", "train.epochs=1", "--output", output)
    done = command("compress", own_run, "--min-speedup", 9, *options)
    assert done.code == 4
    assert "compress: a size must be at least 9 times as fast as the run, got none. Nearest: 1x0.5, which" in done.err
    assert "and is 3 times as fast. The test split stayed closed; the frontier is in" in done.err
    written = json.loads((output / "tiny-compressed" / "compress.json").read_text())
    assert (written["chosen"], written["nearest"]) == (None, "1x0.5")
    assert "No size keeps the budget." in (output / "tiny-compressed" / "compress.html").read_text()
    assert not list(output.glob("*/*/evaluation/test.json"))
    shown = command("compress", own_run, "--min-speedup", 2, *options)
    assert shown.code == 0
    assert "1x0.5 *" in shown.out
    assert "test    macro_f1" in shown.out


def make_points(**points: tuple[float | None, float]) -> dict[str, Any]:
    return {
        name: {"lost": {"value": lost}, "speedup": {"rows_per_second": times}} for name, (lost, times) in points.items()
    }


POINTS = make_points(whole=(0.0, 1.0), half=(0.004, 2.0), third=(0.01, 3.0), tiny=(0.2, 8.0), broken=(None, 9.0))


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (Budget(max_drop=0.01), ("third", "third")),
        (Budget(max_drop=0.005), ("half", "half")),
        (Budget(min_speedup=2), ("half", "half")),
        (Budget(min_speedup=8), ("tiny", "tiny")),
        (Budget(min_speedup=20), (None, "broken")),
    ],
)
def test_the_budget_chooses(budget, chosen):
    assert budget.choose(POINTS) == chosen


def test_the_nearest_to_a_drop_loses_least():
    worse = make_points(a=(0.3, 9.0), b=(0.05, 2.0), c=(None, 9.0))
    assert Budget(max_drop=0.01).choose(worse) == (None, "b")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_drop": -0.1}, r"--max-drop: must be at least 0 and below 1, got -0\.1\. \.01 is one point\."),
        ({"max_drop": 1.0}, r"--max-drop: must be at least 0 and below 1, got 1\."),
        ({"max_drop": float("nan")}, r"--max-drop: must be at least 0 and below 1, got nan\."),
        ({"min_speedup": 0.5}, r"--min-speedup: must be at least 1, got 0\.5\."),
        (
            {"max_drop": 0.1, "min_speedup": 2.0},
            r"must get one budget, got --max-drop 0\.1 and --min-speedup 2\. Leave",
        ),
        ({"sizes": ["3x2"]}, r"--size: must be LAYERSxSHARE with a share above 0 and at most 1, such .*, got '3x2'\."),
        ({"sizes": ["three"]}, r"--size: must be LAYERSxSHARE .*, got 'three'\."),
        ({"sizes": ["9x1"]}, r"--size: must have at most the 2 layers of the run, got 9x1\."),
        ({"tokens": -1}, r"--tokens: must be at least 0, got -1\. 0 keeps those of the train rows alone\."),
        ({"overrides": ["train.epochs=1", "train.seed=2"]}, r"train\.<key> but train\.seed, .*, got 'train\.seed=2'\."),
        ({"overrides": ["tasks.tone.data=a.csv"]}, r"compress: --set must change how the smaller .*, got 'tasks\.tone"),
    ],
)
def test_what_cannot_be_meant(own_run, options, words):
    with pytest.raises(UsageError, match=words):
        compress(own_run, quiet=True, **options)
    assert not list(own_run.parents[1].glob("*-compressed/*/status.json"))


def change_recipe(run: Path, old: str, new: str) -> None:
    path = run / "recipe.resolved.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_runs_that_cannot_be_made_smaller(command, own_run, find_run_of_two: Callable[[Path], None]):
    change_recipe(own_run, "architecture: triad", "architecture: native")
    done = command("compress", own_run)
    assert done.code == 2
    assert "compress: must get a run on a Triad, got model.architecture: native" in done.err
    find_run_of_two(own_run)
    done = command("compress", own_run)
    assert "compress: must get a run with one task, text_classification, got 2 tasks in" in done.err
    (own_run / "status.json").write_text('{"state": "stopped"}')
    done = command("compress", own_run)
    assert done.code == 2
    assert "must be a finished run, got one that is stopped. Try: finetune resume" in done.err


@pytest.fixture
def find_run_of_two() -> Callable[[Path], None]:
    """A function that gives a run's recipe a second task."""

    def change(run: Path) -> None:
        from ruamel.yaml import YAML

        path, yaml = run / "recipe.resolved.yaml", YAML()
        recipe = yaml.load(path.read_text())
        recipe["model"]["architecture"] = "triad"
        recipe["tasks"]["other"] = dict(recipe["tasks"]["tone"])
        with path.open("w", encoding="utf-8") as file:
            yaml.dump(recipe, file)

    return change


def test_an_adapter_that_cannot_be_merged(own_run, monkeypatch):
    monkeypatch.setattr("finetune.artifact.load.can_merge", lambda _model: False)
    with pytest.raises(
        UsageError, match=r"compress: the adapter must be merged into plain layers, got lora in .*Train"
    ):
        compress(own_run, quiet=True)


def test_a_missed_gate_of_the_recipe_is_said_after_everything_was_written(own_run):
    change_recipe(own_run, "gates: {}", "gates:\n    accuracy: '>= 0.99'\n    beats_baselines: true")
    with pytest.raises(GateError, match=r"accuracy"):
        compress(own_run, max_drop=0.99, sizes=["1x0.5"], overrides=["train.epochs=1"], quiet=True)
    written = json.loads((own_run.parents[1] / "tiny-compressed" / "compress.json").read_text())
    assert written["test"]["chosen"]["opened"] == 1
