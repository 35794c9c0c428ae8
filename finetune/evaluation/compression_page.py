"""The page of a compression: which size to take, a plot of score against size, and one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.evaluation import wording
from finetune.evaluation.metrics import is_larger_better
from finetune.evaluation.report import build_environment
from finetune.evaluation.trade_off import Dot, trade_off_chart
from finetune.evaluation.wording import (
    decimals_of,
    format_number,
    format_score,
    format_share,
    format_size,
    name_of,
)
from finetune.recipe.files import write_file_atomically
from finetune.recipe.messages import count_of

WHOLE = "run"
"""How the model that was made smaller is called among the sizes."""


def write_page(path: Path, results: Mapping[str, Any]) -> None:
    """Write the page to `path`."""
    write_file_atomically(path, render_page(results).encode(errors="replace"))


def render_page(results: Mapping[str, Any]) -> str:
    """The page of what `finetune.compression.compress` returns: no script, and nothing that is fetched."""
    environment = build_environment()
    environment.filters |= {"size": format_size, "created": wording.format_created}
    metric = results["metric"]
    label = f"{name_of(metric)} of {count_of(len(results['points']), 'size')} over their parameters, on a log scale"
    view = {
        "results": results,
        "metric": metric,
        "digits": decimals_of(metric),
        "larger_is_better": is_larger_better(metric),
        "level": f"{100 * results['confidence']:g}%",
        "headline": describe_choice(results),
        "budget": describe_budget(results),
        "rows": list_rows(results),
        "chart": trade_off_chart(_build_dots(results), label, larger_is_better=is_larger_better(metric)),
        "test": results.get("test"),
    }
    return environment.get_template("compression.html.j2").render(view)


def describe_choice(results: Mapping[str, Any]) -> str:
    """The page's first sentence."""
    name = results["chosen"] or results["nearest"]
    point, whole, metric = results["points"][name], results["run"], results["metric"]
    lost = point["lost"]["value"]
    loses = "has no score" if lost is None else f"loses {format_number(lost, 4)} of {name_of(metric)}"
    costs = (
        f"{name} {loses}, has {format_share(point['bytes'] / whole['bytes'])} of the bytes and is "
        f"{point['speedup']['rows_per_second']:g} times as fast."
    )
    return costs if results["chosen"] else f"No size keeps the budget. The nearest: {costs}"


def describe_budget(results: Mapping[str, Any]) -> str:
    """What was asked for, and how was chosen."""
    budget = results["budget"]
    if budget["max_drop"] is not None:
        return (
            f"The fastest size that loses at most {budget['max_drop']:g} of {name_of(results['metric'])} on validation."
        )
    return f"The best size that is at least {budget['min_speedup']:g} times as fast as the run."


def list_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The run, then the sizes, the largest first: what a line of the table says."""
    whole = results["run"] | {"lost": None, "speedup": {"rows_per_second": 1.0, "p50": 1.0}, "heads": None}
    points = sorted(results["points"].items(), key=lambda item: -item[1]["bytes"])
    return [
        {**one, "name": name, "chosen": name == results["chosen"], "bytes_share": one["bytes"] / whole["bytes"]}
        for name, one in [(WHOLE, whole), *points]
    ]


def list_cells(results: Mapping[str, Any]) -> list[list[str]]:
    """The table in words, for a terminal."""
    digits = decimals_of(results["metric"])
    return [
        [
            f"{row['name']}{' *' if row['chosen'] else ''}",
            format_score(row["score"], digits),
            "" if row["lost"] is None else _format_lost(row["lost"]),
            f"{format_size(row['bytes'])} ({format_share(row['bytes_share'])})",
            f"{row['speed']['rows_per_second']:,} ({row['speedup']['rows_per_second']:g} x)",
            f"{row['speed']['p50_ms']} ({row['speedup']['p50']:g} x)",
        ]
        for row in list_rows(results)
    ]


def _format_lost(lost: Mapping[str, Any]) -> str:
    if lost["value"] is None:
        return "not defined"
    interval = "" if lost["low"] is None else f" [{lost['low']:+.3f}, {lost['high']:+.3f}]"
    return f"{lost['value']:+.4f}{interval}"


def _build_dots(results: Mapping[str, Any]) -> list[Dot]:
    scored = {WHOLE: results["run"], **results["points"]}
    return [
        Dot(
            name=name,
            size=one["parameters"],
            main=name == results["chosen"],
            **{key: one["score"][key] for key in ("value", "low", "high")},
        )
        for name, one in scored.items()
        if one["score"]["value"] is not None
    ]
