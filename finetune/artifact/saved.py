"""A saved model before its weights are read: what its folder says of itself, and whether several stand on one base."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.attach import read_adapter_base
from finetune.artifact.run_folder import RUNS_FOLDER, SETTINGS, find_run, is_run, load_json
from finetune.artifact.save import FORMAT
from finetune.errors import ModelError, UsageError
from finetune.models.base import BaseModel, download_model, resolve_base
from finetune.recipe.files import compute_sha256
from finetune.recipe.reference import split_revision
from finetune.recipe.schema import REPO_PATTERN
from finetune.tasks import MultiTask, Task, load_task

# What two models on one base may differ in: their classes, and what says where and how they were made.
OWN_SETTINGS = {
    *("id2label", "label2id", "num_labels", "problem_type"),
    *("_name_or_path", "transformers_version", "dtype", "auto_map"),
}


@dataclass(frozen=True)
class Saved:
    """A `model/` folder whose files are as they were saved.

    Args:
        folder: where it lies.
        settings: the content of finetune.json.
        task: what it was trained for.
        base: the reference of the base that its adapter needs; None for whole weights.
    """

    folder: Path
    settings: dict[str, Any]
    task: Task | MultiTask
    base: str | None

    @property
    def own_settings(self) -> dict[str, Any]:
        """The settings without what is of this folder's files: what the same model in another folder keeps."""
        return {name: value for name, value in self.settings.items() if name not in ("files", "format")}


def open_saved(reference: str | Path) -> Saved:
    """Find a run's `model/` (`runs/name`, its latest finished one), take such a folder, or one from the Hub, and check
    its files.

    Raises:
        UsageError: no such run, or a folder of a newer toolkit.
        ModelError: a damaged folder, or a model that the Hub does not give.
    """
    folder = Path(reference)
    if not (folder / SETTINGS).exists():
        folder = _find_saved(reference)
    settings = load_json(folder / SETTINGS)
    if settings.get("format") != FORMAT:
        raise UsageError(
            f"{folder}: must be in format {FORMAT}, got {settings.get('format')}. "
            "Update the toolkit: pip install -U finetune-toolkit"
        )
    _check_files(folder, settings.get("files", {}))
    return Saved(folder, settings, load_task(settings["task"]), read_adapter_base(folder))


def _find_saved(reference: str | Path) -> Path:
    """The folder of a model on the Hub, or of a run."""
    is_pushed = is_hub_reference(reference)
    folder = fetch_folder(str(reference)) if is_pushed else find_run(reference).model
    if (folder / SETTINGS).exists():
        return folder
    if is_pushed:
        raise ModelError(
            f"{reference}: must be a model that this toolkit pushed, got one without {SETTINGS}. "
            "To train on it, set model.base; to score it: finetune evaluate --model."
        )
    raise ModelError(
        f"{folder}: {SETTINGS} must be there, got a run that was damaged. Bring the file back, or train again."
    )


def is_hub_reference(reference: str | Path) -> bool:
    """Whether a reference may be `org/name` on the Hub: what lies here is not, and nothing in a folder of runs is."""
    name = split_revision(str(reference))[0]
    owner = Path(name.partition("/")[0])
    return (
        isinstance(reference, str)
        and re.fullmatch(REPO_PATTERN, name) is not None
        and str(owner) not in (str(RUNS_FOLDER), ".", "..")
        and not Path(reference).exists()
        and not any(is_run(child) for child in owner.glob("*"))
    )


def fetch_folder(reference: str) -> Path:
    """The folder of `org/name` from the Hub, or its cache.

    Raises:
        ModelError: the Hub does not give it.
    """
    try:
        return download_model(reference)
    except ModelError as error:
        owner, _, name = reference.partition("/")
        here = f", and the folder {owner} here has no {name}" if Path(owner).is_dir() else ""
        raise ModelError(
            f"{reference}: must be a run, a saved model's folder or a model on the Hub; {error}{here}. "
            "Check the name, and HF_TOKEN where it is private."
        ) from error


def compute_model_fingerprint(folder: Path) -> str:
    """SHA-256 over the weights of a `model/` folder, each of them alone first: what was built with a model names it."""
    weights = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256("\n".join(compute_sha256(path) for path in weights).encode()).hexdigest()


def resolve_shared_base(saved: Mapping[str, Saved]) -> BaseModel:
    """The one base that all of several adapters were trained on.

    Args:
        saved: how messages call each -> adapter.

    Raises:
        UsageError: one was tuned whole, or two differ in base or architecture.
        ModelError: the base is not at hand.
    """
    bases: dict[str, BaseModel] = {}
    for name, one in saved.items():
        if one.base is None:
            raise UsageError(
                f"{name}: must be an adapter on a base, got a model whose every weight was tuned. "
                "Load it alone, or train it anew with adapter: {method: lora}."
            )
        bases.setdefault(one.base, resolve_base(one.base))
    # One base may have two names: its id, and the folder where it lies.
    if len(bases) > 1 and len({base.compute_fingerprint() for base in bases.values()}) > 1:
        listed = ", ".join(f"{name} on {one.base}" for name, one in saved.items())
        raise UsageError(f"adapters: must stand on one base, got {listed}. Load each base's adapters by themselves.")
    _check_architectures({name: load_json(one.folder / "config.json") for name, one in saved.items()})
    return next(iter(bases.values()))


def _check_architectures(configs: Mapping[str, Mapping[str, Any]]) -> None:
    (first, expected), *others = configs.items()
    for name, config in others:
        for key in ["model_type", *sorted({*expected, *config})]:
            if expected.get(key) != config.get(key) and key not in OWN_SETTINGS and "drop" not in key:
                raise UsageError(
                    f"adapters: must share one architecture to share a base, got {key} {expected.get(key)!r} in "
                    f"{first} and {config.get(key)!r} in {name}. Train both with the same model section."
                )


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compare each file with its sha256 from the time it was saved."""
    for name, sha256 in files.items():
        path = folder / name
        if path.suffix == ".py" and not path.exists():
            continue  # code stays on the Hub: the classes here are this toolkit's own
        found = compute_sha256(path) if path.is_file() else "no file"
        if found != sha256:
            raise ModelError(
                f"{path}: must be as it was saved (sha256 {sha256[:12]}), got {found[:12]}. Get the folder again; "
                f"if you changed it on purpose, take its line out of `files` in {SETTINGS}."
            )
