"""Which matrix products become 8-bit integers: those without which the answers stay the same."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from finetune.artifact.export.engine import HEAD, Arrays
from finetune.artifact.export.graph import name_outputs
from finetune.data.batches import Batch, Examples, collate, list_inputs, plan_prediction

Scheme = Literal["static", "dynamic"]
"""Ranges of what goes into a product: measured once on train rows, or on each batch as it comes."""
FLOAT_SHARES = (0.0, 1 / 12, 1 / 6, 1 / 3, 1 / 2)
"""Shares of the linear layers that are left in float, one after another, until the answers stay the same."""
CALIBRATION_ROWS = 256
RANKING_ROWS = 96
TOKENS_PER_BATCH = 512
LEVELS = 255


@dataclass(frozen=True)
class Calibration:
    """Train rows that say how large the numbers in a model become.

    Args:
        examples: encoded.
        pad_token_id: the tokenizer's.
    """

    examples: Examples
    pad_token_id: int

    @classmethod
    def draw(cls, train: Examples, pad_token_id: int, seed: int, rows: int = CALIBRATION_ROWS) -> Calibration:
        """Some train rows, the same for the same seed."""
        chosen = np.random.default_rng(seed).permutation(len(train))[:rows]
        return cls(train.take(chosen), pad_token_id)

    def list_batches(self) -> list[Batch]:
        """Padded batches, longest rows first."""
        plan = plan_prediction(self.examples.lengths, TOKENS_PER_BATCH)
        return [list_inputs(collate(self.examples, rows, self.pad_token_id)) for rows in plan]

    def list_arrays(self, inputs: Sequence[str]) -> list[Arrays]:
        """The same as an engine takes them."""
        return [{name: batch[name].numpy() for name in inputs} for batch in self.list_batches()]


@dataclass(frozen=True)
class Candidate:
    """One way to quantize, and what came of it.

    Args:
        scheme: of the ranges.
        float_layers: left in float.
        excesses: sentences about metrics that lost more than they may; a candidate with any is not taken.
        tasks: task name -> what became of its validation rows.
        seconds: of one pass over the calibration rows; None where it was not measured.
    """

    scheme: Scheme
    float_layers: tuple[str, ...]
    excesses: tuple[str, ...]
    tasks: Mapping[str, Mapping[str, Any]]
    seconds: float | None = None

    def describe(self) -> dict[str, Any]:
        """As parity.json has it."""
        return {
            "scheme": self.scheme,
            "float_layers": list(self.float_layers),
            "within_max_drop": not self.excesses,
            "seconds": self.seconds,
            "tasks": {
                name: {
                    "equal_decisions": task["equal_decisions"],
                    "mean_difference": task["mean_difference"],
                    "lost": {metric: values["lost"]["value"] for metric, values in task["metrics"].items()},
                }
                for name, task in self.tasks.items()
            },
        }


Write = Callable[[Scheme, Sequence[str], Path], None]
Judge = Callable[[nn.Module], tuple[dict[str, dict[str, Any]], list[str]]]


def choose_quantization(  # noqa: PLR0913  (how to write, read and judge one, out of what, where to)
    schemes: Sequence[Scheme],
    ranked: Sequence[str],
    write: Write,
    read: Callable[[Path], nn.Module],
    judge: Judge,
    calibration: Calibration,
    folder: Path,
) -> list[Candidate]:
    """Of each scheme the candidate with the fewest layers in float whose answers stay the same; of these the fastest.

    Args:
        schemes: that the engine has.
        ranked: the linear layers, the most harmful first.
        write: (scheme, layers left in float, folder) writes one.
        read: a folder's model.
        judge: what became of validation, and what of it is too much.
        calibration: rows for timing.
        folder: gets the files of the one that is taken; where none is good enough, of the one that lost least.

    Returns:
        All that were tried, the one that is taken first.
    """
    tried: list[tuple[Candidate, Path]] = []
    for scheme in schemes:
        for share in FLOAT_SHARES:
            place = folder / f".{scheme}-{share:.2f}"
            place.mkdir()
            left = tuple(ranked[: round(share * len(ranked))])
            write(scheme, left, place)
            tasks, excesses = judge(read(place))
            tried.append((Candidate(scheme, left, tuple(excesses), tasks), place))
            if not excesses:
                break
    good = [(candidate, place) for candidate, place in tried if not candidate.excesses]
    timed = _time([place for _, place in good], read, calibration) if len(good) > 1 else {}
    tried = [(Candidate(c.scheme, c.float_layers, c.excesses, c.tasks, timed.get(place)), place) for c, place in tried]
    tried.sort(key=lambda one: (len(one[0].excesses), one[0].seconds or float("inf"), _sum_losses(one[0])))
    for path in tried[0][1].iterdir():
        path.rename(folder / path.name)
    for _, place in tried:
        shutil.rmtree(place)
    return [candidate for candidate, _ in tried]


def _sum_losses(candidate: Candidate) -> float:
    return sum(float(task["mean_difference"]) for task in candidate.tasks.values())


def _time(places: Sequence[Path], read: Callable[[Path], nn.Module], calibration: Calibration) -> dict[Path, float]:
    """Seconds of one pass over the rows, the median of turns that alternate."""
    models, batches = {place: read(place) for place in places}, calibration.list_batches()
    seconds: dict[Path, list[float]] = {place: [] for place in places}
    for turn in range(4):
        for place, model in models.items():
            started = time.perf_counter()
            for batch in batches:
                model(**batch)
            if turn:  # the first loads what is loaded on first use
                seconds[place].append(time.perf_counter() - started)
    return {place: round(statistics.median(taken), 4) for place, taken in seconds.items()}


@torch.inference_mode()
def rank_layers(model: nn.Module, calibration: Calibration, validation: Calibration) -> list[str]:
    """Names of the linear layers below the heads, the one first that changes the answers most when it alone is in 8
    bits: ranges from `calibration`, answers of `validation`."""
    layers = {name: layer for name, layer in model.named_modules() if _is_quantizable(name, layer)}
    ranges = _measure_ranges(model, layers, calibration.list_batches())
    batches = validation.list_batches()
    batches = batches[:: max(1, len(batches) // 8)]
    expected = [_run(model, batch) for batch in batches]
    harm = {}
    for name, layer in layers.items():
        weight = layer.weight.detach().clone()
        handle = layer.register_forward_pre_hook(_build_rounding(*ranges[name]))
        layer.weight.data = _round_weight(weight)
        found = [_run(model, batch) for batch in batches]
        handle.remove()
        layer.weight.data = weight
        harm[name] = sum(float((a - b).square().mean()) for a, b in zip(expected, found, strict=True))
    return sorted(harm, key=lambda name: -harm[name])


def _is_quantizable(name: str, layer: nn.Module) -> bool:
    """Below the heads: these are small, and what they give is the answer."""
    return isinstance(layer, nn.Linear) and "layer" in name


def _run(model: nn.Module, batch: Batch) -> torch.Tensor:
    """All that the model gives, (N,)."""
    tensors = name_outputs(model(**batch))
    return torch.cat(
        [tensors[name].float().flatten() for name in sorted(tensors, key=lambda name: name.removeprefix(HEAD))]
    )


def _measure_ranges(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> dict[str, tuple[float, float]]:
    """Least and largest number that goes into each layer, 0 among them."""
    found = dict.fromkeys(layers, (0.0, 0.0))

    def build_hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def look(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = found[name]
            found[name] = min(low, float(inputs[0].min())), max(high, float(inputs[0].max()))

        return look

    handles = [layer.register_forward_pre_hook(build_hook(name)) for name, layer in layers.items()]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def _build_rounding(low: float, high: float) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor]]:
    step = max(high - low, 1e-12) / LEVELS

    def round_inputs(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (((inputs[0].clamp(low, high) / step).round() * step),)

    return round_inputs


def _round_weight(weight: torch.Tensor) -> torch.Tensor:
    """8 bits, a scale for each output."""
    step = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / (LEVELS // 2)
    return (weight / step).round() * step
