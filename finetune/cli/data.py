"""`finetune data list | show`."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.cli.output import AsJson, print_json, print_table, print_text

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
        "source": card.source or "",
        "cite": card.citation or "",
        "notes": card.notes,
    }
    for key, value in facts.items():
        if value:
            print_text(f"  {key:8} {value}")


def _shorten(labels: list[str], most: int = 12) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more
