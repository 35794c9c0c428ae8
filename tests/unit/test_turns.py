"""Conversations before a row: how they are written, and the copies of rows that follow another one."""

from __future__ import annotations

from finetune.data.rows import Row
from finetune.data.turns import CONTEXT_CHARACTERS, CUSTOMER, add_subject_changes, write_turn

ANSWERS = {"e1": "We answer\nlike this.", "e2": "Not this one."}


def make(number, **values):
    return Row(f"train:{number}", "train", number, {"text": f"question {number}", "label": f"class {number}"} | values)


def test_a_turn_is_one_line_of_limited_length():
    assert write_turn(CUSTOMER, "one\n two\t three") == "Customer: one two three"
    assert write_turn(CUSTOMER, "x" * 1000) == CUSTOMER + "x" * CONTEXT_CHARACTERS


def test_a_copy_follows_the_conversation_of_another_row():
    asked = make(1, entry="e1 e2", context="Customer: a\nAgent: b\nCustomer: c")
    before = "Agent: b\nCustomer: c\nCustomer: question 1\nAgent: We answer like this."  # its last four turns
    alone = make(2)
    found = add_subject_changes([asked, alone], 1.0, ANSWERS, seed=3)
    assert found[:2] == [asked, alone]
    (copy,) = found[2:]  # a row that has a context is not given another
    assert (copy.id, copy.values["text"], copy.values["label"]) == ("train:2:turns", "question 2", "class 2")
    assert copy.values["context"] in (before, "Customer: question 2")
    seen = {add_subject_changes([asked, alone], 1.0, ANSWERS, seed=seed)[2].values["context"] for seed in range(20)}
    assert seen == {before, "Customer: question 2"}
    assert alone.values.get("context") is None


def test_the_customer_alone_speaks_where_no_entry_is_known():
    rows = [make(1, entry="e9"), make(2)]
    for copy in add_subject_changes(rows, 1.0, ANSWERS, seed=1)[2:]:
        assert copy.values["context"] in ("Customer: question 1", "Customer: question 2")


def test_the_share_and_the_seed_decide():
    rows = [make(number) for number in range(40)]
    found = add_subject_changes(rows, 0.25, {}, seed=5)
    assert len(found) == 50
    assert len({row.id for row in found}) == 50
    assert add_subject_changes(rows, 0.25, {}, seed=5) == found
    assert add_subject_changes(rows, 0.25, {}, seed=6) != found
    assert add_subject_changes(rows, 0.0, {}, seed=5) == rows
