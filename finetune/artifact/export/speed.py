"""How fast an export is beside what it replaces: they take turns in one process, because machines are shared."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.data.batches import Examples, collate, list_inputs, plan_prediction
from finetune.models.classifier import get_padding
from finetune.models.packed import unpack_linear_layers
from finetune.models.prediction import get_budget
from finetune.models.quiet import quiet_transformers
from finetune.tasks import MultiTask, Task, TextClassification

ROWS = 192
SINGLE_ROWS = 48
ROUNDS = 3
MOST_SECONDS = 10.0
"""Of one turn: a slow model is measured on fewer rows."""


@dataclass(frozen=True)
class Contender:
    """A model, and the tokenizer that it reads with."""

    model: nn.Module
    tokenizer: Any


@dataclass
class Times:
    """What one contender took.

    Args:
        rates: rows a second, a list in one call, one figure a round.
        single: seconds of each row that came by itself.
    """

    rates: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)

    def summarize(self) -> dict[str, float]:
        """Median rows/s, and the latency of one row."""
        return {
            "rows_per_second": round(statistics.median(self.rates), 1),
            "p50_ms": round(1000 * float(np.percentile(self.single, 50)), 2),
            "p95_ms": round(1000 * float(np.percentile(self.single, 95)), 2),
        }


def write_texts(examples: Examples, tokenizer: Any) -> list[str]:
    """The rows as text again: what reading costs is part of every answer."""
    rows = [
        examples.input_ids[start:end].tolist() for start, end in zip(examples.starts, examples.starts[1:], strict=False)
    ]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]


def measure(
    task: Task | MultiTask,
    contenders: Mapping[str, Contender],
    examples: Examples,
    max_length: int,
    *,
    rounds: int = ROUNDS,
    reference: str = "pipeline",
) -> dict[str, Any]:
    """Rows a second and the latency of one row, from text to logits.

    `pipeline` is the first model in transformers' own `text-classification` pipeline, which takes one text at a time;
    of other tasks tokenizer and forward, one text at a time. The others take a list sorted by length and in batches, as
    `Predictor` does.

    Args:
        task: of the run.
        contenders: name -> model and tokenizer.
        examples: rows to draw from, as the first of them reads them; texts are made of their tokens.
        max_length: tokens after which a text is cut.
        rounds: turns of each.
        reference: the one that the others' ratios are to: `pipeline`, or a contender.

    Returns:
        Contender -> figures; `ratios` to `reference`; `rows` and `tokens_per_row`.
    """
    chosen = np.linspace(0, len(examples) - 1, min(ROWS, len(examples))).astype(np.int64)
    first = next(iter(contenders.values()))
    texts = write_texts(examples.take(chosen), first.tokenizer)
    single = texts[:: max(1, len(texts) // SINGLE_ROWS)][:SINGLE_ROWS]
    answers: dict[str, Callable[[Sequence[str]], Any]] = {"pipeline": _build_pipeline(task, first, max_length)} | {
        name: _build_batches(contender, max_length) for name, contender in contenders.items()
    }
    times = {name: Times() for name in answers}
    for answer in answers.values():
        answer(single[:4])  # what is loaded on first use is loaded
    for _ in range(rounds):
        for name, answer in answers.items():
            _take_turn(times[name], answer, texts, single)
    found = {name: one.summarize() for name, one in times.items()}
    ratios = {
        name: {
            "rows_per_second": round(_compute_ratio(one.rates, times[reference].rates), 2),
            "p50": round(found[reference]["p50_ms"] / max(found[name]["p50_ms"], 1e-9), 2),
        }
        for name, one in times.items()
        if name != reference
    }
    return {
        "rows": len(texts),
        "tokens_per_row": round(float(examples.lengths[chosen].mean()), 1),
        **found,
        "ratios": ratios,
    }


def _take_turn(
    times: Times, answer: Callable[[Sequence[str]], Any], texts: Sequence[str], single: Sequence[str]
) -> None:
    taken: list[float] = []
    for text in single:
        started = time.perf_counter()
        answer([text])
        taken.append(time.perf_counter() - started)
        if sum(taken) > MOST_SECONDS:
            break
    times.single += taken
    few = texts[: max(1, int(MOST_SECONDS / statistics.mean(taken)))]
    started = time.perf_counter()
    answer(few)
    times.rates.append(len(few) / (time.perf_counter() - started))


def _compute_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' ratios: neighbours in time share what else the machine did."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def _build_pipeline(task: Task | MultiTask, contender: Contender, max_length: int) -> Callable[[Sequence[str]], Any]:
    # People who know transformers alone have its own products, not those that a loaded run has. The weights are shared.
    weights = {id(tensor): tensor for tensor in (*contender.model.parameters(), *contender.model.buffers())}
    model, tokenizer = unpack_linear_layers(deepcopy(contender.model, weights)), contender.tokenizer
    if isinstance(task, TextClassification):
        from transformers import pipeline

        with quiet_transformers():  # it names every class that it knows, where ours is not among them
            made: Any = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
        return lambda texts: made(list(texts), truncation=True, max_length=max_length)

    @torch.inference_mode()
    def answer(texts: Sequence[str]) -> None:
        for text in texts:
            encoded = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
            model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])

    return answer


def _build_batches(contender: Contender, max_length: int) -> Callable[[Sequence[str]], Any]:
    model, tokenizer = contender.model, contender.tokenizer
    pad_token_id = get_padding(model, tokenizer)

    def answer(texts: Sequence[str]) -> None:
        tokens = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        run_batches(model, Examples.build(tokens), pad_token_id)

    return answer


@torch.inference_mode()
def run_batches(model: nn.Module, examples: Examples, pad_token_id: int | None) -> None:
    """A forward pass over all rows, in the batches of a prediction."""
    for rows in plan_prediction(examples.lengths, get_budget(model)):
        model(**list_inputs(collate(examples, rows, pad_token_id)))


def describe_machine() -> dict[str, Any]:
    """Processor, cores and threads: what the figures are of."""
    return {
        "processor": _read_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _read_processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
