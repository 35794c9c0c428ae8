"""The assistant: one message in, one reply out, with how sure it is and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from finetune.applications.support.asides import Aside, find_aside
from finetune.applications.support.decision import Signals, decide
from finetune.applications.support.dialogue import OPEN_TURNS, Pending, Session
from finetune.applications.support.index import Found, KnowledgeIndex
from finetune.applications.support.personal_data import mask_personal_data
from finetune.applications.support.quotes import quote_answer
from finetune.applications.support.reader import Reader, Reading
from finetune.applications.support.relevance import Relevance
from finetune.applications.support.slots import MAX_FREE_CHARACTERS, describe_slot, find_kind, find_values, is_answer
from finetune.applications.support.templates import Intent, Intents, fill_slots, fill_template
from finetune.applications.support.writer import Writer, compose_answer
from finetune.data.knowledge import Entry
from finetune.data.ranking import split_words

Observed = tuple[Reading, list[Found], Signals]
Kind = Literal["template", "passage", "question", "handover"]

MAX_CHARACTERS = 2_000
"""Of a message; what follows is not read."""
SHOWN = 3
"""How many intents and entries a reply says that it considered."""

NO_WORDS = "I could not find any words in your message. What can I help you with?"
GREETING = "Hello. What can I help you with?"
WELCOME = "You are welcome. Is there anything else that I can help you with?"
WHAT_ABOUT = "What would you like to know about this, or what should be done?"
HAND_OVER = "I would rather let a colleague answer this. They will see our conversation and reply to you."
_CHOICES = [
    re.compile(
        rf"(?:please |i mean )?(?:(?:option |number |no (?=\d))?(?:{said})|(?:the )?(?:{th})(?: one)?)(?: please)?"
    )
    for said, th in (
        ("1|one", "first|1st"),
        ("2|two", "second|2nd"),
        ("3|three", "third|3rd"),
        ("4|four", "fourth|4th"),
    )
]
"""How a customer says which one of a list is meant, in the words of `split_words`."""
_COURTESIES: dict[Aside | None, str] = {"greeting": GREETING, "thanks": WELCOME}


@dataclass(frozen=True, slots=True)
class Source:
    """An entry that a reply quotes."""

    id: str
    title: str
    score: float
    """The probability that the entry answers the message."""
    quote: str


@dataclass(frozen=True, slots=True)
class Considered:
    """What a reply was chosen from."""

    outside: float
    """How much the message looks out of scope, in [0, 1]."""
    intents: tuple[tuple[str, float], ...]
    """The likeliest intents with their probabilities."""
    entries: tuple[tuple[str, float], ...]
    """The ids of the entries found first, each with the probability that it answers the message."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the assistant says."""

    kind: Kind
    """A filled template, a cited passage, a question back, or a hand-over to a person."""
    text: str
    confidence: float
    """In [0, 1]. Template: that the intent is right. Passage: that the entry answers. Question: that what it names is
    meant. Hand-over: that the message is out of scope, or that no answer at hand is right."""
    reason: str
    intent: str | None = None
    """The intent of a template, or of a question that asks for its slots."""
    sources: tuple[Source, ...] = ()
    """What the text quotes or was written from; empty but for passages."""
    is_composed: bool = False
    """Whether a writer wrote the text, rather than that it is quoted."""
    choices: tuple[str, ...] = ()
    """The intents that a question back names."""
    missing: tuple[str, ...] = ()
    """The slots that a question back asks for, the first of them now."""
    notes: tuple[str, ...] = ()
    """What else the customer should know."""
    considered: Considered | None = None
    """None where nothing was weighed, as for the answer to a question back."""

    def to_json(self) -> dict[str, Any]:
        """The reply as JSON values."""
        return asdict(self)


class Assistant:
    """Answers messages.

    Args:
        reader: the trained model.
        index: what is known, read by the same model.
        intents: what each of the model's intents is called, and its template.
        sure: the probability that an answer must reach.
        relevance: how sure an entry is, from what speaks for it; None for the reader's word alone.
        writer: writes answers from passages; without one, or where a passage does not support them, it is quoted.
    """

    def __init__(
        self,
        reader: Reader,
        index: KnowledgeIndex,
        intents: Intents,
        sure: float,
        relevance: Relevance | None = None,
        writer: Writer | None = None,
    ) -> None:
        self.reader, self.index, self.intents, self.sure = reader, index, intents, sure
        self.relevance, self.writer = relevance, writer

    def reply(self, text: str, session: Session) -> Reply:
        """Answer a message and put both into the session."""
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair, which JSON can hold, has no bytes
        length = len(text)
        text = text[:MAX_CHARACTERS]
        reply = self._answer(text, session)
        if length > MAX_CHARACTERS:
            note = f"Only the first {MAX_CHARACTERS:,} of {length:,} characters were read."
            reply = replace(reply, notes=(*reply.notes, note))
        session.add("customer", text)
        session.add("agent", reply.text)
        return reply

    def observe(self, text: str, context: str) -> Observed:
        """What is read and found, and the numbers that decide."""
        reading = self.reader.read(text, context)
        found = self.index.find(text, context, reading, self.reader, self.relevance)
        reading = self._consult_entries(reading)
        return reading, found, self.build_signals(reading, found)

    def find_chosen(self, text: str, context: str, intent: str) -> list[Found]:
        """The entries that answer a message of which the customer has said what it asks for."""
        reading = self.reader.read(text, context)
        certain = np.array([name == intent for name in self.reader.intents], dtype=np.float32)
        return self.index.find(text, context, replace(reading, scores=certain), self.reader, self.relevance)

    def build_signals(self, reading: Reading, found: Sequence[Found]) -> Signals:
        """The numbers that decide."""
        ranked = self.rank_intents(reading)
        inside = 1 - float(reading.outside)
        return Signals(
            outside=float(reading.outside),
            intent=inside * float(reading.scores[ranked[0]]),
            two=inside * min(1.0, float(reading.scores[ranked[:2]].sum())),
            passage=inside * (found[0].score if found else 0.0),
            has_template=self._name(ranked[0]).template is not None,
        )

    def rank_intents(self, reading: Reading) -> list[int]:
        """The places of the intents, the likeliest first."""
        return [int(place) for place in np.argsort(-reading.scores, kind="stable")]

    def _answer(self, text: str, session: Session) -> Reply:
        aside = find_aside(text)
        if not split_words(text):
            return Reply("question", NO_WORDS, 1.0, "The message has no words.")
        if aside in _COURTESIES:
            return Reply("question", _COURTESIES[aside], 1.0, "The message asks for nothing.")
        pending, session.pending = session.pending, None
        reply = self._answer_pending(text, session, pending) if pending else None
        if reply is None and aside == "value":
            reply = Reply("question", WHAT_ABOUT, 1.0, "The message names something and asks for nothing.")
        reply = reply or self._answer_anew(text, session, pending)
        is_over = reply.kind == "template" or session.pending is not None
        if pending and find_kind(pending.slot or "") and not is_over and pending.age + 1 < OPEN_TURNS:
            session.pending = replace(pending, age=pending.age + 1)  # the number may come after a word about it
        return reply

    def _answer_pending(self, text: str, session: Session, pending: Pending) -> Reply | None:
        """The reply to the answer to a question back; None where a message is none."""
        intents = [self.intents[name] for name in pending.intents]
        if pending.slot is None:
            chosen = _read_intent(text, intents)
            return self._answer_chosen(chosen, pending, session) if chosen else None
        value = self._read_slot(text, pending, session.context)
        if value:
            pending.values[pending.slot] = value
        elif find_aside(text) is None:
            return None
        return self._answer_template(intents[0], pending.confidence, text, session, pending)

    def _answer_anew(self, text: str, session: Session, pending: Pending | None) -> Reply:
        """The reply to a message that answers no question back.

        What was said before may outweigh a new subject: of two answers, with it and without, the surer is given. A
        message that names a number is not read without: a model takes it for what such numbers most often stood in.
        """
        context = session.context
        seen = self.observe(text, context)
        if context and mask_personal_data(text) == text:
            alone = self.observe(text, "")
            if 0 < self._rate(seen[2]) < self._rate(alone[2]):
                context, seen = "", alone
        reply = self._weigh(text, context, seen, session, pending)
        if context and _is_said(reply, session):
            reply = self._weigh(text, "", self.observe(text, ""), session, pending)
        if _is_said(reply, session):
            reason = "The same answer was given before, and the customer is not done."
            return Reply("handover", HAND_OVER, 1 - reply.confidence, reason, considered=reply.considered)
        return reply

    def _rate(self, signals: Signals) -> float:
        """How sure the answer is that these numbers lead to; 0 where they lead to none."""
        return {"template": signals.intent, "passage": signals.passage}.get(decide(signals, self.sure), 0.0)

    def _weigh(self, text: str, context: str, seen: Observed, session: Session, pending: Pending | None) -> Reply:
        """The reply to what `observe` saw in a message."""
        reading, found, signals = seen
        action = decide(signals, self.sure)
        ranked = [self._name(place) for place in self.rank_intents(reading)[:2]]
        if action == "template":
            reply = self._answer_template(ranked[0], signals.intent, text, session, pending)
        elif action == "passage":
            reply = self._answer_passage(found[0].entry, signals.passage, text, context)
        elif action == "question":
            reply = _ask_which(ranked, signals.two)
            names = tuple(intent.name for intent in ranked)
            session.pending = Pending(text, names, context=context)
        else:
            reply = self._hand_over(signals)
        return replace(reply, considered=self._describe(reading, found))

    def _answer_chosen(self, intent: Intent, pending: Pending, session: Session) -> Reply:
        """After a question back: the customer's choice is certain, what answers it may not be."""
        question, context = pending.question, pending.context
        if intent.template is not None:
            return self._answer_template(intent, 1.0, question, session, None)
        found = self.find_chosen(question, context, intent.name)
        confidence = found[0].score if found else 0.0
        if confidence >= self.sure:
            return self._answer_passage(found[0].entry, confidence, question, context)
        reason = f'You chose "{intent.description}", and no entry is sure to answer that.'
        return Reply("handover", HAND_OVER, 1 - confidence, reason)

    def _answer_template(
        self, intent: Intent, confidence: float, text: str, session: Session, pending: Pending | None
    ) -> Reply:
        """The filled template, or a question for its first slot that nothing fills."""
        same = pending is not None and pending.intents == (intent.name,)
        known = pending.values if pending and same else {}
        filling = fill_slots(intent.slots, [text, *session.customer_texts], known)
        if not filling.missing:
            reason = f'The intent is "{intent.description}".'
            return Reply("template", fill_template(intent, filling.values), confidence, reason, intent.name)
        slot = filling.missing[0]
        if pending and same and pending.slot == slot and filling.values == known:
            reason = f"The {describe_slot(slot)} was asked for and did not come."
            return Reply("handover", HAND_OVER, confidence, reason, intent.name, missing=tuple(filling.missing))
        choices = tuple(filling.choices.get(slot, ()))
        session.pending = Pending(text, (intent.name,), slot, confidence, filling.values, choices)
        reason = f'The intent is "{intent.description}"; its answer needs the {describe_slot(slot)}.'
        return Reply(
            "question", _ask_for(slot, choices), confidence, reason, intent.name, missing=tuple(filling.missing)
        )

    def _answer_passage(self, entry: Entry, confidence: float, text: str, context: str) -> Reply:
        quote = quote_answer(entry, text, context, self.reader)
        reply = Reply(
            "passage",
            quote,
            confidence,
            f"Entry {entry.id} answers this.",
            sources=(Source(entry.id, entry.title, confidence, quote),),
        )
        if self.writer is None:
            return reply
        said, problem = compose_answer(self.writer, entry, text, context)
        if said is None:
            return replace(
                reply, reason=f"{reply.reason} It is quoted, for the written answer did not stand: {problem}."
            )
        return replace(reply, text=said, is_composed=True, reason=f"{reply.reason} It supports what was written.")

    def _hand_over(self, signals: Signals) -> Reply:
        if signals.outside > 0.5:
            return Reply("handover", HAND_OVER, signals.outside, "The message looks out of scope.")
        confidence = max(signals.intent if signals.has_template else 0.0, signals.passage)
        return Reply("handover", HAND_OVER, 1 - confidence, "Neither an intent nor an entry is sure enough.")

    def _read_slot(self, text: str, pending: Pending, context: str) -> str | None:
        """What a message says of the slot that was asked for; None where it speaks of something else."""
        slot = pending.slot or ""
        if find_kind(slot):
            values = find_values(slot, [text], asked=True) if not pending.age or find_aside(text) else []
            value = values[0] if len(values) == 1 else None
            if value in pending.choices or (place := _read_place(text, len(pending.choices))) is None:
                return value
            return pending.choices[place]
        if not is_answer(text):
            return None
        reading = self._consult_entries(self.reader.read(text, context))
        likeliest = self.rank_intents(reading)[0]
        other = self._name(likeliest).name not in pending.intents
        is_sure = self.build_signals(reading, []).intent >= self.sure
        return None if other and is_sure else " ".join(text.split())[:MAX_FREE_CHARACTERS]

    def _consult_entries(self, reading: Reading) -> Reading:
        """The reading with what the entries say of the intents."""
        return replace(reading, scores=self.index.weigh_intents(reading))

    def _describe(self, reading: Reading, found: Sequence[Found]) -> Considered:
        places = self.rank_intents(reading)[:SHOWN]
        intents = tuple((self.reader.intents[place], float(reading.scores[place])) for place in places)
        entries = tuple((each.entry.id, each.score) for each in found[:SHOWN])
        return Considered(float(reading.outside), intents, entries)

    def _name(self, place: int) -> Intent:
        return self.intents[self.reader.intents[place]]


def _is_said(reply: Reply, session: Session) -> bool:
    is_answer = reply.kind in ("template", "passage")
    return is_answer and any(turn.speaker == "agent" and turn.text == reply.text for turn in session.turns)


def _ask_which(intents: Sequence[Intent], confidence: float) -> Reply:
    first, second = (intent.description for intent in intents)
    text = f"Which of these do you mean?\n1. {first}\n2. {second}"
    names = tuple(intent.name for intent in intents)
    return Reply("question", text, confidence, "Two intents are close.", choices=names)


def _ask_for(slot: str, choices: Sequence[str]) -> str:
    asked = describe_slot(slot)
    if choices:
        return f"You named more than one {asked}: {', '.join(choices)}. Which one do you mean?"
    return f"For that I need the {asked}. What is it?"


def _read_place(text: str, count: int) -> int | None:
    """The place, from 0, of the one of a list that a message chooses by its number."""
    said = " ".join(split_words(text))
    return next((place for place, form in enumerate(_CHOICES[:count]) if form.fullmatch(said)), None)


def _read_intent(text: str, intents: Sequence[Intent]) -> Intent | None:
    """The intent that a message chooses: by its number, its description, both, or its name."""
    place = _read_place(text, len(intents))
    if place is not None:
        return intents[place]
    said = " ".join(split_words(text))
    for number, intent in enumerate(intents, start=1):
        described = " ".join(split_words(intent.description))
        if said in (described, f"{number} {described}", intent.name, intent.name.replace("_", " ")):
            return intent
    return None
