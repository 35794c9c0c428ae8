"""From a run to a monitor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.applications.monitor.reader import TrainedReader, build_reader
from finetune.applications.monitor.records import Reader, Watcher
from finetune.applications.monitor.shares import Quantifier, load_quantifier, save_quantifier
from finetune.applications.monitor.thresholds import Thresholds, load_thresholds, save_thresholds
from finetune.applications.monitor.watcher import TopicWatcher
from finetune.artifact.run_folder import RunFolder, find_run, load_json, save_json
from finetune.errors import UsageError
from finetune.recipe import load_recipe
from finetune.recipe.applications import MonitorSection

_BUILT_WITH, _QUANTIFIER, _THRESHOLDS = "built_with.json", "quantifier.json", "thresholds.json"


@dataclass(frozen=True)
class Monitor:
    """What a run gives the loop that watches a stream.

    Args:
        reader: the trained model.
        watcher: what decides, before it has seen anything.
        section: of the recipe.
    """

    reader: Reader
    watcher: Watcher
    section: MonitorSection


def load_monitor(run: str | Path, *, engine: str | None = None) -> Monitor:
    """The monitor of a finished run.

    Args:
        run: the run's folder, or runs/<name> for its latest finished run.
        engine: the format of an export of the run that reads in its place.

    Raises:
        UsageError: no such run, one without a monitor, or with one that was built with another model.
        ResourceError: a file is missing or damaged.
    """
    folder = find_run(run)
    section, place = load_section(folder), find_monitor_folder(folder)
    again = f"Build it in Python: finetune.applications.monitor.build.build_monitor({str(folder.path)!r})"
    if not (place / _BUILT_WITH).exists():
        raise UsageError(f"{folder.path}: must hold a monitor in {place.name}/, got none. {again}")
    reader = build_reader(folder, section, engine)
    model = str(load_json(place / _BUILT_WITH).get("model"))
    if model != reader.fingerprint:
        raise UsageError(
            f"{place}: must be built with this model, {reader.fingerprint[:12]}, got one of {model[:12]}. {again}"
        )
    quantifier = load_quantifier(place / _QUANTIFIER)
    return Monitor(reader, TopicWatcher(quantifier, load_thresholds(place / _THRESHOLDS), section), section)


def is_built(run: str | Path) -> bool:
    """Whether a finished run has its monitor, or its recipe asks for none.

    Raises:
        UsageError: no such run.
    """
    folder = find_run(run)
    return (find_monitor_folder(folder) / _BUILT_WITH).exists() or load_recipe(folder.recipe).monitor is None


def save_monitor(folder: RunFolder, reader: TrainedReader, quantifier: Quantifier, thresholds: Thresholds) -> None:
    """Write what `load_monitor` reads."""
    place = find_monitor_folder(folder)
    save_quantifier(place / _QUANTIFIER, quantifier)
    save_thresholds(place / _THRESHOLDS, thresholds)
    # Last: without it there is no monitor.
    save_json(place / _BUILT_WITH, {"model": reader.fingerprint, "topics": list(reader.topics)})


def load_section(run: RunFolder) -> MonitorSection:
    """What the recipe of a run says of its monitor.

    Raises:
        UsageError: nothing.
    """
    section = load_recipe(run.recipe).monitor
    if section is None:
        raise UsageError(f"{run.path}: must come from a recipe with `monitor`, got one without. Add it, and run.")
    return section


def find_monitor_folder(run: RunFolder) -> Path:
    """Where the monitor of a run lies."""
    return run.path / "monitor"
