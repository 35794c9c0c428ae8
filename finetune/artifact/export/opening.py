"""The export of a run, found and held against the run."""

from __future__ import annotations

from pathlib import Path

from finetune.artifact.export import torch_format
from finetune.artifact.export.formats import get_format
from finetune.artifact.run_folder import SETTINGS, find_run
from finetune.artifact.saved import Saved, compute_model_fingerprint, open_saved
from finetune.errors import ModelError, UsageError

PROGRAM = "torch-export"
"""The format whose files run when they are read."""


def open_model(reference: str | Path, engine: str | None) -> Saved:
    """The folder of a model, or of an export, files checked.

    Args:
        reference: a run, or such a folder itself.
        engine: the format of an export; None for whatever the folder is, but for a program, which must be asked for.

    Raises:
        UsageError: no such format, run or export, or one that was made of another model.
        ModelError: a damaged folder.
    """
    saved = open_saved(reference) if engine is None else open_export(reference, engine)
    if saved.settings.get("engine", {}).get("format") == PROGRAM:
        if engine is None:
            raise UsageError(
                f"{reference}: its .pt2 file is a program, which runs when it is read, and must be asked for by name. "
                f'If you trust who made it: finetune.load(..., engine="{PROGRAM}"), or --engine {PROGRAM}'
            )
        if torch_format.FILE not in saved.settings["files"]:
            raise ModelError(
                f"{saved.folder}: {torch_format.FILE} must be named with its checksum in {SETTINGS}, got none. "
                "Export the run again."
            )
    return saved


def open_export(reference: str | Path, engine: str) -> Saved:
    """The folder of an export, files checked.

    Args:
        reference: a run, or an exported folder itself.
        engine: name of the format.

    Raises:
        UsageError: no such format, run or export, or one that was made of another model.
        ModelError: a damaged folder.
    """
    get_format(
        engine, "--engine", f"Leave it out, or write an export first: finetune export {reference} --format onnx-int8"
    )
    if (Path(reference) / SETTINGS).exists():
        saved = open_saved(reference)
        found = saved.settings.get("engine", {}).get("format", "none, a model as it was trained")
        if found != engine:
            raise UsageError(f"{reference}: must be an export for {engine}, got one for {found}. Leave --engine out.")
        return saved
    run = find_run(reference)
    folder = run.export(engine)
    if not (folder / SETTINGS).exists():
        raise UsageError(
            f"{folder}: must be an export of the run, got none. Make it: finetune export {reference} --format {engine}"
        )
    saved = open_saved(folder)
    made_of, expected = saved.settings["engine"]["source"], compute_model_fingerprint(run.model)
    if made_of != expected:
        raise UsageError(
            f"{folder}: must be an export of this run's model (sha256 {expected[:12]}), got one of another "
            f"({made_of[:12]}). Make it anew: finetune export {reference} --format {engine}"
        )
    return saved
