"""Score a model on a held-out set: a saved or pushed one of this toolkit, or a plain one of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.artifact.load import list_predictors, load
from finetune.artifact.plain import load_plain
from finetune.artifact.predictor import Predictor
from finetune.artifact.run_folder import SETTINGS
from finetune.artifact.saved import Saved, fetch_folder, is_hub_reference, open_saved
from finetune.data.batches import Examples
from finetune.data.checks import findings_to_json
from finetune.data.knowledge import Entry, load_card_knowledge, load_knowledge
from finetune.data.rows import Row
from finetune.data.sources import LoadedRows, load_rows
from finetune.data.splits import split_rows
from finetune.data.turns import CONTEXT
from finetune.errors import ColumnError, DataError, UsageError
from finetune.models.base import WHEELS, BaseModel, resolve_base
from finetune.recipe.defaults import TYPE_DEFAULTS
from finetune.recipe.prompt import parse_prompt
from finetune.recipe.schema import EvaluateSection, SplitSection, TrainSection
from finetune.tasks import (
    Completion,
    HeldOut,
    MultiTask,
    Recommendation,
    Reranking,
    Retrieval,
    Task,
    TextClassification,
)
from finetune.tasks.preparation import check_held_out, check_roles

ON_BASE = ("frozen_logreg", "frozen", "fused")
"""Baselines that need the base as it was before training."""
UNFITTED = ("copy", "no_answer", "bm25", "frozen", "fused")
"""Baselines that need no train rows."""


def score_model(  # noqa: PLR0913  (as the command takes them)
    reference: str,
    data: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    knowledge: str | None = None,
    prompt: str | None = None,
) -> dict[str, Any]:
    """Score a model on a held-out set with the metrics, intervals and baselines that a run gets by default.

    Baselines are fitted on the set's own train rows; a set without such rows is scored without those that need them.
    What a reranker looks at again is found as in its run where its base is known, else by BM25.

    Args:
        reference: `org/name` on the Hub, or a folder: of this toolkit, or a plain model, see `artifact.plain`.
        data: a card, a path or `hub:org/name@revision`; its test rows are scored, all of them where it has no splits.
        columns: role (`text`, `label`) -> the data's name of its column, where it is another.
        task: whose rows the data are, of a model with several tasks; of a plain model its task type.
        labels: its classes in the order of the logits, where it calls them otherwise than the data.
        knowledge: the entries that questions are answered from, for a sentence encoder or a reranker; default the
            card's.
        prompt: what a model that completes reads, words and columns in braces; default its own, `{text}` of a plain
            one.

    Returns:
        The scores, in the layout of evaluation/test.json, with `model`, `task` (its type), `max_length` (tokens that
        it reads at once), `data` and `findings`.

    Raises:
        UsageError: no such model or task, one that cannot be scored, or an option that is not for it.
        ModelError: the model cannot be had, or is of no kind that can be scored.
        DataError: rows that cannot be read, lack a column, or whose classes or entries are not those of the model.
    """
    folder = _find_folder(reference)
    saved = open_saved(folder) if (folder / SETTINGS).exists() else None
    predictor = _load_ours(saved, task) if saved else load_plain(folder, reference, task)
    source = _load_rows(reference, str(data), dict(columns or {}), predictor)
    shape = _fit_to_data(predictor.task, source, reference, labels, knowledge, prompt)
    base = resolve_base(saved.base) if saved and saved.base else None  # as it was before training, where that is known
    if isinstance(shape, Retrieval | Reranking) and saved is None:
        shape = replace(shape, reads_context=CONTEXT in source.columns)
    if isinstance(shape, Reranking) and base is None:
        shape = replace(shape, first_search="bm25")
    test, findings = check_held_out(shape, source)
    rows = _split(shape, source.rows) | {"test": test}
    judgement = shape.judge(
        HeldOut(
            model=predictor.model,
            tokenizer=predictor.tokenizer,
            rows=rows,
            examples={name: _encode(shape, part, predictor) for name, part in rows.items()},
            base=base or BaseModel(reference, folder, "the model itself"),
            section=_build_section(shape, predictor, has_train=bool(rows["train"]), has_base=base is not None),
            max_length=predictor.max_length,
            seed=TrainSection().seed,
            opened=None,
            settings={"temperature": predictor.temperature, **predictor.fitted},
        )
    )
    return judgement.scored["test"] | {
        "model": reference,
        "task": shape.type,
        "max_length": predictor.max_length,
        "split": source.name,
        "data": source.origin,
        "findings": findings_to_json(findings),
    }


def _find_folder(reference: str) -> Path:
    if is_hub_reference(reference):
        return resolve_base(reference).folder if reference in WHEELS else fetch_folder(reference)
    folder = Path(reference).expanduser()
    if (folder / "config.json").exists():
        return folder
    return open_saved(reference).folder  # a run


def _load_ours(saved: Saved, task: str | None) -> Predictor:
    shape: Task | MultiTask = saved.task
    if isinstance(shape, MultiTask):
        if task is None or task not in shape.tasks:
            got = "none" if task is None else repr(task)
            raise UsageError(f"--task: must be one of {', '.join(shape.tasks)}, got {got}.")
        shape = shape.tasks[task]
    if isinstance(shape, Recommendation):
        raise UsageError(
            f"--model: must be a model that is scored by itself, got {shape.type}, which is judged with the events "
            "before a cut in time. Score its run: finetune evaluate RUN"
        )
    return list_predictors(load(saved.folder), [task or ""])[task or ""]


def _load_rows(reference: str, data: str, columns: dict[str, str], predictor: Predictor) -> LoadedRows:
    shape = predictor.task
    check_roles(shape, columns)
    try:
        return load_rows(data, columns, roles=shape.roles, optional=shape.optional_roles)
    except ColumnError as error:
        raise DataError(
            f"{error.problem} {reference} is scored as {shape.type}, on {', '.join(shape.roles)}: where the data call "
            f"them otherwise, --column {shape.roles[-1]}=NAME. For another task train it first: set model.base to it."
        ) from error


def _fit_to_data(
    shape: Task,
    source: LoadedRows,
    reference: str,
    labels: Sequence[str] | None,
    knowledge: str | None,
    prompt: str | None,
) -> Task:
    """The task with what it needs to know of the data: what values mean its classes, the entries, or the prompt."""
    for option, given, wanted, fix in (
        ("--labels", labels, (TextClassification,), ""),
        ("--knowledge", knowledge, (Retrieval, Reranking), ""),
        ("--prompt", prompt, (Completion,), " Of a causal language model --task completion makes one."),
    ):
        if given is not None and not isinstance(shape, wanted):
            kinds = " or ".join(one.type for one in wanted)
            raise UsageError(f"{option}: must come with a model for {kinds}, got {shape.type}. Leave it out.{fix}")
    if isinstance(shape, TextClassification):
        if labels is not None:
            if len(labels) != len(shape.labels):
                must = f"must name the {len(shape.labels)} classes of {reference}"
                raise UsageError(f"--labels: {must}, got {len(labels)}.")
            shape = replace(shape, labels=list(labels))
        return _match_classes(reference, source, shape)
    if isinstance(shape, Completion):
        return _settle_prompt(shape, source, prompt)
    if isinstance(shape, Retrieval):
        entries = _find_entries(source, knowledge)
        return replace(shape, size=len(entries), answers=(), entries=entries)
    return replace(shape, entries=_find_entries(source, knowledge)) if isinstance(shape, Reranking) else shape


def _match_classes(reference: str, source: LoadedRows, shape: TextClassification) -> TextClassification:
    """The task, told which values of the data mean its classes: by the data's card, in any case of letters."""
    known = source.card.labels if source.card else None
    names = known if isinstance(known, dict) else shape.values
    found = {row.values["label"] for row in source.rows} - {""}
    classes = [*shape.labels, *([shape.out_of_scope] if shape.out_of_scope else [])]
    folded = {label.casefold(): label for label in classes}
    values = {value: folded.get(names.get(value, value).casefold(), "") for value in sorted(found)}
    if unknown := [names.get(value, value) for value, label in values.items() if not label]:
        raise DataError(
            f"{source.origin}: its classes must be those of {reference}, {', '.join(classes)}, got also "
            f"{', '.join(unknown)}. Name the data's classes in the order of the model's logits: --labels A,B,..."
        )
    return replace(shape, values=values)


def _settle_prompt(shape: Completion, source: LoadedRows, prompt: str | None) -> Completion:
    """The task with that prompt, where there is one, after a look at the columns that it names."""
    if prompt is not None:
        try:
            parse_prompt(prompt)
        except ValueError as error:
            raise UsageError(f"--prompt: {error}") from error
        shape = replace(shape, prompt=prompt)
    shape.check_columns(source.rows, "--prompt")
    return shape


def _find_entries(source: LoadedRows, knowledge: str | None) -> tuple[Entry, ...]:
    """What is searched."""
    if knowledge is not None:
        entries = load_knowledge(knowledge)
    elif source.card is not None and source.card.knowledge is not None:
        entries = load_card_knowledge(source.card)
    else:
        raise UsageError(
            f"--knowledge: must name what {source.origin} is answered from, got none. Write --knowledge FILE, with "
            "id, text and perhaps title and group of each entry."
        )
    return tuple(entries)


def _split(task: Task, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Train and validation rows of a set that has a test split; a missing validation split is cut from train."""
    given = [row for row in rows if row.split is not None]
    if {"train", "test"} - {row.split for row in given}:
        return {"train": [], "validation": []}
    splits = split_rows(task.prepare_rows(given), SplitSection(by="given"), seed=TrainSection().seed)
    return {name: list(splits[name]) for name in ("train", "validation")}


def _encode(shape: Task, rows: Sequence[Row], predictor: Predictor) -> Examples:
    """Encoded rows; a ranking is made of the rows alone."""
    if not rows or isinstance(shape, Retrieval | Reranking):
        return Examples.build([], targets=[])
    return shape.build_examples(rows, predictor.tokenizer, predictor.max_length)


def _build_section(shape: Task, predictor: Predictor, *, has_train: bool, has_base: bool) -> EvaluateSection:
    """`evaluate` as a recipe of that type without the section has it, less the baselines that cannot be fitted."""
    section = EvaluateSection(**TYPE_DEFAULTS[shape.type]["evaluate"])
    kept = [name for name in section.baselines if (has_train or name in UNFITTED) and (has_base or name not in ON_BASE)]
    return section.model_copy(update={"baselines": kept, "generate": predictor.writing, "samples": 0})
