"""The report of a run: one self-contained HTML page that opens with the answer to "can I trust this model?"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from finetune.evaluation import charts, wording
from finetune.evaluation.charts import Scale, Series, is_number
from finetune.evaluation.metrics import OUTSIDE_METRICS, is_larger_better
from finetune.evaluation.report_lists import build_lists
from finetune.evaluation.report_samples import build_sample, describe_samples, shorten
from finetune.evaluation.verdict import build_verdict, compute_chance_gap, compute_gap, gate_decimals, is_scaled
from finetune.evaluation.wording import Score, decimals_of, format_count, format_number, name_of, part_of

SEVERITIES = {"error": "bad", "warning": "care", "note": "note"}
"""Severity of a finding -> how the page marks it, gravest first."""
LOSSES = ("loss", "perplexity", "bits_per_byte")
"""Metrics whose curve is that of the loss on another scale."""
LEGEND = {"line": "train, smoothed", "faint": "train, each step", "dots": "validation"}
FAR = 4.0
"""Times the axis of the score plot may grow to hold one more baseline; beyond that an arrow stands for it."""
FEW_ROWS = 30
"""A slice with fewer rows says little."""
COVERAGES = (0.5, 0.8, 0.9, 0.95, 1.0)
"""Coverages that the table of selective accuracy shows."""
CONFUSION_NUMBERS_UP_TO = 12
"""Classes up to which the confusion matrix is a table of counts."""
MOST_CONFUSED, MISTAKES_SHOWN, SAMPLES_SHOWN, CLASSES_SHOWN = 15, 10, 10, 12
ROW_REFERENCES, TEXT_CHARACTERS = 5, 600


@dataclass(frozen=True)
class ReportData:
    """What the page shows. Missing keys and None or nan values leave a part out, or show a dash."""

    name: str
    created: str
    """ISO 8601."""
    test: dict[str, Any]
    """Contents of evaluation/test.json."""
    validation: dict[str, Any]
    """Contents of evaluation/validation.json."""
    events: list[dict[str, Any]]
    """Lines of events.jsonl; only `step` and `evaluation` events are read."""
    findings: list[dict[str, Any]]
    """Of the data checks: kind, severity (error, warning, note), split, count, message, rows."""
    mistakes: list[dict[str, Any]]
    """Wrong predictions, most confident first: id, text, reference, prediction, confidence."""
    facts: dict[str, dict[str, str]]
    """Section -> label -> value."""
    recipe_yaml: str
    samples: list[dict[str, Any]] = field(default_factory=list)
    """What a model that writes made of rows of the test split: input, output (without the input), reference, note; each
    may be "". With `continues` true, output and reference go on where the input ends, and are shown so; `labels` says
    what else the three are called."""
    samples_title: str = ""
    """Heading of the samples, such as "Translations"."""


def write_report(path: Path, data: ReportData) -> None:
    """Write the page to `path` as UTF-8; characters that cannot be encoded become `?`."""
    path.write_text(render_report(data), encoding="utf-8", errors="replace", newline="\n")


def render_report(data: ReportData) -> str:
    """The page as one HTML text: no script, and nothing that is fetched."""
    metrics = part_of(data.test, "metrics")
    primary = next(iter(metrics), None)
    view = {
        "data": data,
        "created": wording.format_created(data.created),
        "primary": primary,
        "verdict": build_verdict(data.test, data.findings),
        "scores": _build_scores(data, primary),
        "gates": [
            {"key": key, "digits": gate_decimals(key, primary), **gate}
            for key, gate in part_of(data.test, "gates").items()
        ],
        "training": _build_training(data.events, primary),
        "confusion": _build_confusion(data.test),
        "classes": _build_classes(part_of(data.test, "per_class")),
        "calibration": _build_calibration(data.test),
        "selective": _build_selective(part_of(data.test, "selective")),
        "outside": _build_outside(data.test),
        "slices": _build_slices(data.test, primary),
        "lists": build_lists(data.test),
        "mistakes": [_build_mistake(mistake) for mistake in data.mistakes],
        "mistakes_shown": MISTAKES_SHOWN,
        "samples": [build_sample(sample) for sample in data.samples],
        "samples_shown": SAMPLES_SHOWN,
        "samples_read": describe_samples(data.samples),
        "digits": decimals_of(primary),
        "findings": sorted(map(_build_finding, data.findings), key=lambda finding: finding["order"]),
        "meanings": [(name_of(key), wording.MEANINGS[key]) for key in metrics if key in wording.MEANINGS],
    }
    return build_environment().get_template("report.html.j2").render(view)


def build_environment() -> Environment:
    """The templates of this room, with numbers written as `wording` does."""
    environment = Environment(
        loader=PackageLoader("finetune", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": wording.format_number,
        "interval": wording.format_interval,
        "signed": wording.format_signed,
        "p": wording.format_p,
        "count": wording.format_count,
        "condition": wording.format_condition,
        "decimals": decimals_of,
        "named": name_of,
        "share": wording.format_share,
        "breakable": wording.mark_breaks,
    }
    return environment


def _build_scores(data: ReportData, primary: str | None) -> dict[str, Any]:
    metrics, validation = part_of(data.test, "metrics"), part_of(data.validation, "metrics")
    if not metrics:
        return {}
    rows: list[dict[str, Any]] = [
        {"name": "This model", "metrics": metrics, "difference": {}, "note": "", "main": True},
    ]
    for name, baseline in part_of(data.test, "baselines").items():
        rows.append(
            {
                "name": name_of(name),
                "metrics": part_of(baseline, "metrics"),
                "difference": part_of(part_of(baseline, "difference"), primary),
                "note": ", ".join(f"{key} = {value}" for key, value in part_of(baseline, "settings").items()),
                "main": False,
            }
        )
    scores = [part_of(row["metrics"], primary) for row in rows]
    near = _near_scores(scores)
    axis = _add_plots(rows, scores, reference=scores[0], near=near)
    extra = {"name": "This model on validation", "metrics": validation, "note": "", "main": False}
    return {
        "rows": rows,
        "axis": axis,
        "columns": list(metrics),
        "table": [*rows, extra] if validation else rows,
        "off_scale": len(near) < len(scores),
        "behind": "left" if is_larger_better(str(primary)) else "right",
    }


def _near_scores(scores: Sequence[Score]) -> list[Score]:
    """The first score and those near it: one that would stretch the axis by `FAR` hides the intervals of all others."""
    first, *others = [score for score in scores if is_number(score.get("value"))] or [{}]
    near = [first]
    for score in sorted(others, key=lambda score: abs(score["value"] - first["value"])):
        if len(near) > 1 and _span([*near, score]) > FAR * _span(near):
            break
        near.append(score)
    return near


def _span(scores: Sequence[Score]) -> float:
    ends = [score[key] for score in scores for key in ("value", "low", "high") if is_number(score.get(key))]
    return float(max(ends) - min(ends))


def _add_plots(
    rows: Sequence[dict[str, Any]], scores: Sequence[Score], *, reference: Score, near: Sequence[Score]
) -> Markup:
    """Give each row its `score` and `plot`, all on the axis that is returned; it holds `reference` and `near`."""
    scale = Scale.around(
        (score.get(key) for score in [*near, reference] for key in ("value", "low", "high")), within=(0.0, 1.0)
    )
    for row, score in zip(rows, scores, strict=True):
        row["score"] = score
        row["plot"] = charts.interval_row(scale, score, reference=reference.get("value"), main=row["main"])
    return charts.interval_axis(scale)


def _build_training(events: Sequence[Mapping[str, Any]], primary: str | None) -> list[dict[str, Any]]:
    steps = [event for event in events if event.get("event") == "step"]
    scored = [
        {**part_of(event, "metrics"), "step": event.get("step")}
        for event in events
        if event.get("event") == "evaluation"
    ]
    loss, rates = _points(steps, "loss"), _points(steps, "learning_rate")
    watched = _choose_metric(scored, primary)
    better = "higher" if is_larger_better(watched) else "lower"
    figures = [
        _figure(
            "Loss",
            [Series(loss, "faint"), Series(charts.smooth(loss)), Series(_points(scored, "loss"), "dots")],
            "Both lines should fall; a validation loss that climbs while the train loss falls is learning by heart.",
            from_zero=True,
        ),
        _figure(
            f"Validation {name_of(watched)}",
            [Series(_points(scored, watched), "dots")],
            f"Each dot is one look at the validation split; {better} is better.",
        ),
        _figure("Learning rate", [Series(rates)], "The size of each step: it climbs, then decays.", from_zero=True),
    ]
    return [figure for figure in figures if figure["chart"]]


def _choose_metric(records: Sequence[Mapping[str, Any]], primary: str | None) -> str:
    """The metric to draw beside the loss: the first that has numbers and is no loss, the headline's before others."""
    names = [primary or "", *(key for record in records for key in record if key != "step")]
    return next((name for name in names if name not in LOSSES and _points(records, name)), "")


def _points(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(one["step"], one[key]) for one in records if is_number(one.get("step")) and is_number(one.get(key))]


def _figure(title: str, series: Sequence[Series], read: str, *, from_zero: bool = False) -> dict[str, Any]:
    drawn = [(one.look, one.points) for one in series if one.points]
    spoken = [
        f"{LEGEND[look]} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for look, points in drawn if look != "faint"
    ]
    label = f"{title} over {format_count(drawn[-1][1][-1][0])} steps: {', '.join(spoken)}" if drawn else title
    legend = [(look, LEGEND[look]) for look, _ in drawn] if len(drawn) > 1 else []
    return {
        "title": title,
        "chart": charts.curve_chart(series, label, from_zero=from_zero),
        "legend": legend,
        "read": read,
    }


def _build_confusion(test: Mapping[str, Any]) -> dict[str, Any]:
    matrix, labels = part_of(test, "confusion"), list(part_of(test, "labels"))
    if not matrix or len(matrix) != len(labels):
        return {}
    sums = [sum(counts) for counts in matrix]
    total = sum(sums)
    wrong = total - sum(counts[i] for i, counts in enumerate(matrix))
    label = f"Confusion matrix of {len(labels)} classes: {wrong:,} of {total:,} rows off the diagonal."
    shown: dict[str, Any] = {"labels": labels, "rows": [], "map": "", "pairs": [], "wrong": wrong, "total": total}
    if len(labels) <= CONFUSION_NUMBERS_UP_TO:
        return shown | {
            "rows": [
                {"label": label, "cells": [{"count": count, "share": count / max(1, of_row)} for count in counts]}
                for label, counts, of_row in zip(labels, matrix, sums, strict=True)
            ]
        }
    pairs = [
        {"reference": labels[i], "prediction": labels[j], "count": count, "share": count / sums[i]}
        for i, counts in enumerate(matrix)
        for j, count in enumerate(counts)
        if count and i != j
    ]
    pairs.sort(key=lambda pair: (-pair["count"], -pair["share"]))
    return shown | {"map": charts.heat_map(matrix, labels, label), "pairs": pairs[:MOST_CONFUSED]}


def _build_classes(per_class: Mapping[str, Score]) -> dict[str, Any]:
    # Worst first; a class without a score has no place in that order and goes last.
    order = sorted(per_class, key=lambda name: per_class[name]["f1"] if is_number(per_class[name].get("f1")) else 2.0)
    columns = ("f1", "precision", "recall", "support")
    rows = [
        {"name": name, "bar": charts.bar(per_class[name].get("f1"))}
        | {key: per_class[name].get(key) for key in columns}
        for name in order
    ]
    # Folding two or three rows away would cost the reader more than it saves.
    shown = len(rows) if len(rows) <= CLASSES_SHOWN + 3 else CLASSES_SHOWN
    return {"shown": rows[:shown], "folded": rows[shown:], "total": len(rows)}


def _build_calibration(test: Mapping[str, Any]) -> list[dict[str, Any]]:
    temperature, reliability = test.get("temperature"), part_of(test, "reliability")
    titles = {"before": "As trained"}
    if is_scaled(temperature):
        titles = {"before": "Before calibration", "after": f"After temperature {format_number(temperature, 2)}"}
    figures = []
    for key, title in titles.items():
        bins = [one for one in part_of(reliability, key) if is_number(one.get("count")) and one["count"] > 0]
        gap = compute_gap(bins)
        if gap is not None:
            words = f"{title}: confidence is off by {100 * gap:.1f} points on average."
            chart = charts.reliability_chart(bins, words)
            figures.append(
                {"title": title, "gap": gap, "chance": compute_chance_gap(bins), "chart": chart, "bins": bins}
            )
    return figures


def _build_selective(selective: Mapping[str, Any]) -> dict[str, Any]:
    points = [one for one in part_of(selective, "points") if is_number(one.get("accuracy"))]
    if not points:
        return {}
    label = (
        f"Accuracy against coverage: {points[0]['accuracy']:.3f} on the surest {points[0]['coverage']:.0%} of the "
        f"rows, {points[-1]['accuracy']:.3f} on all."
    )
    shown = [next(one for one in points if one["coverage"] >= share - 1e-9) for share in COVERAGES]
    return {
        "chart": charts.curve_chart([Series([(one["coverage"], one["accuracy"]) for one in points])], label),
        "rows": list({one["coverage"]: one for one in shown}.values()),
        "area": selective.get("area"),
    }


def _build_outside(test: Mapping[str, Any]) -> dict[str, Any]:
    outside = part_of(test, "outside")
    if not outside.get("rows"):
        return {}
    systems = {"This model": test, **{name_of(name): one for name, one in part_of(test, "baselines").items()}}
    rows = [
        {
            "name": name,
            "main": one is test,
            "scores": [part_of(part_of(one, "metrics"), key) for key in OUTSIDE_METRICS],
        }
        for name, one in systems.items()
    ]
    return {
        **outside,
        "words": wording.OUTSIDE_SCORES.get(str(outside.get("score")), outside.get("score")),
        "found": part_of(part_of(test, "metrics"), "outside_recall_at_95").get("value"),
        "columns": list(OUTSIDE_METRICS),
        "systems": rows,
    }


def _build_slices(test: Mapping[str, Any], primary: str | None) -> list[dict[str, Any]]:
    whole = part_of(test, "metrics").get(primary) or {}
    groups = []
    for name, values in part_of(test, "slices").items():
        rows = [
            {
                "name": str(one.get("value")),
                "rows": one.get("rows"),
                "main": True,
                "few": is_number(one.get("rows")) and one["rows"] < FEW_ROWS,
            }
            for one in values
        ]
        if rows:
            scores = [part_of(part_of(one, "metrics"), primary) for one in values]
            groups.append(
                {"name": name_of(name), "rows": rows, "axis": _add_plots(rows, scores, reference=whole, near=scores)}
            )
    return groups


def _build_mistake(mistake: Mapping[str, Any]) -> dict[str, Any]:
    text = shorten(mistake.get("text"), TEXT_CHARACTERS)
    return {key: mistake.get(key) for key in ("id", "reference", "prediction", "confidence")} | {"text": text}


def _build_finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    rows = [str(row) for row in part_of(finding, "rows")]
    more = len(rows) - ROW_REFERENCES
    severity = str(finding.get("severity") or "note")
    count = finding.get("count")
    return {
        "check": name_of(finding.get("kind") or "check"),
        "severity": severity,
        "state": SEVERITIES.get(severity, "note"),
        "split": finding.get("split") or "all",
        "count": count,
        "message": str(finding.get("message") or ""),
        "rows": ", ".join(rows[:ROW_REFERENCES]) + (f" and {more:,} more" if more > 0 else ""),
        "order": (list(SEVERITIES).index(severity) if severity in SEVERITIES else 9, -float(count or 0)),
    }
