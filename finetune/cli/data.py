"""`finetune data list | show | audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finetune.cli.output import AsJson, print_json, print_table, print_text, print_written

if TYPE_CHECKING:
    from finetune.label_audit import Audit
    from finetune.recipe import ItemsSection

SHOWN = 20

app = typer.Typer(help="The catalog of data sets: licence, columns, splits, where each is found.", no_args_is_help=True)


@app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """List the cards."""
    from finetune.data.catalog import describe_location, list_cards

    cards = list_cards()
    if as_json:
        print_json([card.model_dump(mode="json") | {"found": describe_location(card)} for card in cards])
        return
    rows = [
        [card.name, f"{sum(card.rows.values()):,}", card.licence, describe_location(card), card.title] for card in cards
    ]
    print_table(["name", "rows", "licence", "found", "title"], rows)


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `finetune data list`.")],
    as_json: AsJson = False,
) -> None:
    """Show one card."""
    from finetune.data.catalog import describe_location, load_card

    card = load_card(name)
    if as_json:
        print_json(card.model_dump(mode="json") | {"found": describe_location(card)})
        return
    print_text(f"{card.name}: {card.title}\n{card.description}".rstrip())
    facts = {
        "licence": card.licence + (" (non-commercial)" if card.non_commercial else ""),
        "found": describe_location(card),
        "splits": ", ".join(f"{split} {count:,}" for split, count in card.rows.items()),
        "columns": "; ".join(f"{column}: {meaning}" for column, meaning in card.columns.items()),
        "labels": _shorten(list(card.labels.values()) if isinstance(card.labels, dict) else card.labels or []),
        "items": _describe_items(card.items),
        "source": card.source or "",
        "cite": card.citation or "",
        "notes": card.notes,
    }
    for key, value in facts.items():
        if value:
            print_text(f"  {key:8} {value}")


def _describe_items(items: ItemsSection | None) -> str:
    if items is None:
        return ""
    read = {"text": items.text, "categorical": items.categorical, "numeric": items.numeric}
    columns = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in read.items() if names)
    return f"{items.file or 'those of the events'} ({columns})"


@app.command("audit")
def audit_command(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A card, a file, a folder of splits, or hub:org/name@revision.")
    ],
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="ROLE=COLUMN,...", help="Such as text=body,label=queue.")
    ] = None,
    features: Annotated[
        Literal["both", "frozen", "tfidf"] | None,
        typer.Option(
            "--features", help="Embeddings of the default base, words, or both; default both where it is at hand."
        ),
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="Look at a given test split too.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where all judged rows go: CSV, JSONL or Parquet.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Deals out the folds.")] = 13,
    as_json: AsJson = False,
) -> None:
    """List likely label errors, worst first."""
    import re

    from finetune.artifact.score_file import check_format
    from finetune.errors import DataError
    from finetune.label_audit import audit

    pairs = _parse_columns(columns)
    if output:
        check_format(output)
    try:
        done = audit(data, pairs, features=features, test=test, seed=seed, quiet=as_json)
    except DataError as error:  # whoever audits has no recipe to change
        fix = re.compile(r"Set tasks\.<name>\.columns: \{(\w+): (.*)\}\.")
        raise DataError(fix.sub(r"Add --columns \1=\2", str(error))) from error
    if output:
        done.save(output)
    if as_json:
        print_json(_describe_audit(done))
        return
    suspects = done.suspects
    print_text(
        f"{done.data}: {len(suspects):,} of {len(done.ranked):,} labels look wrong to a model that agrees with "
        f"{done.accuracy:.1%} of them ({done.features}, cross-validated)."
    )
    for note in done.notes:
        print_text(f"  {note}")
    print_table(
        ["row", "given", "", "suggested", "", "text"],
        [
            [
                row.id,
                row.given,
                f"{row.given_probability:.1%}",
                row.suggested,
                f"{row.suggested_probability:.1%}",
                row.text,
            ]
            for row in suspects[:SHOWN]
        ],
    )
    if len(suspects) > SHOWN:
        print_text(f"and {len(suspects) - SHOWN:,} more" + ("" if output else ": add --output errors.csv"))
    most = list(done.pairs.items())[:SHOWN]
    print_table(["given", "suggested", "rows"], [[given, better, str(count)] for (given, better), count in most])
    for conflict in done.conflicts[:SHOWN]:
        rows = ", ".join(f"{row} {label}" for row, label in conflict.rows.items())
        print_text(f"  one text, several labels: {rows}")
    if output:
        print_written(output, len(done.ranked))


def _parse_columns(text: str | None) -> dict[str, str]:
    from finetune.errors import UsageError

    pairs = [part.partition("=") for part in text.split(",")] if text else []
    if any(role.strip() not in ("text", "label") or not column.strip() for role, _, column in pairs):
        raise UsageError(
            f"data audit: --columns must name columns for text and label, such as text=body,label=queue, got {text!r}."
        )
    return {role.strip(): column.strip() for role, _, column in pairs}


def _describe_audit(done: Audit) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "data": done.data,
        "features": done.features,
        "rows": len(done.ranked),
        "accuracy": done.accuracy,
        "suspects": [asdict(row) for row in done.suspects],
        "pairs": [
            {"given": given, "suggested": better, "rows": count} for (given, better), count in done.pairs.items()
        ],
        "conflicts": [asdict(conflict) for conflict in done.conflicts],
        "notes": done.notes,
    }


def _shorten(labels: list[str], most: int = 12) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more
