"""Intents and templates: what is refused, and what fills a slot."""

from __future__ import annotations

import json

import pytest

from finetune.applications.support.slots import find_values
from finetune.applications.support.templates import Intent, fill_slots, fill_template, load_intents
from finetune.errors import DataError

CANCEL = {
    "intent": "cancel",
    "description": "cancel an order",
    "template": "Cancelled {order_id}.",
    "slots": ["order_id"],
}
RETURNS = {"intent": "returns", "description": "return something", "template": None, "slots": []}


def load(tmp_path, *records, classes=("cancel", "returns")):
    path = tmp_path / "intents.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_intents(path, classes)


def test_intents_by_name(tmp_path):
    assert load(tmp_path, CANCEL, RETURNS) == {
        "cancel": Intent("cancel", "cancel an order", "Cancelled {order_id}.", ("order_id",)),
        "returns": Intent("returns", "return something", None, ()),
    }


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (
            [CANCEL, RETURNS | {"intent": "return"}],
            "line 2: intent must be one that the model knows, got 'return'. Did you",
        ),
        ([CANCEL], "must describe every intent of the model, got none of returns"),
        ([CANCEL, RETURNS, CANCEL], "line 3: intent must be described once, got 'cancel' again"),
        ([CANCEL | {"slots": []}, RETURNS], "line 1: slots must be those in the template's braces, order_id, got none"),
        ([CANCEL | {"slots": ["order_id", "date"]}, RETURNS], "braces, order_id, got order_id, date"),
        ([CANCEL | {"slots": "order_id"}, RETURNS], "slots must be a list of names, got 'order_id'"),
        (
            [CANCEL | {"template": "Cancelled {}."}, RETURNS],
            r"must have slots such as {order_id}, got {}. Write {{ for",
        ),
        ([CANCEL | {"template": "Cancelled {order_id!r}."}, RETURNS], "got {order_id!r}"),
        ([CANCEL | {"template": "Cancelled {order_id."}, RETURNS], "template must have slots such as"),
        ([CANCEL | {"template": 7}, RETURNS], "template must be text or null, got 7"),
        ([CANCEL | {"description": " "}, RETURNS], "description must hold text, got ' '"),
        (
            [{"intent": "cancel", "template": "x"}],
            "must have the columns intent, description, template, slots, got intent",
        ),
    ],
)
def test_what_is_refused(tmp_path, records, words):
    with pytest.raises(DataError) as caught:
        load(tmp_path, *records)
    assert words in str(caught.value)
    assert "intents.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("slot", "text", "values"),
    [
        ("order_id", "Cancel order 12345 of 3 shirts from 2026, 1,299.00 euros", ["12345"]),
        ("order_id", "ORD-7781 or ORD-7782", ["ORD-7781", "ORD-7782"]),
        ("order_id", "ORD-7781, yes, ORD-7781", ["ORD-7781"]),
        ("order_id", "my 2 shirts for 12000 yen", []),
        ("new_email", "use anna@example.org from now on", ["anna@example.org"]),
        ("delivery_date", "on 3 November, please", ["3 November"]),
        ("date", "Nov 3rd, 2026 or 2026-11-04 or next Friday", ["Nov 3rd, 2026", "2026-11-04", "next Friday"]),
        ("amount", "you took $1,299.00", ["$1,299.00"]),
        ("refund_amount", "it was 12.50 euros", ["12.50 euros"]),
        ("quantity", "make it three, not 1.5", ["three"]),
        ("new_address", "12 Rose Street", []),
    ],
)
def test_what_fills_a_slot(slot, text, values):
    assert find_values(slot, [text]) == values


def test_the_newest_text_that_has_a_value_fills_the_slot():
    filling = fill_slots(["order_id", "email"], ["no, 22222", "order 11111", "a@b.org"], {})
    assert (filling.values, filling.missing) == ({"order_id": "22222", "email": "a@b.org"}, [])


def test_several_values_are_a_choice_and_known_ones_stay():
    filling = fill_slots(["order_id", "email"], ["11111 or 22222", "33333"], {"email": "a@b.org"})
    assert filling.values == {"email": "a@b.org"}
    assert (filling.choices, filling.missing) == ({"order_id": ["11111", "22222"]}, ["order_id"])


def test_a_value_is_put_in_as_text():
    intent = Intent("x", "x", "{{fixed}} {name} {name}", ("name",))
    assert fill_template(intent, {"name": "{other} [b]"}) == "{fixed} {other} [b] {other} [b]"
