"""The part of the report page that is about lists of items: for which items they are good, and what is on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.evaluation import charts
from finetune.evaluation.charts import Series, is_number
from finetune.evaluation.wording import describe_tested, format_share, name_of, part_of

FEATURES = {
    "sequence": "Sequence model",
    "co_occurrence": "What follows what",
    "ease": "EASE",
    "text": "Likeness of the texts",
    "popularity": "Popularity",
    "recency": "Age of the item",
    "repeats": "Had before",
    "history": "Length of the history",
}
"""Feature of the second stage -> what the page calls it; columns of the catalogue keep their names."""


def build_lists(test: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a recommender's lists; empty for other models."""
    lists = part_of(test, "lists")
    systems = part_of(lists, "systems")
    if not systems:
        return {}
    model = next(iter(systems))
    groups = {name: found for name, found in part_of(lists, "by_item").items() if found.get("people")}
    return {
        "items": lists.get("items"),
        "tested": describe_tested(test),
        "metric": name_of(next(iter(part_of(test, "metrics")), None)),
        "groups": [{"name": name, "people": found["people"]} for name, found in groups.items()],
        "systems": [
            {
                "name": "This model" if name == model else name_of(name),
                "main": name == model,
                "scores": [part_of(part_of(found, "systems"), name) for found in groups.values()],
                "coverage": one.get("coverage_at_10"),
                "novelty": one.get("novelty_at_10"),
            }
            for name, one in systems.items()
        ],
        "curve": _draw_coverage(systems, model),
        "importances": _build_importances(part_of(part_of(test, "ranker"), "importances")),
    }


def _draw_coverage(systems: Mapping[str, Mapping[str, Any]], model: str) -> str:
    points = {
        name: [(length, share) for length, share in enumerate(part_of(one, "coverage"), start=1) if is_number(share)]
        for name, one in systems.items()
    }
    own = points[model]
    if not own:
        return ""
    label = (
        f"Share of the catalogue shown by length of the lists: {format_share(own[0][1])} with one item, "
        f"{format_share(own[-1][1])} with {own[-1][0]}."
    )
    others = [Series(points[name], "faint") for name in systems if name != model]
    return charts.curve_chart([*others, Series(own)], label, from_zero=True, x_ticks=5)  # whole numbers


def _build_importances(importances: Mapping[str, Any]) -> list[dict[str, Any]]:
    known = {name: share for name, share in importances.items() if is_number(share)}
    most = max(known.values(), default=0) or 1
    return [
        {"name": FEATURES.get(name, name), "share": share, "bar": charts.bar(share / most)}
        for name, share in known.items()
    ]
