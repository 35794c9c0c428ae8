from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from finetune.recipe.schema import TrainSection
from finetune.training.optimizer import build_optimizer, compute_rate_factor, is_in_head, set_learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Ten steps, two of them warm-up: 1/2, 2/2, then from 1 towards 0, which step 10 would reach.
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        # (1 + cos(pi * n / 8)) / 2
        ("cosine", [0.5, 1, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    factors = [compute_rate_factor(step, 10, 0.2, schedule) for step in range(10)]
    assert factors == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
@pytest.mark.parametrize(("total", "ratio"), [(100, 0.06), (37, 0.3), (1000, 0.5), (3, 0.06)])
def test_schedules_against_transformers(schedule, reference, total, ratio):
    """The same after the warm-up; in it one step ahead, because transformers wastes the first step at rate zero."""
    warmup = max(1, round(ratio * total))
    scheduler = reference(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), warmup, total)
    for step in range(total):
        expected = scheduler.lr_lambdas[0](step + 1 if step < warmup else step)
        assert compute_rate_factor(step, total, ratio, schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 5])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99])
def test_every_step_of_a_short_run_has_a_rate(schedule, total, ratio):
    assert all(0 < compute_rate_factor(step, total, ratio, schedule) <= 1 for step in range(total))


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"base": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "classifier": nn.Linear(3, 2)})


def describe_groups(model: nn.Module, **changes: object) -> dict[str, tuple[float, float]]:
    """Name -> (rate, decay)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(dict(model.named_parameters()), ["classifier"], TrainSection(**changes))
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_the_head_has_its_own_rate_and_only_matrices_decay(model):
    assert describe_groups(model, learning_rate=0.01, head_learning_rate=0.05, weight_decay=0.1) == {
        "base.weight": (0.01, 0.1),
        "base.bias": (0.01, 0.0),
        "norm.weight": (0.01, 0.0),
        "norm.bias": (0.01, 0.0),
        "classifier.weight": (0.05, 0.1),
        "classifier.bias": (0.05, 0.0),
    }


def test_vectors_that_come_as_matrices_do_not_decay():
    """(IA)^3's factors of ones and AdaLoRA's singular values; the head of one class is a matrix all the same."""
    weights = {"ia3_l": torch.ones(32, 1), "lora_E": torch.ones(4, 1), "lora_A": torch.ones(4, 32)}
    trained = {name: nn.Parameter(weight) for name, weight in (weights | {"head.weight": torch.ones(1, 32)}).items()}
    groups = build_optimizer(trained, ["head"], TrainSection(weight_decay=0.1)).param_groups
    decays = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    found = {name: decays[id(weight)] for name, weight in trained.items()}
    assert found == {"ia3_l": 0.0, "lora_E": 0.0, "lora_A": 0.1, "head.weight": 0.1}


def test_the_head_learns_three_times_as_fast_by_default(model):
    rates = {name: rate for name, (rate, _) in describe_groups(model, learning_rate=0.01).items()}
    assert rates["classifier.weight"] == rates["classifier.bias"] == pytest.approx(0.03)
    assert rates["base.weight"] == 0.01


def test_equal_rates_make_one_group(model):
    section = TrainSection(learning_rate=0.01, head_learning_rate=0.01, weight_decay=0.0)
    optimizer = build_optimizer(dict(model.named_parameters()), ["classifier"], section)
    assert [len(group["params"]) for group in optimizer.param_groups] == [6]


def test_a_rate_is_a_share_of_the_peak_however_often_it_is_set(model):
    section = TrainSection(learning_rate=0.01, head_learning_rate=0.05)
    optimizer = build_optimizer(dict(model.named_parameters()), ["classifier"], section)
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(0.025)
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(0.025)
    assert {round(group["lr"], 6) for group in optimizer.param_groups} == {0.005, 0.025}


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ("classifier.weight", True),
        ("base_model.model.classifier.modules_to_save.default.weight", True),
        ("base_model.model.bert.pooler.modules_to_save.default.dense.weight", True),
        ("pre_classifier.weight", False),
        ("bert.encoder.layer.0.output.dense.weight", False),
        ("bert.pooler_of_another.dense.weight", False),
    ],
)
def test_is_in_head(parameter, expected):
    assert is_in_head(parameter, ["classifier", "bert.pooler"]) is expected


def test_one_step_is_adamws_formula():
    """First step: the moments' bias corrections cancel, so w <- w * (1 - rate * decay) - rate * g / (|g| + eps)."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]] * 2))
    optimizer = build_optimizer({"w": weight}, [], TrainSection(learning_rate=0.1, weight_decay=0.5))
    weight.grad = torch.tensor([[0.3, -4.0]] * 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.95 - 0.1, -1.9 + 0.1]] * 2))
