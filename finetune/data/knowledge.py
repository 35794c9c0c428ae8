"""What questions are answered from: the entries of a knowledge file, such as the questions and answers of an FAQ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune.data.card_files import read_card_entries
from finetune.data.catalog import card_names, describe_location, find_card_folder, load_card
from finetune.data.files import Record, list_names, list_places, read_table
from finetune.data.rows import to_text
from finetune.errors import DataError
from finetune.recipe.card import Card
from finetune.recipe.files import write_file_atomically
from finetune.recipe.messages import show, suggest

KEYS = ("id", "title", "text", "group")


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer, and what it is called."""

    id: str
    """Names it in rows and citations."""
    title: str
    """The question that it answers, or a heading; "" where it has none."""
    text: str
    """The answer, with its line breaks."""
    group: str | None = None
    """What it belongs to, such as a shop or a hotel: entries of one group are split together."""

    @property
    def passage(self) -> str:
        """What is searched: title and text, on one line."""
        return " ".join(f"{self.title} {self.text}".split())


def load_knowledge(reference: str, relative_to: Path | None = None) -> list[Entry]:
    """Read the entries that a recipe names.

    Args:
        reference: a card with `knowledge`, or a file of `id`, `text` and perhaps `title` and `group`, such as .jsonl.
        relative_to: the folder of the recipe; a relative path is tried against it, then against the working folder.

    Raises:
        DataError: nothing of that name, a file that cannot be trusted, an entry without id or text, or an id twice.
    """
    if reference in card_names():
        return load_card_knowledge(load_card(reference))
    places = list_places(reference, relative_to)
    path = next((place for place in places if place.exists()), places[-1])
    return build_entries(read_table(path), str(path))


def load_card_knowledge(card: Card) -> list[Entry]:
    """The entries of a card.

    Raises:
        DataError: the card names none, or its files are not at hand; and as `load_knowledge`.
    """
    if card.knowledge is None:
        raise DataError(f"{card.name}: must name its `knowledge` for tasks that look for entries, got none.")
    folder = find_card_folder(card)
    if folder is None:
        raise DataError(f"{card.name}: its knowledge must lie in a folder, got {describe_location(card)}.")
    return build_entries(read_card_entries(card, folder / card.knowledge), f"{card.name}: {card.knowledge}")


def build_entries(records: Sequence[Record], where: str) -> list[Entry]:
    """Entries out of records, after all of them were checked.

    Raises:
        DataError: the first three problems of each kind.
    """
    missing = [key for key in ("id", "text") if key not in records[0]]
    if missing:
        found = list(records[0])
        hint = suggest(missing[0], [key for key in found if key not in KEYS])
        raise DataError(f"{where}: must have the columns id and text, got {list_names(found)}.{hint}")
    entries, problems = [], []
    seen: dict[str, int] = {}
    for number, record in enumerate(records, start=1):
        try:
            values = {key: to_text(record.get(key), f"entry {number}: {key}") for key in KEYS}
        except DataError as error:
            problems.append(str(error))
            continue
        values = {key: _tidy(value) if key == "text" else " ".join(value.split()) for key, value in values.items()}
        for key in ("id", "text"):
            if not values[key]:
                problems.append(f"entry {number}: {key} must hold text, got {show(record.get(key))}.")
        if values["id"] and seen.setdefault(values["id"], number) != number:
            problems.append(f"entry {number}: id must be its own, got {values['id']!r} of entry {seen[values['id']]}.")
        entries.append(Entry(values["id"], values["title"], values["text"], values["group"] or None))
    if problems:
        more = f"\n  and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError("\n  ".join([f"{where}: {len(problems)} problem(s)", *problems[:3]]) + more)
    return entries


def compute_knowledge_fingerprint(entries: Sequence[Entry]) -> str:
    """SHA-256 over all that the entries say, in their order."""
    return hashlib.sha256(_to_jsonl(entries)).hexdigest()


def save_knowledge(entries: Sequence[Entry], path: Path) -> None:
    """Write entries as JSONL."""
    write_file_atomically(path, _to_jsonl(entries))


def _to_jsonl(entries: Sequence[Entry]) -> bytes:
    return "".join(json.dumps(asdict(entry)) + "\n" for entry in entries).encode()


def _tidy(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.split("\n")).strip()
