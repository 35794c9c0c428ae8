"""Events and catalogues: from files to arrays, and what is said of files that are not as they should be."""

from __future__ import annotations

import json
from datetime import datetime

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from finetune.data import catalog
from finetune.data.interactions import load_interactions
from finetune.data.sources import load_rows
from finetune.errors import DataError
from finetune.recipe import ItemsSection

EVENTS = """\
user,item,time,stars
ben,b2,2024-05-02,4
ann,b1,2024-05-01T10:00:00,5
ann,b3,2024-05-01T09:00:00,0.5
ben,b1,2024-05-02,3
"""
ITEMS = """\
item,title,tags,kind,price
b1,The Quiet Harbour,sea;crime,novel,12.5
b2,Bread at Home,,cookery,
b3,,,,8
b9,Never Read,dust,novel,1
"""
SECTION = ItemsSection(file="items.csv", id="item", text=["title", "tags"], categorical=["kind"], numeric=["price"])


@pytest.fixture
def load(tmp_path):
    """Writes events, a catalogue or None, and loads them."""

    def load(events=EVENTS, items=ITEMS, section=SECTION, name="events.csv", **columns):
        write(tmp_path / name, events)
        if items is not None:
            write(tmp_path / (section.file or "items.csv"), items)
        return load_interactions(name, columns, section if items is not None else None, tmp_path)

    return load


@pytest.fixture
def refuse(load):
    def refuse(words, *args, **keys):
        with pytest.raises(DataError) as caught:
            load(*args, **keys)
        assert words in str(caught.value)

    return refuse


def write(path, content):
    if isinstance(content, dict):
        pyarrow.parquet.write_table(pyarrow.table(content), path)
    else:
        path.write_text(content, encoding="utf-8")


def list_events(loaded):
    """(user, item, time) by name, in order."""
    data = loaded.interactions
    rows = zip(data.user.tolist(), data.item.tolist(), data.time.tolist(), strict=True)
    return [(data.users[user], data.catalogue.ids[item], time) for user, item, time in rows]


def find(loaded, kind):
    [found] = [finding for finding in loaded.findings if finding.kind == kind]
    assert found.split == "all"
    return found


MAY_1 = 1714521600
EXPECTED = [
    ("ann", "b3", MAY_1 + 9 * 3600),
    ("ann", "b1", MAY_1 + 10 * 3600),
    ("ben", "b2", MAY_1 + 86400),  # before b1, as in the file
    ("ben", "b1", MAY_1 + 86400),
]


def test_events_are_sorted_by_person_time_and_order_in_the_file(load):
    loaded = load()
    assert list_events(loaded) == EXPECTED
    data = loaded.interactions
    assert [array.dtype for array in (data.user, data.item, data.time)] == [np.int64] * 3
    assert (loaded.name, loaded.origin, loaded.card) == ("events", "events.csv", None)
    assert loaded.columns == {"user": "user", "item": "item", "time": "time"}


def test_catalogue_keeps_its_order_and_items_without_events(load):
    known = load().interactions.catalogue
    assert known.ids == ("b1", "b2", "b3", "b9")
    assert known.texts == ("The Quiet Harbour. sea;crime", "Bread at Home", "", "Never Read. dust")
    assert known.columns == {"kind": ("novel", "cookery", None, "novel"), "price": (12.5, None, 8.0, 1.0)}
    assert known.numbers == {"b1": 0, "b2": 1, "b3": 2, "b9": 3}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".tsv"])
def test_formats_give_the_same_events(load, ending):
    expected = load()
    head, *lines = [line.split(",") for line in EVENTS.splitlines()]
    columns = {name: list(values) for name, values in zip(head, zip(*lines, strict=True), strict=True)}
    columns["stars"] = list(map(float, columns["stars"]))
    if ending == ".parquet":
        columns["time"] = list(map(datetime.fromisoformat, columns["time"]))
        columns["item"] = pyarrow.array(columns["item"]).dictionary_encode()
        columns["user"] = pyarrow.array(columns["user"], pyarrow.large_string())
        events = columns
    elif ending == ".jsonl":
        rows = (dict(zip(head, row, strict=True)) for row in zip(*columns.values(), strict=True))
        events = "\n".join(map(json.dumps, rows))
    else:
        events = EVENTS.replace(",", "\t")
    loaded = load(events, name=f"other{ending}")
    assert list_events(loaded) == EXPECTED
    assert loaded.fingerprint == expected.fingerprint


def test_fingerprint_is_of_what_the_data_says(load):
    first = load().fingerprint
    swapped = EVENTS.splitlines()
    swapped[2:4] = swapped[3:1:-1]
    assert load("\n".join(swapped)).fingerprint == first
    assert load(EVENTS.replace("b3,2024", "b2,2024")).fingerprint != first
    assert load(EVENTS.replace(",0.5", ",0.6")).fingerprint == first
    # Of an earlier version, for the same events.
    assert first == "0e25703a12d7781f8c67857f9d0c5d3fd54eee1ca6870655920b51b58088a5e7"
    assert load(items=ITEMS.replace("Quiet", "Loud")).fingerprint != first
    assert load(items=ITEMS.replace("12.5", "12.6")).fingerprint != first


def test_repeated_events_are_dropped_and_counted(load):
    loaded = load(EVENTS + "ben,b2,2024-05-02,1\nben,b2,2024-05-03,1\nben,b2,2024-05-02,2\n")
    assert list_events(loaded) == [*EXPECTED, ("ben", "b2", MAY_1 + 2 * 86400)]
    found = find(loaded, "repeated_event")
    assert (found.count, found.message) == (2, "2 of 7 events repeat person, item and time of one before: dropped.")


# Weights


def test_weights_are_read_where_their_column_is_named_and_nowhere_else(load):
    loaded = load(weight="stars")
    assert list_events(loaded) == EXPECTED
    assert loaded.interactions.weight.tolist() == [0.5, 5, 4, 3]
    assert loaded.columns == {"user": "user", "item": "item", "time": "time", "weight": "stars"}
    plain = load(EVENTS.replace("stars", "weight"))
    assert plain.interactions.weight is None, "a column of that name alone says nothing"
    assert plain.fingerprint == load().fingerprint != loaded.fingerprint
    assert load(EVENTS.replace(",0.5", ",0.6"), weight="stars").fingerprint != loaded.fingerprint


def test_of_repeated_events_the_heaviest_stays(load):
    loaded = load(EVENTS + "ben,b2,2024-05-02,1\nben,b1,2024-05-02,9\n", weight="stars")
    assert sorted(list_events(loaded)) == sorted(EXPECTED)
    data = loaded.interactions
    ben = data.user == data.users.index("ben")
    weights = {data.catalogue.ids[item]: weight for item, weight in zip(data.item[ben], data.weight[ben], strict=True)}
    assert weights == {"b2": 4, "b1": 9}
    assert find(loaded, "repeated_event").count == 2


@pytest.mark.parametrize(
    ("stars", "words"),
    [
        ("many", "must be a number, got 'many'. Correct it."),
        ("inf", "must be a finite number, got inf. Correct it."),
        ("0", "must be a weight above 0, got 0 (in 1 row). Correct or remove these rows, or leave columns.weight out."),
        ("-2", "must be a weight above 0, got -2 (in 1 row)."),
        ("nan", "must be a weight above 0, got 'nan' (in 1 row)."),
        ("", "must be a weight above 0, got nothing (in 1 row)."),
    ],
)
def test_weight_that_is_no_number_above_zero_is_refused(refuse, load, stars, words):
    broken = EVENTS.replace(",0.5", f",{stars}")
    refuse(f"events.csv: column 'stars': row 3: {words}", broken, weight="stars")
    assert load(broken).interactions.weight is None


def test_column_of_weights_that_is_not_there(refuse):
    there = "got columns user, item, time, stars."
    words = f"column 'star' must exist, {there} Did you mean 'stars'? Set columns.weight to the right one."
    refuse(words, weight="star")


# Catalogues


def test_items_that_the_catalogue_lacks_are_kept_without_text(load):
    loaded = load(EVENTS + "cem,zz,2024-05-02,4\ncem,aa,2024-05-02,4\ncem,aa,2024-05-03,4\n")
    known = loaded.interactions.catalogue
    assert known.ids[4:] == ("aa", "zz")
    assert known.texts[4:] == ("", "")
    assert known.columns["price"][4:] == (None, None)
    assert [event[1] for event in list_events(loaded) if event[0] == "cem"] == ["zz", "aa", "aa"]
    found = find(loaded, "unknown_item")
    assert found.message == "2 of 5 items of the events are not in the catalogue: they have no text."
    assert (found.count, found.severity, found.rows) == (2, "warning", ("aa", "zz"))


def test_catalogue_without_any_item_of_the_events_is_refused(refuse):
    refuse(
        "events.csv: events must name items of the catalogue, got only others, such as 'b1' where the "
        "catalogue has 'x1'. Set items.id.",
        items=ITEMS.replace("b", "x"),
    )


def test_items_without_text_are_counted(load):
    found = find(load(), "item_without_text")
    assert (found.count, found.rows) == (1, ("b3",))
    assert found.message == "1 of 4 items have no text in title, tags."


@pytest.mark.parametrize(
    "events",
    [
        {"user": [7.0, 8.0], "item": [1, 2], "time": [1, 2]},
        {"user": [7, 8], "item": [1.0, 2.0], "time": [1, 2]},
        {"user": ["7", "8.0"], "item": ["1.0", " 2 "], "time": [1, 2]},
    ],
)
@pytest.mark.parametrize(
    "items", [{"item": [1, 2]}, {"item": ["1", "2"]}, {"item": [1.0, 2.0]}, {"item": ["1.0", "2"]}]
)
def test_ids_are_joined_however_they_are_written(load, events, items):
    loaded = load(events, items, ItemsSection(file="items.parquet"), "events.parquet")
    assert loaded.interactions.catalogue.ids == ("1", "2")
    assert loaded.interactions.users == ("7", "8")
    kinds = ["text" if isinstance(table["item"][0], str) else "numbers" for table in (events, items)]
    if kinds[0] != kinds[1]:
        message = f"ids of items are {kinds[0]} in the events and {kinds[1]} in the catalogue; joined as text."
        assert find(loaded, "id_types").message == message
    else:
        assert not loaded.findings


def test_ids_that_are_no_whole_numbers_stay_as_they_are(load):
    ids = ["007", "7", "1.50", "1.0.0", "-3.0", "2.", ".0"]
    loaded = load({"user": ids, "item": ids, "time": list(range(len(ids)))}, None, name="events.parquet")
    assert loaded.interactions.users == tuple(sorted(["007", "7", "1.50", "1.0.0", "-3", "2", ".0"]))
    large = {"user": [4e15 + 1, 3.0], "item": [1, 2], "time": [1, 2]}  # not 4.000000000000001e+15
    assert load(large, None, name="large.parquet").interactions.users == ("3", "4000000000000001")
    halves = {"user": [1.5, 2.0], "item": [2.0**60, 0.5], "time": [1, 2]}
    assert load(halves, None, name="halves.parquet").interactions.users == ("1.5", "2")


def test_mixed_times_are_a_warning_with_counts(load):
    found = find(load(), "mixed_times")
    assert found.message == (
        "times come in 2 forms, 2 ISO dates, 2 ISO times without a zone; times without a zone are read as UTC."
    )
    assert found.severity == "warning"


def test_ambiguous_times_are_refused(refuse):
    refuse(
        "events.csv: column 'time': row 1: must be a time (2 rows are not)", EVENTS.replace("2024-05-02", "02/05/24")
    )


@pytest.mark.parametrize(("role", "old", "what"), [("user", "ann", "an id"), ("item", "b3", "an id")])
def test_event_without_person_or_item_is_refused(refuse, role, old, what):
    rows = "2 rows" if role == "user" else "1 row"
    row = 2 if role == "user" else 3
    refuse(
        f"events.csv: column '{role}': row {row}: must hold {what}, got nothing (in {rows}). Fill in or remove these "
        "rows.",
        EVENTS.replace(old, " "),
    )


def test_event_without_time_is_refused(refuse):
    words = "column 'time': row 2: must hold a time, got nothing (in 1 row)."
    refuse(words, EVENTS.replace("2024-05-01T10:00:00", ""))
    refuse(words, {"user": [1, 1], "item": [1, 2], "time": [5, None]}, None, name="events.parquet")
    refuse(
        "column 'user': row 2: must hold an id",
        {"user": [1, np.nan], "item": [1, 2], "time": [5, 6]},
        None,
        name="events.parquet",
    )
    refuse(
        "column 'user': row 1: must hold an id, got nothing (in 2 rows)",
        '{"user": null, "item": 1, "time": 3}\n{"item": 1, "time": 3}',
        None,
        name="events.jsonl",
    )


def test_ids_of_mixed_types_in_jsonl_are_text(load):
    events = '{"user": 1, "item": "b1", "time": 3}\n{"user": "1", "item": 2, "time": 4}'
    loaded = load(events, None, name="events.jsonl")
    assert list_events(loaded) == [("1", "b1", 3), ("1", "2", 4)]


def test_column_that_is_not_there(refuse):
    there = "got columns user, item, time, stars."
    refuse(f"events.csv: column 'usr' must exist, {there} Did you mean 'user'? Set columns.user", user="usr")
    refuse(f"events.csv: column 'rating' must exist, {there} Set columns.time to the right one.", time="rating")
    refuse("events.csv: items: column 'sku' must exist", section=SECTION.model_copy(update={"id": "sku"}))
    section = SECTION.model_copy(update={"numeric": ["prize"]})
    refuse(
        "column 'prize' must exist, got columns item, title, tags, kind, price. Did you mean 'price'? Set "
        "items.numeric to the right one.",
        section=section,
    )


def test_item_twice_in_the_catalogue_is_refused(refuse):
    refuse(
        "events.csv: items: column 'item': must name each item once, got 'b1' in rows 1 and 5. Remove one of them.",
        items=ITEMS + "b1,Another,,,\n",
    )


def test_number_in_the_catalogue_that_is_none(refuse):
    where = "events.csv: items: column 'price': row 3: "
    refuse(where + "must be a number, got '8 EUR'. Correct it.", items=ITEMS.replace(",8\n", ",8 EUR\n"))
    refuse(where + "must be a finite number, got inf. Correct it.", items=ITEMS.replace(",8\n", ",inf\n"))


def test_text_in_the_catalogue_that_is_none_or_too_long(refuse):
    refuse(
        "column 'title': must have at most 100,000 characters, got 100,001.",
        items=ITEMS.replace("Never Read", "x" * 100_001),
    )
    refuse(
        "column 'title': must hold text, got list<",
        items={"item": ["b1"], "title": [["a"]]},
        section=ItemsSection(file="items.parquet", text=["title"]),
    )


def test_ids_that_are_none(refuse):
    events = {"user": [True, False], "item": [1, 2], "time": [5, 6]}
    refuse("column 'user': must hold ids, which are text or numbers, got bool.", events, None, name="events.parquet")


def test_file_that_is_empty_missing_or_of_another_kind(refuse, tmp_path):
    refuse("events.csv: must hold rows, is empty.", " \n")
    refuse("events.csv: must hold rows, got only the header user, item, time.", "user,item,time\n")
    refuse("events.txt: must be CSV, TSV, JSONL or Parquet, which have columns, got plain text.", name="events.txt")
    for reference, got in (("hub:a/b@c", "'hub:a/b@c'"), (str(tmp_path), f"{str(tmp_path)!r}, a folder")):
        with pytest.raises(DataError) as caught:
            load_interactions(reference, {})
        assert str(caught.value) == f"data: must be a card or a file of events, got {got}. Name the file."
    write(tmp_path / "events.csv", EVENTS)
    with pytest.raises(DataError, match=r"gone\.csv: must be a file, got nothing there"):
        load_interactions(str(tmp_path / "events.csv"), {}, ItemsSection(file="gone.csv"))


def test_csv_with_quotes_line_ends_and_a_byte_order_mark(load):
    items = '\ufeffitem,title\r\nb1,"A ""quiet"" harbour,\nby night"\r\nb2,NA\r\n\r\nb3,null\r\n'
    known = load(items=items, section=ItemsSection(file="items.csv", text=["title"])).interactions.catalogue
    assert known.ids == ("b1", "b2", "b3")
    assert known.texts == ('A "quiet" harbour,\nby night', "NA", "null")


def test_without_a_catalogue_an_item_is_what_its_first_event_says(load, tmp_path):
    events = {
        "user": ["a", "b", "a", "b"],
        "item": ["x", "x", "w", "x"],
        "time": [30, 10, 20, 10],
        "name": ["later", "first", "", "as early"],
        "price": [9.0, 2.0, None, 3.0],
    }
    write(tmp_path / "events.parquet", events)
    section = ItemsSection(text=["name"], numeric=["price"])
    loaded = load_interactions("events.parquet", {}, section, tmp_path)
    known = loaded.interactions.catalogue
    assert (known.ids, known.texts) == (("w", "x"), ("", "first"))
    assert known.columns == {"price": (None, 2.0)}
    assert list_events(loaded)[1] == ("a", "x", 30)


def test_history_of_100_000_events(load):
    count = 100_000
    order = np.random.default_rng(3).permutation(count)
    events = {"user": ["a"] * count, "item": order % 500, "time": order}
    data = load(events, None, name="events.parquet").interactions
    assert np.array_equal(data.time, np.arange(count))
    assert [data.catalogue.ids[item] for item in data.item[:3]] == ["0", "1", "2"]


# Cards


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Writes the card `tiny`, whose folder it returns."""
    monkeypatch.setattr(catalog, "shipped_folder", lambda _kind: tmp_path / "shipped")
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "shipped" / "catalog").mkdir(parents=True)

    def write(text):
        path = tmp_path / "shipped" / "catalog" / "tiny.yaml"
        path.write_text(f"name: tiny\ntitle: Tiny\nlicence: MIT\n{text}\n", encoding="utf-8")
        return tmp_path / "data" / "tiny"

    return write


FILMS = """
files: {all: ratings.csv}
format: movielens
roles: {user: userId, item: movieId, time: timestamp}
items: {file: movies.csv, id: movieId, text: [title, genres], categorical: [genres], numeric: [year]}
rows: {all: 3}
"""


def test_movielens(card):
    folder = card(FILMS)
    write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n10,1,4.0,964982703\n9,3,0.5,964981247\n")
    films = "movieId,title,genres\n1,Dawn (1995),Drama|War\n"
    films += '2,"Two, The (1990\u20131999) ",(no genres listed)\n3,None,Comedy\n'
    write(folder / "movies.csv", films)
    loaded = load_interactions("tiny", {})
    assert list_events(loaded) == [("10", "1", 964982703), ("9", "3", 964981247)]
    known = loaded.interactions.catalogue
    assert known.texts == ("Dawn (1995). Drama, War", "Two, The (1990\u20131999)", "None. Comedy")
    assert known.columns == {"genres": ("Drama, War", None, "Comedy"), "year": (1995.0, 1990.0, None)}
    assert loaded.card is not None
    assert loaded.origin == "folder $FINETUNE_DATA/tiny"
    assert find(loaded, "row_count").message == "all: the card says 3 rows, got 2."
    # A recipe changes what it names, and keeps the rest of the card's catalogue.
    changed = load_interactions("tiny", {"user": "movieId"}, ItemsSection(text=["title"])).interactions
    assert changed.users == ("1", "3")
    assert changed.catalogue.texts[0] == "Dawn (1995)"
    assert set(changed.catalogue.columns) == {"genres", "year"}
    write(folder / "movies.csv", "movieId,title\n1,a\n")
    with pytest.raises(DataError, match=r"movies\.csv: must have the column 'genres', got movieId, title\."):
        load_interactions("tiny", {})


RETAIL = """
files: {all: [first.parquet, second.parquet]}
format: online_retail
roles: {user: CustomerID, item: StockCode, time: InvoiceDate}
items: {text: [Description], numeric: [UnitPrice]}
"""


def test_online_retail(card):
    folder = card(RETAIL)
    table = {
        "InvoiceNo": ["536365", "536366", "C536367", "536368", "536369"],
        "StockCode": ["A", "A", "A", "B", "B"],
        "Description": ["LAMP", "LAMP AGAIN", "LAMP", "LOST", "BOX"],
        "Quantity": [6, 1, 2, -3, 1],
        "InvoiceDate": [f"2010-12-0{day} 08:26:00" for day in range(1, 6)],
        "UnitPrice": [2.5, 3.5, 9.0, 9.0, 1.0],
        "CustomerID": [17850.0, 5.0, 17850.0, 5.0, None],
    }
    write(folder / "first.parquet", table)
    write(folder / "second.parquet", table | {"CustomerID": [None, None, None, None, 6.0]})
    loaded = load_interactions("tiny", {})
    day = 1291191960
    assert [event[:3] for event in list_events(loaded)] == [
        ("17850", "A", day),
        ("5", "A", day + 86400),
        ("6", "B", day + 4 * 86400),
    ]
    assert loaded.interactions.catalogue.texts == ("LAMP", "BOX")
    assert loaded.interactions.catalogue.columns == {"UnitPrice": (2.5, 1.0)}
    found = find(loaded, "no_purchase")
    assert found.message == "7 of 10 rows are no purchases of a known customer: left out."
    for name in ("first", "second"):
        write(folder / f"{name}.parquet", table | {"Quantity": [0] * 5})
    with pytest.raises(DataError, match=r"tiny: must hold purchases of customers, got none in 10 rows\."):
        load_interactions("tiny", {})
    for name in ("first", "second"):
        write(folder / f"{name}.parquet", {"CustomerID": [1.0], "Quantity": [1]})
    with pytest.raises(DataError, match=r"tiny: must have the column 'InvoiceNo', got CustomerID, Quantity\."):
        load_interactions("tiny", {})


def test_card_whose_events_are_split_or_not_at_hand(card, monkeypatch):
    folder = card(FILMS.replace("all: ratings.csv", "train: a.csv, test: b.csv"))
    write(folder / "a.csv", EVENTS)
    with pytest.raises(
        DataError, match=r"tiny: files must be `all`, as events are split by their times, got train, test\."
    ):
        load_interactions("tiny", {})
    card(FILMS)
    with pytest.raises(DataError, match=r"tiny: ratings\.csv must lie in .*, got nothing there\. Get the whole"):
        load_interactions("tiny", {})
    monkeypatch.delenv("FINETUNE_DATA")
    with pytest.raises(
        DataError,
        match=r"tiny: its events must lie in a folder, got none\. Set FINETUNE_DATA to a folder that holds tiny/\.",
    ):
        load_interactions("tiny", {})


def test_rows_of_a_card_of_events_can_be_read_as_rows(card):
    folder = card(FILMS)
    write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n1,1,4.0,964982703\n")
    rows = load_rows("tiny", {}, roles=("user", "item")).rows
    assert rows[0].values == {"user": "1", "item": "1", "rating": "4.0", "timestamp": "964982703"}
