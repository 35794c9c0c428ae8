"""Changes, delays, false alarms and errors of shares on streams small enough to work out by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from scipy.stats import fisher_exact

from finetune.applications.monitor.records import Alert, Share
from finetune.applications.monitor.truth import Change, TrueWindow, find_changes, score_alerts, score_shares

START = datetime(2025, 1, 6, tzinfo=UTC)


def make_windows(*negatives: int, items: int = 10) -> list[TrueWindow]:
    return [TrueWindow(START + timedelta(days=i), count, items) for i, count in enumerate(negatives)]


def make_share(value: float, low: float = 0.0, high: float = 1.0, counted: float = 0.0, items: int = 10) -> Share:
    return Share(value, low, high, value, counted, items)


def make_alert(day: int, topic: str = "legal", cause: str = "share", level: str = "warning") -> Alert:
    start, share = START + timedelta(days=day), make_share(0.5)
    end = start + timedelta(days=1)
    return Alert(f"{topic}-{day}", topic, cause, level, start, end, share, share, 10.0, 10, "cusum", 5.0, 4.0)


QUIET, RAISED = [2, 3, 2, 1, 2, 2, 3, 1, 2, 2], [7, 8, 6, 7]


def test_a_change_lasts_from_its_first_window_to_its_last():
    windows = make_windows(*QUIET, *RAISED, 2, 1, 2)
    assert find_changes(windows, 0.3, 10) == [Change(10, 14, 0.2, 0.7)]
    # The last window before it is usual by itself, though the three from there on are not.
    assert sum(window.negatives for window in windows[9:12]) == 17


def test_a_rise_that_is_too_short_too_small_or_likely_by_chance_is_no_change():
    assert find_changes(make_windows(*QUIET, 8, 2, 2, 2), 0.3, 10) == []
    assert find_changes(make_windows(*QUIET, 4, 5, 4, 4), 0.3, 10) == []
    few = [*make_windows(*QUIET), *(TrueWindow(START + timedelta(days=10 + i), 1, 2) for i in range(3))]
    assert fisher_exact([[3, 3], [20, 80]], alternative="greater").pvalue > 0.001
    assert find_changes(few, 0.3, 10) == []


def test_what_is_usual_is_not_learned_from_a_change():
    windows = make_windows(*QUIET, *[7] * 12, 2, 2, 2, 7, 7, 7)
    assert find_changes(windows, 0.3, 10) == [Change(10, 22, 0.2, 0.7), Change(25, 28, 0.19, 0.7)]


def test_no_change_is_looked_for_before_there_is_a_reference():
    assert find_changes(make_windows(*QUIET[:4], *RAISED, *QUIET), 0.3, 10) == []


def test_empty_windows_begin_no_change_and_end_none():
    empty = TrueWindow(START, 0, 0)
    raised = make_windows(7, 7, 7)
    found = find_changes([*make_windows(*QUIET), empty, raised[0], empty, *raised[1:]], 0.3, 10)
    assert [(change.first, change.stop) for change in found] == [(11, 15)]


def test_chance_is_fisher_s_exact_test():
    """15 and 16 of 30 against 20 of 100."""
    for raised, is_change in (((5, 5, 5), False), ((5, 6, 5), True)):
        windows = make_windows(*QUIET, *raised)
        p = fisher_exact([[sum(raised), 30 - sum(raised)], [20, 80]], alternative="greater").pvalue
        assert (p <= 0.001) == is_change
        assert bool(find_changes(windows, 0.2, 10)) == is_change


def test_delay_counts_the_first_window_as_one():
    windows = make_windows(*QUIET, *RAISED, 2, 1, 2, 2, 1)
    found = score_alerts({"legal": windows}, [make_alert(12), make_alert(13, level="alarm")], 0.3, 10)
    (change,) = found["changes"]
    assert change == {
        "topic": "legal",
        "start": "2025-01-16T00:00:00+00:00",
        "windows": 4,
        "before": 0.2,
        "after": 0.7,
        "delay": 3,
    }
    assert (found["found"], found["delay"], found["false_alarms"]) == (1, 3.0, 0)


def test_false_alarms_are_those_outside_of_changes():
    windows = make_windows(*QUIET, *RAISED, 2, 1, 2, 2, 1)
    alerts = [
        make_alert(15),  # two windows after the end: still its own
        make_alert(16),  # three: false
        make_alert(17, level="recovery"),
        make_alert(18, cause="volume"),
        make_alert(12, topic="debt"),
    ]
    silent = make_windows(*[0] * 19, items=0)
    topics = {"legal": windows, "debt": make_windows(*QUIET, *[2] * 9), "product": silent}
    found = score_alerts(topics, alerts, 0.3, 10)
    assert (found["found"], found["delay"]) == (1, 6.0)
    assert found["false_alarms"] == 2
    assert found["quiet_windows"] == 3 + 9
    assert found["false_alarms_per_1000"] == pytest.approx(2000 / 12)


def test_a_missed_change_has_no_delay():
    found = score_alerts({"legal": make_windows(*QUIET, *RAISED)}, [], 0.3, 10)
    assert (len(found["changes"]), found["found"], found["delay"]) == (1, 0, None)
    assert found["false_alarms_per_1000"] is None, "every window behind the reference is of the change"


def test_errors_of_shares():
    pairs = [
        (make_share(0.25, 0.1, 0.4, counted=0.4), TrueWindow(START, 2, 10)),
        (make_share(0.5, 0.4, 0.6, counted=0.5), TrueWindow(START, 3, 10)),
        (make_share(0.9), TrueWindow(START, 0, 4)),  # too few items
        (make_share(0.9, items=0), TrueWindow(START, 0, 10)),  # nothing was read as this topic
    ]
    found = score_shares(pairs)
    assert (found["windows"], found["items"], found["coverage"]) == (2, 20, 0.5)
    assert found["corrected"] == pytest.approx((0.05 + 0.2) / 2) == found["checked"]
    assert found["counted"] == pytest.approx((0.2 + 0.2) / 2)
    assert score_shares([])["corrected"] is None
