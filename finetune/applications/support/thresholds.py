"""When the assistant answers, asks back or hands over: four thresholds, chosen for what mistakes cost.

Chow's rule (1970) would read the best action off calibrated probabilities alone. The probabilities of three models side
by side are not that well calibrated, so the thresholds that cost least on validation are searched for instead, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    """The probability that it is one of its two likeliest intents; 0 where the model knows only one."""
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

    A question back that does not name what the customer wants costs the hand-over that follows as well.
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
    pair_right: bool
    """One of the two likeliest intents is the question's own."""
    in_scope: bool


def decide(signals: Signals, thresholds: Thresholds) -> Action:
    """Template if the intent is sure, else passage if the entry is, else a question when two intents together are."""
    if signals.outside > thresholds.outside:
        return "handover"
    if signals.has_template and signals.intent >= thresholds.intent:
        return "template"
    if signals.passage >= thresholds.passage:
        return "passage"
    return "question" if signals.pair >= thresholds.pair else "handover"


def compute_costs(outcome: Outcome, costs: Costs) -> dict[Action, float]:
    """What each action costs for one question."""
    handover = costs.handover if outcome.in_scope else 0.0
    return {
        "template": 0.0 if outcome.template_right else costs.wrong,
        "passage": 0.0 if outcome.passage_right else costs.wrong,
        "question": costs.question + (0.0 if outcome.pair_right else handover),
        "handover": handover,
    }


def compute_mean_cost(outcomes: Sequence[Outcome], thresholds: Thresholds, costs: Costs) -> float:
    """The mean over questions of what the action chosen for each costs."""
    return float(np.mean([compute_costs(each, costs)[decide(each.signals, thresholds)] for each in outcomes]))


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
    seen = [each.signals for each in outcomes]
    outside = np.array([each.outside for each in seen])
    # An intent without a template can never be answered by one, whatever the threshold.
    intent = np.array([each.intent if each.has_template else -1.0 for each in seen])
    passage, pair = np.array([each.passage for each in seen]), np.array([each.pair for each in seen])
    grid = [_list_candidates(values) for values in (intent, passage, pair)]
    gates = _list_candidates(outside)[:-1]
    best = _search(_tabulate_costs(outcomes, costs), outside, gates, (intent, passage, pair), grid)
    signals = zip(grid, best[1:], (intent, passage, pair), strict=True)
    chosen = [_relax(values[place], observed[observed >= 0]) for values, place, observed in signals]
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


def _tabulate_costs(outcomes: Sequence[Outcome], costs: Costs) -> Numbers:
    """(N, 4) in the order of `ACTIONS`; of equal totals the one with fewer wrong answers is to be the smaller."""
    strict = Costs(costs.wrong + 1e-6, costs.handover, costs.question)
    return np.array([[compute_costs(each, strict)[action] for action in ACTIONS] for each in outcomes])


def _list_candidates(values: Numbers) -> Numbers:
    """The observed values, ascending, at most `MAX_VALUES` of them, and `NEVER`."""
    observed = np.unique(values[values >= 0])
    if len(observed) > MAX_VALUES:
        observed = observed[np.linspace(0, len(observed) - 1, MAX_VALUES).round().astype(int)]
    return np.append(observed, NEVER)


def _search(
    costs: Numbers, outside: Numbers, gates: Numbers, signals: Sequence[Numbers], grid: Sequence[Numbers]
) -> tuple[int, ...]:
    """Places of the cheapest thresholds: in `gates`, and in each part of `grid`.

    For one gate, what a question adds to the total of every combination of the other three is constant on three boxes:
    where the template is given, where the passage is, where the question back is. So each question is a few corners in
    a table of differences, and running sums along its axes give all totals at once.

    Args:
        costs: (N, 4).
        outside: (N,).
        gates: thresholds of `outside`, ascending.
        signals: intent, passage and pair, each (N,).
        grid: thresholds of each.
    """
    lengths = [len(values) for values in grid]
    changes = np.zeros([length + 1 for length in lengths])
    added = costs[:, :3] - costs[:, 3:]  # against handing all over
    # The number of thresholds that each question reaches: they are the first ones.
    reached = [np.searchsorted(values, signal, side="right") for values, signal in zip(grid, signals, strict=True)]
    best, least = (0, *(length - 1 for length in lengths)), np.inf
    entered = np.searchsorted(gates, outside, side="left")  # the first gate that lets it in
    for gate in range(len(gates)):
        for i in np.flatnonzero(entered == gate):
            t, p, q = (int(part[i]) for part in reached)
            _add_box(changes, ((0, t), (0, lengths[1]), (0, lengths[2])), added[i, 0])
            _add_box(changes, ((t, lengths[0]), (0, p), (0, lengths[2])), added[i, 1])
            _add_box(changes, ((t, lengths[0]), (p, lengths[1]), (0, q)), added[i, 2])
        totals = changes.cumsum(0).cumsum(1).cumsum(2)[:-1, :-1, :-1].round(9)
        place = totals.size - 1 - int(totals[::-1, ::-1, ::-1].argmin())  # of equals the highest thresholds
        if totals.flat[place] < least:
            least, best = totals.flat[place], (gate, *map(int, np.unravel_index(place, totals.shape)))
    return best


def _add_box(changes: Numbers, box: Sequence[tuple[int, int]], value: float) -> None:
    """Let the running sums of `changes` rise by `value` inside the box of [start, stop) along each axis."""
    for corner in range(8):
        sides = [corner >> axis & 1 for axis in range(3)]
        changes[tuple(box[axis][side] for axis, side in enumerate(sides))] += value * (-1) ** sum(sides)


def _relax(threshold: float, observed: Numbers) -> float:
    """Halfway from a threshold down to the next observed value."""
    below = observed[observed < threshold]
    return float(threshold if threshold == NEVER or not below.size else (threshold + below.max()) / 2)
