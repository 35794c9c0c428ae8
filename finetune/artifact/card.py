"""The model card in the Hub's format; every number is read from the run's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from finetune.adapters.methods import METHODS, describe
from finetune.evaluation.wording import MEANINGS, decimals_of, format_score
from finetune.recipe.card import Card
from finetune.recipe.reference import SCRATCH_BASE, split_revision
from finetune.recipe.schema import GenerateSection, Recipe

# What the Hub's leaderboards call our metrics.
HUB_METRICS = {
    "macro_f1": "f1",
    "weighted_f1": "f1",
    "accuracy": "accuracy",
    "mcc": "matthews_correlation",
    "token_accuracy": "accuracy",
    "bleu": "sacrebleu",
    "bleu_zh": "sacrebleu",
}
# Task type -> the Hub's task, the end of the name of its classes, and what the model is.
SHAPES = {
    "text_classification": ("text-classification", "ForSequenceClassification", "A text classifier."),
    "causal_lm": ("text-generation", "ForCausalLM", "A language model."),
    "masked_lm": ("fill-mask", "ForMaskedLM", "A masked language model."),
    "seq2seq": ("text-generation", "ForSeq2SeqLM", "A model that writes a text for a text."),
}
TRANSLATION = ("translation", "ForSeq2SeqLM", "A translation model.")


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
    is_scratch = recipe.model.base == SCRATCH_BASE
    is_hub_base = not is_scratch and not Path(base).is_dir()
    is_translation = recipe.task.type == "seq2seq" and data is not None and len(data.language) > 1
    # The Hub has no task for other texts from texts: it counts them as text generation.
    pipeline_tag, head, shape = TRANSLATION if is_translation else SHAPES[recipe.task.type]
    title = data.title if data else Path(recipe.task.data).name
    results = [
        EvalResult(
            task_type=pipeline_tag,
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
    description = recipe.description or shape
    is_peft = METHODS[recipe.adapter.method].build is not None
    header = ModelCardData(
        model_name=recipe.name,
        base_model=base if is_hub_base else None,
        language=data.language if data else None,
        datasets=[data.hub.id] if data and data.hub else None,
        library_name="peft" if is_peft else "transformers",
        pipeline_tag=pipeline_tag,
        tags=["finetune-toolkit", "from-scratch" if is_scratch else recipe.adapter.method],
        eval_results=results,
    )
    environment = Environment(
        loader=PackageLoader("finetune", "artifact"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"score": format_score, "decimals": decimals_of}
    body = environment.get_template("model_card.md.j2").render(
        recipe=recipe,
        kind=recipe.task.type,
        head=head,
        columns=(data.roles if data else {}) | recipe.task.columns,
        description=description if description.endswith(".") else f"{description}.",
        scratch=recipe.model.scratch if is_scratch else None,
        base=base if is_hub_base else Path(base).name,
        data=data,
        title=title,
        test=test,
        meanings={name: MEANINGS[name] for name in test["metrics"] if name in MEANINGS},
        training=status["training"],
        lock=lock,
        tuning=describe(recipe.adapter),
        peft=is_peft,
        triad=recipe.model.architecture == "triad",
        generation=_describe_generation(recipe.evaluate.generate),
    )
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}"))


def _describe_generation(section: GenerateSection) -> dict[str, str]:
    """How the model wrote when it was judged: in words, and as arguments of `generate` beside the length."""
    if section.temperature is not None:
        among = f" among the {section.top_k} likeliest" if section.top_k else ""
        return {
            "words": f"by sampling each token{among} at temperature {section.temperature:g}",
            "arguments": f", do_sample=True, temperature={section.temperature}, top_k={section.top_k or 0}",
        }
    if section.beams > 1:
        penalty = f", length_penalty={section.length_penalty}" if section.length_penalty != 1 else ""
        return {
            "words": f"by beam search with {section.beams} beams",
            "arguments": f", num_beams={section.beams}{penalty}",
        }
    return {"words": "by taking the likeliest token each time", "arguments": ""}
