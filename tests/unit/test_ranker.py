"""The second stage: who becomes a candidate, what is known of it, and what the trees make of that."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from finetune.data.interactions import Catalogue
from finetune.errors import DataError, ResourceError
from finetune.evaluation.counting import DAY, Events, Histories
from finetune.tasks.items import Counts, Items, normalize
from finetune.tasks.ranker import LAST_EVENTS, Ranker, fit_trees, import_lightgbm

ITEMS = 40
KINDS = ("Crime", "Crime, Poetry", "Poetry", None)
NAMES = ("sequence", "co_occurrence", "ease", "text", "popularity", "recency", "history", "kind", "price")


def make_events(seed=0, people=60):
    """People who go from an item to one of the two behind it; the last five items are nobody's."""
    generator = np.random.default_rng(seed)
    size = ITEMS - 5
    had = [
        (generator.integers(size) + np.cumsum(generator.integers(1, 3, generator.integers(2, 9)))) % size
        for _ in range(people)
    ]
    user = np.repeat(np.arange(people), [len(one) for one in had])
    time = np.concatenate([np.sort(generator.integers(0, 90 * DAY, len(one))) for one in had])
    return Events(user, np.concatenate(had), time, ITEMS, 90 * DAY)


def make_histories(*lists):
    ends = np.cumsum([len(one) for one in lists])
    return Histories(
        np.array([item for one in lists for item in one], np.int64), ends - [len(one) for one in lists], ends
    )


@pytest.fixture(scope="module")
def ranker():
    generator = np.random.default_rng(3)
    texts = generator.normal(size=(ITEMS, 8)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    columns = {
        "kind": tuple(KINDS[item % 4] for item in range(ITEMS)),
        "price": tuple(None if item % 7 == 0 else float(item) for item in range(ITEMS)),
    }
    ids = tuple(f"b{item}" for item in range(ITEMS))
    return Ranker(NAMES, 3, True, Counts.fit(make_events()), Items(Catalogue(ids, ids, columns), texts))


HISTORIES = make_histories([1, 2, 4], [30], [], [5, 6, 7, 8, 9, 10], [14, 14, 3])


@pytest.fixture(scope="module")
def sequence():
    scores = np.random.default_rng(5).normal(size=(5, ITEMS)).astype(np.float32)
    scores[2] = np.nan  # after an empty history
    return scores


def list_items(table, request):
    return table.item[table.request == request]


# Candidates


def find_clear(scores, history, count):
    """The items that are among the first `count` whatever the rule for ties, without what was had."""
    scores = np.array(scores, np.float64)
    scores[history] = -np.inf
    return set(np.flatnonzero(scores > np.sort(scores)[-count - 1]).tolist())


def test_candidates_hold_the_first_items_of_each_source(ranker, sequence):
    table = ranker.build_table(HISTORIES, sequence)
    counts, texts = ranker.counts, ranker.items.texts
    for row in (0, 1, 3, 4):
        history, found = HISTORIES.get(row), set(list_items(table, row).tolist())
        weights = {
            decay: HISTORIES.take(slice(row, row + 1)).weigh(ITEMS, decay, LAST_EVENTS).toarray()[0]
            for decay in (0.5, 0.8)
        }
        sources = {
            "sequence": sequence[row],
            "follows 5": weights[0.5] @ counts.matrices["follows 5"].toarray(),
            "follows 20": weights[0.8] @ counts.matrices["follows 20"].toarray(),
            "ease": HISTORIES.take(slice(row, row + 1)).weigh(ITEMS, 0.8).toarray()[0]
            @ counts.matrices["ease"].toarray(),
            "text": texts @ (weights[0.8] @ texts),
            "popularity": counts.vectors["popularity 30"] + 1e-6 * counts.vectors["popularity"],
        }
        for name, scores in sources.items():
            wanted = find_clear(scores, history, 3)
            assert wanted, name
            assert wanted <= found, name
        new = np.where(counts.vectors["popularity"] > 0, -np.inf, texts @ (weights[0.8] @ texts))
        assert set(np.argsort(-new)[:3].tolist()) <= found, "what nobody had yet, by its text"
        assert not found & set(history.tolist())


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_candidates_are_those_of_a_stable_sort_of_every_source(ranker, exclude_seen):
    """Sources of small whole numbers, so that most of what is at the border of a source is equal."""
    generator = np.random.default_rng(2)
    sequence = generator.integers(0, 4, (len(HISTORIES), ITEMS)).astype(np.float32)
    counts = ranker.counts
    rounded = {name: (10 * matrix).ceil() * (matrix > 0.1) for name, matrix in counts.matrices.items()}
    own = replace(ranker, counts=Counts(rounded, counts.vectors), exclude_seen=exclude_seen, features=("sequence",))
    table = own.build_table(HISTORIES, sequence)
    texts, popular = ranker.items.texts, counts.rank_popular(30)
    for row in range(len(HISTORIES)):
        history = HISTORIES.take(slice(row, row + 1))
        weights = {decay: history.weigh(ITEMS, decay, LAST_EVENTS).toarray()[0] for decay in (0.5, 0.8, 0.95)}
        means = normalize(weights[0.8][None] @ texts)[0] @ texts.T
        known = [sequence[row], means, np.where(counts.vectors["popularity"] > 0, -np.inf, means)]
        counted = [
            weights[0.5] @ rounded["follows 5"].toarray(),
            weights[0.8] @ rounded["follows 20"].toarray(),
            *(history.weigh(ITEMS, decay).toarray()[0] @ rounded["ease"].toarray() for decay in (0.5, 0.8)),
            popular,
            *([] if exclude_seen else [weights[0.95]]),
        ]
        wanted = set()
        for scores in [*known, *(np.where(one > 0, one, -np.inf) for one in counted)]:
            allowed = np.array(scores, np.float32)
            if exclude_seen:
                allowed[HISTORIES.get(row)] = -np.inf
            order = np.argsort(-allowed, kind="stable")[:3]
            wanted |= set(order[allowed[order] > -np.inf].tolist())
        assert list_items(table, row).tolist() == sorted(wanted)


def test_without_a_history_candidates_are_popular(ranker, sequence):
    found = list_items(ranker.build_table(HISTORIES, sequence), 2)
    popular = ranker.counts.vectors["popularity 30"] + 1e-6 * ranker.counts.vectors["popularity"]
    assert set(np.argsort(-popular, kind="stable")[:3].tolist()) <= set(found.tolist())


def test_what_a_person_had_is_a_candidate_only_where_it_may_come_again(ranker, sequence):
    again = replace(ranker, exclude_seen=False, features=(*NAMES, "repeats"))
    table = again.build_table(HISTORIES, sequence)
    assert {14, 3} <= set(list_items(table, 4).tolist())
    times = table.values[:, again.names.index("repeats: times")]
    assert times[(table.request == 4) & (table.item == 14)].tolist() == [2]
    newest = table.values[:, again.names.index("repeats: newest")]
    own = (table.request == 4) & (table.item == 14)
    assert newest[own] == pytest.approx(0.95 + 0.95**2)
    values = dict(zip(again.names, table.values.T, strict=True))
    assert values["repeats: lately"][own] == pytest.approx(0.99 + 0.99**2)
    assert values["repeats: since"][own].tolist() == [2], "from the last time that it was had"
    assert np.isnan(values["repeats: since"][table.request == 2]).all(), "never"
    np.testing.assert_array_equal(values["repeats: by others"], again.counts.vectors["again"][table.item])


def test_more_candidates_than_items_are_all_that_may_be_shown(ranker, sequence):
    table = replace(ranker, candidates=1000).build_table(HISTORIES, sequence)
    assert list_items(table, 0).tolist() == [item for item in range(ITEMS) if item not in (1, 2, 4)]


# Features


def test_features_by_hand(ranker, sequence):
    table = ranker.build_table(HISTORIES, sequence)
    assert table.values.dtype == np.float32
    assert table.values.shape == (len(table.item), len(ranker.names))
    assert len(set(ranker.names)) == len(ranker.names)
    values = dict(zip(ranker.names, table.values.T, strict=True))
    request, item = table.request, table.item
    np.testing.assert_array_equal(values["sequence: sequence"], sequence[request, item])
    vectors = ranker.counts.vectors
    np.testing.assert_allclose(values["popularity: popularity 7"], np.log1p(vectors["popularity 7"][item]))
    np.testing.assert_array_equal(values["recency: age"], vectors["age"][item])
    np.testing.assert_allclose(values["history: events"], np.log1p([3, 1, 0, 6, 3])[request], rtol=1e-6)
    # Request 0 had items 1, 2, 4 at prices 1, 2, 4; the newest is 4.
    weights = np.array([0.95**2, 0.95, 1])
    mean = weights @ [1, 2, 4] / weights.sum()
    own = request == 0
    prices = np.array([np.nan if one % 7 == 0 else one for one in item[own]])
    np.testing.assert_allclose(values["price: above the person's mean"][own], prices - mean, rtol=1e-5)
    # Kinds of items 1, 2, 4: Crime and Poetry by halves, Poetry, Crime.
    crime = (weights @ [0.5, 0, 1]) / weights.sum()
    wanted = {0: crime, 1: 0.5, 2: 1 - crime, 3: 0}
    np.testing.assert_allclose(
        values["kind: the person's share"][own], [wanted[one % 4] for one in item[own]], rtol=1e-5
    )
    row = np.flatnonzero(own)[0]
    follows = ranker.counts.matrices["follows 1"].toarray()
    assert values["co_occurrence: follows 1, 0.5"][row] == pytest.approx(
        float(np.array([0.25, 0.5, 1]) @ follows[[1, 2, 4], item[row]]), rel=1e-5
    )
    assert np.isnan(values["price: above the person's mean"][request == 2]).all(), "no mean of nothing"


def test_features_do_not_depend_on_what_else_is_in_the_chunk(ranker, sequence):
    together = ranker.build_table(HISTORIES, sequence)
    for row in range(len(HISTORIES)):
        alone = ranker.build_table(HISTORIES.take(slice(row, row + 1)), sequence[row : row + 1])
        own = together.request == row
        assert alone.item.tolist() == together.item[own].tolist()
        np.testing.assert_allclose(alone.values, together.values[own], rtol=1e-5, atol=1e-6)


def test_only_the_features_that_are_named_are_there(ranker, sequence):
    few = replace(ranker, features=("price", "sequence"))
    assert {name.partition(":")[0] for name in few.names} == {"price", "sequence"}
    table = few.build_table(HISTORIES, sequence)
    column = few.names.index("sequence: sequence")
    np.testing.assert_array_equal(table.values[:, column], sequence[table.request, table.item])


# Counts


def test_counts_by_hand():
    events = Events(np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([0, 99 * DAY, 98 * DAY]), 3, 100 * DAY)
    counts = Counts.fit(events)
    assert {name: vector.tolist() for name, vector in counts.vectors.items() if name != "age"} == {
        "popularity": [1, 2, 0],
        "again": [0, 0, 0],
        "popularity 7": [0, 2, 0],
        "popularity 30": [0, 2, 0],
        "popularity 180": [1, 2, 0],
    }
    np.testing.assert_array_equal(counts.vectors["age"], np.array([100, 2, np.nan], np.float32))
    assert list(counts.matrices) == ["follows 1", "follows 5", "follows 20", "precedes", "ease"]
    assert counts.matrices["follows 1"][0, 1] == counts.matrices["precedes"][1, 0] == pytest.approx(0.5**0.5)


def test_weights_are_for_people_of_whom_nothing_is_known():
    plain = Events(np.arange(4), np.array([0, 1, 1, 2]), np.array([0, 99, 99, 98]) * DAY, 3, 100 * DAY)
    counts, without = (Counts.fit(replace(plain, weight=weight)) for weight in (np.array([1.5, 0.5, 0.5, 1.5]), None))
    assert counts.vectors.pop("weighted").tolist() == [0, 1, 1.5]
    for name, array in without.to_arrays().items():
        np.testing.assert_array_equal(counts.to_arrays()[name], array)
    np.testing.assert_array_equal(without.rank_lately(), without.rank_popular(7))
    again = Counts.from_arrays(load(save(Counts.fit(replace(plain, weight=np.ones(4))).to_arrays())))
    np.testing.assert_array_equal(again.rank_lately(), without.rank_lately())
    ranked = Counts.fit(replace(plain, weight=np.array([1.5, 0.5, 0.5, 1.5]))).rank_lately()
    assert np.argsort(-ranked).tolist() == [2, 1, 0]
    assert np.argsort(-without.rank_lately()).tolist() == [1, 2, 0]


def test_how_many_come_back_by_hand():
    # Of item 1's two people one had it twice, of item 0's two nobody; five more who do not come back are assumed.
    events = Events(np.array([0, 0, 0, 1, 1]), np.array([1, 0, 1, 1, 0]), np.arange(5), 3, 10)
    assert Counts.fit(events).vectors["again"].tolist() == pytest.approx([0, 1 / 7, 0])


def test_counts_come_back_from_a_file(ranker, sequence):
    counts = Counts.from_arrays(load(save(ranker.counts.to_arrays())))
    assert list(counts.vectors) != list(ranker.counts.vectors), "a file has its own order, which must not matter"
    for name, matrix in ranker.counts.matrices.items():
        np.testing.assert_array_equal(counts.matrices[name].toarray(), matrix.toarray())
    for name, vector in ranker.counts.vectors.items():
        np.testing.assert_array_equal(counts.vectors[name], vector)
    again = replace(ranker, counts=counts).build_table(HISTORIES, sequence)
    np.testing.assert_array_equal(again.values, ranker.build_table(HISTORIES, sequence).values)


def test_items_that_join_later_have_no_counts(ranker):
    longer = ranker.counts.extend(2)
    for name, matrix in ranker.counts.matrices.items():
        found = longer.matrices[name].toarray()
        assert found.shape == (ITEMS + 2, ITEMS + 2)
        np.testing.assert_array_equal(found[:ITEMS, :ITEMS], matrix.toarray())
        assert not found[ITEMS:].any()
        assert not found[:, ITEMS:].any()
    for name, vector in ranker.counts.vectors.items():
        assert longer.vectors[name].dtype == np.float32
        np.testing.assert_array_equal(longer.vectors[name][:ITEMS], vector)
        np.testing.assert_array_equal(longer.vectors[name][ITEMS:], [np.nan if name == "age" else 0] * 2)


def test_hidden_items_are_as_if_nobody_had_them(ranker):
    hidden = np.arange(ITEMS) % 5 == 1
    counts = ranker.counts.hide(hidden)
    for name, matrix in ranker.counts.matrices.items():
        expected = matrix.toarray()
        expected[hidden] = 0
        expected[:, hidden] = 0
        np.testing.assert_array_equal(counts.matrices[name].toarray(), expected)
    for name, vector in ranker.counts.vectors.items():
        assert np.isnan(counts.vectors[name][hidden]).all() if name == "age" else not counts.vectors[name][hidden].any()
        np.testing.assert_array_equal(counts.vectors[name][~hidden], vector[~hidden])


# Trees


@pytest.fixture(scope="module")
def fitted(ranker):
    """Trees that were fitted on people who take the item that comes two behind their newest."""
    generator = np.random.default_rng(8)
    histories = make_histories(*generator.integers(0, ITEMS - 8, (120, 2)).tolist())
    sequence = generator.normal(size=(120, ITEMS)).astype(np.float32)
    targets = [np.array([history[-1] + 2]) for history in map(histories.get, range(120))]
    for row, target in enumerate(targets):
        sequence[row, target] += 2
    wide = replace(ranker, candidates=10)
    table = wide.build_table(histories, sequence)
    trees = fit_trees([table], [targets], seed=0)
    return replace(wide, trees=trees), table, targets


def test_trees_put_right_items_in_front(fitted):
    ranker, table, targets = fitted
    scores = ranker.score(table)
    first = [table.item[table.request == row][scores[table.request == row].argmax()] for row in range(len(targets))]
    right = np.mean([item == target[0] for item, target in zip(first, targets, strict=True)])
    assert right > 0.8
    again = fit_trees([table], [targets], seed=0)
    np.testing.assert_allclose(again.predict(table.values), scores, rtol=0, atol=1e-12)


def test_reasons_add_up_to_the_score(fitted):
    ranker, table, _ = fitted
    parts = ranker.explain(table)
    assert set(parts[0]) == set(NAMES)
    expected = ranker.trees.predict(table.values, pred_contrib=True)[:, -1]
    assert np.ptp(expected) == 0, "what is expected is the same for all"
    np.testing.assert_allclose([sum(part.values()) for part in parts], ranker.score(table) - expected, atol=1e-9)


def test_importances_are_shares_the_largest_first(fitted):
    importances = fitted[0].compute_importances()
    assert set(importances) == set(NAMES)
    assert sum(importances.values()) == pytest.approx(1)
    assert list(importances.values()) == sorted(importances.values(), reverse=True)
    assert next(iter(importances)) in ("sequence", "co_occurrence"), "the two that know the answer"


def test_requests_whose_answer_is_no_candidate_say_nothing(fitted):
    _, table, targets = fitted
    nothing = [np.zeros(0, np.int64)] * len(targets)
    half = [target if row < 60 else nothing[0] for row, target in enumerate(targets)]
    alone = replace(table, **{key: getattr(table, key)[table.request < 60] for key in ("request", "item", "values")})
    np.testing.assert_array_equal(
        fit_trees([table], [half], 0).predict(table.values),
        fit_trees([alone], [half[:60]], 0).predict(table.values),
    )
    with pytest.raises(DataError) as caught:
        fit_trees([table], [nothing], 0)
    assert str(caught.value) == (
        "rank: must have validation requests with a target among the candidates, got none. Raise rank.candidates, or "
        "set rank: null."
    )


def test_without_lightgbm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ResourceError) as caught:
        import_lightgbm()
    assert str(caught.value) == (
        "rank: must have LightGBM, got no such package. Install it: pip install lightgbm, or set "
        "rank: null for the sequence model alone."
    )
