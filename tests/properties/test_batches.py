from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.batches import ROWS_PER_GROUP, Examples, collate, plan_batches, plan_class_batches, plan_prediction

Lengths = npt.NDArray[np.int64]
PAD = 0

lengths_of_rows = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(lambda values: np.array(values))
budgets = st.integers(16, 2000)
seeds = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 1000)
# Rows as a tokenizer gives them: no padding token among them, at least one token.
rows_of_tokens = st.lists(st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=20), min_size=1, max_size=30)


def check_plan(batches: list[Lengths], lengths: Lengths, budget: int) -> None:
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= budget


@given(lengths_of_rows, budgets, seeds, epochs)
def test_every_row_once_and_within_the_budget(lengths: Lengths, budget: int, seed: int, epoch: int) -> None:
    check_plan(plan_batches(lengths, budget, seed=seed, epoch=epoch), lengths, budget)


@given(lengths_of_rows, st.integers(1, 30), budgets, seeds, epochs)
def test_rows_stand_with_others_of_their_class(
    lengths: Lengths, classes: int, budget: int, seed: int, epoch: int
) -> None:
    labels = np.random.default_rng(seed).integers(classes, size=len(lengths))
    batches = plan_class_batches(labels, lengths, budget, seed=seed, epoch=epoch)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    counts = np.bincount(labels)
    largest = 2 * ROWS_PER_GROUP * int(lengths.max())
    for rows in batches:
        assert lengths[rows].sum() <= 1.5 * budget + largest + ROWS_PER_GROUP
        here = np.bincount(labels[rows], minlength=len(counts))
        assert all(here[label] >= min(counts[label], ROWS_PER_GROUP) for label in labels[rows])
        assert all(np.diff(lengths[rows]) >= 0)
    again = plan_class_batches(labels, lengths, budget, seed=seed, epoch=epoch)
    assert [rows.tolist() for rows in again] == [rows.tolist() for rows in batches]


@given(lengths_of_rows, budgets)
def test_prediction_scores_every_row_once_and_within_the_budget(lengths: Lengths, budget: int) -> None:
    batches = plan_prediction(lengths, budget)
    check_plan(batches, lengths, budget)
    assert all(np.diff(lengths[np.concatenate(batches)]) <= 0)


@given(lengths_of_rows, budgets, seeds, epochs)
def test_the_order_depends_on_seed_and_epoch_only(lengths: Lengths, budget: int, seed: int, epoch: int) -> None:
    first = plan_batches(lengths, budget, seed=seed, epoch=epoch)
    np.random.seed(epoch)  # the global generator, whose state must not matter
    again = plan_batches(lengths.copy(), budget, seed=seed, epoch=epoch)
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in again]


@given(seeds, epochs)
def test_another_seed_or_epoch_gives_another_order(seed: int, epoch: int) -> None:
    lengths = np.arange(200) % 17 + 1
    orders = [
        np.concatenate(plan_batches(lengths, 64, seed=a, epoch=b)).tolist()
        for a, b in ((seed, epoch), (seed, epoch + 1), ((seed + 1) % 2**32, epoch))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[1] != orders[2]


@given(rows_of_tokens, st.data())
def test_collate_keeps_every_token_and_masks_the_rest(tokens: list[list[int]], data: st.DataObject) -> None:
    examples = Examples.build(tokens, range(len(tokens)))
    rows = data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=10))
    batch = collate(examples, np.array(rows), PAD)
    assert batch["labels"].tolist() == rows
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), max(len(tokens[i]) for i in rows))
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], rows, strict=True):
        assert ids[mask == 1].tolist() == tokens[row]
        assert (ids[mask == 0] == PAD).all()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padding on the right


@given(rows_of_tokens, st.data())
def test_packed_rows_come_apart_again(tokens: list[list[int]], data: st.DataObject) -> None:
    examples = Examples.build(tokens, range(len(tokens)))
    rows = data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=10))
    batch = collate(examples, np.array(rows), None)
    starts = np.flatnonzero(batch["position_ids"][0] == 0)
    parts = np.split(batch["input_ids"][0].numpy(), starts[1:])
    assert [part.tolist() for part in parts] == [tokens[row] for row in rows]
    assert batch["position_ids"][0].tolist() == [place for row in rows for place in range(len(tokens[row]))]


@given(rows_of_tokens)
@settings(deadline=None)  # it writes to the disk
def test_examples_survive_a_round_trip(tokens: list[list[int]]) -> None:
    labels = [i % 3 if i % 4 else -100 for i in range(len(tokens))]
    examples = Examples.build(tokens, labels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.safetensors"
        examples.save(path)
        loaded = Examples.load(path)
    for field in ("input_ids", "starts", "labels"):
        before, after = getattr(examples, field), getattr(loaded, field)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert [row.tolist() for row in np.split(loaded.input_ids, loaded.starts[1:-1])] == tokens
