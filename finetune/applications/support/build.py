"""From a trained run to an assistant, and how well it does as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.applications.support.assistant import Assistant
from finetune.applications.support.decision import Costs
from finetune.applications.support.evaluate import (
    OUT_OF_SCOPE,
    Question,
    answer_questions,
    build_questions,
    collect_outcomes,
    compute_curve,
    summarize,
)
from finetune.applications.support.load import find_support_folder, save_assistant
from finetune.applications.support.reader import RememberingReader
from finetune.applications.support.trained import build_reader
from finetune.artifact.run_folder import RunFolder, find_run, load_json, save_json
from finetune.data.catalog import find_card_folder
from finetune.data.sources import LoadedRows, load_rows
from finetune.data.turns import CONTEXT
from finetune.errors import DataError, UsageError
from finetune.recipe import load_recipe
from finetune.recipe.schema import AssistantSection, Recipe, TaskSection
from finetune.tasks.entries import ENTRY
from finetune.tasks.preparation import load_entries

_BUILT = "test.json"  # written last: without it the assistant is not whole


def build_assistant(run: str | Path) -> dict[str, Any]:
    """Build the assistant of a finished run, choose its threshold on validation, and answer the test questions.

    Args:
        run: the run's folder, or runs/<name> for its latest finished run.

    Returns:
        The end-to-end figures, as in support/test.json.

    Raises:
        UsageError: no such run, or its recipe has no `assistant`.
        DataError: templates or rows that cannot be trusted.
    """
    folder = find_run(run)
    recipe = load_recipe(folder.recipe)
    if recipe.assistant is None:
        raise UsageError(f"{folder.path}: must come from a recipe with `assistant`, got one without. Add it, and run.")
    reader, place = RememberingReader(build_reader(folder)), find_support_folder(folder)
    source = _load_rows(folder, recipe)
    questions = _build_questions(folder, recipe, source, reader.intents)
    (place / _BUILT).unlink(missing_ok=True)
    assistant = save_assistant(
        place,
        reader,
        load_entries(_get_task(recipe, "retrieval")[1], source, folder.recipe_folder),
        _find_templates(folder, recipe.assistant, source),
        questions,
        Costs(recipe.assistant.wrong_cost, recipe.assistant.handover_cost, recipe.assistant.question_cost),
    )
    save_json(place / "validation.json", _judge(assistant, questions["validation"], recipe))
    save_json(place / _BUILT, _judge(assistant, questions["test"], recipe))
    return dict(load_json(place / _BUILT))


def is_built(run: str | Path) -> bool:
    """Whether a finished run has its assistant, or its recipe asks for none.

    Raises:
        UsageError: no such run.
    """
    folder = find_run(run)
    return (find_support_folder(folder) / _BUILT).exists() or load_recipe(folder.recipe).assistant is None


def _judge(assistant: Assistant, questions: Sequence[Question], recipe: Recipe) -> dict[str, Any]:
    """The figures of one split, the curve, and each reply."""
    answered = answer_questions(assistant, questions)
    section = recipe.evaluate
    summary = summarize(answered, confidence=section.confidence, resamples=section.resamples, seed=recipe.train.seed)
    replies = [
        {
            "text": each.question.text,
            "context": each.question.context,
            "intent": each.question.intent,
            "entries": sorted(each.question.entries),
            "outcome": each.judgement,
            "in_the_end": each.in_the_end,
            "kind": each.reply.kind,
            "reply": each.reply.text,
            "confidence": each.reply.confidence,
        }
        for each in answered
    ]
    return summary | {"curve": compute_curve(collect_outcomes(assistant, questions)), "replies": replies}


def _build_questions(
    folder: RunFolder, recipe: Recipe, source: LoadedRows, intents: Sequence[str]
) -> dict[str, list[Question]]:
    """The messages of each split, as the intent task split them."""
    name, section = _get_task(recipe, "text_classification")
    ids = load_json(folder.data / "ids.json")[name]
    rows = {row.id: row.values for row in source.rows}

    def describe(values: Mapping[str, Any]) -> dict[str, Any]:
        label = OUT_OF_SCOPE if values["label"] == section.out_of_scope else values["label"]
        context = values[CONTEXT] if CONTEXT in source.columns else ""
        return {**values, "intent": label, "context": context}

    return {
        # What training added to the rows, such as copies with mistakes of typing, is no message of a customer.
        split: build_questions([describe(rows[key]) for key in keys if key in rows], intents)
        for split, keys in ids.items()
    }


def _load_rows(folder: RunFolder, recipe: Recipe) -> LoadedRows:
    """The messages with both truths: the intent, and the entries that answer."""
    _, intent = _get_task(recipe, "text_classification")
    _, answer = _get_task(recipe, "retrieval")
    return load_rows(
        intent.data,
        answer.columns | intent.columns,
        roles=("text", "label", ENTRY),
        optional=(CONTEXT,),
        relative_to=folder.recipe_folder,
    )


def _find_templates(folder: RunFolder, section: AssistantSection, source: LoadedRows) -> Path:
    """Where the intents are described.

    Raises:
        DataError: nowhere.
    """
    if section.templates is not None:
        path = Path(section.templates).expanduser()
        return path if path.exists() else folder.recipe_folder / path
    place = find_card_folder(source.card) if source.card else None
    if source.card is None or source.card.templates is None or place is None:
        raise DataError(
            "assistant.templates: must name a file of intents (intent, description, template, slots), got none, and no "
            "card of the data names one."
        )
    return place / source.card.templates


def _get_task(recipe: Recipe, kind: str) -> tuple[str, TaskSection]:
    return next((name, section) for name, section in recipe.tasks.items() if section.type == kind)
