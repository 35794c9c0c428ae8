"""Cards of data sets: what they may say, and that a file name cannot leave its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe import Card, load_document

CARD = """\
name: bank
title: Bank questions
licence: CC-BY-4.0
files: {train: train.csv, test: [a.csv, more/b.csv]}
roles: {text: text, label: category}
labels: {0: card, 1: cash}
rows: {train: 10}
hub:
  id: acme/bank
  revision: 0123456789abcdef0123456789abcdef01234567
  splits: {test: validation}
"""


def _load(tmp_path: Path, text: str) -> Card:
    path = tmp_path / "card.yaml"
    path.write_text(text, encoding="utf-8")
    return load_document(path, Card)


def _message(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        _load(tmp_path, text)
    return str(caught.value).replace(str(tmp_path), "").strip("/")


def test_a_card_is_read(tmp_path: Path) -> None:
    card = _load(tmp_path, CARD)
    assert card.files == {"train": "train.csv", "test": ["a.csv", "more/b.csv"]}
    assert card.labels == {"0": "card", "1": "cash"}
    assert card.hub is not None
    assert card.hub.splits == {"test": "validation"}
    assert (card.format, card.language, card.illustrative, card.non_commercial) == ("csv", ["en"], False, False)


def test_the_folder_is_the_name_unless_it_is_given(tmp_path: Path) -> None:
    assert _load(tmp_path, CARD).local == "bank"
    assert _load(tmp_path, CARD + "local: elsewhere\n").local == "elsewhere"


def test_a_wrong_name_is_one_problem_although_the_folder_follows_from_it(tmp_path: Path) -> None:
    assert _message(tmp_path, CARD.replace("name: bank", "name: /bank")).startswith(
        "card.yaml: 1 problem\n  line 1  name: "
    )


@pytest.mark.parametrize(
    "name", ["../x.csv", "a/../../x.csv", "/etc/x.csv", r"C:\x.csv", r"..\x.csv", r"\\host\x", " "]
)
def test_files_stay_inside_the_folder(tmp_path: Path, name: str) -> None:
    message = _message(tmp_path, CARD.replace("train: train.csv", f"train: '{name}'"))
    assert message == (
        "card.yaml: 1 problem\n  line 4  files.train: must be a path inside the data set's folder, without '..', "
        f"got {name!r}."
    )


@pytest.mark.parametrize("name", ["x..csv", "..hidden.csv", "a b/c.csv", "数据.csv"])
def test_odd_names_inside_the_folder_are_fine(tmp_path: Path, name: str) -> None:
    assert _load(tmp_path, CARD.replace("train: train.csv", f"train: '{name}'")).files["train"] == name


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("train: train.csv", "all: x.csv", "line 4  files.all: must stand alone, got also test."),
        ("train: train.csv", "train: []", "line 4  files.train: must name at least 1 file, got []."),
        ("train: train.csv", "train: 1", "line 4  files.train: must be text or a list of text, got 1."),
        ("train: train.csv", "train: [1]", "line 4  files.train[0]: must be text, got 1. Put it in quotes."),
        (
            "train: train.csv",
            "train: x.json#train",
            "line 4  files.train: must be a file name without '#' when `format` is csv, got 'x.json#train'.",
        ),
        (
            "rows: {train: 10}",
            "rows: {trian: 10}",
            "line 7  rows.trian: the key must be one of train, validation, test, all, got 'trian'. Did you mean",
        ),
        (
            "rows: {train: 10}",
            "items: {file: ../x.csv}",
            "line 7  items.file: must be a path inside the data set's folder, without '..', got '../x.csv'.",
        ),
        (
            "rows: {train: 10}",
            "items: {categorical: [kind], numeric: [kind]}",
            "line 7  items.numeric: must not repeat a column of `categorical`, got 'kind'.",
        ),
        ("rows: {train: 10}", "items: {txt: [a]}", "line 7  items.txt: unknown key. Did you mean 'text'?"),
        ("rows: {train: 10}", "rows: {train: -1}", "line 7  rows.train: must be at least 0, got -1."),
        (
            "revision: 0123456789abcdef0123456789abcdef01234567",
            "revision: main",
            "line 10  hub.revision: must be a commit of 40 hex digits, which a branch name is not, got 'main'.",
        ),
        ("id: acme/bank", "id: a b", "line 9  hub.id: must be `owner/name`, got 'a b'."),
        ("labels: {0: card, 1: cash}", "labels: [card]", "line 6  labels: must name at least 2 classes, got ['card']."),
        ("licence: CC-BY-4.0\n", "", "line 1  licence: must be given. SPDX identifier, or the words of the licence."),
    ],
)
def test_problems_of_cards(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert f"  {sentence}" in _message(tmp_path, CARD.replace(old, new))


def test_a_wrong_split_name_in_files(tmp_path: Path) -> None:
    assert "files.dev: the key must be one of train, validation, test, all, got 'dev'." in _message(
        tmp_path, CARD.replace("train: train.csv", "dev: x.csv")
    )


def test_a_card_without_files_needs_the_hub(tmp_path: Path) -> None:
    text = CARD.replace("files: {train: train.csv, test: [a.csv, more/b.csv]}\n", "")
    assert _load(tmp_path, text).files == {}
    assert _message(tmp_path, text[: text.index("hub:")]) == (
        "card.yaml: 1 problem\n  line 1  files: must name at least 1 file when there is no `hub`, got nothing."
    )


def test_splits_in_one_json_file(tmp_path: Path) -> None:
    text = (
        "name: c\ntitle: C\nlicence: CC-BY-3.0\nformat: json_splits\nfiles: {train: [d.json#train, d.json#oos_train]}\n"
    )
    assert _load(tmp_path, text).files == {"train": ["d.json#train", "d.json#oos_train"]}
    assert "files.train: must be `file.json#key` when `format` is json_splits, got 'd.json'." in _message(
        tmp_path, text.replace("d.json#train", "d.json")
    )


BARE = "name: c\ntitle: C\nlicence: MIT\n"


def test_files_of_a_split_are_listed_as_they_are_read(tmp_path: Path) -> None:
    card = _load(tmp_path, CARD)
    assert list(card.list_files()) == [("train", ["train.csv"]), ("test", ["a.csv"]), ("test", ["more/b.csv"])]
    pairs = "format: parallel\nfiles: {train: [a.en, a.de]}\ncolumns: {en: '', de: ''}\n"
    assert list(_load(tmp_path, BARE + pairs).list_files()) == [("train", ["a.en", "a.de"])]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "format: parallel\nfiles: {train: a.en}\ncolumns: {en: '', de: ''}\n",
            "files.train: must name one file per column when `format` is parallel, got 1 file for en, de.",
        ),
        (
            "format: parallel\nfiles: {test: [a, b, c]}\ncolumns: {en: '', de: ''}\n",
            "files.test: must name one file per column when `format` is parallel, got 3 files for en, de.",
        ),
        (
            "format: dstc\nfiles: {all: [a, b, c]}\n",
            "files.all: must name dialogues and labels, or labels alone, when `format` is dstc, got 3 files.",
        ),
        (
            "format: parallel\nfiles: {all: [a, b]}\n",
            "columns: must name the columns in order when `format` is parallel, got nothing.",
        ),
        (
            "format: headerless_tsv\nfiles: {all: a.txt}\n",
            "columns: must name the columns in order when `format` is headerless_tsv, got nothing.",
        ),
        (
            "format: json_list\nfiles: {all: a.json}\n",
            "columns: must name the columns in order when `format` is json_list, got nothing.",
        ),
        (
            "format: lines\nfiles: {all: a}\ncolumns: {en: '', de: ''}\n",
            "columns: must name `text` alone when `format` is lines, got en, de.",
        ),
        (
            "format: paragraphs\nfiles: {all: a.txt}\ncolumns: {poem: ''}\n",
            "columns: must name `text` alone when `format` is paragraphs, got poem.",
        ),
        (
            "files: {all: a.csv}\ncolumns: {text: ''}\naliases: {text: body}\n",
            "aliases: must be left out unless `format` is json_list, got text.",
        ),
        (
            "format: json_list\nfiles: {all: a.json}\ncolumns: {text: ''}\naliases: {txt: body}\n",
            "aliases.txt: must be one of `columns`, got 'txt'.",
        ),
    ],
)
def test_formats_need_what_their_files_do_not_say(tmp_path: Path, text: str, sentence: str) -> None:
    message = _message(tmp_path, BARE + text)
    assert message.startswith("card.yaml: 1 problem\n")
    assert message.endswith(f"  {sentence}")
