from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.data.checks import (
    check_lengths,
    check_rows,
    check_shots,
    findings_to_json,
    raise_on_errors,
    set_apart,
)
from finetune.data.rows import Row
from finetune.errors import DataError

LONG = "shares of the maker of plant based burgers {} after weak guidance for the whole year"


def make_splits(**splits):
    return {
        name: [Row(f"{name}:{i}", name, i, {"text": text, "label": label}) for i, (text, label) in enumerate(rows, 1)]
        for name, rows in splits.items()
    }


def clean_splits(**extra):
    """Two classes in every split and nothing to complain about, before the rows in `extra`."""
    texts = {
        "train": [("alpha wins contract", "pos"), ("beta loses court case", "neg")],
        "validation": [("gamma opens a plant", "pos"), ("delta closes stores", "neg")],
        "test": [("epsilon raises outlook", "pos"), ("zeta warns on profit", "neg")],
    }
    return make_splits(**{name: rows + extra.get(name, []) for name, rows in texts.items()})


def check(leaks="fail", labels=("neg", "pos"), **extra):
    return check_rows(clean_splits(**extra), labels, leaks=leaks)


def only(findings):
    (finding,) = findings
    return finding


def test_nothing_to_report():
    splits, findings = check()
    assert findings == []
    assert splits == clean_splits()
    raise_on_errors(findings, "x")


def test_classes_that_differ_by_case_alone():
    _, findings = check(labels=("neg", "pos", "Neg", "not  now", "Not now"))
    (finding,) = [finding for finding in findings if finding.kind == "similar_classes"]
    assert (finding.severity, finding.split, finding.count) == ("warning", "all", 4)
    assert finding.message == (
        "Classes must differ by more than case and spaces, got 'neg', 'Neg'; 'not  now', 'Not now'. If they mean the "
        "same, correct the rows, or name every label's class: tasks.<name>.labels: {'neg': 'neg', 'Neg': 'neg', ...}."
    )


def test_empty_text():
    _, findings = check(train=[(" \n", "pos")])
    finding = only(findings)
    assert (finding.kind, finding.severity, finding.split, finding.count) == ("empty_text", "error", "train", 1)
    assert finding.rows == ("train:3",)
    assert finding.message == "train: text must not be empty, is in 1 row (train:3). Fill or remove them."


def test_missing_label():
    _, findings = check(test=[("eta pays", None), ("theta buys", None)])
    finding = only(findings)
    assert (finding.kind, finding.severity, finding.count) == ("missing_label", "error", 2)
    assert "test: every row must have a label, 2 rows have none (test:3, test:4)." in finding.message


def test_unknown_label_is_counted_and_corrected():
    _, findings = check(train=[("eta pays", "posi"), ("theta buys", "posi"), ("iota sells", "?")])
    finding = only(findings)
    assert (finding.kind, finding.severity, finding.count) == ("unknown_label", "error", 3)
    assert "train: label must be one of neg, pos, got 'posi' (2 rows), '?' (1 row)" in finding.message
    assert "Did you mean 'pos'? Correct the rows, or tasks.<name>.labels." in finding.message


def test_class_absent_from_train_is_an_error_elsewhere_a_warning():
    _, findings = check(labels=["neg", "pos", "mixed"])
    assert [(f.kind, f.severity, f.split) for f in findings] == [
        ("absent_class", "error", "train"),
        ("absent_class", "warning", "validation"),
        ("absent_class", "warning", "test"),
    ]
    assert (
        "train: every class must have rows, got none of mixed: nothing can be learned about it" in findings[0].message
    )


def test_task_without_labels():
    """Missing, conflicting and rare labels are nothing to such a task; its texts are checked as ever."""
    extra = {
        "train": [("Alpha wins contract.", "neg"), ("eta pays", None), ("Epsilon raises outlook", [1]), ("", "pos")],
        "test": [("theta buys", "new")],
    }
    _, findings = check(labels=None, **extra)
    assert [(f.kind, f.severity, f.rows) for f in findings] == [
        ("empty_text", "error", ("train:6",)),
        ("leak", "error", ("train:5",)),
        ("duplicates", "note", ("train:3",)),
    ]


def test_rows_without_the_key_label():
    splits = {
        name: [Row(f"{name}:1", name, 1, {"text": text, "target": "x"})]
        for name, text in (("train", "one"), ("validation", "two"), ("test", "three"))
    }
    assert check_rows(splits, None, leaks="fail") == (splits, [])


def test_empty_target():
    pairs = {"train": ["eins", " "], "validation": ["zwei"], "test": [None, ""]}
    splits = {
        name: [Row(f"{name}:{i}", name, i, {"text": f"{name} {i}", "target": to}) for i, to in enumerate(targets, 1)]
        for name, targets in pairs.items()
    }
    _, findings = check_rows(splits, None, leaks="fail", texts=("text", "target"))
    assert [(f.kind, f.severity, f.rows) for f in findings] == [
        ("empty_target", "error", ("train:2",)),
        ("empty_target", "error", ("test:1", "test:2")),
    ]
    assert findings[1].message == "test: target must not be empty, is in 2 rows (test:1, test:2). Fill or remove them."
    assert check_rows(splits, None, leaks="fail")[1] == []


def test_exact_leak_fails_the_run():
    splits, findings = check(train=[("Epsilon raises outlook! https://t.co/x", "pos")])
    finding = only(findings)
    assert (finding.kind, finding.severity, finding.split, finding.count) == ("leak", "error", "train", 1)
    assert (
        "train: must not share texts with test, 1 row has the same text in test (train:3 = test:1)" in finding.message
    )
    assert "Set split.leaks: drop to remove them from train." in finding.message
    assert len(splits["train"]) == 3


def test_rows_may_be_the_same_by_two_texts_together():
    splits = {
        "train": [Row("t:1", None, 1, {"text": "How long?", "passage": "Two days."})],
        "validation": [Row("v:1", None, 1, {"text": "How long?", "passage": "A week."})],
        "test": [Row("e:1", None, 1, {"text": "How long?", "passage": "two days"})],
    }
    _, findings = check_rows(splits, None, leaks="fail", same=("text", "passage"))
    assert [(finding.kind, finding.split, finding.rows) for finding in findings] == [("leak", "train", ("t:1",))]


def test_exact_leaks_may_stay_with_a_warning():
    splits, findings = check("warn", train=[("Epsilon raises outlook! https://t.co/x", "pos")])
    finding = only(findings)
    assert (finding.kind, finding.severity, finding.split, finding.count) == ("leak", "warning", "train", 1)
    assert "Set split.leaks: drop to remove them from train." in finding.message
    assert len(splits["train"]) == 3


def test_exact_leaks_are_dropped_from_the_earlier_split():
    splits, findings = check(
        "drop",
        train=[("EPSILON raises outlook", "pos"), ("Gamma opens a plant.", "pos")],
        validation=[("zeta warns, on profit", "neg")],
    )
    assert [(f.kind, f.severity, f.split, f.count, f.rows) for f in findings] == [
        ("leak", "warning", "train", 1, ("train:3",)),
        ("leak", "warning", "train", 1, ("train:4",)),
        ("leak", "warning", "validation", 1, ("validation:3",)),
    ]
    assert findings[0].message == "train: dropped 1 row with the same text in test (train:3 = test:1)."
    assert splits == clean_splits()


def test_near_duplicate_is_a_warning_and_can_be_dropped():
    extra = {"train": [(LONG.format("fall"), "neg")], "test": [(LONG.format("fell"), "neg")]}
    _, findings = check(**extra)
    finding = only(findings)
    assert (finding.kind, finding.severity, finding.split, finding.rows) == (
        "near_leak",
        "warning",
        "train",
        ("train:3",),
    )
    assert "almost the same text in test (train:3 = test:3)" in finding.message
    splits, findings = check("drop", **extra)
    assert [row.id for row in splits["train"]] == ["train:1", "train:2"]
    assert [row.id for row in splits["test"]] == ["test:1", "test:2", "test:3"]
    assert only(findings).message.startswith("train: dropped 1 row with almost the same text in test")


def test_dropping_may_empty_a_class():
    _, findings = check("drop", labels=["neg", "pos", "rare"], train=[("eta", "rare")], test=[("Eta.", "rare")])
    assert ("absent_class", "train") in [(f.kind, f.split) for f in findings if f.severity == "error"]


def test_duplicates_and_conflicts_inside_train():
    _, findings = check(train=[("Alpha wins contract.", "neg"), ("beta loses court case!", "neg")])
    conflict, duplicates = findings
    assert (conflict.kind, conflict.severity, conflict.count) == ("conflicting_labels", "warning", 1)
    assert conflict.rows == ("train:1", "train:3")
    assert "1 text must have one label, got several (train:1, train:3)" in conflict.message
    assert (duplicates.kind, duplicates.severity, duplicates.count) == ("duplicates", "note", 2)
    assert duplicates.message == "train: 2 rows repeat the text of another row (train:3, train:4)."


def test_empty_texts_are_no_duplicates():
    _, findings = check(train=[("", "neg")], test=[("", "pos")])
    assert {finding.kind for finding in findings} == {"empty_text"}


def test_imbalance():
    _, findings = check(train=[(f"company {i} number {i * i} wins prize {i**3}", "pos") for i in range(30)])
    finding = next(f for f in findings if f.kind == "imbalance")
    assert finding.severity == "note"
    assert "train: class 'pos' has 31 times the rows of 'neg' (31 and 1)" in finding.message


def test_ids_may_repeat_across_splits():
    rows = {
        name: [Row("a:1", None, 1, {"text": text, "label": "x"})] for name, text in (("train", "one"), ("test", "two"))
    }
    _, findings = check_rows(rows, ["x"], leaks="drop")
    assert findings == []


def test_rows_are_listed_up_to_twenty():
    _, findings = check(train=[("", "pos")] * 50)
    finding = next(f for f in findings if f.kind == "empty_text")
    assert (finding.count, len(finding.rows)) == (50, 20)


def test_all_errors_are_raised_at_once():
    _, findings = check(train=[("", "pos"), ("eta", None)])
    with pytest.raises(DataError, match=r"news\.csv: 2 problems\n  train: text must.*\n  train: every row must"):
        raise_on_errors(findings, "news.csv")


def test_a_failed_check_names_its_rows_and_keeps_the_warnings():
    extra = {
        "train": [("", "pos")] * 25 + [("eta pays", "pos"), ("eta pays", "neg")],
        "test": [("theta buys", "mixed")],
    }
    _, findings = check(**extra)
    with pytest.raises(DataError) as caught:
        raise_on_errors(findings, "news.csv")
    rows = ", ".join(f"train:{number}" for number in range(3, 23))
    assert str(caught.value).splitlines() == [
        "news.csv: 2 problems",
        "  train: text must not be empty, is in 25 rows (train:3, train:4, train:5, ...). Fill or remove them.",
        f"    rows: {rows} and 5 more",
        "  test: label must be one of neg, pos, got 'mixed' (1 row): test:3. Correct the rows, or tasks.<name>.labels.",
        "  warning: 1 text must have one label, got several (train:28, train:29)."
        " Decide on one: they cannot both be learned.",
    ]
    assert caught.value.findings == findings_to_json(findings)
    assert [finding["severity"] for finding in caught.value.findings] == ["error", "error", "warning", "note"]


@pytest.mark.parametrize(("cut", "severity"), [(1, "note"), (2, "warning")])
def test_lengths(cut, severity):
    lengths = {"train": np.array([10] * (100 - cut) + [33] * cut), "test": [5, 32], "validation": []}
    finding = only(check_lengths(lengths, 32))
    assert (finding.kind, finding.severity, finding.split, finding.count) == ("cut_text", severity, "train", cut)
    assert f"of 100 ({cut}.0%) must be cut to 32 tokens. Raise model.max_length" in finding.message


def test_findings_are_plain_json():
    _, findings = check(train=[("", "pos")])
    (loaded,) = json.loads(json.dumps(findings_to_json(findings)))
    assert loaded["rows"] == ["train:3"]
    assert set(loaded) == {"kind", "severity", "split", "count", "message", "rows"}


def test_classes_with_too_few_rows_for_the_shots():
    rows = make_splits(train=[("one", "pos"), ("two", "pos"), ("three", "neg")])["train"]
    assert check_shots(rows, ["pos", "neg"], 1) == []
    [finding] = check_shots(rows, ["pos", "neg", "neutral"], 2)
    assert (finding.kind, finding.severity, finding.split, finding.count) == ("few_rows", "warning", "train", 2)
    assert finding.message == (
        "train: every class must have 2 different texts for split.shots, got fewer of 'neg' (1), 'neutral' (0). All of "
        "them are kept. Add rows, or lower split.shots."
    )


# Rows of no class


def test_rows_of_no_class_leave_train_and_are_known_elsewhere():
    outside = {"train": [("hello there", "oos")], "validation": [("what is this", "oos")], "test": [("hum", "oos")]}
    splits, findings = set_apart(clean_splits(**outside), "oos", is_exposed=False)
    assert splits["train"] == clean_splits()["train"]
    assert [len(splits[name]) for name in ("validation", "test")] == [3, 3]
    note = only(findings)
    assert (note.severity, note.count, note.rows) == ("note", 1, ("train:3",))
    assert note.message == "train: left out 1 row labelled 'oos', which no class is learned from (train:3)."
    assert check_rows(splits, ["neg", "pos"], leaks="fail", out_of_scope="oos") == (splits, [])
    _, findings = check_rows(splits, ["neg", "pos"], leaks="fail")
    assert {finding.kind for finding in findings} == {"unknown_label"}


def test_rows_of_no_class_stay_in_train_where_they_are_learned_from():
    outside = {"train": [("hello there", "oos")], "validation": [("what is this", "oos")], "test": [("hum", "oos")]}
    splits = clean_splits(**outside)
    assert set_apart(splits, "oos", is_exposed=True) == (splits, [])
    _, findings = set_apart(clean_splits(**{**outside, "train": []}), "oos", is_exposed=True)
    assert only(findings).severity == "error"
    assert only(findings).message == (
        "train: must have rows labelled 'oos' for outlier_exposure, got none. Add some, or set it to 0."
    )


def test_a_text_of_no_class_that_was_trained_on_is_a_leak():
    splits, _ = set_apart(clean_splits(test=[("Alpha wins contract!", "oos")]), "oos", is_exposed=False)
    _, findings = check_rows(splits, ["neg", "pos"], leaks="fail", out_of_scope="oos")
    assert "leak" in {finding.kind for finding in findings if finding.severity == "error"}


def test_rows_of_no_class_are_missed_and_may_not_be_all():
    splits = clean_splits(validation=[("what is this", "oos")]) | make_splits(test=[("hum", "oos")])
    _, findings = set_apart(splits, "oos", is_exposed=False)
    assert only(findings).severity == "error"
    assert only(findings).message == "test: must have rows with a class, got only rows labelled 'oos'. Add some."
    _, findings = set_apart(clean_splits(), "oos", is_exposed=False)
    must = "must have rows labelled 'oos' for out_of_scope, got none"
    assert [finding.message for finding in findings] == [
        f"validation: {must}: no probability can be fitted. Add some.",
        f"test: {must}: nothing says how well they are told. Add some.",
    ]
    assert set_apart(splits, None, is_exposed=False) == (splits, [])
