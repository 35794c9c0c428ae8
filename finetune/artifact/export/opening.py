"""The export of a run, found and held against the run."""

from __future__ import annotations

from pathlib import Path

from finetune.artifact.export.formats import get_format
from finetune.artifact.run_folder import find_run
from finetune.artifact.save import SETTINGS
from finetune.artifact.saved import Saved, compute_model_fingerprint, open_saved
from finetune.errors import UsageError


def open_export(reference: str | Path, engine: str) -> Saved:
    """The folder of an export, files checked.

    Args:
        reference: a run, or an exported folder itself.
        engine: name of the format.

    Raises:
        UsageError: no such format, run or export, or one that was made of another model.
        ModelError: a damaged folder.
    """
    get_format(engine)
    if (Path(reference) / SETTINGS).exists():
        saved = open_saved(reference)
        found = saved.settings.get("engine", {}).get("format", "transformers")
        if found != engine:
            raise UsageError(f"{reference}: must be an export for {engine}, got one for {found}.")
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
