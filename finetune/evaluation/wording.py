"""How the report page names things and writes numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup, escape

from finetune.evaluation.charts import is_number

Score = Mapping[str, Any]
"""{"value", "low", "high"}; each may be missing, None or nan."""

DASH = "\N{EN DASH}"
NAMES = {
    "macro_f1": "macro-F1",
    "weighted_f1": "weighted F1",
    "mcc": "correlation (MCC)",
    "auroc": "AUROC",
    "ece": "calibration error (ECE)",
    "brier": "Brier score",
    "log_loss": "log loss",
    "majority": "Always the most frequent class",
    "tfidf_logreg": "TF-IDF + logistic regression",
    "frozen_logreg": "Frozen base + logistic regression",
    "beats_baselines": "beats the baselines",
}
MEANINGS = {
    "macro_f1": "the mean of the classes\N{RIGHT SINGLE QUOTATION MARK} F1, every class counting the same",
    "weighted_f1": "the mean of the classes\N{RIGHT SINGLE QUOTATION MARK} F1, each counting by its rows",
    "accuracy": "the share of rows that are right",
    "mcc": "agreement beyond chance, from \N{MINUS SIGN}1 to 1",
    "auroc": "how often a row of a class ranks above a row of another",
    "ece": "how far confidence lies from accuracy, on average; lower is better",
    "brier": "the squared distance of the scores from the truth; lower is better",
    "log_loss": "the surprise at the truth; lower is better",
}


def name_of(key: Any) -> str:
    """What the page calls a metric, a baseline or a check."""
    return NAMES.get(str(key), str(key).replace("_", " "))


def format_number(value: Any, digits: int = 3) -> str:
    """A number with `digits` decimals, or a dash; the minus is typographic."""
    if not is_number(value):
        return DASH
    # "z" turns a minus before nothing but zeros into none.
    return f"{value:z.{digits}f}".replace("-", "\N{MINUS SIGN}")


def format_signed(value: Any) -> str:
    """A difference with its sign, such as `+0.021`."""
    text = format_number(value)
    return text if text.startswith((DASH, "\N{MINUS SIGN}")) else f"+{text}"


def format_count(value: Any) -> str:
    """A count with thousands separated, or a dash."""
    return f"{value:,}" if is_number(value) else DASH


def format_interval(score: Score) -> str:
    """`0.821 to 0.861`, or nothing when an end is missing."""
    low, high = score.get("low"), score.get("high")
    return f"{format_number(low)} to {format_number(high)}" if is_number(low) and is_number(high) else ""


def format_score(score: Score) -> str:
    """`0.842 (0.821 to 0.861)`."""
    interval = format_interval(score)
    return format_number(score.get("value")) + (f" ({interval})" if interval else "")


def format_p(value: Any) -> str:
    """`p = 0.012`, `p < 0.001`, or nothing."""
    if not is_number(value):
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def format_condition(condition: Any) -> str:
    """A gate's condition with names and signs as the page writes them; nothing for one that is only on or off."""
    text = str(condition if condition is not None else "")
    if text.lower() in ("true", "false"):
        return ""
    text = re.sub(r"[a-z0-9_]+", lambda found: NAMES.get(found[0], found[0]), text)
    return text.replace(">=", "\N{GREATER-THAN OR EQUAL TO}").replace("<=", "\N{LESS-THAN OR EQUAL TO}")


def format_created(created: str) -> str:
    """An ISO 8601 moment as `22 November 2026, 17:10 UTC`; anything else as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


def mark_breaks(text: Any) -> Markup:
    """The escaped text, which a narrow column may break after an underscore."""
    return escape(text).replace("_", Markup("_<wbr>"))


def count_of(count: int, one: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def capitalised(text: str) -> str:
    """The text with its first letter large and the others as they are."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def quoted(text: str) -> str:
    """The text in typographic quotation marks."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{text}\N{RIGHT DOUBLE QUOTATION MARK}"


def part_of(part: Mapping[str, Any], key: Any) -> Any:
    """The mapping or list under `key`; an empty mapping when it is missing or None."""
    return part.get(key) or {}
