"""From events to rows of a recommendation: one row for each person of a split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from finetune.data.histories import Held, split_by_time, split_leave_one_out, train_mask
from finetune.data.interactions import Interactions, LoadedInteractions, load_interactions
from finetune.data.rows import Row, Splits
from finetune.errors import DataError
from finetune.evaluation.recommending import Questions, name_history
from finetune.recipe.recommendation import FEATURES
from finetune.recipe.schema import RankSection, RecommendSection, TaskSection
from finetune.tasks.ranker import import_lightgbm
from finetune.tasks.recommendation import Recommendation, Record


def load_people(
    section: TaskSection, relative_to: Path | None, seed: int
) -> tuple[LoadedInteractions, Recommendation, Splits]:
    """Read events, split them, and settle the task.

    Args:
        section: of the recipe.
        relative_to: the recipe's folder.
        seed: of the moments that people are asked at.

    Raises:
        DataError: unreadable events, too few of them, or a feature that is no column of the catalogue.
        ResourceError: a second stage without LightGBM.
    """
    loaded = load_interactions(section.data, section.columns, section.items, relative_to)
    log = loaded.interactions
    recommend = section.recommend or RecommendSection()
    rank = _settle_rank(section.rank, loaded, recommend)
    split = section.split
    if split.by == "time_cut":
        cuts, requests = split_by_time(log, split.validation, split.test, recommend.requests, seed)
    else:
        cuts, requests = None, split_leave_one_out(log, recommend.requests)
    record = Record(log, requests, cuts)
    known = train_mask(log, requests, "validation", cuts)
    counts = np.bincount(log.item[known], minlength=len(log.catalogue.ids))
    task = Recommendation(
        log.catalogue, tuple(counts.tolist()), recommend, rank, by_moment=cuts is not None, record=record
    )
    held: tuple[Held, ...] = ("validation", "test")
    splits = _list_people(log, record, {name: record.ask(name, exclude_seen=recommend.exclude_seen) for name in held})
    for name, rows in splits.items():
        if not rows:
            raise DataError(
                f"{loaded.origin}: {name} must have people with something to ask for, got none. Change "
                "split.validation and split.test, or give more events; where things are had again, set "
                "recommend.exclude_seen: false."
            )
    return loaded, task, splits


def _list_people(log: Interactions, record: Record, asked: Mapping[str, Questions]) -> Splits:
    """A row for each person with at least two events in train, and for each that a split is judged by: not for those
    who only came back to what lists leave out."""
    known = train_mask(log, record.requests, "validation", record.cuts)
    events = np.bincount(log.user[known], minlength=len(log.users))

    def build(person: int, split: str, history: int) -> Row:
        values = {"user": log.users[person], "person": person, "history": name_history(history)}
        return Row(f"{split}:{log.users[person]}", split, person + 1, values)

    learned_from = np.flatnonzero(events > 1).tolist()
    splits: Splits = {"train": [build(person, "train", int(events[person])) for person in learned_from]}
    for name, questions in asked.items():
        people, first = np.unique(questions.person, return_index=True)
        lengths = questions.histories.lengths
        splits[name] = [build(int(person), name, int(lengths[row])) for person, row in zip(people, first, strict=True)]
    return splits


def _settle_rank(
    rank: RankSection | None, loaded: LoadedInteractions, recommend: RecommendSection
) -> RankSection | None:
    """The second stage with features that exist."""
    if rank is None:
        return None
    import_lightgbm()
    columns = list(loaded.interactions.catalogue.columns)
    known = [*FEATURES, *columns]
    if wrong := [name for name in rank.features if name not in known]:
        raise DataError(
            f"rank.features: must be out of {', '.join(FEATURES)} and the catalogue's columns "
            f"({', '.join(columns) or 'none'}), got {', '.join(wrong)}."
        )
    if shadowed := [name for name in columns if name in FEATURES and name in rank.features]:
        raise DataError(
            f"rank.features: must mean one thing, got {', '.join(shadowed)}, which the catalogue also has as a column. "
            "Rename the column, or leave it out of items.categorical and items.numeric."
        )
    features = rank.features
    if recommend.vectors == "ids":
        features = [name for name in features if name != "text"]
    if recommend.exclude_seen:
        features = [name for name in features if name != "repeats"]
    if not features:
        raise DataError(
            f"rank.features: must leave one, got {', '.join(rank.features)}: text is nothing where recommend.vectors "
            "is ids, and repeats where recommend.exclude_seen is true. Add sequence."
        )
    return rank.model_copy(update={"features": features})
