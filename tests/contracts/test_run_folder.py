"""What a run leaves, file by file: people and programs build on it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow.parquet
import pytest
from huggingface_hub import ModelCard
from sklearn.metrics import accuracy_score, f1_score

import finetune
from finetune.artifact import run_folder
from finetune.artifact.run_folder import create_run_folder, find_run
from finetune.errors import UsageError
from finetune.layout import settle_splits
from finetune.recipe import load_recipe

LABELS = ["negative", "neutral", "positive"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Of a pickle (protocols 2 to 5), of what torch.save writes, and of an old one.
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x80\x8a")


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def list_files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read_rows(folder):
    """Id -> (text, label) of the set that the run was trained on."""
    with (folder.parents[2] / "in" / "rows.csv").open(encoding="utf-8", newline="") as file:
        return {f"rows:{number}": (row["text"], row["label"]) for number, row in enumerate(csv.DictReader(file), 1)}


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


# The folder


def test_layout(finished_run):
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", finished_run.name)
    assert finished_run.parent.name == "tiny"
    best = load(finished_run / "status.json")["training"]["best_step"]
    files = list_files(finished_run)
    checkpoints = {name.split("/")[1] for name in files if name.startswith("checkpoints/")}
    assert f"step-{best:08d}" in checkpoints
    assert files == sorted(
        [
            ".lock",
            "MODEL_CARD.md",
            *(
                f"checkpoints/{step}/{name}"
                for step in checkpoints
                for name in (
                    "average.safetensors",
                    "manifest.json",
                    "model.safetensors",
                    "optimizer.safetensors",
                    "state.json",
                )
            ),
            *(f"data/{name}.json" for name in ("findings", "ids", "task")),
            *(f"data/{split}.safetensors" for split in ("train", "validation", "test")),
            *(f"evaluation/{name}" for name in ("predictions.parquet", "report.html", "test.json", "validation.json")),
            "events.jsonl",
            *(
                f"model/{name}"
                for name in (
                    "adapter_config.json",
                    "adapter_model.safetensors",
                    "config.json",
                    "configuration_triad.py",
                    "finetune.json",
                    "modeling_triad.py",
                    "tokenizer.json",
                    "tokenizer_config.json",
                )
            ),
            "recipe.resolved.yaml",
            "recipe.yaml",
            "run.lock",
            "status.json",
        ]
    )


def test_full_tuning_writes_a_whole_model(write_recipe, tmp_path):
    run = finetune.run(write_recipe(tmp_path / "in", adapter={"method": "full"}), runs=tmp_path, quiet=True)
    files = list_files(run.folder.model)
    code = ["configuration_triad.py", "modeling_triad.py"]
    expected = ["config.json", "finetune.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert files == sorted(code + expected)
    # It needs no base any more, so it says nothing of where that lay.
    assert not [name for name in files if str(tmp_path).encode() in (run.folder.model / name).read_bytes()]


def test_the_recipe_is_kept_as_it_was_written(finished_run):
    source = finished_run.parents[2] / "in" / "recipe.yaml"
    assert (finished_run / "recipe.yaml").read_bytes() == source.read_bytes()
    settled = settle_splits(load_recipe(source), {"tone": "random"})  # which the rows had to say
    assert load_recipe(finished_run / "recipe.resolved.yaml") == settled


def test_the_resolved_recipe_runs_to_the_same_scores(finished_run, monkeypatch, tmp_path):
    monkeypatch.chdir(finished_run.parents[2] / "in")  # its `data` is a file beside the recipe
    again = finetune.run(finished_run / "recipe.resolved.yaml", runs=tmp_path, quiet=True)
    for name in ("validation.json", "test.json"):
        assert load(again.folder.evaluation / name) == load(finished_run / "evaluation" / name)
    assert (again.folder.model / "adapter_model.safetensors").read_bytes() == (
        finished_run / "model" / "adapter_model.safetensors"
    ).read_bytes()
    assert load(again.folder.lock) == load(finished_run / "run.lock")


def test_the_lock_names_what_a_repetition_needs(finished_run, tiny_base):
    lock = load(finished_run / "run.lock")
    assert lock.keys() == {"python", "system", "cores", "versions", "seed", "precision", "base", "adapters", "data"}
    assert lock["base"]["origin"] == "local folder"
    assert lock["base"]["pooling"] == "pooler"
    assert (
        lock["base"]["sha256"] == run_folder.hashlib.sha256((tiny_base / "model.safetensors").read_bytes()).hexdigest()
    )
    assert lock["data"]["name"] == "rows"
    assert re.fullmatch(r"[0-9a-f]{64}", lock["data"]["sha256"])


def load_ids(run: Path) -> dict[str, list[str]]:
    """Split -> ids of the run's only task."""
    (ids,) = load(run / "data" / "ids.json").values()
    return ids


def test_ids_name_every_row_once(finished_run):
    ids = load_ids(finished_run)
    assert {split: len(rows) for split, rows in ids.items()} == {"train": 63, "validation": 9, "test": 18}
    assert sorted(row for rows in ids.values() for row in rows) == sorted(read_rows(finished_run))


def test_events_tell_every_step(finished_run):
    events = [json.loads(line) for line in (finished_run / "events.jsonl").read_text().splitlines()]
    training = load(finished_run / "status.json")["training"]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, training["steps"] + 1))
    evaluations = [event for event in events if event["event"] == "evaluation"]
    assert len(evaluations) == 2
    assert evaluations[0]["metrics"].keys() == {"loss", "macro_f1", "accuracy", "ece"}


def test_no_pickle_anywhere(finished_run):
    for name in list_files(finished_run):
        content = (finished_run / name).read_bytes()
        assert not content.startswith(PICKLE_STARTS), name
        if name.endswith(".safetensors"):
            size = int.from_bytes(content[:8], "little")
            assert isinstance(json.loads(content[8 : 8 + size]), dict), name
        else:
            assert name.endswith((".json", ".jsonl", ".yaml", ".md", ".html", ".parquet", ".lock", ".py")), name


def test_no_secret_of_the_environment_in_any_file(finished_run, secrets):
    for name in list_files(finished_run):
        content = (finished_run / name).read_bytes()
        assert not [variable for variable, secret in secrets.items() if secret.encode() in content], name


# Scores


def test_test_json(finished_run):
    test = load(finished_run / "evaluation" / "test.json")
    assert list(test["metrics"]) == load_recipe(finished_run / "recipe.resolved.yaml").evaluate.metrics
    drawn = {name: score for name, score in test["metrics"].items() if name != "ece"}
    for name, score in test["metrics"].items():
        assert score.keys() == {"value", "low", "high"}
        assert score["low"] <= score["high"] if name in drawn else score["low"] is None
    baseline = test["baselines"]["majority"]
    assert list(baseline["metrics"]) == list(baseline["difference"]) == list(test["metrics"])
    for name, score in test["metrics"].items():
        expected = score["value"] - baseline["metrics"][name]["value"]
        assert baseline["difference"][name]["value"] == pytest.approx(expected, abs=2e-6)
    assert all(0 < baseline["difference"][name]["p_value"] <= 1 for name in drawn)
    assert (test["split"], test["rows"], test["labels"], test["opened"]) == ("test", 18, LABELS, 1)
    assert (test["confidence"], test["resamples"], test["seed"]) == (0.95, 100, 13)
    assert np.array(test["confusion"]).sum() == 18
    assert "opened" not in load(finished_run / "evaluation" / "validation.json")


def test_predictions_give_the_scores(finished_run):
    table = pyarrow.parquet.read_table(finished_run / "evaluation" / "predictions.parquet")
    assert table.column_names == ["id", "text", "reference", "prediction", *(f"score_{label}" for label in LABELS)]
    rows, test = read_rows(finished_run), load(finished_run / "evaluation" / "test.json")
    ids, references, predictions = (table[name].to_pylist() for name in ("id", "reference", "prediction"))
    assert ids == load_ids(finished_run)["test"]
    assert [rows[i] for i in ids] == list(zip(table["text"].to_pylist(), references, strict=True))
    scores = np.stack([table[f"score_{label}"].to_numpy() for label in LABELS], axis=1)
    assert scores.sum(axis=1) == pytest.approx(1.0)
    assert [LABELS[i] for i in scores.argmax(axis=1)] == predictions
    assert test["metrics"]["accuracy"]["value"] == pytest.approx(accuracy_score(references, predictions), abs=1e-6)
    f1 = f1_score(references, predictions, labels=LABELS, average="macro", zero_division=0)
    assert test["metrics"]["macro_f1"]["value"] == pytest.approx(f1, abs=1e-6)


def test_every_opening_of_the_test_split_is_counted_and_shown(own_run):
    once = (own_run / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "Opened 2 times" not in once
    before = load(own_run / "evaluation" / "test.json")
    again = finetune.evaluate(own_run)
    assert again == before | {"opened": 2} == load(own_run / "evaluation" / "test.json")
    assert "Opened 2 times" in (own_run / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "The test split was opened 2 times." in (own_run / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert finetune.evaluate(own_run.parent)["opened"] == 3


@pytest.mark.parametrize(("file", "name"), [("later.csv", "later"), ("test.csv", "other-test")])
def test_another_set_leaves_the_test_split_closed_and_names_shared_rows(own_run, finished_run, tmp_path, file, name):
    rows, ids = read_rows(finished_run), load_ids(finished_run)
    fresh = [(f"an entirely new headline number {i}", label) for i, label in enumerate(LABELS)]
    path = write_csv(tmp_path / file, [*fresh, rows[ids["train"][0]], rows[ids["train"][5]]])
    before = {key: (own_run / "evaluation" / key).read_bytes() for key in ("test.json", "validation.json")}
    scored = finetune.evaluate(own_run, str(path))
    assert {key: (own_run / "evaluation" / key).read_bytes() for key in before} == before
    assert scored == load(own_run / "evaluation" / f"{name}.json")
    assert (scored["split"], scored["rows"], scored["data"]) == (name, 5, str(path))
    assert "opened" not in scored
    assert scored["metrics"].keys() == scored["baselines"]["majority"]["metrics"].keys()
    (leak,) = [finding for finding in scored["findings"] if finding["kind"] == "leak"]
    assert leak["message"].endswith("). The score is too hopeful: take them out of the set.")
    assert (leak["severity"], leak["count"], leak["rows"]) == ("warning", 2, [ids["train"][0], ids["train"][5]])


# The card and what is shared with others


def test_the_header_of_the_card_holds_the_scores_of_test_json(finished_run):
    card = ModelCard.load(finished_run / "MODEL_CARD.md")
    test = load(finished_run / "evaluation" / "test.json")
    assert {one.metric_name: one.metric_value for one in card.data.eval_results} == {
        name: score["value"] for name, score in test["metrics"].items()
    }
    assert {one.dataset_split for one in card.data.eval_results} == {"test"}
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-classification")
    assert card.data.base_model is None, "a folder of this machine means nothing to others"
    for name, score in test["metrics"].items():
        interval = f"({score['low']:.3f} to {score['high']:.3f})" if name != "ece" else "|"
        assert f"{score['value']:.3f} {interval}" in card.text, name
    assert "The test split was opened 1 time." in card.text


def test_the_card_shows_no_path_of_this_machine(finished_run, tmp_path_factory):
    card = (finished_run / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert str(tmp_path_factory.getbasetemp()) not in card
    assert str(Path.home()) not in card


def test_a_base_of_the_hub_leaves_no_path_of_this_machine(write_recipe, tiny_base, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--acme--tiny"
    shutil.copytree(tiny_base, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    path = write_recipe(tmp_path / "in", model={"base": "acme/tiny"}, name="hub")
    run = finetune.run(path, runs=tmp_path / "runs", quiet=True)
    assert load(run.folder.lock)["base"]["origin"] == "Hub cache"
    assert load(run.folder.model / "adapter_config.json")["base_model_name_or_path"] == "acme/tiny"
    assert ModelCard.load(run.folder.card).data.base_model == "acme/tiny"
    shared = [path for path in run.folder.path.rglob("*") if path.is_file() and path.name != "status.json"]
    assert len(shared) > 20
    assert [path for path in shared if str(tmp_path).encode() in path.read_bytes()] == []
    assert finetune.load(run.folder.model).predict(["shares fall"])[0].label in LABELS


# Names


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    folders = [create_run_folder("tiny", "the same recipe", tmp_path).path for _ in range(3)]
    first = folders[0].name
    assert re.fullmatch(r"20260102-030405-[0-9a-f]{8}", first)
    assert [folder.name for folder in folders] == [first, f"{first}-2", f"{first}-3"]


def make_run(folder, state):
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": state}))
    return folder


def test_a_name_means_its_latest_finished_run(tmp_path):
    make_run(tmp_path / "tiny" / "20260101-000000-ffffffff", "finished")
    latest = make_run(tmp_path / "tiny" / "20260102-000000-00000000", "finished")
    stopped = make_run(tmp_path / "tiny" / "20260103-000000-aaaaaaaa", "stopped")
    (tmp_path / "tiny" / "20260104-000000-bbbbbbbb").mkdir()  # made a moment ago, nothing in it yet
    assert find_run(tmp_path / "tiny").path == latest
    assert find_run(str(tmp_path / "tiny"), finished=False).path == stopped
    assert find_run(stopped, finished=False).path == stopped


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny/20260103-000000-aaaaaaaa", r"must be a finished run, got one that is stopped\. Try: finetune resume "),
        ("gone", r"gone: must be a finished run, got none\. .* has tiny\. Make one: finetune run RECIPE"),
        ("empty", r"empty: must be a finished run, got none\. Make one: finetune run RECIPE"),
        ("tiny", r"tiny: must be a finished run, got one that is stopped\. Try: finetune resume .*tiny.20260103"),
        ("", r"must be a finished run, got none\. .* has tiny\. Make one: finetune run RECIPE"),
    ],
)
def test_no_finished_run(tmp_path, name, words):
    make_run(tmp_path / "tiny" / "20260103-000000-aaaaaaaa", "stopped")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=words):
        find_run(tmp_path / name)


def test_a_name_without_its_folder_is_told_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "tiny" / "20260103-000000-aaaaaaaa", "finished")
    with pytest.raises(UsageError, match=r"^tiny: must be a finished run, got none\. Did you mean runs.tiny\?$"):
        find_run("tiny")


def test_a_damaged_file_of_a_run_is_told(tmp_path):
    (tmp_path / "status.json").write_text("{")
    words = r"status\.json: must be a JSON file that this toolkit wrote, got .*\. Restore it, or use another run\."
    with pytest.raises(UsageError, match=words):
        find_run(tmp_path)
