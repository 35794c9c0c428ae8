from __future__ import annotations

import gzip
import json
import re

import datasets
import pytest

from finetune.data import catalog, sources
from finetune.data.sources import load_rows, load_texts
from finetune.errors import ColumnError, DataError

CSV = 'text,label,source\nGood news,pos,a\n"Bad, news",neg,b\n'


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "shipped_folder", lambda _kind: tmp_path / "shipped")
    monkeypatch.delenv("FINETUNE_DATA", raising=False)
    return tmp_path / "shipped"


def add_card(shipped, text, name="tiny"):
    write(shipped / "catalog" / f"{name}.yaml", f"name: {name}\ntitle: Tiny\nlicence: MIT\n" + text)


# Files


def test_csv_file(tmp_path):
    loaded = load_rows(str(write(tmp_path / "news.csv", CSV)), {})
    assert loaded.name == "news"
    assert loaded.card is None
    assert [(row.id, row.split, row.number) for row in loaded.rows] == [("news:1", None, 1), ("news:2", None, 2)]
    assert loaded.rows[1].values == {"text": "Bad, news", "label": "neg", "source": "b"}


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [
        {"text": "2020-01-01", "label": "0"},
        {"text": "NA", "label": "1"},
        {"text": "null\nnaïve", "label": "1"},
        {"text": ' a "quoted", 01 ', "label": "0"},
    ]
    frame = datasets.Dataset.from_list(rows)
    frame.to_csv(tmp_path / "a.csv")
    frame.to_csv(tmp_path / "a.tsv", sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    names = ["a.csv", "a.tsv", "a.parquet", "a.jsonl", "a.csv.gz", "a.jsonl.gz"]
    loaded = [load_rows(str(tmp_path / name), {}) for name in names]
    assert all([dict(row.values) for row in one.rows] == rows for one in loaded)
    assert len({one.fingerprint for one in loaded}) == 1


def test_types_of_jsonl_become_text_in_roles_only(tmp_path):
    lines = ['{"text": 1, "label": 0, "n": [1]}', '{"text": true, "label": 2.0}', '{"text": 1.5, "label": null}']
    rows = load_rows(str(write(tmp_path / "a.jsonl", "\n\n".join(lines))), {}).rows
    assert [dict(row.values) for row in rows] == [
        {"text": "1", "label": "0", "n": [1]},
        {"text": "true", "label": "2", "n": None},
        {"text": "1.5", "label": None, "n": None},
    ]


def test_spaces_around_a_label_are_no_part_of_it(tmp_path):
    rows = load_rows(str(write(tmp_path / "a.csv", "text,label\n a , pos\nb,pos \nc,  \n")), {}).rows
    assert [(row.values["text"], row.values["label"]) for row in rows] == [(" a ", "pos"), ("b", "pos"), ("c", None)]


def test_missing_labels_become_none_and_missing_texts_empty(tmp_path):
    rows = load_rows(str(write(tmp_path / "a.csv", 'text,label\na,\n"",NA\n')), {}).rows
    assert [(row.values["text"], row.values["label"]) for row in rows] == [("a", None), ("", "NA")]


def test_byte_order_mark_is_no_part_of_the_header(tmp_path):
    for name, text in (("a.csv", CSV), ("a.jsonl", '{"text": "x", "label": "y"}')):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert "text" in load_rows(str(path), {}).rows[0].values


def test_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\r\none,x\r\n\r\ntwo,y\r\n")
    assert [row.values["text"] for row in load_rows(str(path), {}).rows] == ["one", "two"]


def test_paragraphs_of_a_text(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b'\xef\xbb\xbf\r\n First line\r\nsecond, line \r\n\r\n \t\r\n\r\n"Third"\r\n')
    packed = tmp_path / "packed" / "notes.txt.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        rows = load_rows(str(file), {}, roles=("text",)).rows
        assert [(row.id, row.values) for row in rows] == [
            ("notes:1", {"text": " First line\nsecond, line "}),
            ("notes:2", {"text": '"Third"'}),
        ]
    assert load_texts(path, "text")[1] == [" First line\nsecond, line ", '"Third"']


def test_name_with_pattern_characters_is_no_pattern(tmp_path):
    write(tmp_path / "a1.csv", CSV)
    assert load_rows(str(write(tmp_path / "a[1]*.csv", "text,label\nonly,x\n")), {}).rows[0].values["text"] == "only"


def test_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\none,x\n")
    first = load_rows(str(path), {})
    write(path, "text,label\ntwo,x\n")
    second = load_rows(str(path), {})
    assert second.rows[0].values["text"] == "two"
    assert first.fingerprint != second.fingerprint


def test_fingerprint_does_not_depend_on_the_folder(tmp_path):
    one, two = (load_rows(str(write(tmp_path / name / "a.csv", CSV)), {}) for name in ("x", "y"))
    assert one.fingerprint == two.fingerprint
    assert len(one.fingerprint) == 64


def test_folder_of_splits(tmp_path):
    for name in ("train.csv", "dev.jsonl", "test.csv.gz"):
        text = '{"text": "x", "label": "y"}' if "jsonl" in name else CSV
        data = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
        (tmp_path / name).write_bytes(data)
    write(tmp_path / "README.md", "no rows")
    rows = load_rows(str(tmp_path), {}).rows
    assert [row.id for row in rows] == ["train:1", "train:2", "validation:1", "test:1", "test:2"]
    assert [row.split for row in rows] == ["train", "train", "validation", "test", "test"]


def test_half_a_character_is_named_with_its_line(tmp_path):
    whole = json.dumps({"text": "half \U0001f600 pair", "label": "a"})
    assert load_rows(str(write(tmp_path / "a.jsonl", whole)), {}).rows[0].values["text"] == "half \U0001f600 pair"
    for cut in (r"\ud83d", r"\uDE00"):
        write(tmp_path / "a.jsonl", f'{whole}\n{{"text": "x", "label": "b", "note": ["{cut}"]}}')
        with pytest.raises(DataError) as caught:
            load_rows(str(tmp_path / "a.jsonl"), {})
        assert str(caught.value) == (
            f"{tmp_path / 'a.jsonl'}: line 2: must hold whole characters, got '{cut.lower()}', half of one: a text was "
            "cut inside an emoji. Remove it, or cut the text elsewhere."
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("test.xlsx", r"test\.xlsx: must end in one of .*got '\.xlsx'\. Save its sheet as CSV"),
        ("dev.json", r"dev\.json: .*name it \.jsonl"),
    ],
)
def test_folder_with_a_split_that_cannot_be_read(tmp_path, name, words):
    write(tmp_path / "train.csv", CSV)
    write(tmp_path / "notes.md", "no split")
    assert len(load_rows(str(tmp_path), {}).rows) == 2
    write(tmp_path / name, "x")
    with pytest.raises(DataError, match=words):
        load_rows(str(tmp_path), {})


def test_folder_of_plain_texts(tmp_path):
    for name, text in (("train", "one\n\ntwo\n"), ("validation", "three\n"), ("test", "four\n")):
        write(tmp_path / f"{name}.txt", text)
    rows = load_rows(str(tmp_path), {}, roles=("text",)).rows
    assert [(row.id, row.split, row.values["text"]) for row in rows] == [
        ("train:1", "train", "one"),
        ("train:2", "train", "two"),
        ("validation:1", "validation", "three"),
        ("test:1", "test", "four"),
    ]


# Columns


def test_target_is_a_text_like_the_other(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"en": "One.", "de": "Eins."}\n{"en": 2.0, "de": null, "label": [1]}')
    loaded = load_rows(str(path), {"text": "en", "target": "de"}, roles=("text", "target"))
    assert [dict(row.values) for row in loaded.rows] == [
        {"text": "One.", "target": "Eins.", "label": None},
        {"text": "2", "target": "", "label": [1]},
    ]
    assert loaded.columns == {"text": "en", "target": "de"}
    with pytest.raises(
        DataError, match=r"column 'target' must exist, got columns en, de, label\. .*{target: <column>}"
    ):
        load_rows(str(path), {"text": "en"}, roles=("text", "target"))
    write(path, json.dumps({"text": "a", "target": ["b"]}))
    with pytest.raises(DataError, match=r"row 1: column 'target': must hold text, got a list"):
        load_rows(str(path), {}, roles=("text", "target"))


def test_plain_text_has_no_other_column(tmp_path):
    path = write(tmp_path / "notes.txt", "one\n")
    with pytest.raises(
        DataError, match=r"column 'label' must exist, got columns text\. Add a column 'label' to the data"
    ):
        load_rows(str(path), {})


def test_columns_go_before_the_cards_roles(shipped, tmp_path, monkeypatch):
    add_card(shipped, "files: {all: a.csv}\nroles: {text: headline, label: mood}\n")
    write(tmp_path / "tiny" / "a.csv", "headline,mood,tone\nx,1,2\n")
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    assert load_rows("tiny", {}).rows[0].values == {"text": "x", "label": "1", "tone": "2"}
    assert load_rows("tiny", {"label": "tone"}).rows[0].values == {"text": "x", "label": "2", "mood": "1"}


def test_text_alone_is_enough_when_asked(tmp_path):
    path = write(tmp_path / "a.csv", "text\none\n")
    assert load_rows(str(path), {}, roles=("text",)).rows[0].values == {"text": "one"}


@pytest.mark.parametrize(
    ("header", "fix"),
    [
        (
            "text,target",
            r"column 'label' must exist, got columns text, target\. Set tasks\.<name>\.columns: {label: target}",
        ),
        ("text,a,labels", r"{label: labels}"),
        ("text,a,b", r"{label: <column>}"),
        ("text;label", r"column 'text' must exist.*Its fields seem to be parted by ';': save it with commas"),
    ],
)
def test_missing_column(tmp_path, header, fix):
    path = write(tmp_path / "prices.csv", f"{header}\n{re.sub('[a-z]', 'x', header)}\n")
    with pytest.raises(DataError, match=rf"prices\.csv: .*{fix}"):
        load_rows(str(path), {})


NO_HEADER = "The file seems to have no header line: write the names of its columns above its first row."


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (
            "text number 0 about a and more 9325,a\nanother text,b\none more,a\n",
            "text number 0 about a and more 9325, a",
        ),
        ("one text,4.5\nanother,3\n", "one text, 4.5"),
        ("How do I pay?\nWhere is it\n", "How do I pay?"),
    ],
)
def test_a_file_without_a_header_line(tmp_path, rows, columns):
    path = write(tmp_path / "a.csv", rows)
    words = f"{path}: column 'text' must exist, got columns {columns}. {NO_HEADER}"
    for load in (lambda: load_rows(str(path), {}), lambda: load_texts(path, "text")):
        with pytest.raises(DataError) as caught:
            load()
        assert str(caught.value) == words
        assert not isinstance(caught.value, ColumnError), "no name for it is advised by whoever asks for the column"


def test_names_that_may_be_names_are_taken_for_such(tmp_path):
    path = write(tmp_path / "a.csv", "How happy are you with our service?,Score\nvery,3\n")
    with pytest.raises(ColumnError, match=r"Set tasks\.<name>\.columns: {text: <column>}"):
        load_rows(str(path), {})
    path = write(tmp_path / "b.csv", "Message Body\nvery\n")
    with pytest.raises(ColumnError, match=r"Set tasks\.<name>\.columns: {text: Message Body}"):
        load_rows(str(path), {}, roles=("text",))
    path = write(tmp_path / "a.jsonl", '{"0": "x"}\n')
    with pytest.raises(ColumnError, match=r"Set tasks\.<name>\.columns: {text: 0}"):
        load_rows(str(path), {})


def test_texts_of_a_file_parted_by_something_else(tmp_path):
    path = write(tmp_path / "a.csv", "id;Message Body;Category;stars\n1;x;y;4\n")
    words = r"got columns id;Message Body;Category;stars\. Its fields seem to be parted by ';': save it with commas, or"
    with pytest.raises(DataError, match=words):
        load_texts(path, "text")


# Cards


def test_card_with_several_files_per_split(shipped, tmp_path, monkeypatch):
    add_card(
        shipped,
        "files: {train: [all.json#a, all.json#b], test: all.json#c}\nformat: json_splits\n"
        "columns: {text: said, intent: meant}\nroles: {text: text, label: intent}\nrows: {train: 3, test: 2}\n",
    )
    content = {"a": [["one", "x"], ["two", "y"]], "b": [["three", "oos"]], "c": [["four", "x"]]}
    write(tmp_path / "tiny" / "all.json", json.dumps(content))
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    loaded = load_rows("tiny", {})
    assert [(row.id, row.number, row.values["text"]) for row in loaded.rows] == [
        ("train:1", 1, "one"),
        ("train:2", 2, "two"),
        ("train:3", 1, "three"),
        ("test:1", 1, "four"),
    ]
    assert loaded.rows[2].values["label"] == "oos"
    assert loaded.origin == "folder $FINETUNE_DATA/tiny"
    assert [found.message for found in loaded.findings] == ["test: the card says 2 rows, got 1."]


def test_unsplit_card_names_rows_after_the_file(shipped, tmp_path, monkeypatch):
    add_card(shipped, "files: {all: reviews.csv}\n")
    write(tmp_path / "tiny" / "reviews.csv", CSV)
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    loaded = load_rows("tiny", {})
    assert [(row.id, row.split) for row in loaded.rows] == [("reviews:1", None), ("reviews:2", None)]
    assert loaded.card is not None


# The Hub


@pytest.fixture
def hub(monkeypatch):
    """Records what is asked of the Hub, and answers with two rows."""
    calls = []
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)

    def load_dataset(path, **options):
        calls.append((path, options))
        return datasets.DatasetDict({"train": rows, "valid": rows, "extra": rows})

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "_choose_types", lambda *_: {})
    return calls


def test_hub_reference(hub):
    loaded = load_rows("hub:acme/news@v1.0", {})
    assert [row.id for row in loaded.rows] == ["train:1", "train:2", "validation:1", "validation:2"]
    assert [row.values["label"] for row in loaded.rows[:2]] == ["yes", None]
    assert (loaded.name, loaded.origin) == ("news", "Hub acme/news@v1.0")
    assert hub == [("hf://datasets/acme/news", {"name": None, "revision": "v1.0", "data_files": None})]


def test_card_on_the_hub_maps_splits_and_columns(shipped, hub):
    revision = "0123456789abcdef0123456789abcdef01234567"
    add_card(
        shipped,
        f"hub: {{id: acme/news, revision: {revision}, config: plus, splits: {{train: train, test: extra}},"
        " columns: {mood: label}}\nroles: {text: text, label: mood}\n",
    )
    loaded = load_rows("tiny", {})
    assert [(row.id, row.values["label"]) for row in loaded.rows][::2] == [("train:1", "yes"), ("test:1", "yes")]
    assert loaded.origin == "Hub acme/news@0123456789ab"
    assert hub[0][1] == {"name": "plus", "revision": revision, "data_files": None}


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A Hub whose repositories are folders, read by the library's own readers."""
    for name in ("load_dataset", "load_dataset_builder"):
        own = getattr(datasets, name)

        def load(path, own=own, **options):
            if path.startswith("hf://datasets/"):
                path = str(tmp_path / "mirror" / path.removeprefix("hf://datasets/"))
                options |= {"revision": None, "cache_dir": str(tmp_path / "cache")}
            return own(path, **options)

        monkeypatch.setattr(sources.datasets, name, load)
    return tmp_path / "mirror"


WRITTEN = "text,label\nNA,01\nnull,1\n 7,None\n"


def test_csv_on_the_hub_is_read_as_local_csv_is(shipped, mirror, tmp_path):
    write(mirror / "acme" / "news" / "train.csv", WRITTEN)
    local = load_rows(str(write(tmp_path / "train.csv", WRITTEN)), {})
    there = load_rows("hub:acme/news@v1", {})
    revision = "0123456789abcdef0123456789abcdef01234567"
    add_card(shipped, f"hub: {{id: acme/news, revision: {revision}, files: {{train: train.csv}}}}\n")
    for loaded in (there, load_rows("tiny", {})):
        assert [dict(row.values) for row in loaded.rows] == [dict(row.values) for row in local.rows]
        assert loaded.fingerprint == local.fingerprint
    assert [row.values["label"] for row in local.rows] == ["01", "1", "None"]


def test_a_configuration_on_the_hub(mirror):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("en", "de"))
    write(mirror / "acme" / "news" / "README.md", f"---\nconfigs:\n{configs}---\n")
    for name in ("en", "de"):
        write(mirror / "acme" / "news" / f"{name}.csv", f"text,label\n{name},a\n")
    loaded = load_rows("hub:acme/news:de@v1", {})
    assert (loaded.name, loaded.origin) == ("news", "Hub acme/news:de@v1")
    assert [row.values["text"] for row in loaded.rows] == ["de"]
    with pytest.raises(DataError, match=r"Config name is missing(.|\n)*name one: hub:org/name:config@rev\."):
        load_rows("hub:acme/news@v1", {})


def test_a_folder_with_the_name_of_a_repository_is_not_read(tmp_path, monkeypatch):
    write(tmp_path / "acme" / "news" / "train.csv", CSV)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"acme/news: must come from a folder or the Hub, got no folder"):
        load_rows("hub:acme/news@v1", {})


def test_rows_with_nothing_in_them_are_left_out(tmp_path):
    write(tmp_path / "a.csv", "text,label,note\none,a,\n,,\n two,b,\n ,,  \n")
    loaded = load_rows(str(tmp_path / "a.csv"), {})
    assert [(row.id, row.number) for row in loaded.rows] == [("a:1", 1), ("a:3", 3)]  # numbers stay those of the file
    words = "2 rows with nothing in any column, as spreadsheets leave behind: left out."
    assert [(found.severity, found.count, found.message) for found in loaded.findings] == [("note", 2, words)]
    write(tmp_path / "b.csv", "text,label\n,\n")
    with pytest.raises(DataError, match=r"b\.csv: must hold rows, got 1 row with nothing in them\.$"):
        load_rows(str(tmp_path / "b.csv"), {})
