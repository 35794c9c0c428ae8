"""The report page: its words, its numbers, its markup and the geometry of its charts."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluation import charts, wording
from finetune.evaluation.report import ReportData, render_report, write_report
from finetune.evaluation.verdict import build_verdict, compute_chance_gap, compute_gap

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}
GEOMETRY = (
    "x",
    "y",
    "x1",
    "x2",
    "y1",
    "y2",
    "cx",
    "cy",
    "r",
    "width",
    "height",
    "d",
    "dx",
    "rx",
    "fill-opacity",
    "viewbox",
)


class Page(HTMLParser):
    """Reads a page and fails on a tag that is closed in the wrong place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def score(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def make_bins(confidences: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    index = np.minimum((confidences * 10).astype(int), 9)
    return [
        {
            "low": b / 10,
            "high": (b + 1) / 10,
            "count": int((index == b).sum()),
            "confidence": float(confidences[index == b].mean()) if (index == b).any() else None,
            "accuracy": float(right[index == b].mean()) if (index == b).any() else None,
        }
        for b in range(10)
    ]


def make_data(classes: int = 3, **test: Any) -> ReportData:
    """A report on 40 rows a class, of which 4 go to the next class."""
    labels = [f"class {number}" for number in range(classes)]
    confusion = (36 * np.eye(classes, dtype=int) + 4 * np.roll(np.eye(classes, dtype=int), 1, axis=1)).tolist()
    rng = np.random.default_rng(13)
    confidences = rng.uniform(0.6, 1.0, 40 * classes)
    bins = make_bins(confidences, rng.random(40 * classes) < confidences)
    baseline = {
        "metrics": {"macro_f1": score(0.7312), "accuracy": score(0.7521)},
        "difference": {"macro_f1": {"value": 0.1688, "low": 0.1402, "high": 0.1977, "p_value": 0.002}},
        "settings": {"C": 10.0},
    }
    tested = {
        "split": "test",
        "rows": 40 * classes,
        "labels": labels,
        "confidence": 0.95,
        "resamples": 1000,
        "seed": 13,
        "opened": 1,
        "metrics": {"macro_f1": score(0.9), "accuracy": score(0.9123)},
        "baselines": {"tfidf_logreg": baseline},
        "per_class": {label: {"precision": 0.9, "recall": 0.9, "f1": 0.9, "support": 40} for label in labels},
        "confusion": confusion,
        "temperature": 1.31,
        "reliability": {"before": bins, "after": bins},
        "slices": {"length": [{"value": "1-8 words", "rows": 12, "metrics": {"macro_f1": score(0.8456)}}]},
        "gates": {"macro_f1": {"condition": ">= 0.80", "value": 0.9, "passed": True}},
    }
    steps = [
        {"event": "step", "step": step, "loss": 2 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "seconds": 0.1}
        for step in range(1, 41)
    ]
    looks = [
        {"event": "evaluation", "step": step, "metrics": {"loss": 0.4, "macro_f1": 0.88, "accuracy": 0.9}}
        for step in (20, 40)
    ]
    return ReportData(
        name="sentiment",
        created="2026-11-22T17:10:00+00:00",
        test=tested | test,
        validation={"metrics": {"macro_f1": score(0.8877)}},
        events=[*steps, *looks],
        findings=[
            {
                "kind": "conflicting_labels",
                "severity": "warning",
                "split": "train",
                "count": 6,
                "message": "6 texts carry two labels.",
                "rows": [f"train:{row}" for row in range(1, 9)],
            }
        ],
        mistakes=[
            {"id": "test:7", "text": "fine", "reference": labels[0], "prediction": labels[1], "confidence": 0.9871}
        ],
        facts={"Data": {"Licence": "MIT"}},
        recipe_yaml="recipe: 1\nname: sentiment\n",
    )


def verdict_of(data: ReportData) -> Any:
    return build_verdict(data.test, data.findings)


def assert_finite(page: Page) -> None:
    for _, attributes in page.tags:
        for key in GEOMETRY:
            assert not re.search(r"nan|inf|None|e[+]?\d\d\d", attributes.get(key) or "", re.IGNORECASE)


@pytest.mark.parametrize("classes", [2, 3, 12, 77])
def test_page_is_well_formed_and_fetches_nothing(classes: int) -> None:
    html = render_report(make_data(classes))
    page = Page(html)
    assert_finite(page)
    assert "http://" not in html
    assert "https://" not in html
    assert "src=" not in html
    assert "url(" not in html
    assert not page.named("script")
    assert not page.named("link")
    assert all((link["href"] or "").startswith("#") for link in page.named("a"))


def test_links_lead_to_sections() -> None:
    page = Page(render_report(make_data()))
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {(link["href"] or "")[1:] for link in page.named("a")} <= targets


def test_pictures_are_named_or_hidden_and_tables_have_headers() -> None:
    page = Page(render_report(make_data(77)))
    outer = [
        svg for svg in page.named("svg") if "chart" in (svg.get("class") or "") or "mark" in (svg.get("class") or "")
    ]
    assert outer
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in outer)
    assert all(header.get("scope") in ("col", "row") for header in page.named("th"))
    assert [name for name, _ in page.tags].count("h1") == 1


def test_numbers_are_those_given() -> None:
    text = Page(render_report(make_data())).text
    for number in ("0.900", "0.912", "0.731", "0.752", "+0.169", "0.140 to 0.198, p = 0.002", "0.888", "0.846"):
        assert number in text
    assert "at 0.987" in text
    assert "C = 10.0" in text
    assert "Macro-F1 is 0.900 on 120 rows that it never saw in training. The 95% interval is 0.880 to 0.920." in text
    assert "1,000 bootstrap resamples" in text


def test_confusion_counts_are_those_given() -> None:
    matrix = [[3, 1], [0, 1204]]
    page = Page(render_report(make_data(2, confusion=matrix)))
    table = page.text[page.text.index("Rows: the label in the data") :]
    assert re.search(r"class 0 3 75% 1 25% class 1 0 1,204 100%", table)


def test_many_classes_get_their_most_confused_pairs() -> None:
    confusion = np.diag([40] * 77)
    confusion[5, 9], confusion[6, 2] = 11, 7
    page = Page(render_report(make_data(77, confusion=confusion.tolist())))
    assert "The 2 most frequent confusions of 18 mistakes" in page.text
    assert page.text.index("class 5 class 9 11 22%") < page.text.index("class 6 class 2 7 15%")
    assert sum(rect.get("class") == "wrong" for rect in page.named("rect")) == 2


def test_classes_are_sorted_worst_first_and_unknown_last() -> None:
    per_class = {
        name: {"precision": f1, "recall": f1, "f1": f1, "support": 4}
        for name, f1 in {"good": 0.9, "absent": math.nan, "poor": 0.2}.items()
    }
    text = Page(render_report(make_data(per_class=per_class))).text
    table = text[text.index("Class by class") :]
    assert table.index("poor") < table.index("good") < table.index("absent")


def test_every_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>"
    data = make_data()
    test = data.test | {
        "labels": [evil, "b", "c"],
        "per_class": {evil: {"f1": 0.5}},
        "slices": {evil: [{"value": evil, "rows": 1, "metrics": {}}]},
        "baselines": {evil: {"metrics": {}, "difference": {"macro_f1": score(0.1)}, "settings": {evil: evil}}},
        "gates": {evil: {"condition": evil, "value": 0, "passed": False}},
    }
    finding = dict.fromkeys(("kind", "severity", "split", "message"), evil) | {"count": 1, "rows": [evil]}
    mistake = {"id": evil, "text": evil, "reference": evil, "prediction": evil, "confidence": 0.5}
    data = ReportData(evil, evil, test, data.validation, data.events, [finding], [mistake], {evil: {evil: evil}}, evil)
    page = Page(render_report(data))
    assert not page.named("script")
    assert page.text.count(evil) >= 15


def test_names_in_charts_are_escaped() -> None:
    matrix = np.ones((13, 13), dtype=int).tolist()
    page = Page(str(charts.heat_map(matrix, ['"><script>'] * 13, '" onload="x')))
    assert not page.named("script")
    assert page.named("svg")[0]["aria-label"] == '" onload="x'


def test_empty_parts_are_left_out() -> None:
    page = Page(render_report(ReportData("empty", "", {}, {}, [], [], [], {}, "")))
    assert "Not yet: it has no score on held-out rows." in page.text
    assert "The checks found nothing to report." in page.text
    for part in ("training", "confusion", "classes", "calibration", "slices", "mistakes", "facts", "recipe"):
        assert part not in {section.get("id") for section in page.named("section")}


@pytest.mark.parametrize("nothing", [None, {}])
@pytest.mark.parametrize(
    "key",
    [
        "baselines",
        "per_class",
        "confusion",
        "reliability",
        "slices",
        "gates",
        "temperature",
        "opened",
        "rows",
        "metrics",
    ],
)
def test_any_part_may_be_missing(key: str, nothing: Any) -> None:
    Page(render_report(make_data(**{key: nothing})))
    data = make_data()
    Page(render_report(dataclasses.replace(data, test={name: part for name, part in data.test.items() if name != key})))


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_missing_numbers_become_dashes(nothing: Any) -> None:
    empty = {"value": nothing, "low": nothing, "high": nothing}
    baseline = {
        "metrics": {"macro_f1": empty},
        "difference": {"macro_f1": empty | {"p_value": nothing}},
        "settings": {},
    }
    test = {
        "metrics": {"macro_f1": empty, "accuracy": score(0.9)},
        "baselines": {"majority": baseline},
        "slices": {"length": [{"value": "short", "rows": 3, "metrics": {"macro_f1": empty}}]},
        "per_class": {"class 0": dict.fromkeys(("precision", "recall", "f1", "support"), nothing)},
    }
    page = Page(render_report(make_data(**test)))
    assert_finite(page)
    assert "nan" not in page.text
    assert "None" not in page.text
    assert wording.DASH in page.text


def test_one_evaluation_is_a_dot_and_broken_losses_are_skipped() -> None:
    steps = [{"event": "step", "step": step, "loss": loss} for step, loss in enumerate((1.0, math.nan, math.inf, 0.5))]
    look = {"event": "evaluation", "step": 3, "metrics": {"macro_f1": 0.5, "loss": None}}
    page = Page(render_report(dataclasses.replace(make_data(), events=[*steps, look, {"event": "done"}])))
    assert_finite(page)
    assert "Validation macro-F1" in page.text


def test_good_model_gets_a_yes() -> None:
    verdict = verdict_of(make_data())
    assert verdict.state == "good"
    assert verdict.headline == "Yes, on rows like those it was tested on."
    assert [line.label for line in verdict.lines] == [
        "Score", "Baselines", "Gates", "Calibration", "Leaks", "Test split",
    ]  # fmt: skip


def test_opening_the_test_split_again_is_a_caution() -> None:
    page = Page(render_report(make_data(opened=3)))
    assert "With care: the test split was opened 3 times." in page.text
    assert "confirm it on fresh rows before you rely on it" in page.text
    assert "Caution" in {svg.get("aria-label") for svg in page.named("svg")}
    assert "opened 3 times" not in Page(render_report(make_data())).text


@pytest.mark.parametrize(
    ("metric", "difference", "state", "reason"),
    [
        ("macro_f1", (0.02, 0.01, 0.03), "good", ""),
        ("macro_f1", (0.02, -0.01, 0.05), "care", "its lead over a simpler method may be chance"),
        ("macro_f1", (-0.02, -0.03, 0.01), "bad", "a simpler method does as well"),
        ("log_loss", (-0.02, -0.03, -0.01), "good", ""),
        ("log_loss", (0.02, 0.01, 0.03), "bad", "a simpler method does as well"),
    ],
)
def test_baselines_are_judged_by_the_interval_of_the_difference(
    metric: str, difference: tuple[float, ...], state: str, reason: str
) -> None:
    gap = dict(zip(("value", "low", "high"), difference, strict=True))
    test = {"metrics": {metric: score(0.5)}, "baselines": {"majority": {"difference": {metric: gap}}}}
    line = next(line for line in build_verdict(test, []).lines if line.label == "Baselines")
    assert (line.state, line.reason) == (state, reason)


def test_failed_gate_is_not_yet() -> None:
    gates = {"macro_f1": {"condition": ">= 0.95", "value": 0.9, "passed": False}}
    page = Page(render_report(make_data(gates=gates)))
    assert "Not yet: it fails a gate." in page.text
    assert "1 of 1 failed: macro-F1 \N{GREATER-THAN OR EQUAL TO} 0.95 (got 0.900)." in page.text


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
    line = next(line for line in build_verdict({}, [finding]).lines if line.label == "Leaks")
    assert line.state == state


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
        bins = make_bins(confidences, rng.random(400) < confidences)
        gaps.append(compute_gap(bins))
        expected.append(compute_chance_gap(bins))
    assert np.mean(expected) == pytest.approx(np.mean(gaps), rel=0.05)


def test_gap_of_few_rows_is_put_down_to_chance() -> None:
    bins = [{"low": 0.6, "high": 0.7, "count": 20, "confidence": 0.66, "accuracy": 0.55}]
    page = Page(render_report(make_data(temperature=1.0, reliability={"before": bins, "after": bins})))
    assert "Its confidence is off by 11.0 points on average; with so few rows 8.5 points are chance." in page.text
    assert "As trained" in page.text


def test_loose_confidence_is_a_caution() -> None:
    bins = [{"low": 0.9, "high": 1.0, "count": 120, "confidence": 0.98, "accuracy": 0.7}]
    verdict = verdict_of(make_data(reliability={"before": bins, "after": bins}))
    assert verdict.headline == "With care: its confidence is unreliable."


def test_far_baseline_is_an_arrow_and_does_not_stretch_the_axis() -> None:
    far = {"metrics": {"macro_f1": score(0.05)}, "difference": {"macro_f1": score(0.85)}}
    near = {"metrics": {"macro_f1": score(0.88)}, "difference": {"macro_f1": score(0.02, 0.01)}}
    page = Page(render_report(make_data(baselines={"majority": far, "tfidf_logreg": near})))
    assert sum("arrow" in (path.get("class") or "") for path in page.named("path")) == 1
    assert "An arrow stands for a score far off the scale." in page.text


def test_contrast_is_enough_in_both_schemes() -> None:
    html = render_report(make_data())
    schemes = re.findall(
        r"--paper: (#\w+); --ink: (#\w+); --quiet: (#\w+);.*?--accent: (#\w+);.*?--care: (#\w+);", html, re.DOTALL
    )
    assert len(schemes) == 3  # light, dark, print
    for paper, *inks in schemes:
        for ink in inks:
            # WCAG 2.2, success criterion 1.4.3: 4.5 for text.
            assert contrast(paper, ink) >= 4.5


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_write_survives_characters_that_utf8_has_not(tmp_path: Path) -> None:
    mistake = {"id": "test:1", "text": "half \ud83d pair", "reference": "a", "prediction": "b", "confidence": 0.9}
    write_report(tmp_path / "report.html", dataclasses.replace(make_data(), mistakes=[mistake]))
    assert "half ? pair" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_long_texts_are_cut() -> None:
    mistake = {"id": "test:1", "text": "a" * 5000, "reference": "a", "prediction": "b", "confidence": 0.9}
    html = render_report(dataclasses.replace(make_data(), mistakes=[mistake]))
    assert "a" * 600 in html
    assert "a" * 601 not in html


anything = st.one_of(st.none(), st.floats(), st.integers(-(10**9), 10**9))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=30), st.booleans())
def test_curves_stay_on_the_drawing(points: list[tuple[float, float]], from_zero: bool) -> None:
    looks = [charts.Series(points, "faint"), charts.Series(charts.smooth(points)), charts.Series(points, "dots")]
    page = Page(str(charts.curve_chart(looks, "curve", from_zero=from_zero)))
    assert_finite(page)
    for path in page.named("path"):
        for x, y in (pair.split() for pair in re.split("[ML]", path["d"] or "")[1:]):
            assert 0 <= float(x) <= 1000
            assert 0 <= float(y) <= charts.CURVE_HEIGHT


@settings(max_examples=150, deadline=None)
@given(st.lists(st.fixed_dictionaries({"value": anything, "low": anything, "high": anything}), min_size=1, max_size=5))
def test_intervals_stay_on_the_drawing(scores: list[dict[str, Any]]) -> None:
    scale = charts.Scale.around(end for one in scores for end in one.values())
    html = "".join(charts.interval_row(scale, one, reference=scores[0]["value"]) for one in scores)
    page = Page(html + charts.interval_axis(scale))
    assert_finite(page)
    for _, attributes in page.tags:
        for key in ("x1", "x2", "cx"):
            assert 0 <= float((attributes.get(key) or "0%").rstrip("%")) <= 100


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_even_and_inside(low: float, span: float) -> None:
    scale = charts.Scale(low, low + span)
    ticks = scale.ticks()
    assert len(ticks) <= 6
    assert all(scale.low - 1e-6 * span <= tick <= scale.high + 1e-5 * span for tick in ticks)
    if len(ticks) > 2:
        assert np.diff(ticks) == pytest.approx(np.diff(ticks)[0], rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e3, 1e3), st.integers(1, 60))
def test_smoothing_keeps_a_constant(value: float, count: int) -> None:
    assert [y for _, y in charts.smooth([(step, value) for step in range(count)])] == pytest.approx([value] * count)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000))
def test_thinning_keeps_the_mean_step(count: int) -> None:
    thinned = charts.thin([(float(step), float(step)) for step in range(count)], limit=100)
    assert len(thinned) <= 100
    assert all(x == pytest.approx(y) for x, y in thinned)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.8424, "0.842"),
        (-0.0004, "0.000"),
        (-0.25, "\N{MINUS SIGN}0.250"),
        (None, "\N{EN DASH}"),
        (math.inf, "\N{EN DASH}"),
        (True, "\N{EN DASH}"),
    ],
)
def test_numbers_are_written_with_three_decimals(value: Any, written: str) -> None:
    assert wording.format_number(value) == written


@pytest.mark.parametrize(
    ("condition", "written"),
    [
        (">= 0.80", "\N{GREATER-THAN OR EQUAL TO} 0.80"),
        ("macro_f1 above tfidf_logreg's 0.789", "macro-F1 above TF-IDF + logistic regression's 0.789"),
        (True, ""),
        (None, ""),
    ],
)
def test_conditions_are_written_with_the_names_of_the_page(condition: Any, written: str) -> None:
    assert wording.format_condition(condition) == written


def test_long_names_may_break_after_an_underscore() -> None:
    assert str(wording.mark_breaks("card_<b>")) == "card_<wbr>&lt;b&gt;"
