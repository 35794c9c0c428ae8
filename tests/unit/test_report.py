"""The report page of a classifier: its words, its numbers and its markup."""

from __future__ import annotations

import dataclasses
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.evaluation import wording
from finetune.evaluation.report import ReportData, _build_confusion, render_report, write_report
from finetune.evaluation.verdict import compute_chance_gap


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
        "selective": {
            "area": 0.9512,
            "points": [
                {"coverage": i / 20, "accuracy": 1 - 0.1 * (i / 20) ** 2, "confidence": 1 - i / 40}
                for i in range(1, 21)
            ],
        },
        "outside": {"label": "none of these", "rows": 25, "score": "energy", "threshold": -2.5, "kept": 0.9417},
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


@pytest.mark.parametrize("classes", [2, 3, 12, 77])
def test_page_is_well_formed_and_fetches_nothing(read_page: Any, classes: int) -> None:
    html = render_report(make_data(classes))
    page = read_page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "src=" not in html
    assert "url(" not in html
    assert not page.named("script")
    assert not page.named("link")
    assert all((link["href"] or "").startswith("#") for link in page.named("a"))


def test_links_lead_to_sections(read_page: Any) -> None:
    page = read_page(render_report(make_data()))
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {(link["href"] or "")[1:] for link in page.named("a")} <= targets


def test_pictures_are_named_or_hidden_and_tables_have_headers(read_page: Any) -> None:
    page = read_page(render_report(make_data(77)))
    outer = [
        svg for svg in page.named("svg") if "chart" in (svg.get("class") or "") or "mark" in (svg.get("class") or "")
    ]
    assert outer
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in outer)
    assert all(header.get("scope") in ("col", "row") for header in page.named("th"))
    assert [name for name, _ in page.tags].count("h1") == 1


def test_numbers_are_those_given(read_page: Any) -> None:
    text = read_page(render_report(make_data())).text
    for number in ("0.900", "0.912", "0.731", "0.752", "+0.169", "0.140 to 0.198, p = 0.002", "0.888", "0.846"):
        assert number in text
    assert "at 0.987" in text
    assert "C = 10.0" in text
    assert "Its macro-F1 is 0.900 on 120 rows that it never saw in training. " in text
    assert "The 95% interval is 0.880 to 0.920." in text
    assert "1,000 bootstrap resamples" in text


def test_confusion_counts_are_those_given(read_page: Any) -> None:
    matrix = [[3, 1], [0, 1204]]
    page = read_page(render_report(make_data(2, confusion=matrix)))
    table = page.text[page.text.index("Rows: the label in the data") :]
    assert re.search(r"class 0 3 75% 1 25% class 1 0 1,204 100%", table)


def test_many_classes_get_their_most_confused_pairs(read_page: Any) -> None:
    confusion = np.diag([40] * 77)
    confusion[5, 9], confusion[6, 2] = 11, 7
    page = read_page(render_report(make_data(77, confusion=confusion.tolist())))
    assert "The 2 most frequent confusions of 18 mistakes" in page.text
    assert page.text.index("class 5 class 9 11 22%") < page.text.index("class 6 class 2 7 15%")
    assert sum(rect.get("class") == "wrong" for rect in page.named("rect")) == 2


def test_a_matrix_of_many_classes_takes_little_memory() -> None:
    """What is not shown is not built: a dict for each cell took 25 MB."""
    confusion = np.diag([40] * 300).tolist()
    test = {"confusion": confusion, "labels": [f"class {i}" for i in range(300)]}
    tracemalloc.start()
    try:
        assert not _build_confusion(test)["rows"]
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_classes_are_sorted_worst_first_and_unknown_last(read_page: Any) -> None:
    per_class = {
        name: {"precision": f1, "recall": f1, "f1": f1, "support": 4}
        for name, f1 in {"good": 0.9, "absent": math.nan, "poor": 0.2}.items()
    }
    text = read_page(render_report(make_data(per_class=per_class))).text
    table = text[text.index("Class by class") :]
    assert table.index("poor") < table.index("good") < table.index("absent")


def test_every_text_is_escaped(read_page: Any) -> None:
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
    sample = dict.fromkeys(("input", "output", "reference", "note"), evil)
    data = ReportData(
        evil, evil, test, data.validation, data.events, [finding], [mistake], {evil: {evil: evil}}, evil, [sample], evil
    )
    page = read_page(render_report(data))
    assert not page.named("script")
    assert page.text.count(evil) >= 20


def test_empty_parts_are_left_out(read_page: Any) -> None:
    page = read_page(render_report(ReportData("empty", "", {}, {}, [], [], [], {}, "")))
    assert "Not yet: it has no score on held-out rows." in page.text
    assert "The checks found nothing to report." in page.text
    for part in ["training", "confusion", "classes", "calibration", "slices", "samples", "mistakes", "facts", "recipe"]:
        assert part not in {section.get("id") for section in page.named("section")}


KEYS = "baselines per_class confusion reliability slices gates temperature opened rows metrics"


@pytest.mark.parametrize("nothing", [None, {}])
@pytest.mark.parametrize("key", KEYS.split())
def test_any_part_may_be_missing(read_page: Any, key: str, nothing: Any) -> None:
    read_page(render_report(make_data(**{key: nothing})))
    data = make_data()
    read_page(
        render_report(dataclasses.replace(data, test={name: part for name, part in data.test.items() if name != key}))
    )


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_missing_numbers_become_dashes(read_page: Any, nothing: Any) -> None:
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
    page = read_page(render_report(make_data(**test)))
    assert "nan" not in page.text
    assert "None" not in page.text
    assert wording.DASH in page.text


def test_one_evaluation_is_a_dot_and_broken_losses_are_skipped(read_page: Any) -> None:
    steps = [{"event": "step", "step": step, "loss": loss} for step, loss in enumerate((1.0, math.nan, math.inf, 0.5))]
    look = {"event": "evaluation", "step": 3, "metrics": {"macro_f1": 0.5, "loss": None}}
    page = read_page(render_report(dataclasses.replace(make_data(), events=[*steps, look, {"event": "done"}])))
    assert "Validation macro-F1" in page.text


def test_page_opens_with_the_verdict_and_marks_its_evidence(read_page: Any) -> None:
    good, opened = read_page(render_report(make_data())), read_page(render_report(make_data(opened=3)))
    assert "Can I trust this model? With care: the test split was opened 3 times." in opened.text
    assert "Caution" in {svg.get("aria-label") for svg in opened.named("svg")}
    assert "Can I trust this model? Yes, on rows like those it was tested on." in good.text


def test_the_foot_says_what_intervals_take_for_granted(read_page: Any) -> None:
    words = "They take rows for independent of each other: where some belong together"
    assert words in read_page(render_report(make_data())).text
    assert words not in read_page(render_report(make_data(resamples=None))).text


def test_a_temperature_of_1_is_no_calibration(read_page: Any) -> None:
    assert "As trained" in read_page(render_report(make_data(temperature=1.0))).text
    text = read_page(render_report(make_data())).text
    assert "After temperature 1.31" in text
    bins = make_data().test["reliability"]["after"]
    assert f"honest confidence would be off by {100 * compute_chance_gap(bins):.1f} by chance" in text


def test_far_baseline_is_an_arrow_and_does_not_stretch_the_axis(read_page: Any) -> None:
    far = {"metrics": {"macro_f1": score(0.05)}, "difference": {"macro_f1": score(0.85)}}
    near = {"metrics": {"macro_f1": score(0.88)}, "difference": {"macro_f1": score(0.02, 0.01)}}
    page = read_page(render_report(make_data(baselines={"majority": far, "tfidf_logreg": near})))
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


def test_selective_accuracy_is_a_curve_and_a_table(read_page: Any) -> None:
    page = read_page(render_report(make_data()))
    text = " ".join(page.text.split())
    assert "Accuracy against coverage: 1.000 on the surest 5% of the rows, 0.900 on all." in render_report(make_data())
    # 1 - 0.1 c^2 at coverages 50 %, 80 % ..., where the least sure row that is answered has 1 - c / 2.
    for row in ("50% 97.5% 0.750", "80% 93.6% 0.600", "90% 91.9% 0.550", "95% 91.0% 0.525", "100% 90.0% 0.500"):
        assert row in text
    assert "The area below it is 0.951" in text
    assert "If it may keep silent" not in render_report(make_data(selective={"area": None, "points": []}))


def test_rows_of_no_class_have_a_section(read_page: Any) -> None:
    found = {"outside_auroc": score(0.9321), "outside_recall_at_95": score(0.7604)}
    baseline = {"metrics": {"outside_auroc": score(0.8111)}, "difference": {}, "settings": {}}
    data = make_data(metrics={"macro_f1": score(0.9)} | found, baselines={"tfidf_logreg": baseline})
    text = " ".join(read_page(render_report(data)).text.split())
    assert "Of 25 test rows labelled none of these, 76.0% are told from the others by the energy of the logits." in text
    assert "95% of the rows with a class pass; on test 94.2% of them do." in text
    assert "TF-IDF + logistic regression 0.811" in text
    assert "Does it know" not in render_report(make_data(outside=None))
    assert "Does it know" not in render_report(make_data(outside={"label": "oos", "rows": 0}))
