"""The README's results table, from the files of finished runs; no number is typed.

    .venv/bin/python benchmarks/results_table.py runs/sentiment_twitter/* runs/sentiment_twitter_full/*

Runs of one name are seeds of one row, one for each of their tasks: the mean over seeds, then each seed's value with its
interval.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from finetune.artifact.run_folder import RunFolder, load_json
from finetune.evaluation.wording import decimals_of, format_number, format_score
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.reference import SCRATCH_BASE

HEAD = "| recipe | tuning | test score | seeds | simple methods | trained weights | minutes |"
SHOWN = {
    "frozen_logreg": "frozen base",
    "tfidf_logreg": "TF-IDF",
    "ngram": "n-grams",
    "nearest": "nearest pair",
    "frozen": "frozen base",
    "bm25": "BM25",
    "sequence": "first stage alone",
    "own_history": "own history",
    "ease": "EASE",
    "co_occurrence": "co-occurrence",
}
"""The baselines that are worth a place; the others are weaker."""


def build_rows(runs: list[RunFolder]) -> list[str]:
    """A row for each task: every run must be of the same recipe but for its seed."""
    recipes = [load_recipe(run.recipe) for run in runs]
    if any(without_seed(recipe) != without_seed(recipes[0]) for recipe in recipes):
        sys.exit(f"{runs[0].path.parent}: the runs must differ only in train.seed. Name those to compare.")
    return [build_row(runs, recipes, task) for task in runs[0].evaluations()]


def build_row(runs: list[RunFolder], recipes: list[Recipe], task: str) -> str:
    """One row."""
    tests = [load_json(run.evaluations()[task] / "test.json") for run in runs]
    training = [run.load_status()["training"] for run in runs]
    first, metric = recipes[0], next(iter(tests[0]["metrics"]))
    digits = decimals_of(metric)
    seeds = "; ".join(
        f"{recipe.train.seed}: {format_score(test['metrics'][metric], digits)}"
        for recipe, test in zip(recipes, tests, strict=True)
    )

    def average(systems: list[dict[str, Any]]) -> str:
        return format_number(statistics.mean(system["metrics"][metric]["value"] for system in systems), digits)

    baselines = [
        f"{words} {average([test['baselines'][name] for test in tests])}"
        for name, words in SHOWN.items()
        if name in tests[0]["baselines"]
    ]
    count = training[0]["parameters"]
    cells = [
        first.name if len(first.tasks) == 1 else f"{first.name}, {task}",
        "from scratch" if first.model.base == SCRATCH_BASE else first.adapter.method,
        f"**{average(tests)}** {metric}",
        seeds,
        ", ".join(baselines),
        f"{count['trained'] / count['total']:.1%}",
        f"{statistics.mean(record['seconds'] for record in training) / 60:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def without_seed(recipe: Recipe) -> Recipe:
    """The recipe without its seed and without what neither trains nor scores, to compare."""
    train = recipe.train.model_copy(update={"seed": 0})
    evaluate = recipe.evaluate.model_copy(update={"slices": []})
    return recipe.model_copy(update={"train": train, "evaluate": evaluate, "monitor": None})


def main() -> None:
    """Group the named runs by recipe and print the table."""
    groups: dict[str, list[RunFolder]] = {}
    for path in sys.argv[1:]:
        run = RunFolder(Path(path))
        if run.load_status().get("state") == "finished":
            groups.setdefault(run.path.parent.name, []).append(run)
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    for runs in groups.values():
        print("\n".join(build_rows(sorted(runs, key=lambda run: load_recipe(run.recipe).train.seed))))


if __name__ == "__main__":
    main()
