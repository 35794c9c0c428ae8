"""Training speed: this loop against Hugging Face's Trainer and PEFT, same model, data, epochs and LoRA, in one run.

Every variant trains MiniLM with LoRA (rank 16, all linear layers, head trained whole) on BANKING77's official train
split for the same epochs, and is then scored on the official test split. The variants alternate round by round, because
machines are shared and noisy: read the ratios, which compare neighbours in time, not the absolute rates.

    FINETUNE_DATA=~/datasets .venv/bin/python benchmarks/train_speed.py --rounds 3 --epochs 1

Variants:
    trainer         Trainer as people write it: batch 32, dynamic padding, the base's own dropout, default flags
    trainer_best    Trainer with what helps it: length groups, fused AdamW, bf16 where it is faster, no dropout
    finetune        this toolkit's loop, with batches of as many tokens as Trainer's 32 rows have on average
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROWS_PER_BATCH = 32
SEED = 13
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Outcome:
    """What one training gave."""

    samples_per_second: float
    accuracy: float
    peak_mb: float


def load_problem(limit: int | None) -> tuple[Any, Any, Any, Any]:
    """BANKING77 encoded once: base, tokenizer, train and test examples."""
    from finetune.data.sources import load_rows
    from finetune.models.base import load_tokenizer, resolve_base
    from finetune.recipe.schema import DEFAULT_BASE, TaskSection
    from finetune.tasks import TextClassification

    base = resolve_base(DEFAULT_BASE)
    tokenizer = load_tokenizer(base)
    source = load_rows("banking77", {})
    section = TaskSection(type="text_classification", data="banking77")
    task = TextClassification.build(section, source.card.labels if source.card else None, source.rows)
    rows = task.prepare_rows(source.rows)
    train = [row for row in rows if row.split == "train"][:: max(1, 10_003 // limit) if limit else 1]
    test = [row for row in rows if row.split == "test"]
    return (
        task,
        base,
        (tokenizer, task.build_examples(train, tokenizer, 128)),
        task.build_examples(test, tokenizer, 128),
    )


def build_model(task: Any, base: Any, attention: str | None, dropout: float = 0.0) -> tuple[Any, list[str]]:
    """MiniLM with LoRA and a new head; the library's own attention unless one is named."""
    from finetune.adapters.attach import attach_adapter
    from finetune.models.classifier import list_added_modules, list_head_modules, list_new_modules
    from finetune.recipe.schema import AdapterSection, ModelSection

    model = task.build_model(base, ModelSection(dropout=dropout), SEED)
    if attention is not None:
        model.set_attn_implementation(attention)
    new, head = list_new_modules(model), list_head_modules(model)
    added = list_added_modules(model, base)
    return attach_adapter(model, AdapterSection(), head, base.reference, constant=added), new


def train_with_trainer(epochs: int, limit: int | None, *, best: bool) -> Outcome:
    """Trainer, plain or with its best flags."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from finetune.training.precision import choose_precision

    task, base, (tokenizer, train), test = load_problem(limit)
    model, _ = build_model(task, base, "sdpa", dropout=0.0 if best else 0.1)
    rows = [
        {"input_ids": train.input_ids[train.starts[i] : train.starts[i + 1]].tolist(), "labels": int(train.labels[i])}
        for i in range(len(train))
    ]
    flags: dict[str, Any] = {}
    if best:
        flags = {
            "train_sampling_strategy": "group_by_length",
            "optim": "adamw_torch_fused",
            "bf16": choose_precision("auto") == "bf16",
        }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS_PER_BATCH,
            num_train_epochs=epochs,
            learning_rate=LEARNING_RATE,
            warmup_steps=0.06,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
            **flags,
        )
        trainer = Trainer(
            model, arguments, train_dataset=Dataset.from_list(rows), data_collator=DataCollatorWithPadding(tokenizer)
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return measure(model, test, tokenizer, len(train) * epochs / seconds)


def train_with_finetune(epochs: int, limit: int | None) -> Outcome:
    """This toolkit's loop, without validation, as Trainer runs."""
    import numpy as np

    from finetune.recipe.schema import TrainSection
    from finetune.training.loop import Problem, fit
    from finetune.training.session import build_session

    task, base, (tokenizer, train), test = load_problem(limit)
    model, head = build_model(task, base, None)
    section = TrainSection(
        epochs=epochs,
        tokens_per_batch=int(ROWS_PER_BATCH * train.lengths.mean()),
        learning_rate=LEARNING_RATE,
        head_learning_rate=LEARNING_RATE,
        checkpoint_seconds=3600.0,
        early_stop=None,
        seed=SEED,
    )
    one_row = type(train).build([[101, 102]], [0])
    problem = Problem(
        train=train,
        validation=one_row,  # validation is outside the measurement
        row_weights=np.ones(len(train), dtype=np.float32),
        compute_losses=lambda model, batch: task.compute_losses(model, batch, 0.0),
        compute_metrics=partial(task.compute_metrics, names=[]),
        is_larger_better=lambda _name: True,
        head=head,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        session = build_session(section, Path(folder), "auto")
        start = time.perf_counter()
        fit(model, problem, section, session, quiet=True)
        seconds = time.perf_counter() - start
    return measure(model, test, tokenizer, len(train) * epochs / seconds)


def measure(model: Any, test: Any, tokenizer: Any, rate: float) -> Outcome:
    """Accuracy on test, and this process's peak memory."""
    from finetune.models.prediction import compute_logits

    logits = compute_logits(model, test, tokenizer.pad_token_id)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is bytes on macOS, kilobytes on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return Outcome(rate, float((logits.argmax(1) == test.labels).mean()), peak)


VARIANTS: dict[str, Callable[[int, int | None], Outcome]] = {
    "trainer": partial(train_with_trainer, best=False),
    "trainer_best": partial(train_with_trainer, best=True),
    "finetune": train_with_finetune,
}


def main() -> None:
    """Alternate the variants, each in a process of its own, and print rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rows", type=int, default=None, help="about this many training rows instead of all")
    parser.add_argument("--output", type=Path, default=None, help="write the outcomes as JSON")
    options = parser.parse_args()
    outcomes: dict[str, list[Outcome]] = {name: [] for name in VARIANTS}
    for number in range(1, options.rounds + 1):
        for name, train in VARIANTS.items():
            with get_context("spawn").Pool(1) as pool:  # peak memory of one variant must not hide in another's
                outcome = pool.apply(train, (options.epochs, options.rows))
            outcomes[name].append(outcome)
            print(
                f"round {number}  {name:14} {outcome.samples_per_second:7.1f} samples/s  "
                f"accuracy {outcome.accuracy:.4f}  peak {outcome.peak_mb:,.0f} MB",
                flush=True,
            )
    rates = {name: [outcome.samples_per_second for outcome in found] for name, found in outcomes.items()}
    print("\nvariant         median samples/s   finetune is   accuracy")
    for name, found in outcomes.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["finetune"], rates[name], strict=True))
        accuracy = statistics.median(outcome.accuracy for outcome in found)
        print(f"{name:14} {statistics.median(rates[name]):17.1f} {ratio:11.2f}x {accuracy:11.4f}")
    if options.output:
        options.output.write_text(
            json.dumps({name: [vars(outcome) for outcome in found] for name, found in outcomes.items()}, indent=2)
        )


if __name__ == "__main__":
    main()
