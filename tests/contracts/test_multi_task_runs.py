"""A recipe with two tasks, from its file to the answers of one model."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pyarrow.parquet
import pytest
from sklearn.metrics import accuracy_score

import finetune
from finetune.errors import GateError, UsageError

SECOND = {"type": "text_classification", "data": "rows.csv", "columns": {"label": "kind"}}
APART = {"by": "group", "column": "number"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_recipe):
    """Tone and the kind of headline, which its last word says, on the same rows, split alike."""
    folder = tmp_path_factory.mktemp("several")
    path = write_recipe(
        folder, tasks={"tone": {"split": APART}, "kind": SECOND | {"split": APART}}, train={"epochs": 3}
    )
    rows = list(csv.DictReader((folder / "rows.csv").open(encoding="utf-8")))
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "kind", "number"])
        for i, row in enumerate(rows):
            kind = ["names", "meeting"][i % 2]
            writer.writerow([f"{row['text']} {kind}", row["label"], kind, i])
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return finetune.run(recipe, runs=tmp_path_factory.mktemp("runs"), quiet=True)


def test_each_task_is_judged_in_a_folder_of_its_own(run):
    assert list(run.test) == ["tone", "kind"] == list(run.tests)
    for name, test in run.tests.items():
        folder = run.folder.evaluation / name
        assert {path.name for path in folder.iterdir()} == {
            *("test.json", "validation.json", "predictions.parquet", "report.html"),
        }
        table = pyarrow.parquet.read_table(folder / "predictions.parquet")
        share = accuracy_score(table["reference"].to_pylist(), table["prediction"].to_pylist())
        assert test["metrics"]["accuracy"]["value"] == pytest.approx(share, abs=1e-6)
        assert test["opened"] == 1
    scored = run.test["kind"]
    assert scored["metrics"]["accuracy"]["value"] > scored["baselines"]["majority"]["metrics"]["accuracy"]["value"]
    ids = json.loads((run.folder.data / "ids.json").read_text())
    assert ids["tone"] == ids["kind"]


def test_the_report_of_a_task_shows_its_own_curve(run):
    page = (run.folder.evaluation / "kind" / "report.html").read_text(encoding="utf-8")
    assert "tiny: kind" in page
    assert "Shared with" in page
    assert "tone.macro" not in page


def test_the_card_names_every_task_and_loads_the_class_with_several_heads(run):
    card = run.folder.card.read_text(encoding="utf-8")
    assert "`tone` with one of: negative, neutral, positive" in card
    assert "`kind` with one of: meeting, names" in card
    assert "modeling_triad.TriadForMultiTask" in card
    for test in run.tests.values():
        assert f"{test['metrics']['accuracy']['value']:.3f}" in card
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(block, "card", "exec")


def test_one_pass_answers_as_each_task_alone(run):
    texts = ["shares gains beats meeting", "loss falls names", "unchanged schedule"]
    predictor = run.load()
    answers = predictor.predict(texts)
    scores = predictor.compute_scores(texts)
    for name in run.tests:
        alone = predictor[name].predict(texts)
        assert [one.label for one in answers[name]] == [one.label for one in alone]
        np.testing.assert_allclose(scores[name], predictor[name].compute_scores(texts), atol=1e-6)
        assert list(answers[name][0].scores) == run.tests[name]["labels"]


def test_each_task_cleans_as_its_recipe_says(recipe, tmp_path):
    """With other steps for one of them the texts differ, and so do the passes."""
    run = finetune.run(recipe, ["tasks.kind.clean=[urls]", "train.epochs=1"], runs=tmp_path, quiet=True)
    predictor, text = run.load(), "gains https://names.example/names meeting"
    scores = predictor.compute_scores([text])
    np.testing.assert_allclose(scores["kind"], predictor["kind"].compute_scores(["gains meeting"]), atol=1e-6)
    np.testing.assert_allclose(scores["tone"], predictor["tone"].compute_scores([text]), atol=1e-6)


def test_the_command_line_shows_every_task(run, command, tmp_path):
    found = json.loads(command("predict", run.folder.path, "gains meeting", "--json").out)
    assert list(found[0]["tasks"]) == ["tone", "kind"]
    assert set(found[0]["tasks"]["kind"]["scores"]) == {"meeting", "names"}
    assert "tone" in command("predict", run.folder.path, "gains meeting").out
    source, output = tmp_path / "new.csv", tmp_path / "scored.csv"
    source.write_text("text,n\ngains meeting,1\nloss names,2\n", encoding="utf-8")
    assert command("predict", run.folder.path, "--input", source, "--output", output).code == 0
    (first, second) = csv.DictReader(output.open(encoding="utf-8"))
    assert list(first) == [
        *("text", "n", "tone_predicted_label", "tone_confidence"),
        *("tone_score_negative", "tone_score_neutral", "tone_score_positive"),
        *("kind_predicted_label", "kind_confidence", "kind_score_meeting", "kind_score_names"),
    ]
    assert (first["n"], second["n"]) == ("1", "2")


def test_check_counts_the_rows_of_each_task(recipe, command):
    plan = json.loads(command("check", recipe, "--json").out)
    assert {name: task["splits"]["test"]["rows"] for name, task in plan["tasks"].items()} == {"tone": 18, "kind": 18}
    shown = command("check", recipe).out
    assert ", for tone" in shown
    assert ", for kind" in shown


def test_texts_that_one_task_tests_and_another_learns_are_named(recipe):
    """Random splits follow the labels, which differ between the tasks."""
    plan = finetune.check(recipe, ["tasks.kind.split={by: random, test: 0.2}"])
    shared = [finding for finding in plan["findings"] if finding["kind"] == "shared_text"]
    assert [finding["severity"] for finding in shared] == ["warning", "warning"]
    pattern = (
        r"tone: \d+ of its test texts are among those that kind learns from\. To keep them apart, split both tasks by "
        r"the same column \(split\.by: time, or group\)\."
    )
    assert re.fullmatch(pattern, shared[0]["message"])
    assert not [finding for finding in finetune.check(recipe)["findings"] if finding["kind"] == "shared_text"]


def test_another_set_needs_the_name_of_its_task(run, tmp_path):
    path = tmp_path / "later.csv"
    path.write_text("text,kind\na new one about names,names\nanother meeting,meeting\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"--task: must be one of tone, kind, got none\."):
        run.evaluate(str(path))
    with pytest.raises(UsageError, match=r"--task: must be one of tone, kind, got 'tones'\."):
        run.evaluate(str(path), "tones")
    scored = run.evaluate(str(path), "kind")
    assert (scored["split"], scored["rows"]) == ("later", 2)
    assert (run.folder.evaluation / "kind" / "later.json").is_file()
    with pytest.raises(UsageError, match=r"task: must be one of tone, kind, got 'tones'\."):
        run.load()["tones"]
    with pytest.raises(
        UsageError, match=r"generate: must get a run that writes text .*, got multi_task. Use finetune predict\."
    ):
        finetune.artifact.load.load_writer(run.folder.path)


def test_a_missed_gate_names_its_task(recipe, tmp_path):
    with pytest.raises(GateError, match=r"kind.accuracy: must be > 1") as caught:
        finetune.run(recipe, ["evaluate.gates={kind.accuracy: '> 1'}", "train.epochs=1"], runs=tmp_path, quiet=True)
    assert "1 of 1 missed" in str(caught.value)
    assert "kind/report.html" in str(caught.value)


def test_a_task_needs_a_name_that_a_head_can_have(recipe):
    text = recipe.read_text(encoding="utf-8").replace("  kind:\n    type", "  items:\n    type")
    path = recipe.with_name("items.yaml")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(finetune.errors.RecipeError, match=r"tasks: must have names that heads can have; .*'items'"):
        finetune.check(path)


def test_all_weights_can_be_trained_too(recipe, tmp_path):
    run = finetune.run(
        recipe, ["adapter.method=full", "train.epochs=1", "train.learning_rate=1e-3"], runs=tmp_path, quiet=True
    )
    answers = run.load().predict(["gains meeting"])
    assert list(answers) == ["tone", "kind"]
    assert finetune.evaluate(run.folder.path)["kind"]["opened"] == 2


def test_a_task_is_compared_with_a_run_of_its_own(run, recipe, tmp_path):
    text = recipe.read_text(encoding="utf-8")
    alone = recipe.with_name("alone.yaml")
    alone.write_text(text[: text.index("  kind:\n")] + text[text.index("train:") :], encoding="utf-8")
    single = finetune.run(alone, ["name=alone", "train.epochs=1"], runs=tmp_path, quiet=True)
    found = finetune.compare([f"{run.folder.path}:tone", single.folder.path])
    assert found["rows"] == 18
    shown = found["runs"][f"{run.folder.path}:tone"]["metrics"]["accuracy"]["value"]
    assert shown == pytest.approx(run.tests["tone"]["metrics"]["accuracy"]["value"], abs=1e-6)
    with pytest.raises(UsageError, match=r"must come with one of its tasks, tone, kind\. Write RUN:TASK\."):
        finetune.compare([run.folder.path, single.folder.path])
    with pytest.raises(UsageError, match=r"must have the task, tone, kind, got 'tune'\."):
        finetune.compare([f"{run.folder.path}:tune", single.folder.path])
