"""The contrastive loss against hand-worked numbers and the paper's sums, and its phase against the head it leaves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetune.adapters.attach import attach_adapter
from finetune.data.batches import Examples, collate
from finetune.errors import DataError
from finetune.models.base import BaseModel
from finetune.models.classifier import build_classifier, list_head_modules
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import AdapterSection, ModelSection
from finetune.tasks.contrastive import ContrastivePhase, check_rows_per_class, compute_contrastive_losses

PACKED = None  # no padding token: rows lie end to end


def sum_slowly(features: torch.Tensor, labels: torch.Tensor, temperature: float) -> list[float]:
    """Equation 2 of the paper, one term after the other."""
    z = [row / math.sqrt(sum(value**2 for value in row)) for row in features.double().numpy()]
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        total = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
        positives = [p for p in others if labels[p] == labels[i]]
        terms = [-math.log(math.exp(float(z[i] @ z[p]) / temperature) / total) for p in positives]
        losses.append(sum(terms) / len(terms) if terms else 0.0)
    return losses


def draw_batch(seed: int, rows: int = 9, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator), torch.randint(classes, (rows,), generator=generator)


def test_by_hand() -> None:
    # Cosines of row 0: 1 with its like, 0 and -1 with the others. Row 3 is alone.
    features = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 2, 1])
    e = math.e
    first = math.log((e + 1 + 1 / e + 1) / e)
    third = math.log((1 + 1 + 1 + e) / e)
    expected = [first, first, third, 0.0, third]
    losses = compute_contrastive_losses(features, labels, temperature=1.0)
    torch.testing.assert_close(losses, torch.tensor(expected))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.1, 1.0]))
def test_it_is_the_papers_sum(seed: int, temperature: float) -> None:
    features, labels = draw_batch(seed)
    losses = compute_contrastive_losses(features, labels, temperature)
    np.testing.assert_allclose(losses.numpy(), sum_slowly(features, labels, temperature), rtol=2e-4, atol=2e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_neither_order_nor_length_nor_names_of_classes_count(seed: int, random: object) -> None:
    features, labels = draw_batch(seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + 1))
    lengths = 0.1 + 5 * torch.rand(len(labels), 1, generator=torch.Generator().manual_seed(seed + 2))
    losses = compute_contrastive_losses(features, labels)
    again = compute_contrastive_losses((features * lengths)[order], 3 - labels[order])
    torch.testing.assert_close(again, losses[order], rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_also_for_a_row_alone_and_pull_a_class_together() -> None:
    features = torch.tensor([[1.0, 0.2], [0.2, 1.0], [-1.0, 0.1]], requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    compute_contrastive_losses(features, labels).sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    after = (features - 0.1 * features.grad).detach()
    cosine = nn.functional.cosine_similarity
    assert cosine(after[0], after[1], dim=0) > cosine(features[0], features[1], dim=0)
    alone = torch.ones(1, 2, requires_grad=True)
    compute_contrastive_losses(alone, torch.tensor([0])).sum().backward()
    assert alone.grad is not None
    assert alone.grad.isfinite().all()


@pytest.fixture
def base(tiny_base: Path) -> BaseModel:
    return BaseModel(str(tiny_base), tiny_base, "local folder")


@pytest.fixture
def examples() -> Examples:
    generator = np.random.default_rng(5)
    encoded = [[2, 100 + i % 3, *generator.integers(5, 300, size=generator.integers(2, 9)), 3] for i in range(30)]
    return Examples.build(encoded, [i % 3 for i in range(30)])


def build(base: BaseModel, method: str) -> nn.Module:
    model = build_classifier(base, ["a", "b", "c"], ModelSection(base=base.reference, pooling="mean"), seed=0)
    section = AdapterSection.model_validate({"method": method, "rank": 4})
    return attach_adapter(model, section, list_head_modules(model), base.reference)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_base_learns_and_the_head_is_fitted(base: BaseModel, examples: Examples, method: str) -> None:
    model = build(base, method)
    phase = ContrastivePhase(model, examples, PACKED)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning
    assert not any("classifier" in name for name in learning)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    batch = collate(examples, np.arange(12), PACKED)
    losses = phase.compute_losses(model, batch)
    assert losses.shape == (12,)
    losses.mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) <= (name in learning), name
    with torch.no_grad():  # as steps would leave it
        for name in learning:
            model.get_parameter(name).mul_(1.2).add_(0.01)
    tuned = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = phase.compute_outputs(model, examples, PACKED)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, tuned[name])}
    assert len(changed) == 2
    assert all("classifier" in name and "original" not in name for name in changed)

    phase.finish(model)
    np.testing.assert_array_equal(compute_logits(model, examples, PACKED), outputs)
    assert (outputs.argmax(1) == examples.labels).mean() > 0.9
    for name in learning:
        torch.testing.assert_close(model.get_parameter(name), (before[name] + tuned[name]) / 2, check_stride=False)


def test_shares_of_processes_add_up(base: BaseModel, examples: Examples) -> None:
    model = build(base, "full")
    phase = ContrastivePhase(model, examples, PACKED)
    whole = phase.compute_outputs(model, examples, PACKED)
    parts = [phase.compute_outputs(model, examples, PACKED, share=(rank, 2)) for rank in (0, 1)]
    np.testing.assert_allclose(parts[0] + parts[1], whole, atol=1e-6)


def test_a_class_of_one_row() -> None:
    check_rows_per_class(Examples.build([[1]] * 4, [0, 1, 0, 1]), ["a", "b"])
    with pytest.raises(DataError) as caught:
        check_rows_per_class(Examples.build([[1]] * 5, [0, 1, 0, 2, 3]), ["a", "b", "c", "d"])
    assert str(caught.value) == (
        "train: every class must have at least 2 rows for train.few_shot: contrastive, got 1 of 'b', 'c', 'd'. "
        "Add rows, or set train.few_shot: none."
    )
    with pytest.raises(DataError, match="got 1 of 'a', 'b', 'c' and 2 more"):
        check_rows_per_class(Examples.build([[1]] * 5, range(5)), list("abcde"))
