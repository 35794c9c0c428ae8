"""The sample set of the support assistant: what other parts rely on, and that no wording is on two sides."""

from __future__ import annotations

import json
import string
from collections import Counter, defaultdict

import pytest

from finetune.data.catalog import load_card
from finetune.data.checks import check_rows
from finetune.data.cleaning import normalize_for_duplicates
from finetune.data.knowledge import load_card_knowledge
from finetune.data.rows import SPLITS
from finetune.data.sources import load_rows
from finetune.recipe.shipped import shipped_folder

FOLDER = shipped_folder("data") / "samples" / "shop_support"
STYLES = {"plain", "typo", "short", "angry", "multi", "follow_up"}
OUTSIDE = "out_of_scope"


def read_objects(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def card():
    return load_card("shop_support")


@pytest.fixture(scope="module")
def rows(card):
    return load_rows("shop_support", {}, roles=tuple(card.roles)).rows


@pytest.fixture(scope="module")
def entries(card):
    return {entry.id: entry for entry in load_card_knowledge(card)}


@pytest.fixture(scope="module")
def intents():
    return {intent["intent"]: intent for intent in read_objects("intents.jsonl")}


@pytest.fixture(scope="module")
def dialogues():
    return read_objects("dialogues.jsonl")


def test_there_is_as_much_as_promised(rows, entries, intents, dialogues):
    outside = [row for row in rows if row.values["label"] == OUTSIDE]
    assert len(rows) - len(outside) >= 900
    assert len(outside) >= 120
    assert len(entries) >= 60
    assert len(intents) == 40
    assert len(dialogues) == 40
    styles = Counter(row.values["style"] for row in rows if row not in outside)
    assert set(styles) == STYLES
    assert min(styles.values()) >= 50
    assert {row.values["style"] for row in outside} == {OUTSIDE}


def test_it_loads_with_its_card_alone(card):
    source = load_rows("shop_support", {})
    assert source.columns == {"text": "text", "label": "intent"}
    assert source.findings == ()
    assert {row.values["label"] for row in source.rows} == {*card.labels, OUTSIDE}


def test_intents_are_the_labels_and_their_slots_are_the_braces(card, intents):
    assert list(intents) == card.labels
    for intent in intents.values():
        fields = string.Formatter().parse(intent["template"] or "")
        assert intent["slots"] == list(dict.fromkeys(name for _, name, _, _ in fields if name))
        assert bool(intent["slots"]) == (intent["template"] is not None)
    templates = [intent["template"] for intent in intents.values() if intent["template"]]
    assert 15 <= len(templates) <= 20
    descriptions = {intent["description"] for intent in intents.values()}
    assert len(descriptions) == 40


def test_validation_and_test_are_drawn_alike(card, rows):
    by_label = defaultdict(Counter)
    for row in rows:
        by_label[row.values["label"]][row.split] += 1
    assert set(by_label) == {*card.labels, OUTSIDE}
    for counts in by_label.values():
        assert counts["validation"] / (counts["validation"] + counts["test"]) == pytest.approx(0.37, abs=0.03)
        assert counts["train"] / counts.total() >= 0.7
        assert counts.total() >= 20


def test_entries_exist_and_each_is_asked_for_in_the_test_split(rows, entries, intents):
    asked = defaultdict(Counter)
    for row in rows:
        named = row.values["entry"].split()
        assert set(named) <= set(entries)
        if row.values["label"] == OUTSIDE:
            assert named == []
        elif intents[row.values["label"]]["template"] is None:
            assert named != []
        asked[row.split].update(named)
    assert min(asked["test"][entry] for entry in entries) >= 2
    assert min(asked["train"][entry] for entry in entries) >= 25
    assert min(asked["validation"][entry] for entry in entries) >= 2


def test_an_entry_has_two_to_four_sentences(entries):
    for entry in entries.values():
        assert 20 <= len(entry.text.split()) <= 80
        assert entry.title.endswith("?")
        assert entry.group


def test_every_phrasing_differs_also_from_those_in_dialogues(rows, dialogues):
    texts = [row.values["text"] for row in rows]
    texts += [turn["text"] for one in dialogues for turn in one["turns"] if turn["speaker"] == "customer"]
    counts = Counter(normalize_for_duplicates(text) for text in texts)
    assert [text for text, count in counts.items() if count > 1] == []


def test_no_wording_is_in_two_splits(card, rows):
    splits = {name: [row for row in rows if row.split == name] for name in SPLITS}
    _, findings = check_rows(splits, [*card.labels, OUTSIDE], leaks="fail")
    assert findings == []
    homes = defaultdict(set)
    for row in rows:
        homes[row.values["cluster"]].add((row.split, row.values["label"]))
    assert {cluster for cluster, places in homes.items() if len(places) > 1} == set()


def test_a_follow_up_has_its_dialogue_and_nothing_else_has_one(rows):
    for row in rows:
        turns = row.values["context"].splitlines()
        assert (turns != []) == (row.values["style"] == "follow_up")
        speakers = [turn.partition(": ")[0] for turn in turns]
        assert speakers == ["Customer", "Agent"] * (len(turns) // 2)


def test_dialogues_take_turns_and_name_what_exists(card, dialogues, entries):
    assert len({one["id"] for one in dialogues}) == 40
    asked = set()
    for one in dialogues:
        turns = one["turns"]
        assert 4 <= len(turns) <= 8
        assert [turn["speaker"] for turn in turns] == (["customer", "agent"] * 4)[: len(turns)]
        assert "intent" in turns[0]
        for turn in turns:
            asked.add(turn.get("intent", OUTSIDE))
            assert turn["speaker"] == "customer" or "intent" not in turn
            assert turn.get("entry") is None or turn["entry"] in entries
    assert asked == {*card.labels, OUTSIDE}
