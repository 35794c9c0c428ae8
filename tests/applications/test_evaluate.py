"""End-to-end figures: what counts as what, and that a threshold chosen on numbers is what the assistant then does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from finetune.applications.support.assistant import Reply, Source
from finetune.applications.support.decision import (
    NEVER,
    Costs,
    Outcome,
    Signals,
    choose_threshold,
    compute_mean_cost,
    decide,
)
from finetune.applications.support.evaluate import (
    Answered,
    Question,
    answer_questions,
    build_questions,
    collect_evidence_of,
    collect_outcomes,
    compute_curve,
    judge,
    summarize,
)
from finetune.applications.support.index import KnowledgeIndex
from finetune.applications.support.reader import RememberingReader
from finetune.errors import DataError

ROWS = [
    {"text": "cancel order 12345", "intent": "cancel_order", "style": "plain", "cluster": "c1"},
    {"text": "please stop order 12345", "intent": "cancel_order", "style": "plain", "cluster": "c1"},
    {"text": "cancel it", "intent": "cancel_order", "style": "short", "cluster": "c2"},
    {"text": "how do returns of shoes work", "intent": "returns", "entry": "returns-01 returns-02", "cluster": "c3"},
    {"text": "and within thirty days", "intent": "returns", "entry": "returns-01", "context": "Customer: return shoes"},
    {"text": "stop my mail", "intent": "change_email", "cluster": "c4"},
    {"text": "delivery of a green sofa upstairs", "intent": "delivery", "entry": "delivery-01"},
    {"text": "who won the match", "intent": "out_of_scope"},
    {"text": "cancel culture in music", "intent": "out_of_scope", "entry": None},
]


@pytest.fixture
def questions(reader):
    return build_questions(ROWS, reader.intents)


def question(intent=None, *entries):
    return Question("text", "", intent, frozenset(entries), "c")


def reply(kind, intent=None, entry=None, missing=()):
    sources = (Source(entry, "", 0.9, ""),) if entry else ()
    return Reply(kind, "text", 0.9, "why", intent=intent, sources=sources, missing=missing)


@pytest.mark.parametrize(
    ("asked", "said", "judgement"),
    [
        (question("a"), reply("template", "a"), "right"),
        (question("a"), reply("question", "a", missing=("order_id",)), "right"),
        (question("b"), reply("template", "a"), "wrong"),
        (question("b"), reply("question", "a", missing=("order_id",)), "wrong"),
        (question("a", "e1", "e2"), reply("passage", entry="e2"), "right"),
        (question("a", "e1"), reply("passage", entry="e2"), "wrong"),
        (question("a"), reply("passage", entry="e1"), "wrong"),
        (question("a"), reply("question"), "asked_back"),
        (question("a"), reply("handover"), "handed_over"),
        (question("a"), reply("handover", "a", missing=("order_id",)), "handed_over"),
        (question(None), reply("handover"), "right"),
        (question(None), reply("template", "a"), "wrong"),
        (question(None), reply("passage", entry="e1"), "wrong"),
        (question(None), reply("question"), "asked_back"),
    ],
)
def test_what_counts_as_what(asked, said, judgement):
    assert judge(asked, said) == judgement


def test_rows_become_questions(questions):
    assert questions[3].entries == {"returns-01", "returns-02"}
    assert (questions[7].intent, questions[7].entries, questions[7].cluster) == (None, frozenset(), "row 8")
    with pytest.raises(DataError, match="question 1: intent must be one of the model's or out_of_scope, got 'x'"):
        build_questions([{"text": "a", "intent": "x"}], ["y"])


def test_figures_by_hand(assistant, questions):
    answered = answer_questions(assistant, questions)
    assert [each.judgement for each in answered] == [
        *("right", "right", "right", "right", "right"),
        *("asked_back", "handed_over", "right", "wrong"),
    ]
    figures = summarize(answered, confidence=0.95, resamples=500, seed=0)
    assert figures["all"]["questions"] == 9
    assert figures["in_scope"]["right"]["value"] == pytest.approx(5 / 7)
    assert figures["in_scope"]["asked_back"]["value"] == figures["in_scope"]["handed_over"]["value"] == round(1 / 7, 6)
    assert figures["out_of_scope"]["wrong"]["value"] == 0.5
    assert figures["styles"]["short"]["questions"] == 1
    right = figures["in_scope"]["right"]
    assert 0 < right["low"] < right["value"] < right["high"] <= 1


def test_the_assistant_does_what_its_threshold_was_chosen_for(assistant, questions):
    """The cost by numbers alone is that of the replies, whatever the threshold."""
    outcomes = collect_outcomes(assistant, questions)
    costs = Costs()
    prices = {"right": 0.0, "wrong": costs.wrong, "handed_over": costs.handover}
    for sure in (assistant.sure, 0.4, 0.9, choose_threshold(outcomes, costs)):
        assistant.sure = sure
        answered = answer_questions(assistant, questions)
        for outcome, each in zip(outcomes, answered, strict=True):
            action = decide(outcome.signals, sure)
            kinds = {"template": {"template", "question"}, "question": {"question"}}.get(action, {action})
            assert each.reply.kind in kinds
            if action in ("template", "passage"):
                right = outcome.template_right if action == "template" else outcome.passage_right
                assert (each.judgement == "right") == right
        spent = [prices[each.in_the_end] + costs.question * (each.judgement == "asked_back") for each in answered]
        assert compute_mean_cost(outcomes, sure, costs) == pytest.approx(np.mean(spent))


def test_an_interval_draws_whole_clusters():
    """Copies of a question in its cluster say nothing new: the interval stays as wide as without them."""
    few = [
        Answered(
            replace(question("a"), cluster=str(i)),
            reply("template", "a" if i < 14 else "b"),
            *(["right" if i < 14 else "wrong"] * 2),
        )
        for i in range(20)
    ]
    many = [each for each in few for _ in range(10)]
    narrow = [replace(each, question=replace(each.question, cluster=str(i))) for i, each in enumerate(many)]
    wide, same, less = (
        summarize(rows, confidence=0.95, resamples=2000, seed=1)["all"]["right"] for rows in (few, many, narrow)
    )
    assert (wide["low"], wide["high"]) == (pytest.approx(same["low"]), pytest.approx(same["high"]))
    assert less["high"] - less["low"] < 0.5 * (wide["high"] - wide["low"])
    # 1.96 standard errors of a share of 0.7 among 20.
    assert (wide["high"] - wide["low"]) / 2 == pytest.approx(1.96 * np.sqrt(0.7 * 0.3 / 20), rel=0.1)
    one = summarize([replace(each, question=few[0].question) for each in few], confidence=0.95, resamples=9, seed=1)
    assert one["all"]["right"] == {"value": 0.7, "low": None, "high": None}, "one cluster has no interval"


def test_the_curve_by_hand():
    outcomes = [
        Outcome(Signals(0.0, 0.9, 0.9, 0.2, True), True, False, 0.0, False, True),  # 0.9, right
        Outcome(Signals(0.5, 0.45, 0.45, 0.1, True), True, False, 0.0, False, True),  # 0.45, right
        Outcome(Signals(0.0, 0.9, 0.9, 0.6, False), False, True, 0.0, False, True),  # by its passage: 0.6, right
        Outcome(Signals(0.0, 0.3, 0.3, 0.6, True), True, False, 0.0, False, True),  # 0.6, wrong
        Outcome(Signals(0.9, 0.09, 0.09, 0.01, True), False, False, 0.0, False, False),  # 0.09, out of scope
    ]
    points = compute_curve(outcomes)
    assert [list(point.values()) for point in points] == [
        pytest.approx(values) for values in ([0.9, 0.2, 1.0], [0.6, 0.6, 2 / 3], [0.45, 0.8, 3 / 4], [0.09, 1.0, 3 / 5])
    ]
    assert compute_curve([]) == []


def test_what_was_read_once_is_not_read_again(reader, entries):
    remembering = RememberingReader(reader)
    index = KnowledgeIndex.build(entries, remembering)
    questions = build_questions(ROWS, reader.intents)
    first = collect_evidence_of(index, remembering, questions)
    asked = len(reader.reranked)
    again = collect_evidence_of(index, remembering, questions)
    assert len(reader.reranked) == asked == len(questions)
    for one, other in zip(first[0], again[0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert remembering.fingerprint == reader.fingerprint


def test_evidence_is_of_the_candidates_and_their_truth(reader, entries):
    index = KnowledgeIndex.build(entries, reader)
    questions = build_questions(ROWS, reader.intents)
    for question, evidence, right in zip(questions, *collect_evidence_of(index, reader, questions), strict=True):
        assert evidence.shape == (len(right), 5)
        assert right.sum() == len(question.entries & {entry.id for entry in entries})


def test_what_follows_a_choice_is_what_the_outcome_says(assistant):
    rows = [
        {"text": "cancel or return", "intent": "delivery", "entry": "delivery-01"},  # neither is meant
        {"text": "cancel or return", "intent": "returns", "entry": "gifts-01"},  # another entry would be given
        {"text": "cancel or return", "intent": "returns", "entry": "returns-01"},
        {"text": "cancel or return", "intent": "cancel_order"},
        {"text": "cancel or return", "intent": "out_of_scope"},
    ]
    questions = build_questions(rows, assistant.reader.intents)
    outcomes = collect_outcomes(assistant, questions)
    assert [(outcome.chosen, outcome.chosen_right) for outcome in outcomes] == [
        *((0.0, False), (pytest.approx(0.5), False), (pytest.approx(0.5), True), (NEVER, True), (0.0, False)),
    ]
    in_two = 2 * np.exp(4) / (2 * np.exp(4) + 3)  # two intents of five have a word in the text
    assert all(outcome.signals.two == pytest.approx(0.95 * in_two) for outcome in outcomes)
    assistant.sure = 0.7
    answered = answer_questions(assistant, questions)
    assert {each.judgement for each in answered} == {"asked_back"}
    assert [each.in_the_end for each in answered] == ["handed_over", "handed_over", "handed_over", "right", "right"]
    figures = summarize(answered, confidence=0.95, resamples=100, seed=0)["in_scope"]
    assert (figures["asked_back"]["value"], figures["in_the_end"]["right"]["value"]) == (1.0, 1 / 4)
