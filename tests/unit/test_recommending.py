"""How lists are judged: against matrices worked by hand and against ranx, one mean for each person."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluation.counting import COUNTINGS, Counting, Events, Histories
from finetune.evaluation.recommending import (
    Judging,
    Ranked,
    average_by_person,
    build_questions,
    choose_settings,
    find_first,
    group_items,
    name_history,
    rank_all,
    rank_by_counting,
    score_lists,
)
from finetune.recipe.schema import EvaluateSection

METRICS = ["ndcg_at_10", "recall_at_10", "mrr"]
LOG3 = 1 / np.log2(3)


def make_questions(*asked, exclude_seen=True):
    """Questions of (person, history, targets)."""
    ends = np.cumsum([len(history) for _, history, _ in asked])
    item = np.array([item for _, history, _ in asked for item in history], np.int64)
    histories = Histories(item, ends - [len(history) for _, history, _ in asked], ends)
    targets = [np.array(targets, np.int64) for _, _, targets in asked]
    return build_questions(np.array([person for person, *_ in asked]), histories, targets, exclude_seen=exclude_seen)


def rank(questions, scores, groups=None):
    ranked = Ranked()
    ranked.add(np.array(scores, np.float32), questions, groups or {})
    return ranked


def average(questions, scores):
    tables = average_by_person(rank(questions, scores).places, questions.person, METRICS)
    return {name: table[:, 0].tolist() for name, table in tables.items()}


# What is asked


def test_answers_are_asked_once_and_never_what_the_person_had_where_lists_leave_it_out():
    asked = [(0, [1, 2], [2, 3, 3]), (0, [1], [1]), (1, [], [1])]
    questions = make_questions(*asked)
    assert questions.person.tolist() == [0, 1]
    assert [targets.tolist() for targets in questions.targets] == [[3], [1]]
    assert [questions.histories.get(row).tolist() for row in range(2)] == [[1, 2], []]
    again = make_questions(*asked, exclude_seen=False)
    assert [targets.tolist() for targets in again.targets] == [[2, 3], [1], [1]]


# Places and metrics


def test_places_and_means_by_hand():
    questions = make_questions((7, [], [0, 3]), (7, [], [2]), (3, [], [1]), exclude_seen=True)
    scores = [[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6], [0.1, 0.9, 0.2, 0.3]]
    ranked = rank(questions, scores)
    assert [places.tolist() for places in ranked.places] == [[1, 4], [3], [1]]
    assert [items.tolist() for items in ranked.lists] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 3, 2, 0]]
    found = average(questions, scores)  # person 3, then person 7 with the mean of two
    first = (1 + 1 / np.log2(5)) / (1 + LOG3)
    assert found["ndcg_at_10"] == pytest.approx([1, (first + 0.5) / 2])
    assert found["mrr"] == pytest.approx([1, (1 + 1 / 3) / 2])
    assert found["recall_at_10"] == pytest.approx([1, 1])


def test_of_equal_scores_the_wrong_item_comes_first():
    questions = make_questions((0, [], [0]), (1, [], [0, 1]))
    ranked = rank(questions, [[0.5, 0.5, 0.5, 0.1], [1, 1, 1, 1]])
    assert [places.tolist() for places in ranked.places] == [[3], [3, 4]]
    assert ranked.lists[1].tolist() == [0, 1, 2, 3], "in a list the first of the catalogue does"


def test_what_a_person_had_takes_no_place():
    asked = [(0, [1, 2], [0])]
    scores = [[0.1, 0.9, 0.8, 0.5]]
    left_out = rank(make_questions(*asked), scores)
    assert left_out.places[0].tolist() == [2]
    assert left_out.lists[0].tolist() == [3, 0], "not even at the end of a list"
    assert rank(make_questions(*asked, exclude_seen=False), scores).places[0].tolist() == [4]


def test_answers_count_in_their_own_group_and_the_others_are_out_of_the_way():
    groups = {"rare": np.array([False, False, True, True]), "cold": np.array([True, False, False, False])}
    questions = make_questions((0, [], [1, 2]), (1, [], [1]))
    ranked = rank(questions, [[0.2, 0.9, 0.5, 0.8], [1, 2, 3, 4]], groups)
    assert ranked.places[0].tolist() == [1, 3]
    # Without item 1, which was right but is not rare, item 2 is second.
    assert [None if places is None else places.tolist() for places in ranked.by_group["rare"]] == [[2], None]
    assert ranked.by_group["cold"] == [None, None]
    tables = average_by_person(ranked.by_group["rare"], questions.person, ["mrr"])
    assert tables["mrr"].tolist() == [[0.5, 1]]
    assert average_by_person(ranked.by_group["cold"], questions.person, ["mrr"])["mrr"].shape == (0, 2)


RANX = """
import json, sys
import ranx
right, scores = json.load(sys.stdin)
found = ranx.evaluate(ranx.Qrels(right), ranx.Run(scores), ["ndcg@10", "recall@10", "mrr"], return_mean=False)
print(json.dumps({name: values.tolist() for name, values in found.items()}))
"""


def test_metrics_are_those_of_ranx():
    pytest.importorskip("ranx")
    generator = np.random.default_rng(0)
    people, items = 60, 30
    # One request for each person: ranx knows no people. No ties: it has no rule for them.
    asked = [(row, [], generator.choice(items, generator.integers(1, 16), replace=False)) for row in range(people)]
    questions = make_questions(*asked)
    scores = generator.permutation(people * items).reshape(people, items)
    name = [f"q{row:02}" for row in range(people)]
    given = [
        {name[row]: {str(item): 1 for item in questions.targets[row]} for row in range(people)},
        {name[row]: {str(item): float(scores[row, item]) for item in range(items)} for row in range(people)},
    ]
    # In a process of its own, where numba does not compile: that takes far longer than to run it.
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    words = [sys.executable, "-c", RANX]
    done = subprocess.run(words, input=json.dumps(given), capture_output=True, text=True, env=environment, check=True)
    wanted = {metric: np.array(values) for metric, values in json.loads(done.stdout).items()}
    found = average(questions, scores)
    np.testing.assert_allclose(found["ndcg_at_10"], wanted["ndcg@10"], rtol=1e-9)
    np.testing.assert_allclose(found["mrr"], wanted["mrr"], rtol=1e-9)
    right = np.array([len(targets) for targets in questions.targets])
    # ranx divides by the right ones, of which a list of ten cannot hold more than ten.
    np.testing.assert_allclose(found["recall_at_10"], wanted["recall@10"] * right / np.minimum(10, right), rtol=1e-9)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_the_first_are_those_of_a_stable_sort(values, count):
    scores = np.array(values, np.float32)
    assert find_first(scores, count).tolist() == np.argsort(-scores, kind="stable")[:count].tolist()


@pytest.mark.parametrize("size", [30, 7000])
def test_what_has_no_score_is_not_in_a_list(size):
    scores = np.full(size, np.nan, np.float32)
    assert find_first(scores, 100).tolist() == []
    scores[[3, 20]] = -1, 2
    assert find_first(scores, 100).tolist() == [20, 3]


def test_some_questions_are_drawn_and_keep_their_order():
    questions = make_questions(*((row // 3, [row], [row + 1]) for row in range(30)), exclude_seen=False)
    few = questions.draw(12, seed=1)
    rows = [int(targets[0]) - 1 for targets in few.targets]
    assert rows == sorted(set(rows))
    assert len(rows) == 12
    assert few.person.tolist() == [row // 3 for row in rows]
    assert [few.histories.get(row).tolist() for row in range(12)] == [[row] for row in rows]
    assert questions.draw(30, seed=1) is questions


# Groups and slices


def test_groups_of_items_by_hand():
    counts = np.array([0, 4, 5, 90, 1, 30, 0, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], np.float32)
    groups = group_items(counts)
    assert {name: np.flatnonzero(members).tolist() for name, members in groups.items()} == {
        "popular": [3, 5],  # a tenth
        "rare": [1, 4],
        "cold": [0, 6],
    }
    assert not group_items(np.zeros(20, np.float32))["popular"].any(), "what nobody had is not popular"


def test_histories_are_named_by_their_events():
    lengths = [0, 1, 5, 6, 20, 21, 100, 101]
    names = ["none", "1 to 5 events", "6 to 20 events", "21 to 100 events", "over 100 events"]
    assert [names.index(name_history(length)) for length in lengths] == [0, 1, 1, 2, 2, 3, 3, 4]


# Choosing and scoring


def test_settings_are_those_that_are_best_on_validation():
    # A baseline that puts item `front` first: only 2 is right, and 1 is right for fewer.
    def score(_fitted, events, histories, front):
        found = np.zeros((len(histories), events.items), np.float32)
        found[:, int(front)] = 1
        return found

    counting = Counting(lambda _events: None, score, {}, {"front": (0.0, 1.0, 2.0, 3.0)})
    events = Events(*(np.zeros(0, np.int64),) * 3, 4, 10)
    questions = make_questions((0, [], [2]), (1, [], [2]), (2, [], [1]))
    assert choose_settings(counting, events, questions, "ndcg_at_10") == {"front": 2.0}
    # A mean over people, not over requests: person 0 asks three times for 3, two others once for 1.
    questions = make_questions((0, [], [3]), (0, [], [3]), (0, [], [3]), (1, [], [1]), (2, [], [1]))
    assert choose_settings(counting, events, questions, "mrr") == {"front": 1.0}
    alike = make_questions((0, [], [1]), (1, [], [2]))
    assert choose_settings(counting, events, alike, "mrr") == {"front": 1.0}, "of equal ones the first"
    assert choose_settings(COUNTINGS["popular"], events, questions, "mrr") == {}


def score(systems, questions, counts, **keys):
    section = EvaluateSection(metrics=["ndcg_at_10", "mrr"], slices=["history", "other"], resamples=200, **keys)
    return score_lists("test", questions, systems, np.array(counts, np.float32), Judging(section, 0, 1))


def test_scores_of_lists_by_hand():
    questions = make_questions((0, [3], [0]), (0, [3], [1]), (1, [], [1]), (2, [], [2]))
    groups = group_items(np.array([8, 1, 0, 7], np.float32))
    good = rank_all(questions, lambda part: np.eye(4, dtype=np.float32)[[t[0] for t in part.targets]], groups)
    same = rank_all(questions, lambda part: np.tile(np.array([4, 3, 2, 1], np.float32), (len(part), 1)), groups)
    scored = score({"both": good, "popular": same}, questions, [8, 1, 0, 7])
    assert (scored["rows"], scored["opened"]) == (3, 1)
    assert scored["metrics"]["mrr"]["value"] == 1
    found = scored["baselines"]["popular"]
    assert found["metrics"]["mrr"]["value"] == pytest.approx(((1 + 1 / 2) / 2 + 1 / 2 + 1 / 3) / 3, abs=1e-6)
    assert found["difference"]["mrr"]["value"] == pytest.approx(1 - found["metrics"]["mrr"]["value"], abs=1e-6)
    assert set(scored["slices"]) == {"history", "next item"}
    assert {one["value"]: one["rows"] for one in scored["slices"]["next item"]} == {"rare": 2, "cold": 1}
    lists = scored["lists"]
    assert (lists["requests"], lists["people"], lists["items"]) == (4, 3, 4)
    assert lists["by_item"]["cold"]["people"] == 1
    assert lists["by_item"]["cold"]["systems"]["popular"]["value"] == pytest.approx(0.5), "third: 1 / log2(4)"
    assert lists["by_item"]["popular"] == {"people": 0, "systems": {}}
    bits = -np.log2(np.array([9, 2, 1, 8]) / 20)
    assert lists["systems"]["both"]["coverage_at_10"] == 1
    assert lists["systems"]["both"]["coverage"] == [0.75] * 3 + [1] * 7
    assert lists["systems"]["popular"]["coverage"] == [0.25, 0.5, 0.75] + [1] * 7
    shown = [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]  # person 0 had item 3
    assert lists["systems"]["popular"]["novelty_at_10"] == pytest.approx(bits[shown].mean(), abs=1e-6)


def test_a_baseline_is_ranked_with_its_settings_in_chunks():
    generator = np.random.default_rng(0)
    user = np.sort(generator.integers(0, 20, 200))
    events = Events(user, generator.integers(0, 15, 200), np.arange(200), 15, 200)
    asked = [(row, generator.integers(0, 15, 3).tolist(), [int(generator.integers(0, 15))]) for row in range(300)]
    questions = make_questions(*asked)
    assert len(questions.chunk()) > 1
    chosen = {"window": 5, "decay": 0.8}
    ranked = rank_by_counting(COUNTINGS["co_occurrence"], chosen, events, questions, {})
    assert ranked.settings == chosen
    assert len(ranked.places) == len(ranked.lists) == len(questions)
    (fitted,) = COUNTINGS["co_occurrence"].fit_all(events, [chosen])
    single = rank_all(questions.take(slice(200, 201)), lambda part: fitted(part.histories), {})
    assert single.lists[0].tolist() == ranked.lists[200].tolist()
    assert single.places[0].tolist() == ranked.places[200].tolist()
