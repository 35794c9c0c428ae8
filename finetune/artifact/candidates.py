"""What the runs of a comparison's candidates have come to, in the layout of results.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune.artifact.predictions import Predictions, load_predictions
from finetune.artifact.run_folder import RunFolder, load_json, now
from finetune.errors import FinetuneError, GateError
from finetune.evaluation.gates import raise_on_failed_gates
from finetune.evaluation.intervals import (
    Estimate,
    Interval,
    average_over_seeds,
    compute_interval,
    compute_ratio,
)
from finetune.evaluation.metrics import is_larger_better
from finetune.evaluation.scoring import round_numbers
from finetune.recipe.comparison import Comparison
from finetune.recipe.schema import Recipe


@dataclass(frozen=True)
class Look:
    """A learning rate that was tried, and what validation said; or the error instead."""

    rate: float
    run: RunFolder | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A candidate after its runs: `error` says why it has no score, else `runs` has one for each seed."""

    name: str
    recipe: Recipe
    looks: Sequence[Look]
    watched: str
    """The metric that the learning rate was chosen by."""
    rate: float | None = None
    runs: Sequence[RunFolder] = ()
    error: str | None = None


def build_results(section: Comparison, recipe_name: str, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Scores with intervals, costs and shares of each candidate, and how its learning rate was chosen.

    The interval of a score is the bootstrap's, over test rows and training seeds: see `average_over_seeds`. Candidates
    see the same draws, so that shares of the reference are paired.
    """
    candidates, said = _load_scored(candidates)
    everyone = [predictions for each in said.values() for predictions in each]
    metrics = [
        name for name in (everyone[0].metrics if everyone else []) if all(name in one.metrics for one in everyone)
    ]
    settings = candidates[0].recipe.evaluate
    estimates = {name: _estimate(each, metrics, settings.resamples, section.seeds[0]) for name, each in said.items()}
    reference = estimates.get(section.reference or "", {})
    described = {}
    for one in candidates:
        found = estimates.get(one.name, {})
        scores = {name: compute_interval(estimate, settings.confidence) for name, estimate in found.items()}
        described[one.name] = {
            "changes": section.candidates[one.name],
            "metrics": round_numbers(scores),
            "share": round_numbers(_compute_share(found, reference, metrics, settings.confidence)),
            **_describe_search(one),
            **_describe_runs(one, section.seeds, said.get(one.name, []), metrics),
            "error": one.error,
        }
    return {
        "name": section.name,
        "description": section.description,
        "created": now(),
        "recipe": recipe_name,
        "set": section.set,
        "seeds": section.seeds,
        "reference": section.reference,
        "metric": metrics[0] if metrics else settings.metrics[0],
        "rows": everyone[0].count if everyone else None,
        "confidence": settings.confidence,
        "resamples": settings.resamples,
        "candidates": described,
        "failed": {one.name: one.error for one in candidates if one.error}
        | {name: one["missed_gates"] for name, one in described.items() if one.get("missed_gates")},
    }


def _load_scored(candidates: Sequence[Candidate]) -> tuple[list[Candidate], dict[str, list[Predictions]]]:
    """Predictions of each scored candidate, one for each seed; with an error where the test rows differ."""
    checked: list[Candidate] = []
    said: dict[str, list[Predictions]] = {}
    for one in candidates:
        if one.error is None:
            try:
                said[one.name] = _load_comparable(one, next(iter(said.items()), None))
            except FinetuneError as error:
                one = replace(one, error=str(error))
        checked.append(one)
    return checked, said


def _load_comparable(one: Candidate, first: tuple[str, Sequence[Predictions]] | None) -> list[Predictions]:
    loaded = [load_predictions(run) for run in one.runs]
    for ours, theirs in zip(loaded, first[1] if first else [], strict=False):
        if (ours.keys, ours.labels) != (theirs.keys, theirs.labels):
            raise FinetuneError(
                f"{ours.run.path}: must be tested on the same rows as {theirs.run.path}, got other rows. Remove the "
                "run that was trained before the data changed, and compare again."
            )
    return loaded


def _estimate(each: Sequence[Predictions], metrics: Sequence[str], resamples: int, seed: int) -> dict[str, Estimate]:
    """Metric -> mean over the training seeds."""
    # Where all seeds have the same test rows, chance in those is one and the same; else each seed has its own.
    shared = all(one.keys == each[0].keys for one in each)
    by_seed = [
        one.compute_estimates(
            metrics, each[0].resample(resamples, seed) if shared else one.resample(resamples, seed + place)
        )
        for place, one in enumerate(each)
    ]
    return {name: average_over_seeds([found[name] for found in by_seed], seed) for name in metrics}


def _compute_share(
    own: Mapping[str, Estimate], reference: Mapping[str, Estimate], metrics: Sequence[str], confidence: float
) -> Interval | None:
    """Share of the reference's score, by the first metric; None where there is no reference, or less is better."""
    if not own or not reference or not is_larger_better(metrics[0]):
        return None
    return compute_ratio(own[metrics[0]], reference[metrics[0]], confidence)


def _describe_search(one: Candidate) -> dict[str, Any]:
    return {
        "learning_rate": one.rate,
        "chosen_by": one.watched,
        "learning_rates": [
            {
                "rate": look.rate,
                "value": round_numbers(look.metrics.get(one.watched)),
                "loss": round_numbers(look.metrics.get("loss")),
                "run": str(look.run.path) if look.run else None,
                "error": look.error,
            }
            for look in one.looks
        ],
    }


def _describe_runs(
    one: Candidate, seeds: Sequence[int], said: Sequence[Predictions], metrics: Sequence[str]
) -> dict[str, Any]:
    """What the judged runs cost; of a candidate without a score, nothing."""
    if not said:
        return {"seeds": []}
    training = [run.load_status()["training"] for run in one.runs]
    lock = load_json(one.runs[0].lock)
    files = [path for path in one.runs[0].model.rglob("*") if path.is_file()]
    return {
        "seeds": [
            {
                "seed": seed,
                "run": str(predictions.run.path),
                "value": predictions.test["metrics"][metrics[0]]["value"] if metrics else None,
                "opened": predictions.test["opened"],
            }
            for seed, predictions in zip(seeds, said, strict=True)
        ],
        "parameters": training[0]["parameters"],
        "seconds": round(statistics.mean(record["seconds"] for record in training), 1),
        "peak_memory_mb": max((record.get("peak_memory_mb") or 0 for record in training), default=0) or None,
        "model_bytes": sum(path.stat().st_size for path in files),
        "weights_bytes": sum(path.stat().st_size for path in files if path.suffix == ".safetensors"),
        "device": training[0]["device"],
        "precision": lock["precision"],
        "missed_gates": _describe_missed(said),
    }


def _describe_missed(said: Sequence[Predictions]) -> str | None:
    """The gates that the first run with a missed one names."""
    for predictions in said:
        try:
            raise_on_failed_gates(predictions.test["gates"])
        except GateError as error:
            return str(error)
    return None
