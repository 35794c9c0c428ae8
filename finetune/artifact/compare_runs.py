"""Is one run really better than another? Paired bootstrap tests on the test rows that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.artifact.predictions import Predictions, load_predictions
from finetune.artifact.run_folder import RunFolder, find_run
from finetune.errors import UsageError
from finetune.evaluation.intervals import Estimate, adjust_p_values, compute_difference, compute_interval
from finetune.evaluation.metrics import is_larger_better
from finetune.evaluation.scoring import round_numbers
from finetune.evaluation.wording import decimals_of, format_interval, format_p, format_signed, listed, name_of

RESAMPLES = 10_000
"""More than for an interval: a p-value that is corrected for many runs lies far out."""


def compare_runs(references: Sequence[str | Path], *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Hold finished runs against the first one, on the same test rows.

    Args:
        references: two or more runs; `runs/NAME` means its latest finished one, `runs/NAME:TASK` one of its tasks.
        resamples: of the bootstrap.

    Returns:
        Scores with intervals, and for each run but the first the paired difference to it: "value", "low", "high",
        "p_value", and "p_adjusted" by Holm's method, over the runs, which the answers go by. "answer" says it in words.

    Raises:
        UsageError: fewer than two runs, one run twice, or other test rows or classes than the first run's.
    """
    names = _name_runs(references)
    loaded = {name: load_predictions(*_find_task(name)) for name in names}
    first = loaded[names[0]]
    for name in names[1:]:
        _check_rows(names[0], first, name, loaded[name])
    metrics = [metric for metric in first.metrics if all(metric in one.metrics for one in loaded.values())]
    if not metrics:
        known = "; ".join(f"{name}: {', '.join(one.test['metrics'])}" for name, one in loaded.items())
        raise UsageError(f"compare: the runs must share a metric that their predictions tell, got {known}.")
    resampling = first.resample(resamples, int(first.test["seed"]))
    confidence = float(first.test["confidence"])
    estimates = {name: one.compute_estimates(metrics, resampling) for name, one in loaded.items()}
    differences = _compute_differences(names, metrics, estimates, confidence)
    compared: dict[str, Any] = round_numbers(
        {
            "rows": first.count,
            "metric": metrics[0],
            "confidence": confidence,
            **resampling.describe(),
            "runs": {
                name: {
                    "folder": str(one.run.path),
                    "metrics": {key: compute_interval(value, confidence) for key, value in estimates[name].items()},
                    "difference": differences.get(name, {}),
                }
                for name, one in loaded.items()
            },
        }
    )
    return compared | {"answer": describe_answer(compared)}


def describe_answer(compared: Mapping[str, Any]) -> str:
    """Whether any run is really better or worse than the first, in plain sentences."""
    metric, runs = compared["metric"], compared["runs"]
    first, *others = runs
    level, larger = 1 - compared["confidence"], is_larger_better(metric)
    sentences, open_ = [], []
    for name in others:
        difference = runs[name]["difference"][metric]
        value, p_value = difference["value"], difference["p_adjusted"]
        if value is None or p_value is None or p_value >= level:
            open_.append(name)
            continue
        word = "better" if (value > 0) == larger else "worse"
        sentences.append(
            f"{name} is really {word} than {first} in {name_of(metric)}: {describe_difference(difference, metric)}."
        )
    if open_:
        pair = f"{listed(open_)} cannot be told from {first} by {name_of(metric)} on these {compared['rows']:,} rows"
        if len(open_) == 1:
            pair += f": {describe_difference(runs[open_[0]]['difference'][metric], metric)}, which chance alone can do"
        sentences.append(f"{pair}.")
    return " ".join(sentences)


def describe_difference(difference: Mapping[str, Any], metric: str) -> str:
    """`+0.021 (0.008 to 0.034), p = 0.004`."""
    digits = decimals_of(metric)
    interval = format_interval(difference, digits)
    words = [format_signed(difference["value"], digits) + (f" ({interval})" if interval else "")]
    return ", ".join(filter(None, [*words, format_p(difference.get("p_adjusted"))]))


def _name_runs(references: Sequence[str | Path]) -> list[str]:
    names = [str(reference) for reference in references]
    if len(names) < 2:
        raise UsageError(f"compare: must get two or more runs, got {len(names) or 'none'}. Add another one.")
    folders: dict[tuple[Path, str | None], str] = {}
    for name in names:
        run, task = _find_task(name)
        folder = run.path.resolve(), task
        if folder in folders:
            raise UsageError(
                f"compare: must get different runs, got {folders[folder]} and {name}, which are one. "
                "Name each run once."
            )
        folders[folder] = name
    return names


def _find_task(reference: str) -> tuple[RunFolder, str | None]:
    """A run, and the task behind a colon."""
    head, colon, task = reference.rpartition(":")
    if not colon or Path(reference).exists():
        return find_run(reference), None
    return find_run(head), task


def _check_rows(first_name: str, first: Predictions, name: str, other: Predictions) -> None:
    """Differences are paired by row, so both runs must have been tested on the same rows with the same truth."""
    if first.keys == other.keys:
        if first.labels == other.labels:
            return
        differing = ", ".join(sorted(set(first.labels) ^ set(other.labels)))
        raise UsageError(
            f"{name}: must be judged by the same classes as {first_name}, got {len(other.labels):,} and "
            f"{len(first.labels):,}, which differ in {differing}. Train both with the same `labels` and `out_of_scope`."
        )
    ours, theirs = set(first.keys), set(other.keys)
    raise UsageError(
        f"{name}: must be tested on the same rows as {first_name}, got {len(ours & theirs):,} rows in common of "
        f"{len(ours):,} and {len(theirs):,}. Train both on the same data with the same split and seed."
    )


def _compute_differences(
    names: Sequence[str],
    metrics: Sequence[str],
    estimates: Mapping[str, Mapping[str, Estimate]],
    confidence: float,
) -> dict[str, dict[str, dict[str, float]]]:
    """Run -> metric -> paired difference to the first run."""
    first, *others = names
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in others}
    for metric in metrics:
        each = [compute_difference(estimates[name][metric], estimates[first][metric], confidence) for name in others]
        adjusted = adjust_p_values([difference["p_value"] for difference in each])
        for name, difference, p_value in zip(others, each, adjusted, strict=True):
            found[name][metric] = difference | {"p_adjusted": p_value}
    return found
