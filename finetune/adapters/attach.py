"""Attach, count and merge: what is trained besides the head.

PEFT is imported where it is used: it takes seconds, and `finetune check` only counts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from torch import nn

from finetune.errors import ModelError, RecipeError
from finetune.recipe.reference import split_revision
from finetune.recipe.schema import AdapterSection


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
) -> nn.Module:
    """Make a model trainable in the way that the recipe asks for.

    Args:
        model: a Hugging Face model with its head.
        section: the recipe's `adapter`.
        head: names of the head's modules; always trained and saved whole.
        base_reference: what a saved adapter names as its base (a Hub id or a folder).
        task_type: PEFT's name for what the model does.

    Returns:
        The model itself (`full`) or a `PeftModel` around it (`lora`).

    Raises:
        RecipeError: `adapter.targets` names no linear layer.
    """
    if section.method == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, TaskType, get_peft_model

    from finetune.adapters.fast_lora import speed_up_lora

    config = LoraConfig(
        task_type=TaskType[task_type],
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=find_targets(model, section.targets, head),
        modules_to_save=list(head),
    )
    with _quiet_peft():
        wrapped = get_peft_model(model, config)
    # PEFT records the folder that the weights were loaded from; a saved adapter must name what the recipe says.
    saved = wrapped.peft_config["default"]
    saved.base_model_name_or_path, saved.revision = split_revision(base_reference)
    return speed_up_lora(wrapped)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT 0.21 reads an attribute that transformers renames in version 6, and warns each time.

    It also warns that updates cannot be merged into a base of torchao's, which nobody does here.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass", category=UserWarning)
        yield


def find_targets(model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
    """Full names of the linear layers of the base that get an update.

    Not the layer over the vocabulary, which PEFT's own all-linear leaves out too: where its matrix is also that of the
    tokens, an update merged into it would change what the model reads.

    Raises:
        RecipeError: a name that matches no linear layer, or a base without any.
    """
    over_vocabulary = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not over_vocabulary
        and not any(name == part or name.startswith(f"{part}.") for part in head)
    ]
    if not linear:
        raise RecipeError(
            "adapter.targets: must be linear layers of the base, got a base without one (GPT-2's own class has another "
            "kind). Set model.architecture: triad, or adapter.method: full."
        )
    if targets == "all-linear":
        return linear
    if targets == "attention":
        return [name for name in linear if "attention" in name or "attn" in name]
    endings = sorted({name.rpartition(".")[2] for name in linear})
    unknown = [
        target for target in targets if not any(name == target or name.endswith(f".{target}") for name in linear)
    ]
    if unknown:
        raise RecipeError(
            f"adapter.targets: each name must end the name of a linear layer of the base, got {', '.join(unknown)}. "
            f"This base has {', '.join(endings)}; or say all-linear or attention."
        )
    return [name for name in linear if any(name == target or name.endswith(f".{target}") for target in targets)]


def merge_adapter(model: nn.Module) -> nn.Module:
    """Fold the updates into the base's weights: a plain Hugging Face model with the same logits."""
    from peft import PeftModel

    return cast(nn.Module, model.merge_and_unload(safe_merge=True)) if isinstance(model, PeftModel) else model


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trained weights and those of the model as it is used.

    PEFT keeps a frozen copy of each module that it trains whole; the copy is no weight of the model.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if "original_module" not in name]
    return ParameterCount(
        trained=sum(parameter.numel() for _, parameter in named if parameter.requires_grad),
        total=sum(_count_weights(parameter) for _, parameter in named),
    )


def _count_weights(parameter: nn.Parameter) -> int:
    """Numbers that a tensor stands for; bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def plan_parameters(model: nn.Module, section: AdapterSection, head: Sequence[str]) -> ParameterCount:
    """What `count_parameters` will say once the adapter is attached, from shapes alone.

    Args:
        model, section, head: as for `attach_adapter`; nothing is attached.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if section.method == "full":
        return ParameterCount(total, total)
    targets = find_targets(model, section.targets, head)
    # W (out, in) + B A, with A (rank, in) and B (out, rank): arXiv:2106.09685, section 4.1.
    updates = sum(section.rank * sum(model.get_parameter(f"{name}.weight").shape) for name in targets)
    trained = sum(parameter.numel() for name in head for parameter in model.get_submodule(name).parameters())
    return ParameterCount(updates + trained, updates + total)


def list_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of everything that is trained, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_adapter(model: nn.Module, folder: Path, name: str = "default") -> nn.Module:
    """Put a saved adapter, head included, on a freshly loaded base, or beside others; nothing is trainable.

    Raises:
        ModelError: the adapter's files do not fit the base.
    """
    from peft import PeftModel

    try:
        with _quiet_peft():
            # PEFT only warns when a weight is not in the file, and leaves it random.
            warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, is_trainable=False)
                return cast(nn.Module, model)
            return cast(nn.Module, PeftModel.from_pretrained(model, str(folder), name, is_trainable=False))
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
