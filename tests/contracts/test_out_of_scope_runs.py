"""A recipe with rows of no class, from its file to the answers of the model."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow.parquet
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

import finetune
from finetune.artifact.compare_runs import compare_runs
from finetune.data.batches import IGNORED, Examples
from finetune.errors import DataError, RecipeError
from finetune.evaluation.calibration import fit_temperature
from finetune.evaluation.outside import compute_outside_scores
from finetune.runner import check

LABELS = ["negative", "neutral", "positive"]
ODD = ["#", "@", "%", "&", "*", "=", "+", "~", "^", "|", "<"]
OUTSIDE = {"data": "splits", "labels": [*LABELS, "none"], "out_of_scope": "none", "split": {"by": "given"}}


def add_rows(folder, n_outside=24):
    """Part the rows of a tiny recipe into splits, each with rows of no class whose words no other row has."""
    rows = list(csv.DictReader((folder / "rows.csv").open(encoding="utf-8")))
    generator = np.random.default_rng(5)
    outside = [{"text": " ".join(generator.choice(ODD, 6, replace=False)), "label": "none"} for _ in range(n_outside)]
    for place, name in enumerate(("train", "validation", "test")):
        (folder / "splits").mkdir(exist_ok=True)
        with (folder / "splits" / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            chosen = [
                row for number, row in enumerate(rows) if number // 3 % 4 == place or (not place and number % 12 > 8)
            ]
            writer.writerows([*chosen, *outside[place::3]])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_recipe):
    folder = tmp_path_factory.mktemp("outside")
    evaluate = {"baselines": ["majority", "tfidf_logreg"], "gates": {"outside_auroc": ">= 0.0"}}
    path = write_recipe(folder, tasks={"tone": OUTSIDE}, train={"epochs": 3}, evaluate=evaluate)
    add_rows(folder)
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return finetune.run(recipe, runs=tmp_path_factory.mktemp("runs"), quiet=True)


@pytest.fixture(scope="module")
def rows(run):
    return pyarrow.parquet.read_table(run.folder.evaluation / "predictions.parquet").to_pydict()


def test_such_rows_are_not_trained_on_and_stay_in_the_other_splits(run):
    train, validation = (Examples.load(run.folder.examples(split)).labels for split in ("train", "validation"))
    assert set(train) == {0, 1, 2}
    assert (validation == IGNORED).sum() == 8
    ids = json.loads((run.folder.data / "ids.json").read_text())["tone"]
    assert (len(ids["train"]), len(ids["validation"])) == (len(train), len(validation))
    finding = next(one for one in json.loads((run.folder.data / "findings.json").read_text()))
    assert finding["kind"] == "out_of_scope"
    assert finding["message"].startswith(
        "train: left out 8 rows labelled 'none', which no class is learned from (train:"
    )


def test_with_outlier_exposure_the_model_learns_to_be_unsure_of_them(run, recipe, tmp_path):
    taught_by = ["tasks.tone.outlier_exposure=1.0", "tasks.tone.split.leaks=drop"]
    exposed = finetune.run(recipe, taught_by, runs=tmp_path, quiet=True)
    labels = Examples.load(exposed.folder.examples("train")).labels
    assert (labels == len(LABELS)).sum() == 7  # one is as good as a text of validation
    odd = [" ".join(ODD[place : place + 6]) for place in range(5)]
    plain, taught = (
        np.mean([prediction.confidence for prediction in one.load().predict(odd)]) for one in (run, exposed)
    )
    assert taught < plain - 0.2
    # What learns from classes alone learns from the same rows as before.
    tfidf, before = (one.test["baselines"]["tfidf_logreg"]["metrics"] for one in (exposed, run))
    assert tfidf == before
    # They weigh 1 beside other tasks too, and count in no score of the classes.
    second = f"tasks.other={{type: text_classification, data: splits, labels: [{', '.join([*LABELS, 'none'])}]}}"
    options = [*taught_by, second, "tasks.other.split={by: given, leaks: drop}", "train.epochs=1", "evaluate.gates={}"]
    several = finetune.run(recipe, options, runs=tmp_path, quiet=True)
    assert set(Examples.load(several.folder.examples("train")).labels) == set(range(8))
    assert several.tests["tone"]["rows"] == run.test["rows"]


def test_they_count_in_no_score_of_the_classes(run, rows):
    test, known = run.test, np.array(rows["reference"]) != "none"
    assert (~known).sum() == test["outside"]["rows"] == 8
    assert test["rows"] == known.sum() == sum(map(sum, test["confusion"]))
    assert list(test["per_class"]) == test["labels"] == LABELS
    said = np.array(rows["prediction"])[known], np.array(rows["reference"])[known]
    assert test["metrics"]["accuracy"]["value"] == pytest.approx(accuracy_score(said[1], said[0]), abs=1e-6)
    assert test["metrics"]["macro_f1"]["value"] == pytest.approx(f1_score(said[1], said[0], average="macro"), abs=1e-6)
    assert sum(one["rows"] for one in test["slices"]["length"]) == known.sum()
    assert test["selective"]["points"][-1]["accuracy"] == test["metrics"]["accuracy"]["value"]


def test_the_metrics_say_how_well_they_are_told(run, rows):
    test, is_outside = run.test, np.array(rows["reference"]) == "none"
    scores = np.array(rows["outside_score"])
    found = test["metrics"]["outside_auroc"]
    assert found["value"] == pytest.approx(roc_auc_score(is_outside, scores), abs=1e-6)
    assert found["low"] <= found["value"] <= found["high"]
    assert test["metrics"]["outside_recall_at_95"]["value"] == pytest.approx(
        (scores[is_outside] > test["outside"]["threshold"]).mean(), abs=1e-6
    )
    assert test["outside"]["kept"] == pytest.approx(
        (scores[~is_outside] <= test["outside"]["threshold"]).mean(), abs=1e-6
    )
    assert test["baselines"]["majority"]["metrics"]["outside_auroc"]["value"] == 0.5
    assert {"outside_auroc", "outside_recall_at_95"} <= set(test["baselines"]["tfidf_logreg"]["difference"])
    assert test["gates"]["outside_auroc"] == {"condition": ">= 0.0", "value": found["value"], "passed": True}


def test_temperature_is_fitted_on_rows_with_a_class(run):
    examples = Examples.load(run.folder.examples("validation"))
    predictor = run.load()
    known = np.flatnonzero(examples.labels != IGNORED)
    part = examples.take(known)
    logits = predictor.task.compute_outputs(predictor.model, part, None)
    assert predictor.temperature == pytest.approx(fit_temperature(logits, part.labels), rel=1e-3)


def test_answers_hold_the_probability_of_being_outside(run, rows, command):
    predictor, odd = run.load(), [" ".join(ODD), "profit falls loss"]
    answers = predictor.predict(odd)
    logits = predictor.compute_text_logits(odd)
    rule = predictor.outside
    expected = 1 / (1 + np.exp(-(rule.slope * compute_outside_scores(logits, "energy") + rule.intercept)))
    assert [one.outside for one in answers] == pytest.approx(expected.tolist())
    assert list(answers[0].scores) == LABELS
    done = command("predict", run.folder.path, *odd)
    assert f"{answers[0].outside:.1%}" in done.out
    assert json.loads(command("predict", run.folder.path, *odd, "--json").out)[0]["outside"] == pytest.approx(
        expected[0]
    )


def test_a_scored_file_has_a_column_for_it(run, recipe, command, tmp_path):
    output = tmp_path / "scored.csv"
    assert (
        command("predict", run.folder.path, "--input", recipe.parent / "splits" / "test.csv", "--output", output).code
        == 0
    )
    scored = list(csv.DictReader(output.open(encoding="utf-8")))
    assert list(scored[0]) == [
        "text",
        "label",
        "predicted_label",
        "confidence",
        "outside",
        *(f"score_{x}" for x in LABELS),
    ]
    assert all(0 <= float(row["outside"]) <= 1 for row in scored)


def test_page_and_card_say_it(run):
    page = (run.folder.evaluation / "report.html").read_text(encoding="utf-8")
    found = run.test["metrics"]["outside_recall_at_95"]["value"]
    assert "Does it know what it does not know?" in page
    assert (
        f"Of 8 test rows labelled none, {100 * found:.1f}% are told from the others by the energy of the logits."
        in page
    )
    assert "If it may keep silent" in page
    card = run.folder.card.read_text(encoding="utf-8")
    assert "8 test rows labelled `none` belong to no class and count in the `outside_` scores alone." in card
    assert "negative, neutral, positive." in card


def test_another_held_out_set_is_scored_with_the_same_bar(run, recipe):
    again = run.evaluate(str(recipe.parent / "splits" / "validation.csv"))
    validation = json.loads((run.folder.evaluation / "validation.json").read_text())
    assert again["outside"] == validation["outside"]
    assert again["metrics"]["outside_auroc"]["value"] == validation["metrics"]["outside_auroc"]["value"]


def test_runs_are_compared_by_these_metrics_too(run, recipe, tmp_path):
    other = finetune.run(recipe, ["train.seed=5", "train.epochs=1"], runs=tmp_path, quiet=True)
    compared = compare_runs([run.folder.path, other.folder.path])
    for one, said in zip((run, other), compared["runs"].values(), strict=True):
        for name in ("accuracy", "outside_auroc", "outside_recall_at_95"):
            assert said["metrics"][name]["value"] == pytest.approx(one.test["metrics"][name]["value"], abs=1e-5)


def test_several_tasks_keep_such_rows_apart(recipe, tmp_path):
    task = ["type: text_classification", "data: splits", f"labels: [{', '.join(LABELS)}]", "split: {by: given}"]
    second = "tasks.other={" + ", ".join([*task, "out_of_scope: none", "columns: {label: label}"]) + "}"
    run = finetune.run(recipe, [second, "train.epochs=1"], runs=tmp_path, quiet=True)
    labels = Examples.load(run.folder.examples("validation")).labels
    assert (labels == IGNORED).sum() == 16
    assert set(labels) == {IGNORED, *range(6)}
    for name, test in run.tests.items():
        assert test["outside"]["rows"] == 8
        assert run.load()[name].outside.threshold == pytest.approx(test["outside"]["threshold"], abs=1e-6)
    answers = run.load().predict(["names"])
    assert all(0 < part[0].outside < 1 for part in answers.values())


def test_without_such_rows_on_validation_there_is_no_probability(recipe, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.read_text())
    (folder / "splits").mkdir()
    for name in ("train", "validation", "test"):
        lines = (recipe.parent / "splits" / f"{name}.csv").read_text().splitlines()
        kept = [line for line in lines if name != "validation" or not line.endswith(",none")]
        (folder / "splits" / f"{name}.csv").write_text("\n".join(kept) + "\n")
    run = finetune.run(folder / "recipe.yaml", ["train.epochs=1"], runs=tmp_path / "runs", quiet=True)
    assert run.load().predict(["names"])[0].outside is None
    assert run.test["metrics"]["outside_recall_at_95"]["value"] is not None
    findings = (run.folder.data / "findings.json").read_text()
    assert (
        "validation: must have rows labelled 'none' for out_of_scope, got none: no probability can be fitted."
        in findings
    )


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (
            ["tasks.tone.out_of_scope=nine"],
            DataError,
            r"splits: out_of_scope must be a label of the data, got 'nine', which no row has\. Did you mean 'none'\?",
        ),
        (
            ["tasks.tone.labels=[negative, none]"],
            DataError,
            r"splits: the label column must hold at least 2 classes, got \['negative'\]\.",
        ),
        (
            ["tasks.tone.out_of_scope=null"],
            RecipeError,
            r"evaluate\.gates\.outside_auroc: must be for tasks with `out_of_scope`, got tone without\.",
        ),
        (
            ["tasks.tone.out_of_scope=null", "tasks.tone.outlier_exposure=0.5", "evaluate.gates={}"],
            RecipeError,
            r"tasks\.tone\.outlier_exposure: must be 0 without out_of_scope, got 0\.5\.",
        ),
        (
            ["train.early_stop.metric=outside_auroc"],
            RecipeError,
            r"train\.early_stop\.metric: .* got 'outside_auroc'\. It comes by itself with",
        ),
    ],
)
def test_what_cannot_be_is_refused(recipe, overrides, error, words):
    with pytest.raises(error, match=words):
        check(recipe, overrides)
