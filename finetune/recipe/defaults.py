"""What the task type, the base and the method change of the schema's defaults, where a recipe says nothing."""

from __future__ import annotations

from typing import Any

from finetune.recipe.reference import SCRATCH_BASE

_LIKELIHOOD = {"early_stop": {"metric": "loss"}}
CLASS_METRICS = ["macro_f1", "accuracy", "ece"]
CLASS_BASELINES = ["majority", "tfidf_logreg", "frozen_logreg"]
_SEARCH: dict[str, dict[str, Any]] = {
    "train": {"early_stop": {"metric": "mrr"}},
    "evaluate": {
        "metrics": ["mrr", "recall_at_1", "recall_at_5", "ndcg_at_10"],
        "baselines": ["bm25", "frozen", "fused"],
        "calibrate": "none",
    },
}
TYPE_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "text_classification": {"evaluate": {"metrics": CLASS_METRICS, "baselines": CLASS_BASELINES}},
    "retrieval": _SEARCH,
    "reranking": _SEARCH,
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
    "completion": {
        "train": _LIKELIHOOD,
        "evaluate": {"metrics": ["chrf", "bleu", "loss", "perplexity"], "baselines": ["nearest"], "calibrate": "none"},
    },
    "question_answering": {
        # BERT's for SQuAD: long enough that most passages are read in one window (arXiv:1810.04805).
        "model": {"max_length": 384},
        "train": {"early_stop": {"metric": "answer_f1"}},
        "evaluate": {
            "metrics": ["answer_f1", "exact_match", "has_answer_f1", "no_answer_accuracy"],
            "baselines": ["no_answer", "bm25_sentence"],
            "calibrate": "none",
        },
    },
    "recommendation": {
        "adapter": {"method": "full"},
        "model": {
            "max_length": 100,
            "dropout": 0.2,
            "scratch": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "position": "learned"},
        },
        "train": {
            "epochs": 30,
            "tokens_per_batch": 4096,
            "early_stop": {"metric": "ndcg_at_10", "patience": 4},
        },
        "evaluate": {
            "metrics": ["ndcg_at_10", "recall_at_10", "mrr"],
            "baselines": ["popular", "popular_week", "item_knn", "ease", "co_occurrence"],
            "calibrate": "none",
            "slices": ["history"],
        },
    },
}
# Methods of few weights need larger steps. Each is the best on validation of two or three rates, tried for 60 steps on
# the sample headlines with MiniLM and one seed: a place to begin, not the end of a search.
METHOD_RATES = {
    "adalora": 2e-2,
    "ia3": 2e-2,
    "prefix": 1e-2,
    "prompt": 3e-2,
    "vera": 2e-2,
    "ln_tuning": 2e-2,
    "loha": 5e-3,
    "lokr": 5e-3,
    "oft": 5e-3,
    "fourierft": 5e-2,
    "adapter": 5e-3,
    "bitfit": 5e-3,
}
"""Method -> `train.learning_rate`, where it is not the schema's."""
METHOD_HEAD_RATE = 3e-3
"""`train.head_learning_rate` with them: three times their own rate would be too much for a head."""
SCRATCH_DEFAULTS: dict[str, dict[str, Any]] = {"adapter": {"method": "full"}}
"""What `model.base: scratch` changes of them."""
CONTRASTIVE_DEFAULTS: dict[str, dict[str, Any]] = {"model": {"normalize_features": True}}
"""What `train.few_shot: contrastive` changes of them on a Triad: the loss looks at cosines, so lengths say little."""


def fill_in_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it was written, with the defaults of its task type, base and method; it need not be valid."""
    model = recipe.get("model")
    filled = _fill_in(recipe, _join_defaults(_list_types(recipe)))
    if isinstance(model, dict) and model.get("base") == SCRATCH_BASE:
        filled = _fill_in(filled, SCRATCH_DEFAULTS)
    if _is_contrastive(recipe):
        filled = _fill_in(filled, CONTRASTIVE_DEFAULTS)
    adapter = filled.get("adapter")
    rate = METHOD_RATES.get(str(adapter.get("method"))) if isinstance(adapter, dict) else None
    if rate is None:
        return filled
    return _fill_in(filled, {"train": {"learning_rate": rate, "head_learning_rate": METHOD_HEAD_RATE}})


def _list_types(recipe: dict[str, Any]) -> list[str]:
    """The different types of the tasks, as far as they are known."""
    tasks = recipe.get("tasks")
    sections = tasks.values() if isinstance(tasks, dict) else []
    types = [section.get("type") for section in sections if isinstance(section, dict)]
    return list(dict.fromkeys(name for name in types if isinstance(name, str) and name in TYPE_DEFAULTS))


def _join_defaults(types: list[str]) -> dict[str, Any]:
    """Those of the only type. Of several: the metrics and baselines of all, and what ends training is the loss."""
    if len(types) <= 1:
        return TYPE_DEFAULTS[types[0]] if types else {}
    sections = [TYPE_DEFAULTS[name]["evaluate"] for name in types]
    joined = {
        key: list(dict.fromkeys(name for section in sections for name in section[key]))
        for key in ("metrics", "baselines")
    }
    calibrate = "temperature" if "text_classification" in types else "none"
    return {"train": _LIKELIHOOD, "evaluate": joined | {"calibrate": calibrate}}


def _is_contrastive(recipe: dict[str, Any]) -> bool:
    train, model = recipe.get("train"), recipe.get("model", {})
    is_native = isinstance(model, dict) and model.get("architecture") == "native"
    return isinstance(train, dict) and train.get("few_shot") == "contrastive" and not is_native


def _fill_in(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`given`, and what it lacks of `defaults`, at any depth; what is there stays, null too."""
    filled = dict(given)
    for key, value in defaults.items():
        if key not in filled:
            filled[key] = value
        elif isinstance(value, dict) and isinstance(filled[key], dict):
            filled[key] = _fill_in(filled[key], value)
    return filled
