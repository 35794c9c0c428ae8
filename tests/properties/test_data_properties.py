from __future__ import annotations

import csv
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.checks import check_rows
from finetune.data.cleaning import clean_text, normalize_for_duplicates
from finetune.data.files import read_table
from finetune.data.rows import SPLITS, Row
from finetune.data.splits import keep_shots, split_rows
from finetune.errors import DataError
from finetune.recipe.schema import SplitSection

STEPS = st.lists(st.sampled_from(["html", "urls"]), max_size=2)
PIECES = st.sampled_from(
    [
        "&amp;",
        "&lt",
        "&#104;",
        "&#x26;",
        "&amp;amp;",
        "https://t.co/x",
        "www.a.b",
        "http",
        "://",
        "w",
        " ",
        "\u00a0",
        "é",
        "$A",
        "-1",
        ";",
    ]
)
ENDS = ["\n", "\r\n", "\r"]
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join))


@given(TEXTS, STEPS)
def test_cleaning_twice_is_cleaning_once(text, steps):
    once = clean_text(text, steps)
    assert clean_text(once, steps) == once


@given(TEXTS)
def test_case_and_spacing_do_not_make_a_text_another(text):
    assert normalize_for_duplicates(f"  {text}\t") == normalize_for_duplicates(text)


# A file begins with a byte order mark or a text with a zero-width space: nobody can tell.
LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n\ufeff"), min_size=1).filter(
    str.strip
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(LINES, min_size=1, max_size=3).map("\n".join), min_size=1, max_size=5), st.sampled_from(ENDS))
def test_paragraphs_joined_give_the_text_back(tmp_path_factory, paragraphs, end):
    text = "\n\n".join(paragraphs)
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.replace("\n", end).encode())
    assert [record["text"] for record in read_table(path)] == paragraphs


# Sentences, lists and figures as people write them: with commas, but before a space, a digit or the line's end.
WORDS = st.sampled_from(["Dear team", "thanks", "1,200", "9,50", '"so"', '5" wide', "a;b", ""])
PROSE = st.tuples(
    st.lists(WORDS, min_size=1, max_size=4), st.sampled_from([", ", " "]), st.sampled_from(["", ",", "."])
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(PROSE, min_size=1, max_size=6), min_size=1, max_size=6),
    st.permutations(["text", "label", "id"]),
    st.sampled_from(ENDS),
)
def test_texts_of_several_lines_are_read_as_they_were_written(tmp_path_factory, texts, columns, end):
    lines_of = [[joint.join(words) + stop for words, joint, stop in text] for text in texts]
    rows = [{"text": end.join(lines), "label": "yes", "id": str(i)} for i, lines in enumerate(lines_of)]
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    assert read_table(path) == rows


@st.composite
def labelled_rows(draw):
    count = draw(st.integers(12, 60))
    texts = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    labels = draw(st.lists(st.sampled_from(["a", "b", None]), min_size=count, max_size=count))
    return [
        Row(f"f:{i}", None, i, {"text": f"Text {text}", "label": label, "who": text % 7, "when": text})
        for i, (text, label) in enumerate(zip(texts, labels, strict=True), start=1)
    ]


SECTIONS = st.sampled_from(
    [
        SplitSection(),
        SplitSection(validation=0.3, test=0.3),
        SplitSection(by="group", column="who"),
        SplitSection(by="time", column="when"),
    ]
)
LABELS = ["a", "b"]


@settings(max_examples=150, deadline=None)
@given(labelled_rows(), SECTIONS, st.integers(0, 3), st.randoms(use_true_random=False))
def test_split_holds_every_row_once_whatever_the_order(rows, section, seed, random):
    try:
        splits = split_rows(rows, section, seed=seed)
    except DataError:  # too few groups, moments or texts
        return
    assert tuple(splits) == SPLITS
    assert Counter(row.id for part in splits.values() for row in part) == Counter(row.id for row in rows)
    assert all(splits.values())
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert split_rows(shuffled, section, seed=seed) == splits


@settings(max_examples=100, deadline=None)
@given(labelled_rows(), SECTIONS, st.integers(0, 3))
def test_groups_stay_together(rows, section, seed):
    try:
        splits = split_rows(rows, section, seed=seed)
    except DataError:
        return
    key = {"auto": "text", "group": "who", "time": "when"}[section.by]
    owners = {}
    for name, part in splits.items():
        for row in part:
            assert owners.setdefault(row.values[key], name) == name
    if section.by == "time":
        times = [[row.values["when"] for row in part] for part in splits.values()]
        assert max(times[0]) < min(times[1])
        assert max(times[1]) < min(times[2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=12), st.integers(0, 5))
def test_shares_of_a_random_split_of_distinct_texts(counts, seed):
    values = [{"text": f"{c} {i}", "label": f"c{c}"} for c, count in enumerate(counts) for i in range(count)]
    rows = [Row(f"f:{i}", None, i, value) for i, value in enumerate(values, start=1)]
    splits = split_rows(rows, SplitSection(validation=0.1, test=0.2), seed=seed)
    for name, share in (("validation", 0.1), ("test", 0.2)):
        present = {row.values["label"] for row in splits[name]}
        assert len(present) == len(counts)
        # A class of three rows gives one to each split, which is more than its share: at most one row a class too many.
        assert -2 <= len(splits[name]) - share * len(rows) <= len(counts) + 1


@settings(max_examples=60, deadline=None)
@given(labelled_rows(), st.integers(0, 3))
def test_random_split_never_leaks_and_dropping_leaves_no_leak(rows, seed):
    try:
        splits = split_rows(rows, SplitSection(), seed=seed)
    except DataError:
        return
    _, findings = check_rows(splits, LABELS, leaks="fail")
    assert "leak" not in {finding.kind for finding in findings}
    mixed = {name: rows[start::3] for start, name in enumerate(SPLITS)}
    kept, _ = check_rows(mixed, LABELS, leaks="drop")
    _, findings = check_rows(kept, LABELS, leaks="fail")
    assert not {"leak", "near_leak"} & {finding.kind for finding in findings}
    assert kept["test"] == mixed["test"]


@settings(max_examples=150, deadline=None)
@given(labelled_rows(), st.integers(1, 8), st.integers(0, 3), st.randoms(use_true_random=False))
def test_shots_choose_within_a_split_and_count_texts_of_each_class(rows, shots, seed, random):
    splits = {name: rows[start::3] for start, name in enumerate(SPLITS)}
    kept = keep_shots(splits, shots, seed=seed)
    assert kept["test"] == splits["test"]
    for name in ("train", "validation"):
        chosen = {row.id for row in kept[name]}
        assert kept[name] == [row for row in splits[name] if row.id in chosen]  # no row moves
        for label in {row.values["label"] for row in splits[name]}:
            there = {row.values["text"] for row in splits[name] if row.values["label"] == label}
            left = [row.values["text"] for row in kept[name] if row.values["label"] == label]
            assert len(left) == len(set(left)) == min(shots, len(there))
    for part in splits.values():
        random.shuffle(part)
    again = keep_shots(splits, shots, seed=seed)
    assert {name: {row.id for row in part} for name, part in again.items()} == {
        name: {row.id for row in part} for name, part in kept.items()
    }
