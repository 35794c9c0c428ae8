"""Runs that start from saved adapters: `model.adapters` in a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from finetune.adapters.attach import attach_adapter, read_adapter_base
from finetune.artifact.run_folder import SETTINGS, find_run, is_run, load_json
from finetune.artifact.saved import fetch_folder, is_hub_reference, open_saved
from finetune.data.batches import Examples
from finetune.errors import RecipeError
from finetune.models.base import BaseModel, resolve_base
from finetune.recipe.files import compute_sha256
from finetune.recipe.schema import AdapterSection
from finetune.tasks import MultiTask, Task, load_task


def settle_adapters(references: Sequence[str]) -> list[str]:
    """Folders of adapters, in full: the name of a run may mean another run tomorrow.

    Args:
        references: runs, their `model/` folders, folders that PEFT wrote, or `org/name` of such on the Hub.

    Raises:
        RecipeError: none of these, or a model that was tuned whole.
        UsageError: a run that is not finished.
        ModelError: a damaged `model/` folder.
    """
    folders = []
    for reference in references:
        path = Path(reference).expanduser()
        if is_hub_reference(reference):
            path = fetch_folder(reference)
        folder = find_run(path).model if is_run(path) else path
        if (folder / SETTINGS).exists() and open_saved(folder).base is None:
            raise RecipeError(
                f"model.adapters: {reference!r} must be an adapter, got a model whose every weight was tuned. "
                "Set model.base to it."
            )
        if not (folder / "adapter_config.json").exists():
            raise RecipeError(
                f"model.adapters: {reference!r} must be a run, its model/ folder or a folder with an "
                "adapter_config.json, got none of these."
            )
        folders.append(str(folder.resolve()))
    return folders


def compute_fingerprints(folders: Sequence[str]) -> dict[str, str]:
    """Folder -> sha256 of its adapter."""
    return {folder: compute_sha256(Path(folder) / "adapter_model.safetensors") for folder in folders}


def check_adapters(
    model: nn.Module, section: AdapterSection, head: Sequence[str], base: BaseModel, folders: Sequence[str]
) -> None:
    """Whether a new adapter can start from saved ones; reads no weights of the base.

    Args:
        model: on the meta device; gets an adapter.
        section: the recipe's `adapter`.
        head: names of the head's modules.
        base: the recipe's.
        folders: from `settle_adapters`.

    Raises:
        RecipeError, UsageError: the first that differs in base, architecture, method or shape.
        ModelError: its files cannot be read.
    """
    from finetune.adapters.inheriting import check_inheritance

    for folder in folders:
        _check_base(Path(folder), model, base)
    wrapped = attach_adapter(model, section, head, base.reference)
    check_inheritance(wrapped, [Path(folder) for folder in folders], head)


def start_from_adapters(
    model: nn.Module,
    folders: Sequence[str],
    head: Sequence[str],
    task: Task | MultiTask,
    train: Examples,
    pad_token_id: int | None,
) -> str:
    """Start a new adapter from saved ones, in place; the head too where its classes are theirs, in the same order.

    Args:
        model: with its new adapter, checked by `check_adapters`.
        folders: from `settle_adapters`.
        head: names of the head's modules.
        task, train, pad_token_id: start a head for other classes.

    Returns:
        What was done, in words.
    """
    from finetune.adapters.inheriting import bare_head, inherit

    takes_head = all(_read_labels(Path(folder)) == task.labels for folder in folders)
    error = inherit(model, [Path(folder) for folder in folders], head, takes_head=takes_head)
    if not takes_head:  # once more, from what the adapter makes of the texts
        with bare_head(model, head) as inner:
            task.start(inner, train, pad_token_id)
    words = f"the adapter starts from {' and '.join(folders)}"
    words += f", cut to the recipe's rank (relative error {error:.2%})" if error else ""
    return words + (", and so does the head" if takes_head else "; the head is new, for other classes")


def _read_labels(folder: Path) -> list[str] | dict[str, list[str]] | None:
    if (folder / SETTINGS).exists():
        return load_task(load_json(folder / SETTINGS)["task"]).labels
    if not (folder / "config.json").exists():  # PEFT alone writes none
        return None
    names = load_json(folder / "config.json").get("id2label", {})
    return [names[key] for key in sorted(names, key=int)]


def _check_base(folder: Path, model: nn.Module, base: BaseModel) -> None:
    reference = read_adapter_base(folder)
    # One base may have two names: its id, and the folder where it lies.
    if reference != base.reference and (
        reference is None or resolve_base(reference).compute_fingerprint() != base.compute_fingerprint()
    ):
        raise RecipeError(
            f"model.adapters: {folder} must be an adapter of model.base, {base.reference}, got one of {reference}. "
            f"Set model.base: {reference}."
        )
    if not (folder / "config.json").exists():
        return
    found, wanted = load_json(folder / "config.json").get("model_type"), model.config.model_type  # type: ignore[union-attr]
    if found != wanted:
        architecture = "triad" if found == "triad" else "native"
        raise RecipeError(
            f"model.adapters: {folder} must be an adapter of a {wanted} model, got one of a {found} model. "
            f"Set model.architecture: {architecture}."
        )
