"""How many headlines a second a monitor takes from a file into its state, and whether its memory stays where it is.

The first part watches the headlines of a stream with a trained run, into a new state file each round; in turns with it
the matrix products are timed that its base cannot do without. Machines are shared and noisy: read the share.

The second part asks what the monitor itself keeps. A stand-in answers in the place of the model, at random; everything
else is the run's own. Headlines are made of random words, one a minute, so that windows come and go.

To repeat, on a machine that does nothing else:

    .venv/bin/finetune run monitor
    .venv/bin/python benchmarks/monitor_speed.py runs/monitor --rounds 3 --items 1000000 --json monitor.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import (
    Shape,
    compute_ratio,
    describe_machine,
    list_products,
    read_clock,
    run_alone,
    run_rounds,
    time_products,
    write_json,
)

SEED = 13
STREAM = Path("data/samples/market_stream/stream.jsonl")
WORDS, WORDS_OF_A_HEADLINE = 5_000, 9
BEGIN, SECONDS_BETWEEN = 1_700_000_000, 60
LOOKS = 10
"""How often memory is looked at."""


@dataclass(frozen=True)
class Setting:
    """What is watched."""

    run: str
    stream: Path
    engine: str | None


@dataclass(frozen=True)
class Outcome:
    """Headlines a second."""

    items_per_second: float


@dataclass(frozen=True)
class Look:
    """After so many items: the process's memory, and the state file."""

    items: int
    items_per_second: float
    memory_mb: float
    state_mb: float


class RandomReader:
    """Answers in the place of a model."""

    fingerprint = "random"

    def __init__(self, topics: Sequence[str]) -> None:
        """Take the topics of a trained one."""
        self.topics = tuple(topics)
        self._generator = np.random.default_rng(SEED)

    def read(self, texts: Sequence[str]) -> list[Any]:
        """A topic and a probability for each text."""
        from finetune.applications.monitor.records import Reading

        topics = self._generator.integers(0, len(self.topics), len(texts)).tolist()
        negative = self._generator.beta(0.3, 0.7, len(texts)).tolist()
        return [
            Reading(self.topics[topic], "negative" if share >= 0.5 else "positive", share)
            for topic, share in zip(topics, negative, strict=True)
        ]


def read_texts(path: Path) -> list[str]:
    """The headlines of a stream."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def watch_stream(setting: Setting) -> Outcome:
    """From file to state with the trained run, repeats and late items among the lines; loading is not counted."""
    from finetune.applications.monitor.load import load_monitor
    from finetune.applications.monitor.sources import FileSource
    from finetune.applications.monitor.store import Store
    from finetune.applications.monitor.watch import watch

    monitor, texts = load_monitor(setting.run, engine=setting.engine), read_texts(setting.stream)
    monitor.reader.read(texts[:20])
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "state.db") as store:
        start = read_clock()
        watch(FileSource(setting.stream, is_followed=False), monitor, store)
        seconds = read_clock() - start
        counts = store.read_counts()
    if counts.get("lines") != len(texts) or any(name.startswith("rejected: ") for name in counts):
        raise SystemExit(f"{setting.stream}: every line must be taken in, got {counts} of {len(texts)}.")
    return Outcome(len(texts) / seconds)


def measure_ceiling(setting: Setting) -> Outcome:
    """The products of the base for the same texts, in this machine's faster number format."""
    from finetune.artifact.run_folder import find_run
    from finetune.data.batches import plan_prediction
    from finetune.models.base import load_tokenizer, resolve_base
    from finetune.models.prediction import TOKENS_PER_BATCH
    from finetune.recipe import load_recipe
    from finetune.training.precision import choose_precision

    base = resolve_base(load_recipe(find_run(setting.run).recipe).model.base)
    lengths = np.array([len(ids) for ids in load_tokenizer(base)(read_texts(setting.stream))["input_ids"]])
    shape = Shape.read(base)
    batches = [
        list_products(shape, lengths[rows].tolist(), "predict") for rows in plan_prediction(lengths, TOKENS_PER_BATCH)
    ]
    return Outcome(len(lengths) / sum(time_products(batches, choose_precision("auto"))))


def write_headlines(path: Path, items: int) -> None:
    """Headlines of random words, no two alike."""
    generator = np.random.default_rng(SEED)
    with path.open("w", encoding="utf-8") as file:
        for number in range(items):
            words = generator.integers(0, WORDS, WORDS_OF_A_HEADLINE).tolist()
            text = " ".join(f"w{word}" for word in words)
            file.write(json.dumps({"id": number, "time": BEGIN + SECONDS_BETWEEN * number, "text": text}) + "\n")


def watch_many(setting: Setting, items: int) -> list[Look]:
    """Memory after each tenth of a long stream."""
    import psutil

    from finetune.applications.monitor.load import load_monitor
    from finetune.applications.monitor.sources import FileSource
    from finetune.applications.monitor.store import Store
    from finetune.applications.monitor.watch import Options, watch

    trained = load_monitor(setting.run)
    monitor = replace(trained, reader=RandomReader(trained.reader.topics))
    process, looks, taken = psutil.Process(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        stream, state = Path(folder) / "stream.jsonl", Path(folder) / "state.db"
        write_headlines(stream, items)
        with Store(state) as store:
            start = read_clock()

            def on_batch() -> None:
                nonlocal taken
                taken = store.read_counts().get("items", 0)
                if taken * LOOKS // items > len(looks):
                    size = sum(path.stat().st_size for path in state.parent.glob("state.db*")) / 2**20
                    memory = process.memory_info().rss / 2**20
                    looks.append(Look(taken, taken / (read_clock() - start), memory, size))

            watch(FileSource(stream, is_followed=False), monitor, store, (), Options(on_batch=on_batch))
    return looks


def describe(outcome: Outcome) -> str:
    """One line of one round."""
    return f"{outcome.items_per_second:9.1f} items/s"


def list_lines(looks: Sequence[Look]) -> Iterator[str]:
    """As Markdown."""
    yield "| items | items/s | memory MB | state file MB |"
    yield "|---|---|---|---|"
    for look in looks:
        yield f"| {look.items:,} | {look.items_per_second:,.0f} | {look.memory_mb:,.0f} | {look.state_mb:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--stream", type=Path, default=STREAM, help="JSONL; default the sample market_stream")
    parser.add_argument("--engine", help="an export of the run that reads in its place")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=1_000_000, help="of the second part; 0 leaves it out")
    parser.add_argument("--json", type=Path, default=None, help="write every round to this file")
    options = parser.parse_args()
    machine = run_alone(describe_machine)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    setting = Setting(options.run, options.stream, options.engine)
    found = run_rounds({"monitor": watch_stream, "ceiling": measure_ceiling}, (setting,), options.rounds, describe)
    rates = {name: [one.items_per_second for one in rounds] for name, rounds in found.items()}
    if options.rounds:
        share = compute_ratio(rates["monitor"], rates["ceiling"])
        print(f"\n{statistics.median(rates['monitor']):,.0f} items/s, {share:.0%} of the products")
    looks = run_alone(watch_many, setting, options.items) if options.items else []
    print("\n".join(list_lines(looks)))
    write_json(options.json, machine=machine, found=rates, looks=looks)


if __name__ == "__main__":
    main()
