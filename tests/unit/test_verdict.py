"""The first lines of the report: what counts for a model, what counts against it, and in which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from finetune.evaluation.verdict import Evidence, build_verdict, compute_chance_gap, compute_gap

BINS = [{"low": 0.8, "high": 0.9, "count": 300, "confidence": 0.85, "accuracy": 0.86}]
GOOD: dict[str, Any] = {
    "rows": 1000,
    "confidence": 0.95,
    "opened": 1,
    "metrics": {"macro_f1": {"value": 0.9, "low": 0.88, "high": 0.92}},
    "baselines": {"tfidf_logreg": {"difference": {"macro_f1": {"value": 0.17, "low": 0.14, "high": 0.2}}}},
    "gates": {"macro_f1": {"condition": ">= 0.80", "value": 0.9, "passed": True}},
    "temperature": 1.31,
    "reliability": {"before": BINS, "after": BINS},
}


def judge(label: str, *findings: dict[str, Any], **test: Any) -> Evidence:
    """The line of that label."""
    return next(line for line in build_verdict(test, findings).lines if line.label == label)


def test_good_model_gets_a_yes() -> None:
    verdict = build_verdict(GOOD, [])
    assert verdict.state == "good"
    assert verdict.headline == "Yes, on rows like those it was tested on."
    labels = ["Score", "Baselines", "Gates", "Calibration", "Leaks", "Test split"]
    assert [line.label for line in verdict.lines] == labels


@pytest.mark.parametrize(
    ("rows", "value", "words"),
    [
        (1, 1.0, "It has no interval: one row shows nothing of chance. Test on more."),
        (9, 0.0, "It has no interval."),
        # 1 - .05^(1/60): where 4.87 % are wrong, 60 rows hold no mistake in one of twenty tests.
        (60, 1.0, "no answer was wrong, and so few tests cannot rule out that 4.9% of others are."),
    ],
)
def test_a_score_without_an_interval_is_a_caution(rows: int, value: float, words: str) -> None:
    metrics = {"macro_f1": {"value": value, "low": None, "high": None}}
    line = judge("Score", metrics=metrics, rows=rows)
    assert line.state == "care"
    assert line.text.endswith(words)


def test_what_has_no_classes_is_not_asked_for_calibration() -> None:
    verdict = build_verdict({key: part for key, part in GOOD.items() if key not in ("temperature", "reliability")}, [])
    assert verdict.state == "good"
    assert "Calibration" not in [line.label for line in verdict.lines]


def test_opening_the_test_split_again_is_a_caution() -> None:
    (line,) = [line for line in build_verdict(GOOD, []).lines if line.label == "Test split"]
    assert line.text == "Opened once.", "the file does not know what was chosen before"
    verdict = build_verdict(GOOD | {"opened": 3}, [])
    assert (verdict.state, verdict.headline) == ("care", "With care: the test split was opened 3 times.")
    assert verdict.lines[-1].text == (
        "Opened 3 times. Each look invites choices that fit these rows, so the score is likely too hopeful: confirm it "
        "on fresh rows before you rely on it."
    )


@pytest.mark.parametrize(
    ("metric", "value", "half", "words", "state"),
    [
        ("macro_f1", 0.9, 0.02, "Its macro-F1 is 0.900 on 1,000 rows that it never saw in training.", "good"),
        ("macro_f1", 0.9, 0.06, "The 95% interval is 0.840 to 0.960. It is wide", "care"),
        ("bleu", 33.43, 1.31, "The 95% interval is 32.1 to 34.7.", "good"),
        ("bleu", 33.43, 1.7, "The 95% interval is 31.7 to 35.1. It is wide", "care"),
        ("bleu", 8.0, 1.31, "The 95% interval is 6.7 to 9.3. It is wide", "care"),
        ("chrf", 58.25, 2.5, "is 58.2 on 1,000 rows", "good"),
        ("perplexity", 31.456, 1.2, "is 31.46 on 1,000 rows that it never saw in training; lower is better.", "good"),
        ("perplexity", 31.456, 1.6, "The 95% interval is 29.86 to 33.06. It is wide", "care"),
        ("perplexity", 1234.5, 50.0, "The 95% interval is 1,184.50 to 1,284.50.", "good"),
        ("loss", 1.4692, 0.04, "is 1.469 on 1,000 rows that it never saw in training; lower is better.", "good"),
        ("loss", 1.4692, 0.06, "The 95% interval is 1.409 to 1.529. It is wide", "care"),
    ],
)
def test_a_score_is_written_and_judged_on_the_scale_of_its_metric(
    metric: str, value: float, half: float, words: str, state: str
) -> None:
    metrics = {metric: {"value": value, "low": value - half, "high": value + half}}
    line = judge("Score", **GOOD | {"metrics": metrics})
    assert words in line.text
    assert line.state == state


@pytest.mark.parametrize(
    ("metric", "difference", "state", "reason"),
    [
        ("macro_f1", (0.02, 0.01, 0.03), "good", ""),
        ("macro_f1", (0.02, -0.01, 0.05), "care", "its lead over a simpler method may be chance"),
        ("macro_f1", (-0.02, -0.03, 0.01), "bad", "a simpler method does as well"),
        ("log_loss", (-0.02, -0.03, -0.01), "good", ""),
        ("log_loss", (0.02, 0.01, 0.03), "bad", "a simpler method does as well"),
        ("bleu", (12.3, 11.2, 13.4), "good", ""),
        ("perplexity", (-0.82, -0.9, -0.7), "good", ""),
        ("perplexity", (-0.82, -1.9, 0.2), "care", "its lead over a simpler method may be chance"),
        ("perplexity", (0.82, 0.7, 0.9), "bad", "a simpler method does as well"),
    ],
)
def test_baselines_are_judged_by_the_interval_of_the_difference(
    metric: str, difference: tuple[float, ...], state: str, reason: str
) -> None:
    gap = dict(zip(("value", "low", "high"), difference, strict=True))
    line = judge(
        "Baselines",
        metrics={metric: {"value": 0.5, "low": 0.48, "high": 0.52}},
        baselines={"majority": {"difference": {metric: gap}}},
    )
    assert (line.state, line.reason) == (state, reason)


@pytest.mark.parametrize(
    ("metric", "words"), [("bleu", "+12.3 (11.2 to 13.4)"), ("macro_f1", "+12.270 (11.153 to 13.412)")]
)
def test_a_difference_has_the_decimals_of_its_metric(metric: str, words: str) -> None:
    gap = {"value": 12.27, "low": 11.153, "high": 13.412}
    test = {"metrics": {metric: {"value": 30.0}}, "baselines": {"majority": {"difference": {metric: gap}}}}
    assert judge("Baselines", **test).text.endswith(f"is {words}.")


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        (
            {"macro_f1": {"condition": ">= 0.95", "value": 0.9, "passed": False}},
            "1 of 1 failed: macro-F1 \N{GREATER-THAN OR EQUAL TO} 0.95 (got 0.900).",
        ),
        (
            {"perplexity": {"condition": "<= 30", "value": 31.4561, "passed": False}},
            "1 of 1 failed: perplexity \N{LESS-THAN OR EQUAL TO} 30 (got 31.46).",
        ),
        (
            {"beats_baselines": {"condition": "bleu above majority's 33.5", "value": 33.42, "passed": False}},
            "1 of 1 failed: beats the baselines (got 33.4).",
        ),
    ],
)
def test_failed_gate_is_not_yet(gates: dict[str, Any], words: str) -> None:
    metrics = {"bleu": {"value": 33.42, "low": 32.4, "high": 34.5}}
    assert build_verdict(GOOD | {"gates": gates}, []).headline == "Not yet: it fails a gate."
    assert judge("Gates", metrics=metrics, gates=gates).text == words


@pytest.mark.parametrize(
    ("kind", "severity", "message", "state"),
    [
        ("leak", "error", "train: must not share texts with test.", "bad"),
        ("near_leak", "warning", "train: must not share texts with test.", "care"),
        ("leak", "warning", "train: dropped 14 rows with the same text in test.", "good"),
        ("duplicates", "warning", "twice", "good"),
    ],
)
def test_leaks_left_in_the_splits_speak_against_the_score(kind: str, severity: str, message: str, state: str) -> None:
    finding = {"kind": kind, "severity": severity, "split": "train", "count": 14, "message": message, "rows": []}
    assert judge("Leaks", finding).state == state


def test_gap_is_the_expected_calibration_error() -> None:
    # By hand: (30 * |0.9 - 0.8| + 10 * |0.6 - 0.7|) / 40 = 0.1
    full = [{"count": 30, "confidence": 0.9, "accuracy": 0.8}, {"count": 10, "confidence": 0.6, "accuracy": 0.7}]
    empty = {"count": 0, "confidence": None, "accuracy": None}
    assert compute_gap([*full, empty]) == pytest.approx(0.1)
    assert compute_gap([empty]) is None


def test_chance_gap_is_what_honest_confidence_shows() -> None:
    rng = np.random.default_rng(13)
    gaps, expected = [], []
    for _ in range(300):
        confidences = rng.uniform(0.5, 1.0, 400)
        right = rng.random(400) < confidences
        index = (confidences * 10).astype(int)
        bins = [
            {"count": int(found.sum()), "confidence": confidences[found].mean(), "accuracy": right[found].mean()}
            for found in (index == b for b in range(5, 10))
        ]
        gaps.append(compute_gap(bins))
        expected.append(compute_chance_gap(bins))
    assert np.mean(expected) == pytest.approx(np.mean(gaps), rel=0.05)


def test_gap_of_few_rows_is_put_down_to_chance() -> None:
    bins = [{"low": 0.6, "high": 0.7, "count": 20, "confidence": 0.66, "accuracy": 0.55}]
    line = judge("Calibration", temperature=1.0, reliability={"before": bins, "after": bins})
    assert line.state == "good"
    assert line.text == "Its confidence is off by 11.0 points on average; with so few rows 8.5 points are chance."


def test_loose_confidence_is_a_caution() -> None:
    bins = [{"low": 0.9, "high": 1.0, "count": 120, "confidence": 0.98, "accuracy": 0.7}]
    verdict = build_verdict(GOOD | {"reliability": {"before": bins, "after": bins}}, [])
    assert verdict.headline == "With care: its confidence is unreliable."
