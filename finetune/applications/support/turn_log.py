"""What was said and decided, one JSON object a line, without the personal data that has a form."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from finetune.applications.support.assistant import MAX_CHARACTERS, Reply
from finetune.applications.support.personal_data import mask_personal_data
from finetune.training.events import EventLog


class TurnLog:
    """Append-only log of turns; texts are masked before they reach the file."""

    def __init__(self, path: Path) -> None:
        self._events = EventLog(path)

    def write(self, session: str, text: str, reply: Reply) -> None:
        """Append one turn.

        Args:
            session: id of the conversation, which the caller chose: masked too.
            text: what the customer wrote, with no half of a surrogate pair in it.
            reply: what the assistant said, which may repeat it.
        """
        self._events.write(
            "turn",
            session=mask_personal_data(session, MAX_CHARACTERS),
            text=mask_personal_data(text, MAX_CHARACTERS),
            kind=reply.kind,
            reply=mask_personal_data(reply.text),
            confidence=reply.confidence,
            reason=mask_personal_data(reply.reason),
            intent=reply.intent,
            sources=[source.id for source in reply.sources],
            notes=list(reply.notes),
        )

    def close(self) -> None:
        """Close the file."""
        self._events.close()

    def __enter__(self) -> TurnLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
