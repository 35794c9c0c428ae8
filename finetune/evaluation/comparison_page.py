"""The page of a comparison: which candidate to take, a plot, a table, and how fair it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.evaluation import wording
from finetune.evaluation.metrics import is_larger_better
from finetune.evaluation.report import build_environment
from finetune.evaluation.trade_off import Dot, trade_off_chart
from finetune.evaluation.wording import (
    decimals_of,
    format_count,
    format_duration,
    format_number,
    format_score,
    format_share,
    format_size,
    name_of,
)
from finetune.recipe.messages import count_of

KEEPS = 0.99
"""A candidate with this share of the reference's score is called as good."""


def write_page(path: Path, results: Mapping[str, Any]) -> None:
    """Write the page to `path` as UTF-8."""
    path.write_text(render_page(results), encoding="utf-8", errors="replace", newline="\n")


def render_page(results: Mapping[str, Any]) -> str:
    """The page of what `artifact.candidates.build_results` returns: no script, and nothing that is fetched."""
    environment = build_environment()
    environment.filters |= {
        "size": format_size,
        "duration": format_duration,
        "share": format_share,
        "created": wording.format_created,
    }
    metric = results["metric"]
    scored = sort_scored(results)
    label = f"{name_of(metric)} of {count_of(len(scored), 'candidate')} over their trained parameters, on a log scale"
    view = {
        "results": results,
        "metric": metric,
        "digits": decimals_of(metric),
        "larger_is_better": is_larger_better(metric),
        "level": f"{100 * results['confidence']:g}%",
        "headline": describe_best(results),
        "scored": scored,
        "failed": {name: one for name, one in results["candidates"].items() if one["error"]},
        "chart": trade_off_chart(_build_dots(results), label, larger_is_better=is_larger_better(metric)),
        "seeds": describe_seeds(results),
        "devices": sorted({f"{one['device']}, {one['precision']}" for one in scored.values()}),
        "looks": max((len(one["learning_rates"]) for one in results["candidates"].values()), default=0),
    }
    return environment.get_template("comparison.html.j2").render(view)


def sort_scored(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The candidates that have a score, the best first."""
    metric = results["metric"]
    scored = {
        name: one
        for name, one in results["candidates"].items()
        if not one["error"] and one["metrics"].get(metric, {}).get("value") is not None
    }
    sign = -1 if is_larger_better(metric) else 1
    order = sorted(scored, key=lambda name: sign * scored[name]["metrics"][metric]["value"])
    return {name: scored[name] for name in order}


def describe_best(results: Mapping[str, Any]) -> str:
    """The page's first sentence: the smallest candidate that is as good as the reference, else the best one."""
    scored, metric, reference = sort_scored(results), results["metric"], results["reference"]
    if not scored:
        return "No candidate has a score."
    shares = {name: one["share"]["value"] for name, one in scored.items() if name != reference and one["share"]}
    if shares:
        whole = scored[reference]["parameters"]["trained"]
        good = [name for name, share in shares.items() if share >= KEEPS]
        chosen = (
            min(good, key=lambda name: scored[name]["parameters"]["trained"])
            if good
            else max(shares, key=shares.__getitem__)
        )
        part = scored[chosen]["parameters"]["trained"] / whole
        value = format_number(scored[reference]["metrics"][metric]["value"], decimals_of(metric))
        return (
            f"{chosen} keeps {format_share(shares[chosen])} of {reference}\N{RIGHT SINGLE QUOTATION MARK}s "
            f"{name_of(metric)}, {value}, with {format_share(part)} of its trained parameters."
        )
    best = next(iter(scored))
    value = format_number(scored[best]["metrics"][metric]["value"], decimals_of(metric))
    return f"{best} has the best {name_of(metric)}: {value}."


def describe_seeds(results: Mapping[str, Any]) -> str:
    """What the intervals hold; nothing where no candidate has a score."""
    if results["rows"] is None:
        return ""
    count = len(results["seeds"])
    drawn = f"{results['resamples']:,} bootstrap resamples of the {results['rows']:,} test rows"
    if count == 1:
        return (
            f"Intervals come from {drawn}; training had one seed, so they hold chance in the rows and not in training."
        )
    return (
        f"Scores are means over {count} training seeds. Intervals come from {drawn} and of the seeds, both drawn with "
        "replacement, so they hold chance in the rows and in training. All candidates see the same draws."
    )


def render_markdown(results: Mapping[str, Any]) -> str:
    """The table for a document, and under it what went wrong."""
    metric = results["metric"]
    head = [
        "method",
        f"{name_of(metric)} ({100 * results['confidence']:g} % interval)",
        "trained parameters",
        f"share of {results['reference']}" if results["reference"] else None,
        "training time",
        "peak memory",
        "size on disk",
        "learning rate",
    ]
    lines = [_join(head), "|" + "---|" * sum(cell is not None for cell in head)]
    lines += [_join(row) for row in list_cells(results)]
    lines += [f"\n`{name}` failed: {' '.join(error.split())}" for name, error in results["failed"].items()]
    return "\n".join(filter(None, ["\n".join(lines) + "\n", describe_seeds(results)])) + "\n"


def list_cells(results: Mapping[str, Any]) -> list[list[str | None]]:
    """A row of words for each scored candidate; None where the table has no such column."""
    metric = results["metric"]
    rows: list[list[str | None]] = []
    for name, one in sort_scored(results).items():
        count = one["parameters"]
        memory = one["peak_memory_mb"]
        share = one["share"] or {}
        interval = "" if share.get("low") is None else f" ({100 * share['low']:.1f} to {100 * share['high']:.1f})"
        rows.append(
            [
                name,
                format_score(one["metrics"][metric], decimals_of(metric)),
                f"{format_count(count['trained'])} ({format_share(count['trained'] / count['total'])})",
                format_share(share.get("value")) + interval if results["reference"] else None,
                format_duration(one["seconds"]),
                format_count(memory) + (" MB" if memory else ""),
                format_size(one["model_bytes"]),
                f"{one['learning_rate']:g}",
            ]
        )
    return rows


def _join(cells: Sequence[str | None]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells if cell is not None) + " |"


def _build_dots(results: Mapping[str, Any]) -> list[Dot]:
    metric = results["metric"]
    return [
        Dot(
            name=name,
            size=max(1, one["parameters"]["trained"]),
            main=name == results["reference"],
            **{key: one["metrics"][metric][key] for key in ("value", "low", "high")},
        )
        for name, one in sort_scored(results).items()
    ]
