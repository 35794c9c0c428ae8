"""The report page of models that write: scores on their own scales, samples, and no part of a classifier's page."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from finetune.evaluation import wording
from finetune.evaluation.report import ReportData, render_report


def score(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def make_report(metrics: dict[str, Any], baselines: dict[str, Any], **changes: Any) -> ReportData:
    test = {
        "split": "test",
        "rows": 1000,
        "confidence": 0.95,
        "resamples": 1000,
        "seed": 13,
        "opened": 1,
        "metrics": metrics,
        "baselines": baselines,
        "slices": {"length": [{"value": "1-8 words", "rows": 250, "metrics": metrics}]},
        "gates": {},
    }
    steps = [{"event": "step", "step": step, "loss": 7 / step, "learning_rate": 1e-3} for step in range(1, 41)]
    looks = [
        {"event": "evaluation", "step": step, "metrics": {"loss": 40 / step, "perplexity": 9.0, "token_accuracy": 0.5}}
        for step in (20, 40)
    ]
    data = ReportData(
        name="writer",
        created="2026-11-22T17:10:00+00:00",
        test=test,
        validation={"metrics": metrics},
        events=[*steps, *looks],
        findings=[],
        mistakes=[],
        facts={"Model": {"Base": "scratch"}},
        recipe_yaml="recipe: 1\n",
    )
    return replace(data, **changes)


def make_translation(**changes: Any) -> ReportData:
    """BLEU 33.4 with two baselines, which have no loss."""
    baseline = {
        "metrics": {"bleu": score(6.1234, 0.8), "chrf": score(26.42, 1.1)},
        "difference": {"bleu": {"value": 27.2937, "low": 25.912, "high": 28.731, "p_value": 0.002}},
        "settings": {},
    }
    sample = {"input": "A dog runs.", "output": "Ein Hund läuft.", "reference": "Ein Hund rennt.", "note": "chrF 61.2"}
    data = make_report(
        {"bleu": score(33.4171, 1.31), "chrf": score(58.38, 1.02), "loss": score(1.4692, 0.03)},
        {"nearest": baseline},
        samples=[sample],
        samples_title="Translations",
    )
    data.test["gates"] = {
        "bleu": {"condition": ">= 33", "value": 33.4171, "passed": True},
        "beats_baselines": {"condition": "bleu above nearest's 6.1234", "value": 33.4171, "passed": True},
    }
    return replace(data, **changes)


def test_page_has_no_trace_of_classes_and_confidence(read_page: Any) -> None:
    page = read_page(render_report(make_translation()))
    sections = ["scores", "training", "slices", "samples", "findings", "facts", "recipe"]
    assert [section["id"] for section in page.named("section")] == sections
    assert [link["href"] for link in page.named("a")] == [f"#{name}" for name in sections]
    words = page.text.lower()
    assert not [word for word in ("class", "label", "confus", "mistake", "calibrat", "its confidence") if word in words]


def test_each_metric_is_written_on_its_own_scale(read_page: Any) -> None:
    text = read_page(render_report(make_translation())).text
    assert "is 33.4 on 1,000 rows that it never saw in training. The 95% interval is 32.1 to 34.7." in text
    assert "+27.3 25.9 to 28.7, p = 0.002" in text
    assert "This model 33.4 32.1 to 34.7 58.4 57.4 to 59.4 1.469 1.439 to 1.499" in text
    assert f"6.1 5.3 to 6.9 26.4 25.3 to 27.5 {wording.DASH} " in text, "a baseline without a loss"
    assert "1-8 words 33.4 32.1 to 34.7 250" in text
    assert "\N{GREATER-THAN OR EQUAL TO} 33 33.4 passed" in text
    assert "BLEU above 6.1 (The target of the nearest input in train) 33.4 passed" in text


def test_smaller_is_better_for_a_language_model(read_page: Any) -> None:
    gap = {"perplexity": {"value": -0.8123, "low": -0.91, "high": -0.7}}
    baseline = {"metrics": {"perplexity": score(5.74, 0.1)}, "difference": gap, "settings": {"order": 5}}
    data = make_report({"perplexity": score(4.9277, 0.1)}, {"ngram": baseline})
    text = read_page(render_report(data)).text
    assert "Can I trust this model? Yes, on rows like those it was tested on." in text
    assert "is 4.93 on 1,000 rows that it never saw in training; lower is better." in text
    assert "is \N{MINUS SIGN}0.81 (\N{MINUS SIGN}0.91 to \N{MINUS SIGN}0.70)." in text
    assert "A line that ends right of the dashes is clearly behind it." in text
    assert "order = 5" in text


@pytest.mark.parametrize(
    ("measured", "drawn"),
    [
        (["loss", "perplexity", "bits_per_byte", "token_accuracy"], ["Loss", "Validation token accuracy"]),
        (["loss", "token_accuracy", "bleu"], ["Loss", "Validation BLEU"]),
        (["loss", "perplexity", "bits_per_byte"], ["Loss"]),
        (["loss"], ["Loss"]),
    ],
)
def test_no_curve_is_drawn_twice_on_another_scale(read_page: Any, measured: list[str], drawn: list[str]) -> None:
    looks = [{"event": "evaluation", "step": step, "metrics": dict.fromkeys(measured, 1.0 / step)} for step in (20, 40)]
    steps = [{"event": "step", "step": step, "loss": 7 / step} for step in range(1, 41)]
    text = read_page(render_report(make_translation(events=[*steps, *looks]))).text
    titles = re.findall(r"((?:Validation )?[\w ]+?) by training step", text.partition("How training went ")[2])
    assert [title.strip() for title in titles if title.strip() != "Learning rate"] == drawn


def test_samples_show_what_was_given_and_what_the_model_wrote(read_page: Any) -> None:
    text = read_page(render_report(make_translation())).text
    assert "Translations Rows of the test split" in text
    assert "Given A dog runs. Model Ein Hund läuft. Reference Ein Hund rennt. chrF 61.2" in text


@pytest.mark.parametrize(
    ("texts", "written"),
    [
        (("ROMEO:", "Be gone.", ""), ["Given", "ROMEO:", "Model", "Be gone."]),
        (("", "Be gone.", ""), ["Model", "Be gone."]),
        (("A dog.", "", "Ein Hund."), ["Given", "A dog.", "Model", "(nothing)", "Reference", "Ein Hund."]),
    ],
)
def test_what_a_sample_lacks_is_left_out(texts: tuple[str, str, str], written: list[str]) -> None:
    sample = dict(zip(("input", "output", "reference"), texts, strict=True))
    html = render_report(make_translation(samples=[sample]))
    (shown,) = re.findall(r"<li><dl>(.*?)</dl></li>", html)
    assert re.findall(r">([^<]+)<", shown) == written


def test_a_continuation_runs_on_from_where_it_was_given() -> None:
    sample = {"input": "\nThe ki", "output": "ng is\ngone.\n", "reference": "ssing", "continues": True}
    html = render_report(make_translation(samples=[sample]))
    (shown,) = re.findall(r"<li><dl>(.*?)</dl></li>", html, re.DOTALL)
    assert "Beginnings from the test split in grey, and how the model goes on. A reference is one good" in html
    assert re.sub(r"<.*?>", "|", shown).split("||") == ["|Model", "|The ki|ng is\ngone.", "Reference", "|The ki|ssing|"]


def test_lines_and_directions_of_a_text_are_kept() -> None:
    poem = "床前明月光\n  疑是地上霜\n"
    html = render_report(make_translation(samples=[{"input": "", "output": poem, "reference": "", "note": ""}]))
    assert '<dd class="output" dir="auto">床前明月光\n  疑是地上霜</dd>' in html
    assert re.search(r"\.samples dd \{[^}]*white-space: pre-wrap", html)


def test_ten_samples_are_open_and_the_others_folded() -> None:
    samples = [{"input": "", "output": f"text {number}", "reference": "", "note": ""} for number in range(13)]
    html = render_report(make_translation(samples=samples))
    folded = html.index("<summary>3 more</summary>")
    assert html.index("text 9<") < folded < html.index("text 10<")
    assert html.index("text 12<") > folded
    assert " more</summary>" not in render_report(make_translation(samples=samples[:10]))


def test_a_very_long_text_is_cut() -> None:
    sample = {"input": "", "output": "a" * 5000, "reference": "", "note": ""}
    html = render_report(make_translation(samples=[sample]))
    assert "a" * 2000 + " \N{HORIZONTAL ELLIPSIS}" in html
    assert "a" * 2001 not in html


def test_no_samples_no_section(read_page: Any) -> None:
    page = read_page(render_report(make_translation(samples=[])))
    assert "samples" not in {section["id"] for section in page.named("section")}
    assert "Translations" not in page.text
