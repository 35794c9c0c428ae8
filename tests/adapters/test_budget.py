"""What methods do while the loop trains, against PEFT's own way of doing it."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from torch import nn

from finetune.adapters.attach import attach_adapter, list_trained, load_adapter
from finetune.adapters.budget import Budget, add_penalty, build_budget, get_rate_factor, start_adapter
from finetune.adapters.saving import save_adapter
from finetune.data.batches import Batch, Examples, collate
from finetune.errors import Interrupted, RecipeError
from finetune.models.base import BaseModel, load_tokenizer
from finetune.models.classifier import list_head_modules
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import AdapterSection, ModelSection, TrainSection
from finetune.tasks.text_classification import TextClassification
from finetune.training.loop import Problem, count_steps, fit
from finetune.training.optimizer import build_optimizer
from finetune.training.session import build_session

TASK = TextClassification(["a", "b", "c"], {})
RANK = 4
STEPS = 20  # settled from step 10 on, ranks fall from step 3 on


def build_examples(rows: int = 24) -> Examples:
    generator = np.random.default_rng(0)
    encoded = [generator.integers(5, 300, size=generator.integers(2, 12)).tolist() for _ in range(rows)]
    return Examples.build(encoded, [row[0] % 3 for row in encoded])


EXAMPLES = build_examples()


def compute_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    return TASK.compute_losses(model, batch, 0.0)


@pytest.fixture
def build(tiny_base: Path) -> Callable[..., Any]:
    def build(architecture: str = "native", attach: bool = True, **values: Any) -> Any:
        place = BaseModel("acme/tiny", tiny_base, "here")
        model = TASK.build_model(place, ModelSection(architecture=architecture), load_tokenizer(place), 0)
        if not attach:
            return model
        return attach_adapter(model, AdapterSection(**values), list_head_modules(model), "acme/tiny", total_steps=STEPS)

    return build


ADALORA = {"method": "adalora", "rank": RANK, "final_rank": 1, "alpha": 8.0}


def train(model: Any, folder: Path, ema_decay: float | None, stop_at: int | None = None) -> Budget:
    budget = build_budget(model, AdapterSection(**ADALORA))
    assert budget is not None
    compute, steps = add_penalty(compute_losses, budget), itertools.count(1)

    def act_and_compute(model: nn.Module, batch: Batch) -> torch.Tensor:
        if next(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(model, batch)

    section = TrainSection(
        epochs=7,
        max_steps=STEPS,
        tokens_per_batch=60,
        learning_rate=0.02,
        precision="float32",
        early_stop=None,
        ema_decay=ema_decay,
    )
    assert count_steps(EXAMPLES, section) == STEPS
    problem = Problem(
        train=EXAMPLES,
        validation=EXAMPLES,
        row_weights=np.ones(len(EXAMPLES), dtype=np.float32),
        compute_losses=act_and_compute,
        compute_metrics=lambda logits, references: TASK.compute_metrics(logits, references, []),
        is_larger_better=lambda _name: False,
        head=["classifier"],
        pad_token_id=0,
        rule=budget,
    )
    with closing(build_session(section, folder, "float32")) as session:
        fit(model, problem, section, session, quiet=True)
    return budget


def count_ranks(model: nn.Module) -> list[int]:
    return [int((weight != 0).sum()) for name, weight in model.named_parameters() if ".lora_E." in name]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_adalora_ends_at_its_budget(build, tmp_path, ema_decay):
    """Also the average of the weights, which no step of the optimizer ever set to zero."""
    model = build(**ADALORA)
    assert count_ranks(model) == [0] * 12  # it starts at no update
    train(model, tmp_path / "run", ema_decay)
    ranks = count_ranks(model)
    assert sum(ranks) == 1 * 12
    assert len(set(ranks)) > 1  # dealt out by need
    logits = compute_logits(model, EXAMPLES, 0)
    save_adapter(model, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert sorted(len(tensor) for name, tensor in saved.items() if name.endswith("lora_E")) == sorted(ranks)
    loaded = load_adapter(build(attach=False), tmp_path / "model")
    np.testing.assert_allclose(compute_logits(loaded, EXAMPLES, 0), logits, atol=1e-5)


@pytest.mark.parametrize("stop_at", [1, 5, 10, 15])
def test_adalora_resumes_in_every_phase(build, tmp_path, stop_at):
    whole, parts = build(**ADALORA), build(**ADALORA)
    train(whole, tmp_path / "whole", 0.9)
    with pytest.raises(Interrupted, match=f"after step {stop_at} of {STEPS}"):
        train(parts, tmp_path / "parts", 0.9, stop_at)
    resumed = build(**ADALORA)
    train(resumed, tmp_path / "parts", 0.9)
    for name, weight in list_trained(whole).items():
        assert torch.equal(weight, resumed.get_parameter(name)), name


def test_adalora_is_peft_s_own(build):
    """PEFT's loop as its documentation has it: the same losses, penalty included, ranks and weights."""
    ours, theirs = build(**ADALORA), build(**ADALORA)
    theirs.load_state_dict(ours.state_dict())
    budget = build_budget(ours, AdapterSection(**ADALORA))
    assert budget is not None
    compute = add_penalty(compute_losses, budget)
    optimizers = [torch.optim.SGD(list_trained(model).values(), lr=0.05) for model in (ours, theirs)]
    for step in range(1, STEPS):
        batch = collate(EXAMPLES, np.arange(step % 4, 24, 4), 0)
        loss, expected = compute(ours, batch).mean(), theirs(**batch).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        expected.backward()
        for optimizer in optimizers:
            optimizer.step()
        budget.after_step(step)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    for name, weight in list_trained(ours).items():
        torch.testing.assert_close(weight, theirs.get_parameter(name), rtol=1e-3, atol=1e-5)


def test_lora_plus_rates_are_peft_s_own(build):
    model = build(method="lora", rank=RANK, learning_rate_ratio=8.0)
    section = AdapterSection(method="lora", rank=RANK, learning_rate_ratio=8.0)
    trained = list_trained(model)
    names = {id(weight): name for name, weight in trained.items()}
    train_section = TrainSection(learning_rate=1e-3, head_learning_rate=1e-3)
    ours = build_optimizer(trained, ["classifier"], train_section, get_rate_factor(section))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)

    def read(optimizer: torch.optim.Optimizer) -> dict[str, float]:
        return {names[id(weight)]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}

    expected = {name: rate for name, rate in read(theirs).items() if "modules_to_save" not in name}
    assert {name: rate for name, rate in read(ours).items() if "modules_to_save" not in name} == expected
    assert set(expected.values()) == {1e-3, 8e-3}


def test_without_a_ratio_all_rates_are_one():
    factor = get_rate_factor(AdapterSection(method="lora"))
    assert {factor(name) for name in ("a.lora_A.default.weight", "a.lora_B.default.weight")} == {1.0}


EVA = {"method": "lora", "rank": RANK, "init": "eva"}


@pytest.mark.parametrize("architecture", ["native", "triad"])
def test_eva_starts_at_the_main_directions(build, architecture):
    """scikit-learn's, of what reaches a layer, padding left out."""
    model, pad = build(architecture, **EVA), 0 if architecture == "native" else None
    name = {"native": "bert.encoder.layer.1.attention.self.query", "triad": "model.encoder.layers.1.attention.q_proj"}
    layer = model.get_base_model().get_submodule(name[architecture])
    states: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _module, inputs, _output: states.append(inputs[0].flatten(0, -2)))
    for row in range(len(EXAMPLES)):  # one at a time: no padding
        TASK.compute_losses(model, collate(EXAMPLES, np.array([row]), pad), 0.0)
    hook.remove()
    start_adapter(model, AdapterSection(**EVA), EXAMPLES, pad, compute_losses)
    expected = PCA(RANK).fit(torch.cat(states).detach().numpy()).components_
    found = layer.lora_A["default"].weight.detach().numpy()
    np.testing.assert_allclose(found @ found.T, np.eye(RANK), atol=1e-4)
    assert np.abs((found * expected).sum(1)).min() > 0.99  # the same lines, either way round
    assert not layer.lora_B["default"].weight.any()


def test_other_methods_are_not_started(build):
    model = build(method="lora", rank=RANK)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    start_adapter(model, AdapterSection(method="lora", rank=RANK), EXAMPLES, 0, lambda *_: pytest.fail("ran"))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_words_for_directions_that_do_not_settle(build, monkeypatch):
    monkeypatch.setattr("finetune.adapters.budget.MOST_BATCHES", 1)
    model = build(**EVA)
    with pytest.raises(RecipeError) as caught:
        start_adapter(model, AdapterSection(**EVA), EXAMPLES, 0, compute_losses)
    assert str(caught.value) == (
        "adapter.init: eva must find the main directions of every layer's inputs, got none that stand still after 1 "
        "batches. Lower adapter.rank, or set adapter.init: default."
    )
