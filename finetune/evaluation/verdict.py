"""The first lines of the report: what speaks for a model and what speaks against it, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.evaluation.charts import is_number
from finetune.evaluation.gates import BEATS_BASELINES
from finetune.evaluation.metrics import is_larger_better
from finetune.evaluation.wording import (
    decimals_of,
    describe_tested,
    format_condition,
    format_interval,
    format_number,
    format_signed,
    listed,
    name_of,
    part_of,
    quoted,
)
from finetune.recipe.messages import count_of

State = Literal["good", "care", "bad"]
Bin = Mapping[str, Any]
"""Of a reliability diagram: {"low", "high", "count", "confidence", "accuracy"}."""

WIDE_INTERVAL = 0.10
"""Above this the test split is too small to tell good models apart."""
RELATIVE = ("bleu", "bleu_zh", "chrf", "perplexity")
"""Metrics whose interval counts as a share of their value: 3 points are much at BLEU 10 and little at BLEU 40. A share
of a perplexity is a difference in nats of the loss, which is why a loss is not among them."""
NO_MISTAKE = ("accuracy", "macro_f1", "weighted_f1", "mcc", "mrr", "recall_at_1", "exact_match")
"""Metrics that are 1 where every answer is right, and only there."""
LOOSE_CALIBRATION = 0.05
"""A confidence further from accuracy than this, beyond chance, is not read as a probability."""


@dataclass(frozen=True)
class Evidence:
    """One line below the verdict; `reason` is its part of the headline when the state is not good."""

    label: str
    state: State
    text: str
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """The answer to "can I trust this model?": as good as its worst evidence."""

    state: State
    headline: str
    lines: list[Evidence]


def build_verdict(test: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> Verdict:
    """Judge the contents of test.json and of the data checks; the first metric of the test counts.

    `bad` are: no score, a baseline that is not beaten, a failed gate, a leak. `care` are: a wide or missing interval, a
    lead that may be chance, no baseline, unreliable confidence, a test split opened more than once.
    """
    primary = next(iter(part_of(test, "metrics")), None)
    evidence = [
        _judge_score(test, primary),
        _judge_baselines(test, primary),
        _judge_gates(test, primary),
        _judge_calibration(test),
        _judge_leaks(findings),
        _judge_opened(test.get("opened")),
    ]
    lines = [line for line in evidence if line]
    worst: State = next((state for state in ("bad", "care") if any(line.state == state for line in lines)), "good")
    reasons = [line.reason for line in lines if line.state == worst and line.reason]
    opening = {"good": "Yes, on rows like those it was tested on", "care": "With care", "bad": "Not yet"}[worst]
    return Verdict(worst, opening + (f": {listed(reasons)}" if reasons else "") + ".", lines)


def _judge_score(test: Mapping[str, Any], primary: str | None) -> Evidence:
    score = part_of(test, "metrics").get(primary) or {}
    if primary is None or not is_number(score.get("value")):
        return Evidence("Score", "bad", "There is no score on held-out rows.", "it has no score on held-out rows")
    rows = f" on {describe_tested(test)} that it never saw in training" if is_number(test.get("rows")) else ""
    value, digits = score["value"], decimals_of(primary)
    better = "" if is_larger_better(primary) else "; lower is better"
    text = f"Its {name_of(primary)} is {format_number(value, digits)}{rows}{better}."
    interval = format_interval(score, digits)
    if not interval:
        text += f" It has no interval{_explain_no_interval(test, primary, value)}."
        return Evidence("Score", "care", text, "the score has no interval")
    level = test.get("confidence")
    text += f" The {f'{100 * level:g}% ' if is_number(level) else ''}interval is {interval}."
    if score["high"] - score["low"] > WIDE_INTERVAL * (value if primary in RELATIVE else 1):
        return Evidence("Score", "care", f"{text} It is wide: more test rows would tell more.", "the interval is wide")
    return Evidence("Score", "good", text)


def _explain_no_interval(test: Mapping[str, Any], primary: str, value: float) -> str:
    if test.get("rows") == 1:
        return ": one row shows nothing of chance. Test on more"
    drawn = test.get("groups") or test.get("rows")
    if primary not in NO_MISTAKE or value != 1 or not drawn:
        return ""
    share = 1 - 0.05 ** (1 / drawn)  # Clopper & Pearson 1934, one-sided, for no mistake at all
    return f": no answer was wrong, and so few tests cannot rule out that {100 * share:.1f}% of others are"


def _judge_baselines(test: Mapping[str, Any], primary: str | None) -> Evidence:
    sign = 1 if is_larger_better(primary or "") else -1
    found = []  # (how far ahead, state, name, difference)
    for name, baseline in part_of(test, "baselines").items():
        gap = part_of(baseline, "difference").get(primary) or {}
        if is_number(gap.get("value")):
            ends = sorted(sign * gap[end] for end in ("low", "high") if is_number(gap.get(end)))
            ahead = sign * gap["value"]
            state: State = "bad" if ahead <= 0 else "good" if ends and ends[0] > 0 else "care"
            found.append((ahead, state, name_of(name), gap))
    if not found:
        text = "It was compared with no simpler method, so the score has no yardstick."
        return Evidence("Baselines", "care", text, "no baseline was run")
    found.sort(key=lambda one: one[0])
    states = [one[1] for one in found]
    _, _, strongest, gap = found[0]
    won = "all" if states.count("good") == len(states) > 1 else f"{states.count('good')} of"
    digits = decimals_of(primary)
    interval = f" ({format_interval(gap, digits)})" if format_interval(gap, digits) else ""
    text = (
        f"Clearly better than {won} {count_of(len(found), 'simpler method')}. The difference to the strongest, "
        f"{quoted(strongest)}, is {format_signed(gap['value'], digits)}{interval}."
    )
    if "bad" in states:
        return Evidence("Baselines", "bad", text, "a simpler method does as well")
    if "care" in states:
        return Evidence("Baselines", "care", text, "its lead over a simpler method may be chance")
    return Evidence("Baselines", "good", text)


def _judge_gates(test: Mapping[str, Any], primary: str | None) -> Evidence | None:
    gates: Mapping[str, Mapping[str, Any]] = part_of(test, "gates")
    if not gates:
        return None
    words = {key: _gate_words(key, gate, primary) for key, gate in gates.items()}
    failed = [words[key] for key, gate in gates.items() if not gate.get("passed")]
    if failed:
        text = f"{len(failed)} of {len(gates)} failed: {listed(failed)}."
        return Evidence("Gates", "bad", text, f"it fails {'a gate' if len(failed) == 1 else f'{len(failed)} gates'}")
    return Evidence("Gates", "good", f"Passed: {listed(list(words.values()))}.")


def gate_decimals(key: str, primary: str | None) -> int:
    """How many decimals a gate's value has: `beats_baselines` is about the first metric, others are named by theirs."""
    return decimals_of(primary if key == BEATS_BASELINES else key)


def _gate_words(key: str, gate: Mapping[str, Any], primary: str | None) -> str:
    condition = format_condition(gate.get("condition"))
    # A gate whose name is already a sentence says its condition only in the table of gates.
    words = (
        f"{name_of(key)} {condition}"
        if condition[:1] in tuple("<>\N{LESS-THAN OR EQUAL TO}\N{GREATER-THAN OR EQUAL TO}")
        else name_of(key)
    )
    return (
        words
        if gate.get("passed") or not is_number(gate.get("value"))
        else f"{words} (got {format_number(gate['value'], gate_decimals(key, primary))})"
    )


def compute_gap(bins: Iterable[Bin]) -> float | None:
    """Mean distance between confidence and accuracy, weighted by rows (expected calibration error); None if empty."""
    return _mean_of(bins, lambda one: abs(one["confidence"] - one["accuracy"]))


def compute_chance_gap(bins: Iterable[Bin]) -> float | None:
    """The gap that bins as large as these show on average when confidence is honest; None if empty.

    A bin of n rows with confidence c has an accuracy of standard deviation sqrt(c (1 - c) / n), and a normal variable
    lies sqrt(2 / pi) standard deviations from its mean on average.
    """
    return _mean_of(
        bins, lambda one: math.sqrt(2 / math.pi * max(0.0, one["confidence"] * (1 - one["confidence"])) / one["count"])
    )


def _mean_of(bins: Iterable[Bin], distance: Callable[[Bin], float]) -> float | None:
    full = [
        one for one in bins if one.get("count") and is_number(one.get("confidence")) and is_number(one.get("accuracy"))
    ]
    rows = sum(one["count"] for one in full)
    return sum(one["count"] * distance(one) for one in full) / rows if rows else None


def _judge_calibration(test: Mapping[str, Any]) -> Evidence | None:
    reliability = part_of(test, "reliability")
    before, bins = compute_gap(part_of(reliability, "before")), part_of(reliability, "after")
    gap, chance = compute_gap(bins), compute_chance_gap(bins)
    if gap is None or chance is None:
        return None
    text = f"Its confidence is off by {100 * gap:.1f} points on average"
    if before is not None and is_scaled(test.get("temperature")):
        text += f" ({100 * before:.1f} before the temperature {test['temperature']:.2f})"
    if gap - chance > LOOSE_CALIBRATION:
        return Evidence(
            "Calibration", "care", f"{text}: do not read it as a probability.", "its confidence is unreliable"
        )
    if gap > LOOSE_CALIBRATION:
        return Evidence("Calibration", "good", f"{text}; with so few rows {100 * chance:.1f} points are chance.")
    return Evidence("Calibration", "good", f"{text}: it can be read as a probability.")


def is_scaled(temperature: Any) -> bool:
    """Whether scores were calibrated: a temperature of 1 changes nothing."""
    return is_number(temperature) and temperature != 1


def _judge_leaks(findings: Sequence[Mapping[str, Any]]) -> Evidence:
    leaks = [one for one in findings if "leak" in str(one.get("kind")) and one.get("count") != 0]
    if not leaks:
        return Evidence("Leaks", "good", "No text of the test split was found in what it learned from.")
    text = " ".join(str(one.get("message") or name_of(one.get("kind"))) for one in leaks)
    if any(one.get("severity") == "error" for one in leaks):
        return Evidence("Leaks", "bad", text, "the splits share texts")
    # Dropped rows are a warning to the owner of the data and say nothing against the score.
    if any(one.get("severity") == "warning" and "dropped" not in str(one.get("message")) for one in leaks):
        return Evidence("Leaks", "care", text, "the splits share near duplicates")
    return Evidence("Leaks", "good", text)


def _judge_opened(opened: Any) -> Evidence:
    if not is_number(opened):
        return Evidence(
            "Test split", "care", "How often it was opened is not recorded.", "the test split is not accounted for"
        )
    if opened > 1:
        text = (
            f"Opened {opened} times. Each look invites choices that fit these rows, so the score is likely too "
            "hopeful: confirm it on fresh rows before you rely on it."
        )
        return Evidence("Test split", "care", text, f"the test split was opened {opened} times")
    return Evidence("Test split", "good", "Opened once.")
