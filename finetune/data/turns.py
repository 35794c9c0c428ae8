"""Turns of a dialogue as a row's context, and copies of rows behind a conversation about something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from finetune.data.rows import Row

CONTEXT = "context"
"""The role of what was said before a text: earlier turns of a dialogue, one a line, the last one at the end."""
CUSTOMER, AGENT = "Customer: ", "Agent: "
CONTEXT_TURNS = 4
"""How many of the last turns a model reads."""
CONTEXT_CHARACTERS = 300
"""Of each of these turns."""


def write_turn(marker: str, text: str) -> str:
    """A turn as a line of a context: line ends become spaces, and what is too long is cut."""
    return marker + " ".join(text.split())[:CONTEXT_CHARACTERS]


def add_subject_changes(rows: Sequence[Row], share: float, answers: Mapping[str, str], *, seed: int) -> list[Row]:
    """The rows, and behind them copies of some that follow a conversation about another row.

    The conversation is that of the other row: its context, its text, and the first entry that answers it. A copy keeps
    its labels, so that a model learns that what was said before need not matter.

    Args:
        rows: of the train split, N of them.
        share: of the rows without context that are copied, in [0, 1]; rounded to whole rows.
        answers: id -> text of the entries that a row's `entry` names; where it names none, the customer alone speaks.
        seed: which rows, and which conversations.
    """
    generator = np.random.default_rng(seed)
    alone = [row for row in rows if not row.values.get(CONTEXT)]
    chosen = np.sort(generator.permutation(len(alone))[: round(share * len(alone))])
    copies = []
    for i in chosen.tolist():
        other = rows[int(generator.integers(len(rows)))]
        values = {**alone[i].values, CONTEXT: _continue_context(other, answers)}
        copies.append(replace(alone[i], id=f"{alone[i].id}:turns", values=values))
    return [*rows, *copies]


def _continue_context(row: Row, answers: Mapping[str, str]) -> str:
    """What a customer and an agent said up to the answer of a row."""
    lines = [*str(row.values.get(CONTEXT) or "").splitlines(), write_turn(CUSTOMER, str(row.values["text"]))]
    entries = str(row.values.get("entry") or "").split()
    if entries and entries[0] in answers:
        lines.append(write_turn(AGENT, answers[entries[0]]))
    return "\n".join(lines[-CONTEXT_TURNS:])
