"""Every method on models of a few thousand weights, what is done to each of them, and saved adapters untrained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from finetune.adapters.attach import list_trained
from finetune.adapters.bias import BiasConfig
from finetune.adapters.bottleneck import BottleneckConfig
from finetune.adapters.frozen import HeadConfig, register
from finetune.adapters.targets import find_targets
from finetune.artifact.save import save_model
from finetune.models.base import BaseModel, load_tokenizer
from finetune.recipe.schema import ModelSection
from finetune.tasks import TextClassification

LORA = {"method": "lora", "rank": 4, "alpha": 8.0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora on attention": LORA | {"targets": "attention"},
    "dora": LORA | {"dora": True},
    "rslora": LORA | {"rslora": True},
    "pissa": LORA | {"init": "pissa"},
    "olora": LORA | {"init": "olora"},
    "eva": LORA | {"init": "eva"},
    "lora+": LORA | {"learning_rate_ratio": 8.0},
    "adalora": {"method": "adalora", "rank": 4, "alpha": 8.0},
    "ia3": {"method": "ia3"},
    "prefix": {"method": "prefix", "virtual_tokens": 3},
    "prompt": {"method": "prompt", "virtual_tokens": 3},
    "p_tuning": {"method": "p_tuning", "virtual_tokens": 3},
    "vera": {"method": "vera", "rank": 16},
    "ln_tuning": {"method": "ln_tuning"},
    "loha": {"method": "loha", "rank": 4, "alpha": 8.0},
    "lokr": {"method": "lokr", "rank": 2, "alpha": 4.0},
    "oft": {"method": "oft", "block_size": 8},
    "fourierft": {"method": "fourierft", "frequencies": 50, "alpha": 150.0},
    "pfeiffer": {"method": "adapter", "reduction": 4},
    "houlsby": {"method": "adapter", "style": "houlsby", "reduction": 4},
    "parallel": {"method": "adapter", "style": "parallel", "reduction": 4},
    "bitfit": {"method": "bitfit"},
    "head": {"method": "head"},
}
"""Case -> the recipe's `adapter`."""
UNMERGED = ["prefix", "prompt", "p_tuning", "pfeiffer", "houlsby", "parallel"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` is every case, `merged` those that can be folded into the base, `unmerged` the others."""
    merged = [case for case in METHODS if case not in UNMERGED]
    for argument, names in {"case": [*METHODS], "merged": merged, "unmerged": UNMERGED}.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)


@pytest.fixture(scope="session")
def methods() -> dict[str, dict[str, Any]]:
    """Case -> the recipe's `adapter`."""
    return METHODS


@pytest.fixture(scope="session")
def disable() -> Callable[[nn.Module], AbstractContextManager[nn.Module]]:
    """`with disable(model) as base`: the model without what was attached and with the head from before."""

    @contextmanager
    def disable(model: Any) -> Iterator[nn.Module]:
        if not model.active_peft_config.is_prompt_learning:
            with model.disable_adapter():
                yield model
            return
        # With virtual tokens PEFT leaves the trained head in.
        heads = [module for module in model.modules() if type(module).__name__ == "ModulesToSaveWrapper"]
        for head in heads:
            head.enable_adapters(False)
        yield model.get_base_model()
        for head in heads:
            head.enable_adapters(True)

    return disable


@pytest.fixture(scope="session")
def stir() -> Callable[..., None]:
    """`stir(model)` moves all that is trained, as long training would."""

    @torch.no_grad()
    def stir(model: nn.Module, size: float = 0.1) -> None:
        torch.manual_seed(2)
        for parameter in list_trained(model).values():
            parameter.add_(size * torch.randn_like(parameter))

    return stir


IN_TREE: dict[str, Any] = {"bottleneck": BottleneckConfig, "bitfit": BiasConfig, "head": HeadConfig}
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
            if method in IN_TREE:
                register()
                config = IN_TREE[method](modules_to_save=head, task_type="SEQ_CLS", **options)
            elif method == "ia3":
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
