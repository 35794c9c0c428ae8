"""Judge a trained model: calibrate on validation, open the test split, compare with baselines, write it all down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from finetune.artifact.card import build_model_card
from finetune.artifact.load import load
from finetune.artifact.run_folder import RunFolder, load_json, now, save_json
from finetune.artifact.save import SETTINGS
from finetune.data.batches import Examples
from finetune.data.checks import findings_to_json
from finetune.data.rows import Row
from finetune.evaluation.baselines import BaselineData, BaselineResult, compute_baselines
from finetune.evaluation.calibration import fit_temperature
from finetune.evaluation.report import ReportData, write_report
from finetune.evaluation.scoring import ScoredSplit, score_split
from finetune.models.base import BaseModel
from finetune.models.embedding import compute_embeddings
from finetune.recipe.files import write_file_atomically
from finetune.recipe.schema import Recipe
from finetune.tasks.preparation import Prepared, load_held_out
from finetune.training.events import load_events

MISTAKES = 50


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
    predictor = load(folder.model)
    splits = prepared.splits
    logits = {name: predictor.compute_logits(splits[name]).astype(np.float64) for name in ("validation", "test")}
    references = {name: prepared.examples[name].labels for name in splits}
    temperature = 1.0
    if recipe.evaluate.calibrate == "temperature":
        temperature = fit_temperature(logits["validation"], references["validation"])
    save_json(folder.model / SETTINGS, load_json(folder.model / SETTINGS) | {"temperature": temperature})
    baselines = _compute_baselines(recipe, prepared, base, prepared.examples["test"], splits["test"])
    opened = (
        load_json(folder.evaluation / "test.json")["opened"] + 1 if (folder.evaluation / "test.json").exists() else 1
    )
    scored = {
        name: score_split(
            ScoredSplit(
                name=name,
                labels=prepared.task.labels,
                references=references[name],
                logits=logits[name],
                texts=[row.values["text"] for row in splits[name]],
                values=[row.values for row in splits[name]],
                temperature=temperature,
                baselines=baselines,
                opened=opened if name == "test" else None,
            ),
            recipe.evaluate,
            recipe.train.seed,
        )
        for name in ("validation", "test")
    }
    for name, content in scored.items():
        save_json(folder.evaluation / f"{name}.json", content)
    scores = prepared.task.compute_scores(logits["test"], temperature)
    _save_predictions(
        folder.evaluation / "predictions.parquet", splits["test"], references["test"], scores, prepared.task.labels
    )
    _write_pages(
        folder,
        recipe,
        prepared,
        scored,
        _list_mistakes(splits["test"], references["test"], scores, prepared.task.labels),
    )
    return scored["test"]


def assess_held_out(
    folder: RunFolder, recipe: Recipe, prepared: Prepared, base: BaseModel, data: str
) -> dict[str, Any]:
    """Score a finished run on another held-out set with the same columns; its own test split stays closed.

    Returns:
        The content of evaluation/<name of the set>.json (other-<name> if the set is called like a split): as
        test.json, with the rows shared with train in `findings`.
    """
    source, rows, findings = load_held_out(prepared.task, data, recipe.task.columns, prepared.splits["train"])
    predictor = load(folder.model)
    examples = prepared.task.build_examples(rows, prepared.tokenizer, recipe.model.max_length)
    scored = score_split(
        ScoredSplit(
            name="test",
            labels=prepared.task.labels,
            references=examples.labels,
            logits=predictor.compute_logits(rows).astype(np.float64),
            texts=[row.values["text"] for row in rows],
            values=[row.values for row in rows],
            temperature=predictor.temperature,
            baselines=_compute_baselines(recipe, prepared, base, examples, rows),
        ),
        recipe.evaluate.model_copy(
            update={"slices": [name for name in recipe.evaluate.slices if _has_column(rows, name)]}
        ),
        recipe.train.seed,
    )
    # A file called test.csv must not take the place of the run's own scores.
    name = f"other-{source.name}" if source.name in prepared.splits else source.name
    scored = scored | {"split": name, "data": source.origin, "findings": findings_to_json(findings)}
    save_json(folder.evaluation / f"{name}.json", scored)
    return scored


def _has_column(rows: Sequence[Row], name: str) -> bool:
    return name == "length" or (bool(rows) and name in rows[0].values)


def _compute_baselines(
    recipe: Recipe, prepared: Prepared, base: BaseModel, test: Examples, test_rows: Sequence[Row]
) -> dict[str, BaselineResult]:
    """Fit the recipe's baselines on train, tune them on validation, and score both held-out splits."""
    examples = {"train": prepared.examples["train"], "validation": prepared.examples["validation"], "test": test}
    rows = {"train": prepared.splits["train"], "validation": prepared.splits["validation"], "test": test_rows}
    embedded: dict[str, npt.NDArray[np.float32]] = {}

    def embed(name: str) -> Callable[[], npt.NDArray[np.float32]]:
        def features() -> npt.NDArray[np.float32]:
            if not embedded:  # the base is loaded once, for all splits
                parts = compute_embeddings(base, list(examples.values()), prepared.tokenizer.pad_token_id)
                embedded.update(zip(examples, parts, strict=True))
            return embedded[name]

        return features

    data = {
        name: BaselineData(
            texts=[row.values["text"] for row in rows[name]],
            labels=None if name == "test" else examples[name].labels,
            features=embed(name),
        )
        for name in examples
    }
    return compute_baselines(
        recipe.evaluate.baselines,
        data["train"],
        data["validation"],
        data["test"],
        n_labels=len(prepared.task.labels),
        seed=recipe.train.seed,
    )


def _save_predictions(
    path: Path,
    rows: Sequence[Row],
    references: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    labels: Sequence[str],
) -> None:
    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "text": [row.values["text"] for row in rows],
        "reference": [labels[i] for i in references],
        "prediction": [labels[i] for i in scores.argmax(axis=1)],
    }
    columns |= {f"score_{label}": scores[:, i] for i, label in enumerate(labels)}
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    write_file_atomically(path, sink.getvalue().to_pybytes())


def _list_mistakes(
    rows: Sequence[Row], references: npt.NDArray[np.int64], scores: npt.NDArray[np.float64], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Wrong predictions, most confident first."""
    predictions, confidences = scores.argmax(axis=1), scores.max(axis=1)
    wrong = np.flatnonzero(predictions != references)
    return [
        {
            "id": rows[i].id,
            "text": rows[i].values["text"],
            "reference": labels[references[i]],
            "prediction": labels[predictions[i]],
            "confidence": float(confidences[i]),
        }
        for i in wrong[np.argsort(-confidences[wrong], kind="stable")][:MISTAKES]
    ]


def _write_pages(
    folder: RunFolder,
    recipe: Recipe,
    prepared: Prepared,
    scored: Mapping[str, dict[str, Any]],
    mistakes: list[dict[str, Any]],
) -> None:
    status, lock = folder.load_status(), load_json(folder.lock)
    card = prepared.source.card
    report = ReportData(
        name=recipe.name,
        created=now(),
        test=scored["test"],
        validation=scored["validation"],
        events=load_events(folder.events),
        findings=findings_to_json(prepared.findings),
        mistakes=mistakes,
        facts=_build_facts(recipe, prepared, status["training"], lock),
        recipe_yaml=folder.recipe.read_text(encoding="utf-8"),
    )
    write_report(folder.evaluation / "report.html", report)
    write_file_atomically(folder.card, build_model_card(recipe, card, scored["test"], status, lock).encode())


def _build_facts(
    recipe: Recipe, prepared: Prepared, training: Mapping[str, Any], lock: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """What the report says about the run: section -> label -> value."""
    card, adapter, count = prepared.source.card, recipe.adapter, training["parameters"]
    lora = f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}, {adapter.targets}"
    return {
        "Model": {
            "Base": f"{recipe.model.base} ({lock['base']['origin']})",
            "Tuning": lora if adapter.method == "lora" else "full",
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
