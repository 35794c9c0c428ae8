"""Every method in a form that fits models of a few thousand weights, and what is done to each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from finetune.adapters.attach import can_merge, list_trained

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
}
"""Case -> the recipe's `adapter`."""
UNMERGED = ["prefix", "prompt", "p_tuning"]


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
        if can_merge(model):
            with model.disable_adapter():
                yield model
            return
        # Where nothing can be merged PEFT leaves the trained head in.
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
