"""The page of a comparison: its words, its numbers and its markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.evaluation.comparison_page import describe_best, describe_seeds, render_markdown, render_page, write_page

SIZES = {"full": 22_600_000, "lora": 694_000, "pfeiffer": 330_000, "prompt": 37_000}
SCORES = {"full": 0.868, "lora": 0.866, "pfeiffer": 0.861, "prompt": 0.412}


def make_candidate(name: str, **changes: Any) -> dict[str, Any]:
    value, trained = SCORES[name], SIZES[name]
    return {
        "changes": {"adapter.method": name},
        "metrics": {"accuracy": {"value": value, "low": value - 0.012, "high": value + 0.012}},
        "share": {"value": value / 0.868, "low": value / 0.868 - 0.005, "high": value / 0.868 + 0.005},
        "learning_rate": 1e-3,
        "chosen_by": "accuracy",
        "learning_rates": [
            {"rate": rate, "value": value - 0.03, "loss": 0.5, "run": "r", "error": None} for rate in (1e-3, 3e-3)
        ],
        "seeds": [{"seed": seed, "run": "r", "value": value, "opened": 1} for seed in (13, 17)],
        "parameters": {"trained": trained, "total": 23_000_000},
        "seconds": 95.4,
        "peak_memory_mb": 1133,
        "model_bytes": 4 * trained + 750_000,
        "weights_bytes": 4 * trained,
        "device": "cpu",
        "precision": "bf16",
        "missed_gates": None,
        "error": None,
    } | changes


def make_results(**changes: Any) -> dict[str, Any]:
    refused = {"changes": {}, "metrics": {}, "share": None, "learning_rate": None, "chosen_by": "loss", "seeds": []}
    refused |= {"learning_rates": [{"rate": 1e-3, "value": None, "error": "no"}], "error": "adapter: <b>must</b> fit."}
    return {
        "name": "adapters",
        "description": "",
        "created": "2026-11-22T17:10:00+00:00",
        "recipe": "intents.yaml",
        "set": {"train.epochs": 20},
        "seeds": [13, 17],
        "reference": "full",
        "metric": "accuracy",
        "rows": 3080,
        "confidence": 0.95,
        "resamples": 1000,
        "candidates": {**{name: make_candidate(name) for name in SIZES}, "eva": refused},
        "failed": {"eva": "adapter: <b>must</b> fit."},
    } | changes


def test_the_page_is_well_formed_and_fetches_nothing(read_page: Any) -> None:
    html = render_page(make_results())
    page = read_page(html)
    for word in ("http://", "https://", "src=", "url(", "<b>must"):
        assert word not in html
    assert not page.named("script")
    assert not page.named("link")
    assert all(header.get("scope") in ("col", "row") for header in page.named("th"))
    assert [name for name, _ in page.tags].count("h1") == 1
    outer = [svg for svg in page.named("svg") if (svg.get("class") or "").startswith(("chart", "mark"))]
    assert outer
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in outer)


def test_numbers_are_those_given_and_the_best_comes_first(read_page: Any) -> None:
    text = read_page(render_page(make_results())).text
    row = "lora 0.866 0.854 to 0.878 694,000 3.0% 99.8% 99.3% to 100.3% 95 s 1,133 MB 3.5 MB weights 2.8 MB 0.001"
    table = text[text.index("Candidate accuracy") :]
    assert row in table
    assert table.index("full 0.868") < table.index("lora 0.866") < table.index("pfeiffer 0.861") < table.index("prompt")
    assert "lora 0.001: 0.836 0.003: 0.836" in text
    assert "eva 0.001: failed" in text
    assert "intents.yaml with train.epochs: 20; seeds 13, 17; 2 learning rates each" in text
    assert "eva failed; its words are below" in text
    assert "adapter: <b>must</b> fit." in text
    assert "resident in the process, libraries included" in text
    assert "prompt 0.412" in text, "far off the plot's scale"


def test_the_first_sentence_names_the_smallest_that_is_as_good() -> None:
    results = make_results()
    assert describe_best(results) == (
        "pfeiffer keeps 99.2% of full\N{RIGHT SINGLE QUOTATION MARK}s accuracy, 0.868, with 1.5% of its trained "
        "parameters."
    )
    names = ("full", "prompt")
    few = make_results(candidates={name: make_candidate(name) for name in names})
    assert describe_best(few).startswith("prompt keeps 47.5% of full")
    assert describe_best(
        make_results(reference=None, candidates={n: make_candidate(n, share=None) for n in names})
    ) == ("full has the best accuracy: 0.868.")


def test_where_nothing_has_a_score_the_page_says_so(read_page: Any) -> None:
    results = make_results(candidates={"eva": make_results()["candidates"]["eva"]}, rows=None)
    page = read_page(render_page(results))
    assert "No candidate has a score." in page.text
    assert "Score against size" not in page.text
    assert describe_seeds(results) == ""
    assert render_markdown(results).endswith("`eva` failed: adapter: <b>must</b> fit.\n\n")


def test_it_is_said_what_the_intervals_hold() -> None:
    assert describe_seeds(make_results()) == (
        "Scores are means over 2 training seeds. Intervals come from 1,000 bootstrap resamples of the 3,080 test rows "
        "and of the seeds, both drawn with replacement, so they hold chance in the rows and in training. All "
        "candidates see the same draws."
    )
    assert "training had one seed, so they hold chance in the rows and not in training" in describe_seeds(
        make_results(seeds=[13])
    )


def test_different_devices_are_pointed_out(read_page: Any) -> None:
    candidates = {"full": make_candidate("full"), "lora": make_candidate("lora", device="cuda:0")}
    text = read_page(render_page(make_results(candidates=candidates))).text
    assert "cpu, bf16: not the same for all, so times and memory cannot be compared" in text
    assert "allocated on the GPU" in text


def test_markdown_has_the_columns_of_the_documents() -> None:
    lines = render_markdown(make_results()).splitlines()
    assert lines[0] == (
        "| method | accuracy (95 % interval) | trained parameters | share of full | training time | peak memory | "
        "size on disk | learning rate |"
    )
    assert lines[1] == "|" + "---|" * 8
    assert lines[3] == (
        "| lora | 0.866 (0.854 to 0.878) | 694,000 (3.0%) | 99.8% (99.3 to 100.3) | 95 s | 1,133 MB | 3.5 MB | 0.001 |"
    )
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| full", "| lora", "| pfeiffer", "| prompt"]
    assert "`eva` failed: adapter: <b>must</b> fit." in lines
    alone = render_markdown(make_results(reference=None)).splitlines()
    assert "share" not in alone[0]
    assert alone[1] == "|" + "---|" * 7


def test_an_error_metric_is_better_when_it_is_low(read_page: Any) -> None:
    candidates = {name: make_candidate(name, share=None) for name in ("full", "lora")}
    for one in candidates.values():
        one["metrics"] = {"loss": one["metrics"]["accuracy"]}
    results = make_results(metric="loss", candidates=candidates)
    assert describe_best(results) == "lora has the best loss: 0.866."
    assert "Up is worse" in read_page(render_page(results)).text


@pytest.mark.parametrize("name", ["a&b", "\N{SNOWMAN}"])
def test_any_name_is_written(tmp_path: Path, name: str) -> None:
    results = make_results(candidates={name: make_candidate("full"), "lora": make_candidate("lora")}, reference=name)
    write_page(tmp_path / "page.html", json.loads(json.dumps(results)))
    assert name.replace("&", "&amp;") in (tmp_path / "page.html").read_text(encoding="utf-8")
