"""Several classifications on one base: what each row is trained on, and what is said of each task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from finetune.adapters.attach import attach_adapter
from finetune.data.batches import Examples, collate
from finetune.models.base import BaseModel
from finetune.models.multi_task import OneHead
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import AdapterSection, ModelSection
from finetune.tasks import MultiTask, TextClassification, load_task

TONES, TOPICS = ["bad", "good"], ["x", "y", "z"]
TASK = MultiTask(
    {"tone": TextClassification(TONES, {}), "topic": TextClassification(TOPICS, {"1": "x"}, ("urls",))},
    {"tone": 1.0, "topic": 0.25},
)


def draw_examples(count: int, n_labels: int, seed: int) -> Examples:
    generator = np.random.default_rng(seed)
    rows = [generator.integers(5, 90, size=generator.integers(1, 9)).tolist() for _ in range(count)]
    return Examples.build(rows, generator.integers(0, n_labels, size=count).tolist())


TONE, TOPIC = draw_examples(7, 2, 1), draw_examples(5, 3, 2)


@pytest.fixture(scope="module")
def base(tiny_base):
    return BaseModel(str(tiny_base), tiny_base, "local folder")


@pytest.fixture(scope="module")
def model(base):
    return TASK.build_model(base, ModelSection(pooling="mean"), None, seed=3).eval()


@pytest.fixture(scope="module")
def combined():
    return TASK.combine({"topic": TOPIC, "tone": TONE})


def test_rows_of_all_tasks_follow_each_other_and_their_classes_are_numbered_on(combined):
    assert combined.labels.tolist() == [*TONE.labels, *(TOPIC.labels + 2)]
    rows = [*np.split(TONE.input_ids, TONE.starts[1:-1]), *np.split(TOPIC.input_ids, TOPIC.starts[1:-1])]
    for row, expected in zip(np.split(combined.input_ids, combined.starts[1:-1]), rows, strict=True):
        np.testing.assert_array_equal(row, expected)


def test_taken_rows_are_those_rows(combined):
    chosen = combined.take(np.array([9, 2]))
    assert chosen.labels.tolist() == combined.labels[[9, 2]].tolist()
    parts = np.split(combined.input_ids, combined.starts[1:-1])
    np.testing.assert_array_equal(chosen.input_ids, np.concatenate([parts[9], parts[2]]))
    assert chosen.lengths.tolist() == combined.lengths[[9, 2]].tolist()


def test_each_row_has_the_loss_of_its_own_head(model, combined):
    order = np.array([11, 0, 7, 3, 9])  # the tasks mixed
    losses = TASK.compute_losses(model, collate(combined, order, None), 0.1)
    for position, row in enumerate(order):
        name, examples, i = ("tone", TONE, row) if row < 7 else ("topic", TOPIC, row - 7)
        logits = compute_logits(OneHead(model, name), examples, None)[i]
        expected = cross_entropy(torch.from_numpy(logits), torch.tensor(examples.labels[i]), label_smoothing=0.1)
        assert losses[position].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_batch_without_rows_of_a_task_gives_its_head_zeros_for_a_gradient(base, combined):
    model = TASK.build_model(base, ModelSection(), None, seed=3)
    TASK.compute_losses(model, collate(combined, np.arange(3), None), 0.0).sum().backward()
    heads = model.classifiers
    assert heads["tone"].weight.grad.abs().sum() > 0
    assert heads["topic"].weight.grad.abs().sum() == 0, "and not None: processes add up gradients of the same weights"


def test_outputs_are_the_logits_of_all_heads_side_by_side(model, combined):
    outputs = TASK.compute_outputs(model, combined, None)
    assert outputs.shape == (12, 5)
    for name, part in TASK.split_outputs(outputs):
        np.testing.assert_allclose(part, compute_logits(OneHead(model, name), combined, None), atol=1e-5)


def test_one_pass_through_the_base_is_enough_for_all_heads(model, combined, monkeypatch):
    passes, run = [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *given, **options: passes.append(1) or run(*given, **options))
    TASK.compute_outputs(model, combined, None)
    assert len(passes) == 1, "twelve short rows are one batch"


def test_metrics_of_each_task_and_their_mean(combined):
    outputs = np.zeros((12, 5))
    outputs[np.arange(12), combined.labels] = 4.0  # all right
    first = int(np.flatnonzero(combined.labels < 2)[0])
    outputs[first, :2] = outputs[first, 1::-1]  # one tone wrong
    outputs[:7, 2:] = 9.0  # what other heads say of a row does not count
    metrics = TASK.compute_metrics(outputs, combined.labels, ["accuracy"])
    assert (metrics["tone.accuracy"], metrics["topic.accuracy"]) == (pytest.approx(6 / 7), 1.0)
    assert metrics["accuracy"] == pytest.approx((6 / 7 + 1) / 2)
    right, wrong = np.log(1 + np.exp(-4.0)), np.log(1 + np.exp(4.0))
    assert metrics["tone.loss"] == pytest.approx((6 * right + wrong) / 7)
    assert metrics["loss"] == pytest.approx((metrics["tone.loss"] + np.log(1 + 2 * np.exp(-4.0))) / 2)


def test_rows_weigh_what_their_task_and_their_class_say(combined):
    weights = TASK.compute_row_weights(combined, "balanced")
    for first, examples, names, weight in ((0, TONE, TONES, 1.0), (7, TOPIC, TOPICS, 0.25)):
        counts = np.bincount(examples.labels, minlength=len(names))
        expected = weight * len(examples) / (len(names) * counts[examples.labels])
        np.testing.assert_allclose(weights[first : first + len(examples)], expected, rtol=1e-6)


def test_every_head_starts_at_the_centroids_of_its_own_classes(base, combined):
    model = TASK.build_model(base, ModelSection(pooling="mean"), None, seed=3)
    TASK.start(model, combined, None)
    for name, examples in (("tone", TONE), ("topic", TOPIC)):
        single = TASK.tasks[name].build_model(base, ModelSection(pooling="mean"), None, seed=5)
        TASK.tasks[name].start(single, examples, None)
        torch.testing.assert_close(model.classifiers[name].weight, single.classifier.weight, atol=1e-5, rtol=1e-5)


def test_lora_trains_every_head_and_nothing_else_of_the_base(base):
    model = TASK.build_model(base, ModelSection(pooling="mean"), None, seed=3)
    new, saved = TASK.list_modules(model)
    assert new == ["classifiers.tone", "classifiers.topic"] == saved
    wrapped = attach_adapter(model, AdapterSection(rank=2), saved, "base", TASK.peft_type)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "classifiers." in name for name in trained)
    assert {name.split("classifiers.")[1].split(".")[0] for name in trained if "classifiers." in name} == set(
        TASK.tasks
    )


def test_it_comes_back_from_its_configuration():
    assert load_task(TASK.to_config()) == TASK
