from __future__ import annotations

from collections import Counter

import pytest

from finetune.data.checks import check_given_test
from finetune.data.rows import Row
from finetune.data.splits import keep_shots, settle_split, split_rows
from finetune.errors import DataError
from finetune.recipe.schema import SplitSection


def make_rows(values, split=None, stem="a"):
    return [Row(f"{stem}:{number}", split, number, value) for number, value in enumerate(values, start=1)]


def labelled(counts):
    return [{"text": f"{label} {i}", "label": label} for label, count in counts.items() for i in range(count)]


def sizes(splits):
    return {name: len(rows) for name, rows in splits.items()}


def test_random_split_is_stratified_and_exact():
    rows = make_rows(labelled({"a": 100, "b": 50, "c": 10}))
    splits = split_rows(rows, SplitSection(validation=0.1, test=0.2), seed=13)
    assert sizes(splits) == {"train": 112, "validation": 16, "test": 32}
    counts = {name: Counter(row.values["label"] for row in part) for name, part in splits.items()}
    assert counts == {
        "train": {"a": 70, "b": 35, "c": 7},
        "validation": {"a": 10, "b": 5, "c": 1},
        "test": {"a": 20, "b": 10, "c": 2},
    }


def test_many_small_classes_keep_the_shares():
    rows = make_rows(labelled({f"c{i}": 13 for i in range(77)}))
    got = sizes(split_rows(rows, SplitSection(validation=0.1, test=0.2), seed=1))
    total = 77 * 13
    assert abs(got["validation"] - 0.1 * total) <= 1
    assert abs(got["test"] - 0.2 * total) <= 1


def test_small_class_is_in_every_split():
    rows = make_rows(labelled({"large": 97, "small": 3}))
    splits = split_rows(rows, SplitSection(), seed=5)
    assert all(any(row.values["label"] == "small" for row in part) for part in splits.values())


def test_seed_changes_the_split_and_nothing_else_does():
    rows = make_rows(labelled({"a": 40, "b": 40}))
    one, same, other = (
        split_rows(part, SplitSection(), seed=seed) for part, seed in ((rows, 1), (rows[::-1], 1), (rows, 2))
    )
    assert one == same
    assert one != other


def test_split_is_the_same_on_every_machine():
    rows = make_rows(labelled({"a": 10}))
    splits = split_rows(rows, SplitSection(validation=0.2, test=0.2), seed=13)
    # In the order of sha256("13\na:<number>"); train lacks 6, the others 2, ties go to the first: t t t t t v e t v e.
    order = [10, 4, 1, 6, 3, 5, 2, 7, 8, 9]
    assert [row.number for row in splits["train"]] == sorted([*order[:5], order[7]])
    assert [row.number for row in splits["validation"]] == sorted([order[5], order[8]])
    assert [row.number for row in splits["test"]] == sorted([order[6], order[9]])


def test_group_split_keeps_groups_whole():
    rows = make_rows([{"text": f"t{i}", "label": "x", "who": f"w{i % 12}"} for i in range(120)])
    splits = split_rows(rows, SplitSection(by="group", column="who"), seed=3)
    groups = [{row.values["who"] for row in part} for part in splits.values()]
    assert sizes(splits) == {"train": 80, "validation": 20, "test": 20} or sizes(splits)["train"] >= 80
    assert not groups[0] & groups[1]
    assert not groups[1] & groups[2]
    assert not groups[0] & groups[2]


def test_the_seed_decides_which_groups_are_in_test_and_sizes_stay_near_the_shares():
    rows = make_rows([{"text": f"t{i}", "who": who} for who in range(12) for i in range(10 + 5 * who)])
    parts = [split_rows(rows, SplitSection(by="group", column="who"), seed=seed) for seed in range(50)]
    tested = [{row.values["who"] for row in part["test"]} for part in parts]
    assert len({tuple(sorted(groups)) for groups in tested}) > 30, "large groups first would give one"
    assert set.union(*tested) == set(range(12)), "the largest too"
    assert max(len(part["test"]) for part in parts) <= 1.25 * 90
    assert max(len(part["validation"]) for part in parts) <= 1.25 * 45
    assert 80 < sum(len(part["test"]) for part in parts) / 50 < 100


def test_one_group_of_nearly_all_rows_is_learned_from():
    rows = make_rows([{"text": f"t{i}", "who": max(0, i - 95)} for i in range(100)])
    for seed in range(20):
        got = sizes(split_rows(rows, SplitSection(by="group", column="who"), seed=seed))
        assert got["train"] >= 96
        assert min(got.values()) >= 1


def test_three_equal_groups_give_three_splits():
    rows = make_rows([{"text": f"t{i}", "who": i % 3} for i in range(30)])
    assert sizes(split_rows(rows, SplitSection(by="group", column="who"), seed=3)) == dict.fromkeys(
        ("train", "validation", "test"), 10
    )


@pytest.mark.parametrize(
    "form", ["{:d}", "{:d}.5", "2024-01-{:02d}", "2024-01-{:02d}T12:00:00+02:00", "2024-01-{:02d}T01:02:03Z"]
)
def test_time_split_is_in_order(form):
    rows = make_rows([{"text": "t", "when": form.format(day)} for day in range(1, 21)])[::-1]
    splits = split_rows(rows, SplitSection(by="time", column="when", validation=0.1, test=0.2), seed=0)
    assert [[row.number for row in part] for part in splits.values()] == [
        list(range(1, 15)),
        [15, 16],
        [17, 18, 19, 20],
    ]


def test_numbers_are_ordered_as_numbers():
    rows = make_rows([{"text": "t", "when": str(number)} for number in (9, 10, 100)])
    splits = split_rows(rows, SplitSection(by="time", column="when"), seed=0)
    assert [part[0].values["when"] for part in splits.values()] == ["9", "10", "100"]


def test_rows_of_one_moment_stay_together():
    rows = make_rows([{"text": "t", "when": day} for day in [1] * 6 + [2] * 6 + [3] * 6])
    assert sizes(split_rows(rows, SplitSection(by="time", column="when"), seed=0)) == {
        "train": 6,
        "validation": 6,
        "test": 6,
    }


def test_given_splits_are_kept():
    rows = [*make_rows(labelled({"a": 5}), "train", "train"), *make_rows(labelled({"b": 2}), "test", "test")]
    rows += make_rows(labelled({"c": 3}), "validation", "validation")
    splits = split_rows(rows, SplitSection(by="given"), seed=0)
    assert all(row.split == name for name, part in splits.items() for row in part)
    assert sizes(splits) == {"train": 5, "validation": 3, "test": 2}


def test_rows_of_a_given_test_split_that_are_learned_from_are_counted():
    rows = [*make_rows(labelled({"a": 4}), "train", "train"), *make_rows(labelled({"b": 3}), "test", "test")]
    splits = {"train": rows[2:6], "validation": rows[:2], "test": rows[6:]}
    (finding,) = check_given_test(splits)
    assert (finding.severity, finding.count, finding.rows) == ("warning", 2, ("test:1", "test:2"))
    assert finding.message == (
        "train: 2 of 3 rows of the given test split are now in train (test:1, test:2). Set split: {by: given} to keep "
        "that split."
    )
    assert check_given_test(splits | {"train": rows[2:4]}) == []


@pytest.mark.parametrize(
    ("given", "by"),
    [([None], "random"), (["train"], "random"), (["train", "test"], "given"), (["train", "validation"], "given")],
)
def test_rows_that_bring_a_split_keep_it_unasked(given, by):
    rows = [row for split in given for row in make_rows(labelled({"a": 20}), split, split)]
    assert settle_split(rows, SplitSection(shots=2)).by == by
    assert settle_split(rows, SplitSection(by="order")).by == "order"
    if by == "random" or "test" in given:
        assert split_rows(rows, SplitSection(), seed=4) == split_rows(rows, SplitSection(by=by), seed=4)


def test_missing_validation_is_cut_from_train_only():
    rows = [*make_rows(labelled({"a": 60, "b": 40}), "train", "train"), *make_rows(labelled({"a": 7}), "test", "test")]
    splits = split_rows(rows, SplitSection(by="given", validation=0.1), seed=0)
    assert sizes(splits) == {"train": 90, "validation": 10, "test": 7}
    assert Counter(row.values["label"] for row in splits["validation"]) == {"a": 6, "b": 4}
    assert all(row.split == "test" for row in splits["test"])


def test_order_is_that_of_the_rows():
    rows = make_rows(labelled({"a": 12}), stem="z") + make_rows(labelled({"b": 8}), stem="a")
    splits = split_rows(rows, SplitSection(by="order", validation=0.1, test=0.2), seed=0)
    assert list(splits) == ["train", "validation", "test"]
    assert [row for part in splits.values() for row in part] == rows
    assert sizes(splits) == {"train": 14, "validation": 2, "test": 4}
    assert split_rows(rows, SplitSection(by="order", validation=0.1, test=0.2), seed=1) == splits


@pytest.mark.parametrize("count", [3, 4, 5])
def test_order_leaves_no_split_empty(count):
    rows = make_rows(labelled({"a": count}))
    splits = split_rows(rows, SplitSection(by="order", validation=0.01, test=0.01), seed=0)
    assert sizes(splits) == {"train": count - 2, "validation": 1, "test": 1}


def test_rows_of_one_text_fill_one_split():
    words = r"got train 9, validation 0, test 0 of 9 rows\. .* validation and test; rows of one text stay together\."
    with pytest.raises(DataError, match=words):
        split_rows(make_rows([{"text": "the same", "label": "ab"[i % 2]} for i in range(9)]), SplitSection(), seed=0)


def test_order_needs_three_rows():
    words = (
        r"every split must hold rows, got train 1, validation 1, test 0 of 2 rows\. Give more rows, or a larger share"
    )
    with pytest.raises(DataError, match=words):
        split_rows(make_rows(labelled({"a": 2})), SplitSection(by="order"), seed=0)


@pytest.mark.parametrize("column", ["en", "text"])
def test_column_may_have_the_name_of_the_data_or_of_its_role(column):
    rows = make_rows([{"text": f"t{i % 12}", "target": f"z{i}"} for i in range(60)])
    section = SplitSection(by="group", column=column)
    splits = split_rows(rows, section, seed=3, columns={"text": "en", "target": "zh"})
    assert splits == split_rows(rows, SplitSection(by="group", column="text"), seed=3)
    parts = [{row.values["text"] for row in part} for part in splits.values()]
    assert sum(len(part) for part in parts) == 12


def test_role_goes_before_a_column_of_its_name():
    rows = make_rows([{"text": f"t{i}", "target": f"z{i % 6}"} for i in range(60)])
    section = SplitSection(by="group", column="text")
    assert split_rows(rows, section, seed=3, columns={"text": "en", "target": "text"}) == split_rows(
        rows, section, seed=3
    )


def test_missing_column_lists_both_names():
    rows = make_rows([{"text": f"t{i}"} for i in range(3)])
    section = SplitSection(by="group", column="english")
    with pytest.raises(DataError, match=r"'english' must exist to split by group, got columns text, en\."):
        split_rows(rows, section, seed=0, columns={"text": "en"})


def test_label_of_another_task_may_be_anything():
    values = [{"text": f"t{i}", "label": label} for i, label in enumerate([0, 1, "x", None, [1], 2.5] * 10)]
    splits = split_rows(make_rows(values), SplitSection(), seed=0)
    assert sizes(splits) == {"train": 42, "validation": 6, "test": 12}


@pytest.mark.parametrize(
    ("section", "values", "split", "words"),
    [
        ({"by": "given"}, {}, None, r"got 3 rows without a split\. Set split: {by: random}"),
        (
            {"by": "given"},
            {},
            "train",
            r"must find train and test, got train\. Add a file for test, or set split: {by: ran",
        ),
        ({"by": "given"}, {}, "test", r"got test\. Add a file for train"),
        (
            {"by": "group", "column": "user"},
            {"uesr": 1},
            None,
            r"'user' must exist.*columns text, uesr\. Did you mean 'uesr'",
        ),
        (
            {"by": "group", "column": "u"},
            {"u": 1},
            None,
            r"column 'u' must have at least 3 values, got 1\..*by: random",
        ),
        ({"by": "time", "column": "u"}, {"u": "1"}, None, r"column 'u' must have at least 3 moments, got 1"),
        ({"by": "time", "column": "u"}, {"u": "9/4/20"}, None, r"ISO 8601.*got a:1 '9/4/20', a:2 .*such as 2020-04-09"),
        ({"by": "time", "column": "u"}, {"u": ""}, None, r"must have a value in every row, is empty in a:1, a:2, a:3"),
        ({"by": "time", "column": "u"}, {"u": "nan"}, None, r"must hold ISO 8601 times or only numbers, got a:1 'nan'"),
    ],
)
def test_split_errors(section, values, split, words):
    rows = make_rows([{"text": f"t{i}"} | values for i in range(3)], split)
    with pytest.raises(DataError, match=words):
        split_rows(rows, SplitSection(**section), seed=0)


def test_given_split_without_validation_share():
    rows = [*make_rows(labelled({"a": 5}), "train", "train"), *make_rows(labelled({"a": 5}), "test", "test")]
    with pytest.raises(DataError, match=r"validation must be above 0.*Early stopping and calibration need one"):
        split_rows(rows, SplitSection(by="given", validation=0.0), seed=0)


def test_too_few_rows():
    rows = make_rows(labelled({"a": 1, "b": 1}))
    with pytest.raises(
        DataError, match=r"every split must hold rows, got .* of 2 rows\. Give more rows, or a larger share"
    ):
        split_rows(rows, SplitSection(), seed=0)


def test_shots_follow_from_the_seed_and_every_row_has_the_same_chance():
    splits = {"train": make_rows(labelled({"a": 8, "b": 8}), "train"), "validation": [], "test": []}
    chosen = [[row.id for row in keep_shots(splits, 2, seed=seed)["train"]] for seed in range(400)]
    assert chosen[0] == [row.id for row in keep_shots(splits, 2, seed=0)["train"]]
    assert len({tuple(ids) for ids in chosen}) > 250  # of 28 * 28
    times = Counter(row for ids in chosen for row in ids)
    # 400 draws at 1/4: 100, standard deviation 8.7.
    assert len(times) == 16
    assert all(65 <= count <= 135 for count in times.values())


def test_shots_are_the_same_on_every_machine_and_of_different_texts():
    texts = ["One.", "two", "ONE", "three", "four", "one!"]
    rows = make_rows([{"text": text, "label": "a"} for text in texts], "train")
    splits = keep_shots({"train": rows, "validation": rows[1:], "test": rows}, 2, seed=13)
    # By sha256("13\nshots a:<number>") the order is 2 6 3 4 5 1; the first row of a text stands for those after it.
    assert [row.number for row in splits["train"]] == [2, 4]
    assert [row.number for row in splits["validation"]] == [2, 3]
    assert splits["test"] == rows
