"""Training speed: this toolkit against Hugging Face's Trainer and PEFT, and both against the bare matrix products.

Every variant trains the same base with the same adapter, and its head whole, on BANKING77's official train split for
the same epochs, with batches of the same number of tokens on average, and is then scored on the official test split.
The variants take turns, each in a process of its own, because machines are shared and noisy: read the ratios, which
compare neighbours in time, not the absolute rates.

To repeat, on a machine that does nothing else, with BANKING77 in ~/datasets/banking77:

    export FINETUNE_DATA=~/datasets HF_HUB_OFFLINE=1
    for targets in query-value all-linear full; do
        .venv/bin/python benchmarks/train_speed.py --targets $targets --rounds 3 --epochs 1 --json train_$targets.json
    done

Variants:
    trainer          Trainer as people write it: BERT's own class, batch 32, dynamic padding, the base's own dropout,
                     default flags
    trainer_best     Trainer with what helps it: length groups, fused AdamW, bf16 where it is faster, no dropout
    finetune_native  this toolkit's loop on the same class (`model.architecture: native`)
    finetune         this toolkit as it comes (`model.architecture: triad`): rows packed without padding
    ceiling          the matrix products that the method cannot do without, for the same batches, and nothing else
"""

from __future__ import annotations

import argparse
import statistics
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
LEARNING_RATES = {"query-value": 1e-3, "all-linear": 1e-3, "full": 2e-4}
QUERY_VALUE = {"native": ["query", "value"], "triad": ["q_proj", "v_proj"]}
CEILING_BATCHES = 40
"""Batches that the ceiling is measured on, from all over the first epoch."""


@dataclass(frozen=True)
class Setting:
    """What all variants have in common."""

    base: str
    targets: str
    epochs: int
    rows: int | None
    rows_per_batch: int


@dataclass(frozen=True)
class Outcome:
    """What one training gave; the ceiling trains nothing."""

    samples_per_second: float
    accuracy: float | None = None
    peak_mb: float | None = None


@dataclass(frozen=True)
class Prepared:
    """BANKING77, encoded."""

    task: Any
    base: Any
    tokenizer: Any
    train: Any
    test: Any

    def count_batch_tokens(self, setting: Setting) -> int:
        """Tokens of Trainer's batch on average, padding left out."""
        return int(setting.rows_per_batch * self.train.lengths.mean())


def prepare(setting: Setting) -> Prepared:
    """Load base, rows and tokenizer."""
    from finetune.models.base import load_tokenizer, resolve_base

    base = resolve_base(setting.base)
    tokenizer = load_tokenizer(base)
    task, rows = load_banking77()
    train = [row for row in rows if row.split == "train"]
    if setting.rows:
        train = train[:: max(1, len(train) // setting.rows)]
    test = [row for row in rows if row.split == "test"]
    encode = partial(task.build_examples, tokenizer=tokenizer, max_length=128)
    return Prepared(task, base, tokenizer, encode(train), encode(test))


def build_section(targets: str, architecture: str) -> Any:
    """The recipe's `adapter` for an option of the command line, with the modules' names in that architecture."""
    from finetune.recipe.schema import AdapterSection

    if targets == "full":
        return AdapterSection(method="full")
    return AdapterSection(targets=QUERY_VALUE[architecture] if targets == "query-value" else targets)


def train_with_trainer(setting: Setting, *, best: bool) -> Outcome:
    """Trainer, plain or with its best flags, on the base's own class with SDPA and PEFT's own LoRA."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from finetune.adapters.targets import find_targets
    from finetune.models.classifier import list_head_modules
    from finetune.recipe.schema import ModelSection
    from finetune.training.precision import choose_precision

    prepared = prepare(setting)
    native = ModelSection(architecture="native", pooling="first", dropout=0.0 if best else 0.1)
    model = prepared.task.build_model(prepared.base, native, prepared.tokenizer, SEED)
    model.set_attn_implementation("sdpa")
    section, head = build_section(setting.targets, "native"), list_head_modules(model)
    if section.method == "lora":
        lora = LoraConfig(
            task_type="SEQ_CLS",
            r=section.rank,
            lora_alpha=section.alpha,
            target_modules=find_targets(model, section.targets, head),
            modules_to_save=head,
        )
        model = get_peft_model(model, lora)
    flags = {
        "train_sampling_strategy": "group_by_length",
        "optim": "adamw_torch_fused",
        "bf16": choose_precision("auto") == "bf16",
    }
    train = prepared.train
    rows = [
        {"input_ids": train.input_ids[train.starts[i] : train.starts[i + 1]].tolist(), "labels": int(train.labels[i])}
        for i in range(len(train))
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=setting.rows_per_batch,
            num_train_epochs=setting.epochs,
            learning_rate=LEARNING_RATES[setting.targets],
            warmup_steps=0.06,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
            use_cpu=not torch.cuda.is_available(),
            **(flags if best else {}),
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorWithPadding(prepared.tokenizer),
        )
        start = read_clock()
        trainer.train()
        seconds = read_clock() - start
    return score(model, prepared, len(train) * setting.epochs / seconds)


def train_with_finetune(setting: Setting, *, architecture: str) -> Outcome:
    """This toolkit's loop, without validation, as Trainer runs."""
    import numpy as np

    from finetune.adapters.attach import attach_adapter
    from finetune.models.classifier import get_padding, list_head_modules, list_new_modules
    from finetune.recipe.schema import ModelSection, TrainSection
    from finetune.training.loop import Problem, fit
    from finetune.training.session import build_session

    prepared = prepare(setting)
    task, train, rate = prepared.task, prepared.train, LEARNING_RATES[setting.targets]
    model = task.build_model(prepared.base, ModelSection(architecture=architecture), prepared.tokenizer, SEED)
    new, pad_token_id = list_new_modules(model), get_padding(model, prepared.tokenizer)
    adapter = build_section(setting.targets, architecture)
    model = attach_adapter(model, adapter, list_head_modules(model), prepared.base.reference)
    section = TrainSection(
        epochs=setting.epochs,
        tokens_per_batch=prepared.count_batch_tokens(setting),
        learning_rate=rate,
        head_learning_rate=rate,
        checkpoint_seconds=3600.0,
        early_stop=None,
        seed=SEED,
    )
    problem = Problem(
        train=train,
        validation=type(train).build([[101, 102]], [0]),  # one row: validation is outside the measurement
        row_weights=np.ones(len(train), dtype=np.float32),
        compute_losses=lambda model, batch: task.compute_losses(model, batch, 0.0),
        compute_metrics=partial(task.compute_metrics, names=[]),
        is_larger_better=lambda _name: True,
        head=new,
        pad_token_id=pad_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        session = build_session(section, Path(folder), "auto")
        start = read_clock()
        fit(model, problem, section, session, quiet=True)
        seconds = read_clock() - start
        session.close()
    return score(model, prepared, len(train) * setting.epochs / seconds)


def measure_ceiling(setting: Setting) -> Outcome:
    """Rows whose matrix products this machine does in a second, in its faster number format."""
    from finetune.data.batches import plan_batches
    from finetune.training.precision import choose_precision

    prepared = prepare(setting)
    lengths = prepared.train.lengths
    plan = plan_batches(lengths, prepared.count_batch_tokens(setting), seed=SEED, epoch=0)
    chosen = plan[:: max(1, len(plan) // CEILING_BATCHES)]
    shape, rank = Shape.read(prepared.base), build_section("all-linear", "triad").rank
    products = [list_products(shape, lengths[rows].tolist(), setting.targets, rank) for rows in chosen]
    seconds = time_products(products, choose_precision("auto"))
    return Outcome(sum(map(len, chosen)) / sum(seconds))


def score(model: Any, prepared: Prepared, rate: float) -> Outcome:
    """Accuracy on test, and this process's peak memory until then."""
    from finetune.models.classifier import get_padding
    from finetune.models.prediction import compute_logits

    peak = read_peak_mb()
    logits = compute_logits(model, prepared.test, get_padding(model, prepared.tokenizer))
    return Outcome(rate, float((logits.argmax(1) == prepared.test.labels).mean()), peak)


VARIANTS: dict[str, Callable[[Setting], Outcome]] = {
    "trainer": partial(train_with_trainer, best=False),
    "trainer_best": partial(train_with_trainer, best=True),
    "finetune_native": partial(train_with_finetune, architecture="native"),
    "finetune": partial(train_with_finetune, architecture="triad"),
    "ceiling": measure_ceiling,
}


def describe(outcome: Outcome) -> str:
    """One line of one round."""
    rate = f"{outcome.samples_per_second:8.1f} samples/s"
    return (
        rate if outcome.accuracy is None else f"{rate}  accuracy {outcome.accuracy:.4f}  peak {outcome.peak_mb:,.0f} MB"
    )


def build_table(found: Mapping[str, Sequence[Outcome]]) -> str:
    """Medians over rounds, ratios to both Trainers, and the share of the ceiling; as Markdown."""
    rates = {name: [one.samples_per_second for one in rounds] for name, rounds in found.items()}
    lines = [
        "| variant | samples/s | x trainer | x trainer_best | of ceiling | accuracy | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rounds in found.items():
        ratios = [compute_ratio(rates[name], rates[other]) for other in ("trainer", "trainer_best", "ceiling")]
        quality = " | "
        if name != "ceiling":
            accuracy, peak = (statistics.median(getattr(one, key) for one in rounds) for key in ("accuracy", "peak_mb"))
            quality = f"{accuracy:.4f} | {peak:,.0f}"
        lines.append(
            f"| {name} | {statistics.median(rates[name]):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.1%} "
            f"| {quality} |"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    from finetune.recipe.schema import DEFAULT_BASE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", choices=list(LEARNING_RATES), default="all-linear", help="what is trained")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rows", type=int, default=None, help="about this many training rows instead of all")
    parser.add_argument("--rows-per-batch", type=int, default=32, help="of Trainer; the others take as many tokens")
    parser.add_argument("--base", default=DEFAULT_BASE, help="a base of BERT's family: Hub id or folder")
    parser.add_argument("--json", type=Path, default=None, help="write every round to this file")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    setting = Setting(options.base, options.targets, options.epochs, options.rows, options.rows_per_batch)
    machine = run_alone(describe_machine)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    found = run_rounds(VARIANTS, [setting], options.rounds, describe)
    print(f"\n{build_table(found)}")
    write_json(options.json, machine=machine, setting=setting, rounds=found)


if __name__ == "__main__":
    main()
