"""The watcher by worked sequences, and what it may not confuse: worse news and more news."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

from finetune.applications.monitor.detectors import judge_streams
from finetune.applications.monitor.episodes import Episode
from finetune.applications.monitor.records import Tally
from finetune.applications.monitor.thresholds import SHARES, SIZES, Thresholds, list_choices
from finetune.applications.monitor.watcher import TopicWatcher, name_alert
from finetune.errors import ResourceError
from finetune.recipe.applications import MonitorSection

START, HOUR = datetime(2026, 3, 2, tzinfo=UTC), timedelta(hours=1)
SECTION = MonitorSection(reference_windows=16, false_alarm_windows=500, rise=0.1, cooldown_windows=6)
EVERYWHERE = np.ones((len(SIZES), len(SHARES)))
THRESHOLDS = Thresholds(
    {"warning": 5.5 * EVERYWHERE, "alarm": 8.0 * EVERYWHERE},
    {"warning": 3.0 * EVERYWHERE, "alarm": 3.8 * EVERYWHERE},
    {"warning": 4.0, "alarm": 5.5},
    list_choices(SECTION),
)


@pytest.fixture
def watcher(quantifier):
    return TopicWatcher(quantifier, THRESHOLDS, SECTION)


def watch(watcher, tallies, topic="banks", first=0):
    """(window, alert) of each alert."""
    found = []
    for i, tally in enumerate(tallies, first):
        share, alerts = watcher.judge(topic, START + i * HOUR, START + (i + 1) * HOUR, tally)
        assert share.items == tally.total
        found += [(i, alert) for alert in alerts]
    return found


def run_episode(exceeded, cooldown=2):
    """What an episode says of windows: W, A or - for what is exceeded, c for calm."""
    episode, words = Episode(), {"W": "warning", "A": "alarm"}
    said = [episode.advance(words.get(each), "cusum", each == "c", cooldown) for each in exceeded]
    return "".join({None: ".", "warning": "W", "alarm": "A", "recovery": "r"}[each] for each in said)


@pytest.mark.parametrize(
    ("exceeded", "said"),
    [
        ("cccc", "...."),
        ("WW-Wc-", "W...r."),  # said once, and over when it is calm, not when it is merely less
        ("WAAWc", "WA..r"),  # worse is said again
        ("AWWc", "A..r"),
        ("WcWWWc", "Wr.W.r"),  # kept back for two windows, then said
        ("WcWcc", "Wr..."),  # what was kept back has no recovery
        ("WcAcA", "WrAr."),  # a higher level is not kept back
        ("AcWWWc", "Ar.W.r"),  # a lower one is
    ],
)
def test_levels_cool_down_and_recovery_by_hand(exceeded, said):
    assert run_episode(exceeded) == said


def test_no_cool_down():
    assert run_episode("WcWc", cooldown=0) == "WrWr"


def test_the_share_of_a_few_items_is_not_judged(made, watcher):
    generator = np.random.default_rng(2)
    few = [made.draw_tally(generator, SIZES[0] - 1, share) for share in [0.0] * 16 + [1.0] * 12]
    assert watch(watcher, few) == []
    enough = [made.draw_tally(generator, SIZES[0], share) for share in [0.0] * 16 + [1.0] * 12]
    assert {alert.cause for _, alert in watch(watcher, enough, topic="enough")} == {"share"}


def test_worse_news_is_found_told_and_over(made, watcher):
    generator = np.random.default_rng(1)
    shares = [0.2] * 30 + [0.4] * 10 + [0.2] * 30
    found = watch(watcher, [made.draw_tally(generator, 100, share) for share in shares])
    assert {alert.cause for _, alert in found} == {"share"}
    assert [alert.level for _, alert in found] in (["warning", "alarm", "recovery"], ["alarm", "recovery"])
    window, alert = found[-2]
    assert 30 <= window <= 33
    assert (alert.start, alert.end) == (START + window * HOUR, START + (window + 1) * HOUR)
    assert alert.before.value == pytest.approx(0.2, abs=0.05)
    assert alert.before.low < alert.before.value < alert.before.high < alert.after.low
    assert alert.after.value == pytest.approx(0.4, abs=0.1)  # since the change, not this window alone
    assert window - 29 <= alert.after.items / 100 <= window - 26
    assert alert.statistic > alert.threshold
    assert (alert.volume_before, alert.volume_after) == (100, 100)
    assert 40 < found[-1][0] < 55
    assert found[-1][1].after.value < 0.3


def test_more_news_is_not_worse_news(made, watcher):
    generator = np.random.default_rng(2)
    sizes = [100] * 30 + [400] * 4 + [100] * 10
    found = watch(watcher, [made.draw_tally(generator, size, 0.2) for size in sizes])
    assert {(alert.cause, alert.test) for _, alert in found} == {("volume", "burst")}
    assert [(i, alert.level) for i, alert in found] == [(30, "alarm"), (34, "recovery")]
    assert (found[0][1].volume_before, found[0][1].volume_after) == (100, 400)


def test_worse_news_alone_is_no_burst_and_both_are_both(made, watcher):
    generator = np.random.default_rng(3)
    calm = [made.draw_tally(generator, 100, 0.2) for _ in range(25)]
    worse = watch(watcher, [*calm, *[made.draw_tally(generator, 100, 0.6) for _ in range(4)]], "worse")
    assert {alert.cause for _, alert in worse} == {"share"}
    both = watch(watcher, [*calm, *[made.draw_tally(generator, 400, 0.6) for _ in range(4)]], "both")
    assert {alert.cause for _, alert in both} == {"share", "volume"}


def test_better_news_and_less_news_are_no_alerts(made, watcher):
    generator = np.random.default_rng(4)
    tallies = [made.draw_tally(generator, *each) for each in [(100, 0.4)] * 25 + [(100, 0.1)] * 10 + [(10, 0.4)] * 10]
    assert watch(watcher, [*tallies, *[Tally()] * 10]) == []


def test_a_change_does_not_slip_into_what_is_usual_until_it_has_lasted(made, watcher):
    generator = np.random.default_rng(5)
    found = watch(watcher, [made.draw_tally(generator, 100, share) for share in [0.2] * 25 + [0.5] * 40])
    alarm = [alert for _, alert in found if alert.level == "alarm"]
    assert len(alarm) == 1
    window, end = found[-1]
    opened = found[0][0]
    assert (end.level, end.test, window) == ("recovery", "reference", opened + SECTION.reference_windows - 1)
    assert end.before.value == pytest.approx(0.2, abs=0.06)  # still the old one
    assert end.after.value == pytest.approx(0.5, abs=0.15)


def test_a_small_lasting_rise_is_found_by_the_ewma(made, quantifier):
    generator = np.random.default_rng(6)
    only_ewma = Thresholds(
        dict.fromkeys(("warning", "alarm"), 1000000.0 * EVERYWHERE),
        THRESHOLDS.ewma,
        THRESHOLDS.burst,
        THRESHOLDS.chosen_for,
    )
    watcher = TopicWatcher(quantifier, only_ewma, SECTION)
    found = watch(watcher, [made.draw_tally(generator, 200, share) for share in [0.2] * 20 + [0.28] * 15])
    assert found[0][1].test == "ewma"


def test_statistics_are_those_that_thresholds_are_simulated_with(made, quantifier):
    generator = np.random.default_rng(7)
    tallies = [made.draw_tally(generator, size, 0.2) for size in generator.poisson(60, 60)]
    tallies[20] = Tally()
    out_of_reach = Thresholds(
        *(dict.fromkeys(("warning", "alarm"), 1000000.0 * EVERYWHERE) for _ in range(2)),
        {"warning": 1e6, "alarm": 1e6},
        THRESHOLDS.chosen_for,
    )
    watcher = TopicWatcher(quantifier, out_of_reach, SECTION)
    cusum, _ = judge_streams(
        np.stack([tally.bins for tally in tallies])[:, None], quantifier.ratios, SECTION.reference_windows, SECTION.rise
    )
    assert cusum.max() > 0.5
    for i, tally in enumerate(tallies):
        watch(watcher, [tally], first=i)
        if i >= SECTION.reference_windows:
            assert watcher.to_state("banks")["cusum"] == pytest.approx(
                cusum[i - SECTION.reference_windows, 0], abs=1e-6
            )


def test_the_state_goes_through_json_and_on_alike(made, quantifier):
    generator = np.random.default_rng(8)
    # The reference varies more than by chance, so that its squares matter.
    windows = [(100, 0.05), (100, 0.35)] * 11 + [(100, 0.7)] * 5 + [(300, 0.2)] * 3 + [(0, 0.0)] * 2 + [(100, 0.2)] * 12
    tallies = [made.draw_tally(generator, *each) for each in windows]
    whole = TopicWatcher(quantifier, THRESHOLDS, SECTION)
    expected = watch(whole, tallies)
    assert expected
    interrupted, state = [], {}
    for i, tally in enumerate(tallies):
        fresh = TopicWatcher(quantifier, THRESHOLDS, SECTION)
        if state:
            fresh.set_state("banks", state)
        interrupted += watch(fresh, [tally], first=i)
        state = json.loads(json.dumps(fresh.to_state("banks"), allow_nan=False))
    assert interrupted == expected
    assert state == whole.to_state("banks")
    assert len(json.dumps(state)) < 30_000


def test_the_state_is_no_larger_after_many_windows(made, watcher):
    generator = np.random.default_rng(9)
    tallies = [made.draw_tally(generator, 50, 0.2) for _ in range(20)]
    for turn in range(10):
        watch(watcher, tallies, first=turn * 20)
    state = watcher.to_state("banks")
    assert len(state["reference"]) == 16
    assert len(state["waiting"]) <= 16


def test_topics_are_strangers(made, watcher):
    generator = np.random.default_rng(10)
    calm, bad = ([made.draw_tally(generator, 100, share) for _ in range(25)] for share in (0.2, 0.6))
    watch(watcher, calm, "calm")
    assert watch(watcher, [*calm[:20], *bad[:5]], "bad")
    assert watch(watcher, calm, "calm", first=25) == []


def test_windows_that_were_passed_over_begin_a_topic_anew(made, watcher):
    """One item that is dated far too early, and the silence behind it: what comes then is as much news as usual."""
    generator = np.random.default_rng(12)
    stray = [made.draw_tally(generator, 1, 0.2), *[Tally()] * 15]
    assert watch(watcher, stray) == []
    state = json.loads(json.dumps(watcher.to_state("banks")))
    usual = [made.draw_tally(generator, 60, 0.2) for _ in range(30)]
    assert watch(watcher, usual, first=99) == []
    watcher.set_state("banks", state)
    assert [(i, alert.cause) for i, alert in watch(watcher, usual, first=16)][:1] == [(16, "volume")]


def test_a_weekend_is_no_news(quantifier):
    """Hours of a stream that is busy by day and nearly silent at weekends, with what the recipe says by default."""
    section = MonitorSection()
    watcher = TopicWatcher(quantifier, replace(THRESHOLDS, chosen_for=list_choices(section)), section)
    generator, tallies = np.random.default_rng(13), []
    for hour in range(4 * 168):
        usual = 1 if hour // 24 % 7 >= 5 else 40 if 8 <= hour % 24 < 18 else 3
        tally = Tally()
        tally.bins[10] = generator.poisson(usual)
        tallies.append(tally)
    assert [alert.start for _, alert in watch(watcher, tallies) if alert.cause == "volume"] == []


def test_a_tally_may_be_used_again_by_the_caller(made, watcher):
    tally = made.draw_tally(np.random.default_rng(11), 100, 0.2)
    watch(watcher, [tally])
    kept = watcher.to_state("banks")
    tally.add(0.9, True)
    assert watcher.to_state("banks") == kept


def test_an_alerts_name_is_its_own():
    name = name_alert("s", "banks", START, "share", "alarm", "cusum")
    elsewhere = START.astimezone(timezone(timedelta(hours=5)))
    assert name == name_alert("s", "banks", elsewhere, "share", "alarm", "cusum")
    assert (
        len(
            {
                name,
                *(
                    name_alert(*each)
                    for each in [
                        ("t", "banks", START, "share", "alarm", "cusum"),
                        ("s", "bank", START, "share", "alarm", "cusum"),
                        ("s", "banks", START + HOUR, "share", "alarm", "cusum"),
                        ("s", "banks", START, "volume", "alarm", "cusum"),
                        ("s", "banks", START, "share", "warning", "cusum"),
                        ("s", "banks", START, "share", "alarm", "ewma"),
                    ]
                ),
            }
        )
        == 7
    )


def test_what_is_refused(quantifier, watcher):
    other = SECTION.model_copy(update={"rise": 0.2})
    with pytest.raises(ResourceError, match=r"must be chosen for \{.*'rise': 0.2\}, got some for \{.*'rise': 0.1\}"):
        TopicWatcher(quantifier, THRESHOLDS, other)
    with pytest.raises(ResourceError, match="the state of topic 'banks' must be what this watcher gave, got KeyError"):
        watcher.set_state("banks", {"reference": []})
    broken = watcher.to_state("banks") | {"waiting": [{"bins": [[99, 1]], "called": 0, "square": 0.0}]}
    with pytest.raises(ResourceError, match=r"got IndexError at .*Start with a new state file"):
        watcher.set_state("banks", broken)
