"""What one step does to the weights, against a loop written out in plain PyTorch; memory, NaN and early stopping."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from finetune.data.batches import collate, plan_batches
from finetune.errors import DivergedError, ResourceError
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import TrainSection
from finetune.training import loop
from finetune.training.checkpoint import load_checkpoint
from finetune.training.events import load_events
from finetune.training.loop import _describe_memory, derive_seed
from finetune.training.progress import TrainingProgress

Weights = dict[str, torch.Tensor]


def compute_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy in the model's own precision: the tests of equality work in float64."""
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def get_distance(left: Weights, right: Weights) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def is_equal(left: Weights, right: Weights) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def call_at(calls: dict[int, Callable[[torch.Tensor], torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """`compute_losses` whose n-th result (from 1) is changed by calls[n]."""
    count = 0

    def compute(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal count
        count += 1
        losses = compute_losses(model, batch)
        return calls[count](losses) if count in calls else losses

    return compute


def make_nan(losses: torch.Tensor) -> torch.Tensor:
    return losses * float("nan")


def make_infinite_gradient(losses: torch.Tensor) -> torch.Tensor:
    """Finite losses whose gradient is not: the root of zero."""
    return losses.detach() + (losses * 0).sqrt()


@pytest.mark.parametrize("micro_steps", [2, 3, 5, 50])
@pytest.mark.parametrize("weighted", [False, True])
def test_micro_steps_do_not_change_the_update(training, tiny_classifier, micro_steps, weighted):
    problem = training.build_problem(compute_losses=compute_losses)
    if weighted:
        weights = training.task.compute_row_weights(problem.train, "balanced")
        problem = training.build_problem(compute_losses=compute_losses, row_weights=weights)
    _, whole = training.fit(tiny_classifier().double(), problem, "whole", micro_steps=1)
    state, parts = training.fit(tiny_classifier().double(), problem, "parts", micro_steps=micro_steps)
    assert state.micro_steps == micro_steps
    assert get_distance(whole, parts) < 1e-6


def train_plainly(model: nn.Module, problem: Any, section: Any, class_weights: torch.Tensor, total: int) -> Weights:
    """The same training with nothing but PyTorch: AdamW(0.9, 0.98), clipping, linear warm-up and decay, average."""
    head = list(model.classifier.parameters())
    base = [parameter for name, parameter in model.named_parameters() if not name.startswith("classifier")]
    groups = [
        {"params": [parameter], "lr": rate, "weight_decay": section.weight_decay if parameter.ndim == 2 else 0.0}
        for rate, parameters in ((section.learning_rate, base), (3 * section.learning_rate, head))
        for parameter in parameters
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    warmup = round(section.warmup_ratio * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / (total - warmup))
    )
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = 0
    criterion = nn.CrossEntropyLoss(weight=class_weights)  # the mean is weighted: sum(w * loss) / sum(w)
    for epoch in range(section.epochs):
        for rows in plan_batches(problem.train.lengths, section.tokens_per_batch, seed=section.seed, epoch=epoch):
            batch = collate(problem.train, rows, pad_token_id=0)
            optimizer.zero_grad()
            criterion(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_norm)
            optimizer.step()
            schedule.step()
            step += 1
            decay = min(section.ema_decay or 0.0, (1 + step) / (10 + step))
            for name, parameter in model.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * parameter.detach()
    return average


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize("scheme", ["none", "balanced", "sqrt_balanced"])
def test_equals_a_plain_loop(training, tiny_classifier, scheme, ema_decay, micro_steps):
    problem = training.build_problem(compute_losses=compute_losses)
    weights = training.task.compute_row_weights(problem.train, scheme)
    problem = training.build_problem(compute_losses=compute_losses, row_weights=weights)
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=problem.train.labels)
    class_weights = {"none": np.ones(3), "balanced": balanced, "sqrt_balanced": np.sqrt(balanced)}[scheme]

    changes = {
        "micro_steps": micro_steps,
        "ema_decay": ema_decay,
        "warmup_ratio": 0.3,
        "clip_norm": 0.1,
        "weight_decay": 0.1,
    }
    state, trained = training.fit(tiny_classifier().double(), problem, **changes)
    section = training.build_section(**changes)
    plain = train_plainly(tiny_classifier().double(), problem, section, torch.tensor(class_weights), state.step)
    assert get_distance(trained, plain) < 1e-6


def test_validation_is_scored_with_the_average_and_training_goes_on_without_it(training, tiny_classifier):
    seen: list[np.ndarray] = []
    problem = training.build_problem(compute_metrics=lambda logits, _references: seen.append(logits) or {"loss": 0.0})
    _, plain = training.fit(tiny_classifier(), training.build_problem(), "plain", epochs=1)
    model = tiny_classifier()
    _, averaged = training.fit(model, problem, "averaged", epochs=1, ema_decay=0.9)
    np.testing.assert_array_equal(seen[-1], compute_logits(model, problem.validation, 0))
    saved = load_checkpoint(training.root / "averaged" / "checkpoints").tensors
    assert is_equal(saved["model"], plain)
    assert is_equal(saved["average"], averaged)
    assert not is_equal(plain, averaged)


def test_logged_loss_is_the_weighted_mean_of_the_batch(training, tiny_classifier):
    problem = training.build_problem(compute_losses=compute_losses)
    weights = training.task.compute_row_weights(problem.train, "balanced")
    problem = training.build_problem(compute_losses=compute_losses, row_weights=weights)
    training.fit(tiny_classifier(), problem, epochs=1, micro_steps=2)
    first = next(event for event in load_events(training.root / "run" / "events.jsonl") if event["event"] == "step")
    rows = plan_batches(problem.train.lengths, 40, seed=13, epoch=0)[0]
    losses = compute_losses(tiny_classifier(), collate(problem.train, rows, 0)).detach().numpy()
    assert first["loss"] == pytest.approx(np.average(losses, weights=weights[rows]), rel=1e-5)
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm", "seconds"} < first.keys()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_is_torchs(training, tiny_classifier, smoothing):
    model, examples = tiny_classifier(), training.build_examples(12, seed=5)
    batch = collate(examples, np.arange(12), 0)
    losses = training.task.compute_losses(model, batch, smoothing)
    scores = torch.log_softmax(model(batch["input_ids"], batch["attention_mask"]).logits, dim=-1)
    target = (1 - smoothing) * nn.functional.one_hot(batch["labels"], 3) + smoothing / 3
    torch.testing.assert_close(losses, -(target * scores).sum(-1))
    reference = nn.CrossEntropyLoss(label_smoothing=smoothing)(scores, batch["labels"])
    torch.testing.assert_close(losses.mean(), reference)


def test_dropout_follows_from_the_step_alone(training, tiny_classifier):
    """Random numbers drawn by anyone else change nothing."""

    def draw_more(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = compute_losses(model, batch)
        torch.rand(7)
        return losses

    _, plain = training.fit(tiny_classifier(dropout=0.3), training.build_problem(compute_losses=compute_losses), "a")
    _, disturbed = training.fit(tiny_classifier(dropout=0.3), training.build_problem(compute_losses=draw_more), "b")
    _, none = training.fit(tiny_classifier(), training.build_problem(compute_losses=compute_losses), "c")
    assert is_equal(plain, disturbed)
    assert not is_equal(plain, none)


def test_steps_are_counted_up_to_the_last_that_is_made(monkeypatch):
    planned = []

    def plan(_train, _section, epoch):
        planned.append(epoch)
        return [None] * 3

    monkeypatch.setattr(loop, "_plan", plan)
    assert loop.count_steps(None, TrainSection(epochs=10_000, max_steps=7)) == 7
    assert planned == [0, 1, 2]
    assert loop.count_steps(None, TrainSection(epochs=2, max_steps=7)) == 6


def test_seeds_differ_by_each_part():
    seeds = {derive_seed(seed, step, process) for seed in range(5) for step in range(20) for process in range(4)}
    assert len(seeds) == 5 * 20 * 4


@pytest.mark.parametrize("spoil", [make_nan, make_infinite_gradient])
def test_a_step_without_finite_numbers_changes_no_weight(training, tiny_classifier, spoil):
    seen: list[Weights] = []
    model = tiny_classifier()
    spoiled = call_at({3: spoil})

    def watch(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return spoiled(model, batch)

    state, weights = training.fit(model, training.build_problem(compute_losses=watch))
    assert state.skipped_steps == 1
    assert state.non_finite_in_a_row == 0
    assert is_equal(seen[2], seen[3])  # before and after step 3
    assert not is_equal(seen[1], seen[2])
    assert not is_equal(seen[3], seen[4])
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    bad = [event for event in load_events(training.root / "run" / "events.jsonl") if "non_finite" in event]
    assert [event["step"] for event in bad] == [3]
    assert "grad_norm" in bad[0]["non_finite"]


def test_two_bad_steps_in_a_row_are_survived_again_and_again(training, tiny_classifier):
    losses = call_at(dict.fromkeys([1, 2, 4, 5, 7, 8], make_nan))
    state, _ = training.fit(tiny_classifier(), training.build_problem(compute_losses=losses))
    assert state.skipped_steps == 6


def test_three_bad_steps_in_a_row_stop_training(training, tiny_classifier):
    losses = call_at(dict.fromkeys([2, 5, 6, 7], make_nan))
    with pytest.raises(DivergedError) as caught:
        training.fit(tiny_classifier(), training.build_problem(compute_losses=losses), schedule="constant")
    assert str(caught.value) == (
        "training, step 7: loss and gradient must be finite, got loss nan and gradient norm nan at learning rate 0.06, "
        "3 steps in a row (4 skipped in all; none was applied). Lower train.learning_rate, or set train.precision: "
        "float32. The last good checkpoint is kept."
    )
    assert caught.value.exit_code == 4


OUT_OF_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    "Python": MemoryError(),
}


def fit_at_most(rows: int, error: BaseException) -> Callable[..., torch.Tensor]:
    """`compute_losses` on a device where more rows than this run out of memory."""

    def compute(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = compute_losses(model, batch)
        if len(losses) > rows:
            raise error
        return losses

    return compute


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_micro_batch_and_changes_no_update(training, tiny_classifier, kind):
    _, roomy = training.fit(tiny_classifier().double(), training.build_problem(compute_losses=compute_losses), "roomy")
    problem = training.build_problem(compute_losses=fit_at_most(3, OUT_OF_MEMORY[kind]))
    state, tight = training.fit(tiny_classifier().double(), problem, "tight")
    assert get_distance(roomy, tight) < 1e-6
    assert state.micro_steps > 1
    events = load_events(training.root / "tight" / "events.jsonl")
    halved = [event["micro_steps"] for event in events if event["event"] == "out_of_memory"]
    assert halved[0] == 2
    assert halved[-1] == state.micro_steps
    assert load_checkpoint(training.root / "tight" / "checkpoints").state["micro_steps"] == state.micro_steps


def test_out_of_memory_after_a_backward_pass_leaves_no_gradient_behind(training, tiny_classifier):
    """The second micro-batch of the first step fails: what the first one added must not be counted twice."""
    count = 0

    def fail_second(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 2:
            raise torch.OutOfMemoryError
        return compute_losses(model, batch)

    problem = training.build_problem(compute_losses=compute_losses)
    _, calm = training.fit(tiny_classifier().double(), problem, "calm", micro_steps=2)
    _, shaken = training.fit(
        tiny_classifier().double(), training.build_problem(compute_losses=fail_second), "shaken", micro_steps=2
    )
    assert get_distance(calm, shaken) < 1e-6


def test_a_single_row_that_does_not_fit_is_an_error(training, tiny_classifier):
    problem = training.build_problem(compute_losses=fit_at_most(0, OUT_OF_MEMORY["GPU"]))
    with pytest.raises(ResourceError) as caught:
        training.fit(tiny_classifier(), problem)
    assert str(caught.value) == (
        "memory: a single row must fit, got out of memory. Lower model.max_length or take a smaller base."
    )


def test_out_of_memory_words_for_several_processes():
    assert _describe_memory(rows=64, micro_steps=2, processes=4) == (
        "memory: a micro-batch of 8 rows per process must fit, got out of memory. "
        "Set train.micro_steps: 4 in the run's recipe.resolved.yaml and resume it, or start it anew with "
        "--set train.micro_steps=4 (the update stays the same)."
    )


def test_a_batch_whose_rows_are_compared_is_not_split(training, tiny_classifier):
    losses = fit_at_most(3, OUT_OF_MEMORY["GPU"])
    with pytest.raises(ResourceError) as caught:
        training.fit(tiny_classifier(), training.build_problem(compute_losses=losses, compares_rows=True))
    assert str(caught.value) == (
        "memory: a whole batch must fit, whose rows are compared with each other, got out of memory. Start a new run "
        "with train.tokens_per_batch below 40."
    )


def test_what_filled_the_memory_is_let_go_before_the_cache_is_emptied(training, tiny_classifier, monkeypatch):
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[0]() is not None))

    def fail_once(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = compute_losses(model, batch)
        if not held:
            held.append(weakref.ref(losses))
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            raise torch.OutOfMemoryError
        monkeypatch.undo()
        return losses

    training.fit(tiny_classifier(), training.build_problem(compute_losses=fail_once))
    assert alive == [False]


def test_other_errors_pass_untouched(training, tiny_classifier):
    problem = training.build_problem(compute_losses=fit_at_most(0, RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match=re.escape("shapes do not match")):
        training.fit(tiny_classifier(), problem)


@pytest.mark.parametrize(("evaluations", "expected"), [(1, 2), (2, 4), (3, 6), (100, None)])
def test_evaluations_per_epoch(training, tiny_classifier, evaluations, expected):
    state, _ = training.fit(tiny_classifier(), evaluations_per_epoch=evaluations)
    events = load_events(training.root / "run" / "events.jsonl")
    at = [event["step"] for event in events if event["event"] == "evaluation"]
    per_epoch = [len(plan_batches(training.build_problem().train.lengths, 40, seed=13, epoch=i)) for i in range(2)]
    assert len(at) == (expected or sum(per_epoch))  # an epoch has no more evaluations than steps
    assert {per_epoch[0], sum(per_epoch)} <= set(at)  # each epoch ends with one
    assert state.step == sum(per_epoch)


def script_scores(scores: list[float], seen: list[np.ndarray]) -> Callable[..., dict[str, float]]:
    """`compute_metrics` that reports these values in turn, and keeps the logits it was given."""
    values = iter(scores)

    def compute(logits: np.ndarray, references: np.ndarray) -> dict[str, float]:
        seen.append(logits.copy())
        value = next(values)
        return {"macro_f1": value, "loss": value}

    return compute


@pytest.mark.parametrize(
    ("metric", "scores"), [("macro_f1", [0.1, 0.2, 0.9, 0.3, 0.3, 0.3]), ("loss", [9, 8, 1, 3, 3, 3])]
)
def test_the_best_weights_come_back(training, tiny_classifier, metric, scores):
    seen: list[np.ndarray] = []
    model = tiny_classifier()
    problem = training.build_problem(compute_metrics=script_scores(scores, seen))
    early_stop = {"metric": metric, "patience": 6}
    state, _ = training.fit(model, problem, epochs=6, early_stop=early_stop, keep_checkpoints=1)
    assert (state.best_value, state.stopped_early) == (scores[2], False)
    np.testing.assert_array_equal(compute_logits(model, problem.validation, 0), seen[2])
    assert not np.array_equal(seen[2], seen[-1])


def count_evaluations(training: Any, tiny_classifier: Any, scores: list[float], **changes: Any) -> tuple[int, Any]:
    seen: list[np.ndarray] = []
    problem = training.build_problem(compute_metrics=script_scores(scores, seen))
    state, _ = training.fit(tiny_classifier(), problem, epochs=8, **changes)
    return len(seen), state


def test_patience_ends_training_early(training, tiny_classifier):
    scores = [0.1, 0.2, 0.3, 0.4, 0.9, 0.5, 0.6, 0.7]
    evaluations, state = count_evaluations(
        training, tiny_classifier, scores, early_stop={"metric": "macro_f1", "patience": 2}
    )
    assert evaluations == 7
    assert state.stopped_early
    assert state.best_value == 0.9


def test_patience_is_not_counted_in_the_first_half(training, tiny_classifier):
    """Eight epochs: 2, 3 and 4 lie in the first half; 5 and 6 are the two without a best that count."""
    scores = [0.9, *[0.1] * 7]
    evaluations, state = count_evaluations(
        training, tiny_classifier, scores, early_stop={"metric": "macro_f1", "patience": 2}
    )
    assert evaluations == 6
    assert state.best_value == 0.9


def test_a_bar_that_ends_early_says_why(capsys):
    with TrainingProgress(160, 88, quiet=False) as progress:
        progress.stop_early(88, 24)
        progress.stop_early(40, None)
    said = capsys.readouterr().err
    assert "stopped early after step 88; the weights of step 24, the best on validation, are kept" in said
    assert re.search(r"stopped early after step 40\s*$", said, re.MULTILINE)


def test_without_early_stopping_every_epoch_is_trained_and_the_last_weights_stay(training, tiny_classifier):
    seen: list[np.ndarray] = []
    model = tiny_classifier()
    problem = training.build_problem(compute_metrics=script_scores([5, 1, 2, 3], seen))
    state, _ = training.fit(model, problem, epochs=4, early_stop=None)
    assert (len(seen), state.best_step, state.stopped_early) == (4, None, False)
    np.testing.assert_array_equal(compute_logits(model, problem.validation, 0), seen[-1])


def test_a_score_that_is_no_number_is_never_the_best(training, tiny_classifier):
    nan = float("nan")
    _, state = count_evaluations(
        training, tiny_classifier, [nan, 3, nan, 2, 4, nan, 4, 4], early_stop={"metric": "loss", "patience": 9}
    )
    assert state.best_value == 2


def test_checkpoints_by_age_and_how_many_are_kept(training, tiny_classifier):
    checkpoints = training.root / "run" / "checkpoints"
    saved: list[list[str]] = []

    def watch(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        saved.append(sorted(path.name for path in checkpoints.glob("step-*")))
        return compute_losses(model, batch)

    problem = training.build_problem(compute_losses=watch)
    training.fit(tiny_classifier(), problem, epochs=1, checkpoint_seconds=1e-9, keep_checkpoints=2)
    assert saved[:4] == [
        [],
        ["step-00000001"],
        ["step-00000001", "step-00000002"],
        ["step-00000002", "step-00000003"],
    ]


def test_a_run_that_is_given_up_stops_there_and_stays_so(training, tiny_classifier):
    asked: list[tuple[float, float]] = []

    def gives_up(share: float, metrics: dict[str, float]) -> bool:
        asked.append((share, metrics["macro_f1"]))
        return share > 0.4

    problem = training.build_problem(gives_up=gives_up)
    state, _ = training.fit(tiny_classifier(), problem, epochs=4)
    whole, _ = training.fit(tiny_classifier(), run="whole", epochs=4)
    assert [share for share, _ in asked] == [0.25, 0.5]
    assert (state.step, state.stopped_early) == (whole.step // 2, True)
    again, _ = training.fit(tiny_classifier(), training.build_problem(), epochs=4)
    assert again.step == state.step
