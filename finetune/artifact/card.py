"""The model card in the Hub's format; every number is read from the run's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from finetune.adapters.methods import IN_TREE, METHODS, describe
from finetune.evaluation.wording import MEANINGS, OUTSIDE_SCORES, decimals_of, format_score
from finetune.models.base import LOCAL, SCRATCH
from finetune.recipe.card import Card
from finetune.recipe.reference import SCRATCH_BASE, split_revision
from finetune.recipe.schema import GenerateSection, Recipe, TaskSection

# What the Hub's leaderboards call our metrics.
HUB_METRICS = {
    "macro_f1": "f1",
    "weighted_f1": "f1",
    "accuracy": "accuracy",
    "mcc": "matthews_correlation",
    "token_accuracy": "accuracy",
    "bleu": "sacrebleu",
    "bleu_zh": "sacrebleu",
    "answer_f1": "f1",
}
# Task type -> the Hub's task, the end of the name of its classes, and what the model is.
SHAPES = {
    "text_classification": ("text-classification", "ForSequenceClassification", "A text classifier."),
    "causal_lm": ("text-generation", "ForCausalLM", "A language model."),
    "masked_lm": ("fill-mask", "ForMaskedLM", "A masked language model."),
    "seq2seq": ("text-generation", "ForSeq2SeqLM", "A model that writes a text for a text."),
    "completion": ("text-generation", "ForCausalLM", "A language model that completes prompts."),
    "retrieval": ("sentence-similarity", "ForSentenceEmbedding", "A sentence encoder that finds entries."),
    "reranking": ("text-ranking", "ForSequenceClassification", "A model that ranks entries for a question."),
    "question_answering": (
        "question-answering",
        "ForQuestionAnswering",
        "A model that finds the answer to a question in a passage, or says that there is none.",
    ),
    "recommendation": ("other", "ForNextItem", "A recommender: the items that a person turns to next."),
}
SEVERAL = ("ForMultiTask", "A model with several heads.")
NO_AUTO_CLASS = ("ForSentenceEmbedding", "ForNextItem", SEVERAL[0])
"""Classes that transformers has no Auto class of: theirs is `AutoModel`."""
UNKNOWN_LICENCES = ("", "unknown", "other", "none")
TRANSLATION = ("translation", "ForSeq2SeqLM", "A translation model.")


@dataclass(frozen=True)
class _Part:
    """What the card says about one task."""

    name: str
    section: TaskSection
    data: Card | None
    test: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What the data set is called."""
        return self.data.title if self.data else Path(self.section.data).name

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column."""
        return (self.data.roles if self.data else {}) | self.section.columns

    def list_results(self, task_type: str) -> list[EvalResult]:
        """Its scores as the Hub's leaderboards read them."""
        data = self.data
        return [
            EvalResult(
                task_type=task_type,
                dataset_type=data.hub.id if data and data.hub else self.section.data if data else "private",
                dataset_name=self.title,
                dataset_split="test",
                metric_type=HUB_METRICS.get(name, name),
                metric_name=name,
                metric_value=score["value"],
            )
            for name, score in self.test["metrics"].items()
            if score["value"] is not None
        ]


@dataclass(frozen=True)
class Publication:
    """How a run is published, where it is.

    Args:
        repo: what `from_pretrained` finds it by.
        merged: whether its adapter is folded into the base's weights.
        adapter_place: the folder in it that holds the adapter alone, beside merged weights.
        missed: gates that it missed, in words.
        holds: what of the data is part of the model, in sentences.
    """

    repo: str
    merged: bool = False
    adapter_place: str | None = None
    missed: Sequence[str] = ()
    holds: Sequence[str] = ()


def warn_of_licences(recipe: Recipe, data: Mapping[str, Card | None]) -> list[str]:
    """What the licences of a recipe's data leave open or forbid, a sentence for each data set."""
    warnings = []
    for name, section in recipe.tasks.items():
        card = data[name]
        if card is None:
            title = Path(section.data).name
            warnings.append(f"The licence of {title} is not known: who passes on the model must know it.")
        elif card.non_commercial:
            warnings.append(f"{card.title} is for non-commercial use only (licence: {card.licence}).")
        elif card.licence.lower() in UNKNOWN_LICENCES:
            warnings.append(f"The licence of {card.title} is not known: who passes on the model must know it.")
    return list(dict.fromkeys(warnings))


def find_hub_base(lock: Mapping[str, Any]) -> str | None:
    """The base on the Hub, perhaps with its revision, that a run's model comes from; None where it was a folder of the
    machine that the run was made on, or random weights."""
    if "parent" in lock:  # a smaller model of another run
        base: str | None = lock["parent"]["base"]
        return base
    base = lock["base"]["reference"]
    return None if lock["base"]["origin"] in (LOCAL, SCRATCH.origin) else base


@cache
def _load_template() -> Template:
    environment = Environment(
        loader=PackageLoader("finetune", "artifact"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"score": format_score, "decimals": decimals_of}
    return environment.get_template("model_card.md.j2")


def build_model_card(
    recipe: Recipe,
    data: Mapping[str, Card | None],
    tests: Mapping[str, Mapping[str, Any]],
    status: Mapping[str, Any],
    lock: Mapping[str, Any],
    publication: Publication | None = None,
) -> str:
    """Write the card of a run.

    Args:
        recipe: resolved.
        data: task name -> the data set's card; None for a user's own file.
        tests: task name -> the content of its test.json.
        status: the content of status.json.
        lock: the content of run.lock.
        publication: None for the card in the run's own folder.
    """
    parts = [_Part(name, section, data[name], tests[name]) for name, section in recipe.tasks.items()]
    cards = [part.data for part in parts if part.data]
    kind = parts[0].section.type
    hub_base = find_hub_base(lock)
    base, revision = split_revision(hub_base) if hub_base else (Path(recipe.model.base).name, None)
    is_scratch = recipe.model.base == SCRATCH_BASE
    is_translation = kind == "seq2seq" and bool(cards) and len(cards[0].language) > 1
    # The Hub has no task for other texts from texts: it counts them as text generation.
    pipeline_tag, head, shape = TRANSLATION if is_translation else SHAPES[kind]
    if len(parts) > 1:
        head, shape = SEVERAL
    description = recipe.description or shape
    is_merged = publication is not None and publication.merged
    is_peft = METHODS[recipe.adapter.method].build is not None and not is_merged
    hub_sets = dict.fromkeys(card.hub.id for card in cards if card.hub)
    header = ModelCardData(
        model_name=recipe.name,
        base_model=base if hub_base else None,
        language=list(dict.fromkeys(language for card in cards for language in card.language)) or None,
        datasets=list(hub_sets) or None,
        library_name="peft" if is_peft else "transformers",
        pipeline_tag=pipeline_tag,
        tags=["finetune-toolkit", "from-scratch" if is_scratch else recipe.adapter.method],
        eval_results=[result for part in parts for result in part.list_results(pipeline_tag)],
    )
    names = dict.fromkeys(metric for part in parts for metric in part.test["metrics"])
    body = _load_template().render(
        recipe=recipe,
        parts=parts,
        kind=kind,
        kinds={part.section.type for part in parts},
        head=head,
        auto="" if head in NO_AUTO_CLASS else head,
        place=publication.repo if publication else "model",
        merged=is_merged,
        adapter_place=publication.adapter_place if publication else None,
        missed=publication.missed if publication else [],
        warnings=[*publication.holds, *warn_of_licences(recipe, data)] if publication else [],
        description=description if description.endswith(".") else f"{description}.",
        scratch=recipe.model.scratch if is_scratch else None,
        base=base,
        revision=revision,
        meanings={name: MEANINGS[name] for name in names if name in MEANINGS},
        training=status["training"],
        lock=lock,
        parent=lock.get("parent"),
        tuning=describe(recipe.adapter),
        peft=is_peft,
        in_tree=recipe.adapter.method in IN_TREE,
        triad=recipe.model.architecture == "triad",
        outside_words=OUTSIDE_SCORES,
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
