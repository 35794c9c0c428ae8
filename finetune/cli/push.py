"""`finetune push`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.output import AsJson, RunArgument, print_json, print_table, print_text

if TYPE_CHECKING:
    from finetune.artifact.push import Weights


def push_command(
    run: RunArgument,
    repo: Annotated[
        str | None, typer.Argument(metavar="[OWNER/NAME]", help="The repository; default the recipe's hub.repo.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new repository; default hub.private.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Whole weights, the adapter merged into its base.")] = False,
    both: Annotated[bool, typer.Option("--both", help="Merged weights, and the adapter alone in adapter/.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Although a gate was missed; the card says so.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and tell what would be uploaded.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a finished run on the Hugging Face Hub by one commit: model, card, recipe, run.lock; never its rows."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # loaded on first use

    from finetune.artifact.push import push

    if as_json:
        disable_progress_bars()
    weights: Weights = "both" if both else "merged" if merge else "adapter"
    done = push(run, repo, private=private, weights=weights, force=force, dry_run=dry_run)
    if as_json:
        print_json(done)
        return
    _show(done)


def _show(done: dict[str, Any]) -> None:
    print_table(["file", "bytes"], [[file["path"], f"{file['bytes']:,}"] for file in done["files"]])
    total = sum(file["bytes"] for file in done["files"])
    kind = "private" if done["private"] else "public"
    print_text(f"{done['repo']} ({kind}): {len(done['files'])} files, {total:,} bytes; weights: {done['weights']}")
    for warning in done["warnings"]:
        print_text(f"  warning: {warning}")
    if done["dry_run"]:
        print_text("Nothing was uploaded.")
    else:
        print_text(done["commit_url"] if done["is_new"] else f"Nothing had changed since {done['commit_url']}")
