"""One adapter from several: the weighted sum of their updates, as a `model/` folder of its own."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.adapters.merging import add_updates, cut_rank, load_updates, save_updates
from finetune.artifact.save import seal_folder
from finetune.artifact.saved import Saved, open_saved, resolve_shared_base
from finetune.errors import UsageError


@dataclass(frozen=True)
class Merged:
    """A merged adapter.

    Args:
        folder: what `load` and `finetune predict` take.
        rank: of its updates.
        error: relative error of the updates; 0 unless their rank was cut.
    """

    folder: Path
    rank: int
    error: float


def merge_adapters(runs: Mapping[str | Path, float], output: str | Path, *, rank: int | None = None) -> Merged:
    """Add the updates of several LoRA adapters of one base, each times its weight; heads get the weighted mean.

    The sum is exact and has the rank of all of them together, unless it is cut. It is not calibrated: a temperature
    belongs to the model that it was fitted on.

    Args:
        runs: run or `model/` folder -> weight, above 0.
        output: a new folder; appears whole or not at all.
        rank: cut the updates to it, with the least error that it allows.

    Raises:
        UsageError: less than two runs, weights or a rank that mean nothing, an output that exists; runs that differ in
            base, architecture or task; an adapter that is no plain LoRA.
        ModelError: a damaged folder, or the base is not at hand.
    """
    folder = Path(output)
    _check_request(runs, folder, rank)
    saved = {str(reference): open_saved(reference) for reference in runs}
    resolve_shared_base(saved)
    _check_tasks(saved)
    updates = add_updates([load_updates(one.folder) for one in saved.values()], list(runs.values()))
    updates, error = cut_rank(updates, rank) if rank is not None else (updates, 0.0)

    first = next(iter(saved.values()))
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(first.folder, temporary)
    save_updates(updates, temporary)
    longest = max(one.settings["max_length"] for one in saved.values())
    temperatures = dict.fromkeys(first.settings.get("temperatures", {}), 1.0)
    fresh = {"temperature": 1.0, "temperatures": temperatures, "fitted": {}, "max_length": longest}
    seal_folder(temporary, folder, first.settings | fresh)
    return Merged(folder, updates.rank, error)


def _check_request(runs: Mapping[str | Path, float], folder: Path, rank: int | None) -> None:
    if len(runs) < 2:
        raise UsageError(f"merge: must get at least two runs, got {len(runs)}. Name each with its weight.")
    for reference, weight in runs.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise UsageError(f"{reference}: its weight must be a number above 0, got {weight:g}.")
    if rank is not None and rank < 1:
        raise UsageError(f"rank: must be at least 1, got {rank}. Leave it out for the exact sum.")
    if folder.exists():
        raise UsageError(f"{folder}: must be a new folder, got one that exists. Choose another --output.")


def _check_tasks(saved: Mapping[str, Saved]) -> None:
    (first, expected), *others = ((name, one.task.to_config()) for name, one in saved.items())
    for name, config in others:
        if config.get("labels") != expected.get("labels"):
            raise UsageError(
                f"merge: heads must have the same classes in the same order, got {expected.get('labels')} in {first} "
                f"and {config.get('labels')} in {name}. Use both on one base instead: finetune.load_adapters."
            )
        for key in expected:  # codes in the data are read in training only
            if key != "values" and config.get(key) != expected[key]:
                raise UsageError(
                    f"merge: runs must share their task's {key}, got {expected[key]!r} in {first} and "
                    f"{config.get(key)!r} in {name}. Train one anew like the other."
                )
