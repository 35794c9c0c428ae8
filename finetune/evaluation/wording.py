"""How the report page names things and writes numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup, escape

from finetune.evaluation.charts import is_number
from finetune.recipe.messages import count_of

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
    "bleu": "BLEU",
    "bleu_zh": "BLEU (Chinese)",
    "chrf": "chrF",
    "mrr": "reciprocal rank (MRR)",
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
    "ndcg_at_10": "NDCG@10",
    "outside_auroc": "AUROC, out of scope",
    "outside_recall_at_95": "out of scope found",
    "answer_f1": "answer F1",
    "has_answer_f1": "answer F1 where there is one",
    "no_answer_accuracy": "accuracy where there is none",
    "majority": "Always the most frequent class",
    "tfidf_logreg": "TF-IDF + logistic regression",
    "frozen_logreg": "Frozen base + logistic regression",
    "unigram": "Token frequencies",
    "ngram": "n-gram model",
    "copy": "The input, copied",
    "nearest": "The target of the nearest input in train",
    "bm25": "Shared words (BM25)",
    "frozen": "Frozen base",
    "fused": "BM25 + frozen base, fused by rank",
    "no_answer": "No answer, always",
    "bm25_sentence": "The sentence nearest to the question (BM25)",
    "popular": "What most people had",
    "popular_week": "What most people had in the last week",
    "own_history": "What the person had, again",
    "item_knn": "What the same people had (item-kNN)",
    "ease": "A linear model of who had what (EASE)",
    "co_occurrence": "What followed the same items",
    "sequence": "The sequence model alone",
    "beats_baselines": "beats the baselines",
}
MEANINGS = {
    "macro_f1": "the mean of the classes\N{RIGHT SINGLE QUOTATION MARK} F1, every class counting the same",
    "weighted_f1": "the mean of the classes\N{RIGHT SINGLE QUOTATION MARK} F1, each counting by its rows",
    "accuracy": "the share of rows that are right",
    "mcc": "agreement beyond chance, from \N{MINUS SIGN}1 to 1",
    "auroc": "how often a row of a class ranks above a row of another",
    "ece": "how far confidence lies from accuracy, on average; lower is better. It has no interval: drawing rows again "
    "only adds to it",
    "brier": "the squared distance of the scores from the truth; lower is better",
    "log_loss": "the surprise at the truth; lower is better",
    "outside_auroc": "how often a text of no class looks more outside than a text with one",
    "outside_recall_at_95": "the share of texts of no class that are found when 95% of the others are kept",
    "loss": "the surprise at each token, in nats; lower is better",
    "perplexity": "among how many equally likely tokens the model would be as unsure; lower is better",
    "bits_per_byte": "the bits that a byte of the text would take up if the model packed it; lower is better",
    "token_accuracy": "the share of tokens that were the model\N{RIGHT SINGLE QUOTATION MARK}s first guess",
    "bleu": "words and phrases shared with the reference, from 0 to 100 (sacreBLEU, tok:13a)",
    "bleu_zh": "characters and phrases shared with the reference, from 0 to 100 (sacreBLEU, tok:zh)",
    "chrf": "runs of up to six characters shared with the reference, from 0 to 100 (sacreBLEU, chrF2)",
    "mrr": "1 over the place of the first right entry, on average",
    "recall_at_1": "the share of questions with a right entry on top",
    "recall_at_5": "the share of right entries that are among the first five",
    "recall_at_10": "the share of right entries that are among the first ten",
    "ndcg_at_10": "how high the right entries stand among the first ten, from 0 to 1",
    "answer_f1": "the words that answer and reference share (SQuAD); for a question without an answer, 1 for silence",
    "exact_match": "the share of answers with the reference\N{RIGHT SINGLE QUOTATION MARK}s words, articles aside",
    "has_answer_f1": "the same for questions that have an answer in their passage",
    "no_answer_accuracy": "the share of questions without an answer that got none",
}
OUTSIDE_SCORES = {"energy": "the energy of the logits", "max_probability": "1 - the largest probability"}
"""What a score of being outside is."""
DECIMALS = {"bleu": 1, "bleu_zh": 1, "chrf": 1, "perplexity": 2}
"""Metric -> decimals, for those that do not live between 0 and 1; three for all others."""


def name_of(key: Any) -> str:
    """What the page calls a metric, a baseline or a check."""
    return NAMES.get(str(key), str(key).replace("_", " "))


def decimals_of(metric: Any) -> int:
    """How many decimals a value of the metric is written with."""
    return DECIMALS.get(str(metric), 3)


def format_number(value: Any, digits: int = 3) -> str:
    """A number with `digits` decimals and thousands separated, or a dash; the minus is typographic."""
    if not is_number(value):
        return DASH
    # "z" turns a minus before nothing but zeros into none.
    return f"{value:z,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def format_signed(value: Any, digits: int = 3) -> str:
    """A difference with its sign, such as `+0.021`."""
    text = format_number(value, digits)
    return text if text.startswith((DASH, "\N{MINUS SIGN}")) else f"+{text}"


def format_count(value: Any) -> str:
    """A count with thousands separated, or a dash."""
    return f"{value:,}" if is_number(value) else DASH


def format_interval(score: Score, digits: int = 3) -> str:
    """`0.821 to 0.861`, or nothing when an end is missing."""
    low, high = score.get("low"), score.get("high")
    if not is_number(low) or not is_number(high):
        return ""
    return f"{format_number(low, digits)} to {format_number(high, digits)}"


def format_score(score: Score, digits: int = 3) -> str:
    """`0.842 (0.821 to 0.861)`."""
    interval = format_interval(score, digits)
    return format_number(score.get("value"), digits) + (f" ({interval})" if interval else "")


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
    found = re.fullmatch(r"(\w+) (above|below) (\w+)'s (\S+)", text)  # such as `bleu above nearest's 6.21345`
    if found:
        metric, word, baseline, value = found.groups()
        return f"{name_of(metric)} {word} {format_number(float(value), decimals_of(metric))} ({name_of(baseline)})"
    text = re.sub(r"[a-z0-9_]+", lambda found: NAMES.get(found[0], found[0]), text)
    return text.replace(">=", "\N{GREATER-THAN OR EQUAL TO}").replace("<=", "\N{LESS-THAN OR EQUAL TO}")


def format_size(size: Any) -> str:
    """Bytes as `1.2 MB`, or a dash."""
    if not is_number(size):
        return DASH
    unit, scale = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if size >= pair[1]), ("kB", 1e3))
    return f"{size / scale:,.1f} {unit}"


def format_duration(seconds: Any) -> str:
    """`8.4 s`, `95 s`, `12 min`, `3.1 h`, or a dash."""
    if not is_number(seconds):
        return DASH
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_share(share: Any, digits: int = 1) -> str:
    """A share as `98.7%`, or a dash; small ones with two figures."""
    if not is_number(share):
        return DASH
    return f"{100 * share:.2g}%" if 0 < abs(share) < 0.001 else f"{100 * share:.{digits}f}%"


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


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def quoted(text: str) -> str:
    """The text in typographic quotation marks."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{text}\N{RIGHT DOUBLE QUOTATION MARK}"


def describe_tested(test: Mapping[str, Any]) -> str:
    """What a score is over: `18 rows`, `106 rows in 12 groups`; of lists `1,119 requests of 182 people`."""
    lists = part_of(test, "lists")
    if not lists.get("requests"):
        groups = f" in {count_of(test['groups'], 'group')}" if test.get("groups") else ""
        return count_of(test["rows"], "row") + groups
    people = "1 person" if lists["people"] == 1 else f"{lists['people']:,} people"
    return f"{count_of(lists['requests'], 'request')} of {people}"


def part_of(part: Mapping[str, Any], key: Any) -> Any:
    """The mapping or list under `key`; an empty mapping when it is missing or None."""
    return part.get(key) or {}
