"""Attach, count and merge: what is trained besides the head.

PEFT is imported where it is used: it takes seconds, and `finetune check` only counts.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn

from finetune.adapters.methods import METHODS, Site
from finetune.adapters.saving import remember_start
from finetune.errors import ModelError, RecipeError
from finetune.recipe.reference import split_revision
from finetune.recipe.schema import AdapterSection

POSITION_TABLES = ("positions", "position_embeddings", "embed_positions", "wpe")
"""What Triad and the families call the vectors of their positions, where these are learned or kept in a table."""


@dataclass(frozen=True)
class ParameterCount:
    """Weights of a model."""

    trained: int
    total: int

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.total:,} parameters are trained ({self.trained / self.total:.2%})"


def attach_adapter(
    model: nn.Module,
    section: AdapterSection,
    head: Sequence[str],
    base_reference: str,
    task_type: str = "SEQ_CLS",
    total_steps: int = 1,
) -> nn.Module:
    """Make a model trainable in the way that the recipe asks for.

    Args:
        model: a Hugging Face model with its head.
        section: the recipe's `adapter`.
        head: names of the head's modules; always trained and saved whole.
        base_reference: what a saved adapter names as its base (a Hub id or a folder).
        task_type: PEFT's name for what the model does.
        total_steps: optimizer steps of the whole run, which AdaLoRA plans with.

    Returns:
        The model itself (`full`) or a `PeftModel` around it; one that takes no packed rows says so in its
        `packs_rows`.

    Raises:
        RecipeError: the base lacks what the method changes.
    """
    method = METHODS[section.method]
    if method.build is None:
        return model.requires_grad_(True)
    from peft import get_peft_model

    from finetune.adapters.fast_lora import speed_up_frozen, speed_up_lora
    from finetune.adapters.frozen import register

    register()

    config = method.build(section, Site(model, head, task_type, total_steps))
    with _quiet_peft():
        wrapped = get_peft_model(model, config)
    # PEFT records the folder that the weights were loaded from; a saved adapter must name what the recipe says.
    saved = wrapped.peft_config["default"]
    saved.base_model_name_or_path, saved.revision = split_revision(base_reference)
    remember_start(wrapped)
    return _mark(speed_up_frozen(speed_up_lora(wrapped)))


def _mark(wrapped: Any) -> nn.Module:
    """Say on the model itself what `models/` must know about it."""
    if wrapped.active_peft_config.is_prompt_learning:
        wrapped.packs_rows = False
        # Rows come without padding in front, so that counting from the first virtual token is right.
        warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
    return cast(nn.Module, wrapped)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """No warnings of PEFT 0.21 that nobody here can act on."""
    with warnings.catch_warnings():
        # An attribute that transformers renames in version 6.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # GPT-2's own layers, whose weights lie the other way round: PEFT turns itself to them.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", message="Unsupported layer type '.*Norm")
        # AdaLoRA's own names of its ranks, which it reads elsewhere.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage")
        # Updates cannot be merged into a base of torchao's, which nobody does here.
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass", category=UserWarning)
        yield


def count_positions(model: nn.Module) -> int | None:
    """Tokens that a model has positions for; None where they are computed for any number.

    Args:
        model: perhaps of shapes alone, without an adapter.
    """
    rooms = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            offset = getattr(module, "offset", getattr(model.config, "position_offset", 0))
            if type(module) is nn.Embedding and module.padding_idx is not None:
                offset = module.padding_idx + 1  # RoBERTa's kin count from behind the padding token
            rooms.append(module.num_embeddings - offset)
    return min(rooms, default=None)


def check_length(model: nn.Module, max_length: int, reference: str) -> None:
    """Refuse texts that are longer than a model can tell places apart.

    Args:
        model: of shapes alone, without an adapter.
        max_length: most tokens of a text.
        reference: the base, for the message.

    Raises:
        RecipeError: too few positions.
    """
    room = count_positions(model)
    if room is not None and max_length > room:
        raise RecipeError(
            f"model.max_length: must be at most {room}, the positions that {reference} has, got {max_length}."
        )


def check_adapter(model: nn.Module, section: AdapterSection, max_length: int) -> None:
    """Refuse what a method and a base cannot do together; what the base lacks, `plan_parameters` finds.

    Args:
        model: of shapes alone.
        section: the recipe's `adapter`.
        max_length: most tokens of a text.

    Raises:
        RecipeError: virtual tokens that the model has no positions for, or cannot read.
    """
    if METHODS[section.method].packs:
        return
    config: Any = model.config
    if section.method != "prefix" and config.model_type != "triad" and getattr(config, "scale_embedding", False):
        raise RecipeError(
            f"adapter.method: {section.method} needs a model that reads embeddings, got {config.model_type}'s own "
            "class, which scales only those that it looks up itself. Set model.architecture: triad."
        )
    room = count_positions(model)
    if room is not None and max_length + section.virtual_tokens > room:
        raise RecipeError(
            f"adapter.virtual_tokens: must fit into the {room} positions of the base together with model.max_length, "
            f"got {section.virtual_tokens} + {max_length}. Lower one of them."
        )


def can_merge(model: nn.Module) -> bool:
    """Whether what was attached can be folded into the base's weights; what was tuned whole is merged already."""
    config: Any = getattr(model, "active_peft_config", None)
    return config is None or not (config.is_prompt_learning or config.peft_type == "BOTTLENECK")


def merge_adapter(model: nn.Module) -> nn.Module:
    """Fold the updates into the base's weights: a plain Hugging Face model with the same logits.

    Raises:
        ModelError: what was trained stands beside the base's weights; see `can_merge`.
    """
    from peft import PeftModel
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(model, PeftModel):
        return model
    if not can_merge(model):
        kind = str(model.active_peft_config.peft_type.value).lower()
        reason = (
            "its virtual tokens are no part of the base's weights"
            if model.active_peft_config.is_prompt_learning
            else "it is no linear function"
        )
        raise ModelError(
            f"adapter: must be one that can be merged, got {kind}: {reason}. Use the base and the adapter together."
        )
    # PEFT itself can unwrap no head but a single layer.
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[model.active_adapter])
    return cast(nn.Module, model.merge_and_unload(safe_merge=True))


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trained weights and those of the model as it is used.

    PEFT keeps a frozen copy of each module that it trains whole; the copy is no weight of the model.
    """
    named = dict(model.named_parameters())
    copies = {name.replace("ln_tuning_layers.default", "base_layer") for name in named if "ln_tuning_layers" in name}
    used = [parameter for name, parameter in named.items() if "original_module" not in name and name not in copies]
    return ParameterCount(
        trained=sum(parameter.numel() for parameter in used if parameter.requires_grad),
        total=sum(_count_weights(parameter) for parameter in used),
    )


def _count_weights(parameter: nn.Parameter) -> int:
    """Numbers that a tensor stands for; bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def plan_parameters(
    model: nn.Module, section: AdapterSection, head: Sequence[str], task_type: str = "SEQ_CLS"
) -> ParameterCount:
    """What `count_parameters` will say once the adapter is attached, from shapes alone.

    Args:
        model, section, head, task_type: as for `attach_adapter`, with what it raises; nothing is attached.
    """
    if METHODS[section.method].build is None:
        return count_parameters(copy.deepcopy(model).requires_grad_(True))
    # The start takes weights apart, which a shape has none of.
    plain = section.model_copy(update={"init": "default"})
    return count_parameters(attach_adapter(copy.deepcopy(model), plain, head, "", task_type))


def list_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of everything that is trained, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_adapter(model: nn.Module, folder: Path, name: str = "default") -> nn.Module:
    """Put a saved adapter, head included, on a freshly loaded base, or beside others; nothing is trainable.

    Raises:
        ModelError: the adapter's files do not fit the base.
    """
    from peft import PeftModel

    from finetune.adapters.frozen import register

    register()
    try:
        with _quiet_peft():
            # PEFT only warns when a weight is not in the file, and leaves it random.
            warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, is_trainable=False)
                loaded = _mark(model)
            else:
                loaded = _mark(PeftModel.from_pretrained(model, str(folder), name, is_trainable=False))
            return loaded.requires_grad_(False)  # of virtual tokens PEFT freezes nothing
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError, UserWarning) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder}: must hold an adapter that fits its base model; {reason[:300]}") from error


def read_adapter_base(folder: Path) -> str | None:
    """The base that a saved adapter names, or None if the folder holds a whole model."""
    path = folder / "adapter_config.json"
    if not path.exists():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    name, revision = saved["base_model_name_or_path"], saved.get("revision")
    return f"{name}@{revision}" if revision else str(name)
