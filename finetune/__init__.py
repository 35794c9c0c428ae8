"""From a labelled file to a small model you can trust.

import finetune

run = finetune.run("recipes/sentiment.yaml")
finetune.load("runs/sentiment").predict(["Shares slump after profit warning"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.artifact.load import load
    from finetune.artifact.merge import merge_adapters
    from finetune.artifact.pool import AdapterPool, load_adapters
    from finetune.artifact.predictor import MultiPredictor, Predictor
    from finetune.comparison import compare
    from finetune.compression import compress
    from finetune.label_audit import audit
    from finetune.runner import Run, check, evaluate, resume, run
    from finetune.search import sweep

__version__ = "0.1.0"
__all__ = [
    "AdapterPool",
    "MultiPredictor",
    "Predictor",
    "Run",
    "audit",
    "check",
    "compare",
    "compress",
    "evaluate",
    "load",
    "load_adapters",
    "merge_adapters",
    "resume",
    "run",
    "sweep",
]

_HOMES = {
    "AdapterPool": "finetune.artifact.pool",
    "MultiPredictor": "finetune.artifact.predictor",
    "Predictor": "finetune.artifact.predictor",
    "audit": "finetune.label_audit",
    "compare": "finetune.comparison",
    "compress": "finetune.compression",
    "load": "finetune.artifact.load",
    "load_adapters": "finetune.artifact.pool",
    "merge_adapters": "finetune.artifact.merge",
    "sweep": "finetune.search",
}


def __dir__() -> list[str]:
    """What is imported on first use is there too."""
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `finetune --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "finetune.runner")), name)
