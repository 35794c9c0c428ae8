"""A recommender's losses against torch's own, against formulas worked by hand, and against each other."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch.nn import functional

from finetune.models import next_item_loss
from finetune.models.next_item_loss import draw_negatives, full_softmax, gbce, sampled_softmax

ITEMS, TARGETS, WIDTH = 13, 7, 5
ALL = torch.arange(ITEMS)


@pytest.fixture
def case() -> dict[str, Any]:
    """States, targets, vectors and biases, with gradients."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(TARGETS, WIDTH, generator=generator).requires_grad_(),
        "targets": torch.randint(0, ITEMS, (TARGETS,), generator=generator),
        "item_vectors": torch.randn(ITEMS, WIDTH, generator=generator).requires_grad_(),
        "bias": torch.randn(ITEMS, generator=generator).requires_grad_(),
    }


def compute_logits(case: dict[str, Any]) -> torch.Tensor:
    return case["hidden"] @ case["item_vectors"].T + case["bias"]


def compute_gradients(case: dict[str, Any], losses: torch.Tensor) -> list[torch.Tensor]:
    """Each target weighs otherwise, so that a loss cannot mix them up."""
    weights = torch.linspace(-1, 2, len(losses))
    leaves = [case[name] for name in ("hidden", "item_vectors", "bias")]
    return list(torch.autograd.grad((losses * weights).sum(), leaves))


@pytest.mark.parametrize("most", [1, 3 * ITEMS, 2**20])
def test_full_softmax_is_torchs_cross_entropy(case: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(next_item_loss.MOST_LOGITS, "cpu", most)
    expected = functional.cross_entropy(compute_logits(case), case["targets"], reduction="none")
    found = full_softmax(**case)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compute_gradients(case, found), compute_gradients(case, expected))
    without = functional.cross_entropy(case["hidden"] @ case["item_vectors"].T, case["targets"], reduction="none")
    torch.testing.assert_close(full_softmax(**case | {"bias": None}), without)


def test_full_softmax_keeps_no_logits(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(next_item_loss.MOST_LOGITS, "cpu", ITEMS)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        full_softmax(**case)
    assert max(kept) == ITEMS * WIDTH < ITEMS * TARGETS


def test_full_softmax_in_half_precision(case: dict[str, Any]) -> None:
    expected = full_softmax(**case)
    with torch.autocast("cpu", torch.bfloat16):
        found = full_softmax(**case)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)
    for one, other in zip(compute_gradients(case, found), compute_gradients(case, expected), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.1)


def test_an_item_can_be_left_out(case: dict[str, Any]) -> None:
    left_out = [item for item in range(ITEMS) if item not in case["targets"].tolist()][:2]
    kept = torch.tensor([item for item in range(ITEMS) if item not in left_out])
    places = torch.full((ITEMS,), -1).scatter(0, kept, torch.arange(len(kept)))
    excluded = torch.zeros(ITEMS).index_fill(0, torch.tensor(left_out), -torch.inf)
    expected = functional.cross_entropy(compute_logits(case)[:, kept], places[case["targets"]], reduction="none")
    losses = {
        "full": full_softmax(**case | {"bias": case["bias"] + excluded}),
        "sampled": sampled_softmax(
            **case | {"bias": case["bias"] + excluded}, negatives=ALL, log_counts=torch.zeros(ITEMS)
        ),
    }
    for found in losses.values():
        torch.testing.assert_close(found, expected)
        to_vectors = compute_gradients(case, found)[1]
        assert not to_vectors[left_out].any()
        assert to_vectors.isfinite().all()


def test_sampled_softmax_of_all_items_is_the_full_one(case: dict[str, Any]) -> None:
    order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(1))
    expected = full_softmax(**case)
    found = sampled_softmax(**case, negatives=order, log_counts=torch.zeros(ITEMS))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compute_gradients(case, found), compute_gradients(case, expected))


def test_the_sum_of_sampled_softmax_is_right_on_average(case: dict[str, Any]) -> None:
    """Over every single item that one draw can give, weighted with its chance, the sum is that over all items."""
    weights = torch.linspace(1, 5, ITEMS)
    chances = weights / weights.sum()
    logits = compute_logits(case)
    wanted = logits.gather(1, case["targets"][:, None])[:, 0]
    mean = torch.zeros(TARGETS)
    for item in range(ITEMS):
        losses = sampled_softmax(**case, negatives=torch.tensor([item]), log_counts=chances[item].log()[None])
        mean = mean + chances[item] * (losses + wanted).exp()
    torch.testing.assert_close(mean, logits.exp().sum(1))


def test_gbce_worked_by_hand() -> None:
    # Scores 2 of the target, -1 and 0.5 of two negatives; of 4 other items 2 were drawn, so alpha is a half.
    hidden, vectors = torch.tensor([[1.0]]), torch.tensor([[2.0], [-1.0], [0.5], [7.0], [9.0]])
    negatives, target = torch.tensor([1, 2]), torch.tensor([0])

    def sigmoid(score: float) -> float:
        return 1 / (1 + math.exp(-score))

    against = math.log(1 - sigmoid(-1)) + math.log(1 - sigmoid(0.5))
    for t, beta in ((0.0, 1.0), (1.0, 0.5), (0.75, 0.5 * (0.75 * (1 - 2) + 2))):
        expected = -(beta * math.log(sigmoid(2)) + against) / 3
        assert gbce(hidden, target, vectors, negatives, t=t).item() == pytest.approx(expected, rel=1e-6)


def test_gbce_without_calibration_is_binary_cross_entropy(case: dict[str, Any]) -> None:
    own = torch.stack([ALL[target != ALL][:4] for target in case["targets"]])  # each target's own negatives
    chosen = torch.cat([case["targets"][:, None], own], dim=1)
    labels = torch.zeros(TARGETS, 5)
    labels[:, 0] = 1
    logits = compute_logits(case).gather(1, chosen)
    expected = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    found = gbce(**case, negatives=own, t=0.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compute_gradients(case, found), compute_gradients(case, expected))
    # Where all items are drawn nothing is left to calibrate, and a target is no negative of its own.
    for t in (0.0, 0.5, 1.0):
        whole = functional.binary_cross_entropy_with_logits(
            compute_logits(case), functional.one_hot(case["targets"], ITEMS).float(), reduction="none"
        ).mean(1)
        torch.testing.assert_close(gbce(**case, negatives=ALL, t=t), whole)


def test_gbce_is_the_same_for_shared_and_own_negatives(case: dict[str, Any]) -> None:
    shared = torch.tensor([3, 9, 9, int(case["targets"][0])])
    expected = gbce(**case, negatives=shared.expand(TARGETS, -1))
    torch.testing.assert_close(gbce(**case, negatives=shared), expected)


@pytest.mark.parametrize("t", [-0.1, 1.5])
def test_gbce_refuses_a_t_out_of_range(case: dict[str, Any], t: float) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f't must lie in 0 to 1, got {t}.')}$"):
        gbce(**case, negatives=ALL, t=t)


def test_negatives_come_as_often_as_is_said() -> None:
    weights = torch.tensor([1.0, 0.0, 3.0, 4.0])
    negatives, log_counts = draw_negatives(weights, 8000, torch.Generator().manual_seed(0))
    found = torch.bincount(negatives, minlength=4)
    assert found[1] == 0
    torch.testing.assert_close(found.double(), 1000.0 * weights.double(), atol=150, rtol=0)
    torch.testing.assert_close(log_counts, (1000 * weights[negatives]).log())
    again, _ = draw_negatives(weights, 8000, torch.Generator().manual_seed(0))
    assert torch.equal(again, negatives)
