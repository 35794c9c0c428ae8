"""Which systems a recipe may ask for, and how each is built on a finished run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.recipe.schema import Recipe


@dataclass(frozen=True)
class Application:
    """A system that stands on a run.

    Args:
        name: the recipe's section that asks for it.
        steps: what its building does, in words.
        build: writes it into the run's folder, and gives its figures on the test rows.
        list_notes: what to know before, in words.
    """

    name: str
    steps: str
    build: Callable[[Path], dict[str, Any]]
    list_notes: Callable[[Recipe], list[str]] = lambda _: []


def list_applications(recipe: Recipe) -> list[Application]:
    """Those that a recipe asks for."""
    return [application for application in APPLICATIONS if getattr(recipe, application.name) is not None]


def _build_assistant(run: Path) -> dict[str, Any]:
    from finetune.applications.support.build import build_assistant

    return {name: value for name, value in build_assistant(run).items() if name not in ("replies", "curve")}


def _build_monitor(run: Path) -> dict[str, Any]:
    from finetune.applications.monitor.build import build_monitor

    return build_monitor(run)


def _list_monitor_notes(recipe: Recipe) -> list[str]:
    return recipe.monitor.list_notes() if recipe.monitor else []


APPLICATIONS = (
    Application("assistant", "index, thresholds on validation, the test questions end to end", _build_assistant),
    Application(
        "monitor",
        "shares on validation, thresholds by simulation, the shares of the test rows",
        _build_monitor,
        _list_monitor_notes,
    ),
)
