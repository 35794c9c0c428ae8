"""`finetune evaluate --model`: any model on a held-out set, with the figures that its own run would get."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

LABELS = ["negative", "neutral", "positive"]
KEYWORDS = (["falls", "loss"], ["names", "meeting"], ["gains", "beats"])
Command = Callable[..., Any]


@pytest.fixture
def rows(finished_run: Path) -> Path:
    """Labelled rows, without splits."""
    return finished_run.parents[2] / "in" / "rows.csv"


@pytest.fixture
def split_rows(rows: Path, tmp_path: Path) -> Path:
    """A folder with train.csv and test.csv."""
    with rows.open(encoding="utf-8", newline="") as file:
        header, *content = csv.reader(file)
    folder = tmp_path / "split"
    folder.mkdir()
    for name, part in (("train", content[30:]), ("test", content[:30])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *part])
    return folder


@pytest.fixture
def plain(tiny_base: Path, tmp_path: Path) -> Path:
    """A classifier that transformers wrote, with a random head and classes in capitals, the last one first."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    config = BertConfig.from_pretrained(
        tiny_base, id2label={0: "POSITIVE", 1: "NEUTRAL", 2: "NEGATIVE"}, label2id={}, num_labels=3
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(tiny_base, config=config)
    torch.nn.init.normal_(model.classifier.weight)
    words = [word for group in KEYWORDS for word in group]
    with torch.no_grad():  # in the middle of the words, so that no class gets all texts
        model.classifier.bias -= model.eval()(**tokenizer(words, padding=True, return_tensors="pt")).logits.mean(0)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def compute_macro_f1(folder: Path, rows: Path, names: dict[int, str]) -> float:
    """What transformers and scikit-learn say of a plain classifier."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with rows.open(encoding="utf-8", newline="") as file:
        content = list(csv.DictReader(file))
    tokens = tokenizer([row["text"] for row in content], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**tokens).logits.argmax(-1).tolist()
    return float(f1_score([row["label"] for row in content], [names[i] for i in found], average="macro"))


def score(command: Command, *arguments: Any) -> dict[str, Any]:
    done = command("evaluate", *arguments, "--json")
    assert done.code == 0, done.err
    scored: dict[str, Any] = json.loads(done.out)
    return scored


def test_a_pushed_model_gets_the_figures_of_its_run(
    hub: Any,
    waits: list[float],
    run: Path,
    finished_run: Path,
    tiny_base: Path,
    rows: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.create("acme/tiny-base", files={path.name: path.read_bytes() for path in tiny_base.iterdir()})
    assert command("push", run, "acme/tone").code == 0
    found = score(command, "--model", "acme/tone", "--data", rows)
    expected = score(command, finished_run, "--data", rows)
    assert (found["model"], found["rows"]) == ("acme/tone", 90)
    assert set(expected["metrics"]) <= set(found["metrics"])
    for name, value in expected["metrics"].items():
        assert found["metrics"][name]["value"] == pytest.approx(value["value"], abs=1e-6)
    assert found["metrics"]["macro_f1"]["low"] < found["metrics"]["macro_f1"]["value"] > 0.6
    assert found["temperature"] == pytest.approx(expected["temperature"])
    assert found["baselines"] == {}  # nothing to fit them on
    (tmp_path / "here" / "acme").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    again = score(command, "--model", "acme/tone", "--data", rows)
    assert again["metrics"] == found["metrics"], "a folder that is called like the owner hides no model"


def test_a_plain_classifier_and_the_baselines_of_the_data(plain: Path, split_rows: Path, command: Command) -> None:
    found = score(command, "--model", plain, "--data", split_rows)
    names = dict(enumerate(reversed(LABELS)))
    expected = compute_macro_f1(plain, split_rows / "test.csv", names)
    assert 0.17 < expected < 0.9
    assert found["metrics"]["macro_f1"]["value"] == pytest.approx(expected, abs=1e-6)
    assert found["rows"] == 30
    assert list(found["baselines"]) == ["majority", "tfidf_logreg"]
    majority, words = (found["baselines"][name]["metrics"]["accuracy"]["value"] for name in found["baselines"])
    assert majority == pytest.approx(1 / 3, abs=1e-6)
    assert words > 0.8
    shown = command("evaluate", "--model", plain, "--data", split_rows)
    assert shown.code == 0
    assert "majority" in shown.out


def test_classes_are_named_in_the_order_of_the_logits(plain: Path, rows: Path, command: Command) -> None:
    found = score(command, "--model", plain, "--data", rows, "--labels", "neutral,negative,positive")
    names = {0: "neutral", 1: "negative", 2: "positive"}
    assert found["metrics"]["macro_f1"]["value"] == pytest.approx(compute_macro_f1(plain, rows, names), abs=1e-6)


def test_columns_may_have_other_names(plain: Path, rows: Path, tmp_path: Path, command: Command) -> None:
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(rows.read_text().replace("text,label", "headline,tone", 1))
    options = ("--column", "text=headline", "--column", "label=tone")
    found = score(command, "--model", plain, "--data", renamed, *options)
    assert found["metrics"] == score(command, "--model", plain, "--data", rows)["metrics"]


def test_the_card_of_the_data_says_what_codes_mean(
    finished_run: Path, rows: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "twitter_fin_sentiment"
    folder.mkdir(parents=True)
    with rows.open(encoding="utf-8", newline="") as file:
        header, *content = csv.reader(file)
    codes = {"negative": "0", "positive": "1", "neutral": "2"}  # of that card
    with (folder / "sent_valid.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *([text, codes[label]] for text, label in content)])
    (folder / "sent_train.csv").write_text("text,label\nmore words about nothing,0\n")
    monkeypatch.setenv("FINETUNE_DATA", str(folder.parent))
    found = score(command, "--model", finished_run, "--data", f"{folder}/sent_valid.csv", "--labels", "0,2,1")
    coded = score_by_card(command, finished_run, monkeypatch)
    assert coded["metrics"]["macro_f1"] == found["metrics"]["macro_f1"]
    assert found["metrics"] == score(command, "--model", finished_run, "--data", rows)["metrics"]


def score_by_card(command: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Without baselines, for which the one train row would not do."""
    from finetune.artifact import score_model

    monkeypatch.setattr(score_model, "_split", lambda *_: {"train": [], "validation": []})
    return score(command, "--model", run, "--data", "twitter_fin_sentiment")


def test_a_model_that_is_no_answer_by_itself(run: Path, rows: Path, command: Command) -> None:
    path = run / "model" / "finetune.json"
    task = {"type": "recommendation", "items": [], "texts": [], "columns": {}, "counts": [], "recommend": {}}
    task |= {"rank": None, "by_moment": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task": task}))
    outcome = command("evaluate", "--model", run, "--data", rows)
    assert outcome.code == 2
    assert (
        "--model: must be a model that is scored by itself, got recommendation, which is judged with the events before "
        "a cut in time. Score its run: finetune evaluate RUN"
    ) in outcome.err


def test_one_of_several_tasks(write_recipe: Callable[..., Path], tmp_path: Path, rows: Path, command: Command) -> None:
    task = {"type": "text_classification", "data": "rows.csv", "labels": LABELS, "split": {"leaks": "warn"}}
    recipe = write_recipe(tmp_path / "in", tasks={"tone": task, "mood": task}, train={"epochs": 1})
    done = command("run", recipe, "--runs", tmp_path / "runs", "--json")
    assert done.code == 0, done.err
    run = Path(json.loads(done.out)["run"])
    found = score(command, "--model", run, "--data", rows, "--task", "mood")
    expected = score(command, run, "--data", rows, "--task", "mood")
    for name, value in expected["metrics"].items():
        assert found["metrics"][name]["value"] == pytest.approx(value["value"], abs=1e-6)
    for options, got in ((), "none"), (("--task", "mod"), "'mod'"):
        outcome = command("evaluate", "--model", run, "--data", rows, *options)
        assert outcome.code == 2
        assert f"--task: must be one of tone, mood, got {got}." in outcome.err


def test_labels_for_a_model_without_a_head(tiny_base: Path, rows: Path, command: Command) -> None:
    outcome = command("evaluate", "--model", tiny_base, "--data", rows)
    assert outcome.code == 3
    assert (
        f"{rows}: column 'entry' must exist, got columns text, label. {tiny_base} is scored as retrieval, on text, "
        "entry: where the data call them otherwise, --column entry=NAME. For another task train it first: set "
        "model.base to it."
    ) in outcome.err


def test_a_regression_is_no_classifier(plain: Path, rows: Path, command: Command) -> None:
    BertForSequenceClassification(BertConfig.from_pretrained(plain, num_labels=1)).save_pretrained(plain)
    outcome = command("evaluate", "--model", plain, "--data", rows)
    assert outcome.code == 3
    assert f"{rows}: column 'entry' must exist, got columns text, label. {plain} is scored as reranking" in outcome.err
    outcome = command("evaluate", "--model", plain, "--data", rows, "--task", "text_classification")
    assert outcome.code == 2
    assert (
        f"--task: must be reranking for {plain}, a BertForSequenceClassification with one output, got "
        "'text_classification'. Leave it out; to have a model for another task, train it: set model.base to it."
    ) in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--labels", "good,middling,positive"],
            "its classes must be those of {plain}, good, middling, positive, got also negative, neutral. Name the "
            "data's classes in the order of the model's logits: --labels A,B,...",
        ),
        (["--labels", "a,b"], "--labels: must name the 3 classes of {plain}, got 2."),
    ],
)
def test_classes_that_are_not_those_of_the_data(
    plain: Path, rows: Path, command: Command, options: list[str], words: str
) -> None:
    outcome = command("evaluate", "--model", plain, "--data", rows, *options)
    assert outcome.code in (2, 3)
    assert words.format(plain=plain) in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "evaluate: must get a RUN or --model, got neither. Write: finetune evaluate runs/NAME"),
        (["run", "--model", "acme/tone"], "evaluate: must get a RUN or --model, got both: run and acme/tone."),
        (["--model", "acme/tone"], "evaluate: --model must come with --data, got none. Add --data CARD, or a file."),
        (
            ["run", "--labels", "a,b"],
            "evaluate: --labels must come with --model, got a run, which knows its own. Leave it out.",
        ),
        (["run", "--column", "text=t"], "evaluate: --column must come with --data, whose columns it names, got none."),
        (
            ["--model", "acme/tone", "--data", "x.csv", "--column", "label"],
            "--column: must have the form ROLE=NAME, such as label=intent, got 'label'.",
        ),
    ],
)
def test_what_does_not_go_together(command: Command, arguments: list[str], words: str) -> None:
    outcome = command("evaluate", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
