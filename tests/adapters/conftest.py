"""Saved adapters without training: random updates on the tiny base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from finetune.adapters.attach import find_targets
from finetune.artifact.save import save_model
from finetune.models.base import BaseModel, load_tokenizer
from finetune.recipe.schema import ModelSection
from finetune.tasks import TextClassification

THREE = ["negative", "neutral", "positive"]


def seed_adapter(model: nn.Module, seed: int) -> None:
    """Weights as if trained: PEFT starts an update at zero, and a factor at one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.empty_like(parameter).normal_(std=0.25, generator=generator))


@pytest.fixture(scope="session")
def save_adapter(tiny_base: Path) -> Callable[..., Path]:
    """A function (folder, labels, ...) -> a `model/` folder with a random adapter on the tiny base."""

    def save(
        folder: Path,
        labels: list[str] = THREE,
        *,
        seed: int = 0,
        architecture: str = "triad",
        method: str = "lora",
        base: Path = tiny_base,
        settings: Mapping[str, Any] = {},
        clean: tuple[Any, ...] = (),
        pooling: str = "auto",
        **options: Any,
    ) -> Path:
        task = TextClassification(labels, {}, clean)
        source = BaseModel(str(base), base, "local folder")
        section = ModelSection(architecture=architecture, pooling=pooling)
        model = task.build_model(source, section, None, seed)
        head = task.list_modules(model)[1]
        if method == "full":
            wrapped = model
        else:
            targets = options.pop("targets", None) or find_targets(model, "all-linear", head)
            shared = {"target_modules": targets, "modules_to_save": head, "task_type": "SEQ_CLS"}
            if method == "ia3":
                config = IA3Config(feedforward_modules=[], **shared)
            else:
                config = LoraConfig(**{"r": 4, "lora_alpha": 6, **shared, **options})
            wrapped = get_peft_model(model, config)
            wrapped.peft_config["default"].base_model_name_or_path = str(base)
        seed_adapter(wrapped, seed)
        chosen = {"task": task.to_config(), "temperature": 1.0, "max_length": 32, **settings}
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model(wrapped, load_tokenizer(source), folder, chosen)
        return folder

    return save
