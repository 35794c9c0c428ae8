"""Publish a finished run on the Hub: collect its files, check all that could be wrong, then one commit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from huggingface_hub import HfApi

from finetune.adapters.attach import merge_adapter
from finetune.artifact import hub
from finetune.artifact.card import Publication, build_model_card, warn_of_licences
from finetune.artifact.load import load
from finetune.artifact.run_folder import RunFolder, find_run, load_json, now, save_json
from finetune.artifact.save import save_model
from finetune.artifact.saved import Saved, open_saved
from finetune.artifact.scan import list_paths, scan_file, shorten_paths
from finetune.data.catalog import card_names, load_card
from finetune.errors import FinetuneError, GateError, ModelError, ResourceError, UsageError
from finetune.evaluation.gates import join_gates, list_missed_gates
from finetune.models.base import LOCAL
from finetune.recipe import load_recipe
from finetune.recipe.card import Card
from finetune.recipe.schema import Recipe
from finetune.tasks import MultiTask, Recommendation, Task

Weights = Literal["adapter", "merged", "both"]
RECEIPT = "push.json"
CARD = "README.md"


@dataclass(frozen=True)
class _Request:
    """What is to be pushed, settled."""

    run: RunFolder
    recipe: Recipe
    saved: Saved
    repo: str
    private: bool
    weights: Weights
    missed: list[str]
    """Gates, in words."""

    @property
    def has_local_base(self) -> bool:
        """Whether it is an adapter on a folder of the machine that trained it: a Hub id may look the same."""
        return self.saved.base is not None and load_json(self.run.lock)["base"]["origin"] == LOCAL

    @property
    def is_merging(self) -> bool:
        return self.weights != "adapter" and self.saved.base is not None

    def write_command(self, *, force: bool) -> str:
        """What repeats the push."""
        options = {"adapter": [], "merged": ["--merge"], "both": ["--both"]}[self.weights]
        options += ["--private" if self.private else "--public", *(["--force"] if force else [])]
        return shlex.join(["finetune", "push", str(self.run.path), self.repo, *options])


def push(
    reference: str | Path,
    repo: str | None = None,
    *,
    private: bool | None = None,
    weights: Weights = "adapter",
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Put a finished run on the Hub: model, card, recipe and run.lock; never its rows.

    A recommender's catalogue is part of its model, and the warnings say so.

    Args:
        reference: the run.
        repo: owner/name; None takes the recipe's `hub.repo`.
        private: None takes the recipe's `hub.private`. A repository that is there stays what it is.
        weights: of an adapter: it alone, merged into its base, or both (the adapter in `adapter/`). What was tuned
            whole is pushed whole.
        force: also where the run missed a gate; the card says so.
        dry_run: check and tell what would be uploaded; needs no token and no network.

    Returns:
        `repo`, `private`, `weights`, `files` (path and bytes), `warnings`, and of a real push `oid`, `commit_url` and
        `is_new`: False where all was there already.

    Raises:
        UsageError, GateError, ResourceError: all problems at once, before anything is uploaded; as the first of them.
        ResourceError: the Hub did not take it. The run is as it was, and repeating sends only what is missing.
    """
    request = _settle(reference, repo, private, weights)
    with TemporaryDirectory(prefix="finetune-push-") as temporary:
        problems: list[FinetuneError] = _check_request(request, force=force)
        files: dict[str, Path] = {}
        try:
            files = _collect(request, Path(temporary))
        except ModelError as error:  # an adapter that cannot be merged
            problems.append(error)
        problems += [UsageError(words) for words in _scan(request, files)]
        found, on_hub = (hub.Repository(), []) if dry_run else _ask_hub(request)
        _raise_all(request, [*problems, *on_hub])
        plan = _describe(request, files) | {"dry_run": dry_run}
        if dry_run:
            return plan
        if found.head is not None:
            plan["private"] = found.private
        done = _upload(request, found, files, request.write_command(force=force))
    receipt: dict[str, Any] = {"repo": request.repo, "commit_url": done.url, "oid": done.oid, "time": now()}
    receipt |= {"private": plan["private"], "weights": plan["weights"], "missed_gates": request.missed}
    save_json(request.run.path / RECEIPT, receipt)
    return plan | {"commit_url": done.url, "oid": done.oid, "is_new": done.is_new}


def _settle(reference: str | Path, repo: str | None, private: bool | None, weights: Weights) -> _Request:
    run = find_run(reference)
    recipe = load_recipe(run.recipe)
    name = repo or recipe.hub.repo
    if name is None:
        raise UsageError(
            f"push: must know where to, got no name and no hub.repo in the recipe. Write: finetune push {reference} "
            "owner/name"
        )
    tests = {task: load_json(place / "test.json") for task, place in run.evaluations().items()}
    return _Request(
        run=run,
        recipe=recipe,
        saved=open_saved(run.model),
        repo=name,
        private=recipe.hub.private if private is None else private,
        weights=weights,
        missed=list_missed_gates(join_gates(tests)),
    )


def _check_request(request: _Request, *, force: bool) -> list[FinetuneError]:
    """What can be said without the files' content and without the Hub."""
    problems: list[FinetuneError] = []
    if wrong := hub.check_name(request.repo):
        problems.append(UsageError(wrong))
    if request.missed and not force:
        problems.append(
            GateError(
                f"evaluate.gates: must be passed, got {'; '.join(request.missed)}. Improve the model, or add --force: "
                "the card will say so."
            )
        )
    if request.weights != "merged" and request.has_local_base:
        problems.append(
            UsageError(
                f"adapter_config.json: its base must be on the Hub, got a folder of this machine, {request.saved.base}."
                " Add --merge, or train on a base that others can load."
            )
        )
    return problems


def _collect(request: _Request, temporary: Path) -> dict[str, Path]:
    """Path in the repository -> file; what is not in the run is written to a temporary folder.

    Raises:
        ModelError: an adapter that cannot be merged.
    """
    run, model = request.run, request.run.model
    if request.is_merging:
        model = temporary / "merged"
        _merge(request.saved, model)
    files = {path.name: path for path in sorted(model.iterdir()) if path.is_file()}
    if request.is_merging and request.weights == "both":
        files |= {f"{hub.ADAPTER_PLACE}/{path.name}": path for path in sorted(run.model.iterdir()) if path.is_file()}
    written = {CARD: _build_card(request)}
    for path in (run.path / "recipe.yaml", run.recipe, run.lock):
        written[path.name] = shorten_paths(path.read_text(encoding="utf-8"))
    for name, text in written.items():
        files[name] = temporary / name
        files[name].write_text(text, encoding="utf-8")
    return files


def _merge(saved: Saved, folder: Path) -> None:
    """Write the model whole, as `load` makes it, in the form in which it was saved."""
    from transformers import AutoTokenizer

    model = merge_adapter(load(saved.folder).model).cpu()
    save_model(model, AutoTokenizer.from_pretrained(saved.folder, trust_remote_code=False), folder, saved.own_settings)


def _build_card(request: _Request) -> str:
    run, recipe = request.run, request.recipe
    tests = {name: load_json(place / "test.json") for name, place in run.evaluations().items()}
    publication = Publication(
        repo=request.repo,
        merged=request.is_merging,
        adapter_place=hub.ADAPTER_PLACE if request.is_merging and request.weights == "both" else None,
        missed=request.missed,
        holds=list_content(request.saved.task),
    )
    return build_model_card(recipe, _load_cards(recipe), tests, run.load_status(), load_json(run.lock), publication)


def list_content(task: Task | MultiTask) -> list[str]:
    """What of the data is part of a model and goes where it goes, in sentences."""
    if not isinstance(task, Recommendation):
        return []
    catalogue = task.catalogue
    columns = ["ids", "texts", *(str(name) for name in catalogue.columns)]
    return [
        f"The catalogue of {len(catalogue.ids):,} items is part of the model ({', '.join(columns)}), and so is how "
        "often each was had and which were had together; no person's history is."
    ]


def _load_cards(recipe: Recipe) -> dict[str, Card | None]:
    """Task name -> the card of its data; None for a user's own file."""
    known = set(card_names())
    return {name: load_card(section.data) if section.data in known else None for name, section in recipe.tasks.items()}


def _scan(request: _Request, files: Mapping[str, Path]) -> list[str]:
    """What in the files must not be published."""
    places = [request.run.path.resolve(), request.run.recipe_folder.resolve(), Path.home(), Path.cwd()]
    own = [*map(str, places), *list_paths(request.run.recipe.read_text(encoding="utf-8"))]
    return [
        problem
        for name, path in files.items()
        # An adapter of a local base was named already, with the way out.
        if not (name.endswith("adapter_config.json") and request.has_local_base)
        for problem in scan_file(name, path, own)
    ]


def _ask_hub(request: _Request) -> tuple[hub.Repository, list[FinetuneError]]:
    """What lies under the name, and what forbids a push: token, owner, kind, privacy."""
    api = HfApi()
    try:
        problems = hub.check_account(api, request.repo)
        if problems or hub.check_name(request.repo):
            return hub.Repository(), [ResourceError(words) for words in problems]
        found, problems = hub.look_up(api, request.repo)
    except Exception as error:  # the client's own, and those of two libraries under it
        return hub.Repository(), [
            ResourceError(f"{request.repo}: must be looked up on the Hub, got this: {hub.describe_failure(error)}.")
        ]
    if found.head is not None and request.private and not found.private:
        problems.append(
            f"{request.repo}: must be private, got a public repository. Make it private on the Hub, or add --public."
        )
    return found, [UsageError(words) for words in problems]


def _raise_all(request: _Request, problems: list[FinetuneError]) -> None:
    """Raise every problem at once, as the kind of the first."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    count = f"{request.run.path}: must be fit to be published, got {len(problems)} problems"
    raise type(problems[0])("\n  ".join([count, *map(str, problems)]))


def _describe(request: _Request, files: Mapping[str, Path]) -> dict[str, Any]:
    return {
        "repo": request.repo,
        "private": request.private,
        "weights": request.weights if request.saved.base is not None else "whole",
        "files": [{"path": name, "bytes": path.stat().st_size} for name, path in sorted(files.items())],
        "warnings": [
            *list_content(request.saved.task),
            *warn_of_licences(request.recipe, _load_cards(request.recipe)),
            *request.missed,
        ],
    }


def _upload(request: _Request, found: hub.Repository, files: Mapping[str, Path], command: str) -> hub.Commit:
    message = f"{request.recipe.name}: {request.run.name}"
    try:
        return hub.commit(HfApi(), request.repo, found, files, private=request.private, message=message)
    except Exception as error:  # the client's own, and those of two libraries under it
        raise ResourceError(
            f"{request.repo}: must take the push, got this: {hub.describe_failure(error)}.\n"
            "  The run is as it was. What has arrived is not sent again; repeat with:\n"
            f"  {command}"
        ) from error
