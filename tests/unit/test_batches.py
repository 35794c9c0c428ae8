from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.data.batches import Examples, collate, plan_batches, plan_prediction
from finetune.models.base import BaseModel
from finetune.models.classifier import build_classifier
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import ModelSection

EXAMPLES = Examples.build([[5, 6], [7], [8, 9, 10], [11, 12, 13, 14]], [0, 2, -100, 1])


def test_rows_lie_end_to_end():
    assert EXAMPLES.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert EXAMPLES.starts.tolist() == [0, 2, 3, 6, 10]
    assert EXAMPLES.lengths.tolist() == [2, 1, 3, 4]
    assert len(EXAMPLES) == 4


def test_collate_pads_on_the_right_and_masks_what_it_added():
    batch = collate(EXAMPLES, np.array([2, 0, 1]), pad_token_id=1)
    assert batch["input_ids"].tolist() == [[8, 9, 10], [5, 6, 1], [7, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [-100, 0, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_packed_rows_lie_end_to_end_and_their_positions_start_again():
    batch = collate(EXAMPLES, np.array([2, 0, 1]), pad_token_id=None)
    assert batch["input_ids"].tolist() == [[8, 9, 10, 5, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["labels"].tolist() == [-100, 0, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_token_types_are_laid_out_like_tokens(tmp_path):
    examples = Examples.build([[5, 6], [7], [8, 9, 10]], [0, 1, 2], types=[[0, 1], [0], [0, 1, 1]])
    examples.save(tmp_path / "rows.safetensors")
    for one in (examples, Examples.load(tmp_path / "rows.safetensors")):
        assert collate(one, np.array([2, 0]), 0)["token_type_ids"].tolist() == [[0, 1, 1], [0, 1, 0]]
        assert collate(one, np.array([2, 0]), None)["token_type_ids"].tolist() == [[0, 1, 1, 0, 1]]
        assert collate(one.take(np.array([0])), np.array([0]), 0)["token_type_ids"].tolist() == [[0, 1]]
    assert "token_type_ids" not in collate(EXAMPLES, np.array([0]), 0)


def test_prediction_begins_with_the_longest_row():
    batches = plan_prediction(np.array([2, 9, 1, 4, 4]), tokens_per_batch=9)
    assert [rows.tolist() for rows in batches] == [[1], [3, 4], [0, 2]]


def test_a_row_longer_than_the_budget_goes_alone():
    batches = plan_batches(np.array([3, 50, 3, 3]), 8, seed=0, epoch=0)
    assert sorted(sorted(rows.tolist()) for rows in batches if 1 in rows) == [[1]]


def test_little_padding_where_lengths_differ_much():
    """Batches of random rows of 1 to 64 tokens would be nearly half padding."""
    lengths = np.random.default_rng(0).integers(1, 65, size=5000)
    batches = plan_batches(lengths, 1024, seed=0, epoch=0)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert 1 - lengths.sum() / padded < 0.06


def test_batches_come_in_random_order_not_by_length():
    lengths = np.random.default_rng(0).integers(1, 65, size=5000)
    means = [lengths[rows].mean() for rows in plan_batches(lengths, 1024, seed=0, epoch=0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_batches_by_hand():
    """Lengths 1 to 12 in 16 tokens: 4 rows of up to 4, 2 of up to 6, 2 of up to 8, then single ones."""
    batches = plan_batches(np.arange(1, 13), 16, seed=13, epoch=2)
    assert sorted(rows.tolist() for rows in batches) == [[0, 1, 2, 3], [4, 5], [6, 7], [8], [9], [10], [11]]


@pytest.fixture(scope="module", params=["triad", "native"])
def classifier(tiny_base: Path, request: pytest.FixtureRequest) -> torch.nn.Module:
    base = BaseModel(str(tiny_base), tiny_base, "local folder")
    section = ModelSection(dropout=0.5, architecture=request.param)
    return build_classifier(base, ["a", "b", "c"], section, seed=0).eval()


def build_random_examples(count: int) -> Examples:
    generator = np.random.default_rng(1)
    return Examples.build(
        [generator.integers(5, 100, size=generator.integers(2, 20)) for _ in range(count)], [0] * count
    )


def test_padding_does_not_change_logits(classifier):
    examples = build_random_examples(12)
    batch = collate(examples, np.arange(12), 0)
    with torch.no_grad():
        together = classifier(batch["input_ids"], batch["attention_mask"]).logits
        alone = [
            classifier(torch.from_numpy(row[None]).long()).logits[0]
            for row in np.split(examples.input_ids, examples.starts[1:-1])
        ]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-6, rtol=0)


def test_packing_does_not_change_logits(tiny_base):
    base = BaseModel(str(tiny_base), tiny_base, "local folder")
    model = build_classifier(base, ["a", "b", "c"], ModelSection(), seed=0)
    examples = build_random_examples(12)
    np.testing.assert_allclose(compute_logits(model, examples, None), compute_logits(model, examples, 0), atol=1e-6)


def test_logits_come_in_the_order_of_the_rows(classifier, monkeypatch):
    monkeypatch.setattr("finetune.models.prediction.TOKENS_PER_BATCH", 40)
    examples = build_random_examples(30)
    done: list[int] = []
    logits = compute_logits(classifier.train(), examples, 0, advance=done.append)
    assert classifier.training  # as it came in, though dropout was off
    assert sum(done) == 30
    assert len(done) > 5
    with torch.no_grad():
        for i in (0, 7, 29):
            batch = collate(examples, np.array([i]), 0)
            expected = classifier.eval()(batch["input_ids"], batch["attention_mask"]).logits[0]
            np.testing.assert_allclose(logits[i], expected, atol=1e-6)


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_shares_add_up_to_the_whole(classifier, monkeypatch, processes):
    """Also where a process has no batch at all."""
    monkeypatch.setattr("finetune.models.prediction.TOKENS_PER_BATCH", 60)
    examples = build_random_examples(10)
    whole = compute_logits(classifier, examples, 0)
    shares = [compute_logits(classifier, examples, 0, share=(rank, processes)) for rank in range(processes)]
    np.testing.assert_array_equal(sum(shares), whole)
