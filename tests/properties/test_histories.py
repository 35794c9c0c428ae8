"""What a recommender is asked and may know: worked by hand, and what holds for any events."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune.data.histories import before, split_by_time, split_leave_one_out, train_mask
from finetune.data.interactions import Catalogue, Interactions, load_interactions
from finetune.errors import DataError


def make(events):
    """Interactions of (user, item, time), in the order of the file."""
    user, item, time = (np.array(values, np.int64) for values in zip(*events, strict=True))
    order = np.lexsort((time, user))
    items = tuple(f"i{number}" for number in range(int(item.max()) + 1))
    users = tuple(f"u{number}" for number in range(int(user.max()) + 1))
    known = Catalogue(items, items, {})
    return Interactions(users, known, user[order], item[order], time[order])


def show(data, requests):
    """(person, moment, items of the history, items of the answer) of each request."""
    rows = zip(*(getattr(requests, field.name).tolist() for field in fields(requests)), strict=True)
    return [
        (person, moment, data.item[start:end].tolist(), data.item[first:last].tolist())
        for person, moment, start, end, first, last in rows
    ]


# Ten events, sorted by time: 1 2 3 4 5 | 6 6 | 8 8 9
WORKED = [(0, 0, 1), (0, 1, 3), (0, 2, 6), (0, 3, 6), (0, 4, 9), (1, 5, 2), (1, 0, 4), (1, 1, 5), (1, 2, 8), (2, 9, 8)]


def test_cuts_in_time_worked_by_hand():
    data = make(WORKED)
    cuts, splits = split_by_time(data, validation=0.2, test=0.3)
    assert cuts == (6, 8)
    assert show(data, splits["validation"]) == [(0, 6, [0, 1], [2, 3])]  # one basket
    assert show(data, splits["test"]) == [
        (0, 9, [0, 1, 2, 3], [4]),  # the history goes on past the cut
        (1, 8, [5, 0, 1], [2]),
        (2, 8, [], [9]),  # new
    ]
    assert sorted(data.time[train_mask(data, splits, "validation", cuts)]) == [1, 2, 3, 4, 5]
    assert sorted(data.time[train_mask(data, splits, "test", cuts)]) == [1, 2, 3, 4, 5, 6, 6]


def test_leaving_one_out_worked_by_hand():
    data = make(WORKED)
    splits = split_leave_one_out(data)
    assert show(data, splits["validation"]) == [(0, 6, [0, 1, 2], [3]), (1, 5, [5, 0], [1])]
    assert show(data, splits["test"]) == [(0, 9, [0, 1, 2, 3], [4]), (1, 8, [5, 0, 1], [2])]
    assert data.item[train_mask(data, splits, "validation")].tolist() == [0, 1, 2, 5, 0, 9]
    assert data.item[train_mask(data, splits, "test")].tolist() == [0, 1, 2, 3, 5, 0, 1, 9]


@pytest.mark.parametrize("times", [[5] * 8, [1, 2, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 2, 2]])
def test_too_few_times_to_cut_at(times):
    data = make([(0, number, time) for number, time in enumerate(times)])
    with pytest.raises(DataError) as caught:
        split_by_time(data, 0.25, 0.25)
    assert str(caught.value) == (
        "events: must have different times before, between and after the cuts for validation 0.25 and test 0.25, got 8 "
        f"events at {len(set(times))} times. Use more events, or larger shares."
    )


EVENTS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 30)), min_size=12, max_size=80, unique=True
)
SHARES = st.sampled_from([0.1, 0.2, 0.3])


def split(events, *args, **keys):
    data = make(events)
    try:
        return data, *split_by_time(data, *args, **keys)
    except DataError:
        assume(False)
        raise


@settings(max_examples=150, deadline=None)
@given(EVENTS, SHARES, SHARES, st.integers(1, 4))
def test_nothing_of_the_future_is_known(events, validation, test, most):
    data, cuts, splits = split(events, validation, test, most)
    assert (data.time >= cuts[1]).mean() >= test - 1 / len(events)
    assert (data.time >= cuts[0]).mean() >= validation + test - 1 / len(events)
    assert (data.time > cuts[1]).mean() < test + 1 / len(events)
    windows = {"validation": (cuts[0], cuts[1]), "test": (cuts[1], data.time.max() + 1)}
    for held, (since, until) in windows.items():
        known = train_mask(data, splits, held, cuts)
        assert np.array_equal(known, before(data, since))
        assert known.any()
        assert data.time[known].max() < since
        asked = splits[held]
        assert len(asked)
        for row in range(len(asked)):
            mine, moment = data.user == asked.person[row], asked.moment[row]
            assert since <= moment < until
            history = np.arange(asked.start[row], asked.end[row])
            targets = np.arange(asked.target_start[row], asked.target_end[row])
            assert np.array_equal(history, np.flatnonzero(mine & (data.time < moment)))
            assert np.array_equal(targets, np.flatnonzero(mine & (data.time == moment)))
        assert np.bincount(asked.person).max() <= most


@settings(max_examples=100, deadline=None)
@given(EVENTS, SHARES, st.integers(1, 6), st.integers(0, 3))
def test_each_event_of_a_window_is_asked_for_once_unless_there_are_too_many(events, share, most, seed):
    data, cuts, splits = split(events, share, share, most, seed)
    for held, since, until in (("validation", *cuts), ("test", cuts[1], data.time.max() + 1)):
        asked = splits[held]
        spans = zip(asked.target_start, asked.target_end, strict=True)
        times_asked = np.bincount(np.concatenate([np.arange(*span) for span in spans]), minlength=len(data.time))
        inside = (data.time >= since) & (data.time < until)
        assert not times_asked[~inside].any()
        for person in np.unique(data.user[inside]):
            mine = inside & (data.user == person)
            moments = len(np.unique(data.time[mine]))
            assert (asked.person == person).sum() == min(moments, most)
            if moments <= most:
                assert (times_asked[mine] == 1).all()
        order = np.lexsort((asked.moment, asked.person))
        assert np.array_equal(order, np.arange(len(asked)))


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_leaving_one_out_hides_two_events_of_each_person(events):
    data = make(events)
    splits = split_leave_one_out(data)
    many = np.flatnonzero(np.bincount(data.user) >= 3)
    for held, place in (("validation", -2), ("test", -1)):
        asked = splits[held]
        assert np.array_equal(asked.person, many)
        for row, person in enumerate(many):
            mine = np.flatnonzero(data.user == person)
            assert np.array_equal(mine[:place], np.arange(asked.start[row], asked.end[row]))
            assert (asked.target_start[row], asked.target_end[row]) == (mine[place], mine[place] + 1)
    held = np.concatenate([splits["validation"].target_start, splits["test"].target_start])
    assert set(np.flatnonzero(~train_mask(data, splits, "validation"))) == set(held)
    assert set(np.flatnonzero(~train_mask(data, splits, "test"))) == set(splits["test"].target_start)


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(12, 60))
def test_order_of_the_file_changes_nothing_where_times_differ(tmp_path_factory, random, count):
    events = [(random.randrange(5), random.randrange(9), time) for time in random.sample(range(1000), count)]
    loaded = []
    for _ in range(2):
        path = tmp_path_factory.mktemp("events") / "events.csv"
        rows = (f"u{user},i{item},{time}\n" for user, item, time in random.sample(events, count))
        path.write_text("user,item,time\n" + "".join(rows), encoding="utf-8")
        loaded.append(load_interactions(str(path), {}))
    assert loaded[0].fingerprint == loaded[1].fingerprint
    (first, asked), (second, again) = (split_by_time(each.interactions, 0.2, 0.2, 2, seed=7) for each in loaded)
    assert first == second
    for held, requests in asked.items():
        for field in fields(requests):
            assert np.array_equal(getattr(requests, field.name), getattr(again[held], field.name))


def test_seed_draws_other_moments():
    data = make([(0, number % 7, number) for number in range(200)])
    drawn = [split_by_time(data, 0.2, 0.4, 5, seed)[1] for seed in (1, 1, 2)]
    moments = [splits["test"].moment.tolist() for splits in drawn]
    assert moments[0] == moments[1] != moments[2]
    assert len(moments[0]) == 5
    assert [moment - 80 for moment in moments[0]] != drawn[0]["validation"].moment.tolist()


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(1, 6))
def test_validation_asks_for_the_last_events_before_the_one_that_is_left_out(events, requests):
    data = make(events)
    splits = split_leave_one_out(data, requests)
    asked = splits["validation"]
    for person in np.flatnonzero(np.bincount(data.user) >= 3):
        mine = np.flatnonzero(data.user == person)
        count = min(requests, (len(mine) - 1) // 2)
        rows = np.flatnonzero(asked.person == person)
        assert asked.target_start[rows].tolist() == mine[-1 - count : -1].tolist()
        assert asked.end[rows].tolist() == asked.target_start[rows].tolist()
        assert set(asked.start[rows]) == {mine[0]}
    known = np.flatnonzero(train_mask(data, splits, "validation"))
    assert not set(known) & {*asked.target_start, *splits["test"].target_start}
