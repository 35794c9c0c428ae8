from __future__ import annotations

import pytest
import torch

from finetune.training import precision
from finetune.training.precision import WORTH_IT_RATIO, choose_precision, measure_bf16_ratio


@pytest.mark.parametrize("wanted", ["float32", "bf16"])
def test_a_wish_is_granted_unseen(monkeypatch, wanted):
    monkeypatch.setattr(precision, "measure_bf16_ratio", pytest.fail)
    assert choose_precision(wanted) == wanted


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(2.5, "bf16"), (WORTH_IT_RATIO, "bf16"), (WORTH_IT_RATIO - 0.01, "float32"), (0.2, "float32")],
)
def test_auto_on_a_cpu_goes_by_the_clock(monkeypatch, ratio, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "measure_bf16_ratio", lambda: ratio)
    assert choose_precision("auto") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "float32")])
def test_auto_on_a_gpu_asks_for_native_support(monkeypatch, native, expected):
    """PyTorch counts emulation as support unless it is told not to."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(precision, "measure_bf16_ratio", pytest.fail)
    assert choose_precision("auto") == expected


def test_the_ratio_is_float32_time_over_bf16_time(monkeypatch):
    """A clock on which each pair of products takes 6 and 2 seconds, but once 60: the best of several counts."""
    durations = iter([60, 2] + [6, 2] * (precision.REPEATS - 1))
    times = iter([time for duration in durations for time in (0.0, float(duration))])
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(precision, "SIZE", 4)
    assert measure_bf16_ratio() == 3.0


def test_runs_of_one_process_may_differ_in_precision(training):
    """Accelerate keeps the first precision of a process unless it is made to forget it."""
    for run, (precision_, expected) in enumerate([("bf16", "bf16"), ("float32", "no"), ("bf16", "bf16")]):
        with training.open_session(training.build_section(precision=precision_), str(run)) as session:
            assert session.accelerator.mixed_precision == expected


def test_bf16_products_leave_float32_weights_and_losses(training, tiny_classifier):
    model = tiny_classifier()
    dtypes: set[torch.dtype] = set()

    def watch(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inner: list[torch.dtype] = []
        hook = model.hidden.register_forward_hook(lambda _module, _inputs, output: inner.append(output.dtype))
        losses = training.task.compute_losses(model, batch, 0.0)
        hook.remove()
        dtypes.add(inner[0])
        return losses

    _, weights = training.fit(model, training.build_problem(compute_losses=watch), precision="bf16")
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
