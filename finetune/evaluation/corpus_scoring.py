"""Everything that is known on one split about a model without classes: what `scoring.py` is for classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.errors import DivergedError
from finetune.evaluation.corpus_metrics import (
    CORPUS_METRICS,
    Floats,
    compute_corpus_metric,
    compute_rank_statistics,
    compute_text_statistics,
)
from finetune.evaluation.gates import check_gates, select_gate_metrics
from finetune.evaluation.intervals import Estimate, Resampling, compute_interval, draw_weights
from finetune.evaluation.metrics import Ints
from finetune.evaluation.scoring import compare_systems, round_numbers
from finetune.evaluation.slices import score_slices
from finetune.recipe.schema import EvaluateSection

Tables = Mapping[str, Floats]
"""Metric -> its statistics of each row, (N, S)."""


@dataclass(frozen=True, slots=True)
class SystemOutput:
    """What a model or a baseline said about N rows; what it does not say is None."""

    likelihood: Floats | None = None
    """Nats, tokens, likeliest tokens and bytes of each row's reference, (N, 4)."""
    texts: Sequence[str] | None = None
    """What it wrote, N texts."""
    places: Sequence[Ints] | None = None
    """Places of the right entries in its ranking, from 1: N arrays."""
    tables: Mapping[str, Floats] = field(default_factory=dict)
    """Statistics of metrics that were computed where the rows were, (N, S) each."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What was chosen on validation."""


@dataclass(frozen=True, slots=True)
class CorpusSplit:
    """A split of N rows and what the systems said about them."""

    name: str
    """"validation" or "test"."""
    model: SystemOutput
    references: Sequence[str] | None
    """What should be written, N texts; None where nothing is."""
    inputs: Sequence[str]
    """For the slice `length`."""
    values: Sequence[Mapping[str, Any]]
    """Column -> value of each row, for slices."""
    resampling: Resampling
    baselines: Mapping[str, SystemOutput] = field(default_factory=dict)
    opened: int | None = None
    """How often the test split was opened."""


def score_corpus(split: CorpusSplit, section: EvaluateSection) -> dict[str, Any]:
    """Score a split: metrics with intervals, baselines, slices and, on test, the gates.

    Metrics are those of the recipe in its order, then those that only a gate names. All systems see the same resamples.
    A metric that a baseline says nothing about is left out of it: a translation that was copied has no likelihood.

    Returns:
        What is written as JSON: numbers rounded to six digits, None where a number is not defined.

    Raises:
        DivergedError: The model's nats hold nan or infinity.
        DataError: A column of `evaluate.slices` does not exist.
        RecipeError: A gate names a metric that does not exist.
    """
    _check_finite(split.name, split.model.likelihood)
    names = list(dict.fromkeys([*section.metrics, *select_gate_metrics(section.gates)]))
    resampling = split.resampling
    tables = _build_tables(split.model, split.references, names)
    nothing = Estimate(float("nan"), np.full(resampling.resamples, np.nan))
    model = dict.fromkeys(names, nothing) | compute_corpus_estimates(tables, resampling)

    def score_rows(rows: Ints) -> dict[str, Any]:
        own = {name: table[rows] for name, table in tables.items()}
        estimates = compute_corpus_estimates(own, resampling.take(rows))
        return {name: compute_interval(estimate, section.confidence) for name, estimate in estimates.items()}

    scored: dict[str, Any] = {
        "split": split.name,
        "rows": len(split.inputs),
        "confidence": section.confidence,
        **resampling.describe(),
        **({} if split.opened is None else {"opened": split.opened}),
        "metrics": {name: compute_interval(estimate, section.confidence) for name, estimate in model.items()},
        "baselines": {
            name: compare_systems(
                model,
                compute_corpus_estimates(_build_tables(baseline, split.references, names), resampling),
                baseline.settings,
                section.confidence,
            )
            for name, baseline in split.baselines.items()
        },
        "slices": score_slices(split.inputs, split.values, section.slices, score_rows),
    }
    scored = round_numbers(scored)
    # After rounding, so that a reader of the file comes to the same verdict.
    scored["gates"] = check_gates(section.gates, scored) if split.name == "test" else {}
    return scored


def compute_corpus_estimates(tables: Tables, resampling: Resampling) -> dict[str, Estimate]:
    """Value and resampled values of each metric."""
    values = {name: compute_corpus_metric(name, table) for name, table in tables.items()}
    samples = {name: np.full(resampling.resamples, np.nan) for name in tables}
    n_rows = len(next(iter(tables.values()), ()))
    start = 0
    for weights in draw_weights(n_rows, resampling):
        block = slice(start, start + weights.shape[1])
        for name, table in tables.items():
            samples[name][block] = CORPUS_METRICS[name].compute(table.T @ weights)
        start = block.stop
    return {name: Estimate(float("nan") if value is None else value, samples[name]) for name, value in values.items()}


def _build_tables(output: SystemOutput, references: Sequence[str] | None, names: Sequence[str]) -> dict[str, Floats]:
    """Statistics of each metric that the output says something about."""
    tables = {name: output.tables[name] for name in names if name in output.tables}
    for name in names:
        if CORPUS_METRICS[name].needs == "ranks":
            if output.places is not None:
                tables[name] = compute_rank_statistics(name, output.places)
        elif CORPUS_METRICS[name].needs == "likelihood":
            if output.likelihood is not None:
                tables[name] = np.asarray(output.likelihood, dtype=np.float64)
        elif output.texts is not None and references is not None:
            tables[name] = compute_text_statistics(name, output.texts, references)
    return tables


def _check_finite(name: str, likelihood: Floats | None) -> None:
    if likelihood is None:
        return
    broken = int((~np.isfinite(likelihood)).any(axis=1).sum())
    if broken:
        raise DivergedError(
            f"{name}: the model's loss must be finite, got nan or infinity in {broken} of {len(likelihood)} rows. "
            "Lower train.learning_rate, or set train.precision: float32."
        )
