"""Score any text classifier on a held-out set: a saved or pushed one of this toolkit, or a plain one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.artifact.load import Predictor, choose_device, list_predictors, load
from finetune.artifact.save import SETTINGS
from finetune.artifact.saved import Saved, fetch_folder, is_hub_reference, open_saved
from finetune.data.catalog import card_names, load_card
from finetune.data.checks import findings_to_json
from finetune.data.rows import Row
from finetune.data.sources import load_rows
from finetune.data.splits import split_rows
from finetune.errors import DataError, ModelError, UsageError
from finetune.models.base import BaseModel, load_config, load_tokenizer, resolve_base
from finetune.models.classifier import load_saved_classifier
from finetune.recipe.schema import EvaluateSection, SplitSection, TrainSection
from finetune.tasks import HeldOut, MultiTask, Task, TextClassification
from finetune.tasks.preparation import load_held_out

LONGEST = 512
"""Tokens after which a text is cut for a model that does not say how many it was made for."""
ON_BASE = ("frozen_logreg",)
"""Baselines that need the base as it was before training."""


def score_model(
    reference: str,
    data: str,
    *,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Score a text classifier on a held-out set with the metrics, intervals and baselines that a run gets by default.

    Baselines are fitted on the set's own train rows; a set without such rows is scored without baselines.

    Args:
        reference: `org/name` on the Hub, or a folder: of this toolkit, or a sequence classifier of transformers.
        data: a card, a path or `hub:org/name@revision`; its test rows are scored, all of them where it has no splits.
        columns: role (`text`, `label`) -> the data's name of its column, where it is another.
        task: whose rows the data are, of a model with several tasks.
        labels: its classes in the order of the logits, where it calls them otherwise than the data.

    Returns:
        The scores, in the layout of evaluation/test.json, with `model`, `data` and `findings`.

    Raises:
        UsageError: no such model or task, or one that gives no labels.
        ModelError: the model cannot be had, or is no classifier.
        DataError: rows that cannot be read, or whose classes are not the model's.
    """
    folder = _find_folder(reference)
    saved = open_saved(folder) if (folder / SETTINGS).exists() else None
    predictor = _load_ours(saved, task) if saved else _load_plain(folder, reference)
    shape = predictor.task
    assert isinstance(shape, TextClassification)  # whatever else there is was refused
    roles = dict(columns or {})
    if labels is not None:
        if len(labels) != len(shape.labels):
            raise UsageError(f"--labels: must name the {len(shape.labels)} classes of {reference}, got {len(labels)}.")
        shape = replace(shape, labels=list(labels))
    shape = _match_classes(reference, data, roles, shape)
    source, test, findings = load_held_out(shape, data, roles)
    rows = _split(shape, source.rows) | {"test": test}
    base = resolve_base(saved.base) if saved and saved.base else None  # as it was before training, where that is known
    section = _build_section(rows, has_base=base is not None)
    judgement = shape.judge(
        HeldOut(
            model=predictor.model,
            tokenizer=predictor.tokenizer,
            rows=rows,
            examples={
                name: shape.build_examples(part, predictor.tokenizer, predictor.max_length)
                for name, part in rows.items()
            },
            base=base or BaseModel(reference, folder, "the model itself"),
            section=section,
            max_length=predictor.max_length,
            seed=TrainSection().seed,
            opened=None,
            settings={"temperature": predictor.temperature, **predictor.fitted},
        )
    )
    found = {"model": reference, "split": source.name, "data": source.origin, "findings": findings_to_json(findings)}
    return judgement.scored["test"] | found


def _find_folder(reference: str) -> Path:
    if is_hub_reference(reference):
        return fetch_folder(reference)
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
    if not isinstance(shape, TextClassification):
        raise UsageError(
            f"--model: must be a model that labels texts, got {shape.type}. Score its run: finetune evaluate RUN "
            "--data FILE"
        )
    return list_predictors(load(saved.folder), [task or ""])[task or ""]


def _load_plain(folder: Path, reference: str) -> Predictor:
    """A classifier of transformers, uncalibrated, with what it needs to be asked like one of ours."""
    base = BaseModel(reference, folder, "saved model")
    config = load_config(base)
    architecture = next(iter(config.architectures or []), "no architecture")
    if not architecture.endswith("ForSequenceClassification"):
        raise ModelError(
            f"{reference}: must be a model of this toolkit or a sequence classifier, got {architecture}. "
            "Train it on a task first: set model.base to it."
        )
    own = [config.id2label[i] for i in range(config.num_labels)]
    if len(own) < 2:
        raise ModelError(f"{reference}: must have at least 2 classes, got one number a text.")
    tokenizer = load_tokenizer(base)
    return Predictor(
        model=load_saved_classifier(folder, None).eval().requires_grad_(False).to(choose_device()),
        tokenizer=tokenizer,
        task=TextClassification(own, {}),
        temperature=1.0,
        max_length=min(
            tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or LONGEST, LONGEST
        ),
    )


def _match_classes(reference: str, data: str, columns: dict[str, str], shape: TextClassification) -> TextClassification:
    """The task, told which values of the data mean its classes: by the data's card, in any case of letters."""
    known = load_card(data).labels if data in card_names() else None
    names = known if isinstance(known, dict) else shape.values
    found = {row.values["label"] for row in load_rows(data, columns, roles=shape.roles).rows} - {""}
    classes = [*shape.labels, *([shape.out_of_scope] if shape.out_of_scope else [])]
    folded = {label.casefold(): label for label in classes}
    values = {value: folded.get(names.get(value, value).casefold(), "") for value in sorted(found)}
    if unknown := [names.get(value, value) for value, label in values.items() if not label]:
        raise DataError(
            f"{data}: its classes must be those of {reference}, {', '.join(classes)}, got also {', '.join(unknown)}. "
            "Name the data's classes in the order of the model's logits: --labels A,B,..."
        )
    return replace(shape, values=values)


def _split(task: Task, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Train and validation rows of a set that has a test split; a missing validation split is cut from train."""
    given = [row for row in rows if row.split is not None]
    if {"train", "test"} - {row.split for row in given}:
        return {"train": [], "validation": []}
    splits = split_rows(task.prepare_rows(given), SplitSection(by="given"), seed=TrainSection().seed)
    return {name: list(splits[name]) for name in ("train", "validation")}


def _build_section(rows: dict[str, list[Row]], *, has_base: bool) -> EvaluateSection:
    """`evaluate` as a recipe without that section has it, less the baselines that cannot be fitted."""
    section = EvaluateSection()
    can_fit = bool(rows["train"])
    kept = [name for name in section.baselines if can_fit and (has_base or name not in ON_BASE)]
    return section.model_copy(update={"baselines": kept})
