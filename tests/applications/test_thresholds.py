"""Thresholds against hand-worked costs and against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.applications.support import thresholds as module
from finetune.applications.support.thresholds import (
    NEVER,
    Costs,
    Outcome,
    Signals,
    Thresholds,
    choose_thresholds,
    compute_mean_cost,
    decide,
    load_thresholds,
    save_thresholds,
)
from finetune.errors import DataError, ResourceError, UsageError

COSTS = Costs(wrong=5, handover=1, question=0.5)


def make(outside=0.0, intent=0.0, passage=0.0, pair=0.0, *, template=None, found=False, chosen=None, in_scope=True):
    """An outcome; `template` is None where there is none, else whether it is right. `chosen`: how sure the answer after
    a choice is, and whether it is right; a template that is right by default."""
    signals = Signals(outside, intent, pair, passage, template is not None)
    return Outcome(signals, bool(template), found, *(chosen or (NEVER, True)), in_scope)


NEITHER = (0.0, False)


@pytest.mark.parametrize(
    ("signals", "action"),
    [
        (Signals(0.6, 1.0, 1.0, 1.0, True), "handover"),  # out of scope comes first
        (Signals(0.5, 0.8, 1.0, 1.0, True), "template"),
        (Signals(0.5, 0.8, 1.0, 0.7, False), "passage"),
        (Signals(0.5, 0.7, 1.0, 0.6, True), "question"),
        (Signals(0.5, 0.7, 0.8, 0.6, True), "handover"),
        (Signals(0.5, 0.8, 1.0, 0.6, False), "handover"),  # sure of the intent: asking for it would not help
    ],
)
def test_decisions_by_hand(signals, action):
    assert decide(signals, Thresholds(outside=0.5, intent=0.8, passage=0.7, pair=0.9)) == action


def test_the_threshold_of_templates_by_hand():
    # From the top: right, right, wrong, right. Two answers leave two hand-overs (2), four cost one mistake (5).
    rows = [(0.9, True), (0.8, True), (0.7, False), (0.6, True)]
    outcomes = [make(intent=p, template=right, chosen=NEITHER) for p, right in rows]
    chosen = choose_thresholds(outcomes, COSTS)
    assert chosen.intent == pytest.approx(0.75)  # halfway to the one that must not pass
    assert compute_mean_cost(outcomes, chosen, COSTS) == 2 / 4
    # Where a mistake costs less than the hand-over that answering saves, all are answered.
    cheap = Costs(wrong=0.9, handover=1, question=0.5)
    assert choose_thresholds(outcomes, cheap).intent == pytest.approx(0.6)


def test_out_of_scope_is_handed_over_by_its_own_threshold():
    outcomes = [
        make(0.1, 0.9, template=True),
        make(0.2, 0.9, template=True),
        make(0.6, 0.9, template=False, in_scope=False),
    ]
    chosen = choose_thresholds(outcomes, COSTS)
    assert chosen.outside == pytest.approx(0.4)
    assert compute_mean_cost(outcomes, chosen, COSTS) == 0


def test_a_question_back_is_worth_its_cost_only_where_it_names_what_is_meant():
    # Three of four questions help (4 x 0.5 + 1 hand-over = 3 against 4); with two of four nothing is gained (4).
    outcomes = [make(pair=0.8), make(pair=0.8), make(pair=0.8), make(pair=0.8, chosen=NEITHER)]
    assert choose_thresholds(outcomes, COSTS).pair == pytest.approx(0.8)
    assert choose_thresholds(outcomes[1:] + outcomes[3:], COSTS).pair == NEVER


def test_a_sure_intent_without_template_is_not_asked_about_by_hand():
    sure = make(intent=0.9, pair=0.95, chosen=NEITHER)  # handed over (1); asking about it would cost 1.5
    outcomes = [sure, make(intent=0.8, template=True), make(intent=0.5, pair=0.9)]
    chosen = choose_thresholds(outcomes, COSTS)
    assert compute_mean_cost(outcomes, chosen, COSTS) == pytest.approx((1 + 0 + 0.5) / 3)


def test_what_follows_a_choice_depends_on_the_threshold_of_entries_by_hand():
    # Two entries after a choice, one right at 0.7 and one wrong at 0.6; an entry found at once is wrong at 0.5.
    outcomes = [
        make(pair=0.8, chosen=(0.7, True)),
        make(pair=0.8, chosen=(0.6, False)),
        make(passage=0.5, chosen=NEITHER),
    ]
    # Asked (0.5) and answered; asked and handed over (1.5); handed over (1). Without asking 3 hand-overs cost the same.
    thresholds = Thresholds(outside=1.0, intent=NEVER, passage=0.65, pair=0.8)
    assert compute_mean_cost(outcomes, thresholds, COSTS) == pytest.approx(3 / 3)
    lower = Thresholds(outside=1.0, intent=NEVER, passage=0.55, pair=0.8)
    assert compute_mean_cost(outcomes, lower, COSTS) == pytest.approx((0.5 + 5.5 + 1) / 3)
    dearer = Costs(wrong=5, handover=1.2, question=0.5)
    chosen = choose_thresholds(outcomes, dearer)
    assert 0.6 < chosen.passage <= 0.7
    assert compute_mean_cost(outcomes, chosen, dearer) == pytest.approx((0.5 + 1.7 + 1.2) / 3)


PROBABILITIES = st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
OUTCOMES = st.builds(
    make,
    *[PROBABILITIES] * 4,
    template=st.sampled_from([None, False, True]),
    found=st.booleans(),
    chosen=st.tuples(st.sampled_from([0.0, 0.4, 0.8, NEVER]), st.booleans()),
    in_scope=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(OUTCOMES, min_size=1, max_size=6), st.sampled_from([COSTS, Costs(1, 3, 0.2)]))
def test_nothing_is_cheaper_among_all_combinations(outcomes, costs):
    values = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    combinations = itertools.product(values, *[[*values, NEVER]] * 3)
    least = min(compute_mean_cost(outcomes, Thresholds(*each), costs) for each in combinations)
    assert compute_mean_cost(outcomes, choose_thresholds(outcomes, costs), costs) == pytest.approx(least, abs=1e-9)


def test_of_equally_cheap_ones_the_most_cautious_is_taken():
    # Passages at 0.5 neither gain nor lose: 5 right and 1 wrong against 5 hand-overs (out of scope costs nothing).
    outcomes = [*[make(passage=0.5, found=True)] * 5, make(passage=0.5, in_scope=False)]
    assert choose_thresholds(outcomes, COSTS).passage == NEVER


def test_many_values_are_thinned(monkeypatch):
    monkeypatch.setattr(module, "MAX_VALUES", 10)
    outcomes = [make(intent=i / 1000, template=i > 600) for i in range(1000)]
    assert 0.6 <= choose_thresholds(outcomes, COSTS).intent <= 0.71  # the next tried one above the best


def test_what_is_saved_loads_as_the_same(tmp_path):
    outcomes = [make(intent=0.9, template=True)]
    chosen = choose_thresholds(outcomes, COSTS)
    save_thresholds(tmp_path / "t.json", chosen, COSTS, outcomes)
    assert load_thresholds(tmp_path / "t.json") == chosen


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match="must be chosen on validation questions, got none"):
        choose_thresholds([], COSTS)
    with pytest.raises(UsageError, match="the cost of handover must be 0 or more, got -1"):
        choose_thresholds([make()], Costs(handover=-1))
    with pytest.raises(ResourceError, match=r"t.json: must be a file of thresholds, got nothing there"):
        load_thresholds(tmp_path / "t.json")
    (tmp_path / "t.json").write_text('{"thresholds": {"intent": 1}}')
    with pytest.raises(ResourceError, match="must hold the thresholds outside, intent, passage, pair, got"):
        load_thresholds(tmp_path / "t.json")
    (tmp_path / "t.json").write_text('{"thresholds": {"intent": 1, "outside": "x", "pair": 1, "passage": 1}}')
    with pytest.raises(ResourceError, match="thresholds must be numbers, got"):
        load_thresholds(tmp_path / "t.json")
