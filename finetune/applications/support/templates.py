"""The intents that the assistant knows: what each is called in words, and the template that answers it."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.applications.support.slots import MAX_FREE_CHARACTERS, find_values
from finetune.data.files import Record, list_names, read_table
from finetune.errors import DataError
from finetune.recipe.messages import show, suggest

KEYS = ("intent", "description", "template", "slots")


@dataclass(frozen=True, slots=True)
class Intent:
    """What a customer can want."""

    name: str
    description: str
    """In words that follow "Do you want to", such as "cancel an order"."""
    template: str | None
    """The answer, with slots in braces such as {order_id}; None where knowledge entries answer."""
    slots: tuple[str, ...]
    """Those of the template, each once, in its order."""


Intents = Mapping[str, Intent]


@dataclass(frozen=True, slots=True)
class Filling:
    """What is known of a template's slots."""

    values: dict[str, str]
    choices: dict[str, list[str]]
    """Slots for which the text names several values."""
    missing: list[str]
    """Slots without a value, those with several among them."""


def load_intents(path: Path, classes: Sequence[str]) -> dict[str, Intent]:
    """Read the intents of a file such as intents.jsonl: {"intent", "description", "template", "slots"} each.

    Args:
        path: the file.
        classes: what the model can say; the file must describe each once and nothing else.

    Raises:
        DataError: a file that cannot be trusted; or the first three of all problems in it.
    """
    records = read_table(path)
    missing = [key for key in KEYS if key not in records[0]]
    if missing:
        raise DataError(f"{path}: must have the columns {', '.join(KEYS)}, got {list_names(list(records[0]))}.")
    intents: dict[str, Intent] = {}
    problems: list[str] = []
    for number, record in enumerate(records, start=1):
        name = str(record["intent"] or "")
        found = _check_record(record, name, classes)
        if name in intents:
            found.append(f"intent must be described once, got {name!r} again.")
        problems += [f"line {number}: {problem}" for problem in found]
        if not found:
            template = record["template"] or None
            intents[name] = Intent(name, record["description"], template, tuple(_list_braces(template or "")))
    described = {str(record["intent"]) for record in records}
    if absent := [name for name in classes if name not in described]:
        problems.append(f"must describe every intent of the model, got none of {list_names(absent)}.")
    if problems:
        more = f"\n  and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError("\n  ".join([f"{path}: {len(problems)} problem(s)", *problems[:3]]) + more)
    return intents


def fill_slots(slots: Sequence[str], texts: Sequence[str], known: Mapping[str, str]) -> Filling:
    """What fills the slots: what is known already, else the one value in the newest text that has any.

    Args:
        slots: of a template.
        texts: what the customer wrote, newest first.
        known: values from answers to earlier questions.
    """
    values, choices, missing = dict(known), {}, []
    for slot in slots:
        if slot in values:
            continue
        found = find_values(slot, texts)
        if len(found) == 1:
            values[slot] = found[0]
            continue
        if found:
            choices[slot] = found
        missing.append(slot)
    return Filling(values, choices, missing)


def fill_template(intent: Intent, values: Mapping[str, str]) -> str:
    """The template with its slots filled. A value is put in as text: braces inside it mean nothing."""
    parts = []
    for literal, slot, _, _ in string.Formatter().parse(intent.template or ""):
        parts += [literal, values[slot][:MAX_FREE_CHARACTERS] if slot else ""]
    return "".join(parts)


def _check_record(record: Record, name: str, classes: Sequence[str]) -> list[str]:
    problems = []
    if name not in classes:
        problems.append(
            f"intent must be one that the model knows, got {show(record['intent'])}.{suggest(name, classes)}"
        )
    if not (isinstance(record["description"], str) and record["description"].strip()):
        problems.append(f"description must hold text, got {show(record['description'])}.")
    template, slots = record["template"] or "", record["slots"] or []
    if not isinstance(template, str):
        return [*problems, f"template must be text or null, got {show(template)}."]
    if not (isinstance(slots, list) and all(isinstance(slot, str) for slot in slots)):
        return [*problems, f"slots must be a list of names, got {show(slots)}."]
    try:
        braces = _list_braces(template)
    except ValueError as error:
        return [
            *problems,
            f"template must have slots such as {{order_id}}, got {error}. Write {{{{ for a brace itself.",
        ]
    if set(braces) != set(slots) or len(slots) != len(set(slots)):
        problems.append(f"slots must be those in the template's braces, {list_names(braces)}, got {list_names(slots)}.")
    return problems


def _list_braces(template: str) -> list[str]:
    """The names in braces, each once.

    Raises:
        ValueError: a brace without its other, or what is in them is no plain name.
    """
    names: dict[str, None] = {}
    for _, slot, form, conversion in string.Formatter().parse(template):
        if slot is None:
            continue
        if not slot.isidentifier() or form or conversion:
            raise ValueError(f"{{{slot}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}")
        names[slot] = None
    return list(names)
