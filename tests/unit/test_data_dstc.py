"""The files of the DSTC challenges: which turns become rows, what the entries are, and what is refused."""

from __future__ import annotations

import json

import pytest

from finetune.data import catalog
from finetune.data.catalog import load_card
from finetune.data.dstc import read_dialogues, read_entries
from finetune.data.knowledge import Entry, load_knowledge
from finetune.data.sources import load_rows
from finetune.data.splits import split_rows
from finetune.errors import DataError
from finetune.recipe.schema import SplitSection


def ask(entity, *documents, kind="faq", domain="hotel"):
    return [{"domain": domain, "entity_id": entity, "doc_type": kind, "doc_id": number} for number in documents]


def turn(speaker, text):
    return {"speaker": speaker, "text": text}


def answer(*sources, response="Yes."):
    return {"target": True, "knowledge": [source for part in sources for source in part], "response": response}


LOGS = [
    [turn("U", "A room, please.")],
    [turn("U", "Is Allenbell cheap?"), turn("S", "It is\nmoderate."), turn("U", " Do they have wifi? ")],
    [turn("U", "Is it quiet?")],
    [turn("U", "Which of them has parking?")],
    [turn("U", "And wifi?")],
]
LABELS = [
    {"target": False},
    answer(ask(3, 7, 7), ask(3, 0, kind="review"), ask(3, 9), response="It does."),
    answer(ask(3, 0, kind="review")),
    answer(ask(3, 1), ask(8, 2)),
    answer(ask(8, 5)),
]
FAQS = {"0": {"question": "Is there wifi?", "answer": "Free wifi."}}
KNOWLEDGE = {
    "hotel": {
        "3": {"name": "ROSA'S BED-AND-BREAKFAST BY THE SEA", "faqs": FAQS, "reviews": {"0": {"sentences": {}}}},
        "8": {"name": "El Shaddai", "faqs": {}},
    },
    "taxi": {"*": {"name": None, "docs": {"1": {"title": "Can I cancel?", "body": "Yes."}}}},
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def both(tmp_path):
    def build(logs=LOGS, labels=LABELS):
        return [write(tmp_path / "logs.json", logs), write(tmp_path / "labels.json", labels)]

    return build


def test_rows_are_the_turns_that_an_faq_answers(both):
    first, *others = read_dialogues(both())
    assert first == {
        "text": "Do they have wifi?",
        "context": "Customer: Is Allenbell cheap?\nAgent: It is moderate.",
        "entry": "hotel/3/7 hotel/3/9",  # each once, and no review
        "response": "It does.",
        "entity": "hotel/3",
    }
    assert [row["text"] for row in others] == ["Which of them has parking?", "And wifi?"]
    assert [row["context"] for row in others] == ["", ""]


def test_places_that_a_row_compares_stay_together(both):
    # 3 and 8 are compared in one row, 8 and 9 in another, and 9 is asked about alone: all four rows are one group.
    pairs = [ask(3, 1) + ask(8, 1), ask(5, 1), ask(8, 2) + ask(9, 1), ask(9, 3)]
    rows = read_dialogues(both([[turn("U", "?")]] * 4, [answer(pair) for pair in pairs]))
    assert [row["entity"] for row in rows] == ["hotel/3", "hotel/5", "hotel/3", "hotel/3"]


def test_labels_alone_give_the_answers(both):
    labels = [{"target": False}, answer([{"domain": "taxi", "entity_id": "*", "doc_id": 4}], response="By text.")]
    row = {"text": "By text.", "entry": "taxi/*/4", "response": "By text.", "entity": "taxi/*"}
    assert read_dialogues(both(labels=labels)[1:]) == [row]


def test_entries_name_their_place(tmp_path):
    assert read_entries(write(tmp_path / "knowledge.json", KNOWLEDGE)) == [
        {
            "id": "hotel/3/0",
            "title": "Rosa's Bed-And-Breakfast by the Sea: Is there wifi?",
            "text": "Free wifi.",
            "group": "hotel/3",
        },
        {"id": "taxi/*/1", "title": "Taxi: Can I cancel?", "text": "Yes.", "group": "taxi/*"},
    ]


@pytest.mark.parametrize(
    ("logs", "labels", "words"),
    [
        (LOGS[:2], LABELS, r"labels\.json: must have a label for each dialogue of logs\.json, got 2 and 5\. Get"),
        (LOGS, {"a": 1}, r"labels\.json: must be a JSON list, got \{a: 1\}"),
        ("[[", LABELS, r"logs\.json: must be JSON, got"),
        (LOGS[:1], [{"target": "yes"}], r"labels\.json: entry 1: must be an object with `target` true or false"),
        (LOGS[:1], [{"target": True}], "entry 1: knowledge must be a list of objects, got nothing"),
        (LOGS[:1], [answer([{"domain": "hotel"}])], "entry 1: knowledge must name domain, entity_id and doc_id"),
        (LOGS[:1], [answer(ask(3, 1), response=" ")], "entry 1: response must hold text, got ' '"),
        (LOGS[:1], [{"target": False}], r"labels\.json: must hold turns that an FAQ answers, got none of 1\."),
        (["hello"], [answer(ask(3, 1))], r"logs\.json: entry 1: must be a list of turns, got 'hello'"),
        ([[turn("X", "a")]], [answer(ask(3, 1))], r"logs\.json: entry 1: the speaker of a turn must be U or S"),
        ([[turn("S", "a")]], [answer(ask(3, 1))], "entry 1: the last turn must be the customer's, got the agent's"),
        ([[turn("U", None)]], [answer(ask(3, 1))], "entry 1: text must hold text, got nothing"),
    ],
)
def test_damaged_dialogues_are_refused(both, logs, labels, words):
    with pytest.raises(DataError, match=words):
        read_dialogues(both(logs, labels))


@pytest.mark.parametrize(
    ("knowledge", "words"),
    [
        ([1], r"knowledge\.json: must be a JSON object, got \[1\]\. Get"),
        ({"hotel": 3}, r"knowledge\.json: hotel: must be a JSON object, got 3"),
        ({"hotel": {"1": None}}, "hotel/1: must be a JSON object, got nothing"),
        ({"hotel": {"1": {"name": "A"}}}, "hotel/1: its FAQs: must be a JSON object, got nothing"),
        ({"hotel": {"1": {"faqs": {"0": {"question": "Why?"}}}}}, "hotel/1/0: answer must hold text, got nothing"),
        ({"hotel": {"1": {"faqs": {"0": "Why?"}}}}, "hotel/1/0: question must hold text, got nothing"),
        ({"hotel": {}}, r"knowledge\.json: must hold FAQs, got none"),
    ],
)
def test_damaged_knowledge_is_refused(tmp_path, knowledge, words):
    with pytest.raises(DataError, match=words):
        read_entries(write(tmp_path / "knowledge.json", knowledge))


def test_shipped_cards_read_such_files(tmp_path, monkeypatch, both):
    monkeypatch.setenv(catalog.DATA_VARIABLE, str(tmp_path))
    card = load_card("dstc11_faq_val")
    folder = tmp_path / card.local
    folder.mkdir()
    places = [(entity, f"Is {entity} far?") for entity in range(10) for _ in range(3)]
    for name, content in {
        "logs.json": [[turn("U", text)] for _, text in places],
        "labels.json": [answer(ask(entity, 0)) for entity, _ in places],
        "knowledge.json": {"hotel": {str(entity): {"name": f"H{entity}", "faqs": FAQS} for entity in range(10)}},
    }.items():
        write(folder / name, content)
    source = load_rows(card.name, {}, roles=tuple(card.roles))
    joined = {"title", "passage"}  # of the entries, where a recipe asks for them
    assert set(source.rows[0].values) == set(card.columns) - joined
    columns = {"text": "title", "passage": "passage", "target": "response"}
    written = load_rows(card.name, columns, roles=("text", "target"), optional=("passage",)).rows[0].values
    assert (written["text"], written["passage"]) == ("H0: Is there wifi?", "H0: Is there wifi? Free wifi.")
    assert [found.message for found in source.findings] == ["all: the card says 367 rows, got 30."]
    section = SplitSection(by="group", column="entity")
    splits = split_rows(source.rows, section, seed=1, columns=source.columns)
    groups = [{row.values["entity"] for row in rows} for rows in splits.values()]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 10
    entries = load_knowledge(card.name)
    assert entries[0] == Entry("hotel/0/0", "H0: Is there wifi?", "Free wifi.", "hotel/0")
    assert {row.values["entry"] for row in source.rows} == {entry.id for entry in entries}
    write(folder / "knowledge.json", {"hotel": {"0": {"name": "H", "faqs": FAQS}}})
    with pytest.raises(DataError, match=r"row 4: entry must name entries of knowledge\.json, got 'hotel/1/0'\.$"):
        load_rows(card.name, columns, roles=("text", "target"), optional=("passage",))
