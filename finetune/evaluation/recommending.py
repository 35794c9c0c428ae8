"""How good lists of items are: places of what people turned to next, means over people, and what lists are made of.

Shapes: R requests, I items, P people. Of equal scores an item that was not asked for comes first, so that what cannot
be told apart is no success; in a list, the one that stands first in the catalogue does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.evaluation.corpus_metrics import Floats, compute_rank_statistics
from finetune.evaluation.corpus_scoring import CorpusSplit, SystemOutput, compute_corpus_estimates, score_corpus
from finetune.evaluation.counting import Counting, Events, Fitted, Histories, Numbers, Scores
from finetune.evaluation.intervals import Resampling, compute_interval
from finetune.evaluation.ranking_baselines import find_places
from finetune.evaluation.scoring import round_numbers
from finetune.recipe.schema import EvaluateSection

LIST = 10
"""Items of a list."""
CHUNK = 128
"""Requests that are scored at once."""
BLOCK = 64
"""Items whose best is looked at first where a list is made of many."""
POPULAR_SHARE = 0.1
"""Share of the items that are called popular, by their events."""
RARE_EVENTS = 5
"""Items with fewer events, but some, are called rare."""
TARGET = "next item"
"""The slice by what was asked for."""


@dataclass(frozen=True)
class Questions:
    """Requests with their answers.

    Args:
        person: (R,) numbers of people.
        histories: R.
        targets: R arrays of items, none empty.
        exclude_seen: whether lists leave out what a person had; then no target is among it.
    """

    person: Numbers
    histories: Histories
    targets: Sequence[Numbers]
    exclude_seen: bool

    def __len__(self) -> int:
        return len(self.person)

    def take(self, rows: slice) -> Questions:
        """Some of them."""
        return Questions(self.person[rows], self.histories.take(rows), self.targets[rows], self.exclude_seen)

    def draw(self, most: int, seed: int) -> Questions:
        """At most so many of them, drawn at random, in their order."""
        if len(self) <= most:
            return self
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:most])
        histories = Histories(self.histories.item, self.histories.start[rows], self.histories.end[rows])
        return Questions(self.person[rows], histories, [self.targets[row] for row in rows], self.exclude_seen)

    def find_places(self, scores: Scores) -> Iterator[npt.NDArray[np.int64]]:
        """Places of each request's targets, from scores (R, I), in which what is not to be shown becomes -inf."""
        if self.exclude_seen:
            self.histories.mark(scores, -np.inf)
        for row, targets in enumerate(self.targets):
            yield find_places(scores[row], targets)

    def chunk(self) -> list[slice]:
        """Parts of them that fit into memory."""
        return [slice(start, start + CHUNK) for start in range(0, len(self), CHUNK)]


def build_questions(
    person: Numbers, histories: Histories, targets: Sequence[Numbers], *, exclude_seen: bool
) -> Questions:
    """Requests with their answers, each item once; where lists leave out what a person had, so do the answers, and
    requests without another answer are none."""
    kept, answers = [], []
    for row, found in enumerate(targets):
        answer = np.unique(found)
        if exclude_seen:
            answer = answer[~np.isin(answer, histories.get(row))]
        if len(answer):
            kept.append(row)
            answers.append(answer)
    rows = np.array(kept, dtype=np.int64)
    chosen = Histories(histories.item, histories.start[rows], histories.end[rows])
    return Questions(person[rows], chosen, answers, exclude_seen)


@dataclass
class Ranked:
    """What a system made of requests.

    Args:
        places: of each request, the places of its targets, from 1.
        lists: of each request at most 10 items, the best first.
        by_group: group of items -> the same places of those targets that are in it, None for a request without one;
            the other targets are out of the way.
        settings: what was chosen on validation.
    """

    places: list[npt.NDArray[np.int64]] = field(default_factory=list)
    lists: list[Numbers] = field(default_factory=list)
    by_group: dict[str, list[npt.NDArray[np.int64] | None]] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=dict)

    def add(self, scores: Scores, questions: Questions, groups: Mapping[str, npt.NDArray[np.bool_]]) -> None:
        """Take in the scores of a chunk, (r, I); they are changed."""
        for row, places in enumerate(questions.find_places(scores)):
            own, targets = scores[row], questions.targets[row]
            self.places.append(places)
            self.lists.append(find_first(own, LIST))
            for name, members in groups.items():
                self.by_group.setdefault(name, []).append(_find_group_places(own, targets, members))

    def to_output(self, person: Numbers, names: Sequence[str]) -> SystemOutput:
        """Mean over each person's requests."""
        return SystemOutput(tables=average_by_person(self.places, person, names), settings=self.settings)


def find_first(scores: npt.NDArray[np.floating[Any]], count: int) -> Numbers:
    """The items with the largest scores, best first; of equal ones the first of the catalogue, and none at minus
    infinity, which nan counts as. (count or fewer,)."""
    scores = np.where(np.isnan(scores), -np.inf, scores)  # below all for any comparison
    count = min(count, len(scores))
    blocks = len(scores) // BLOCK
    chosen = np.arange(len(scores))
    if not count:
        return chosen
    if blocks > count:
        # So many blocks hold an item as good as the worst of their best: no item below it is in the list.
        best = scores[: blocks * BLOCK].reshape(BLOCK, blocks).max(axis=0)  # strides, which are fast to compare
        chosen = np.flatnonzero(scores >= np.partition(best, blocks - count)[blocks - count])
    found = scores[chosen]
    border = np.partition(found, len(found) - count)[len(found) - count]
    chosen = chosen[(found >= border) & (found > -np.inf)]
    order: Numbers = chosen[np.argsort(-scores[chosen], kind="stable")]
    return order[:count]


def _find_group_places(
    scores: Scores, targets: Numbers, members: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64] | None:
    wanted = targets[members[targets]]
    if not len(wanted):
        return None
    others = targets[~members[targets]]
    if len(others):
        scores = scores.copy()
        scores[others] = -np.inf
    return find_places(scores, wanted)


def average_by_person(
    places: Sequence[npt.NDArray[np.int64] | None], person: Numbers, names: Sequence[str]
) -> dict[str, Floats]:
    """Statistics of each metric, (P, 2), the mean over each person's requests; people in the order of their numbers.

    Args:
        places: of each request; None where it is not counted.
        person: (R,).
        names: metrics of places.
    """
    kept = [row for row, found in enumerate(places) if found is not None]
    people, number = np.unique(person[kept], return_inverse=True)
    count = np.bincount(number, minlength=len(people))
    tables = {}
    for name in names:
        values = compute_rank_statistics(name, [found for found in places if found is not None])[:, 0]
        mean = np.bincount(number, values, minlength=len(people)) / np.maximum(1, count)
        tables[name] = np.column_stack([mean, np.ones(len(people))])
    return tables


def group_items(counts: Scores) -> dict[str, npt.NDArray[np.bool_]]:
    """Groups of items by their events in train: popular, rare and cold (none at all), (I,) each."""
    order = np.argsort(-counts, kind="stable")
    popular = np.zeros(len(counts), bool)
    popular[order[: round(len(order) * POPULAR_SHARE)]] = True
    return {
        "popular": popular & (counts > 0),
        "rare": (counts > 0) & (counts < RARE_EVENTS) & ~popular,
        "cold": counts == 0,
    }


def name_history(events: int) -> str:
    """The slice that a history of so many events belongs to."""
    for most, name in ((0, "none"), (5, "1 to 5 events"), (20, "6 to 20 events"), (100, "21 to 100 events")):
        if events <= most:
            return name
    return "over 100 events"


def rank_all(
    questions: Questions,
    score: Callable[[Questions], Scores],
    groups: Mapping[str, npt.NDArray[np.bool_]],
    chunks: Iterable[slice] | None = None,
) -> Ranked:
    """What a system that scores chunks, `questions.chunk()`, makes of all requests."""
    ranked = Ranked()
    for rows in questions.chunk() if chunks is None else chunks:
        part = questions.take(rows)
        ranked.add(score(part), part, groups)
    return ranked


def choose_settings(
    counting: Counting,
    events: Events,
    questions: Questions,
    metric: str,
    track: Callable[[Sequence[dict[str, float]]], Iterable[dict[str, float]]] = iter,
) -> dict[str, float]:
    """The settings of a baseline that are best on validation; of equal ones the first. `track` hands them on."""
    settings = counting.list_settings()
    if len(settings) == 1:
        return settings[0]
    scores = []
    for fitted in counting.fit_all(events, track(settings)):
        places = []
        for rows in questions.chunk():
            part = questions.take(rows)
            places += list(part.find_places(fitted(part.histories)))
        scores.append(float(average_by_person(places, questions.person, [metric])[metric][:, 0].mean()))
    return settings[int(np.argmax(scores))]


def rank_by_counting(
    counting: Counting,
    settings: Mapping[str, float],
    events: Events,
    questions: Questions,
    groups: Mapping[str, npt.NDArray[np.bool_]],
) -> Ranked:
    """What a baseline makes of requests."""
    (fitted,) = counting.fit_all(events, [settings])
    ranked = rank_all(questions, _score_by(fitted), groups)
    ranked.settings = dict(settings)
    return ranked


def _score_by(fitted: Fitted) -> Callable[[Questions], Scores]:
    return lambda part: fitted(part.histories)


@dataclass(frozen=True)
class Judging:
    """How a split is judged.

    Args:
        section: the recipe's `evaluate`.
        seed: of the resamples.
        opened: how often the test split was opened; None for another.
    """

    section: EvaluateSection
    seed: int
    opened: int | None


def score_lists(
    split: str,
    questions: Questions,
    systems: Mapping[str, Ranked],
    counts: Scores,
    judging: Judging,
) -> dict[str, Any]:
    """Score a split: each person's mean, with intervals over people, against every other system.

    Args:
        split: "validation" or "test".
        questions: what was asked.
        systems: name -> what it made of them; the first is the model.
        counts: events of each item in train, (I,).
        judging: how.

    Returns:
        As `score_corpus`, with the slice `next item`, and `lists`: of each system its NDCG in that slice, the share of
        the catalogue that its lists show, also when they are cut to 1 to 10 items, and their novelty, the mean of -log2
        of an item's share of all events.
    """
    section = judging.section
    names = [name for name in section.metrics if name != "loss"]
    model = next(iter(systems))
    people, first = np.unique(questions.person, return_index=True)
    lengths = questions.histories.lengths
    values = [{"history": name_history(int(lengths[row]))} for row in first]
    scored = score_corpus(
        CorpusSplit(
            name=split,
            model=systems[model].to_output(questions.person, names),
            references=None,
            inputs=[str(person) for person in people],
            values=values,
            baselines={
                name: ranked.to_output(questions.person, names) for name, ranked in systems.items() if name != model
            },
            resampling=Resampling(section.resamples, judging.seed),
            opened=judging.opened,
        ),
        replace_slices(section, values),
    )
    headline = names[0]
    groups = {name: _score_group(name, questions, systems, headline, judging) for name in group_items(counts)}
    scored["slices"][TARGET] = [
        {"value": name, "rows": found["people"], "metrics": {headline: round_numbers(found["systems"][model])}}
        for name, found in groups.items()
        if found["people"]
    ]
    share = (counts + 1) / (counts.sum() + len(counts))
    coverage = {name: _measure_coverage(ranked.lists, len(counts)) for name, ranked in systems.items()}
    scored["lists"] = round_numbers(
        {
            "requests": len(questions),
            "people": len(people),
            "items": len(counts),
            "by_item": groups,
            "systems": {
                name: {
                    "coverage_at_10": coverage[name][-1],
                    "coverage": coverage[name],
                    "novelty_at_10": float(-np.log2(share[np.concatenate(ranked.lists)]).mean()),
                }
                for name, ranked in systems.items()
            },
        }
    )
    return scored


def _measure_coverage(lists: Sequence[Numbers], items: int) -> list[float]:
    """Share of the catalogue that is on some list, cut to its first 1 to 10 items."""
    return [
        len(np.unique(np.concatenate([shown[:length] for shown in lists]))) / items for length in range(1, LIST + 1)
    ]


def replace_slices(section: EvaluateSection, values: Sequence[Mapping[str, Any]]) -> EvaluateSection:
    """Slices that lists can have: by what is known of people."""
    kept = [name for name in section.slices if values and name in values[0]]
    return section.model_copy(update={"slices": kept})


def _score_group(
    name: str, questions: Questions, systems: Mapping[str, Ranked], metric: str, judging: Judging
) -> dict[str, Any]:
    found: dict[str, Any] = {"people": 0, "systems": {}}
    for system, ranked in systems.items():
        tables = average_by_person(ranked.by_group.get(name, []), questions.person, [metric])
        found["people"] = len(tables[metric])
        if found["people"]:
            estimates = compute_corpus_estimates(tables, Resampling(judging.section.resamples, judging.seed))
            found["systems"][system] = compute_interval(estimates[metric], judging.section.confidence)
    return found
