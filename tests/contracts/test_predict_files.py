"""`finetune predict RUN --input FILE --output FILE`."""

from __future__ import annotations

import csv
import json
import shutil
import tracemalloc
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from ruamel.yaml import YAML

import finetune
from finetune.artifact import score_file as score_module
from finetune.artifact.load import Predictor
from finetune.artifact.score_file import score_file
from finetune.errors import ResourceError

ADDED = ["predicted_label", "confidence", "score_negative", "score_neutral", "score_positive"]
# The text stands between other columns; their values must come back as they are.
RECORDS = [
    {"id": "007", "text": 'Profit falls, "again"', "note": "a,b"},
    {"id": "NA", "text": "gains\nbeats", "note": ""},
    {"id": "é", "text": "schedule", "note": "null"},
]


def write(path, records):
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    return path


def read(path):
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pyarrow.parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("output", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet"])
def test_every_column_comes_back_beside_the_scores(command, finished_run, tmp_path, source, output):
    rows, scored = write(tmp_path / f"rows.{source}", RECORDS), tmp_path / "out" / f"scored.{output}"
    done = command("predict", finished_run, "--input", rows, "--output", scored)
    assert done.code == 0
    assert done.out == f"{scored}: 3 rows written.\n"
    records = read(scored)
    assert [list(record) for record in records] == [["id", "text", "note", *ADDED]] * 3
    assert [{name: record[name] for name in RECORDS[0]} for record in records] == RECORDS
    expected = finetune.load(finished_run).predict([record["text"] for record in RECORDS])
    assert [record["predicted_label"] for record in records] == [one.label for one in expected]
    for record, one in zip(records, expected, strict=True):
        assert float(record["confidence"]) == pytest.approx(one.confidence, abs=1e-9)
        assert {name: float(record[f"score_{name}"]) for name in one.scores} == pytest.approx(one.scores, abs=1e-9)
    assert [path.name for path in scored.parent.iterdir()] == [scored.name], "no temporary file is left"


@pytest.mark.parametrize("output", ["csv", "jsonl", "parquet"])
def test_a_row_of_many_classes_takes_little_memory(finished_run, tmp_path, monkeypatch, output):
    """A dict of scores for each row took 7 kB at 77 classes; the scores themselves are 0.6 kB."""
    rows, labels = 2000, [f"class {i}" for i in range(77)]
    loaded = finetune.load(finished_run)
    predictor = replace(loaded, task=replace(loaded.task, labels=labels))
    logits = np.random.default_rng(0).normal(size=(rows, 77))
    monkeypatch.setattr(score_module, "load", lambda *_args, **_keys: predictor)
    monkeypatch.setattr(Predictor, "compute_text_logits", lambda *_args: logits)
    source, scored = write(tmp_path / "rows.csv", [{"text": "gains"}] * rows), tmp_path / f"scored.{output}"
    tracemalloc.start()
    try:
        score_file(finished_run, source, scored, quiet=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4000 * rows
    last = read(scored)[-1]
    (expected,) = predictor.build_predictions(logits[-1:])
    assert last["predicted_label"] == expected.label
    assert float(last["score_class 76"]) == pytest.approx(expected.scores["class 76"], abs=1e-9)


def test_another_text_column_leaves_a_column_called_text_alone(command, finished_run, tmp_path):
    rows = write(tmp_path / "rows.csv", [{"text": "the body", "headline": "profit falls", "label": "kept"}])
    scored = tmp_path / "scored.csv"
    assert command("predict", finished_run, "--input", rows, "--output", scored, "--column", "headline").code == 0
    (record,) = read(scored)
    assert {name: record[name] for name in ("text", "headline", "label")} == read(rows)[0]
    (expected,) = finetune.load(finished_run).predict(["profit falls"])
    assert float(record["confidence"]) == pytest.approx(expected.confidence, abs=1e-9)


def test_values_of_any_json_type_come_back(command, finished_run, tmp_path):
    records = [
        {"text": "profit falls", "id": 1, "tags": ["a", {"b": None}], "mixed": 1},
        {"text": True, "id": None, "tags": None, "mixed": "one"},
        {"text": 12, "id": 2**53 + 1, "tags": [], "mixed": True},
    ]
    scored = tmp_path / "scored.jsonl"
    done = command("predict", finished_run, "--input", write(tmp_path / "rows.jsonl", records), "--output", scored)
    assert done.code == 0
    assert [{name: record[name] for name in records[0]} for record in read(scored)] == records
    csv_file = tmp_path / "scored.csv"
    done = command("predict", finished_run, "--input", tmp_path / "rows.jsonl", "--output", csv_file)
    assert done.code == 3
    assert f"{csv_file}: every column must fit .csv, got '" in done.err
    assert done.err.endswith("'. Write .jsonl.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "scored.jsonl"]


def test_times_and_gaps_of_parquet_come_back(command, finished_run, tmp_path):
    records = [
        {"text": "falls", "time": datetime(2025, 1, 2, 3, 4, 5), "price": 1.5},
        {"text": "gains", "time": None, "price": float("nan")},
    ]
    rows = write(tmp_path / "rows.parquet", records)
    for name in ("scored.jsonl", "scored.parquet"):
        assert command("predict", finished_run, "--input", rows, "--output", tmp_path / name).code == 0
    first, second = read(tmp_path / "scored.jsonl")
    assert (first["time"], first["price"], second["time"], second["price"]) == ("2025-01-02T03:04:05", 1.5, None, None)
    assert read(tmp_path / "scored.parquet")[0]["time"] == records[0]["time"]


def test_an_old_output_is_replaced_whole(command, finished_run, tmp_path):
    scored = tmp_path / "scored.csv"
    scored.write_text("old " * 1000)
    rows = write(tmp_path / "rows.csv", RECORDS)
    assert command("predict", finished_run, "--input", rows, "--output", scored).code == 0
    assert len(read(scored)) == 3


@pytest.mark.parametrize(
    ("source", "output", "options", "code", "words"),
    [
        ("rows.csv", "rows.csv", [], 2, "rows.csv: must be another file than the input, got the same. Choose another"),
        ("rows.csv", "sub/../rows.csv", [], 2, "must be another file than the input, got the same"),
        ("rows.csv", "out.xlsx", [], 2, "out.xlsx: must end in .csv, .jsonl, .parquet, got '.xlsx'."),
        ("rows.csv", "out", [], 2, "out: must end in .csv, .jsonl, .parquet, got 'no ending'."),
        ("rows.xlsx", "out.csv", [], 3, "rows.xlsx: must end in one of .csv, .tsv, .jsonl, .parquet"),
        ("gone.csv", "out.csv", [], 3, "gone.csv: must be a file, got nothing there. Check the name."),
        (
            "rows.csv",
            "out.csv",
            ["--column", "headlin"],
            3,
            "rows.csv: column 'headlin' must exist, got columns headline, text. Did you mean 'headline'? "
            "Name the text column with --column.",
        ),
        ("scored.csv", "out.csv", [], 3, "scored.csv: confidence must be free, got columns of that name. Rename them."),
        ("rows.csv", "rows.csv/out.csv", [], 5, "rows.csv/out.csv: must be writable, got "),
        ("rows.csv", "rows.csv/out.csv", [], 5, ". Free it, or choose another --output."),
    ],
)
def test_refusals_touch_nothing(command, finished_run, tmp_path, monkeypatch, source, output, options, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "rows.csv", [{"headline": "a", "text": "b"}])
    write(tmp_path / "scored.csv", [{"text": "b", "confidence": "1"}])
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = command("predict", finished_run, "--input", source, "--output", output, *options)
    assert done.code == code
    assert words in done.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet"])
def test_empty_rows_are_named_before_the_model_is_loaded(command, finished_run, tmp_path, monkeypatch, source):
    """No class is true of a text that says nothing; training refuses such rows too."""
    records = [{"id": str(i), "text": text} for i, text in enumerate(["falls", "", "gains", " \t\n\u3000"])]
    rows, scored = write(tmp_path / f"rows.{source}", records), tmp_path / "scored.csv"
    monkeypatch.setattr(score_module, "load", None)  # whoever loads the model first fails with a bug's 70
    done = command("predict", finished_run, "--input", rows, "--output", scored)
    words = f"{rows}: every row must have a text, got none in 2 rows (2, 4). Fill or remove them, or name another "
    assert (done.code, done.err) == (3, f"finetune: {words}column with --column.\n")
    assert not scored.exists()


def test_a_null_is_no_text(command, finished_run, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"text": "falls"}] + [{"text": None}] * 30)
    done = command("predict", finished_run, "--input", rows, "--output", tmp_path / "scored.csv")
    assert done.code == 3
    shown = ", ".join(str(number) for number in range(2, 22))
    assert f"got none in 30 rows ({shown}, ...). Fill or remove them" in done.err


def test_empty_texts_are_refused_like_empty_rows(command, finished_run):
    done = command("predict", finished_run, "falls", " ")
    assert (done.code, done.out) == (2, "")
    assert done.err == "finetune: predict: no text may be empty, got 1 text (2). Leave out what is empty.\n"


def test_an_output_that_cannot_be_written_is_told_before_the_rows_are_scored(finished_run, tmp_path, monkeypatch):
    source = tmp_path / "rows.csv"
    write(source, [{"text": "b"}])
    monkeypatch.setattr(
        Predictor, "compute_text_logits", None
    )  # whoever scores the rows first fails with another error
    with pytest.raises(ResourceError, match=r"out\.csv: must be writable, got "):
        score_file(finished_run, source, tmp_path / "rows.csv" / "out.csv")


def test_texts_are_where_the_runs_own_data_have_them(command, finished_run, tmp_path):
    """A run that was trained on the column `body` finds it in a file that has `text` too; one without it reads that."""
    run = Path(shutil.copytree(finished_run, tmp_path / "renamed"))
    recipe = YAML().load(run / "recipe.resolved.yaml")
    recipe["tasks"]["tone"]["columns"] = {"text": "body", "label": "sentiment"}
    YAML().dump(recipe, run / "recipe.resolved.yaml")
    for names, expected in ((["body", "text"], "body"), (["text"], "text"), (["text", "body"], "body")):
        texts = {name: "gains beats wins" if name == expected else "loss falls cuts" for name in names}
        rows = write(tmp_path / "rows.jsonl", [texts])
        done = command("predict", run, "--input", rows, "--output", tmp_path / "out.jsonl")
        assert done.code == 0, done.err
        assert read(tmp_path / "out.jsonl")[0]["predicted_label"] == "positive"
