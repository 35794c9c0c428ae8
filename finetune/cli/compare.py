"""`finetune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli.output import AsJson, Runs, print_json, print_table, print_text


def compare_command(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="COMPARISON | RUN RUN...",
            help="A comparison file, or its shipped name; or two or more finished runs, held against the first.",
        ),
    ],
    runs: Runs = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Also write a comparison's table as Markdown.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare ways of tuning fairly, from a file; or finished runs, with a paired test."""
    from finetune.comparison import compare

    if len(what) > 1:
        _check_runs(what, markdown)
        compared = compare(what)
        if as_json:
            print_json(compared)
        else:
            _show_runs(compared)
        return
    _check_file(what[0])
    results = compare(what[0], runs=runs, quiet=as_json)
    if markdown:
        _write_markdown(markdown, results)
    if as_json:
        print_json(results)
    else:
        _show_candidates(results)
    if results["failed"]:
        _fail(results, as_json)


def _check_runs(what: list[str], markdown: Path | None) -> None:
    from finetune.errors import UsageError

    if markdown:
        raise UsageError("compare: --markdown must come with a comparison file, got runs. Leave it out.")
    for word in what:
        if word.endswith((".yaml", ".yml")):
            raise UsageError(f"compare: must get one comparison file alone, or runs, got {word} among {len(what)}.")


def _check_file(word: str) -> None:
    from finetune.artifact.run_folder import is_run
    from finetune.errors import UsageError

    if is_run(Path(word)):
        raise UsageError(f"compare: must get two or more runs, got {word} alone. Add another one.")


def _show_runs(compared: dict[str, Any]) -> None:
    from finetune.artifact.compare_runs import describe_difference
    from finetune.evaluation.wording import decimals_of, format_score

    first, *_ = compared["runs"]
    metrics = compared["runs"][first]["metrics"]
    rows = []
    for name, one in compared["runs"].items():
        cells = [name]
        for metric, score in one["metrics"].items():
            difference = one["difference"].get(metric)
            cells.append(format_score(score, decimals_of(metric)))
            cells.append(describe_difference(difference, metric) if difference else "")
        rows.append(cells)
    columns = [word for metric in metrics for word in (metric, "difference")]
    title = f"{compared['rows']:,} test rows, {compared['confidence']:.0%} intervals, paired differences to {first}"
    print_table(["", *columns], rows, title=title)
    if len(compared["runs"]) > 2:
        print_text("p-values are corrected for the number of runs (Holm); intervals are not.")
    print_text(compared["answer"])


def _show_candidates(results: dict[str, Any]) -> None:
    from finetune.evaluation.comparison_page import describe_best, describe_seeds, list_cells

    share = [f"of {results['reference']}"] if results["reference"] else []
    columns = ["candidate", results["metric"], "trained", *share, "time", "memory", "on disk", "rate"]
    rows = [[cell for cell in row if cell is not None] for row in list_cells(results)]
    if rows:
        print_table(columns, rows)
        print_text(describe_seeds(results))
    print_text(describe_best(results))
    print_text(f"page    {results['page']}")


def _write_markdown(path: Path, results: dict[str, Any]) -> None:
    from finetune.evaluation.comparison_page import render_markdown
    from finetune.recipe.files import write_file_atomically

    write_file_atomically(path, render_markdown(results).encode())


def _fail(results: dict[str, Any], as_json: bool) -> None:
    """Exit with 4, as a missed gate does; with --json the results have said it already."""
    from finetune.errors import GateError

    if as_json:
        raise typer.Exit(GateError.exit_code)
    failed = results["failed"]
    words = "\n".join(f"  {name}: {' '.join(error.split())}" for name, error in failed.items())
    raise GateError(
        f"compare: every candidate must end well, got {len(failed)} of {len(results['candidates'])} that did not:\n"
        f"{words}\n  The others were compared; run the same command again to try these once more."
    )
