"""The model card in the Hub's format; every number is read from the run's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from finetune.evaluation.wording import format_score
from finetune.recipe.card import Card
from finetune.recipe.reference import split_revision
from finetune.recipe.schema import Recipe

# What the Hub's leaderboards call our metrics.
HUB_METRICS = {"macro_f1": "f1", "weighted_f1": "f1", "accuracy": "accuracy", "mcc": "matthews_correlation"}


def build_model_card(
    recipe: Recipe, data: Card | None, test: Mapping[str, Any], status: Mapping[str, Any], lock: Mapping[str, Any]
) -> str:
    """Write the card of a run.

    Args:
        recipe: resolved.
        data: the data set's card; None for a user's own file.
        test: the content of evaluation/test.json.
        status: the content of status.json.
        lock: the content of run.lock.
    """
    base = split_revision(recipe.model.base)[0]
    is_hub_base = not Path(base).is_dir()
    title = data.title if data else Path(recipe.task.data).name
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=data.hub.id if data and data.hub else recipe.task.data if data else "private",
            dataset_name=title,
            dataset_split="test",
            metric_type=HUB_METRICS.get(name, name),
            metric_name=name,
            metric_value=score["value"],
        )
        for name, score in test["metrics"].items()
        if score["value"] is not None
    ]
    description = recipe.description or "A text classifier."
    header = ModelCardData(
        model_name=recipe.name,
        base_model=base if is_hub_base else None,
        language=data.language if data else None,
        datasets=[data.hub.id] if data and data.hub else None,
        library_name="peft" if recipe.adapter.method == "lora" else "transformers",
        pipeline_tag="text-classification",
        tags=["finetune-toolkit", recipe.adapter.method],
        eval_results=results,
    )
    environment = Environment(
        loader=PackageLoader("finetune", "artifact"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["score"] = format_score
    body = environment.get_template("model_card.md.j2").render(
        recipe=recipe,
        description=description if description.endswith(".") else f"{description}.",
        base=base if is_hub_base else Path(base).name,
        data=data,
        title=title,
        test=test,
        training=status["training"],
        lock=lock,
        lora=recipe.adapter.method == "lora",
        triad=recipe.model.architecture == "triad",
    )
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}"))
