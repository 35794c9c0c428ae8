"""Judge a trained model: calibrate on validation, open the test split, compare with baselines, write it all down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from finetune.adapters.methods import describe
from finetune.artifact.card import build_model_card
from finetune.artifact.load import load
from finetune.artifact.run_folder import RunFolder, load_json, now, save_json
from finetune.artifact.save import SETTINGS
from finetune.data.checks import findings_to_json
from finetune.data.rows import Row
from finetune.evaluation.report import ReportData, write_report
from finetune.models.base import BaseModel
from finetune.recipe.files import write_file_atomically
from finetune.recipe.schema import Recipe
from finetune.tasks import HeldOut, Judgement
from finetune.tasks.preparation import Prepared, load_held_out
from finetune.training.events import load_events


def assess(folder: RunFolder, recipe: Recipe, prepared: Prepared, base: BaseModel) -> dict[str, Any]:
    """Calibrate, score validation and test, and write everything that people read.

    The model is loaded from the run's `model/`: what is judged is what will be used.

    Args:
        folder: a trained run.
        recipe: resolved.
        prepared: the run's rows.
        base: for the baseline on frozen embeddings.

    Returns:
        The content of evaluation/test.json.
    """
    opened = (
        load_json(folder.evaluation / "test.json")["opened"] + 1 if (folder.evaluation / "test.json").exists() else 1
    )
    judgement = _judge(folder, recipe, prepared, base, opened=opened)
    save_json(folder.model / SETTINGS, load_json(folder.model / SETTINGS) | dict(judgement.settings))
    for name, content in judgement.scored.items():
        save_json(folder.evaluation / f"{name}.json", content)
    _save_predictions(folder.evaluation / "predictions.parquet", judgement.predictions)
    _write_pages(folder, recipe, prepared, judgement)
    return judgement.scored["test"]


def assess_held_out(
    folder: RunFolder, recipe: Recipe, prepared: Prepared, base: BaseModel, data: str
) -> dict[str, Any]:
    """Score a finished run on another held-out set with the same columns; its own test split stays closed.

    Returns:
        The content of evaluation/<name of the set>.json (other-<name> if the set is called like a split): as
        test.json, with the rows shared with train in `findings`.
    """
    source, rows, findings = load_held_out(prepared.task, data, recipe.task.columns, prepared.splits["train"])
    task = prepared.task
    examples = task.build_examples(rows, prepared.tokenizer, recipe.model.max_length)
    other = replace(
        prepared,
        splits=prepared.splits | {"test": rows},
        examples=prepared.examples | {"test": examples},
    )
    slices = [name for name in recipe.evaluate.slices if _has_column(rows, name)]
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"slices": slices})})
    settings = load_json(folder.model / SETTINGS)
    scored = _judge(folder, recipe, other, base, opened=None, settings=settings).scored["test"]
    # A file called test.csv must not take the place of the run's own scores.
    name = f"other-{source.name}" if source.name in prepared.splits else source.name
    scored = scored | {"split": name, "data": source.origin, "findings": findings_to_json(findings)}
    save_json(folder.evaluation / f"{name}.json", scored)
    return scored


def _has_column(rows: Sequence[Row], name: str) -> bool:
    return name == "length" or (bool(rows) and name in rows[0].values)


def _judge(
    folder: RunFolder,
    recipe: Recipe,
    prepared: Prepared,
    base: BaseModel,
    *,
    opened: int | None,
    settings: Mapping[str, Any] | None = None,
) -> Judgement:
    predictor = load(folder.model)
    return prepared.task.judge(
        HeldOut(
            model=predictor.model,
            tokenizer=predictor.tokenizer,
            rows=prepared.splits,
            examples=prepared.examples,
            base=base,
            section=recipe.evaluate,
            max_length=predictor.max_length,
            seed=recipe.train.seed,
            opened=opened,
            settings=settings,
        )
    )


def _save_predictions(path: Path, columns: Mapping[str, Any]) -> None:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(dict(columns)), sink)
    write_file_atomically(path, sink.getvalue().to_pybytes())


def _write_pages(
    folder: RunFolder,
    recipe: Recipe,
    prepared: Prepared,
    judgement: Judgement,
) -> None:
    status, lock = folder.load_status(), load_json(folder.lock)
    card, scored = prepared.source.card, judgement.scored
    report = ReportData(
        name=recipe.name,
        created=now(),
        test=scored["test"],
        validation=scored["validation"],
        events=load_events(folder.events),
        findings=findings_to_json(prepared.findings),
        mistakes=judgement.mistakes,
        samples=judgement.samples,
        samples_title=judgement.samples_title,
        facts=_build_facts(recipe, prepared, status["training"], lock),
        recipe_yaml=folder.recipe.read_text(encoding="utf-8"),
    )
    write_report(folder.evaluation / "report.html", report)
    write_file_atomically(folder.card, build_model_card(recipe, card, scored["test"], status, lock).encode())


def _build_facts(
    recipe: Recipe, prepared: Prepared, training: Mapping[str, Any], lock: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """What the report says about the run: section -> label -> value."""
    card, count = prepared.source.card, training["parameters"]
    return {
        "Model": {
            "Base": f"{recipe.model.base} ({lock['base']['origin']})",
            "Tuning": describe(recipe.adapter),
            "Trained": f"{count['trained']:,} of {count['total']:,} parameters",
        },
        "Data": {
            "Set": card.title if card else prepared.source.origin,
            "Licence": card.licence if card else "the user's own data",
            "Rows": ", ".join(f"{name} {len(rows):,}" for name, rows in prepared.splits.items()),
            "Split": f"by {recipe.task.split.by}",
        },
        "Training": {
            "Steps": f"{training['steps']:,} of {recipe.train.tokens_per_batch:,} tokens",
            "Best step": str(training["best_step"]),
            "Epochs": f"{recipe.train.epochs}" + (", stopped early" if training["stopped_early"] else ""),
            "Time": f"{training['seconds']:,.0f} s",
            "Device": f"{training['device']}, {training['processes']} process(es), {lock['precision']}",
            "Seed": str(recipe.train.seed),
        },
        "Versions": {name: str(version) for name, version in lock["versions"].items()},
    }
