"""What a recommender is asked, and what it may know: events split by time, or the last event of each person."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import numpy.typing as npt

from finetune.data.interactions import Interactions, Numbers
from finetune.errors import DataError

Held = Literal["validation", "test"]
Cuts = tuple[int, int]

MIN_EVENTS = 3
"""Fewer events of a person than this stay in train when the last one is left out."""


@dataclass(frozen=True)
class Requests:
    """R requests for items, with their answers; positions are those of the events of `Interactions`."""

    person: Numbers
    """(R,) numbers of people."""
    moment: Numbers
    """(R,) seconds since 1970 UTC."""
    start: Numbers
    end: Numbers
    """(R,) `events[start:end]` is what comes with the request: all that the person did before it, perhaps nothing."""
    target_start: Numbers
    target_end: Numbers
    """(R,) `events[target_start:target_end]` is the answer: what the person then did at one time, at least 1 event."""

    def __len__(self) -> int:
        return len(self.person)


def split_by_time(
    interactions: Interactions, validation: float, test: float, requests: int = 10, seed: int = 0
) -> tuple[Cuts, dict[Held, Requests]]:
    """Hold out the last events of all, behind two cuts in time that are the same for everyone.

    What a person did at one time is one answer, such as a basket. The history of a request goes on past the cut, up to
    the request; nothing else of it may be used (arXiv:2010.11060 on why one cut for all).

    Args:
        validation: share of the events between the cuts, about.
        test: share of the events at or after the second cut, at least; above 0.
        requests: at most this many moments per person and split, drawn at random where there are more.
        seed: of that draw.

    Returns:
        The cuts t1 < t2: training sees what is before t1, validation asks for [t1, t2), test for t2 and later.

    Raises:
        DataError: too few different times to cut at.
    """
    times = np.sort(interactions.time)
    first, second = (round(len(times) * (1 - share)) for share in (validation + test, test))
    cuts = int(times[min(first, len(times) - 1)]), int(times[min(second, len(times) - 1)])
    if not times[0] < cuts[0] < cuts[1]:
        must = f"must have different times before, between and after the cuts for validation {validation:g} and test"
        got = f"{len(times):,} events at {len(np.unique(times)):,} times"
        raise DataError(f"events: {must} {test:g}, got {got}. Use more events, or larger shares.")
    asked = _list_moments(interactions, *cuts)
    return cuts, {
        "validation": _draw(asked, requests, np.random.default_rng([seed, 0])),
        "test": ask_since(interactions, cuts[1], requests, seed),
    }


def ask_since(interactions: Interactions, cut: int, requests: int = 10, seed: int = 0) -> Requests:
    """The requests of test behind a cut: moments at or after it; the arguments are those of `split_by_time`."""
    asked = _list_moments(interactions, cut, int(interactions.time.max()) + 1)
    return _draw(asked, requests, np.random.default_rng([seed, 1]))


def split_leave_one_out(interactions: Interactions, requests: int = 1) -> dict[Held, Requests]:
    """Hold out the last event of each person with at least 3 for test, and those before it for validation.

    Events at one time are in the order of the file, so that a history may hold events of the moment itself. The history
    for test holds the events of validation. Other people's later events stay in train: scores are those of papers, not
    of a recommender in use.

    Args:
        requests: at most so many events of each person for validation, and at most half of those before the last.
    """
    starts, ends = _find_people(interactions)
    asked = ends - starts >= MIN_EVENTS
    starts, ends = starts[asked], ends[asked]

    def ask(starts: Numbers, targets: Numbers) -> Requests:
        return Requests(interactions.user[targets], interactions.time[targets], starts, targets, targets, targets + 1)

    held = np.minimum(requests, (ends - 1 - starts) // 2)
    age = np.arange(int(held.sum())) - np.repeat(np.cumsum(held) - held, held)  # from 0, the oldest of each person's
    validation = np.repeat(ends - 1 - held, held) + age
    return {"validation": ask(np.repeat(starts, held), validation), "test": ask(starts, ends - 1)}


def before(interactions: Interactions, cut: int) -> npt.NDArray[np.bool_]:
    """(E,) which events are strictly before a time."""
    return interactions.time < cut


def train_mask(
    interactions: Interactions, splits: Mapping[Held, Requests], at: Held, cuts: Cuts | None = None
) -> npt.NDArray[np.bool_]:
    """Which events anything may be fitted on.

    Args:
        splits: as `split_by_time` or `split_leave_one_out` gave them.
        at: before validation is asked, or before test is; then what was asked in validation is known.
        cuts: as `split_by_time` gave them; None when one event was left out.

    Returns:
        (E,) true where an event is known to training.
    """
    if cuts is not None:
        return before(interactions, cuts[0 if at == "validation" else 1])
    known = np.ones(len(interactions.time), bool)
    for held in ("validation", "test") if at == "validation" else ("test",):
        known[splits[held].target_start] = False
    return known


def _find_people(interactions: Interactions) -> tuple[Numbers, Numbers]:
    """(U,) where the events of each person start and end."""
    people = np.arange(len(interactions.users))
    starts, ends = (np.searchsorted(interactions.user, people, side=side) for side in ("left", "right"))
    return starts, ends


def _list_moments(interactions: Interactions, since: int, until: int) -> Requests:
    """A request for each time in [since, until) at which a person did something."""
    user, time = interactions.user, interactions.time
    is_new = np.ones(len(user), bool)
    is_new[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    starts = np.flatnonzero(is_new)
    ends = np.append(starts[1:], len(user))
    asked = (time[starts] >= since) & (time[starts] < until)
    starts, ends = starts[asked], ends[asked]
    person = user[starts]
    return Requests(person, time[starts], _find_people(interactions)[0][person], starts, starts, ends)


def _draw(asked: Requests, requests: int, generator: np.random.Generator) -> Requests:
    """At most `requests` of each person's, in the order of person and moment."""
    shuffled = np.lexsort((generator.random(len(asked)), asked.person))
    person = asked.person[shuffled]
    rank = np.arange(len(asked)) - np.searchsorted(person, person, side="left")
    kept = np.sort(shuffled[rank < requests])
    return Requests(*(getattr(asked, field.name)[kept] for field in fields(Requests)))
