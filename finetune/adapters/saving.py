"""Write an adapter as a small folder: its weights and the head's, and what PEFT needs to know of them.

A saved adapter belongs to its base as that is published. Two starts change the base in memory (PiSSA and OLoRA take
the part of it that they train out of it); what they trained is written as the plain LoRA that makes up the difference.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import finetune

CHANGES_BASE = ("pissa", "olora")
_PART = "default"  # the name of the only adapter
OWN_CODE = ("adapters/frozen.py", "adapters/bias.py", "adapters/bottleneck.py", "adapters/targets.py", "errors.py")
"""What makes PEFT know the in-tree methods: `register` in the first, and what it stands on; torch and PEFT besides."""


def remember_start(model: Any) -> None:
    """Keep the matrices that a start took out of the base, so that `save_adapter` can tell them from what was learned.

    Args:
        model: a `PeftModel`, just attached. Attaching it again gives the same ones: a resumed run need not save them.
    """
    if getattr(model.peft_config[_PART], "init_lora_weights", True) in CHANGES_BASE:
        for layer in _iterate_lora(model):
            layer.started = {
                "lora_A": layer.lora_A[_PART].weight.detach().clone(),
                "lora_B": layer.lora_B[_PART].weight.detach().clone(),
            }


def save_adapter(model: Any, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`: adapter and head, nothing of the base.

    Args:
        model: a `PeftModel` from `attach_adapter`; unchanged.
        folder: made if missing.
    """
    from finetune.adapters.frozen import InTreeType

    config = model.peft_config[_PART]
    before, state = copy.copy(config), model.state_dict()
    try:
        start = getattr(config, "init_lora_weights", None)
        if start in CHANGES_BASE:
            state = _subtract_start(model, state)
            config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * (2**0.5 if config.use_rslora else 2)
        if isinstance(start, str):  # whoever loads it needs the weights alone
            config.init_lora_weights, config.eva_config = True, None
        if config.peft_type.value == "ADALORA":
            config.rank_pattern = {
                name.removeprefix("base_model.model."): (weight != 0).flatten().tolist()
                for name, weight in state.items()
                if f".lora_E.{_PART}" in name
            }
        # PEFT would ask the Hub whether the base's vocabulary was enlarged; we never enlarge it.
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
    finally:
        vars(config).update(vars(before))
    # PEFT leaves a README with empty headings; the run has a card of its own.
    (folder / "README.md").unlink(missing_ok=True)
    if isinstance(config.peft_type, InTreeType):
        write_own_code(folder)


def write_own_code(folder: Path) -> None:
    """Put the code of the in-tree methods beside weights, as it stands here but for imports, which become relative."""
    for place in OWN_CODE:
        text = (Path(finetune.__file__).parent / place).read_text(encoding="utf-8")
        text = re.sub(r"\bfrom finetune\.(?:adapters\.)?(\w+) import", r"from .\1 import", text)
        (folder / Path(place).name).write_text(text, encoding="utf-8")


def _subtract_start(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A - B0 A0 as one product: [B, B0] [A; -A0]."""
    changed = dict(state)
    for name, layer in model.named_modules():
        if hasattr(layer, "started"):
            down, up = f"{name}.lora_A.{_PART}.weight", f"{name}.lora_B.{_PART}.weight"
            changed[down] = torch.cat([state[down], -layer.started["lora_A"].to(state[down])])
            changed[up] = torch.cat([state[up], layer.started["lora_B"].to(state[up])], dim=1)
    return changed


def _iterate_lora(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            yield module
