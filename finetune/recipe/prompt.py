"""A recipe's `prompt`: words, and the columns of a row between them."""

from __future__ import annotations

from string import Formatter
from typing import NamedTuple


class Piece(NamedTuple):
    """Words of the prompt, and the column that follows them; None at its end."""

    words: str
    column: str | None


def parse_prompt(prompt: str) -> list[Piece]:
    """The pieces of a prompt such as "Question: {text}"; `{{` and `}}` are braces themselves.

    Raises:
        ValueError: braces that do not close, or that hold more than the name of a column; the message says which.
    """
    try:
        parsed = list(Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"must name columns in braces, {{{{ and }}}} being braces themselves; {error}") from error
    for _, column, form, conversion in parsed:
        if column == "" or form or conversion or (column and not column.replace("_", "a").replace("-", "a").isalnum()):
            shown = f"{column}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            raise ValueError(f"must hold the name of a column between braces, got {{{shown}}}.")
    return [Piece(words, column) for words, column, _, _ in parsed]


def list_columns(prompt: str) -> list[str]:
    """The columns that a prompt names, each once."""
    return list(dict.fromkeys(piece.column for piece in parse_prompt(prompt) if piece.column))
