"""From events to rows of a recommendation: one row for each person of a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from finetune.data.checks import Finding
from finetune.data.histories import Held, ask_since, split_by_time, split_leave_one_out, train_mask
from finetune.data.interactions import NO_CATALOGUE, Interactions, LoadedInteractions, load_interactions
from finetune.data.rows import Row, Splits
from finetune.errors import DataError
from finetune.evaluation.recommending import Questions, name_history
from finetune.recipe.recommendation import FEATURES
from finetune.recipe.schema import RankSection, RecommendSection, TaskSection
from finetune.tasks.ranker import import_lightgbm
from finetune.tasks.recommendation import Recommendation, Record

HELD: tuple[Held, ...] = ("validation", "test")


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
    asked = {name: record.ask(name, exclude_seen=recommend.exclude_seen) for name in HELD}
    splits = _list_people(log, record, asked)
    for name, rows in splits.items():
        if not rows:
            raise DataError(
                f"{loaded.origin}: {name} must have people with something to ask for, got none. Change "
                "split.validation and split.test, or give more events; where things are had again, set "
                "recommend.exclude_seen: false."
            )
    return loaded, task, splits


def load_others(
    reference: str, columns: Mapping[str, str], task: Recommendation, seed: int
) -> tuple[LoadedInteractions, Recommendation, list[Row]]:
    """Other people's events, or later ones, as requests in the place of a run's test split.

    What the run knows of items stays as it is. Behind its cut in time everything is asked for, or each person's last
    event where the run left that one out.

    Args:
        reference, columns: as for `load_interactions`.
        task: of the run, with its record.
        seed: of the run.

    Raises:
        DataError: unreadable events, none with an item that the run knows, or nothing to ask for.
    """
    loaded = load_interactions(reference, columns, NO_CATALOGUE)
    log, record = loaded.interactions, task.record
    assert record is not None
    numbers = np.array([task.catalogue.numbers.get(item, -1) for item in log.catalogue.ids])[log.item]
    known = numbers >= 0
    unknown = int((~known).sum())
    if unknown == len(known):
        raise DataError(
            f"{loaded.origin}: events must name items that the run knows, such as {task.catalogue.ids[0]!r}, got "
            f"others, such as {log.catalogue.ids[0]!r}. Take the ids of the run's own data."
        )
    if unknown:
        message = f"{unknown:,} of {len(known):,} events are with items that the run does not know: left out."
        loaded = replace(
            loaded, findings=(*loaded.findings, Finding("unknown_item", "warning", "test", unknown, message))
        )
    log = Interactions(log.users, task.catalogue, log.user[known], numbers[known], log.time[known])
    cuts, most = record.cuts, task.section.requests
    asked = split_leave_one_out(log)["test"] if cuts is None else ask_since(log, cuts[1], most, seed)
    record = replace(record, others=(log, asked))
    questions = record.ask("test", exclude_seen=task.section.exclude_seen)
    if not len(questions):
        must = "people with 3 events" if cuts is None else f"events behind the run's cut, {_describe_time(cuts[1])}"
        raise DataError(
            f"{loaded.origin}: must have {must}, with something to ask for, got none. Give more events of people, with "
            "what they had before."
        )
    return loaded, replace(task, record=record), _list_asked(log, "test", questions)


def _describe_time(seconds: int) -> str:
    """A time as people read it."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _list_people(log: Interactions, record: Record, asked: Mapping[Held, Questions]) -> Splits:
    """A row for each person with at least two events in train, and for each that a split is judged by: not for those
    who only came back to what lists leave out."""
    known = train_mask(log, record.requests, "validation", record.cuts)
    events = np.bincount(log.user[known], minlength=len(log.users))
    learned_from = np.flatnonzero(events > 1).tolist()
    splits: Splits = {"train": [_build_row(log, person, "train", int(events[person])) for person in learned_from]}
    return splits | {name: _list_asked(log, name, questions) for name, questions in asked.items()}


def _list_asked(log: Interactions, split: Held, questions: Questions) -> list[Row]:
    people, first = np.unique(questions.person, return_index=True)
    lengths = questions.histories.lengths
    return [_build_row(log, int(person), split, int(lengths[row])) for person, row in zip(people, first, strict=True)]


def _build_row(log: Interactions, person: int, split: str, history: int) -> Row:
    values = {"user": log.users[person], "person": person, "history": name_history(history)}
    return Row(f"{split}:{log.users[person]}", split, person + 1, values)


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
