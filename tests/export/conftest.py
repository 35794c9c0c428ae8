"""Exports of runs of every task type that answers in one pass, each made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.artifact.export import speed
from finetune.artifact.export.export_run import Exported, export_run


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
