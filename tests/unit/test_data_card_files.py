"""Files whose columns only a card knows: line-wise, parallel, headerless and JSON."""

from __future__ import annotations

import gzip
import json

import pytest

from finetune.data import files
from finetune.data.card_files import read_card_files
from finetune.data.sources import load_rows
from finetune.errors import DataError
from finetune.recipe import Card

PAIR = {"en": "English", "de": "German"}


def make_card(**keys):
    return Card(name="tiny", title="Tiny", licence="MIT", **{"files": {"all": "a"}, **keys})


def write(path, text):
    data = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(card, *paths, key=""):
    return read_card_files(card, paths, key)


def refuse(card, words, *paths, key=""):
    with pytest.raises(DataError, match=words):
        read(card, *paths, key=key)


# Lines


def test_a_row_per_line(tmp_path):
    path = write(tmp_path / "a.de", "\ufeffeins\r\n\n \t\n zwei \u2028 drei\n\rvier")
    assert read(make_card(format="lines"), path) == [
        {"text": "eins"},
        {"text": "zwei \u2028 drei"},  # a line end for Unicode, not for the file
        {"text": "vier"},
    ]


# Parallel lines


@pytest.fixture
def parallel():
    return make_card(files={"all": ["a", "b"]}, columns=PAIR, format="parallel")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_line_n_of_each_file_is_row_n(parallel, tmp_path, ending):
    sides = (write(tmp_path / f"a.en{ending}", "One.\nTwo. \n"), write(tmp_path / f"a.de{ending}", "Eins.\r\nZwei."))
    assert read(parallel, *sides) == [{"en": "One.", "de": "Eins."}, {"en": "Two.", "de": "Zwei."}]


@pytest.mark.parametrize("odd", ["\r", "\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_what_other_tools_take_for_a_line_end_does_not_part_the_files(parallel, tmp_path, odd):
    sides = (write(tmp_path / "a.en", f"a{odd}b\nc\n"), write(tmp_path / "a.de", "A B\nC\n"))
    assert read(parallel, *sides) == [{"en": f"a{odd}b", "de": "A B"}, {"en": "c", "de": "C"}]


def test_empty_line_stays_in_its_place(parallel, tmp_path):
    sides = (write(tmp_path / "a.en", "a\n\nc\n"), write(tmp_path / "a.de", "A\nB\nC\n"))
    assert read(parallel, *sides)[1] == {"en": "", "de": "B"}


def test_unequal_numbers_of_lines(parallel, tmp_path):
    sides = (write(tmp_path / "a.en", "x\n" * 1001), write(tmp_path / "a.de", "x\n" * 3))
    words = r"a\.en: must have as many lines as the files that it goes with, got a\.en 1,001, a\.de 3\. Get the files"
    refuse(parallel, words, *sides)


# Fields without a header


@pytest.fixture
def fields():
    return make_card(columns={"en": "English", "zh": "Chinese", "by": "author"}, format="headerless_tsv")


def test_fields_are_text_as_written(fields, tmp_path):
    path = write(tmp_path / "cmn.txt", '"Hi," he said.\t“嗨。”\t\r\n\n NA\tnull\t#1 (CK) & #2\n')
    assert read(fields, path) == [
        {"en": '"Hi," he said.', "zh": "“嗨。”", "by": ""},
        {"en": " NA", "zh": "null", "by": "#1 (CK) & #2"},
    ]


def test_wrong_number_of_fields(fields, tmp_path):
    path = write(tmp_path / "cmn.txt", "a\tb\tc\n\na\tb\n")
    words = r"cmn\.txt: line 3: must have 3 fields parted by tabs \(en, zh, by\), got 2\. Get .* correct the card's col"
    refuse(fields, words, path)


# Lists of objects


@pytest.fixture
def objects():
    return make_card(
        columns={"paragraphs": "", "title": "", "author": ""},
        aliases={"paragraphs": "content", "title": "rhythmic"},
        format="json_list",
    )


def test_lines_of_an_object_become_one_text(objects, tmp_path):
    content = [
        {"author": "陳子昂", "paragraphs": ["前不見古人。", "後不見來者。"], "title": "登幽州臺歌", "tags": ["x"]},
        {"content": "关关雎鸠", "title": "关雎", "notes": {"a": 1}},
        {"paragraphs": [], "rhythmic": "菩萨蛮", "title": "菩萨蛮 其一", "author": 7},
        {"paragraphs": ["近清明。"], "rhythmic": "湘春夜月", "author": None},
    ]
    assert read(objects, write(tmp_path / "a.json", json.dumps(content))) == [
        {"paragraphs": "前不見古人。\n後不見來者。", "title": "登幽州臺歌", "author": "陳子昂"},
        {"paragraphs": "关关雎鸠", "title": "关雎", "author": None},
        {"paragraphs": "", "title": "菩萨蛮 其一", "author": 7},
        {"paragraphs": "近清明。", "title": "湘春夜月", "author": None},
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"paragraphs"', r"must be JSON, got 'Expecting ':' delimiter.*Get the file again"),
        ("[" * 100_000, r"must be JSON, got '"),
        ('{"a": []}', r"must be a JSON list of objects, got {a: \[\]}\. Get the file again"),
        ("[]", r"must be a JSON list of objects, got \[\]"),
        ('[{"title": "a"}, "b"]', r"entry 2: must be a JSON object, got 'b'\. Get the file again"),
        (
            '[{"paragraphs": "a"}, {"content": ["b", 1]}]',
            r"entry 2: 'content': must be text or a list of lines, got \['b', 1\]\. Leave it out of the columns",
        ),
        ('[{"title": {"zh": "a"}}]', r"entry 1: 'title': must be text or a list of lines, got {zh: 'a'}"),
    ],
)
def test_damaged_list(objects, tmp_path, content, words):
    refuse(objects, rf"a\.json: {words}", write(tmp_path / "a.json", content))


# What holds for all of them


@pytest.mark.parametrize("kind", ["lines", "parallel", "headerless_tsv", "json_list", "json_splits"])
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a", b"", r"must hold rows, is empty\. Write rows into it, or name another file"),
        ("a", b"caf\xe9\n", r"line 1, byte 4: must be UTF-8, got 0xe9\. Convert it, .*iconv -f WINDOWS-1252"),
        ("a", "a\tb".encode("utf-16-le"), r"line 1, byte 2: must be text, got a NUL byte"),
        ("a.gz", gzip.compress(b"a" * 1000, mtime=0)[:-9], r"must be a whole gzip file, got .*Pack it again"),
        ("a.gz", b"a\tb\n", r"must be a whole gzip file, got 'Not a gzipped file"),
        (
            "a.gz",
            gzip.compress(b"\n" * 3 * files.BLOCK_BYTES, mtime=0),
            r"must unpack to at most 200 times its [\d,]+ bytes",
        ),
    ],
)
def test_bytes_are_checked_before_they_are_read(tmp_path, monkeypatch, kind, name, data, words):
    monkeypatch.setattr(files, "FREE_UNPACKED_BYTES", 2 * files.BLOCK_BYTES)
    names = {"parallel": ["b", "a"], "json_splits": "a#train"}.get(kind, "a")
    card = make_card(files={"all": names}, format=kind, columns={} if kind == "lines" else PAIR)
    path = tmp_path / name
    path.write_bytes(data)
    paths = [write(tmp_path / "b", "one\n"), path] if kind == "parallel" else [path]
    refuse(card, rf"{name}: {words}", *paths, key="train")


# The cards of the catalog, each with a few lines in the form of its files


@pytest.fixture
def public(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    return tmp_path


def test_multi30k(public):
    for name in ("train", "val", "test_2016_flickr"):
        write(public / "multi30k_en_de" / f"{name}.en.gz", f"A dog.\nIn {name}.\n")
        write(public / "multi30k_en_de" / f"{name}.de.gz", f"Ein Hund.\nDer Teil {name}.\n")
    loaded = load_rows("multi30k_en_de", {}, roles=("text", "target"))
    ids = [f"{split}:{i}" for split in ("train", "validation", "test") for i in (1, 2)]
    assert [row.id for row in loaded.rows] == ids
    assert loaded.rows[-1].values == {"text": "In test_2016_flickr.", "target": "Der Teil test_2016_flickr."}
    assert loaded.columns == {"text": "en", "target": "de"}
    assert loaded.findings[-1].message == "test: the card says 1,000 rows, got 2."


def test_multi30k_names_both_files_in_a_message(public):
    for name in ("train", "val", "test_2016_flickr"):
        for side in ("en", "de"):
            write(public / "multi30k_en_de" / f"{name}.{side}.gz", "x" * 100_001 if side == "de" else "x")
    words = r"multi30k_en_de: train\.en\.gz \+ train\.de\.gz: row 1: column 'de': must have at most 100,000 characters"
    with pytest.raises(DataError, match=words):
        load_rows("multi30k_en_de", {}, roles=("text", "target"))


def test_tatoeba_in_both_directions(public):
    write(public / "tatoeba_en_zh" / "cmn.txt", "Hi.\t嗨。\tCC-BY 2.0 (France)\nRun.\t你用跑的。\tCC-BY 2.0 (France)\n")
    rows = load_rows("tatoeba_en_zh", {}, roles=("text", "target")).rows
    assert [row.id for row in rows] == ["cmn:1", "cmn:2"]
    assert rows[1].values == {"text": "Run.", "target": "你用跑的。", "attribution": "CC-BY 2.0 (France)"}
    back = load_rows("tatoeba_en_zh", {"text": "zh", "target": "en"}, roles=("text", "target")).rows
    assert (back[0].values["text"], back[0].values["target"]) == ("嗨。", "Hi.")


def test_tinyshakespeare(public):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
    write(public / "tinyshakespeare" / "input.txt", text)
    rows = load_rows("tinyshakespeare", {}, roles=("text",)).rows
    assert [(row.id, row.values["text"]) for row in rows] == [
        ("input:1", "First Citizen:\nBefore we proceed any further, hear me speak."),
        ("input:2", "All:\nSpeak, speak."),
    ]


def test_chinese_poetry(public):
    poems = {
        "tang300": {
            "author": "陳子昂",
            "paragraphs": ["前不見古人。後不見來者。", "念天地之悠悠。"],
            "title": "登幽州臺歌",
        },
        "songci300": {"author": "黄孝迈", "paragraphs": ["近清明。"], "rhythmic": "湘春夜月", "tags": ["宋词三百首"]},
        "shijing": {"title": "关雎", "chapter": "国风", "section": "周南", "content": ["关关雎鸠。在河之洲。"]},
    }
    lyric = {
        "title": "河传·春暮",
        "rhythmic": "河传",
        "author": "李珣",
        "paragraphs": ["春暮。微雨。"],
        "notes": ["1."],
    }
    poems |= {f"huajianji-{number}-juan": lyric for number in [*range(1, 10), "x"]}
    for name, poem in poems.items():
        write(public / "chinese_poetry" / f"{name}.json", json.dumps([poem], ensure_ascii=False))
    rows = load_rows("chinese_poetry", {}, roles=("text",)).rows
    assert [row.id for row in rows] == [f"{name}:1" for name in poems]
    assert [dict(row.values) for row in rows[:4]] == [
        {"text": "前不見古人。後不見來者。\n念天地之悠悠。", "title": "登幽州臺歌", "author": "陳子昂"},
        {"text": "近清明。", "title": "湘春夜月", "author": "黄孝迈"},
        {"text": "关关雎鸠。在河之洲。", "title": "关雎", "author": None},
        {"text": "春暮。微雨。", "title": "河传·春暮", "author": "李珣"},
    ]
