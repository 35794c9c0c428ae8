"""Prediction speed: this toolkit against Hugging Face's pipeline, and both against the bare matrix products.

One classifier, a base with a head of random weights, labels the test questions of BANKING77: first all of them as one
list, then some of them one at a time. Speed does not depend on training, so nothing is trained. All variants start from
text, so tokenisation counts, and must give the same answers. They take turns, each in a process of its own, because
machines are shared and noisy: read the ratios, which compare neighbours in time, not the absolute rates.

To repeat, on a machine that does nothing else, with BANKING77 in ~/datasets/banking77:

    export FINETUNE_DATA=~/datasets HF_HUB_OFFLINE=1
    .venv/bin/python benchmarks/predict_speed.py --rounds 3 --json predict.json

Variants:
    pipeline         pipeline("text-classification") as people write it: one row at a time
    finetune_native  this toolkit's Predictor on the same class: batches by length
    finetune         this toolkit as it comes: the same weights as a Triad, rows packed without padding
    ceiling          the matrix products of the layers for the same batches, and nothing else
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from measuring import (
    Shape,
    compute_ratio,
    describe_machine,
    list_products,
    load_banking77,
    read_clock,
    read_peak_mb,
    run_alone,
    run_rounds,
    time_products,
    write_json,
)

SEED = 13
WARM_UP_ROWS = 20
SAME_SHARE = 0.999
"""Of the rows that must get the pipeline's label; logits that tie may fall either way."""


@dataclass(frozen=True)
class Setting:
    """What all variants have in common."""

    base: str
    rows: int | None
    single_rows: int


@dataclass(frozen=True)
class Outcome:
    """What one variant gave: a list of rows in one call, then single rows."""

    rows_per_second: float
    p50_ms: float
    p95_ms: float
    peak_mb: float | None = None
    labels: tuple[str, ...] = ()


def load_texts(setting: Setting) -> list[str]:
    """The test questions, or about as many as asked for, from all over the file."""
    _, rows = load_banking77()
    texts = [row.values["text"] for row in rows if row.split == "test"]
    return texts[:: max(1, len(texts) // setting.rows)] if setting.rows else texts


def pick_single(items: Sequence[Any], count: int) -> Sequence[Any]:
    """At most `count` of them, from all over the file."""
    return items[:: max(1, -(-len(items) // count))]


def save_models(setting: Setting, folder: Path) -> None:
    """Write the base with a head of random weights in both architectures."""
    from finetune.artifact.save import save_model
    from finetune.models.base import BaseModel, load_tokenizer, resolve_base
    from finetune.recipe.schema import ModelSection

    base = resolve_base(setting.base)
    tokenizer = load_tokenizer(base)
    task, _ = load_banking77()
    settings = {"task": task.to_config(), "temperature": 1.0, "max_length": 128}
    # The second is built from the folder of the first: the same weights, head included.
    for architecture in ("native", "triad"):
        model = task.build_model(base, ModelSection(architecture=architecture, pooling="first"), tokenizer, SEED)
        save_model(model, tokenizer, folder / architecture, settings)
        base = BaseModel(architecture, folder / architecture, "local folder")


def predict_with_pipeline(setting: Setting, folder: Path) -> Outcome:
    """As the documentation of transformers has it, with every default."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(folder / "native"))
    # One text is given as a text: the way through a list costs more.
    return measure(
        lambda texts: [answer["label"] for answer in classify(texts if len(texts) > 1 else texts[0])], setting
    )


def predict_with_finetune(setting: Setting, folder: Path, *, architecture: str) -> Outcome:
    """As the documentation of this toolkit has it."""
    from finetune.artifact.load import load

    predictor = load(folder / architecture)
    return measure(lambda texts: [answer.label for answer in predictor.predict(texts)], setting)


def measure(classify: Callable[[list[str]], list[str]], setting: Setting) -> Outcome:
    """Time a whole list, then single rows."""
    texts = load_texts(setting)
    classify(texts[:WARM_UP_ROWS])
    start = read_clock()
    labels = classify(texts)
    seconds = read_clock() - start
    singles = []
    for text in pick_single(texts, setting.single_rows):
        start = read_clock()
        classify([text])
        singles.append(1000 * (read_clock() - start))
    return Outcome(len(texts) / seconds, *compute_percentiles(singles), read_peak_mb(), tuple(labels))


def measure_ceiling(setting: Setting, _folder: Path) -> Outcome:
    """The products alone, in this machine's faster number format."""
    import numpy as np

    from finetune.data.batches import plan_prediction
    from finetune.models.base import load_tokenizer, resolve_base
    from finetune.models.prediction import TOKENS_PER_BATCH
    from finetune.training.precision import choose_precision

    base, precision = resolve_base(setting.base), choose_precision("auto")
    shape = Shape.read(base)
    lengths = np.array([len(ids) for ids in load_tokenizer(base)(load_texts(setting))["input_ids"]])
    batches = [
        list_products(shape, lengths[rows].tolist(), "predict") for rows in plan_prediction(lengths, TOKENS_PER_BATCH)
    ]
    seconds = sum(time_products(batches, precision))
    singles = [
        list_products(shape, [length], "predict") for length in pick_single(lengths.tolist(), setting.single_rows)
    ]
    milliseconds = [1000 * one for one in time_products(singles, precision)]
    return Outcome(len(lengths) / seconds, *compute_percentiles(milliseconds))


def compute_percentiles(milliseconds: Sequence[float]) -> tuple[float, float]:
    """p50 and p95."""
    return statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20, method="inclusive")[-1]


VARIANTS: dict[str, Callable[[Setting, Path], Outcome]] = {
    "pipeline": predict_with_pipeline,
    "finetune_native": partial(predict_with_finetune, architecture="native"),
    "finetune": partial(predict_with_finetune, architecture="triad"),
    "ceiling": measure_ceiling,
}


def describe(outcome: Outcome) -> str:
    """One line of one round."""
    line = f"{outcome.rows_per_second:9.1f} rows/s  one row: p50 {outcome.p50_ms:6.2f} ms, p95 {outcome.p95_ms:6.2f} ms"
    return line if outcome.peak_mb is None else f"{line}  peak {outcome.peak_mb:,.0f} MB"


def compute_agreement(found: Mapping[str, Sequence[Outcome]]) -> dict[str, float]:
    """Share of the rows that get the pipeline's label, for each other variant that gives any."""
    expected = found["pipeline"][0].labels
    return {
        name: sum(map(str.__eq__, rounds[0].labels, expected)) / len(expected)
        for name, rounds in found.items()
        if rounds[0].labels and name != "pipeline"
    }


def describe_agreement(agreement: Mapping[str, float]) -> str:
    """Name and share of each."""
    return ", ".join(f"{name} {share:.2%}" for name, share in agreement.items())


def check_agreement(agreement: Mapping[str, float]) -> None:
    """Stop where the variants do not do the same."""
    if min(agreement.values()) < SAME_SHARE:
        sys.exit(
            f"The variants must give the pipeline's label to {SAME_SHARE:.1%} of the rows, got "
            f"{describe_agreement(agreement)}: their speeds cannot be compared."
        )


def drop_labels(outcome: Outcome) -> dict[str, float]:
    """What is worth keeping of an outcome."""
    return {name: value for name, value in vars(outcome).items() if name != "labels"}


def build_table(found: Mapping[str, Sequence[Outcome]]) -> str:
    """Medians over rounds, ratios to the pipeline, shares of the ceiling; as Markdown. Ratios above 1 are faster."""
    lines = [
        "| variant | rows/s | x pipeline | of ceiling | one row p50 ms | x pipeline | p95 ms | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rates = {name: [one.rows_per_second for one in rounds] for name, rounds in found.items()}
    halves = {name: [one.p50_ms for one in rounds] for name, rounds in found.items()}
    for name, rounds in found.items():
        peak = "" if rounds[0].peak_mb is None else f"{statistics.median(one.peak_mb for one in rounds):,.0f}"
        lines.append(
            f"| {name} | {statistics.median(rates[name]):,.1f} | {compute_ratio(rates[name], rates['pipeline']):.2f} "
            f"| {compute_ratio(rates[name], rates['ceiling']):.1%} | {statistics.median(halves[name]):.2f} "
            f"| {compute_ratio(halves['pipeline'], halves[name]):.2f} "
            f"| {statistics.median(one.p95_ms for one in rounds):.2f} | {peak} |"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    from finetune.recipe.schema import DEFAULT_BASE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=None, help="about this many rows instead of the whole file")
    parser.add_argument("--single-rows", type=int, default=300, help="rows that are also given one at a time")
    parser.add_argument("--base", default=DEFAULT_BASE, help="a base of BERT's family: Hub id or folder")
    parser.add_argument("--json", type=Path, default=None, help="write every round to this file")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    machine = run_alone(describe_machine)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    setting = Setting(options.base, options.rows, options.single_rows)
    with tempfile.TemporaryDirectory() as folder:
        run_alone(save_models, setting, Path(folder))
        found = run_rounds(VARIANTS, [setting, Path(folder)], options.rounds, describe)
    agreement = compute_agreement(found)
    check_agreement(agreement)
    rounds = {name: [drop_labels(one) for one in outcomes] for name, outcomes in found.items()}
    write_json(options.json, machine=machine, setting=setting, agreement=agreement, rounds=rounds)
    print(f"\n{build_table(found)}")
    print("\nsame label as the pipeline: " + describe_agreement(agreement))


if __name__ == "__main__":
    main()
