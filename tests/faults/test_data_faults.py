from __future__ import annotations

import gzip
import json
import pickle

import datasets
import pytest

from finetune.data import catalog, files, sources
from finetune.data.files import read_columns, read_table
from finetune.data.sources import load_rows
from finetune.errors import DataError


def refuse(path, words, data=None, **options):
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        load_rows(str(path), {}, **options)
    assert caught.value.exit_code == 3
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", b"", r"must hold rows, is empty\. Write rows into it, or name another file"),
        ("a.csv", b"\xef\xbb\xbf\r\n \n", r"must hold rows, is empty"),
        ("a.jsonl", b"", r"must hold rows, is empty"),
        ("a.txt", b"\n \r\n", r"must hold rows, is empty"),
        ("a.txt", b"\n\x0c\n\xe3\x80\x80\n", r"must hold rows, got only blank lines\. Write text into it, or name ano"),
        ("a.txt", b"one\n\ncaf\xe9\n", r"line 3, byte 9: must be UTF-8, got 0xe9\. Convert .*iconv -f WINDOWS-1252"),
        (
            "a.txt",
            "one\n".encode("utf-16"),
            r"line 1, byte 1: must be UTF-8, got the mark of UTF-16\. .*iconv -f UTF-16 ",
        ),
        ("a.txt.gz", gzip.compress(b"one\n" * 99, mtime=0)[:-20], r"must be a whole gzip file, got"),
        ("a.csv", b"text,label\n", r"must hold rows, got only the header text, label\. Add rows"),
        (
            "a.csv",
            b"text,label\nok,x\ncaf\xe9,y\n",
            r"line 3, byte 20: must be UTF-8, got 0xe9\. .*iconv -f WINDOWS-1252",
        ),
        (
            "a.csv",
            "text,label\nok,x\n".encode("utf-16"),
            r"line 1, byte 1: must be UTF-8, got the mark of UTF-16\. Convert .*: iconv -f UTF-16 -t UTF-8 a\.csv",
        ),
        # Few NUL bytes, and none at all: neither may be cut out, nor read as Western letters.
        (
            "a.csv",
            "text,label\n这个产品很好,好\n".encode("utf-16"),
            r"got the mark of UTF-16\. Convert .*iconv -f UTF-16 ",
        ),
        (
            "a.txt",
            "这个产品非常好用\u3000我很喜欢".encode("utf-16"),
            r"got the mark of UTF-16\. Convert .*iconv -f UTF-16 ",
        ),
        (
            "a.csv",
            "text,label\n这个产品非常好用。我很喜欢,好\n".encode("gbk"),
            r"must be UTF-8, got 0x.*iconv -f GB18030 ",
        ),
        ("a.txt", "d\xe9j\xe0 vu \xe0 No\xebl".encode("latin-1"), r"must be UTF-8, got 0xe9.*iconv -f WINDOWS-1252 "),
        ("a.txt", "привет, как дела".encode("cp1251"), r"must be UTF-8, got 0x.*iconv -f WINDOWS-1252 "),
        ("a.csv", "text,label\nok,x\n".encode("utf-16-le"), r"line 1, byte 2: must be text, got a NUL byte"),
        (
            "a.csv",
            b"text,label\nok,x\nb\0d,y\n",
            r"line 3, byte 18: must be text, got a NUL byte\. Remove it, .* tr -d",
        ),
        (
            "a.csv",
            b"text,label\nok,x\none, two,y\n",
            r'line 3: must have 2 fields like the header, got 3\. Put .*a comma in "',
        ),
        (
            "a.csv",
            b"text;label\none, two;x\n",
            r"line 2: must have 1 field like .* got 2\. Its .* parted by ';'",
        ),
        ("a.csv", b'text;label\n"one; two";x\n', r"line 2: must be CSV, got .*Its fields seem to be parted by ';'"),
        ("a.csv", b'"text";"label"\none;x\n', r"line 1: must be CSV, got .*Its fields seem to be parted by ';'"),
        (
            "a.tsv",
            b'text\tlabel\nok\tx\n"quoted\tx\nmore\ty\nan inch"\tx\n',
            r'line 3: a field must end on its line, .* takes in all up to line 5, as if .*each quote inside .* as ""',
        ),
        ("a.tsv", b"text\tlabel\nok\n", r'line 2: must have 2 fields like the header, got 1\. Put .*a tab in "quotes"'),
        ("a.csv", b'text,label\n"two\nlines",x\nshort\n', r"line 4: must have 2 fields like the header, got 1"),
        ("a.csv", b'text,label\nok,x\n"never closed,y\nmore\n', r"line 3: a field must end.*Close the quote"),
        ("a.csv", b'text,label\n"a"b,x\n', r'line 2: must be CSV, got .*Write a quote inside a quoted text as ""'),
        ("a.csv", b"text,text\na,b\n", r"line 1: must name each column once, got text twice"),
        ("a.csv", b'text,label\na,b\n""\n', r"must hold no blank rows, got 1\. Remove them"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"line 2: must be a JSON object, got \[1\]\. Write one object per line"),
        (
            "a.jsonl",
            b'\n{"text": \n',
            r"line 2: must be a JSON object, got 'Expecting value.*'\. Write one object per line",
        ),
        (
            "a.jsonl",
            b"[" * 100_000,
            r"line 1: must be a JSON object, got 'maximum recursion|line 1: must be a JSON object",
        ),
        ("a.parquet", b"PAR1 not really PAR1", r"must be a Parquet file, got '.*Get or write it again"),
        ("a.csv.gz", b"text,label\n", r"must be a whole gzip file, got 'Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"text,label\na,b\n" * 99, mtime=0)[:-20], r"must be a whole gzip file, got"),
        ("a.csv.gz", gzip.compress(b"text,label\n\xff,x\n", mtime=0), r"line 2, byte 12: must be UTF-8"),
        (
            "a.pkl",
            pickle.dumps([1]),
            r"rows come as CSV, TSV, JSONL, Parquet or plain text, got '\.pkl', which can run code",
        ),
        ("a.bin", b"x", r"rows come as CSV, TSV, JSONL, Parquet or plain text, got '\.bin'"),
        (
            "a.json",
            b"[]",
            r"must end in one of \.csv, .* got '\.json'\. Write one JSON object per line and name it \.jsonl",
        ),
        ("a.xlsx.gz", b"x", r"must end in one of .* got '\.xlsx\.gz'\. Save the rows as CSV or JSONL"),
        ("a.xlsx", b"x", r"must end in one of .* got '\.xlsx'\. Save its sheet as CSV in UTF-8"),
        ("rows", b"x", r"must end in one of .* got 'no ending'"),
        (
            "a.jsonl",
            b'{"text": ["x"], "label": "y"}',
            r"row 1: column 'text': must hold text, got a list\. Choose another",
        ),
    ],
)
def test_damaged_file(tmp_path, name, data, words):
    refuse(tmp_path / name, words, data)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("read", [read_table, read_columns])
@pytest.mark.parametrize(
    ("header", "row", "opens", "closes"),
    [
        ("text,label", "message {i},yes", '"Quoted start only message,yes', 'message that ends quoted",no'),
        ("text,label", "message {i},yes", '"Well, quoted start,yes', 'message that ends quoted",no'),
        ("label,text", "no,message {i}", 'yes,"start', 'no,end"'),
        ("id,text,label", "{i},message {i},yes", '20,"quoted start,yes', '60,ends quoted",no'),
        ("text,stars", "{i} messages,5", '"start,4', 'end",3'),
    ],
)
def test_a_quote_that_nothing_closes_takes_no_rows_away(tmp_path, name, read, header, row, opens, closes):
    lines = [header, *(row.format(i=i) for i in range(2, 102))]
    lines[19], lines[59] = opens, closes
    path = tmp_path / name
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    words = (
        r'a\.csv.*: line 20: a field must end on its line, got one that a quote " opens and that takes in all up to'
        r' line 60, as if these rows were one text\. Close that quote, and write each quote inside a "quoted" text as'
        r' ""\. If it is one text, save the rows as JSONL\.'
    )
    with pytest.raises(DataError, match=words):
        read(path)


def test_byte_place_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 7)
    data = "text,label\nnaïve über,x\n".encode()
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    assert load_rows(str(path), {}).rows[0].values["text"] == "naïve über"
    refuse(path, rf"line 3, byte {len(data) + 3}: must be UTF-8", data + b"ab\xc3\x28,y\n")
    refuse(path, rf"line 3, byte {len(data) + 3}: must be UTF-8", data + b"ab\xc3")


def test_longest_text(tmp_path):
    limit = files.MAX_TEXT_CHARACTERS
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * limit, "label": "y"}), encoding="utf-8")
    assert len(load_rows(str(path), {}).rows[0].values["text"]) == limit
    line = json.dumps({"text": "x" * (limit + 1), "label": "y"})
    refuse(
        path, r"row 1: column 'text': must have at most 100,000 characters, got 100,001\. Split or cut", line.encode()
    )
    refuse(tmp_path / "a.csv", r"line 2: a field must end and have at most", b"text,label\n" + b"x" * 200_000 + b",y\n")
    words = r"row 2: column 'text': must have at most 100,000 characters, got 100,001\. Split or cut"
    refuse(tmp_path / "a.txt", words, b"short\n\n" + b"x" * 50_000 + b"\n" + b"y" * 50_000, roles=("text",))


@pytest.mark.parametrize("name", ["a.csv.gz", "a.txt.gz"])
@pytest.mark.parametrize("filling", [b"a", b"\0", b"\xff"])
def test_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, name, filling):
    monkeypatch.setattr(files, "FREE_UNPACKED_BYTES", 2 * files.BLOCK_BYTES)
    written = []
    check = files._check_unpacked
    monkeypatch.setattr(
        files, "_check_unpacked", lambda path, size, packed: (written.append(size), check(path, size, packed))
    )
    path = tmp_path / name
    with gzip.open(path, "wb") as file:
        file.write(b"text,label\n")
        for _ in range(20):
            file.write(filling * files.BLOCK_BYTES)
    refuse(path, r"must unpack to at most 200 times its [\d,]+ bytes and at most 4 GiB, got more\. Unpack it yourself")
    assert max(written) < 20 * files.BLOCK_BYTES


def test_unpacked_size_has_an_absolute_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 10)
    refuse(tmp_path / "a.csv.gz", "must unpack to at most 200 times", gzip.compress(b"text,label\na,b\n"))


def test_parquet_without_rows_or_too_large(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": [], "label": []}).to_parquet(path)
    refuse(path, r"must hold rows, got only the columns text, label")
    datasets.Dataset.from_dict({"text": ["a" * 1000], "label": ["b"]}).to_parquet(path)
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 100)
    refuse(path, r"must unpack to at most .* GiB, got 0\.0\. Split it")


def test_damaged_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["some words"] * 50, "label": ["b"] * 50}).to_parquet(path)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # the first page; the footer is whole
    refuse(path, r"must be readable as parquet, got '", bytes(data))


def test_unreadable_file(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "_copy_text", fail)
    refuse(tmp_path / "a.csv", r"must be readable, got 'Permission denied'\. Check its rights", b"text,label\na,b\n")


def test_nothing_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError,
        match=r"got 'bankng77': .* nothing lies at .*recipes.bankng77 nor bankng77\. .*banking77'\?",
    ):
        load_rows("bankng77", {}, relative_to=tmp_path / "recipes")


def test_folder_without_splits(tmp_path):
    (tmp_path / "x").mkdir()
    refuse(tmp_path / "x", r"must hold train\.\*, validation\.\* and test\.\*, got nothing\. Name a file instead")
    (tmp_path / "x" / "train.csv").write_text("text,label\na,b\n", encoding="utf-8")
    (tmp_path / "x" / "train.jsonl").write_text("{}", encoding="utf-8")
    refuse(tmp_path / "x", r"must hold one file for train, got train\.csv and train\.jsonl")


def test_folder_named_like_a_file_in_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"gone\.csv: must be a file, got nothing there\. Check the name"):
        files.read_table(tmp_path / "gone.csv")


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Writes the card `tiny`, whose folder is `tmp_path / "data" / "tiny"`."""
    monkeypatch.setattr(catalog, "shipped_folder", lambda _kind: tmp_path / "shipped")
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "shipped" / "catalog").mkdir(parents=True)

    def write(text):
        path = tmp_path / "shipped" / "catalog" / "tiny.yaml"
        path.write_text(f"name: tiny\ntitle: Tiny\nlicence: MIT\n{text}\n", encoding="utf-8")
        return tmp_path / "data" / "tiny"

    return write


def test_link_out_of_the_cards_folder(card, tmp_path):
    folder = card("files: {all: a.csv}")
    (tmp_path / "secret.csv").write_text("text,label\na,b\n", encoding="utf-8")
    (folder / "a.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(
        DataError, match=r"tiny: a\.csv must lie in .*, got a link to .*secret\.csv\. Put the file itself there"
    ):
        load_rows("tiny", {})


def test_file_missing_from_the_cards_folder(card):
    card("files: {all: a.csv}")
    with pytest.raises(DataError, match=r"tiny: a\.csv must lie in .*, got nothing there\. Get the whole data set"):
        load_rows("tiny", {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"must be JSON, got"),
        ('{"trian": []}', r"must hold the key 'train', got trian\. Did you mean 'trian'"),
        ("[]", r"must hold the key 'train', got none"),
        ('{"train": []}', r"train must be a list of \[text, label\] pairs, got \[\]"),
        ('{"train": [["a", "b"], ["c"]]}', r"train, entry 2: must be a pair \[text, label\], got \['c'\]"),
    ],
)
def test_damaged_file_of_pairs(card, content, words):
    folder = card("files: {train: all.json#train}\nformat: json_splits")
    (folder / "all.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"all\.json: {words}"):
        load_rows("tiny", {})


def test_public_set_without_folder_and_without_network(card, monkeypatch):
    card(
        "files: {all: a.csv}\nlocal: elsewhere\nhub: {id: org/tiny, revision: 0123456789abcdef0123456789abcdef01234567}"
    )

    def fail(*_args, **_options):
        raise ConnectionError("Couldn't reach the Hub.\nsecond line")

    monkeypatch.setattr(sources.datasets, "load_dataset_builder", fail)
    with pytest.raises(DataError) as caught:
        load_rows("tiny", {})
    assert str(caught.value) == (
        "tiny: must come from a folder or the Hub, got no folder, and org/tiny at"
        " 0123456789abcdef0123456789abcdef01234567 failed with ConnectionError (Couldn't reach the Hub)."
        " Set FINETUNE_DATA to a folder that holds elsewhere/ or connect to the Hub."
    )
    with pytest.raises(DataError, match=r"Connect to the Hub, or check name and revision; of several conf"):
        load_rows("hub:org/tiny@main", {})


def test_public_set_without_folder_and_without_hub(card):
    folder = card("files: {all: a.csv}\nlocal: elsewhere")
    assert folder.is_dir()
    with pytest.raises(DataError, match=r"must lie in a folder, got none and no copy on the Hub\. Set FINETUNE_DATA"):
        load_rows("tiny", {})


def test_splits_on_the_hub_must_have_known_names(card, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": ["b"]})
    monkeypatch.setattr(
        sources.datasets, "load_dataset", lambda *_args, **_options: datasets.DatasetDict({"part": rows})
    )
    monkeypatch.setattr(sources, "_choose_types", lambda *_: {})
    with pytest.raises(DataError, match=r"org/x: must have a split named train, validation or test, got part"):
        load_rows("hub:org/x@main", {})
    card("hub: {id: org/x, revision: 0123456789abcdef0123456789abcdef01234567, splits: {train: tarin}}")
    with pytest.raises(DataError, match=r"tiny: the Hub must hold the splits tarin, got part"):
        load_rows("tiny", {})


def test_hub_reference_must_be_pinned():
    with pytest.raises(DataError, match=r"must be hub:org/name@revision, with a commit or a tag.*got 'hub:org/name'"):
        load_rows("hub:org/name", {})


def test_the_recipes_folder_comes_before_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    for folder, text in ((tmp_path, "of the working folder"), (tmp_path / "recipes", "of the recipe")):
        (folder / "rows.csv").write_text(f"text,label\n{text},a\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    loaded = load_rows("rows.csv", {}, relative_to=tmp_path / "recipes")
    assert loaded.rows[0].values["text"] == "of the recipe"
    words = "data: rows.csv is read from the recipe's folder; the working folder has another one."
    assert [(finding.severity, finding.message) for finding in loaded.findings] == [("warning", words)]
    (tmp_path / "recipes" / "rows.csv").unlink()
    loaded = load_rows("rows.csv", {}, relative_to=tmp_path / "recipes")
    assert (loaded.rows[0].values["text"], loaded.findings) == ("of the working folder", ())
    monkeypatch.chdir(tmp_path)
    assert load_rows("rows.csv", {}, relative_to=tmp_path).findings == ()
