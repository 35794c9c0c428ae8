"""Sums of saved LoRA updates, from their files alone: no base is loaded.

An update is B A (arXiv:2106.09685, section 4.1), with B (out, r), A (r, in) and the scale within B. A weighted sum of
updates is again one: the factors side by side, w_1 B_1 A_1 + w_2 B_2 A_2 = [w_1 B_1, w_2 B_2] [A_1; A_2], whose rank is
the sum of the ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.errors import ModelError, UsageError

PREFIX = "base_model.model."
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> A (r, in) and B (out, r), whose product is the update."""


@dataclass(frozen=True)
class Updates:
    """A saved LoRA adapter as sums can be made of it.

    Args:
        factors: of each layer that it changes, in float32.
        head: the weights that were trained whole, by their names in the file.
    """

    factors: Factors
    head: dict[str, torch.Tensor]

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max((len(down) for down, _ in self.factors.values()), default=0)


def load_updates(folder: Path) -> Updates:
    """Read a saved LoRA adapter.

    Raises:
        UsageError: another method, or LoRA with more to it than products of two factors.
        ModelError: files that cannot be read.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: must hold an adapter that can be read; {error}") from error
    if config["peft_type"] != "LORA":
        raise UsageError(
            f"{folder}: must be LoRA to be added to others, got {config['peft_type'].lower()}. "
            "Other methods do not add up."
        )
    downs = {key.removesuffix(".lora_A.weight"): key for key in tensors if key.endswith(".lora_A.weight")}
    ups = {layer: f"{layer}.lora_B.weight" for layer in downs}
    known = {*downs.values(), *ups.values()}
    if extra := sorted(key for key in tensors if ".lora_" in key and key not in known):
        what = "DoRA's magnitudes" if config.get("use_dora") else extra[0]
        raise UsageError(f"{folder}: must be plain LoRA to be added to others, got {what}, which do not add up.")
    factors = {
        layer.removeprefix(PREFIX): (
            tensors[down].float(),
            tensors[ups[layer]].float() * compute_scale(config, layer, len(tensors[down])),
        )
        for layer, down in downs.items()
    }
    return Updates(factors, {key: tensor for key, tensor in tensors.items() if key not in known})


def compute_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What PEFT multiplies B A with: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).

    Args:
        config: the content of adapter_config.json.
        layer: its full name; `alpha_pattern` may have an alpha for it.
        rank: of this layer.
    """
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def add_updates(parts: Sequence[Updates], weights: Sequence[float]) -> Updates:
    """Weighted sum of updates, and weighted mean of heads.

    Args:
        parts: one may change layers that another leaves as they are.
        weights: of each; the mean divides by their sum, which must not be 0.

    Returns:
        What has the rank of all parts together.
    """
    layers = dict.fromkeys(layer for part in parts for layer in part.factors)
    factors: Factors = {}
    for layer in layers:
        pairs = [
            (part.factors[layer], weight) for part, weight in zip(parts, weights, strict=True) if layer in part.factors
        ]
        downs, ups = [down for (down, _), _ in pairs], [weight * up for (_, up), weight in pairs]
        factors[layer] = torch.cat(downs), torch.cat(ups, dim=1)
    total = sum(weights)
    head = {
        key: torch.stack([part.head[key] * (weight / total) for part, weight in zip(parts, weights, strict=True)]).sum(
            0
        )
        for key in parts[0].head
    }
    return Updates(factors, head)


def cut_rank(updates: Updates, rank: int) -> tuple[Updates, float]:
    """The nearest updates of at most that rank, by singular values (Eckart and Young, 1936).

    Returns:
        The updates, and the error: the norm of what was cut off over the norm of the whole, over all layers together.
    """
    factors, cut, whole = {}, 0.0, 0.0
    for layer, (down, up) in updates.factors.items():
        if len(down) <= rank:
            factors[layer] = (down, up)
            whole += float((down @ down.t() * (up.t() @ up)).sum())  # |B A|^2 as a trace
            continue
        # The singular values of B A are those of a small matrix: B = Q_b R_b, A^T = Q_a R_a.
        (left, small_up), (right, small_down) = torch.linalg.qr(up), torch.linalg.qr(down.t())
        u, values, v = torch.linalg.svd(small_up @ small_down.t())
        root = values[:rank].sqrt()
        factors[layer] = root[:, None] * (v[:rank] @ right.t()), (left @ u[:, :rank]) * root
        cut += float(values[rank:].square().sum())
        whole += float(values.square().sum())
    return Updates(factors, updates.head), math.sqrt(cut / whole) if whole else 0.0


def save_updates(updates: Updates, folder: Path) -> None:
    """Replace the LoRA adapter in a folder; what its configuration says beside rank, scale and targets stays."""
    rank, tensors = updates.rank, dict(updates.head)
    for layer, (down, up) in updates.factors.items():
        missing = rank - len(down)  # rows and columns of zeros change no product
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, missing))
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = torch.nn.functional.pad(up, (0, missing))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {
        **{"r": rank, "lora_alpha": rank, "use_rslora": False, "init_lora_weights": True},
        **{"rank_pattern": {}, "alpha_pattern": {}, "target_modules": sorted(updates.factors)},
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
