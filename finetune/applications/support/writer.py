"""Answers that a model writes out of an entry, said only as far as the entry supports them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from finetune.applications.support.claims import check_claims
from finetune.data.knowledge import Entry
from finetune.errors import UsageError
from finetune.recipe.prompt import list_columns

if TYPE_CHECKING:
    from finetune.artifact.predictor import Predictor

MAX_NEW_TOKENS = 96
"""Of a reply: three or four sentences."""
COLUMNS = ("text", "context", "passage")
"""What a prompt may name: the message, what was said before, and what it is answered from."""


class Writer(Protocol):
    """A model that writes an answer out of a passage."""

    def write(self, text: str, context: str, passage: str) -> str:
        """The answer in its own words."""


class Composed(NamedTuple):
    """What is said of what was written, or None and why."""

    text: str | None
    problem: str


def compose_answer(writer: Writer, entry: Entry, text: str, context: str) -> Composed:
    """What the writer answers, if the entry supports all that it claims; see `check_claims`."""
    claims = check_claims(" ".join(writer.write(text, context, entry.passage).split()), entry.passage)
    if not claims:
        return Composed(None, "it claims nothing")
    if refused := next((claim for claim in claims if claim.problem), None):
        return Composed(None, f'of "{refused.sentence}", {refused.problem}')
    return Composed(" ".join(claim.sentence for claim in claims), "")


class TrainedWriter:
    """Writes the likeliest tokens, and the same each time; see `Writer`.

    Args:
        predictor: of a `completion` run.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        most = min(predictor.writing.max_new_tokens, MAX_NEW_TOKENS)
        self._section = predictor.writing.model_copy(
            update={"temperature": None, "top_k": None, "max_new_tokens": most}
        )

    def write(self, text: str, context: str, passage: str) -> str:
        """The answer."""
        columns = {"context": context, "passage": passage}
        return self._predictor.generate([text], self._section, columns=[columns])[0]


def load_reply_writer(run: str | Path) -> TrainedWriter:
    """The writer of a finished run.

    Raises:
        UsageError: no such run, one of another task type, or one whose prompt reads no passage or what a conversation
            does not have.
        ModelError: a damaged folder, or the base that its adapter needs is not at hand.
    """
    from finetune.artifact.load import load
    from finetune.artifact.predictor import Predictor
    from finetune.tasks import Completion

    loaded = load(run)
    if not isinstance(loaded, Predictor) or not isinstance(loaded.task, Completion):
        raise UsageError(
            f"{run}: a writer must be a run of type completion, got {loaded.task.type}. "
            "Train one: finetune run support_writer"
        )
    named = list_columns(loaded.task.prompt)
    if "passage" not in named or not set(named) <= set(COLUMNS):
        raise UsageError(
            f"{run}: the prompt of a writer must name passage, and of {', '.join(COLUMNS)} alone, got "
            f"{', '.join(named)}. Train it with another tasks.<name>.prompt."
        )
    return TrainedWriter(loaded)
