"""From a labelled file to a small model you can trust.

import finetune

run = finetune.run("recipes/sentiment.yaml")
finetune.load("runs/sentiment").predict(["Shares slump after profit warning"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.artifact.load import Predictor, load
    from finetune.comparison import compare
    from finetune.runner import Run, check, evaluate, resume, run

__version__ = "0.1.0"
__all__ = ["Predictor", "Run", "check", "compare", "evaluate", "load", "resume", "run"]

_HOMES = {
    "compare": "finetune.comparison",
    "load": "finetune.artifact.load",
    "Predictor": "finetune.artifact.load",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `finetune --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "finetune.runner")), name)
