"""`finetune recommend`: words for people, JSON for programs, files of people, errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from finetune import runner
from finetune.applications.recommender import Recommender, load_recommender
from finetune.applications.recommender import load as load_module
from finetune.applications.recommender import rank_file as file_module
from finetune.errors import Interrupted

HISTORY = ["B0001", "B0002", "B0108"]


@pytest.fixture(scope="module")
def recommender(shop_run: Path) -> Recommender:
    return load_recommender(shop_run)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Four people: known, unknown to everybody, with a stray id, and nameless."""
    rows = [
        {"user": "ann", "history": HISTORY},
        {"user": 2, "history": []},
        {"user": "bob", "history": ["B0150", "stray", 17]},
        {"history": ["B0150"]},
    ]
    path = tmp_path / "people.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_json_of_one_person(command, shop_run, recommender):
    done = command("recommend", shop_run, "--history", "B0001, B0002 ,B0108,stray", "--top", 4, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found == recommender.recommend([*HISTORY, "stray"], 4).to_json()
    assert set(found) == {"items", "known", "skipped", "unknown", "fallback"}
    assert (len(found["items"]), found["known"], found["skipped"], found["unknown"]) == (4, 3, 1, ["stray"])
    assert set(found["items"][0]) == {"id", "text", "score", "by", "why", "because", "features"}
    assert all(set(one) == {"id", "text", "through"} for item in found["items"] for one in item["because"])


def test_words_for_people(command, shop_run, recommender, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    done = command("recommend", shop_run, "--history", "B0001,B0002,stray", "--top", 3)
    assert done.code == 0
    for item in recommender.recommend(["B0001", "B0002"], 3).items:
        (line,) = [line for line in done.out.splitlines() if line.startswith(item.id)]
        assert item.text.partition(". ")[0] in line
        assert f"{item.score:.3f}" in line
        assert item.why in line
    assert "1 of 3 events name no item of the catalogue: skipped (stray)." in done.err
    done = command("recommend", shop_run, "--history", "")
    assert "Nothing is known of this person: these items were popular" in done.err
    assert done.out.count("popular in the last 7 days") == 10
    assert "No item meets the conditions." in command("recommend", shop_run, "--history", "", "--filter", "price<0").out


def test_options_reach_the_list(command, shop_run, recommender, tmp_path):
    new = tmp_path / "new.csv"
    new.write_text("item,title,description,tags,category,price\nN1,A Bell,,,Crime,0.5\n")
    options = ["--include-seen", "--filter", "price < 8", "--filter", "category != Crime", "--diversity", 0.4]
    done = command("recommend", shop_run, "--history", "B0001,B0002,B0108", *options, "--json")
    wish = {"exclude_seen": False, "filters": ["price < 8", "category != Crime"], "diversity": 0.4}
    assert json.loads(done.out) == recommender.recommend(HISTORY, **wish).to_json()
    done = command("recommend", shop_run, "--history", "B0001", "--items", new, "--filter", "price < 1", "--json")
    assert [item["id"] for item in json.loads(done.out)["items"]] == ["N1"]


def test_a_person_of_the_events(command, shop_run, recommender, tmp_path):
    found = json.loads(command("recommend", shop_run, "--user", "P001", "--json").out)
    assert found["user"] == "P001"
    assert found["known"] > 0
    events = tmp_path / "events.csv"
    events.write_text("user,item,time\n7,B0002,2025-01-02\n7,B0001,2025-01-01\n")
    found = json.loads(command("recommend", shop_run, "--user", "7", "--events", events, "--json").out)
    assert found == {"user": "7"} | recommender.recommend(["B0001", "B0002"]).to_json()


def test_files_hold_what_each_person_is_told(command, shop_run, recommender, people, tmp_path, monkeypatch):
    monkeypatch.setattr(file_module, "PEOPLE", 3)  # two chunks
    expected = recommender.recommend_many([HISTORY, [], ["B0150", "stray", 17], ["B0150"]], 5)
    output = tmp_path / "out" / "ranked.jsonl"
    done = command("recommend", shop_run, "--input", people, "--output", output, "--top", 5)
    assert done.out.splitlines()[-1].endswith("ranked.jsonl: the lists of 4 people written.")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.pop("user") for row in rows] == ["ann", 2, "bob", None]
    for row, found in zip(rows, expected, strict=True):
        assert [item["id"] for item in row["items"]] == [item.id for item in found.items]
        assert (row["known"], row["skipped"], row["fallback"]) == (found.known, found.skipped, found.fallback)
    output = output.with_suffix(".parquet")
    done = command("recommend", shop_run, "--input", people, "--output", output, "--top", 5, "--json")
    assert json.loads(done.out) == {"output": str(output), "people": 4}
    table = pyarrow.parquet.read_table(output)
    assert table["user"].to_pylist() == ["ann", "2", "bob", None]
    assert table["items"].to_pylist() == [[item.id for item in found.items] for found in expected]
    assert table["why"].to_pylist() == [[item.why for item in found.items] for found in expected]
    assert table["skipped"].to_pylist() == [0, 0, 2, 0]
    assert table["fallback"].to_pylist() == [None, "popular_week", None, None]
    assert sorted(path.name for path in output.parent.iterdir()) == ["ranked.jsonl", "ranked.parquet"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", 'line 2: must be a JSON object such as {"user": "P1", "history": ["B1", "B2"]}, got'),
        ("[]", "line 2: must be a JSON object with a list `history`, such as"),
        ('{"user": "x", "history": "B1"}', "line 2: must be a JSON object with a list `history`, such as"),
        ('{"history": [["B1"]]}', "line 2: history must hold ids, which are text or numbers, got"),
    ],
)
def test_a_line_that_is_no_person(command, shop_run, tmp_path, monkeypatch, line, words):
    monkeypatch.setattr(load_module, "load_recommender", None)  # whoever loads the model first fails with a bug's 70
    path, output = tmp_path / "people.jsonl", tmp_path / "ranked.jsonl"
    path.write_text('{"history": []}\n' + line + "\n")
    done = command("recommend", shop_run, "--input", path, "--output", output)
    assert done.code == 3
    assert words in done.err
    assert [one.name for one in tmp_path.iterdir()] == ["people.jsonl"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "recommend: must get one of --history, --user and --input, got none."),
        (["--history", "a", "--user", "b"], "must get one of --history, --user and --input, got --history, --user."),
        (["--history", "a", "--events", "b"], "--events: must come with --user, whose history it holds, got none."),
        (["--history", "a", "--output", "b"], "recommend: --output must come with --input, got none."),
        (["--input", "people.jsonl"], "recommend: --input must come with --output, got none. Add --output"),
        (["--input", "people.jsonl", "--output", "x.csv"], "x.csv: must end in .jsonl or .parquet, got '.csv'."),
        (["--input", "a.jsonl", "--output", "a.jsonl"], "a.jsonl: must be another file than the input, got the same."),
        (["--user", "nobody"], "--user: must be one of the 400 people of folder data/samples/bookshop, got 'nobody'."),
        (["--history", "a", "--top", "0"], "top: must be at least 1, got 0. Ask for 10 items, or any number from 1."),
        (
            ["--history", "a", "--diversity", "2"],
            "diversity: must lie in 0 to 1, got 2. 0 is the plain order, 1 what is least alike; try 0.3.",
        ),
        (["--history", "a", "--filter", "cost < 3"], "must name a declared column (category, price), got 'cost'."),
    ],
)
def test_commands_that_cannot_be_meant(command, shop_run, options, words):
    done = command("recommend", shop_run, *options)
    assert done.code == 2
    assert words in done.err


def test_a_run_and_its_scores_count_the_same_people(command, shop_run, tmp_path, monkeypatch):
    def stop(*_arguments, **_options):
        raise Interrupted("stopped here.")

    monkeypatch.setattr(runner, "train", stop)
    done = command("run", shop_run / "recipe.resolved.yaml", "--runs", tmp_path / "runs")
    assert done.code == 75
    people = int(re.search(r" validation, (\d+) test people from folder data/samples/bookshop\n", done.err)[1])
    monkeypatch.undo()
    done = command("evaluate", shutil.copytree(shop_run, tmp_path / "copy"))
    assert f"test: {people} requests of {people} people, 95% bootstrap intervals" in done.out
    assert f" on {people} requests of {people} people that it " in (shop_run / "evaluation/report.html").read_text()


def test_files_that_cannot_be_read(command, shop_run, tmp_path):
    for name, words in (
        ("people.csv", "must be people a line and end in .jsonl, got '.csv'."),
        ("no.jsonl", "nothing"),
    ):
        done = command("recommend", shop_run, "--input", tmp_path / name, "--output", tmp_path / "x.jsonl")
        assert done.code == 3
        assert words in done.err
