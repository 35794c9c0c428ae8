"""What the task type and the base change of the schema's defaults, where a recipe says nothing."""

from __future__ import annotations

from typing import Any

from finetune.recipe.reference import SCRATCH_BASE

_LIKELIHOOD = {"early_stop": {"metric": "loss"}}
TYPE_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "causal_lm": {
        "train": _LIKELIHOOD,
        "evaluate": {
            "metrics": ["loss", "perplexity", "bits_per_byte", "token_accuracy"],
            "baselines": ["unigram", "ngram"],
            "calibrate": "none",
            "slices": [],
        },
    },
    "masked_lm": {
        "adapter": {"method": "full"},
        "train": _LIKELIHOOD,
        "evaluate": {
            "metrics": ["loss", "perplexity", "token_accuracy"],
            "baselines": ["unigram"],
            "calibrate": "none",
            "slices": [],
        },
    },
    "seq2seq": {
        # Rotary positions say nothing about tokens of the other stack.
        "model": {"scratch": {"position": "sinusoidal"}},
        "train": _LIKELIHOOD,
        "evaluate": {
            "metrics": ["bleu", "chrf", "loss"],
            "baselines": ["copy", "nearest"],
            "calibrate": "none",
            "generate": {"beams": 5},
        },
    },
}
SCRATCH_DEFAULTS: dict[str, dict[str, Any]] = {"adapter": {"method": "full"}}
"""What `model.base: scratch` changes of them."""


def fill_in_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it was written, with the defaults that its task type and its base ask for; it need not be valid."""
    tasks, model = recipe.get("tasks"), recipe.get("model")
    first = next(iter(tasks.values()), None) if isinstance(tasks, dict) else None
    kind = first.get("type") if isinstance(first, dict) else None
    filled = _fill_in(recipe, TYPE_DEFAULTS.get(kind, {}) if isinstance(kind, str) else {})
    scratch = isinstance(model, dict) and model.get("base") == SCRATCH_BASE
    return _fill_in(filled, SCRATCH_DEFAULTS) if scratch else filled


def _fill_in(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`given`, and what it lacks of `defaults`, at any depth; what is there stays, null too."""
    filled = dict(given)
    for key, value in defaults.items():
        if key not in filled:
            filled[key] = value
        elif isinstance(value, dict) and isinstance(filled[key], dict):
            filled[key] = _fill_in(filled[key], value)
    return filled
