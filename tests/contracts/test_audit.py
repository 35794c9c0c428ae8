"""`finetune data audit`: planted errors are found, and what was not looked at is said."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import finetune
from finetune import label_audit
from finetune.data.sources import load_rows
from finetune.errors import DataError, ResourceError

WORDS = {"up": ["rises", "gains", "soars", "climbs"], "down": ["falls", "drops", "slumps", "sinks"]}

UP, DOWN = (" ".join(words) for words in WORDS.values())
"""Texts that leave no doubt."""


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def build_rows(count: int = 12, seed: int = 0) -> list[tuple[str, str]]:
    """`count` texts for each class, told by one word, none twice."""
    generator = np.random.default_rng(seed)
    return [
        (f"company {seed}{i}{label[0]} {generator.choice(words)} in {generator.choice(['May', 'June'])} trade", label)
        for i in range(count)
        for label, words in WORDS.items()
    ]


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the default base is not at hand."""
    monkeypatch.setattr(label_audit, "find_base", lambda _reference: None)


def plant(rows: list[tuple[str, str]], share: float, seed: int) -> tuple[list[tuple[str, str]], set[int]]:
    """Rows of which a share got another class at random, and their numbers."""
    generator = np.random.default_rng(seed)
    classes = sorted({label for _, label in rows})
    wrong = set(generator.choice(len(rows), round(share * len(rows)), replace=False).tolist())
    return [
        (text, str(generator.choice([name for name in classes if name != label])) if i in wrong else label)
        for i, (text, label) in enumerate(rows)
    ], wrong


@pytest.fixture(scope="module")
def topics() -> list[Any]:
    """What the sample headlines are judged by, built once: the texts are the same whatever their labels."""
    texts = [row.values["text"] for row in load_rows("financial_headlines", {}).rows]
    return label_audit._build_features(texts, "both")


@pytest.mark.parametrize("seed", [1, 3])
def test_most_of_5_percent_planted_errors_are_in_the_worst_10_percent(topics, monkeypatch, tmp_path, seed) -> None:
    monkeypatch.setattr(label_audit, "_build_features", lambda _texts, _features: topics)
    source = load_rows("financial_headlines", {"label": "topic"})
    rows, wrong = plant([(row.values["text"], row.values["label"]) for row in source.rows], 0.05, seed)
    done = finetune.audit(str(write(tmp_path / "rows.csv", rows)), quiet=True)
    assert (done.features, len(done.ranked), len(wrong)) == ("both", 800, 40)
    worst = {row.row - 1 for row in done.ranked[:80]}
    assert len(worst & wrong) >= 0.6 * len(wrong)
    right = [source.rows[row.row - 1].values["label"] for row in done.suspects if row.row - 1 in wrong]
    suggested = [row.suggested for row in done.suspects if row.row - 1 in wrong]
    assert np.mean([one == other for one, other in zip(right, suggested, strict=True)]) > 0.5


def test_a_row_is_told_with_its_place_and_both_labels(no_base, tmp_path) -> None:
    rows = build_rows(20)
    rows[7] = (f"company Z {DOWN}", "up")
    done = finetune.audit(str(write(tmp_path / "rows.csv", rows)), quiet=True)
    done.save(tmp_path / "out" / "judged.csv")
    worst = done.ranked[0]
    assert (worst.id, worst.row, worst.split, worst.text) == ("rows:8", 8, None, rows[7][0])
    assert (worst.given, worst.suggested, worst.flagged) == ("up", "down", True)
    assert worst.given_probability == pytest.approx(1 - worst.suggested_probability, abs=2e-4)
    assert [row.given_probability for row in done.ranked] == sorted(row.given_probability for row in done.ranked)
    assert done.suspects == [worst]
    assert done.pairs == {("up", "down"): 1}
    assert done.accuracy == np.mean([row.given == row.suggested for row in done.ranked])
    with (tmp_path / "out" / "judged.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 40
    assert written[0]["id"] == "rows:8"
    assert [row["flagged"] for row in written[:2]] == ["true", "false"]


def test_the_same_seed_gives_the_same_audit(no_base, tmp_path) -> None:
    path = str(write(tmp_path / "rows.csv", build_rows(10)))
    first, again, other = (finetune.audit(path, seed=seed, quiet=True).ranked for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_repeated_text_does_not_vouch_for_itself_and_its_labels_are_compared(no_base, tmp_path) -> None:
    rows = build_rows(20)
    rows += [(f"Company Q {DOWN}!", "up"), (f"company q {DOWN}", "up"), (f"Company Q: {DOWN}", "down")]
    done = finetune.audit(str(write(tmp_path / "rows.csv", rows)), quiet=True)
    assert {row.row for row in done.suspects} == {41, 42}
    (conflict,) = done.conflicts
    assert conflict.text == f"Company Q {DOWN}!"
    assert conflict.rows == {"rows:41": "up", "rows:42": "up", "rows:43": "down"}


def write_splits(folder: Path) -> Path:
    for seed, split in enumerate(("train", "validation", "test")):
        write(folder / f"{split}.csv", build_rows(8, seed))
    return folder


def test_a_given_test_split_is_left_out_unless_asked_for(no_base, tmp_path) -> None:
    folder = str(write_splits(tmp_path / "set"))
    done = finetune.audit(folder, quiet=True)
    assert {row.split for row in done.ranked} == {"train", "validation"}
    assert done.notes == ["16 rows of test were not looked at."]
    asked = finetune.audit(folder, test=True, quiet=True)
    assert {row.split for row in asked.ranked} == {"train", "validation", "test"}
    assert asked.notes == [
        "The test split was looked at. Whoever corrects it must score every model on it anew, and say so."
    ]


def test_what_cannot_be_judged_is_said(no_base, tmp_path) -> None:
    rows = [
        *build_rows(8),
        ("no label", ""),
        ("  ", "up"),
        *((f"Rare {i}" + "!" * j, "odd") for i in range(4) for j in range(2)),
    ]
    done = finetune.audit(str(write(tmp_path / "rows.csv", rows)), quiet=True)
    assert len(done.ranked) == 16
    assert done.notes == [
        "The data come without splits: all rows were looked at, also those that a recipe would put into test. "
        "Correct them before the first run.",
        "2 rows without text or label were not looked at.",
        "8 rows of classes with fewer than 5 different texts were not looked at: odd.",
    ]


def test_a_card_is_read_as_its_roles_say(no_base) -> None:
    done = finetune.audit("financial_headlines", features="tfidf", quiet=True)
    assert {row.given for row in done.ranked} == {"negative", "neutral", "positive"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            build_rows(4),
            r"rows: at least 2 classes must have 5 different texts each to judge one by the others, got 0 of 2\.",
        ),
        (
            [("a b", "x"), ("c d", "x")],
            r"the label column must hold at least 2 classes, got .*'x'\]\. Add rows of another",
        ),
        ([("!" * i, "xy"[i % 2]) for i in range(1, 13)], r"data audit: texts must hold words, got none\."),
    ],
)
def test_rows_that_cannot_be_audited(no_base, tmp_path, rows, words) -> None:
    with pytest.raises(DataError, match=words):
        finetune.audit(str(write(tmp_path / "rows.csv", rows)), quiet=True)


def test_without_cleanlab_the_message_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(ResourceError) as caught:
        finetune.audit("nowhere")
    assert str(caught.value) == (
        "data audit: cleanlab must be installed to look for label errors, got no such package. pip install cleanlab"
    )
    assert caught.value.exit_code == 5


# The command


def test_an_output_that_cannot_be_written_is_refused_before_the_work(command, tmp_path) -> None:
    done = command("data", "audit", "nowhere", "--output", tmp_path / "judged.txt")
    assert done.code == 2
    assert "judged.txt: must end in .csv, .jsonl, .parquet, got '.txt'." in done.err


def test_the_command_shows_suspects_pairs_and_conflicts(no_base, command, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = build_rows(20)
    rows[7] = (f"company Z {DOWN}", "up")
    rows += [(f"Company Q {UP}", "up"), (f"company q {UP}", "down")]
    path = write(tmp_path / "rows.csv", rows)
    done = command("data", "audit", path, "--output", tmp_path / "judged.jsonl")
    assert done.code == 0
    assert done.err == "rows: 42 rows of 2 classes, features tfidf\n"
    assert f"{path}: 2 of 42 labels look wrong to a model that agrees with " in done.out
    assert "% of them (tfidf, cross-validated).\n" in done.out
    assert any(line.split()[:2] == ["rows:8", "up"] for line in done.out.splitlines())
    assert any(line.split() == ["up", "down", "1"] for line in done.out.splitlines())
    assert "  one text, several labels: rows:41 up, rows:42 down\n" in done.out
    assert done.out.endswith(f"{tmp_path / 'judged.jsonl'}: 42 rows written.\n")
    assert len((tmp_path / "judged.jsonl").read_text().splitlines()) == 42
    content: dict[str, Any] = json.loads(command("data", "audit", path, "--json").out)
    assert content.keys() == {"data", "features", "rows", "accuracy", "suspects", "pairs", "conflicts", "notes"}
    assert {row["id"] for row in content["suspects"]} == {"rows:8", "rows:42"}


@pytest.mark.parametrize("text", ["text", "body=x", "text=", "text=a;label=b,"])
def test_columns_that_cannot_be_meant(command, text) -> None:
    done = command("data", "audit", "financial_headlines", "--columns", text)
    assert done.code == 2
    assert "data audit: --columns must name columns for text and label, such as text=body,label=queue, got " in done.err


def test_a_missing_column_is_answered_with_the_option(no_base, command, tmp_path) -> None:
    path = write(tmp_path / "rows.csv", build_rows(6))
    done = command("data", "audit", path, "--columns", "label=lable")
    assert done.code == 3
    assert "column 'lable' must exist, got columns text, label. Add --columns label=label\n" in done.err
