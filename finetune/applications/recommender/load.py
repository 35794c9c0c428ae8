"""From a run to a recommender."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from finetune.applications.recommender.histories import People
from finetune.applications.recommender.nearest import import_faiss
from finetune.applications.recommender.recommender import Recommender
from finetune.artifact.load import choose_device
from finetune.artifact.run_folder import SETTINGS, RunFolder, find_run
from finetune.artifact.saved import open_saved
from finetune.data.catalog import card_names, load_card
from finetune.data.interactions import ROLES, Catalogue, load_catalogue, settle_items
from finetune.errors import DataError, ResourceError, UsageError
from finetune.models.base import load_tokenizer, resolve_base
from finetune.recipe import load_recipe
from finetune.recipe.schema import TaskSection
from finetune.tasks.items import Counts
from finetune.tasks.judge_lists import COUNTS_FILE, RANKER_FILE
from finetune.tasks.ranker import import_lightgbm
from finetune.tasks.recommendation import Recommendation, embed_items

INDEXES = ("exact", "faiss")


def load_recommender(run: str | Path, *, items: Path | None = None, index: str = "exact") -> Recommender:
    """The recommender of a finished run.

    Args:
        run: the run's folder, runs/<name> for its latest finished run, a `model/` folder, or one from the Hub.
        items: a catalogue with new items, with the columns of the run's own; they are embedded now, and scored from
            their texts. Items that the run has stay as they are.
        index: `exact` scores every item; `faiss` looks into a part of them, for large catalogues and runs without a
            second stage.

    Raises:
        UsageError: no such run, or one that trained no recommender; new items for a run without texts, or for a folder
            without its recipe; an index that is none, or that a second stage does not go with.
        DataError: a catalogue that cannot be read.
        ResourceError: a file is missing or damaged, or LightGBM or faiss is not installed.
    """
    if index not in INDEXES:
        raise UsageError(f"--index: must be one of {', '.join(INDEXES)}, got {index!r}.")
    saved = open_saved(run)
    task = saved.task
    if not isinstance(task, Recommendation):
        raise UsageError(f"{run}: must be a run of type recommendation, got {task.type}.")
    if index == "faiss":
        if task.rank is not None:
            raise UsageError(
                f"--index {index}: must be for a run without a second stage, whose features need the score of every "
                f"item, got {run} with `rank`. Leave --index out, or train one with --set tasks.<name>.rank=null."
            )
        import_faiss()
    path = saved.folder / COUNTS_FILE
    if not path.is_file():
        raise ResourceError(f"{path}: must be there, got no file: the run was not judged. Try: finetune resume {run}")
    counts = Counts.from_arrays(load_file(path))
    model: Any = task.load_model(saved.folder).eval().requires_grad_(False).to(choose_device())
    if items is not None:
        task, counts = _extend(task, model, counts, items, _find_own_run(run))
    trees = _load_trees(saved.folder, task)
    return Recommender(task, model, saved.settings["max_length"], counts, trees, is_exact=index == "exact")


def load_people(run: str | Path, events: str | None = None) -> People:
    """The people of a run's own events, or of others with the same columns.

    Args:
        run: as `load_recommender` takes it.
        events: a file, or a card; None for the run's own.

    Raises:
        UsageError: the run's own events are asked for, and not at hand.
        DataError: events that cannot be read.
    """
    folder = _find_own_run(run)
    section = None if folder is None else _load_section(folder)
    if events is not None:
        return People.load(events, {} if section is None else _list_columns(section))
    if folder is None or section is None:
        raise UsageError(f"--user: must come with the events of a run, got {run}, a model alone. Add --events FILE.")
    try:
        return People.load(section.data, section.columns, folder.recipe_folder)
    except DataError as error:
        raise UsageError(f"--user: must have the run's events at hand, got: {error} Or add --events FILE.") from error


def _load_trees(folder: Path, task: Recommendation) -> Any:
    """The second stage as it was fitted; None where the recipe has none."""
    if task.rank is None:
        return None
    path = folder / RANKER_FILE
    if not path.is_file():
        raise ResourceError(f"{path}: must be there, as the recipe has `rank`, got no file. Train it again.")
    return import_lightgbm().Booster(model_str=path.read_text(encoding="utf-8"))


def _extend(
    task: Recommendation, model: Any, counts: Counts, path: Path, folder: RunFolder | None
) -> tuple[Recommendation, Counts]:
    """With the items of a file that the run does not have; the model is changed."""
    if not task.reads_texts:
        raise UsageError(f"--items {path}: must be for a run that reads texts, got recommend.vectors: ids. Train anew.")
    if folder is None:
        raise UsageError(
            f"--items {path}: must be for a run, whose recipe names the texts' encoder, got a model alone."
        )
    section = _load_section(folder)
    given = load_catalogue(path, settle_items(section.data, section.items))
    new = [row for row, item in enumerate(given.ids) if item not in task.catalogue.numbers]
    if not new:
        return task, counts
    texts = tuple(given.texts[row] for row in new)
    base = resolve_base(load_recipe(folder.recipe).model.base)
    vectors = embed_items(base, load_tokenizer(base), texts)
    model.extend(torch.from_numpy(vectors))
    own = task.catalogue
    catalogue = Catalogue(
        own.ids + tuple(given.ids[row] for row in new),
        own.texts + texts,
        {name: values + tuple(given.columns[name][row] for row in new) for name, values in own.columns.items()},
    )
    return replace(task, catalogue=catalogue, counts=task.counts + (0,) * len(new)), counts.extend(len(new))


def _find_own_run(run: str | Path) -> RunFolder | None:
    """The run that a reference means; None for a model without one."""
    path = Path(run)
    if (path / SETTINGS).exists():
        path = path.parent
        return RunFolder(path) if (path / "status.json").exists() else None
    return find_run(run) if path.exists() else None


def _load_section(folder: RunFolder) -> TaskSection:
    """The recipe's task."""
    return next(iter(load_recipe(folder.recipe).tasks.values()))


def _list_columns(section: TaskSection) -> dict[str, str]:
    """Role -> column of the run's own events, of those that say what people had."""
    card = load_card(section.data) if section.data in card_names() else None
    named = (card.roles if card else {}) | section.columns
    return {role: named[role] for role in ROLES if role in named}
