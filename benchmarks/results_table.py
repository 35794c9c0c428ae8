"""The README's results table, from the files of finished runs; no number is typed.

    .venv/bin/python benchmarks/results_table.py runs/sentiment_twitter/* runs/sentiment_twitter_full/*

Runs of one name are seeds of one row, one for each of their tasks and one for their assistant end to end: the mean over
seeds, then each seed's value with its interval.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from finetune.applications.support.load import find_support_folder
from finetune.artifact.run_folder import RunFolder, load_json
from finetune.data.catalog import card_names, load_card
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
OUTCOMES = {"right": "right", "wrong": "wrong", "asked_back": "asked back", "handed_over": "handed over"}


def build_rows(runs: list[RunFolder]) -> list[str]:
    """A row for each task: every run must be of the same recipe but for its seed."""
    recipes = [load_recipe(run.recipe) for run in runs]
    if any(without_seed(recipe) != without_seed(recipes[0]) for recipe in recipes):
        sys.exit(f"{runs[0].path.parent}: the runs must differ only in train.seed. Name those to compare.")
    rows = [build_row(runs, recipes, task) for task in runs[0].evaluations()]
    return rows if recipes[0].assistant is None else [*rows, build_assistant_row(runs, recipes)]


def build_row(runs: list[RunFolder], recipes: list[Recipe], task: str) -> str:
    """One row."""
    tests = [load_json(run.evaluations()[task] / "test.json") for run in runs]
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
    name = first.name if len(first.tasks) == 1 else f"{first.name}, {task}"
    return join_cells(runs, first, name, f"**{average(tests)}** {metric}", seeds, ", ".join(baselines))


def build_assistant_row(runs: list[RunFolder], recipes: list[Recipe]) -> str:
    """What became of the test questions in scope, each at once, from support/test.json."""
    tests = [load_json(find_support_folder(run) / "test.json")["in_scope"] for run in runs]
    first, tasks = recipes[0], recipes[0].tasks.values()
    is_illustrative = any(task.data in card_names() and load_card(task.data).illustrative for task in tasks)
    means = {key: format_number(statistics.mean(test[key]["value"] for test in tests)) for key in OUTCOMES}
    means["right"] = f"**{means['right']}**"
    seeds = "; ".join(
        f"{recipe.train.seed}: " + ", ".join(f"{OUTCOMES[key]} {format_score(test[key])}" for key in OUTCOMES)
        for recipe, test in zip(recipes, tests, strict=True)
    )
    name = f"{first.name}, end to end in scope{' (illustrative sample)' if is_illustrative else ''}"
    return join_cells(runs, first, name, ", ".join(f"{means[key]} {OUTCOMES[key]}" for key in OUTCOMES), seeds, "")


def join_cells(runs: list[RunFolder], recipe: Recipe, name: str, *scores: str) -> str:
    """A row: test score, seeds and simple methods between what all rows of these runs have in common."""
    training = [run.load_status()["training"] for run in runs]
    count = training[0]["parameters"]
    cells = [
        name,
        "from scratch" if recipe.model.base == SCRATCH_BASE else recipe.adapter.method,
        *scores,
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
