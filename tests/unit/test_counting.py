"""Recommendation by counting: against numbers worked by hand, scikit-learn, and EASE's closed form."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from finetune.evaluation.counting import (
    COUNTINGS,
    DAY,
    Events,
    Histories,
    apply,
    build_people,
    count_ease,
    count_following,
    count_neighbours,
    count_preceding,
    fit_ease,
    keep_strongest,
)


def make_events(*people, items=4, now=100):
    """Events of people, each a list of items, at times 0, 1, 2..."""
    user = np.repeat(np.arange(len(people)), [len(had) for had in people])
    time = np.concatenate([np.arange(len(had)) for had in people])
    return Events(user, np.concatenate(people).astype(np.int64), time, items, now)


def make_histories(*histories):
    """Histories one behind the other in one array, as in the events."""
    ends = np.cumsum([len(history) for history in histories])
    item = np.array([item for history in histories for item in history], np.int64)
    return Histories(item, ends - [len(history) for history in histories], ends)


def draw_events(seed, people=30, items=12):
    generator = np.random.default_rng(seed)
    # The last item has no event, and the one before it one.
    had = [generator.integers(0, items - 2, generator.integers(1, 9)) for _ in range(people)]
    return make_events(*had, np.array([items - 2]), items=items)


def fill(kept, weights, items):
    """A matrix of some items as that of all."""
    dense = np.zeros((items, items), np.float32)
    dense[np.ix_(kept, kept)] = weights
    return dense


# Histories


def test_weights_of_a_history_by_hand():
    histories = make_histories([0, 1, 0], [], [2])
    assert histories.weigh(4, 0.5).toarray().tolist() == [[1.25, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert histories.weigh(4, 0.5, last=2).toarray().tolist() == [[1, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert histories.weigh(4, 1.0).toarray()[0].tolist() == [2, 1, 0, 0]
    assert [histories.take(slice(1, 3)).get(row).tolist() for row in range(2)] == [[], [2]]


@given(st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=1, max_size=6), st.sampled_from([0.5, 0.9, 1.0]))
@settings(max_examples=40, deadline=None)
def test_weights_are_those_of_a_loop(lists, decay):
    for last in (None, 3):
        expected = np.zeros((len(lists), 6))
        for row, history in enumerate(lists):
            for age, item in enumerate(reversed(history[-last:] if last else history)):
                expected[row, item] += decay**age
        found = make_histories(*lists).weigh(6, decay, last)
        np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6)


# What is counted


def test_events_of_items_by_hand():
    events = make_events([0, 1, 1], [1])
    assert events.count().tolist() == [1, 3, 0, 0]
    assert events.count(since=1).tolist() == [0, 2, 0, 0]


def test_what_follows_what_by_hand():
    events = make_events([0, 1, 2], [0, 2])
    # Window 2: the next counts 1, the one after it 1/2. 0 -> 1: 1; 0 -> 2: 1/2 + 1; 1 -> 2: 1. Nobody's 2 leads to the
    # next person's 0.
    raw = np.array([[0, 1, 1.5, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = count_following(events, 2).toarray()
    np.testing.assert_allclose(found, raw / np.sqrt(1 + raw.sum(axis=1, keepdims=True)), rtol=1e-6)
    before = count_preceding(events, 2).toarray()
    np.testing.assert_allclose(before, raw.T / np.sqrt(1 + raw.T.sum(axis=1, keepdims=True)), rtol=1e-6)
    assert count_following(events, 20).shape == (4, 4)  # longer than any history


@given(st.integers(0, 100), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_what_follows_what_is_that_of_a_loop(seed, window):
    events = draw_events(seed)
    raw = np.zeros((12, 12))
    for first in range(len(events.item)):
        for second in range(first + 1, min(len(events.item), first + window + 1)):
            if events.user[first] == events.user[second]:
                raw[events.item[first], events.item[second]] += 1 - (second - first - 1) / window
    expected = raw / np.sqrt(1 + raw.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(count_following(events, window).toarray(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_are_those_of_scikit_learn(seed):
    events = draw_events(seed)
    people = build_people(events).toarray()
    assert set(np.unique(people)) == {0, 1}, "who had an item twice had it"
    cosine = cosine_similarity(people.T)
    np.fill_diagonal(cosine, 0)
    np.testing.assert_allclose(count_neighbours(events, 0.0, 50).toarray(), cosine, atol=1e-6)
    common = people.T @ people
    shrunk = count_neighbours(events, 10.0, 50).toarray()
    np.testing.assert_allclose(shrunk, cosine * common / (common + 10), atol=1e-6)
    nearest = count_neighbours(events, 0.0, 2).toarray()
    assert (np.count_nonzero(nearest, axis=1) <= 2).all()
    np.testing.assert_allclose(np.sort(nearest, axis=1)[:, -2:], np.sort(cosine, axis=1)[:, -2:], atol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 200.0])
@pytest.mark.parametrize("seed", range(3))
def test_ease_is_its_closed_form(seed, penalty):
    events = draw_events(seed)
    people = build_people(events).toarray().astype(np.float64)
    kept = np.flatnonzero(people.sum(axis=0) >= 2)
    assert len(kept) < events.items
    inverse = np.linalg.inv(people[:, kept].T @ people[:, kept] + penalty * np.eye(len(kept)))
    expected = np.zeros((events.items, events.items))
    expected[np.ix_(kept, kept)] = np.eye(len(kept)) - inverse / np.diag(inverse)
    found = fill(*fit_ease(events, penalty), events.items)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert (np.diag(found) == 0).all(), "no item predicts itself"


def test_ease_rebuilds_better_than_any_matrix_near_it():
    events = draw_events(1)
    people = build_people(events).toarray().astype(np.float64)
    best = fill(*fit_ease(events, 5.0), events.items).astype(np.float64)

    def measure(weights):
        return ((people - people @ weights) ** 2).sum() + 5.0 * (weights**2).sum()

    generator = np.random.default_rng(0)
    kept = people.sum(axis=0) >= 2
    for _ in range(20):
        step = generator.normal(0, 0.02, best.shape) * np.outer(kept, kept) * (1 - np.eye(len(best)))
        assert measure(best + step) > measure(best)


def test_ease_of_events_that_nothing_is_shared_by_is_nothing():
    events = make_events([0], [1])
    assert not fill(*fit_ease(events, 50.0), events.items).any()
    assert not count_ease(events, 50.0, 2).nnz
    scores = fit("ease", events, penalty=50.0)(make_histories([0], []))
    assert scores.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]], "the popular, where it says nothing"


@pytest.mark.parametrize("seed", range(3))
def test_ease_among_its_own_items_is_ease_among_all(seed):
    """Bit for bit: what is zero adds nothing."""
    events = draw_events(seed)
    dense = fill(*fit_ease(events, 5.0), events.items)
    np.testing.assert_array_equal(count_ease(events, 5.0, 3).toarray(), keep_strongest(dense, 3).toarray())
    histories = make_histories([0, 3, 10, 3], [], [11], [5, 10, 1])
    popular = events.count() / events.count().max()
    for decay in (0.5, 1.0):
        scores = apply(histories.weigh(events.items, decay), dense)
        largest = np.abs(scores).max(axis=1, keepdims=True)
        wanted = scores + np.where(largest > 0, 1e-5 * largest, 1.0).astype(np.float32) * popular
        np.testing.assert_array_equal(fit("ease", events, penalty=5.0, decay=decay)(histories), wanted)


def test_ease_of_a_catalogue_of_which_little_is_bought_needs_no_room_for_the_rest():
    events = make_events(*[[0, 7, 99_999], [0, 99_999], [7, 0]] * 20, items=100_000)
    tracemalloc.start()
    scores = fit("ease", events)(make_histories([0]))
    strongest = count_ease(events, 50.0, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6, "all of the items by all of the items are 40 GB"
    assert set(np.argsort(-scores[0])[:3].tolist()) == {0, 7, 99_999}
    assert strongest.nnz == 6


def test_the_strongest_of_each_row_stay():
    matrix = np.array([[1.0, -3.0, 2.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]], np.float32)
    assert keep_strongest(matrix, 2).toarray().tolist() == [[0, -3, 2], [0, 0.5, 0], [0, 0, 0]]
    assert keep_strongest(matrix, 9).toarray().tolist() == matrix.tolist()
    many = np.tile(matrix, (700, 1))
    assert keep_strongest(many, 1).toarray().tolist() == [[0, -3, 0], [0, 0.5, 0], [0, 0, 0]] * 700


# Baselines


def fit(name, events, **given):
    counting = COUNTINGS[name]
    chosen = counting.list_settings()[0] | given
    return next(counting.fit_all(events, [chosen]))


def test_baselines_by_hand():
    now = 10 * DAY
    # Item 0 was popular long ago, item 3 is now.
    user = np.array([0, 0, 0, 1, 1, 2, 2])
    item = np.array([0, 1, 3, 0, 3, 0, 2])
    time = np.array([0, 1, 9 * DAY, 0, 9 * DAY, 0, 1])
    events = Events(user, item, time, 4, now)
    histories = make_histories([0], [1, 2, 1], [])

    def rank(name, row, **given):
        return np.argsort(-fit(name, events, **given)(histories)[row], kind="stable").tolist()

    assert rank("popular", 0) == rank("popular", 1) == [0, 3, 1, 2]
    assert rank("popular_week", 0)[:2] == [3, 0], "what nobody had in the week stands by all of its events"
    assert rank("own_history", 1, decay=0.8) == [1, 2, 0, 3]
    assert rank("own_history", 0) == [0, 3, 1, 2], "then what is popular"
    assert rank("co_occurrence", 0, window=5, decay=1.0) == [3, 1, 2, 0]  # 3 follows at 4/5 + 1, 1 and 2 at 1
    for name in COUNTINGS:
        assert rank(name, 2)[0] == (3 if name == "popular_week" else 0), "after nothing comes what is popular"


def test_weights_count_in_what_is_popular_and_in_nothing_else():
    plain = Events(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2]), np.array([0, 9, 9, 9]) * DAY, 4, 10 * DAY)
    weighted = replace(plain, weight=np.array([0.25, 0.5, 0.25, 3.0]))
    assert weighted.count().tolist() == [0.25, 0.75, 3.0, 0.0]
    assert weighted.count(3 * DAY).tolist() == [0.0, 0.75, 3.0, 0.0]
    assert weighted.count().dtype == np.float32
    np.testing.assert_array_equal(replace(plain, weight=np.ones(4)).count(), plain.count())
    histories = make_histories([0])
    for name in ("popular", "popular_week"):
        best = [int(np.argmax(fit(name, events)(histories)[0])) for events in (plain, weighted)]
        assert best == [1, 2]
    for count in (build_people, partial(count_following, window=5), partial(count_ease, penalty=1.0, neighbours=3)):
        np.testing.assert_array_equal(count(weighted).toarray(), count(plain).toarray())
    neighbours = (count_neighbours(events, 0.0, 3).toarray() for events in (plain, weighted))
    np.testing.assert_array_equal(*neighbours)


@pytest.mark.parametrize("name", list(COUNTINGS))
def test_what_a_baseline_says_of_a_history_does_not_depend_on_the_others(name):
    events = draw_events(4)
    histories = make_histories([0, 1], [2], [], [5, 5, 3])
    together = fit(name, events)(histories)
    assert together.dtype == np.float32
    assert together.shape == (4, 12)
    for row in range(4):
        np.testing.assert_allclose(fit(name, events)(histories.take(slice(row, row + 1)))[0], together[row], rtol=1e-6)


@pytest.mark.parametrize("name", list(COUNTINGS))
def test_fitting_several_settings_is_fitting_each(name):
    counting, events, histories = COUNTINGS[name], draw_events(5), make_histories([0, 1, 2], [3])
    settings_ = counting.list_settings()
    assert len({tuple(one.items()) for one in settings_}) == len(settings_)
    for one, fitted in zip(settings_, counting.fit_all(events, settings_), strict=True):
        np.testing.assert_array_equal(fitted(histories), next(counting.fit_all(events, [one]))(histories))
