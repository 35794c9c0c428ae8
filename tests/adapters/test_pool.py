"""Several adapters on one base answer as each of them does alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model

import finetune
from finetune.adapters.attach import find_targets
from finetune.artifact.pool import AdapterPool, load_adapters
from finetune.artifact.save import save_model
from finetune.errors import ModelError, UsageError
from finetune.models.base import BaseModel, load_tokenizer
from finetune.recipe.schema import ModelSection
from finetune.tasks import TextClassification

TEXTS = [
    "profit falls and the board cuts the dividend",
    "shares gain",
    "the chairman names a new meeting schedule for the spring",
    "sales beat all hopes, and the dividend raises",
    "unchanged",
    "loss",
    "wins &amp; gains",
]
THREE = ["negative", "neutral", "positive"]
FIVE = ["a", "b", "c", "d", "e"]
TOLERANCE = 1e-5
"""Of probabilities in float32; the logits lie a few units apart."""


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


def compute_alone(folder: Path) -> np.ndarray:
    return finetune.load(folder).compute_scores(TEXTS)


def check_mixed(pool: AdapterPool, folders: Mapping[str, Path], tolerance: float = TOLERANCE) -> None:
    """All texts with all adapters, in one batch and in an order that keeps no two neighbours together."""
    names = [name for name in folders for _ in TEXTS]
    texts = TEXTS * len(folders)
    order = np.random.default_rng(3).permutation(len(texts))
    mixed = pool.compute_scores([texts[i] for i in order], [names[i] for i in order])
    expected = {name: compute_alone(folder) for name, folder in folders.items()}
    for place, i in enumerate(order):
        assert mixed[place] == pytest.approx(expected[names[i]][i % len(TEXTS)], abs=tolerance)
    (first, second, *_) = expected.values()
    assert first.shape != second.shape or np.abs(first - second).max() > 0.05, "else nothing could be mixed up"


@pytest.mark.parametrize("architecture", ["triad", "native"])
def test_rows_of_different_lora_adapters_in_one_batch(save_adapter, tmp_path, architecture):
    """They differ in rank, scale, targets, classes and seeds."""
    folders = {
        "a": save_adapter(tmp_path / "a", seed=1, architecture=architecture),
        "b": save_adapter(tmp_path / "b", seed=2, architecture=architecture, r=7, lora_alpha=3, use_rslora=True),
        "v1.five": save_adapter(tmp_path / "c", FIVE, seed=3, architecture=architecture, targets=["query", "value"])
        if architecture == "native"
        else save_adapter(tmp_path / "c", FIVE, seed=3, targets=["q_proj", "v_proj"]),
    }
    pool = load_adapters(folders)
    check_mixed(pool, folders)
    assert pool.mixes
    assert pool.names == ["a", "b", "v1.five"]
    assert pool.get_labels("v1.five") == FIVE
