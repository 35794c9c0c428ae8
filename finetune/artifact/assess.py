"""Judge a trained model: calibrate on validation, open the test split, compare with baselines, write it all down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from finetune.adapters.methods import describe
from finetune.artifact.card import build_model_card
from finetune.artifact.load import list_predictors, load
from finetune.artifact.predictions import GROUP
from finetune.artifact.predictor import Predictor
from finetune.artifact.run_folder import RunFolder, load_json, now, save_json
from finetune.artifact.save import add_settings
from finetune.data.checks import findings_to_json
from finetune.data.rows import Row, number_groups
from finetune.evaluation.report import ReportData, write_report
from finetune.evaluation.scoring import choose_section
from finetune.evaluation.slices import DERIVED
from finetune.models.base import BaseModel
from finetune.recipe.files import write_file_atomically
from finetune.recipe.schema import EvaluateSection, Recipe
from finetune.tasks import TASKS, HeldOut, Judgement
from finetune.tasks.preparation import Part, Prepared, load_held_out
from finetune.tasks.task import Track, keep_silent
from finetune.training.events import load_events

CONTRASTIVE = "a contrastive loss on the base, then a head by logistic regression"


def assess(
    folder: RunFolder, recipe: Recipe, prepared: Prepared, base: BaseModel, track: Track = keep_silent
) -> dict[str, dict[str, Any]]:
    """Calibrate, score validation and test, and write everything that people read.

    The model is loaded from the run's `model/`: what is judged is what will be used.

    Args:
        folder: a trained run.
        recipe: resolved.
        prepared: the run's rows.
        base: for the baseline on frozen embeddings.
        track: says how far it is.

    Returns:
        Task name -> the content of its test.json.
    """
    predictors = list_predictors(load(folder.model), list(prepared.parts))
    scored, temperatures, settings = {}, {}, {}
    files: dict[str, bytes] = {}
    for name, place in folder.evaluations().items():
        path = place / "test.json"
        opened = load_json(path)["opened"] + 1 if path.exists() else 1
        section = list_known_slices(choose_evaluation(recipe, name), prepared, name)
        part, seed = prepared.parts[name], recipe.train.seed
        judgement = _judge(predictors[name], part, section, base, seed, opened=opened, track=track)
        scored[name] = judgement.scored
        temperatures[name] = judgement.settings.get("temperature", 1.0)
        settings[name] = dict(judgement.settings)
        files |= judgement.files
        place.mkdir(exist_ok=True)
        for split, content in judgement.scored.items():
            save_json(place / f"{split}.json", content)
        groups = number_groups(part.splits["test"], part.group_column)
        _save_predictions(place / "predictions.parquet", judgement.predictions, groups)
        _write_report(folder, recipe, prepared, name, judgement)
    fitted = {"temperature": next(iter(temperatures.values())), "temperatures": temperatures, "fitted": settings}
    add_settings(folder.model, fitted, files)
    tests = {name: splits["test"] for name, splits in scored.items()}
    cards = {name: part.source.card for name, part in prepared.parts.items()}
    card = build_model_card(recipe, cards, tests, folder.load_status(), load_json(folder.lock))
    write_file_atomically(folder.card, card.encode())
    return tests


def assess_held_out(  # noqa: PLR0913  (whom, on what)
    folder: RunFolder,
    recipe: Recipe,
    prepared: Prepared,
    base: BaseModel,
    name: str,
    data: str,
    columns: Mapping[str, str],
) -> dict[str, Any]:
    """Score a finished run on another held-out set with the same columns; its own test split stays closed.

    Args:
        folder, recipe, prepared, base: as for `assess`.
        name: the task whose rows these are.
        data: the set.
        columns: role -> its column, where it is not that of the recipe.

    Returns:
        The content of evaluation/<name of the set>.json (other-<name> if the set is called like a split): as
        test.json, with the rows shared with train in `findings`.
    """
    part = prepared.parts[name]
    other = load_held_out(part, data, columns, prepared.tokenizer, recipe.model.max_length, recipe.train.seed)
    source = other.source
    section = choose_evaluation(recipe, name)
    slices = [column for column in section.slices if _has_column(other.splits["test"], column)]
    section = section.model_copy(update={"slices": slices})
    predictor = list_predictors(load(folder.model), [name])[name]
    settings = {"temperature": predictor.temperature, **predictor.fitted}
    judgement = _judge(predictor, other, section, base, recipe.train.seed, opened=None, settings=settings)
    # A file called test.csv must not take the place of the run's own scores.
    split = f"other-{source.name}" if source.name in part.splits else source.name
    found = {"split": split, "data": source.origin, "findings": findings_to_json(other.findings)}
    scored = judgement.scored["test"] | found
    save_json(folder.evaluations()[name] / f"{split}.json", scored)
    return scored


def choose_evaluation(recipe: Recipe, name: str) -> EvaluateSection:
    """`evaluate` as it holds for one of the tasks."""
    kinds = {task: TASKS[section.type].scored_by for task, section in recipe.tasks.items()}
    return choose_section(recipe.evaluate_for(name), kinds[name], kinds.values())


def list_known_slices(section: EvaluateSection, prepared: Prepared, name: str) -> EvaluateSection:
    """Of several tasks each is sliced by the columns that its data have; what none has stays, and is refused."""
    rows = {task: part.splits["test"] for task, part in prepared.parts.items()}
    slices = [
        column
        for column in section.slices
        if _has_column(rows[name], column) or not any(_has_column(others, column) for others in rows.values())
    ]
    return section.model_copy(update={"slices": slices})


def _has_column(rows: Sequence[Row], name: str) -> bool:
    return name in DERIVED or (bool(rows) and name in rows[0].values)


def _judge(  # noqa: PLR0913  (whom, on what, how)
    predictor: Predictor,
    part: Part,
    section: EvaluateSection,
    base: BaseModel,
    seed: int,
    *,
    opened: int | None,
    settings: Mapping[str, Any] | None = None,
    track: Track = keep_silent,
) -> Judgement:
    return part.task.judge(
        HeldOut(
            model=predictor.model,
            tokenizer=predictor.tokenizer,
            rows=part.splits,
            examples=part.examples,
            base=base,
            section=section,
            max_length=predictor.max_length,
            seed=seed,
            opened=opened,
            settings=settings,
            track=track,
            group_column=part.group_column,
        )
    )


def _save_predictions(path: Path, columns: Mapping[str, Any], groups: npt.NDArray[np.int64] | None) -> None:
    by_row = groups is not None and "id" in columns  # blocks of a text are no rows
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(dict(columns) | ({GROUP: groups} if by_row else {})), sink)
    write_file_atomically(path, sink.getvalue().to_pybytes())


def _write_report(folder: RunFolder, recipe: Recipe, prepared: Prepared, name: str, judgement: Judgement) -> None:
    status, lock = folder.load_status(), load_json(folder.lock)
    part, scored = prepared.parts[name], judgement.scored
    several = len(prepared.parts) > 1
    report = ReportData(
        name=f"{recipe.name}: {name}" if several else recipe.name,
        created=now(),
        test=scored["test"],
        validation=scored["validation"],
        events=[_select_metrics(event, name) if several else event for event in load_events(folder.events)],
        findings=findings_to_json(part.findings),
        mistakes=judgement.mistakes,
        samples=judgement.samples,
        samples_title=judgement.samples_title,
        facts=_build_facts(recipe, prepared, name, status["training"], lock),
        recipe_yaml=folder.recipe.read_text(encoding="utf-8"),
    )
    write_report(folder.evaluations()[name] / "report.html", report)


def _select_metrics(event: dict[str, Any], name: str) -> dict[str, Any]:
    """An event with one task's metrics alone, without the task's name."""
    metrics = {
        key.removeprefix(f"{name}."): value for key, value in event.get("metrics", {}).items() if f"{name}." in key
    }
    return event | ({"metrics": metrics} if metrics else {})


def _build_facts(
    recipe: Recipe, prepared: Prepared, name: str, training: Mapping[str, Any], lock: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """What the report of a task says about the run: section -> label -> value."""
    part, count = prepared.parts[name], training["parameters"]
    card = part.source.card
    split = part.section.split
    others = ", ".join(other for other in prepared.parts if other != name)
    return {
        "Model": {
            "Base": f"{recipe.model.base} ({lock['base']['origin']})",
            "Tuning": describe(recipe.adapter),
            "Trained": f"{count['trained']:,} of {count['total']:,} parameters",
        }
        | ({"Shared with": others} if others else {}),
        "Data": {
            "Set": card.title if card else part.source.origin,
            "Licence": card.licence if card else "the user's own data",
            "Rows": ", ".join(f"{name} {len(rows):,}" for name, rows in part.splits.items()),
            "Split": f"by {split.by}" + (f", at most {split.shots} rows of a class" if split.shots else ""),
        },
        "Training": ({"Few-shot": CONTRASTIVE} if recipe.train.few_shot == "contrastive" else {})
        | {
            "Steps": f"{training['steps']:,} of {recipe.train.tokens_per_batch:,} tokens",
            "Best step": str(training["best_step"]),
            "Epochs": f"{recipe.train.epochs}" + (", stopped early" if training["stopped_early"] else ""),
            "Time": f"{training['seconds']:,.0f} s",
            "Device": f"{training['device']}, {training['processes']} process(es), {lock['precision']}",
            "Seed": str(recipe.train.seed),
        },
        "Versions": {name: str(version) for name, version in lock["versions"].items()},
    }
