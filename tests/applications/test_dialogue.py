"""Conversations and recorded dialogues."""

from __future__ import annotations

import json

import pytest

from finetune.applications.support import dialogue as module
from finetune.applications.support.dialogue import Dialogue, Session, Sessions, Turn, load_dialogues, replay
from finetune.errors import DataError


def write(tmp_path, *records):
    path = tmp_path / "dialogues.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_context_is_the_last_turns_newest_last():
    session = Session()
    for number in range(6):
        session.add("agent" if number % 2 else "customer", f"turn {number}\n" + "x" * 400)
    lines = session.context.split("\n")
    assert [line[:16] for line in lines] == [
        "Customer: turn 2",
        "Agent: turn 3 xx",
        "Customer: turn 4",
        "Agent: turn 5 xx",
    ]
    assert max(map(len, lines)) == len("Customer: ") + 300


def test_a_context_becomes_the_session_that_it_tells_of():
    context = "Customer: where is 12345?\nAgent: on its way\nand soon there\nCustomer: thanks"
    session = Session.from_context(context)
    assert session.turns == [
        Turn("customer", "where is 12345?"),
        Turn("agent", "on its way and soon there"),
        Turn("customer", "thanks"),
    ]
    assert session.customer_texts == ["thanks", "where is 12345?"]
    assert Session.from_context("").turns == []


def test_sessions_are_kept_by_name_and_the_silent_ones_forgotten(monkeypatch):
    monkeypatch.setattr(module, "KEPT_SESSIONS", 2)
    sessions = Sessions()
    first = sessions.find("a")
    sessions.find("b")
    assert sessions.find("a") is first
    sessions.find("c")
    assert sessions.find("a") is first  # b was silent for longer


def test_a_conversation_forgets_its_oldest_turns():
    session = Session()
    for number in range(100):
        session.add("customer", str(number))
    assert (session.turns[0].text, len(session.turns)) == ("60", 40)


def test_a_replay_goes_on_with_what_the_agent_had_said():
    dialogue = Dialogue("d", (Turn("agent", "Hello"), Turn("customer", "a"), Turn("agent", "b"), Turn("customer", "c")))
    seen = []

    def reply(text, session):
        seen.append(session.context)
        session.add("customer", text)
        session.add("agent", "own words")
        return text.upper()

    assert [answer for _, answer in replay(dialogue, reply)] == ["A", "C"]
    assert seen == ["Agent: Hello", "Agent: Hello\nCustomer: a\nAgent: b"]


def test_dialogues_of_a_file(tmp_path):
    path = write(
        tmp_path, {"id": "d1", "turns": [{"speaker": "customer", "text": "hi", "intent": "x", "entry": "e1 e2"}]}
    )
    assert load_dialogues(path, ["x"]) == [Dialogue("d1", (Turn("customer", "hi", "x", "e1 e2"),))]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], r"dialogue 1: must have a list of turns, got \[\]"),
        (["hi"], "dialogue 1, turn 1: must be an object with speaker and text, got 'hi'"),
        ([{"speaker": "bot", "text": "hi"}], "turn 1: speaker must be customer or agent, got 'bot'"),
        ([{"speaker": "agent"}], "turn 1: text must be text, got nothing"),
        (
            [{"speaker": "customer", "text": "hi", "intent": "retruns"}],
            "turn 1: intent must be left out, or one that the model knows, got 'retruns'. Did you mean 'returns'",
        ),
    ],
)
def test_what_is_refused(tmp_path, turns, words):
    with pytest.raises(DataError, match=words):
        load_dialogues(write(tmp_path, {"id": "d1", "turns": turns}), ["returns"])
