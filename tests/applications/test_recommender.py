"""The recommender: its lists are those that the run was judged by, with reasons, filters and new items."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from scipy import sparse

import finetune
from finetune.applications.recommender import Recommender, load_recommender
from finetune.applications.recommender.conditions import find_matching
from finetune.applications.recommender.histories import People, normalize_ids, read_histories
from finetune.applications.recommender.load import load_people
from finetune.applications.recommender.reasons import Reasons
from finetune.applications.recommender.recommender import choose_chunk, diversify
from finetune.applications.recommender.records import shorten
from finetune.artifact.run_folder import RunFolder
from finetune.data.interactions import Catalogue
from finetune.errors import FinetuneError, ResourceError, UsageError
from finetune.evaluation.recommending import find_first
from finetune.recipe import load_recipe
from finetune.tasks import people as people_module
from finetune.tasks.items import Counts
from finetune.tasks.ranker import multiply
from finetune.tasks.recommendation import Recommendation, compute_sequence_scores

ROOT = Path(__file__).resolve().parents[2]
HISTORY = ["B0001", "B0002", "B0108"]


@pytest.fixture(scope="module")
def recommender(shop_run: Path) -> Recommender:
    return load_recommender(shop_run)


@pytest.fixture(scope="module")
def judged(shop_run: Path) -> tuple[Recommendation, list[list[str]], list[dict[str, Any]]]:
    """The task with its events, the histories of the test's requests, and the rows that the run wrote of them."""
    recipe = load_recipe(RunFolder(shop_run).recipe)
    (section,) = recipe.tasks.values()
    _, task, _ = people_module.load_people(section, None, recipe.train.seed)
    assert task.record is not None
    asked = task.record.ask("test", exclude_seen=True)
    histories = [[task.catalogue.ids[item] for item in asked.histories.get(row)] for row in range(len(asked))]
    return task, histories, pyarrow.parquet.read_table(shop_run / "evaluation" / "predictions.parquet").to_pylist()


def list_ids(found: Any) -> list[str]:
    return [item.id for item in found.items]


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("The Bell Under the Ice. A mystery.", "The Bell Under the Ice"),
        ("Twelve Monkeys (a.k.a. 12 Monkeys) (1995). Mystery, Sci-Fi", "Twelve Monkeys (a.k.a. 12 Monkeys) (1995)"),
        ("Mr. Smith Goes Home (1939). Drama", "Mr. Smith Goes Home (1939)"),
        ("No end", "No end"),
        ("x" * 70, "x" * 57 + "..."),
    ],
)
def test_people_see_an_item_by_its_title(text, title):
    assert shorten(text) == title


# Lists


def test_lists_are_those_that_the_run_was_judged_by(recommender, judged):
    _, histories, rows = judged
    assert [len(history) for history in histories] == [row["history"] for row in rows]
    found = recommender.recommend_many(histories, explain=False)
    assert [list_ids(one) for one in found] == [row["prediction"] for row in rows]


def test_one_person_gets_what_the_same_person_gets_among_many(recommender, judged):
    histories = judged[1][::15]
    for history, one in zip(histories, recommender.recommend_many(histories), strict=True):
        alone = recommender.recommend(history)
        assert list_ids(alone) == list_ids(one)
        assert [item.score for item in alone.items] == pytest.approx([item.score for item in one.items], abs=1e-4)
        assert [item.why for item in alone.items] == [item.why for item in one.items]


def test_a_filter_is_the_full_ranking_without_what_fails_it(recommender):
    catalogue = recommender.task.catalogue
    every = recommender.recommend(HISTORY, len(catalogue.ids), explain=False)
    assert len(every.items) == len(catalogue.ids) - len(HISTORY)
    prices = dict(zip(catalogue.ids, catalogue.columns["price"], strict=True))
    kinds = dict(zip(catalogue.ids, catalogue.columns["category"], strict=True))
    found = recommender.recommend(HISTORY, 50, filters=["price < 10", "category in Crime, Romance"])
    wanted = [item for item in list_ids(every) if prices[item] < 10 and kinds[item] in ("Crime", "Romance")]
    assert 0 < len(wanted) < 50
    assert list_ids(found) == wanted


def test_behind_the_candidates_the_sequence_model_decides(recommender):
    every = recommender.recommend(HISTORY, 300)
    by = [item.by for item in every.items]
    assert by == sorted(by)
    for stage in set(by):
        scores = [item.score for item in every.items if item.by == stage]
        # Behind the candidates, scores that differ by less than float32 has at 1,000 are taken for equal.
        assert np.diff(scores).max() < 1e-4


def test_diversity(recommender):
    plain = list_ids(recommender.recommend(HISTORY))
    assert list_ids(recommender.recommend(HISTORY, diversity=0.0)) == plain
    mixed = list_ids(recommender.recommend(HISTORY, diversity=0.7))
    assert mixed[0] == plain[0]
    assert mixed != plain

    def compute_likeness(ids: list[str]) -> float:
        vectors = recommender._meaning[[recommender.task.catalogue.numbers[item] for item in ids]]
        return float(np.mean(vectors @ vectors.T))

    assert compute_likeness(mixed) < compute_likeness(plain)


def test_marginal_relevance_by_hand():
    # The second is a copy of the first; the fourth is unlike all.
    vectors = np.array([[1, 0, 0], [1, 0, 0], [0.8, 0.6, 0], [0, 0, 1]], np.float32)
    assert diversify(vectors, 4, 0.0).tolist() == [0, 1, 2, 3]
    # .5 x relevance - .5 x likeness: copy .5 x .75 - .5 < 0, third .25 - .4 < 0, fourth .125; then the third again.
    assert diversify(vectors, 3, 0.5).tolist() == [0, 3, 1]
    assert diversify(vectors, 3, 0.8).tolist() == [0, 3, 2]
    assert diversify(vectors[:0], 3, 0.5).tolist() == []


def test_seen_items_come_back_where_asked_for(recommender, judged):
    assert not set(list_ids(recommender.recommend(HISTORY, 300))) & set(HISTORY)
    found = recommender.recommend(HISTORY, 300, exclude_seen=False)
    assert set(list_ids(found)) == set(recommender.task.catalogue.ids)


def test_without_a_second_stage_the_sequence_model_ranks(recommender, judged):
    alone = replace(recommender, task=replace(recommender.task, rank=None), trees=None)
    found = alone.recommend(HISTORY, 5)
    histories = read_histories([HISTORY], alone.task.catalogue).histories
    scores = compute_sequence_scores(alone.model, histories, alone.max_length)[0]
    scores[histories.get(0)] = -np.inf
    order = np.argsort(-scores, kind="stable")[:5]
    assert list_ids(found) == [alone.task.catalogue.ids[item] for item in order]
    assert [item.score for item in found.items] == pytest.approx(scores[order].tolist(), abs=1e-5)
    assert {item.by for item in found.items} == {"sequence"}
    assert all(item.features == {} for item in found.items)
    assert all(set(one.through) == {"sequence"} for item in found.items for one in item.because)
    assert any(item.because for item in found.items)


@pytest.mark.parametrize("size", [3, 64, 700, 5000])
def test_the_first_of_many_are_those_of_a_stable_sort(size):
    generator = np.random.default_rng(size)
    many_ties = generator.integers(0, 40, size).astype(np.float32)
    few = generator.standard_normal(size).astype(np.float32)
    few[generator.random(size) < 0.5] = -np.inf
    alone = np.full(size, -np.inf, np.float32)
    alone[size // 2] = 1
    for scores in (many_ties, few, alone):
        for count in (1, 10, 100):
            order = np.argsort(-scores, kind="stable")
            assert find_first(scores, count).tolist() == order[scores[order] > -np.inf][:count].tolist()


def test_chunks_stay_small():
    assert choose_chunk(100) == 128
    assert choose_chunk(100_000) == 32
    assert choose_chunk(10**9) == 1


@pytest.mark.parametrize("count", [1, 3, 8, 9, 30])
def test_products_with_texts_are_the_matrix_product(count):
    generator = np.random.default_rng(3)
    means, texts = (generator.standard_normal((size, 24), np.float32) for size in (count, 1300))
    found = multiply(means, texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, means.astype(float) @ texts.astype(float).T, atol=2e-5)


def test_features_do_not_depend_on_who_else_is_asked_for(recommender, judged):
    ranker, task = recommender._ranker, recommender.task
    histories = read_histories(judged[1][:12], task.catalogue).histories
    sequence = compute_sequence_scores(recommender.model, histories, recommender.max_length)
    together = ranker.build_table(histories, sequence)
    parts = [ranker.build_table(histories.take(slice(row, row + 1)), sequence[row : row + 1]) for row in range(12)]
    assert np.concatenate([part.item for part in parts]).tolist() == together.item.tolist()
    np.testing.assert_allclose(np.concatenate([part.values for part in parts]), together.values, atol=1e-6)


def test_events_as_another_set_are_scored_as_the_run_was(shop_run, tmp_path):
    run = Path(shutil.copytree(shop_run, tmp_path / "runs" / "shop" / shop_run.name))
    expected = json.loads((run / "evaluation" / "test.json").read_text())
    card, *lines = (ROOT / "data" / "samples" / "bookshop" / "events.csv").read_text().splitlines()
    path = tmp_path / "late.csv"  # no catalogue lies beside it
    path.write_text("\n".join([card, "P001,no such book,2025-01-07T07:13:00Z,view,1", *lines]) + "\n")
    for data, name, unknown in (("bookshop", "bookshop", 0), (str(path), "late", 1)):
        found = finetune.evaluate(run, data)
        of_set = {name: found.pop(name) for name in ("split", "data", "findings")}
        assert found == {key: value for key, value in expected.items() if key not in ("split", "opened")}
        assert of_set["split"] == name
        assert [finding["count"] for finding in of_set["findings"] if finding["kind"] == "unknown_item"] == [
            1
        ] * unknown
        assert json.loads((run / "evaluation" / f"{name}.json").read_text())["metrics"] == expected["metrics"]
    assert json.loads((run / "evaluation" / "test.json").read_text()) == expected
    few = tmp_path / "few.csv"
    few.write_text("\n".join([card, *(line for line in lines if line < "P2")]) + "\n")
    assert finetune.evaluate(run, str(few))["rows"] < expected["rows"]


# Histories


def test_nothing_known_gives_what_was_popular_in_the_last_week(recommender, judged):
    record = judged[0].record
    events = record.list_known("test")
    week = np.bincount(events.item[events.time >= events.now - 7 * 86_400], minlength=events.items)
    order = np.lexsort((-np.bincount(events.item, minlength=events.items), -week))[:10]
    for history in ([], ["no such book", ""], [None]):
        found = recommender.recommend(history)
        assert list_ids(found) == [judged[0].catalogue.ids[item] for item in order]
        assert found.fallback == "popular_week"
        assert found.items[0].score == pytest.approx(week.max(), abs=0.01)
        assert {item.why for item in found.items} == {"popular in the last 7 days"}
        assert found.notes[-1] == (
            "Nothing is known of this person: these items were popular in the last 7 days of the events."
        )


def test_unknown_items_are_skipped_and_counted(recommender):
    found = recommender.recommend(["x", *HISTORY, "x", "y"])
    assert (found.known, found.skipped, found.unknown, found.fallback) == (3, 3, ("x", "y"), None)
    assert list_ids(found) == list_ids(recommender.recommend(HISTORY))
    assert found.notes == ["3 of 6 events name no item of the catalogue: skipped (x, y, ...)."]


def test_an_id_is_the_same_as_number_and_text():
    assert normalize_ids([1, 1.0, "1", " 1.0 ", np.int64(1), np.float64(1)]) == ["1"] * 6
    assert normalize_ids([None, float("nan"), "", "B1", 1.5, 2**60]) == ["", "", "", "B1", "1.5", str(2**60)]
    assert normalize_ids([]) == []
    read = read_histories([[1, "9"], [], ["2.0", 1.0]], Catalogue(("1", "2"), ("", ""), {}))
    assert [read.histories.get(row).tolist() for row in range(3)] == [[0], [], [1, 0]]
    assert read.given.tolist() == [2, 0, 2]
    assert read.unknown == [("9",), (), ()]


def test_a_long_history_counts_by_its_newest_events(recommender):
    old, new = ["B0150", "B0151"] * 50_000, HISTORY * 20
    found = recommender.recommend([*old, *new], 5)
    assert found.known == 100_060
    numbers = {one.id for item in found.items for one in item.because}
    assert numbers <= set(HISTORY)


def test_people_of_the_events(shop_run, judged, tmp_path):
    people = load_people(shop_run)
    log = judged[0].record.interactions
    number = log.users.index("P001")
    assert people.find("P001") == [log.catalogue.ids[item] for item in log.item[log.user == number]]
    path = tmp_path / "events.csv"
    path.write_text("user,item,time\n7,B2,2025-01-02\n7,B1,2025-01-01\n7,B1,2025-01-01\n8,B3,2025-01-01\n")
    other = load_people(shop_run, str(path))
    assert other.find("7.0") == ["B1", "B2"]
    with pytest.raises(UsageError, match=r"^--user: must be one of the 2 people of .*events.csv, got '9'\.$"):
        other.find("9")
    with pytest.raises(UsageError, match=r"got 'P0011'\. Did you mean 'P001'\?$"):
        People("shop", {"P001": []}).find("P0011")


# Reasons


def test_features_add_up_to_the_score(recommender):
    found = [item for item in recommender.recommend(HISTORY, 300).items if item.by == "both"]
    rest = [item.score - sum(item.features.values()) for item in found]
    assert len(found) > 20
    assert np.ptp(rest) < 1e-6  # what the trees say without knowing anything
    assert all(list(item.features.values()) == sorted(item.features.values(), reverse=True) for item in found)
    assert set(found[0].features) == set(recommender.task.rank.features)


def test_words_name_the_features_that_carry_an_item(recommender):
    for item in recommender.recommend(HISTORY, 30).items:
        carried = [name for name, value in item.features.items() if value > 0][:3]
        assert item.why.endswith(", ".join(carried))
        assert item.why.startswith("because you had ") == bool(item.because)
        assert {name for one in item.because for name in one.through} <= set(carried)
        assert {one.id for one in item.because} <= set(HISTORY)


def test_reasons_by_hand():
    catalogue = Catalogue(("a", "b", "c", "d"), ("A", "B", "C", "D"), {})
    follows = sparse.csr_matrix(np.array([[0, 0, 3, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], np.float32))
    counts = Counts({"follows 20": follows, "ease": follows * 0}, {})
    texts = np.array([[1, 0], [0, 1], [0, 1], [-1, 0]], np.float32)
    reasons = Reasons(catalogue, counts, np.eye(4, dtype=np.float32), texts)
    history, item = np.array([0, 1, 3]), np.array([2])

    def find(features: dict[str, float]) -> list[tuple[str, dict[str, float]]]:
        (found,) = reasons.find(history, item, [features])
        return [(one.id, dict(one.through)) for one in found]

    # The oldest weighs .64, the newest 1: 1.92 and 1 follow.
    both = [("a", {"co_occurrence": round(1.92 / 2.92, 4)}), ("d", {"co_occurrence": round(1 / 2.92, 4)})]
    assert find({"co_occurrence": 1.0, "text": -1.0}) == both
    assert find({"text": 0.5}) == [("b", {"text": 1.0})]
    assert find({"text": 3.0, "co_occurrence": 1.0})[0] == ("b", {"text": 1.0})
    assert find({"popularity": 1.0}) == find({"sequence": 1.0}) == find({"ease": 1.0}) == []
    assert reasons.find(history[:0], item, [{"text": 1.0}]) == [()]


# New items


def test_new_items_are_scored_from_their_texts(shop_run, recommender, tmp_path):
    catalogue = recommender.task.catalogue
    path = tmp_path / "new.csv"
    path.write_text(
        "item,title,description,tags,category,price\n"
        "B0001,Another title,,,Crime,1\n"
        "N1,The Bell Rings,A harbour police inspector in winter.,harbour police; winter,Crime,5\n"
        "N2,,,,,\n"
    )
    wider = load_recommender(shop_run, items=path)
    assert wider.task.catalogue.ids == (*catalogue.ids, "N1", "N2")
    assert wider.task.catalogue.texts[:-2] == catalogue.texts
    assert wider.task.catalogue.columns["price"][-2:] == (5.0, None)
    assert wider.model.known[-2:].tolist() == [False, False]
    assert torch.linalg.norm(wider.model.text_vectors[-2:], dim=1).tolist() == pytest.approx([1, 0])
    before, after = (list_ids(one.recommend(HISTORY, 300)) for one in (recommender, wider))
    assert sorted(after) == sorted([*before, "N1", "N2"])
    assert wider.recommend(["N1", *HISTORY]).skipped == 0
    (new,) = wider.recommend(HISTORY, filters=["price == 5", "category == Crime"]).items
    assert new.id == "N1"
    copied = load_recommender(shop_run, items=_write_copy(tmp_path, recommender))
    assert copied.model.text_vectors[-1].tolist() == pytest.approx(copied.model.text_vectors[50].tolist(), abs=1e-6)


def _write_copy(folder: Path, recommender: Recommender) -> Path:
    """A catalogue whose only new item has the text of one that is known."""
    path = folder / "copy.jsonl"
    row = {"item": "C", "title": recommender.task.catalogue.texts[50]} | dict.fromkeys(["description", "tags"], "")
    path.write_text(json.dumps(row | {"category": None, "price": 12345}))
    return path


# Errors


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("cheap", "--filter 'cheap': must be a condition on a column (category, price), got another text. Write one"),
        ("prise < 3", "--filter 'prise < 3': must name a declared column (category, price), got 'prise'. Did you mean"),
        ("price < cheap", "--filter 'price < cheap': must compare with a number, got cheap. Write one such as"),
        ("category < 3", "--filter 'category < 3': must compare a category by ==, != or in, got <. Write one such as"),
        ("category == crime", "must name a value of the column (Crime, Drama), got 'crime'. Did you mean 'Crime'?"),
    ],
)
def test_a_condition_that_cannot_be_meant(condition, words):
    catalogue = Catalogue(("1", "2"), ("", ""), {"category": ("Crime", "Drama"), "price": (1.0, None)})
    with pytest.raises(UsageError) as caught:
        find_matching([condition], catalogue)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["price < 2"], [1, 0, 0, 0]),
        (["price <= 2"], [1, 1, 0, 0]),
        (["price>1", "price >= 2"], [0, 1, 1, 0]),
        (["price == 2"], [0, 1, 0, 0]),
        (["price != 2"], [1, 0, 1, 1]),
        (["price in (1, 3)"], [1, 0, 1, 0]),
        (["kind == Comedy"], [1, 1, 0, 0]),
        (["kind == 'Comedy, Drama'"], [0, 1, 0, 0]),
        (["kind != Comedy"], [0, 0, 1, 1]),
        (["kind in [Drama, 'Crime']"], [0, 1, 1, 0]),
        ([], [1, 1, 1, 1]),
    ],
)
def test_conditions(conditions, expected):
    columns = {"price": (1.0, 2.0, 3.0, None), "kind": ("Comedy", "Comedy, Drama", "Crime", None)}
    found = find_matching(conditions, Catalogue(("1", "2", "3", "4"), ("",) * 4, columns))
    assert found.astype(int).tolist() == expected


def test_wishes_that_cannot_be_met(recommender):
    with pytest.raises(UsageError, match=r"^top: must be at least 1, got 0\. Ask for 10 items"):
        recommender.recommend(HISTORY, 0)
    with pytest.raises(UsageError, match=r"^diversity: must lie in 0 to 1, got 1\.5\. 0 is the plain order"):
        recommender.recommend(HISTORY, diversity=1.5)
    assert recommender.recommend(HISTORY, filters=["price < 0"]).items == ()


def test_runs_that_give_no_recommender(finished_run, shop_run, tmp_path):
    with pytest.raises(UsageError, match=r"must be a run of type recommendation, got text_classification\.$"):
        load_recommender(finished_run)
    model = Path(shutil.copytree(shop_run / "model", tmp_path / "alone"))
    assert load_recommender(model).recommend(HISTORY).items
    new = tmp_path / "new.csv"
    new.write_text("item,title\nN1,x\n")
    wanted = "must be for a run, whose recipe names the texts' encoder, got a model alone."
    for words, ask in (
        (wanted, lambda: load_recommender(model, items=new)),
        ("must come with the events of a run, got", lambda: load_people(model)),
        ("column 'description' must exist", lambda: load_recommender(shop_run, items=new)),
        ("must be a file, got nothing there", lambda: load_recommender(shop_run, items=tmp_path / "none.csv")),
    ):
        with pytest.raises(FinetuneError) as caught:
            ask()
        assert words in str(caught.value)
    for name, words in (("ranker.txt", "as the recipe has `rank`"), ("counts.safetensors", "was not judged")):
        settings = model / "finetune.json"
        (model / name).unlink()
        settings.write_text(settings.read_text().replace(f'"{name}"', f'"{name}.py"'))
        with pytest.raises(ResourceError, match=words):
            load_recommender(model)
