"""A run's folder: where everything lies, who holds it, and how `runs/<name>` becomes one run."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune.errors import ResourceError, UsageError
from finetune.recipe.files import write_file_atomically

RUNS_FOLDER = Path("runs")
SETTINGS = "finetune.json"
"""In a saved model's folder, such as `model/` of a run."""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class RunFolder:
    """Names of everything in a run's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every value resolved."""
        return self.path / "recipe.resolved.yaml"

    @property
    def recipe_folder(self) -> Path:
        """Where the recipe lay when the run began, for its relative paths."""
        return Path(self.load_status().get("recipe_folder", "."))

    @property
    def lock(self) -> Path:
        """Versions, base and data fingerprints: what a repetition needs."""
        return self.path / "run.lock"

    @property
    def status(self) -> Path:
        """State of the run: started, trained, finished, stopped, failed."""
        return self.path / "status.json"

    @property
    def events(self) -> Path:
        """One JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def data(self) -> Path:
        """Row ids of each split, findings, encoded rows."""
        return self.path / "data"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that a run without a base learned from its train split."""
        return self.data / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """States to resume from."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """What `predict` reads."""
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        """Scores, predictions and the report; where there are several tasks, a folder of these for each."""
        return self.path / "evaluation"

    def evaluations(self) -> dict[str, Path]:
        """Task name -> where its scores lie."""
        names = load_json(self.data / "ids.json")
        return {name: self.evaluation / name if len(names) > 1 else self.evaluation for name in names}

    def export(self, name: str) -> Path:
        """The model in a format of `finetune export`."""
        return self.path / "export" / name

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / "MODEL_CARD.md"

    @property
    def name(self) -> str:
        """`name/time-hash`, as people say it."""
        return f"{self.path.parent.name}/{self.path.name}"

    def examples(self, split: str) -> Path:
        """Encoded rows of a split."""
        return self.data / f"{split}.safetensors"

    def load_status(self) -> dict[str, Any]:
        """The content of status.json; empty before the first write."""
        return load_json(self.status) if self.status.exists() else {}

    def update_status(self, **fields: Any) -> None:
        """Merge fields into status.json."""
        save_json(self.status, self.load_status() | {"updated": now()} | fields)

    def hold(self) -> FileLock:
        """Keep every other process out of this folder until released or dead.

        Raises:
            UsageError: another process holds it.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"{self.path}: a run's folder must be used by one process at a time, got a second. "
                "Wait for the first to end, or start a new run."
            ) from None
        return lock


def create_run_folder(name: str, recipe_text: str, root: str | Path | None = None) -> RunFolder:
    """Make runs/<name>/<time>-<hash>, new even when two runs start in the same second.

    Raises:
        ResourceError: the folder cannot be written.
    """
    parent = Path(root or RUNS_FOLDER) / name
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    digest = hashlib.sha256(recipe_text.encode()).hexdigest()[:8]
    for attempt in range(100):
        path = parent / (f"{stamp}-{digest}" + (f"-{attempt + 1}" if attempt else ""))
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ResourceError(
                f"{parent}: must be a folder that can be written, got {error.strerror or error}. "
                "Free it, or choose another place with --runs FOLDER."
            ) from error
        folder = RunFolder(path)
        folder.data.mkdir()
        folder.evaluation.mkdir()
        return folder
    raise ResourceError(f"{parent}: 100 runs were started in this second. Try again.")


def is_run(path: Path) -> bool:
    """Whether a folder is a run, or holds the runs of one name."""
    return (path / "status.json").is_file() or next(path.glob("*/status.json"), None) is not None


def find_run(reference: str | Path, *, finished: bool = True) -> RunFolder:
    """A run's folder from a path: the run itself, or `runs/<name>` for its latest (finished) run.

    Raises:
        UsageError: no such run.
    """
    path = Path(reference)
    if (path / "status.json").exists():
        run = RunFolder(path)
        if finished and (state := run.load_status().get("state")) != "finished":
            raise UsageError(f"{path}: must be a finished run, got one that is {state}. Try: finetune resume {path}")
        return run
    runs = [RunFolder(child) for child in sorted(path.glob("*")) if (child / "status.json").exists()]
    done = [run for run in runs if not finished or run.load_status().get("state") == "finished"]
    if done:
        return done[-1]
    if runs:
        latest, state = runs[-1].path, runs[-1].load_status().get("state")
        raise UsageError(f"{path}: must be a finished run, got one that is {state}. Try: finetune resume {latest}")
    wanted = "a finished run" if finished else "a run"
    if (path / SETTINGS).exists():
        raise UsageError(f"{path}: must be {wanted}, got a saved model. {_say_what_it_is_for(path)}")
    raise UsageError(f"{path}: must be {wanted}, got none. {_guess_run(path)}")


def _say_what_it_is_for(model: Path) -> str:
    """What to do with a saved model, such as several adapters merged, that has no recipe and no scores."""
    if (run := model.resolve().parent / "status.json").exists():
        return f"Its run is {run.parent}."
    return (
        f"It is what finetune predict takes; score it: finetune evaluate --model {model} --data FILE. Only a run has "
        "the recipe, rows and scores that the rest needs."
    )


def _guess_run(path: Path) -> str:
    """What to write in place of a path that is no run."""
    if not path.is_absolute() and is_run(RUNS_FOLDER / path):
        return f"Did you mean {RUNS_FOLDER / path}?"
    folder = path if path.is_dir() else path.parent
    known = sorted(child.name for child in folder.glob("*") if child.is_dir() and is_run(child))
    listed = f"{folder} has {', '.join(known[:10])}. " if known else ""
    return f"{listed}Make one: finetune run RECIPE"


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that the toolkit wrote.

    Raises:
        UsageError: missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        must = "must be a JSON file that this toolkit wrote"
        raise UsageError(f"{path}: {must}, got {error}. Restore it, or use another run.") from error


def save_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_file_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_host() -> dict[str, Any]:
    """Versions and hardware that a repetition would compare."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "scikit-learn",
        "numpy",
        "finetune-toolkit",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "versions": versions,
    }
