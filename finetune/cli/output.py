"""How every verb speaks: JSON on standard output for programs, tables for people, errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

MIN_TABLE_WIDTH = 110

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Engine = Annotated[
    str | None, typer.Option("--engine", help="A format that finetune export wrote of the run, such as onnx-int8.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from `finetune recipes list`.")
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder; runs/NAME means its latest finished run.")
]
Runs = Annotated[Path | None, typer.Option("--runs", help="Where runs are kept; default ./runs.")]


def print_json(content: Any) -> None:
    """Print one JSON value."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def print_text(text: str) -> None:
    """Print words as they are, without markup."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def make_printable(text: str) -> str:
    """The text without what a terminal obeys: escape sequences, and marks that turn the direction of writing."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def print_note(text: str) -> None:
    """What goes on, on standard error: long work must not look like no work."""
    typer.echo(text, err=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table without markup in its cells."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=position == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A score with its interval is read as one piece: rather scroll than break it.
    Console(width=max(Console().width, MIN_TABLE_WIDTH)).print(table)


def print_findings(findings: Sequence[Mapping[str, Any]]) -> None:
    """One line for each finding of the data checks."""
    for finding in findings:
        print_text(f"  {finding['severity']:8} {finding['message']}")


def suggest_output(stem: str, source: Path) -> str:
    """A file to write the rows of `source` to, in its own format where that can be written."""
    ending = next((suffix for suffix in source.suffixes if suffix.lower() in (".jsonl", ".parquet")), ".csv")
    return stem + ending.lower()


def print_written(output: Path, rows: int) -> None:
    """A file of rows is there."""
    from finetune.recipe.messages import count_of  # with pydantic, which --help does not load

    print_text(f"{output}: {count_of(rows, 'row')} written.")


def fail(message: str, code: int, as_json: bool, findings: Sequence[Mapping[str, Any]] = ()) -> NoReturn:
    """Say what went wrong and exit; `findings` are what checks of the rows saw."""
    if as_json:
        print_json({"error": message, "exit_code": code} | ({"findings": findings} if findings else {}))
    sys.stderr.write(f"finetune: {message}\n")
    sys.exit(code)


def show_outcomes(figures: Mapping[str, Any], asked: str, title: str) -> None:
    """What came of what an assistant was asked, in and out of scope.

    Args:
        figures: as `applications.support.evaluate.summarize` has them.
        asked: what was judged, such as questions.
        title: of the table.
    """
    from finetune.applications.support.evaluate import OUTCOMES
    from finetune.evaluation.wording import format_score

    rows = []
    for name in ("in_scope", "out_of_scope"):
        if part := figures.get(name):
            said, count = name.replace("_", " "), f"{part['questions']:,}"
            rows.append([said, count, *(format_score(part[outcome]) for outcome in OUTCOMES)])
            if any(part["in_the_end"][each]["value"] != part[each]["value"] for each in OUTCOMES):
                rows.append([f"{said}, in the end", "", *(format_score(part["in_the_end"][each]) for each in OUTCOMES)])
    print_table(["", asked, *(outcome.replace("_", " ") for outcome in OUTCOMES)], rows, title=title)
