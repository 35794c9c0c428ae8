"""Conversations: what was said, what the assistant waits for, and recorded dialogues."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, cast

from finetune.data.files import Record, read_table
from finetune.data.turns import AGENT, CONTEXT_TURNS, CUSTOMER, write_turn
from finetune.errors import DataError
from finetune.recipe.messages import show, suggest

Speaker = Literal["customer", "agent"]
Answer = TypeVar("Answer")

KEPT_TURNS = 40
"""Of a conversation; older ones are forgotten."""
OPEN_TURNS = 3
"""Messages that may answer a question for a number, counted from the question."""
KEPT_SESSIONS = 10_000
"""Of one assistant; the one that was silent longest is forgotten first."""

_SPEAKERS: dict[str, Speaker] = {CUSTOMER: "customer", AGENT: "agent"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one of the two said."""

    speaker: Speaker
    text: str
    intent: str | None = None
    """What it should be understood as, in a recorded dialogue."""
    entry: str | None = None
    """Ids of the entries that answer it, parted by spaces, in a recorded dialogue."""


@dataclass(slots=True)
class Pending:
    """A question back that the next message may answer."""

    question: str
    """The customer's message that led to it."""
    intents: tuple[str, ...]
    """The two to choose from, or the one whose slots are asked for."""
    slot: str | None = None
    """What is asked for; None where the question is which intent."""
    confidence: float = 1.0
    """How sure the one intent was."""
    values: dict[str, str] = field(default_factory=dict)
    """Slots that are filled already."""
    choices: tuple[str, ...] = ()
    """The values of the slot that the question named."""
    context: str = ""
    """The dialogue before the customer's message."""
    age: int = 0
    """Messages that have not answered it."""


@dataclass(slots=True)
class Session:
    """One conversation."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    turns: list[Turn] = field(default_factory=list)
    pending: Pending | None = None

    @classmethod
    def from_context(cls, context: str) -> Session:
        """The conversation of lines "Customer: ..." and "Agent: ..."; other lines go on with the turn before."""
        session = cls()
        for line in context.splitlines():
            marker = next((marker for marker in _SPEAKERS if line.startswith(marker)), None)
            if marker:
                session.add(_SPEAKERS[marker], line.removeprefix(marker))
            elif session.turns and line.strip():
                former = session.turns.pop()
                session.add(former.speaker, f"{former.text} {line.strip()}")
        return session

    @property
    def context(self) -> str:
        """The last turns as lines "Customer: ..." and "Agent: ...", newest last; line ends in a turn become spaces."""
        names = {speaker: marker for marker, speaker in _SPEAKERS.items()}
        return "\n".join(write_turn(names[turn.speaker], turn.text) for turn in self.turns[-CONTEXT_TURNS:])

    @property
    def customer_texts(self) -> list[str]:
        """What the customer wrote, newest first."""
        return [turn.text for turn in reversed(self.turns) if turn.speaker == "customer"]

    def add(self, speaker: Speaker, text: str) -> None:
        """Put a turn at the end."""
        self.turns = [*self.turns, Turn(speaker, text)][-KEPT_TURNS:]


class Sessions:
    """The conversations of a service by their ids."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def find(self, name: str) -> Session:
        """The conversation of this id, a new one if there is none."""
        session = self._sessions.setdefault(name, Session(name))
        self._sessions.move_to_end(name)
        if len(self._sessions) > KEPT_SESSIONS:
            self._sessions.popitem(last=False)
        return session


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A recorded conversation."""

    id: str
    turns: tuple[Turn, ...]


def replay(dialogue: Dialogue, reply: Callable[[str, Session], Answer]) -> list[tuple[Turn, Answer]]:
    """Let an assistant answer the customer's turns of a recorded dialogue.

    Where the record has an agent's turn next, the conversation goes on with that instead of the assistant's answer, so
    that each turn is read after what the customer had in fact been told.

    Returns:
        Each turn of the customer with what `reply` answered.
    """
    session = Session(dialogue.id)
    answers: list[tuple[Turn, Answer]] = []
    answered = False  # the last turn of the session is the assistant's own
    for turn in dialogue.turns:
        if turn.speaker == "agent":
            if answered:
                session.turns.pop()
            session.add("agent", turn.text)
            answered = False
            continue
        answers.append((turn, reply(turn.text, session)))
        answered = True
    return answers


def load_dialogues(path: Path, intents: Collection[str]) -> list[Dialogue]:
    """Read recorded dialogues: {"id", "turns": [{"speaker", "text", "intent"?, "entry"?}]} a line.

    Args:
        path: the file.
        intents: what a turn may be labelled as.

    Raises:
        DataError: a file that cannot be trusted; a dialogue without turns, one with a turn that is none, or with an
            intent of another model.
    """
    dialogues = []
    for number, record in enumerate(read_table(path), start=1):
        where = f"{path}: dialogue {number}"
        turns = record.get("turns")
        if not (isinstance(turns, list) and turns):
            raise DataError(f"{where}: must have a list of turns, got {show(turns)}.")
        parts = tuple(_build_turn(turn, f"{where}, turn {place}", intents) for place, turn in enumerate(turns, start=1))
        dialogues.append(Dialogue(str(record.get("id") or number), parts))
    return dialogues


def _build_turn(record: object, where: str, intents: Collection[str]) -> Turn:
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be an object with speaker and text, got {show(record)}.")
    turn = cast("Record", record)
    speaker = turn.get("speaker")
    if speaker != "customer" and speaker != "agent":
        raise DataError(f"{where}: speaker must be customer or agent, got {show(speaker)}.")
    if not isinstance(turn.get("text"), str):
        raise DataError(f"{where}: text must be text, got {show(turn.get('text'))}.")
    intent = turn.get("intent")
    if intent is not None and intent not in intents:
        got = f"got {show(intent)}.{suggest(str(intent), intents)}"
        raise DataError(f"{where}: intent must be left out, or one that the model knows, {got}")
    return Turn(speaker, turn["text"], intent, turn.get("entry"))
