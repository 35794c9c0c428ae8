"""The assistant on labelled questions, as customers would meet it.

Each question gets one reply, and that counts as one of four outcomes:

- right: the template of the question's own intent, also while it asks for what its slots need; a passage whose id is
  among the question's entries; for what is out of scope a hand-over. A passage that only suits the intent is not right.
- wrong: any other template or passage, and a request for the slots of another intent's template.
- handed_over: a hand-over of what is in scope.
- asked_back: a question back that names two intents, or that asks for words.

A customer who is asked which of two intents is meant is taken to choose the own one where it is named, and to be handed
over where it is not; what comes of that is the outcome `in_the_end`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from finetune.applications.support.assistant import Assistant, Reply
from finetune.applications.support.decision import NEVER, Numbers, Outcome, Signals
from finetune.applications.support.dialogue import Dialogue, Session, Turn
from finetune.applications.support.index import Found, KnowledgeIndex
from finetune.applications.support.reader import Reader, Reading
from finetune.errors import DataError
from finetune.evaluation.intervals import Estimate, Interval, Resampling, compute_interval, draw_weights
from finetune.evaluation.scoring import round_numbers

OUT_OF_SCOPE = "out_of_scope"
"""The label of a question that no intent fits."""
OUTCOMES = ("right", "wrong", "handed_over", "asked_back")

Judgement = Literal["right", "wrong", "handed_over", "asked_back"]


@dataclass(frozen=True, slots=True)
class Question:
    """A message and what should come of it."""

    text: str
    context: str
    """The dialogue before it, as lines "Customer: ..." and "Agent: ...", newest last."""
    intent: str | None
    """None out of scope."""
    entries: frozenset[str]
    """The ids of the entries that answer it; perhaps none does."""
    cluster: str
    """Questions of one cluster say the same in other words: the bootstrap draws clusters."""
    style: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """A question, what the assistant said, and how that counts."""

    question: Question
    reply: Reply
    judgement: Judgement
    in_the_end: Judgement
    """The same after a choice between two intents."""


def build_questions(rows: Sequence[Mapping[str, Any]], intents: Sequence[str]) -> list[Question]:
    """Questions out of rows with `text`, `intent` and perhaps `entry`, `context`, `cluster` and `style`.

    Raises:
        DataError: an intent that the model does not know.
    """
    questions = []
    for number, row in enumerate(rows, start=1):
        intent = str(row["intent"])
        if intent not in (*intents, OUT_OF_SCOPE):
            raise DataError(f"question {number}: intent must be one of the model's or {OUT_OF_SCOPE}, got {intent!r}.")
        questions.append(
            Question(
                text=str(row["text"]),
                context=str(row.get("context") or ""),
                intent=None if intent == OUT_OF_SCOPE else intent,
                entries=frozenset(str(row.get("entry") or "").split()),
                cluster=str(row.get("cluster") or f"row {number}"),
                style=str(row.get("style") or ""),
            )
        )
    return questions


def collect_evidence_of(
    index: KnowledgeIndex, reader: Reader, questions: Sequence[Question]
) -> tuple[list[Numbers], list[npt.NDArray[np.bool_]]]:
    """What speaks for the candidates of each question, (n, 5), and whether each of them answers, (n,)."""
    evidence, right = [], []
    for question in questions:
        context = Session.from_context(question.context).context
        first, found = index.examine(question.text, context, reader.read(question.text, context), reader)
        evidence.append(found)
        right.append(np.array([index.entries[number].id in question.entries for number in first]))
    return evidence, right


def collect_intent_evidence_of(
    index: KnowledgeIndex, reader: Reader, questions: Sequence[Question]
) -> tuple[list[Numbers], list[int]]:
    """What speaks for the intents of each question in scope, (K, 2), and the place of its own."""
    intents = list(reader.intents)
    asked = [(question, intents.index(question.intent)) for question in questions if question.intent is not None]
    evidence = [
        index.collect_intent_evidence(reader.read(question.text, Session.from_context(question.context).context))
        for question, _ in asked
    ]
    return evidence, [place for _, place in asked]


def collect_outcomes(assistant: Assistant, questions: Sequence[Question]) -> list[Outcome]:
    """What each action would have been worth for each question: read and searched once, for any threshold.

    The assistant's own threshold plays no part.
    """
    outcomes = []
    for question in questions:
        context = Session.from_context(question.context).context
        reading, found, signals = assistant.observe(question.text, context)
        outcomes.append(_weigh(assistant, question, reading, found, signals))
    return outcomes


def _weigh(
    assistant: Assistant, question: Question, reading: Reading, found: Sequence[Found], signals: Signals
) -> Outcome:
    context = Session.from_context(question.context).context
    ranked = [assistant.reader.intents[place] for place in assistant.rank_intents(reading)[:2]]
    chosen, chosen_right = 0.0, False
    if question.intent in ranked and question.intent is not None:
        if assistant.intents[question.intent].template is not None:
            chosen, chosen_right = NEVER, True
        elif then := assistant.find_chosen(question.text, context, question.intent):
            chosen, chosen_right = then[0].score, then[0].entry.id in question.entries
    return Outcome(
        signals=signals,
        template_right=signals.has_template and ranked[0] == question.intent,
        passage_right=bool(found) and found[0].entry.id in question.entries,
        chosen=chosen,
        chosen_right=chosen_right,
        in_scope=question.intent is not None,
    )


def answer_questions(assistant: Assistant, questions: Sequence[Question]) -> list[Answered]:
    """Ask each question in a conversation of its own, which begins with its context."""
    answered = []
    for question in questions:
        session = Session.from_context(question.context)
        reply = assistant.reply(question.text, session)
        last = reply
        if question.intent in reply.choices:
            last = assistant.reply(str(reply.choices.index(question.intent) + 1), session)
        in_the_end = judge(question, last)
        if last.choices:  # neither is meant
            in_the_end = "handed_over" if question.intent is not None else "right"
        answered.append(Answered(question, reply, judge(question, reply), in_the_end))
    return answered


def judge_turn(dialogue: Dialogue, turn: Turn, reply: Reply) -> Answered | None:
    """A reply to a recorded turn that says what it asks for; None where it does not.

    A question back ends as one: the record says what the customer answered to another.
    """
    if turn.intent is None:
        return None
    entries = frozenset((turn.entry or "").split())
    question = Question(turn.text, "", None if turn.intent == OUT_OF_SCOPE else turn.intent, entries, dialogue.id)
    judgement = judge(question, reply)
    return Answered(question, reply, judgement, judgement)


def judge(question: Question, reply: Reply) -> Judgement:
    """How a reply counts, as this module's first lines define it."""
    if reply.kind == "handover":
        return "handed_over" if question.intent is not None else "right"
    if reply.kind == "passage":
        return "right" if any(source.id in question.entries for source in reply.sources) else "wrong"
    if reply.kind == "template" or reply.missing:
        return "right" if question.intent is not None and reply.intent == question.intent else "wrong"
    return "asked_back"


def summarize(answered: Sequence[Answered], *, confidence: float, resamples: int, seed: int) -> dict[str, Any]:
    """End-to-end figures with their intervals.

    Args:
        answered: at least one.
        confidence: level of the intervals, such as 0.95.
        resamples: number of bootstrap resamples, which draw whole clusters.
        seed: fixes the resamples.

    Returns:
        `all`, `in_scope`, `out_of_scope` (each where there are any) and `styles` (name -> the same): `questions`, and
        the share of each outcome as {"value", "low", "high"}, and these `in_the_end`. Numbers are rounded to six
        digits; one cluster has no interval: None.
    """
    groups = {
        "all": list(answered),
        "in_scope": [each for each in answered if each.question.intent is not None],
        "out_of_scope": [each for each in answered if each.question.intent is None],
    }
    styles = sorted({each.question.style for each in answered} - {""})

    def count(part: Sequence[Answered]) -> dict[str, Any]:
        def share(outcomes: Sequence[Judgement]) -> dict[str, Interval]:
            return _compute_shares(part, outcomes, confidence=confidence, resamples=resamples, seed=seed)

        at_once, in_the_end = ([each.judgement for each in part], [each.in_the_end for each in part])
        return {"questions": len(part), **share(at_once), "in_the_end": share(in_the_end)}

    found = {
        **{name: count(part) for name, part in groups.items() if part},
        "styles": {style: count([each for each in answered if each.question.style == style]) for style in styles},
    }
    return dict(round_numbers(found))


def compute_curve(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """Selective accuracy against coverage (El-Yaniv & Wiener 2010), whatever the threshold.

    Each question is given its likelier answer, the template of the likeliest intent or the entry found first, with that
    answer's probability as its confidence. Out of scope every answer is wrong.

    Args:
        outcomes: of N questions.

    Returns:
        A point for each confidence that occurs, falling: `confidence`, `coverage` (the share of questions of that
        confidence or more) and `accuracy` (the share of these that is answered right).
    """
    confidences, right = np.zeros(len(outcomes)), np.zeros(len(outcomes))
    for place, outcome in enumerate(outcomes):
        signals = outcome.signals
        by_template = signals.has_template and signals.intent >= signals.passage
        confidences[place] = signals.intent if by_template else signals.passage
        right[place] = outcome.template_right if by_template else outcome.passage_right
    order = np.argsort(-confidences, kind="stable")
    confidences, right = confidences[order], right[order].cumsum()
    last = np.flatnonzero(np.append(confidences[1:] != confidences[:-1], True)[: len(outcomes)])
    return [
        {
            "confidence": float(confidences[place]),
            "coverage": (int(place) + 1) / len(outcomes),
            "accuracy": float(right[place]) / (int(place) + 1),
        }
        for place in last
    ]


def _compute_shares(
    answered: Sequence[Answered], judged: Sequence[Judgement], *, confidence: float, resamples: int, seed: int
) -> dict[str, Interval]:
    """The share of each outcome; a resample draws as many clusters as there are, each with all of its questions."""
    _, clusters = np.unique([each.question.cluster for each in answered], return_inverse=True)
    found = np.array([[each == outcome for each in judged] for outcome in OUTCOMES], dtype=np.float64)  # (4, N)
    weights = draw_weights(len(answered), Resampling(resamples, seed, clusters))
    drawn = [found @ block / block.sum(axis=0) for block in weights]
    samples: Numbers = np.concatenate([np.empty((len(OUTCOMES), 0)), *drawn], axis=1)  # none of one cluster
    values = found.mean(axis=1)
    return {
        outcome: compute_interval(Estimate(float(value), own), confidence)
        for outcome, value, own in zip(OUTCOMES, values, samples, strict=True)
    }
