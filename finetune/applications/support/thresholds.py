"""When the assistant answers, asks back or hands over: four thresholds, chosen for what mistakes cost.

Chow's rule (1970) would read the best action off calibrated probabilities alone. The probabilities of three models side
by side are not that well calibrated, so the thresholds that cost least on validation are searched for instead, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from finetune.artifact.run_folder import load_json, save_json
from finetune.errors import DataError, ResourceError, UsageError

Action = Literal["template", "passage", "question", "handover"]
Numbers = npt.NDArray[np.float64]

ACTIONS: tuple[Action, ...] = ("template", "passage", "question", "handover")
NEVER = 2.0
"""A threshold that no probability reaches."""
MAX_VALUES = 96
"""Of each threshold; of more observed values, so many at even ranks are tried. 96^4 sums take about two seconds."""


@dataclass(frozen=True, slots=True)
class Signals:
    """All that a decision looks at, for one question."""

    outside: float
    """How much it looks out of scope."""
    intent: float
    """The probability of its likeliest intent."""
    pair: float
    """The probability of its second likeliest intent: how close the two are; 0 where it has but one."""
    passage: float
    """The probability that the entry found first answers it; 0 without entries."""
    has_template: bool
    """Whether the likeliest intent is answered by a template."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What must be reached for each action; `outside` must not be exceeded for any but a hand-over."""

    outside: float
    intent: float
    passage: float
    pair: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What each outcome costs; a right answer, and a hand-over of what is out of scope, cost nothing.

    A question back costs what follows it as well.
    """

    wrong: float = 5.0
    handover: float = 1.0
    question: float = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """What each action would have been worth for one labelled question."""

    signals: Signals
    template_right: bool
    """The likeliest intent has a template and is the question's own."""
    passage_right: bool
    """The entry found first is one that answers it."""
    chosen: float
    """After a question back: how sure the entry is once the customer has chosen between the two likeliest intents;
    `NEVER`, which reaches every threshold, for a template, and 0 where neither intent is meant."""
    chosen_right: bool
    """That answer is right."""
    in_scope: bool


def decide(signals: Signals, thresholds: Thresholds) -> Action:
    """Template if the intent is sure, passage if the entry is; a question if only two intents together are."""
    if signals.outside > thresholds.outside:
        return "handover"
    sure = signals.intent >= thresholds.intent
    if sure and signals.has_template:
        return "template"
    if signals.passage >= thresholds.passage:
        return "passage"
    return "question" if signals.pair >= thresholds.pair and not sure else "handover"


def compute_costs(outcome: Outcome, passage: float, costs: Costs) -> dict[Action, float]:
    """What each action costs for one question.

    Args:
        outcome: of the question.
        passage: the threshold for an entry, which also decides what follows a question back.
        costs: of mistakes.
    """
    handover = costs.handover if outcome.in_scope else 0.0
    chosen = 0.0 if outcome.chosen_right else costs.wrong
    return {
        "template": 0.0 if outcome.template_right else costs.wrong,
        "passage": 0.0 if outcome.passage_right else costs.wrong,
        "question": costs.question + (chosen if outcome.chosen >= passage else handover),
        "handover": handover,
    }


def compute_mean_cost(outcomes: Sequence[Outcome], thresholds: Thresholds, costs: Costs) -> float:
    """The mean over questions of what the action chosen for each costs."""
    return float(
        np.mean([compute_costs(each, thresholds.passage, costs)[decide(each.signals, thresholds)] for each in outcomes])
    )


def choose_thresholds(outcomes: Sequence[Outcome], costs: Costs) -> Thresholds:
    """The thresholds with the least mean cost, among the observed values of each signal.

    All combinations are tried. Of equally cheap ones the most cautious is taken. Each threshold is then moved halfway
    to the next observed value that does not pass, so that rounding changes no decision.

    Args:
        outcomes: of validation questions, N of them, at least one.
        costs: what a mistake costs against a hand-over.

    Raises:
        DataError: no outcomes.
        UsageError: a cost that is negative or not finite.
    """
    if not outcomes:
        raise DataError("support: thresholds must be chosen on validation questions, got none.")
    for name, value in asdict(costs).items():
        if not (np.isfinite(value) and value >= 0):
            raise UsageError(f"support: the cost of {name} must be 0 or more, got {value}.")
    outside, *others = (
        np.array([getattr(each.signals, name) for each in outcomes])
        for name in ("outside", "intent", "passage", "pair")
    )
    others[1] = np.append(others[1], [each.chosen for each in outcomes if each.chosen < NEVER])
    grid = [_list_candidates(values) for values in others]
    gates = np.sort(_list_candidates(outside)[1:])
    best = _search(outcomes, costs, gates, grid)
    chosen = [_relax(values[place], seen) for values, place, seen in zip(grid, best[1:], others, strict=True)]
    return Thresholds(-_relax(-gates[best[0]], -outside), *chosen)


def save_thresholds(path: Path, thresholds: Thresholds, costs: Costs, outcomes: Sequence[Outcome]) -> None:
    """Write the thresholds, what they were chosen for, and what they came to on validation."""
    actions = [decide(each.signals, thresholds) for each in outcomes]
    about: dict[str, Any] = {
        "thresholds": asdict(thresholds),
        "costs": asdict(costs),
        "validation": {
            "questions": len(outcomes),
            "mean_cost": compute_mean_cost(outcomes, thresholds, costs),
            "actions": {action: actions.count(action) for action in ACTIONS},
        },
    }
    save_json(path, about)


def load_thresholds(path: Path) -> Thresholds:
    """Read what `save_thresholds` wrote.

    Raises:
        ResourceError: the file is missing, or does not hold the four thresholds as numbers.
    """
    if not path.is_file():
        raise ResourceError(f"{path}: must be a file of thresholds, got nothing there. Choose them on validation.")
    found = load_json(path).get("thresholds")
    names = list(Thresholds.__slots__)
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        raise ResourceError(f"{path}: must hold the thresholds {', '.join(names)}, got {found}.")
    if not all(isinstance(value, (int, float)) and np.isfinite(value) for value in found.values()):
        raise ResourceError(f"{path}: thresholds must be numbers, got {found}.")
    return Thresholds(**found)


def _list_candidates(values: Numbers) -> Numbers:
    """`NEVER`, and the observed values, falling, at most `MAX_VALUES` of them."""
    observed = np.unique(values)
    if len(observed) > MAX_VALUES:
        observed = observed[np.linspace(0, len(observed) - 1, MAX_VALUES).round().astype(int)]
    return np.append(observed, NEVER)[::-1]


def _search(outcomes: Sequence[Outcome], costs: Costs, gates: Numbers, grid: Sequence[Numbers]) -> tuple[int, ...]:
    """Places of the cheapest thresholds: in `gates`, and in each part of `grid`.

    For one gate, what a question adds to the total of every combination of the other three is constant on boxes: where
    the template is given, where the passage is, where the question back is. So each question is a few corners in a
    table of differences, and running sums along its axes give all totals at once.

    Args:
        outcomes: N of them.
        costs: as in `choose_thresholds`.
        gates: thresholds of `outside`, ascending.
        grid: thresholds of intent, passage and pair, each falling.
    """
    changes = np.zeros([len(values) for values in grid], dtype=np.int64)
    totals = np.empty_like(changes)
    best: tuple[int, ...] = (0, 0, 0, 0)  # nothing but hand-overs
    least = 0
    entered = np.searchsorted(gates, [each.signals.outside for each in outcomes])  # the first gate that lets it in
    for gate in range(len(gates)):
        for outcome in compress(outcomes, entered == gate):
            _add_question(changes, outcome, costs, grid)
        np.cumsum(changes, axis=0, out=totals)
        np.cumsum(totals, axis=1, out=totals)
        np.cumsum(totals, axis=2, out=totals)
        place = int(totals.argmin())  # of equals the first, which has the highest thresholds
        if totals.flat[place] < least:
            least, best = int(totals.flat[place]), (gate, *map(int, np.unravel_index(place, totals.shape)))
    return best


def _add_question(changes: npt.NDArray[np.int64], outcome: Outcome, costs: Costs, grid: Sequence[Numbers]) -> None:
    """What one question adds to the totals, against its hand-over."""
    signals = outcome.signals
    handover = compute_costs(outcome, NEVER, costs)["handover"]

    def count(action: Action, passage: float = NEVER) -> int:
        """Whole numbers, so that equal totals are equal."""
        return round((compute_costs(outcome, passage, costs)[action] - handover) * 1e6)

    # From which threshold on each signal reaches it; all that follow are lower.
    intent, passage, pair = (
        int(np.searchsorted(-values, -signal))
        for values, signal in zip(grid, (signals.intent, signals.passage, signals.pair), strict=True)
    )
    templated = intent if signals.has_template else len(grid[0])
    chosen = min(passage, int(np.searchsorted(-grid[1], -outcome.chosen)))
    every = (0, None)
    _add_box(changes, ((templated, None), every, every), count("template"))
    _add_box(changes, ((0, templated), (passage, None), every), count("passage"))
    _add_box(changes, ((0, intent), (0, chosen), (pair, None)), count("question"))
    _add_box(changes, ((0, intent), (chosen, passage), (pair, None)), count("question", 0.0))


def _add_box(changes: npt.NDArray[np.int64], box: Sequence[tuple[int, int | None]], value: int) -> None:
    """Let the running sums of `changes` rise by `value` inside the box of [start, stop) along each axis."""
    sides = [[(start, 1)] if stop is None else [(start, 1), (stop, -1)] for start, stop in box]
    for (i, first), (j, second), (k, third) in product(*sides):
        if i < changes.shape[0] and j < changes.shape[1] and k < changes.shape[2]:
            changes[i, j, k] += value * first * second * third


def _relax(threshold: float, observed: Numbers) -> float:
    """Halfway from a threshold down to the next observed value."""
    below = observed[observed < threshold]
    return float(threshold if threshold == NEVER or not below.size else (threshold + below.max()) / 2)
