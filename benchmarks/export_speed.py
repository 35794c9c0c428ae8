"""The speed of every export of a run beside the run itself and transformers' pipeline, from text to logits.

All take turns in one process, because machines are shared and noisy: read the ratios, which compare neighbours in time,
not the absolute rates. Rows are those of the validation split. Further runs of the same task, such as a compressed
one, take their turns on the same rows, against the first one's pipeline.

To repeat, on a machine that does nothing else:

    .venv/bin/finetune export runs/sentiment --format onnx-int8
    .venv/bin/python benchmarks/export_speed.py runs/sentiment runs/sentiment-compressed --rounds 5 --json export.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measuring import describe_machine, write_json

from finetune.artifact.export.formats import FORMATS
from finetune.artifact.export.speed import Contender, measure
from finetune.artifact.load import list_predictors, load
from finetune.artifact.run_folder import find_run
from finetune.artifact.saved import open_saved
from finetune.data.batches import Examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runs = [find_run(name) for name in arguments.runs]
    contenders: dict[str, Contender] = {}
    for run in runs:
        loaded = load(run.model)
        tokenizer = next(iter(list_predictors(loaded, [""]).values())).tokenizer
        before = "" if run is runs[0] else f"{run.path.parent.name} "
        contenders[f"{before}run"] = Contender(loaded.model.cpu(), tokenizer)
        for name in FORMATS:
            if run.export(name).exists():
                contenders[f"{before}{name}"] = Contender(load(run.path, engine=name).model, tokenizer)
    run = runs[0]
    saved, examples = open_saved(run.model), Examples.load(run.examples("validation"))
    found = measure(saved.task, contenders, examples, saved.settings["max_length"], rounds=arguments.rounds)
    print(f"{found['rows']} rows of {found['tokens_per_row']} tokens, {torch.get_num_threads()} threads")
    print(f"{'':40}{'rows/s':>10}{'times':>8}{'p50 ms':>10}{'p95 ms':>10}{'times':>8}")
    for name in ("pipeline", *contenders):
        one, ratio = found[name], found["ratios"].get(name, {"rows_per_second": 1.0, "p50": 1.0})
        print(
            f"{name:40}{one['rows_per_second']:>10,}{ratio['rows_per_second']:>8}{one['p50_ms']:>10}"
            f"{one['p95_ms']:>10}{ratio['p50']:>8}"
        )
    write_json(arguments.json, machine=describe_machine(), speed=found)


if __name__ == "__main__":
    main()
