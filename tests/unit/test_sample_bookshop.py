"""The sample set of the recommender: what its card promises of the books, the people and the generator."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta

import pytest

from finetune.data.cleaning import normalize_for_duplicates
from finetune.recipe.shipped import shipped_folder

FOLDER = shipped_folder("data") / "samples" / "bookshop"
WEIGHTS = {"view": "1", "basket": "2", "buy": "4"}
START, END = datetime(2025, 1, 6, tzinfo=UTC), datetime(2025, 11, 2, tzinfo=UTC)


def read_table(name):
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def books():
    return read_table("items.csv")


@pytest.fixture(scope="module")
def events():
    return read_table("events.csv")


def test_the_script_writes_the_file_that_lies_beside_it(tmp_path):
    for name in ("write.py", "items.csv"):
        shutil.copy(FOLDER / name, tmp_path)
    subprocess.run([sys.executable, tmp_path / "write.py"], check=True)
    assert (tmp_path / "events.csv").read_bytes() == (FOLDER / "events.csv").read_bytes()


def test_every_book_has_a_text_of_its_own(books):
    assert list(books[0]) == ["item", "title", "description", "tags", "category", "price"]
    assert [book["item"] for book in books] == [f"B{number:04d}" for number in range(1, len(books) + 1)]
    for column in ("title", "description"):
        assert len({normalize_for_duplicates(book[column]) for book in books}) == len(books) >= 220
    for book in books:
        assert all(value.isascii() and value == value.strip() for value in book.values())
        assert 12 <= len(book["description"].split()) <= 50
        assert 2 <= len(set(book["tags"].split("; "))) <= 4
        assert 3 <= float(book["price"]) <= 60
    assert min(Counter(book["category"] for book in books).values()) >= 12


def test_no_description_follows_a_template(books):
    """No run of five words is in two descriptions."""
    runs = Counter()
    for book in books:
        words = re.findall(r"[a-z']+", book["description"].lower())
        runs.update({tuple(words[start : start + 5]) for start in range(len(words) - 4)})
    assert [run for run, count in runs.items() if count > 1] == []


def test_series_are_numbered_in_the_order_of_the_file(books):
    """The generator reads the order in which books follow each other from there."""
    volumes = defaultdict(list)
    for place, book in enumerate(books):
        if match := re.fullmatch(r".+ \((.+) (\d)\)", book["title"]):
            volumes[match[1], book["tags"].split("; ")[0]].append((int(match[2]), place))
    assert len(volumes) == 13
    for numbers in volumes.values():
        assert numbers == [(number, numbers[0][1] + number - 1) for number in range(1, len(numbers) + 1)]


def test_people_differ_and_so_do_their_actions(books, events):
    times = [datetime.fromisoformat(event["time"]) for event in events]
    assert times == sorted(times)
    assert START <= times[0] < times[-1] < END
    assert {event["item"] for event in events} == {book["item"] for book in books}
    assert {(event["action"], event["weight"]) for event in events} == set(WEIGHTS.items())
    counts = sorted(Counter(event["user"] for event in events).values())
    assert len(counts) == 400
    assert counts[9] <= 2 < counts[50]
    assert counts[-1] >= 150


def test_twenty_books_come_out_in_the_last_fifth(events):
    """By the period and by the number of events: these are the two ways to cut."""
    times = [datetime.fromisoformat(event["time"]) for event in events]
    for cut in (START + timedelta(days=240), times[int(0.8 * len(times))]):
        before = {event["item"] for event, time in zip(events, times, strict=True) if time < cut}
        after = Counter(event["item"] for event, time in zip(events, times, strict=True) if time >= cut)
        cold = {item: count for item, count in after.items() if item not in before}
        assert len(cold) == 20
        assert sum(cold.values()) >= 100


def test_what_comes_after_what_has_a_direction(books, events):
    """A next volume follows the one before it many times more often than it comes before it."""
    place = {book["item"]: number for number, book in enumerate(books)}
    series = {book["item"]: book["title"].endswith(")") and book["tags"].split("; ")[0] for book in books}
    steps = Counter()
    last = {}
    for event in events:
        before = last.get(event["user"])
        if before and series[before] and series[before] == series[event["item"]]:
            steps[place[event["item"]] - place[before]] += 1
        last[event["user"]] = event["item"]
    assert steps[1] > 10 * steps[-1]
    assert steps[1] > 800
