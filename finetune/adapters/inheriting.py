"""A new adapter that starts where saved ones ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from finetune.adapters.merging import PREFIX, add_updates, cut_rank, load_updates
from finetune.errors import RecipeError

# PEFT's names of what a recipe says, where they differ.
WORDS = {"r": "rank", "lora_alpha": "alpha"}
# Numbers in a saved configuration that may differ: they belong to the training that is over.
TRAINING = {"inference_mode", "total_step", "tinit", "tfinal", "deltaT", "orth_reg_weight"}
FIX = "Make the recipe's adapter section that of the saved adapter, or leave model.adapters out."


def check_inheritance(model: nn.Module, folders: Sequence[Path], head: Sequence[str]) -> None:
    """Whether `inherit` will work; only names and shapes are looked at, so the model may be on the meta device.

    Args:
        model: with its new adapter attached.
        folders: saved adapters. One must have the method, numbers and shapes of the new one; several must be plain LoRA
            of any rank, and change no layer that the new one leaves as it is.
        head: names of the head's modules.

    Raises:
        RecipeError, UsageError: an adapter that cannot be taken over; the message names what differs.
        ModelError: files that cannot be read.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in _list_adapter(model, head).items()}
    if len(folders) > 1:
        if not all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in shapes):
            raise RecipeError(
                f"model.adapters: must name one adapter unless adapter.method is plain lora, got {len(folders)}: other "
                "methods do not add up."
            )
        for folder in folders:
            layers = {f"{PREFIX}{layer}.lora_A.weight" for layer in load_updates(folder).factors}
            _check_layers(folder, {name: shapes.get(name, ()) for name in layers}, shapes)
        return
    (folder,) = folders
    _check_settings(folder, model.peft_config["default"].to_dict())  # type: ignore[union-attr, index]  # PEFT's
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)
    saved = {name: shape for name, shape in saved.items() if not _is_head(name, head)}
    _check_layers(folder, saved, shapes)
    if lacking := sorted(set(shapes) - set(saved)):
        raise RecipeError(
            f"model.adapters: {folder} must change every layer that the new adapter changes, lacks {len(lacking)}: "
            f"{lacking[0]} first. {FIX}"
        )


def inherit(model: nn.Module, folders: Sequence[Path], head: Sequence[str], *, takes_head: bool) -> float:
    """Start a new adapter at the weights of a saved one, or at the mean of several LoRA updates, in place.

    Args:
        model, folders, head: as in `check_inheritance`, which they have passed.
        takes_head: take the head over too: the mean of all of theirs.

    Returns:
        Relative error of the mean where its rank is above that of the new adapter, else 0.
    """
    # PEFT takes all of an adapter or nothing.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    if len(folders) == 1:
        saved, error = load_file(folders[0] / "adapter_model.safetensors"), 0.0
    else:
        saved, error = _compute_mean(model, folders)
    state |= {name: tensor for name, tensor in saved.items() if takes_head or not _is_head(name, head)}
    set_peft_model_state_dict(model, state)
    return error


def _compute_mean(model: nn.Module, folders: Sequence[Path]) -> tuple[dict[str, torch.Tensor], float]:
    """The mean of updates and heads as the new adapter has names, rank and scale, and the error of a cut."""
    rank = model.peft_config["default"].r  # type: ignore[union-attr, index]  # PEFT's
    mean = add_updates([load_updates(folder) for folder in folders], [1 / len(folders)] * len(folders))
    mean, error = cut_rank(mean, rank)
    state = dict(mean.head)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            # Rows of A beyond the mean's rank stay as they start, and reach nothing: their columns of B are zero.
            down, up = (part["default"].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
            up.zero_()
            if (factors := mean.factors.get(name.removeprefix(PREFIX))) is not None:
                rows = len(factors[0])
                down[:rows], up[:, :rows] = factors[0], factors[1] / layer.scaling["default"]
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return state, error


@contextmanager
def bare_head(model: nn.Module, head: Sequence[str]) -> Iterator[nn.Module]:
    """The model inside of PEFT's, with its adapter, and with its new head's own modules in place of PEFT's wrappers."""
    inner: Any = model.get_base_model()  # type: ignore[operator]  # PEFT's
    wrappers = {name: inner.get_submodule(name) for name in head}
    try:
        for name, wrapper in wrappers.items():
            inner.set_submodule(name, wrapper.modules_to_save["default"])
        yield inner
    finally:
        for name, wrapper in wrappers.items():
            inner.set_submodule(name, wrapper)


def _list_adapter(model: nn.Module, head: Sequence[str]) -> dict[str, torch.Tensor]:
    """What would be saved, without the head."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor for name, tensor in state.items() if not _is_head(name, head)}


def _is_head(name: str, head: Sequence[str]) -> bool:
    return any(name.startswith(f"{PREFIX}{part}.") for part in head)


def _check_settings(folder: Path, wanted: Mapping[str, Any]) -> None:
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    method, new = saved["peft_type"].lower(), wanted["peft_type"].lower()
    if method != new:
        raise RecipeError(f"adapter.method: must be {method}, as in {folder}, got {new}. {FIX}")
    for key, value in saved.items():
        is_number = isinstance(value, int | float) and key not in TRAINING and "dropout" not in key
        if is_number and key in wanted and wanted[key] != value:
            raise RecipeError(
                f"adapter.{WORDS.get(key, key)}: must be {_say(value)}, as in {folder}, got {_say(wanted[key])}. {FIX}"
            )


def _say(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_layers(folder: Path, saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    if unknown := sorted(set(saved) - set(wanted)):
        raise RecipeError(
            f"model.adapters: {folder} must change only layers that the new adapter changes too, has {len(unknown)} "
            f"more: {unknown[0]} first. {FIX}"
        )
    for name, shape in saved.items():
        if shape != wanted[name]:
            raise RecipeError(
                f"model.adapters: {folder} must have the shapes of the new adapter, got {name} of shape {shape} for "
                f"{wanted[name]}. {FIX}"
            )
