"""Write `model/`: what `predict` reads, and what plain transformers and PEFT load without this toolkit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters.saving import save_adapter
from finetune.artifact.run_folder import SETTINGS, load_json, save_json
from finetune.recipe.files import compute_sha256, write_file_atomically

FORMAT = 1


def save_model(model: nn.Module, tokenizer: Any, folder: Path, settings: dict[str, Any]) -> None:
    """Write weights (safetensors), configuration, tokenizer and the toolkit's own settings.

    The folder appears whole or not at all.

    Args:
        model: a Hugging Face model, or a `PeftModel` around one (then only adapter and head are written).
        tokenizer: the base's.
        folder: the run's `model/`; replaced if it exists.
        settings: what prediction needs beside the weights, plain JSON.
    """
    from transformers.dynamic_module_utils import custom_object_save
    from transformers.utils import logging

    logging.disable_progress_bar()  # it counts files of which there is one
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    inner: Any = model
    if hasattr(model, "peft_config"):
        inner = model.get_base_model()  # type: ignore[operator]  # PEFT's
        save_adapter(model, temporary)
    else:
        inner.save_pretrained(temporary)
    # The adapter's folder carries the configuration too: it knows the classes, which the base does not. A class of
    # our own comes with its code, so that the folder loads where this toolkit is not installed.
    if type(inner).__module__.startswith("finetune."):
        custom_object_save(inner, temporary, config=inner.config)
    inner.config.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    seal_folder(temporary, folder, settings)


def forget_token_types(tokenizer: Any) -> None:
    """Let a tokenizer, when saved and loaded, no longer say which of two texts a token belongs to.

    Whoever asks a model with `model(**tokenizer(question, passage))` gives it what the tokenizer says. Types that
    training never showed it would change its scores.
    """
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = names
    tokenizer.init_kwargs["model_input_names"] = names  # only what is among these is saved


def seal_folder(temporary: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Put the settings and every file's checksum into a finished folder, and move it to its place."""
    # A flipped bit in weights loads without a word, and so does a folder without its tokenizer: `load` compares.
    files = {path.name: compute_sha256(path) for path in sorted(temporary.iterdir()) if path.name != SETTINGS}
    save_json(temporary / SETTINGS, settings | {"format": FORMAT, "files": files})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def add_settings(folder: Path, settings: dict[str, Any], files: Mapping[str, bytes]) -> None:
    """Add to a finished folder what was fitted after its weights were saved.

    Args:
        folder: as `save_model` left it.
        settings: go into `finetune.json`.
        files: name -> content.
    """
    for name, content in files.items():
        write_file_atomically(folder / name, content)
    known = load_json(folder / SETTINGS)
    sums = {name: compute_sha256(folder / name) for name in files}
    save_json(folder / SETTINGS, known | settings | {"files": known["files"] | sums})
