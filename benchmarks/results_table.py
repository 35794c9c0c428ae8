"""The README's results table, from the files of finished runs; no number is typed.

    .venv/bin/python benchmarks/results_table.py runs/sentiment_twitter/* runs/sentiment_twitter_full/*

Runs of one name are seeds of one row: the mean over seeds, then each seed's value with its interval.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from finetune.artifact.run_folder import RunFolder, load_json
from finetune.evaluation.wording import format_score
from finetune.recipe import Recipe, load_recipe

HEAD = "| recipe | tuning | test score | seeds | frozen base | TF-IDF | trained weights | minutes |"


def build_row(runs: list[RunFolder]) -> str:
    """One row: every run must be of the same recipe but for its seed."""
    recipes = [load_recipe(run.recipe) for run in runs]
    tests = [load_json(run.evaluation / "test.json") for run in runs]
    training = [run.load_status()["training"] for run in runs]
    first, metric = recipes[0], next(iter(tests[0]["metrics"]))
    if any(without_seed(recipe) != without_seed(first) for recipe in recipes):
        sys.exit(f"{runs[0].path.parent}: the runs must differ only in train.seed. Name those to compare.")
    values = [test["metrics"][metric]["value"] for test in tests]
    seeds = "; ".join(
        f"{recipe.train.seed}: {format_score(test['metrics'][metric])}"
        for recipe, test in zip(recipes, tests, strict=True)
    )
    baselines = [
        f"{statistics.mean(test['baselines'][name]['metrics'][metric]['value'] for test in tests):.3f}"
        for name in ("frozen_logreg", "tfidf_logreg")
    ]
    count = training[0]["parameters"]
    cells = [
        first.name,
        first.adapter.method,
        f"**{statistics.mean(values):.3f}** {metric}",
        seeds,
        *baselines,
        f"{count['trained'] / count['total']:.1%}",
        f"{statistics.mean(record['seconds'] for record in training) / 60:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def without_seed(recipe: Recipe) -> Recipe:
    """The recipe with one seed for all, to compare."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 0})})


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
        print(build_row(sorted(runs, key=lambda run: load_recipe(run.recipe).train.seed)))


if __name__ == "__main__":
    main()
