"""`finetune recommend`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.output import AsJson, RunArgument, make_printable, print_json, print_note, print_table, print_text

if TYPE_CHECKING:
    from finetune.applications.recommender.recommender import Recommender
    from finetune.applications.recommender.records import RankedList


def recommend_command(
    run: RunArgument,
    history: Annotated[
        str | None, typer.Option("--history", help="Ids of what the person had, oldest first: a,b,c.")
    ] = None,
    user: Annotated[str | None, typer.Option("--user", help="A person of the events instead.")] = None,
    events: Annotated[
        str | None, typer.Option("--events", help="A file or card with the events of --user; default the run's own.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help='People, one a line: {"user": ..., "history": [...]}.')
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where the lists of --input go: JSONL or Parquet.")
    ] = None,
    top: Annotated[int, typer.Option("--top", help="Items of a list.")] = 10,
    exclude_seen: Annotated[
        bool | None,
        typer.Option("--exclude-seen/--include-seen", help="Leave out what the person had; default as in the recipe."),
    ] = None,
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="A condition such as 'price < 20'; repeatable.")
    ] = None,
    diversity: Annotated[
        float, typer.Option("--diversity", help="From 0, the plain order, to 1, what is least alike.")
    ] = 0.0,
    items: Annotated[
        Path | None, typer.Option("--items", help="A catalogue with new items, which are scored from their texts.")
    ] = None,
    index: Annotated[
        str, typer.Option("--index", help="exact, or faiss for large catalogues and runs without `rank`.")
    ] = "exact",
    as_json: AsJson = False,
) -> None:
    """Recommend items to a person, or to many, each with the reason why."""
    from finetune.errors import UsageError

    given = {"--history": history, "--user": user, "--input": source}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        got = ", ".join(chosen) or "none"
        raise UsageError(f"recommend: must get one of --history, --user and --input, got {got}.")
    if events is not None and user is None:
        raise UsageError("--events: must come with --user, whose history it holds, got none. Add --user ID.")
    if source is None and output is not None:
        raise UsageError("recommend: --output must come with --input, got none. Add --input people.jsonl")
    if source is not None and output is None:
        raise UsageError("recommend: --input must come with --output, got none. Add --output ranked.parquet")
    from finetune.applications.recommender.load import load_people, load_recommender
    from finetune.applications.recommender.recommender import Wish

    wish = Wish(top, exclude_seen, tuple(filters or ()), diversity)

    def load() -> Recommender:
        recommender = load_recommender(run, items=items, index=index)
        if recommender.nearest is not None and not as_json:
            print_note(recommender.nearest.describe())
        return recommender

    if source is not None and output is not None:
        from finetune.applications.recommender.rank_file import rank_file

        count = rank_file(load, source, output, wish, quiet=as_json)
        if as_json:
            print_json({"output": str(output), "people": count})
        else:
            print_text(f"{output}: the lists of {count:,} people written.")
        return
    recommender = load()
    had = load_people(run, events).find(user) if user is not None else (history or "").split(",") if history else []
    (found,) = recommender.answer([had], wish)
    if as_json:
        print_json(({} if user is None else {"user": user}) | found.to_json())
    else:
        _show(found)


def _show(found: RankedList) -> None:
    for note in found.notes:
        print_note(make_printable(note))
    if not found.items:
        print_text("No item meets the conditions.")
        return
    from finetune.applications.recommender.records import shorten

    rows = [[one.id, shorten(one.text), f"{one.score:.3f}", one.why] for one in found.items]
    print_table(["id", "item", "score", "why"], [[make_printable(cell) for cell in row] for row in rows])
