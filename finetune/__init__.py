"""From a labelled file to a small model you can trust.

import finetune

run = finetune.run("recipes/sentiment.yaml")
finetune.load("runs/sentiment").predict(["Shares slump after profit warning"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.artifact.load import Predictor, load
    from finetune.label_audit import audit
    from finetune.runner import Run, check, evaluate, resume, run
    from finetune.search import sweep

__version__ = "0.1.0"
__all__ = ["Predictor", "Run", "audit", "check", "evaluate", "load", "resume", "run", "sweep"]

_HOMES = {
    "load": "finetune.artifact.load",
    "Predictor": "finetune.artifact.load",
    "audit": "finetune.label_audit",
    "sweep": "finetune.search",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `finetune --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "finetune.runner")), name)
