"""The threshold against hand-worked costs and against trying everything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.applications.support import decision as module
from finetune.applications.support.decision import (
    NEVER,
    Costs,
    Outcome,
    Signals,
    choose_threshold,
    compute_cost,
    compute_mean_cost,
    decide,
    load_threshold,
    save_decision,
)
from finetune.errors import DataError, ResourceError, UsageError

COSTS = Costs(wrong=5, handover=1, question=0.5)


def make(outside=0.0, intent=0.0, passage=0.0, two=None, *, template=None, found=False, chosen=None, in_scope=True):
    """An outcome; `template` is None where there is none, else whether it is right. `chosen`: how sure the answer after
    a choice is, and whether it is right; a template that is right by default."""
    signals = Signals(outside, intent, intent if two is None else two, passage, template is not None)
    return Outcome(signals, bool(template), found, *(chosen or (NEVER, True)), in_scope)


NEITHER = (0.0, False)


@pytest.mark.parametrize(
    ("signals", "action"),
    [
        (Signals(0.0, 0.7, 1.0, 1.0, True), "template"),
        (Signals(0.0, 0.7, 1.0, 0.7, False), "passage"),
        (Signals(0.0, 0.6, 0.7, 0.6, True), "question"),
        (Signals(0.0, 0.6, 0.6, 0.6, True), "handover"),
        (Signals(0.0, 0.7, 1.0, 0.6, False), "handover"),  # sure of the intent: asking for it would not help
    ],
)
def test_decisions_by_hand(signals, action):
    assert decide(signals, 0.7) == action


def test_the_threshold_by_hand():
    # From the top: right, right, wrong, right. Two answers leave two hand-overs (2), four cost one mistake (5).
    rows = [(0.9, True), (0.8, True), (0.7, False), (0.6, True)]
    outcomes = [make(intent=p, template=right) for p, right in rows]
    chosen = choose_threshold(outcomes, COSTS)
    assert chosen == pytest.approx(0.75)  # halfway to the one that must not pass
    assert compute_mean_cost(outcomes, chosen, COSTS) == 2 / 4
    # Where a mistake costs less than the hand-over that answering saves, all are answered.
    assert choose_threshold(outcomes, Costs(wrong=0.9, handover=1, question=0.5)) == pytest.approx(0.3)


def test_a_hand_over_out_of_scope_costs_nothing_and_an_answer_does():
    outside = make(0.4, intent=0.6, template=False, in_scope=False)
    assert compute_cost(outside, 0.7, COSTS) == 0
    assert compute_cost(outside, 0.6, COSTS) == 5


def test_a_question_back_is_worth_its_cost_only_where_it_names_what_is_meant():
    # Three of four questions help (4 x 0.5 + 1 hand-over = 3 against 4); with two of four nothing is gained (4).
    outcomes = [make(two=0.8), make(two=0.8), make(two=0.8), make(two=0.8, chosen=NEITHER)]
    assert choose_threshold(outcomes, COSTS) == pytest.approx(0.4)
    assert choose_threshold(outcomes[1:] + outcomes[3:], COSTS) == NEVER


def test_what_follows_a_choice_by_hand():
    right, wrong = make(two=0.8, chosen=(0.7, True)), make(two=0.8, chosen=(0.6, False))
    # Asked and answered; asked and handed over; asked and answered wrongly.
    assert compute_cost(right, 0.65, COSTS) == 0.5
    assert compute_cost(wrong, 0.65, COSTS) == 0.5 + 1
    assert compute_cost(wrong, 0.55, COSTS) == 0.5 + 5
    chosen = choose_threshold([right, right, right, wrong], COSTS)
    assert 0.6 < chosen <= 0.7


PROBABILITIES = st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
OUTCOMES = st.builds(
    make,
    *[PROBABILITIES] * 4,
    template=st.sampled_from([None, False, True]),
    found=st.booleans(),
    chosen=st.tuples(st.sampled_from([0.0, 0.4, 0.8, NEVER]), st.booleans()),
    in_scope=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OUTCOMES, min_size=1, max_size=6), st.sampled_from([COSTS, Costs(1, 3, 0.2)]))
def test_nothing_is_cheaper_at_any_threshold(outcomes, costs):
    least = min(compute_mean_cost(outcomes, i / 20, costs) for i in range(42))
    assert compute_mean_cost(outcomes, choose_threshold(outcomes, costs), costs) == pytest.approx(least, abs=1e-9)


def test_of_equally_cheap_ones_the_most_cautious_is_taken():
    # Passages at 0.5 neither gain nor lose: 5 right and 1 wrong against 5 hand-overs (out of scope costs nothing).
    outcomes = [*[make(passage=0.5, found=True)] * 5, make(passage=0.5, in_scope=False)]
    assert choose_threshold(outcomes, COSTS) == NEVER


def test_many_values_are_thinned(monkeypatch):
    monkeypatch.setattr(module, "MAX_VALUES", 10)
    outcomes = [make(intent=i / 1000, template=i > 600) for i in range(1000)]
    assert 0.6 <= choose_threshold(outcomes, COSTS) <= 0.71  # the next tried one above the best


def test_what_is_saved_loads_as_the_same(tmp_path):
    outcomes = [make(intent=0.9, template=True)]
    chosen = choose_threshold(outcomes, COSTS)
    save_decision(tmp_path / "d.json", chosen, COSTS, outcomes)
    assert load_threshold(tmp_path / "d.json") == chosen


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match="must be chosen on validation questions, got none"):
        choose_threshold([], COSTS)
    with pytest.raises(UsageError, match="the cost of handover must be 0 or more, got -1"):
        choose_threshold([make()], Costs(handover=-1))
    with pytest.raises(ResourceError, match=r"d.json: must say how sure is sure enough, got nothing there"):
        load_threshold(tmp_path / "d.json")
    (tmp_path / "d.json").write_text('{"sure": "x"}')
    with pytest.raises(ResourceError, match="sure must be a number, got 'x'"):
        load_threshold(tmp_path / "d.json")
