"""The report page and the model card of recommenders: lists by group of items, coverage, features, people."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from finetune.artifact.card import build_model_card
from finetune.evaluation.report import ReportData, render_report
from finetune.evaluation.report_samples import LIST_LABELS
from finetune.recipe.schema import Recipe

METRICS = {"ndcg_at_10": {"value": 0.361, "low": 0.331, "high": 0.394}, "mrr": {"value": 0.3, "low": 0.2, "high": 0.4}}
LISTS = {
    "requests": 1119,
    "people": 182,
    "items": 2345,
    "by_item": {
        "popular": {"people": 102, "systems": {"both": METRICS["mrr"], "ease": {"value": 0.277, "low": 0.2}}},
        "rare": {"people": 17, "systems": {"both": {"value": 0.413, "low": 0.2, "high": 0.5}, "ease": {"value": 0.12}}},
        "cold": {"people": 0, "systems": {}},
    },
    "systems": {
        "both": {"coverage_at_10": 0.9145, "coverage": [0.1, 0.2, 0.9145], "novelty_at_10": 7.84},
        "ease": {"coverage_at_10": 0.345, "coverage": [0.05, 0.1, 0.345], "novelty_at_10": 6.25},
    },
}
IMPORTANCES = {"co_occurrence": 0.4, "price": 0.1, "sequence": 0.02}
SAMPLE = {"input": "Bread | Salt", "output": "Butter", "reference": "Jam", "labels": LIST_LABELS, "note": "2 events"}


def make_report(**test: Any) -> ReportData:
    scored = {
        "rows": 182,
        "metrics": METRICS,
        "baselines": {"ease": {"metrics": METRICS, "difference": {}, "settings": {"penalty": 50.0}}},
        "lists": LISTS,
        "ranker": {"importances": IMPORTANCES},
    } | test
    return ReportData("shop", "2026-11-23T15:00:00+00:00", scored, {}, [], [], [], {}, "", [SAMPLE], "People")


def read_rows(page: Any, caption: str, html: str) -> list[list[str]]:
    """Cells of the table with that caption, as text."""
    (table,) = [one for one in re.findall(r"<table.*?</table>", html, re.DOTALL) if caption in one]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<small>.*?</small>|<[^>]+>", "", cell).strip() for cell in row] for row in cells]


def test_each_system_has_its_scores_by_item_and_what_its_lists_hold(read_page: Any) -> None:
    html = render_report(make_report())
    page = read_page(html)
    assert "lists" in [section["id"] for section in page.named("section")]
    assert "#lists" in [link["href"] for link in page.named("a")]
    head, *rows = read_rows(page, "Lists of ten out of 2,345 items, for 1,119 requests of 182 people", html)
    assert head == ["", "NDCG@10, popular", "NDCG@10, rare", "Coverage", "Novelty"], "nothing was asked of cold items"
    assert "17 people" in page.text
    assert rows == [
        ["This model", "0.300", "0.413", "91.5%", "7.8"],
        ["A linear model of who had what (EASE)", "0.277", "0.120", "34.5%", "6.2"],
    ]


def test_features_have_bars_the_longest_for_the_first(read_page: Any) -> None:
    html = render_report(make_report())
    rows = read_rows(read_page(html), "What the second stage goes by", html)
    assert [(row[0], row[-1]) for row in rows[1:]] == [
        ("What follows what", "40.0%"),
        ("price", "10.0%"),
        ("Sequence model", "2.0%"),
    ]
    widths = re.findall(r'<rect class="fill"[^>]*width="([\d.]+)%"', html)
    assert widths == ["100.0", "25.0", "5.0"]
    alone = make_report(ranker=None)
    assert "What the second stage goes by" not in render_report(alone)


def test_coverage_is_a_curve_for_each_system(read_page: Any) -> None:
    page = read_page(render_report(make_report()))
    labels = [one.get("aria-label") or "" for one in page.named("svg")]
    assert "Share of the catalogue shown by length of the lists: 10.0% with one item, 91.5% with 3." in labels
    curves = [one for one in page.named("path") if (one["class"] or "").startswith("curve") and "L" in one["d"]]
    assert sorted(one["class"] for one in curves) == ["curve faint", "curve line"]


def test_a_person_is_shown_in_words_of_their_own(read_page: Any) -> None:
    text = read_page(render_report(make_report())).text
    assert re.search(r"Had\s*Bread \| Salt\s*List\s*Butter\s*Turned to\s*Jam", text)
    assert "the last things that they had, the top of their list, and what came next" in text
    assert "Reference" not in text
    assert "Given" not in text


@pytest.mark.parametrize("nothing", [None, {}, {"systems": {}}])
def test_other_models_have_no_lists(nothing: Any) -> None:
    assert 'id="lists"' not in render_report(make_report(lists=nothing))
    data = make_report()
    assert "Rows of the test split" in render_report(replace(data, samples=[{"input": "a", "output": "b"}]))


# The model card


def write_card(**task: Any) -> ModelCard:
    test = {"rows": 182, "confidence": 0.95, "resamples": 1000, "opened": 1, "metrics": METRICS, "baselines": {}}
    status = {
        "training": {"steps": 30, "seconds": 3, "device": "cpu", "rows": 344, "parameters": {"trained": 9, "total": 9}}
    }
    lock = {"precision": "float32", "versions": {"torch": "2", "transformers": "5", "peft": "0"}}
    lock["base"] = {"reference": "acme/base", "origin": "Hub cache"}
    section = {"type": "recommendation", "data": "events.csv", **task}
    recipe = Recipe.model_validate(
        {"recipe": 1, "name": "shop", "tasks": {"next": section}, "model": {"base": "acme/base"}}
    )
    return ModelCard(build_model_card(recipe, {"next": None}, {"next": test | {"lists": LISTS}}, status, lock))


def test_the_card_says_what_was_asked_and_how() -> None:
    card = write_card(rank={"features": ["sequence", "price"]})
    assert "On 182 held-out people of events.csv" in card.text
    assert (
        "1,119 requests; every list is drawn from all 2,345 items of the catalogue but those that the person had."
        in card.text
    )
    assert "one cut for everyone, and nothing that was learned or counted lies after it" in card.text
    assert "after none comes what was popular in the last week of the events that it knows" in card.text
    assert "Items' texts are embedded by `acme/base`, which stays as it is. A second stage" in card.text
    assert "ranks its candidates by sequence, price." in card.text
    assert "finetune recommend RUN --history ID,ID --top 10" in card.text
    assert not [word for word in ("onfidence", "generate(", "Texts longer", "tokenizer") if word in card.text]
    assert "\n\n\n" not in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert "model.score(model.encode(history))" in ast.unparse(ast.parse(code))


def test_the_card_tells_leaving_one_out_from_a_cut() -> None:
    text = write_card(split={"by": "leave_one_out"}, recommend={"exclude_seen": False}).text
    assert (
        "Each person's last event is the test (leave-one-out), and the events of others after it were learned from"
        in text
    )
    assert "drawn from all 2,345 items of the catalogue. Each" in text
    assert "one cut for everyone" not in text
    assert "second stage" not in text
