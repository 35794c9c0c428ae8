"""Recipes of question answering from their data to a judged model that answers, whatever tunes it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

import finetune
from finetune.artifact.load import load
from finetune.artifact.predictor import Predictor
from finetune.data.batches import Examples
from finetune.data.sources import load_rows
from finetune.errors import UsageError
from finetune.evaluation.intervals import Resampling, compute_interval
from finetune.evaluation.scoring import round_numbers
from finetune.fitting import read_validation
from finetune.models.classifier import get_padding
from finetune.recipe import load_recipe
from finetune.runner import Run

METRICS = ["answer_f1", "exact_match", "has_answer_f1", "no_answer_accuracy"]
COLUMNS = {"text": "question", "passage": "passage", "answer": "answer"}
NOUNS = ["loss", "meeting", "schedule", "gains"]
VALUES = ["low", "high", "new", "old", "big", "long", "last", "first"]


def write_questions(path: Path, passages: int = 20, seed: int = 7) -> Path:
    """Passages that say something about three of four nouns, and a question about each."""
    generator = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["place", "question", "passage", "answer"])
        for place in range(passages):
            nouns, values = (generator.permutation(words).tolist() for words in (NOUNS, VALUES))
            said = dict(zip(nouns[:3], values, strict=False))
            passage = " ".join(f"The {noun} is {value} of {place}." for noun, value in said.items())
            writer.writerows((place, f"The {noun}?", passage, said.get(noun, "")) for noun in nouns)
    return path


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Callable[..., Path]:
    """A function (name, **changes) -> a recipe in a folder of its own, with its rows; a change replaces a section."""

    def call(name: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        task = {
            "type": "question_answering",
            "data": "questions.csv",
            "columns": COLUMNS,
            "split": {"by": "group", "column": "place", "validation": 0.2, "test": 0.3},
        }
        recipe = {
            "recipe": 1,
            "name": "answers",
            "tasks": {"tone": task},
            "train": {"epochs": 4, "learning_rate": 0.01, "ema_decay": None},
            "evaluate": {"resamples": 100, "samples": 4},
        } | changes
        recipe["model"] = {"base": str(tiny_base), "max_length": 40} | changes.get("model", {})
        recipe["train"] = {"tokens_per_batch": 400, "precision": "float32"} | recipe["train"]
        write_questions(folder / "questions.csv")
        path = folder / "recipe.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        return path

    return call


@pytest.fixture(scope="module")
def done(write: Callable[..., Path]) -> Run:
    path = write("done")
    return finetune.run(path, runs=path.parent / "runs", quiet=True)


def read_predictions(run: Run) -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(run.folder.evaluation / "predictions.parquet").to_pydict()


def test_scores_have_one_layout(done: Run) -> None:
    test = done.test
    assert list(test["metrics"]) == METRICS
    assert list(test["baselines"]) == ["no_answer", "bm25_sentence"]
    assert test["baselines"]["no_answer"]["metrics"]["no_answer_accuracy"]["value"] == 1.0
    assert test["baselines"]["no_answer"]["metrics"]["has_answer_f1"]["value"] == 0.0
    assert test["baselines"]["no_answer"]["metrics"]["answer_f1"]["value"] == 0.25  # one question of four
    assert test["baselines"]["bm25_sentence"]["metrics"]["answer_f1"]["value"] > 0.25
    drawn = [
        score for score in test["metrics"].values() if score["low"] is not None
    ]  # of equal resamples there is none
    assert drawn
    assert all(score["low"] <= score["value"] <= score["high"] for score in drawn)
    assert "threshold" in json.loads((done.folder.model / "finetune.json").read_text())["fitted"]["tone"]


def test_predictions_are_the_answers_of_the_loaded_model(done: Run) -> None:
    predictions = read_predictions(done)
    data = done.folder.path.parents[2] / "questions.csv"
    rows = {row.id: row.values for row in load_rows(str(data), COLUMNS, roles=tuple(COLUMNS)).rows}
    predictor = done.load()
    assert isinstance(predictor, Predictor)
    pairs = [(rows[i]["text"], rows[i]["passage"]) for i in predictions["id"]]
    for answer, (_, passage), text, start, end, score in zip(
        predictor.answer_all(pairs),
        pairs,
        *(predictions[name] for name in ("prediction", "start", "end", "score")),
        strict=True,
    ):
        assert (answer.text, answer.start, answer.end) == (text, start, end)
        assert answer.score == pytest.approx(score, abs=1e-5)
        assert not text or passage[start:end] == text
    assert predictor.answer(*pairs[0]) == predictor.answer_all(pairs[:1])[0]
    assert predictions["reference"] == [rows[i]["answer"] for i in predictions["id"]]


def test_a_passage_of_many_windows_is_read_whole(done: Run) -> None:
    predictor = done.load()
    passage = " ".join(["The bank names a meeting."] * 40)
    found = predictor.answer("The loss?", passage)
    assert passage[found.start or 0 : found.end or 0] == found.text
    assert predictor.answer("", "").text == ""


def test_another_set_is_scored_with_the_same_threshold(done: Run, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "other.csv", 6, seed=3)
    scored = finetune.evaluate(done.folder.path, str(path))
    assert scored["rows"] == 24
    predictor = done.load()
    rows = load_rows(str(path), COLUMNS, roles=tuple(COLUMNS)).rows
    answers = predictor.answer_all([(row.values["text"], row.values["passage"]) for row in rows])
    exact = np.mean([answer.text == row.values["answer"] for answer, row in zip(answers, rows, strict=True)])
    assert scored["metrics"]["exact_match"]["value"] == pytest.approx(exact, abs=1e-6)


def test_the_report_and_the_card_say_what_it_does(done: Run) -> None:
    report = (done.folder.evaluation / "report.html").read_text(encoding="utf-8")
    assert "Answers" in report
    assert "The sentence nearest to the question (BM25)" in report
    card = done.folder.card.read_text(encoding="utf-8")
    assert "pipeline_tag: question-answering" in card
    assert "finds the answer to a question in a passage, or says that there is none." in card


def test_two_runs_are_compared_row_by_row(done: Run) -> None:
    from finetune.artifact.predictions import load_predictions

    predictions = load_predictions(done.folder)
    assert predictions.metrics == METRICS
    resampling = predictions.resample(done.test["resamples"], done.test["seed"])
    found = predictions.compute_estimates(METRICS, resampling)
    for name, estimate in found.items():
        assert round_numbers(compute_interval(estimate, 0.95)) == done.test["metrics"][name]


def test_rows_that_were_split_as_groups_are_drawn_as_groups(done: Run) -> None:
    from finetune.artifact.predictions import load_predictions

    columns = load_predictions(done.folder).columns
    places = {}  # all questions of a place have its passage
    for group, row in zip(columns["group"], columns["id"], strict=True):
        places.setdefault(group, []).append(row)
    assert done.test["groups"] == len(places) > 1
    assert len({len(rows) for rows in places.values()}) == 1
    report = (done.folder.evaluation / "report.html").read_text(encoding="utf-8")
    assert f"{done.test['rows']} rows in {len(places)} groups" in report
    alone = load_predictions(done.folder).compute_estimates(METRICS, Resampling(100, 13))
    assert compute_interval(alone["exact_match"], 0.95) != pytest.approx(done.test["metrics"]["exact_match"], abs=1e-6)


def test_other_verbs_say_what_to_do(done: Run, finished_run: Path) -> None:
    predictor = done.load()
    words = r"got question_answering\. In Python: finetune\.load\(RUN\)\.answer\(question, passage\)\."
    with pytest.raises(UsageError, match=rf"predict: must get a run that gives labels, {words}"):
        predictor.predict(["text"])
    with pytest.raises(UsageError, match=rf"generate: must get a run that writes text \(.*\), {words}"):
        predictor.generate(["text"])
    with pytest.raises(
        UsageError, match=r"answer: must get a run of type question_answering, got text_classification\."
    ):
        finetune.load(finished_run).answer("q", "p")


def test_a_wrong_answer_in_the_data_stops_the_run(write: Callable[..., Path], command: Callable[..., Any]) -> None:
    path = write("wrong")
    data = path.parent / "questions.csv"
    data.write_text(data.read_text(encoding="utf-8") + "99,The oil?,The oil is low.,high\n", encoding="utf-8")
    found = command("check", path)
    assert found.code == 3
    assert "every answer must stand in its passage, got questions:81 has 'high', which is not there." in found.err


def test_one_question_about_two_passages_is_no_leak_but_the_same_pair_is(
    write: Callable[..., Path], command: Callable[..., Any]
) -> None:
    path = write("leak")
    assert command("check", path).code == 0  # "The loss?" is asked about every passage
    data = path.parent / "questions.csv"
    header, *rows = data.read_text(encoding="utf-8").splitlines()
    rows += [re.sub(r"^\d+", "100", row) for row in rows if row.startswith(("1,", "2,", "3,", "4,", "5,"))]
    rows += [re.sub(r"^\d+", "200", row) for row in rows if row.startswith(("6,", "7,", "8,", "9,"))]
    data.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    found = command("check", path)
    assert found.code == 3
    assert "must not share texts with" in found.err


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"method": "full"}, "model": {"max_length": 24}, "train": {"label_smoothing": 0.1}},
        {"adapter": {"method": "lora"}, "model": {"architecture": "native"}},
        {"adapter": {"method": "head"}},
        {"adapter": {"method": "adapter"}},
        {"adapter": {"method": "prefix", "virtual_tokens": 4}},
        {"adapter": {"method": "prompt", "virtual_tokens": 4}},
    ],
    ids=["full, windows", "native", "head", "adapter", "prefix", "prompt"],
)
def test_what_was_trained_is_what_is_loaded(write: Callable[..., Path], changes: dict[str, Any]) -> None:
    """The loss on validation of the model in training, and of the one that was saved, loaded and perhaps merged."""
    steps = {"epochs": 1, "max_steps": 3, "ema_decay": None} | changes.get("train", {})
    path = write("method", **(changes | {"train": steps}))
    run = finetune.run(path, runs=path.parent / "runs", quiet=True, open_test=False)
    predictor = load(run.folder.model)
    assert isinstance(predictor, Predictor)
    examples = Examples.load(run.folder.examples("validation"))
    padding = get_padding(predictor.model, predictor.tokenizer)
    outputs = predictor.task.compute_outputs(predictor.model, examples, padding)
    found = predictor.task.compute_metrics(outputs, examples.labels, METRICS)
    assert found == pytest.approx(read_validation(run.folder), abs=1e-4, nan_ok=True)
    events = [json.loads(line) for line in run.folder.events.read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) == 3
    assert min(event["grad_norm"] for event in events if event["event"] == "step") > 0
    assert load_recipe(run.folder.recipe).tasks["tone"].type == "question_answering"
