"""What a recommender answers: a list, and why each item is in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN_CHARACTERS = 60
"""Of an item's text, in words for people."""
SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])(?<!\b(?:Mr|Ms|Dr|St|Jr|Sr|vs))(?<!\bMrs)\. ")
"""Not that of "Mr. Smith" or "a.k.a. 12 Monkeys"."""
SHOWN_FEATURES = 3
BOTH, SEQUENCE, POPULAR = "both", "sequence", "popular_week"
"""What put an item into its place: the trees over both stages, the sequence model, or what was popular of late."""


@dataclass(frozen=True)
class Because:
    """An item that the person had, and that speaks for a recommended one.

    Args:
        id, text: of the item.
        through: feature -> the share of it that comes from this item, in (0, 1].
    """

    id: str
    text: str
    through: Mapping[str, float]


@dataclass(frozen=True)
class Recommended:
    """One item of a list.

    Args:
        id, text: of the item.
        score: the higher the better; only scores with the same `by` can be compared.
        by: `both`, `sequence` or `popular_week`. Those by `sequence` stand behind those by `both`.
        because: what the person had that speaks for it, the strongest first.
        features: what each adds to the score (SHAP values), the largest first; empty without a second stage.
    """

    id: str
    text: str
    score: float
    by: str
    because: tuple[Because, ...] = ()
    features: Mapping[str, float] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """In words."""
        if self.by == POPULAR:
            return "popular in the last 7 days"
        had = " and ".join(shorten(reason.text or reason.id) for reason in self.because)
        carried = [name for name, value in self.features.items() if value > 0][:SHOWN_FEATURES]
        return "; ".join(part for part in (f"because you had {had}" if had else "", ", ".join(carried)) if part)

    def to_json(self) -> dict[str, Any]:
        """As `finetune recommend --json` prints it."""
        return {
            "id": self.id,
            "text": self.text,
            "score": self.score,
            "by": self.by,
            "why": self.why,
            "because": [{"id": one.id, "text": one.text, "through": dict(one.through)} for one in self.because],
            "features": dict(self.features),
        }


@dataclass(frozen=True)
class RankedList:
    """What one person is recommended.

    Args:
        items: the best first; fewer than asked for where no more meet the conditions.
        known: events of the history whose item the catalogue has.
        skipped: the others.
        unknown: some of their ids, each once.
    """

    items: tuple[Recommended, ...]
    known: int
    skipped: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def fallback(self) -> str | None:
        """`popular_week` where nothing is known of the person."""
        return None if self.known else POPULAR

    @property
    def notes(self) -> list[str]:
        """What the reader of the list should know, in sentences."""
        notes = []
        if self.skipped:
            which = ", ".join(self.unknown) + (", ..." if self.skipped > len(self.unknown) else "")
            count = self.known + self.skipped
            notes.append(f"{self.skipped:,} of {count:,} events name no item of the catalogue: skipped ({which}).")
        if not self.known:
            notes.append("Nothing is known of this person: these items were popular in the last 7 days of the events.")
        return notes

    def to_json(self) -> dict[str, Any]:
        """As `finetune recommend --json` prints it."""
        return {
            "items": [item.to_json() for item in self.items],
            "known": self.known,
            "skipped": self.skipped,
            "unknown": list(self.unknown),
            "fallback": self.fallback,
        }


def shorten(text: str) -> str:
    """The first sentence of an item's text, at most 60 characters: its title, as texts begin with it."""
    title = SENTENCE_END.split(text, maxsplit=1)[0]
    return title if len(title) <= SHOWN_CHARACTERS else f"{title[: SHOWN_CHARACTERS - 3]}..."
