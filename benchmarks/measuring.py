"""What the speed benchmarks share: processes of their own, rounds, and the matrix products that bound every speed.

torch is imported where it is used: the process that only starts others stays small.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
Product = tuple[int, int, int, int]
"""`times` products of (rows, inner) with (inner, columns): times, rows, inner, columns."""
ATTENTION = ("query", "key", "value")


def run_alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a fresh process, so that the peak memory of one cannot hide in another's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_rounds(
    variants: Mapping[str, Callable[..., Result]], arguments: Sequence[Any], rounds: int, describe: Callable[..., str]
) -> dict[str, list[Result]]:
    """Let the variants take turns, each in a fresh process, and print a line for each: name -> a result per round."""
    found: dict[str, list[Result]] = {name: [] for name in variants}
    for number in range(1, rounds + 1):
        for name, function in variants.items():
            found[name].append(run_alone(function, *arguments))
            print(f"round {number}  {name:16} {describe(found[name][-1])}", flush=True)
    return found


def compute_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' ratios: neighbours in time share what else the machine did."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def read_peak_mb() -> float:
    """Most memory that this process has held: the accelerator's where there is one."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def read_clock() -> float:
    """Seconds, once the accelerator has done all that it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def get_device() -> str:
    """Where models run here."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_machine() -> dict[str, Any]:
    """What a reader needs to know of the machine; call it in a fresh process."""
    import torch
    import transformers

    from finetune.training.precision import choose_precision

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": choose_precision("auto"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_json(path: Path | None, **content: Any) -> None:
    """Write what was found, dataclasses among it, where a path is given."""
    if path is not None:
        path.write_text(json.dumps(content, indent=2, default=asdict) + "\n", encoding="utf-8")


def load_banking77() -> tuple[Any, list[Any]]:
    """The task and its prepared rows, of both official splits."""
    from finetune.data.sources import load_rows
    from finetune.recipe.schema import TaskSection
    from finetune.tasks import TextClassification
    from finetune.tasks.task import TaskData

    source = load_rows("banking77", {})
    section = TaskSection(type="text_classification", data="banking77")
    task = TextClassification.build(section, TaskData(source.rows, source.card.labels if source.card else None))
    return task, task.prepare_rows(source.rows)


@dataclass(frozen=True)
class Shape:
    """What the products of an encoder depend on: layers, width D, inner width F, heads H."""

    layers: int
    width: int
    inner: int
    heads: int

    @classmethod
    def read(cls, base: Any) -> Shape:
        """The shape of a base model of BERT's family."""
        from finetune.models.base import load_config

        config = load_config(base)
        return cls(config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads)


def list_products(shape: Shape, lengths: Iterable[int], method: str, rank: int = 16) -> list[Product]:
    """The matrix products that a batch cannot do without, in the layers; embeddings and head are left out.

    Args:
        shape: the encoder's.
        lengths: tokens of each row, no padding.
        method: `predict`: forward only. `full`: the gradient of every weight. `all-linear`, `query-value`: LoRA of that
            rank with the update merged into the weight, the gradients of the factors, and no input's gradient below
            the first adapted layer.
        rank: of the update.
    """
    rows = Counter(lengths)
    tokens = sum(length * times for length, times in rows.items())
    width, inner = shape.width, shape.inner
    linear = dict.fromkeys((*ATTENTION, "output"), (width, width)) | {"up": (width, inner), "down": (inner, width)}
    adapted = {"predict": (), "full": (), "all-linear": tuple(linear), "query-value": ("query", "value")}[method]
    found: list[Product] = []
    for layer in range(shape.layers):
        for name, (inputs, outputs) in linear.items():
            found.append((1, tokens, inputs, outputs))
            if method == "predict":
                continue
            if method == "full" or layer > 0 or name not in ATTENTION:  # else nothing below is trained
                found.append((1, tokens, outputs, inputs))
            if method == "full":
                found.append((1, outputs, tokens, inputs))
            if name in adapted:  # W + B A; X A^T and dY B, which are (tokens, rank), then dB and dA
                found += [(1, outputs, rank, inputs), (1, tokens, inputs, rank), (1, tokens, outputs, rank)]
                found += [(1, outputs, tokens, rank), (1, rank, tokens, inputs)]
        is_key_needed = layer > 0 or "key" in adapted or method == "full"
        for length, times in rows.items():
            squares = (times * shape.heads, length, width // shape.heads, length)  # Q K^T, and dO V^T
            mixes = (times * shape.heads, length, length, width // shape.heads)  # P V, and P^T dO, dS K, dS^T Q
            found += [squares, mixes]
            if method != "predict":
                found += [squares, mixes, mixes] + [mixes] * is_key_needed
    return found


def count_operations(products: Iterable[Product]) -> int:
    """Multiplications and additions."""
    return sum(2 * times * rows * inner * columns for times, rows, inner, columns in products)


def time_products(batches: Sequence[Sequence[Product]], precision: str) -> list[float]:
    """Seconds that the bare products of each batch take, nothing else.

    The right operands of a batch lie behind each other, as the weights of a model do: one row's products wait for them.
    """
    import torch

    dtype, device = torch.bfloat16 if precision == "bf16" else torch.float32, get_device()
    every = [product for products in batches for product in products]
    torch.manual_seed(0)
    left = torch.randn(max(times * rows * inner for times, rows, inner, _ in every), device=device).to(dtype)
    right = torch.randn(
        max(sum(times * inner * columns for times, _, inner, columns in products) for products in batches),
        device=device,
    ).to(dtype)
    result = torch.empty(max(times * rows * columns for times, rows, _, columns in every), device=device, dtype=dtype)
    seconds = []
    for products in [batches[0], *batches]:  # the first one warms up
        place = 0
        start = read_clock()
        for times, rows, inner, columns in products:
            size = times * inner * columns
            a = left[: times * rows * inner].view(times, rows, inner)
            b = right[place : place + size].view(times, columns, inner).transpose(1, 2)
            out = result[: times * rows * columns].view(times, rows, columns)
            if times == 1:
                torch.mm(a[0], b[0], out=out[0])
            else:
                torch.bmm(a, b, out=out)
            place += size
        seconds.append(read_clock() - start)
    return seconds[1:]
