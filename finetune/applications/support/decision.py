"""When the assistant answers, asks back or hands over: one threshold, chosen for what mistakes cost.

Chow's rule (1970) answers where the answer is right with a probability above a threshold that follows from the costs
alone. The probabilities here come from three models, so the threshold that costs least on validation is taken instead.
It is one for all actions: a threshold for each fits a few hundred questions better, and new ones worse.
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
MAX_VALUES = 400
"""Of more observed probabilities, so many at even ranks are tried."""


@dataclass(frozen=True, slots=True)
class Signals:
    """All that a decision looks at, for one question. Each probability includes that it is in scope."""

    outside: float
    """The probability that it is out of scope."""
    intent: float
    """That it asks for its likeliest intent."""
    two: float
    """That it asks for one of its two likeliest intents."""
    passage: float
    """That the entry found first answers it; 0 without entries."""
    has_template: bool
    """Whether the likeliest intent is answered by a template."""


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


def decide(signals: Signals, sure: float) -> Action:
    """The first that is sure enough: the template, the entry, that one of two intents is meant; else a hand-over.

    Where the intent alone is sure, but not its answer, a question back would not help.
    """
    if signals.has_template and signals.intent >= sure:
        return "template"
    if signals.passage >= sure:
        return "passage"
    return "question" if signals.two >= sure > signals.intent else "handover"


def compute_cost(outcome: Outcome, sure: float, costs: Costs) -> float:
    """What the action that is chosen for a question costs."""
    action = decide(outcome.signals, sure)
    handover = costs.handover if outcome.in_scope else 0.0
    if action == "handover":
        return handover
    if action == "question":
        then = handover if outcome.chosen < sure else 0.0 if outcome.chosen_right else costs.wrong
        return costs.question + then
    return 0.0 if (outcome.template_right if action == "template" else outcome.passage_right) else costs.wrong


def compute_mean_cost(outcomes: Sequence[Outcome], sure: float, costs: Costs) -> float:
    """The mean over questions of what the action chosen for each costs."""
    return float(np.mean([compute_cost(outcome, sure, costs) for outcome in outcomes]))


def choose_threshold(outcomes: Sequence[Outcome], costs: Costs) -> float:
    """The threshold with the least mean cost, among the observed probabilities.

    Of equally cheap ones the most cautious is taken. It is then moved halfway to the next observed probability that
    does not reach it, so that rounding changes no decision.

    Args:
        outcomes: of validation questions, at least one.
        costs: what a mistake costs against a hand-over.

    Raises:
        DataError: no outcomes.
        UsageError: a cost that is negative or not finite.
    """
    if not outcomes:
        raise DataError("support: the threshold must be chosen on validation questions, got none.")
    for name, value in asdict(costs).items():
        if not (np.isfinite(value) and value >= 0):
            raise UsageError(f"support: the cost of {name} must be 0 or more, got {value}.")
    seen = np.unique([value for each in outcomes for value in _list_probabilities(each)])
    tried = seen
    if len(seen) > MAX_VALUES:
        tried = seen[np.linspace(0, len(seen) - 1, MAX_VALUES).round().astype(int)]
    falling = [NEVER, *map(float, tried[::-1])]
    best = min(falling, key=lambda sure: round(compute_mean_cost(outcomes, sure, costs), 12))
    lower = seen[seen < best]
    return best if best == NEVER or not len(lower) else float(best + lower[-1]) / 2


def save_decision(path: Path, sure: float, costs: Costs, outcomes: Sequence[Outcome]) -> None:
    """Write the threshold, what it was chosen for, and what it came to on validation."""
    actions = [decide(each.signals, sure) for each in outcomes]
    about: dict[str, Any] = {
        "sure": sure,
        "costs": asdict(costs),
        "validation": {
            "questions": len(outcomes),
            "mean_cost": compute_mean_cost(outcomes, sure, costs),
            "actions": {action: actions.count(action) for action in ACTIONS},
        },
    }
    save_json(path, about)


def load_threshold(path: Path) -> float:
    """Read what `save_decision` wrote.

    Raises:
        ResourceError: the file is missing, or does not hold the threshold as a number.
    """
    if not path.is_file():
        raise ResourceError(f"{path}: must say how sure is sure enough, got nothing there. Choose it on validation.")
    found = load_json(path).get("sure")
    if not isinstance(found, int | float) or not np.isfinite(found):
        raise ResourceError(f"{path}: sure must be a number, got {found!r}. Choose it on validation.")
    return float(found)


def _list_probabilities(outcome: Outcome) -> list[float]:
    """The values at which a threshold changes what comes of a question."""
    signals = outcome.signals
    return [signals.intent, signals.two, signals.passage, *([outcome.chosen] if outcome.chosen < NEVER else [])]
