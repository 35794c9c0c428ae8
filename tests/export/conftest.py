"""Finished runs of every task type that answers in one pass, and their exports, each made once."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import finetune
from finetune.artifact.export import speed
from finetune.artifact.export.export_run import Exported, export_run

SEARCH = {"data": "questions.jsonl", "knowledge": "faq.jsonl", "negatives": 2, "split": {"leaks": "warn"}}
SEARCH_EVALUATE = {"evaluate": {"baselines": ["bm25"], "slices": [], "gates": {}}}


def write_passages(path: Path) -> None:
    """Passages that say something about three nouns, and questions about them; of one in four there is no answer."""
    generator = np.random.default_rng(7)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["place", "question", "passage", "answer"])
        for place in range(16):
            nouns = generator.permutation(["loss", "meeting", "schedule", "gains"]).tolist()
            values = generator.permutation(["low", "high", "new", "old"]).tolist()
            said = dict(zip(nouns[:3], values, strict=False))
            passage = " ".join(f"The {noun} is {value} of {place}." for noun, value in said.items())
            writer.writerows((place, f"The {noun}?", passage, said.get(noun, "")) for noun in nouns)


@pytest.fixture(scope="session")
def find_run(
    tmp_path_factory: pytest.TempPathFactory,
    finished_run: Path,
    tiny_base: Path,
    write_recipe: Callable[..., Path],
    write_questions: Callable[[Path], None],
    write_support_recipe: Callable[..., Path],
) -> Callable[[str], Path]:
    """A function: task type -> the folder of a finished run, made when it is first asked for."""
    copied = tmp_path_factory.mktemp("text_classification") / finished_run.name  # it gets exports
    made = {"text_classification": Path(shutil.copytree(finished_run, copied))}

    def write(kind: str, folder: Path) -> Path:
        folder.mkdir()
        if kind == "multi_task":
            return write_support_recipe(folder)
        if kind == "question_answering":
            write_passages(folder / "questions.csv")
            task = {
                "type": kind,
                "data": "questions.csv",
                "columns": {"text": "question", "passage": "passage", "answer": "answer"},
                "split": {"by": "group", "column": "place", "validation": 0.2, "test": 0.2},
            }
            return _write_plain(folder, tiny_base, task, {})
        write_questions(folder)
        return _write_plain(folder, tiny_base, {"type": kind} | SEARCH, SEARCH_EVALUATE)

    def find(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = finetune.run(write(kind, folder / "in"), runs=folder / "runs", quiet=True).folder.path
        return made[kind]

    return find


def _write_plain(folder: Path, base: Path, task: dict[str, Any], changes: dict[str, Any]) -> Path:
    from ruamel.yaml import YAML

    recipe = {
        "recipe": 1,
        "name": "one",
        "model": {"base": str(base), "max_length": 40},
        "adapter": {"method": "lora", "rank": 4},
        "tasks": {"one": task},
        "train": {"epochs": 2, "tokens_per_batch": 300, "learning_rate": 0.01, "precision": "float32"},
    } | changes
    path = folder / "recipe.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(recipe, file)
    return path


@pytest.fixture(scope="session")
def brief_speed() -> Any:
    """Timings of a few rows: what they say is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "ROWS", 4)
        patch.setattr(speed, "SINGLE_ROWS", 2)
        yield


@pytest.fixture(scope="session")
def export(find_run: Callable[[str], Path], brief_speed: Any) -> Callable[[str, str], Exported]:
    """A function: task type, format -> the export of that run, made when it is first asked for."""
    made: dict[tuple[str, str], Exported] = {}

    def find(kind: str, name: str) -> Exported:
        if (kind, name) not in made:
            made[kind, name] = export_run(find_run(kind), name)
        return made[kind, name]

    return find


@pytest.fixture
def own_export(export: Callable[[str, str], Exported], find_run: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A function: format -> a copy of the classifier's run with that export, to be changed."""

    def copy(name: str) -> Path:
        export("text_classification", name)
        return Path(shutil.copytree(find_run("text_classification"), tmp_path / "copied"))

    return copy
