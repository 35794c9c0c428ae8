"""The files of the DSTC challenges on answering from FAQs: dialogues with labels -> rows, a knowledge file -> entries.

DSTC9 track 1 (arXiv:2006.03533) and DSTC11 track 5 (arXiv:2305.12091). Reviews, which DSTC11 has too, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.files import Record, read_json
from finetune.errors import DataError
from finetune.recipe.messages import show

SPEAKERS = {"U": "Customer", "S": "Agent"}
SMALL_WORDS = {"and", "by", "of", "the"}
AGAIN = "Get the files again."


def read_dialogues(paths: Sequence[Path]) -> list[Record]:
    """Rows out of the turns that an FAQ answers, in the order of the file.

    Args:
        paths: the dialogues and their labels; or the labels alone, whose responses then are the texts.

    Returns:
        `text`: the last turn, a customer's; `context`: what came before it, a line a turn; `entry`: ids of the entries
        that answer it, parted by a space; `entity`: the place that it is about, such as `hotel/11`; `response`: what a
        person answered. Places that one row asks about together go by the name of the first of them in every row, so
        that no place is in two splits when rows are split by this column.

    Raises:
        DataError: the files do not go together, are damaged, or hold no such turn.
    """
    *logs, labels = [(path, _read_list(path)) for path in paths]
    if logs and len(logs[0][1]) != len(labels[1]):
        got = f"{len(logs[0][1]):,} and {len(labels[1]):,}"
        raise DataError(f"{labels[0]}: must have a label for each dialogue of {logs[0][0].name}, got {got}. {AGAIN}")
    records, entities = [], []
    for number, label in enumerate(labels[1]):
        where = f"{labels[0]}: entry {number + 1}"
        entries = list(dict.fromkeys(_list_entries(label, where)))
        if not entries:
            continue
        response = _get_text(label, "response", where)
        said = _read_turns(logs[0][1][number], f"{logs[0][0]}: entry {number + 1}") if logs else {"text": response}
        records.append({**said, "entry": " ".join(map("/".join, entries)), "response": response})
        entities.append([f"{domain}/{entity}" for domain, entity, _ in entries])
    if not records:
        raise DataError(f"{labels[0]}: must hold turns that an FAQ answers, got none of {len(labels[1]):,}. {AGAIN}")
    return [record | {"entity": name} for record, name in zip(records, _name_together(entities), strict=True)]


def read_entries(path: Path) -> list[Record]:
    """The FAQs of a knowledge file, domain > entity > question and answer, as records of `knowledge.build_entries`.

    The title begins with the name of the place: users say it, and most questions leave it out.

    Raises:
        DataError: the file is damaged, or holds no FAQ.
    """
    records = []
    for domain, entities in _items(read_json(path), f"{path}"):
        for entity, content in _items(entities, f"{path}: {domain}"):
            where = f"{path}: {domain}/{entity}"
            if not isinstance(content, dict):
                raise DataError(f"{where}: must be a JSON object, got {show(content)}. {AGAIN}")
            name = _write_name(str(content.get("name") or domain))
            for number, faq in _items(content.get("faqs", content.get("docs")), f"{where}: its FAQs"):
                place = f"{where}/{number}"
                question, answer = (
                    _get_text(faq, next((key for key in keys if isinstance(faq, dict) and key in faq), keys[0]), place)
                    for keys in (("question", "title"), ("answer", "body"))
                )
                group = f"{domain}/{entity}"
                records.append(
                    {"id": f"{group}/{number}", "title": f"{name}: {question}", "text": answer, "group": group}
                )
    if not records:
        raise DataError(f"{path}: must hold FAQs, got none. {AGAIN}")
    return records


def _read_list(path: Path) -> list[Any]:
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: must be a JSON list, got {show(content)}. {AGAIN}")
    return content


def _list_entries(label: Any, where: str) -> Iterator[tuple[str, str, str]]:
    """(domain, entity, document) of each FAQ that a label names."""
    if not isinstance(label, dict) or not isinstance(label.get("target"), bool):
        raise DataError(f"{where}: must be an object with `target` true or false, got {show(label)}. {AGAIN}")
    if not label["target"]:
        return
    sources = label.get("knowledge")
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise DataError(f"{where}: knowledge must be a list of objects, got {show(sources)}. {AGAIN}")
    for source in sources:
        if source.get("doc_type", "faq") != "faq":
            continue
        parts = tuple(source.get(key) for key in ("domain", "entity_id", "doc_id"))
        if any(not isinstance(part, (str, int)) for part in parts):
            raise DataError(f"{where}: knowledge must name domain, entity_id and doc_id, got {show(source)}. {AGAIN}")
        domain, entity, document = map(str, parts)
        yield domain, entity, document


def _read_turns(dialogue: Any, where: str) -> dict[str, str]:
    """The last turn as `text`, those before it as `context`."""
    if not isinstance(dialogue, list) or not dialogue:
        raise DataError(f"{where}: must be a list of turns, got {show(dialogue)}. {AGAIN}")
    lines = []
    for turn in dialogue:
        speaker = SPEAKERS.get(str(turn.get("speaker"))) if isinstance(turn, dict) else None
        if speaker is None:
            raise DataError(f"{where}: the speaker of a turn must be U or S, got {show(turn)}. {AGAIN}")
        lines.append((speaker, " ".join(_get_text(turn, "text", where).split())))
    speaker, text = lines.pop()
    if speaker != "Customer":
        raise DataError(f"{where}: the last turn must be the customer's, got the agent's. {AGAIN}")
    return {"text": text, "context": "\n".join(f"{speaker}: {line}" for speaker, line in lines)}


def _get_text(record: Any, key: str, where: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} must hold text, got {show(value)}. {AGAIN}")
    return value


def _items(content: Any, where: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(content, Mapping):
        raise DataError(f"{where}: must be a JSON object, got {show(content)}. {AGAIN}")
    yield from content.items()


def _write_name(name: str) -> str:
    """`ROSA'S BED AND BREAKFAST` as people write it; a name that is not all capitals stays."""
    if not name.isupper() and not name.islower():
        return name
    words = [
        word if place and word in SMALL_WORDS else re.sub(r"[^\W_]+('\w+)?", lambda part: part[0].capitalize(), word)
        for place, word in enumerate(name.lower().split())
    ]
    return " ".join(words)


def _name_together(rows: Sequence[Sequence[str]]) -> list[str]:
    """One name for each row: that of the first entity in its row, or in a row that shares one with it, and so on."""
    above: dict[str, str] = {}

    def find(entity: str) -> str:
        while entity in above:
            entity = above[entity]
        return entity

    for first, *others in rows:
        for other in others:
            if find(other) != find(first):
                above[find(other)] = find(first)
    return [find(entities[0]) for entities in rows]
