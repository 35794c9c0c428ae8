"""What comes in: items and what is none, windows and when they close, repeats and what is none."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.applications.monitor.items import MAX_LINE_BYTES, MAX_TEXT_CHARACTERS, ItemError, read_item
from finetune.applications.monitor.records import Item
from finetune.applications.monitor.repeats import Repeats
from finetune.applications.monitor.store import Store
from finetune.applications.monitor.windows import WindowPlan, to_time

NOON = datetime(2020, 4, 9, 12, tzinfo=UTC)
NOW = NOON.timestamp() + 3600
GOOD = {"id": "a", "time": "2020-04-09T12:00:00Z", "text": "Acme falls"}


def read(**fields):
    return read_item(json.dumps({**GOOD, **fields}).encode(), NOW)


# Items


def test_an_item_as_people_write_it():
    labels = {"sentiment": "negative"}
    line = {**GOOD, "id": 17, "source": "Wire", "ticker": "$ACME", "link": "https://example.org/1", "labels": labels}
    item = read_item(b"\xef\xbb\xbf" + json.dumps(line).encode() + b"\r", NOW).item
    assert item == Item("17", NOON, "Acme falls", "Wire", "$ACME", "https://example.org/1", labels)


@pytest.mark.parametrize(
    ("time", "notes"),
    [
        ("2020-04-09T12:00:00Z", ()),
        ("2020-04-09T14:00:00+02:00", ()),
        ("2020-04-09 07:00-05:00", ()),
        ("2020-04-09T12:00", ("zone assumed",)),
        (NOON.timestamp(), ()),
        (int(NOON.timestamp()), ()),
        (str(int(NOON.timestamp())), ()),
        ("1586433600.0", ()),
        ("Thu, 09 Apr 2020 14:00:00 +0200", ()),
        ("9 Apr 2020 12:00:00 GMT", ()),
        ("Thu, 09 Apr 2020 12:00:00 -0000", ("zone assumed",)),
    ],
)
def test_every_way_to_write_noon_is_noon_in_utc(time, notes):
    read_time = read(time=time)
    assert (read_time.item.time, read_time.item.time.tzinfo, read_time.notes) == (NOON, UTC, notes)


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"time": None}, "no time", "time must be there, got None."),
        ({"time": ""}, "no time", "time must be there, got ''."),
        ({"time": "yesterday"}, "bad time", "time must be ISO 8601, RFC 2822 or epoch seconds, got 'yesterday'."),
        ({"time": True}, "bad time", "time must be ISO 8601, RFC 2822 or epoch seconds, got True."),
        ({"time": float("nan")}, "bad time", "time must be ISO 8601, RFC 2822 or epoch seconds, got nan."),
        ({"time": -1e30}, "bad time", "time must be ISO 8601, RFC 2822 or epoch seconds, got -1e+30."),
        (
            {"time": "0001-01-01T00:00+14:00"},
            "bad time",
            "time must be ISO 8601, RFC 2822 or epoch seconds, got '0001-01-01",
        ),
        ({"time": 1586433600000}, "bad time", "time must be epoch seconds, got 1586433600000. Divide it by 1000."),
        ({"time": "1586433600000"}, "bad time", "time must be epoch seconds, got 1586433600000.0. Divide it by 1000."),
        (
            {"time": "Thu, 39 Apr 2020 12:00:00 GMT"},
            "bad time",
            "time must be ISO 8601, RFC 2822 or epoch seconds, got",
        ),
        ({"time": "2020-04-09T13:05:01Z"}, "in the future", "time must not be after now, got '2020-04-09T13:05:01Z'."),
        ({"text": " &nbsp; "}, "no text", "text must not be empty, got ' &nbsp; '."),
        ({"text": None}, "no text", "text must be text, got None."),
        ({"id": None}, "no id", "id must be text of 1 to 512 characters, got None."),
        ({"id": True}, "no id", "id must be text of 1 to 512 characters, got True."),
        ({"id": "a" * 513}, "no id", "got 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...."),
        ({"labels": "negative"}, "bad labels", "labels must be a class for each task, got 'negative'."),
    ],
)
def test_what_is_no_item_is_refused_in_words(fields, reason, words):
    with pytest.raises(ItemError) as refused:
        read(**fields)
    assert refused.value.reason == reason
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        (b"", "no JSON", "must be a JSON object, got ''."),
        (b"Acme falls", "no JSON", "must be a JSON object, got 'Acme falls'."),
        (b"[1]", "no JSON", "must be a JSON object, got [1]."),
        (b"[" * 9999, "no JSON", "must be a JSON object, got"),
        (b"9" * 9999, "no JSON", "must be a JSON object, got"),
        (b" " * (MAX_LINE_BYTES + 1), "too long", "must have at most 2,097,152 bytes, got more."),
    ],
)
def test_what_is_no_line_of_json_is_refused_in_words(line, reason, words):
    with pytest.raises(ItemError) as refused:
        read_item(line, NOW)
    assert (refused.value.reason, words in str(refused.value)) == (reason, True)


def test_a_publisher_may_be_five_minutes_ahead():
    assert read(time=NOW + 300).item.time.timestamp() == NOW + 300


def test_an_item_of_a_megabyte_is_cut_and_broken_bytes_are_replaced():
    long = read(text="falls " * 170_000)
    assert (len(long.item.text), long.notes) == (MAX_TEXT_CHARACTERS, ("text cut",))
    broken = read_item(json.dumps(GOOD).encode().replace(b"Acme", b"\xffcme"), NOW)
    assert (broken.item.text, broken.notes) == ("\ufffdcme falls", ("bytes replaced",))
    assert read(text="half \ud83d", id="\ud83d").item.text.encode("utf-8") == b"half ?"


def test_links_that_would_run_on_a_page_and_fields_of_another_kind_are_left_out():
    item = read(link="javascript:alert(1)", source=["x"], ticker=7).item
    assert (item.link, item.source, item.ticker) == (None, None, "7")
    assert read(link=" HTTPS://example.org ").item.link == "HTTPS://example.org"


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.dictionaries(
            st.sampled_from(["id", "time", "text", "labels", "link"]),
            st.one_of(
                st.none(),
                st.booleans(),
                st.integers(),
                st.floats(),
                st.text(max_size=20),
                st.lists(st.integers(), max_size=2),
            ),
        ),
    )
)
def test_nothing_but_an_item_or_a_reason_comes_out(content):
    try:
        item = read_item(content, NOW).item
    except ItemError as error:
        refused = error
    else:
        refused = None
        assert item.id
        assert item.time.tzinfo is UTC
        item.text.encode("utf-8")
    assert refused is None or str(refused).endswith(".")


# Windows


def close(plan, times, until=None):
    """Closed windows of a stream as (start, items), in minutes."""
    held: dict[int, int] = {}
    closed = []
    for time in times:
        if not plan.is_late(60 * time):
            plan.see(60 * time)
            held[plan.find_start(60 * time)] = held.get(plan.find_start(60 * time), 0) + 1
        for start in plan.close(sorted(held)):
            closed.append((start // 60, held.pop(start, 0)))
    if until is not None:
        closed += [(start // 60, held.pop(start, 0)) for start in plan.close(sorted(held), 60 * until)]
    return closed


def test_windows_close_in_order_when_nothing_is_waited_for_any_more():
    plan = WindowPlan(600, 300, max_silent=99)
    # 25 closes 0-10 and 10-20; 9 is late by then, 24 is not; 46 closes what ended by 41, with an empty window.
    assert close(plan, [3, 12, 1, 25, 9, 24, 46]) == [(0, 2), (10, 1), (20, 2), (30, 0)]
    assert plan.watermark == 41 * 60


def test_a_window_ends_before_its_end_and_times_before_1970_have_windows():
    plan = WindowPlan(600, 0, max_silent=9)
    assert [plan.find_start(at) for at in (599.999, 600, -0.001, -600)] == [0, 600, -600, -600]
    assert close(plan, [9.9, 10]) == [(0, 1)]


def test_a_gap_of_a_year_costs_no_more_than_the_windows_that_say_what_is_usual():
    plan = WindowPlan(60, 0, max_silent=3)
    year = 365 * 24 * 60
    closed = close(plan, [0.5, 1.5, 2.5, year + 0.5, year + 1.5])
    assert closed == [(0, 1), (1, 1), (2, 1), (3, 0), (4, 0), (5, 0), (year, 1)]
    assert plan.passed == year - 6


def test_before_it_is_known_what_is_usual_a_gap_costs_half_as_much():
    """An item that is dated far too early, at the head of a stream."""
    plan, year = WindowPlan(60, 0, max_silent=4), 365 * 24 * 60
    closed = close(plan, [0.5, *(year + minute + 0.5 for minute in range(4)), year + 12.5])
    assert closed == [(0, 1), (1, 0), (2, 0)] + [(year + minute, minute < 4) for minute in range(8)]
    plan.set_state({"newest": 1.0, "next_start": 2, "silent": 3, "passed": 4})  # of an earlier version
    assert plan.judged == 0


def test_the_end_of_the_input_closes_what_is_over():
    plan = WindowPlan(600, 600, max_silent=9)
    assert close(plan, [5, 15, 25], until=20) == [(0, 1), (10, 1)]
    assert plan.is_late(19 * 60)
    assert not plan.is_late(20 * 60)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 400), min_size=1, max_size=40), st.integers(0, 3), st.randoms(use_true_random=False))
def test_how_a_stream_is_cut_changes_nothing(times, max_silent, draw):
    whole, cut = (WindowPlan(600, 900, max_silent) for _ in range(2))
    expected = close(whole, times)
    held, closed = {}, []
    for time in times:
        if not cut.is_late(60 * time):
            cut.see(60 * time)
            held[cut.find_start(60 * time)] = held.get(cut.find_start(60 * time), 0) + 1
        if draw.random() < 0.4:  # a batch ends, perhaps with a crash
            closed += [(start // 60, held.pop(start, 0)) for start in cut.close(sorted(held))]
            state, cut = cut.to_state(), WindowPlan(600, 900, max_silent)
            cut.set_state(json.loads(json.dumps(state)))
    closed += [(start // 60, held.pop(start, 0)) for start in cut.close(sorted(held))]
    assert (closed, cut) == (expected, whole)


# Repeats

FALL = "Acme shares fall 5% after profit warning, analysts expect more cuts"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (FALL, FALL.upper() + "!", True),
        (FALL, FALL + " - Newswire", True),
        (FALL, f"UPDATE 2-{FALL}", True),
        (FALL, f"{FALL} (repeats)", True),
        (FALL, f"(Reuters) - {FALL} | CNBC", True),
        (FALL, f"BREAKING: {FALL} via Benzinga", True),
        (FALL, f"{FALL} - Kontor Daily", True),  # the item's own source
        (FALL, f"{FALL} - Another Daily", False),
        ("Reuters cuts jobs in its home market", "Bloomberg cuts jobs in its home market", False),
        ("Reuters", "Bloomberg", False),
        (
            "Brakelund to take over Modavera for 4 billion dollars in cash, say people close to the talks",
            "Modavera to take over Brakelund for 4 billion dollars in cash, say people close to the talks",
            False,
        ),
        (
            "Third quarter at Brakelund: profit up 5 percent, revenue down 3 percent, outlook confirmed by the board",
            "Third quarter at Brakelund: profit up 3 percent, revenue down 5 percent, outlook confirmed by the board",
            False,
        ),
        (
            "Regulator clears the merger of Brakelund and Modavera after a review of eighteen months",
            "Regulator unlikely clears the merger of Brakelund and Modavera after a review of eighteen months",
            False,
        ),
        (
            "Brakelund cuts its forecast for the year after weak sales in the home market of the group",
            "Brakelund cuts its forecast for the year after weak sales in the home market of the group, shares plunge",
            False,
        ),
        (FALL, f"  {FALL.replace('&', '&amp;')} https://example.org/7", True),
        (FALL, FALL.replace("5%", "6%"), False),
        (FALL, FALL.replace("fall", "rise"), False),
        (FALL, FALL.replace("expect", "do not expect"), False),
        (FALL, FALL + " $BETA", False),
        ("Acme and Beta agree on a merger, sources say", "Acme and Beta agree on a merger & a loan", False),
        ("Ok", "ok.", True),
        (
            "利润警告后股价下跌百分之五,分析师预计还会进一步下调",
            "利润警告后股价下跌百分之五,分析师预计还会进一步下调。",
            True,
        ),
    ],
)
def test_what_is_a_copy_of_a_text_and_what_is_other_news(tmp_path, first, second, expected):
    with Store(tmp_path / "s.db") as store, store.transaction():
        repeats = Repeats(store.connection)
        assert repeats.is_new(Item("a", NOON, first), NOW, is_kept=True)
        assert repeats.is_new(Item("b", NOON, second, "Kontor Daily"), NOW, is_kept=True) is not expected
        assert not repeats.is_new(Item("a", NOON, "Quite another text"), NOW, is_kept=True)


def test_what_is_old_or_too_much_is_forgotten_and_deleted(tmp_path):
    with Store(tmp_path / "s.db") as store, store.transaction():
        repeats = Repeats(store.connection, seconds=3600, items=3)
        start = NOON.timestamp()
        assert repeats.is_new(Item("a", to_time(start), "Acme opens a plant"), start, is_kept=True)
        assert not repeats.is_new(Item("b", to_time(start), "Acme opens a plant"), start + 3600, is_kept=True)
        assert repeats.is_new(Item("b", to_time(start + 3601), "Acme opens a plant"), start + 3601, is_kept=True)
        for number in range(3):
            assert repeats.is_new(
                Item(f"c{number}", to_time(start + 3601), f"{number} more"), start + 3601, is_kept=True
            )
        assert repeats.is_new(Item("b", to_time(start + 3601), "Acme opens a plant"), start + 3601, is_kept=False)
        repeats.forget(start + 3601)
        rows = store.connection.execute("SELECT text FROM remembered ORDER BY number").fetchall()
        assert rows == [("0 more",), ("1 more",), ("2 more",)]
        orphans = "SELECT count(*) FROM keys WHERE number NOT IN (SELECT number FROM remembered)"
        assert store.connection.execute(orphans).fetchone() == (0,)
