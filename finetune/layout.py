"""From a recipe to the folder of a run: what it starts from is settled, its rows are checked and encoded, and a later
process finds them as they were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters.attach import ParameterCount, check_adapter, check_length, plan_parameters
from finetune.adapters.targets import find_targets
from finetune.artifact.assess import choose_evaluation, list_known_slices
from finetune.artifact.run_folder import (
    RunFolder,
    create_run_folder,
    describe_host,
    find_run,
    is_run,
    load_json,
    save_json,
)
from finetune.artifact.starting import check_adapters, compute_fingerprints, settle_adapters
from finetune.artifact.teacher import ask_teacher
from finetune.data.checks import findings_to_json
from finetune.errors import DataError, ModelError
from finetune.evaluation.scoring import check_early_stop, check_section
from finetune.evaluation.slices import check_slice_columns
from finetune.models.base import SCRATCH, BaseModel, load_tokenizer, resolve_base
from finetune.models.quantization import BYTES, check_quantization
from finetune.recipe import dump_recipe
from finetune.recipe.files import write_file_atomically
from finetune.recipe.schema import Recipe
from finetune.tasks import TASKS
from finetune.tasks.contrastive import check_rows_per_class
from finetune.tasks.preparation import Prepared, prepare
from finetune.training.precision import choose_precision

# A base at hand, and rows that passed every check.
Ready = tuple[BaseModel, Prepared]


def lay_out(recipe: Recipe, path: Path, runs: str | Path | None) -> tuple[RunFolder, Ready]:
    """Prepare the data of a recipe and lay out the folder of its run.

    Args:
        recipe: resolved.
        path: its file, for relative paths.
        runs: where runs are kept.
    """
    recipe = settle_base(recipe)
    ready = prepare_rows(recipe, path.parent)
    recipe = settle_splits(recipe, {name: part.section.split.by for name, part in ready[1].parts.items()})
    plan_weights(recipe, ready)  # what cannot be built leaves no folder
    if recipe.train.distill:
        ready = ready[0], ask_teacher(ready[1], recipe.train.distill)
    return start(recipe, path.read_bytes(), path.parent, ready, runs), ready


def settle_base(recipe: Recipe) -> Recipe:
    """A recipe with the models of the runs that it starts from: a name may mean another run tomorrow."""
    model = recipe.model.model_copy(update={"adapters": settle_adapters(recipe.model.adapters)})
    train = recipe.train
    if train.distill and is_run(Path(train.distill.teacher)):
        teacher = str(find_run(train.distill.teacher).model.resolve())
        train = train.model_copy(update={"distill": train.distill.model_copy(update={"teacher": teacher})})
    recipe = recipe.model_copy(update={"model": model, "train": train})
    path = Path(recipe.model.base).expanduser()
    if not is_run(path):
        return recipe
    folder = str(find_run(path).model.resolve())
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": folder})})


def settle_splits(recipe: Recipe, ways: Mapping[str, str]) -> Recipe:
    """A recipe with what `split.by: auto` came to; the rows alone say.

    Args:
        recipe: resolved.
        ways: task name -> `split.by`.
    """
    tasks = dict(recipe.tasks)
    for name in ways.keys() & tasks.keys():
        if tasks[name].split.by == "auto":
            split = tasks[name].split.model_copy(update={"by": ways[name]})
            tasks[name] = tasks[name].model_copy(update={"split": split})
    return recipe.model_copy(update={"tasks": tasks})


def prepare_rows(recipe: Recipe, recipe_folder: Path, tokenizer: Any = None) -> Ready:
    """The base and the checked, encoded rows of a recipe; loads no weights.

    Args:
        recipe: resolved.
        recipe_folder: for its relative paths.
        tokenizer: the one that a run learned at its start; None for the base's, or for a new one from scratch.

    Raises:
        RecipeError, DataError, ModelError: what cannot be trained on, or judged.
    """
    kinds = {name: TASKS[task.type].scored_by for name, task in recipe.tasks.items()}
    for name, kind in kinds.items():
        check_section(choose_evaluation(recipe, name), kind)
    if recipe.train.early_stop:
        check_early_stop(recipe.train.early_stop.metric, kinds)
    check_quantization(recipe.model.quantize)
    base = resolve_base(recipe.model.base)
    prepared = prepare(
        recipe.tasks,
        recipe.model,
        base,
        seed=recipe.train.seed,
        relative_to=recipe_folder,
        tokenizer=tokenizer,
    )
    if recipe.train.few_shot == "contrastive":
        check_rows_per_class(prepared.examples["train"], list(prepared.task.labels or []))
    for name, kind in kinds.items():
        _check_slices(recipe, prepared, name, kind)
    return base, prepared


def _check_slices(recipe: Recipe, prepared: Prepared, name: str, kind: str) -> None:
    """Before anything is trained, for a run whose slices do not exist could never be judged."""
    if kind == "next_items":  # takes those that it has
        return
    section = list_known_slices(choose_evaluation(recipe, name), prepared, name)
    for rows in (prepared.parts[name].splits[split] for split in ("validation", "test")):
        has_rows = kind not in ("likelihood", "masked")  # those are scored by blocks of text
        check_slice_columns(section.slices, sorted({key for row in rows for key in row.values}) if has_rows else [])


def plan_weights(recipe: Recipe, ready: Ready) -> ParameterCount:
    """Weights that would be trained, from shapes alone.

    Raises:
        RecipeError, ModelError: a model that cannot be built, or has nothing that the adapter could change.
    """
    base, prepared = ready
    task = prepared.task
    model = task.build_shape(base, recipe.model, prepared.tokenizer)
    check_length(model, recipe.model.max_length, base.reference)
    check_adapter(model, recipe.adapter, recipe.model.max_length)
    head = task.list_modules(model)[1]
    if recipe.model.quantize != "none":
        find_targets(model, "all-linear", head, takes_conv1d=False)  # GPT-2's own layers no library has in fewer bits
    count = plan_parameters(model, recipe.adapter, head, task.peft_type)
    if recipe.model.adapters:
        check_adapters(model, recipe.adapter, head, base, recipe.model.adapters)
    return count


def estimate_memory(recipe: Recipe, ready: Ready, count: ParameterCount) -> int:
    """Bytes that training holds whatever its batches are: weights, gradients, the optimizer, average and copies.

    Args:
        recipe: resolved.
        ready: its base and its rows.
        count: from `plan_weights`.
    """
    base, prepared = ready
    model = prepared.task.build_shape(base, recipe.model, prepared.tokenizer)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    # Each weight; for a trained one its gradient and AdamW's two moments.
    needed = 4 * count.total + 12 * count.trained
    if recipe.train.ema_decay is not None:
        needed += 4 * count.trained
    if recipe.model.quantize != "none":
        needed -= round((4 - BYTES[recipe.model.quantize]) * linear)
    elif choose_precision(recipe.train.precision) == "bf16":
        needed += 2 * linear  # kept beside them
    return needed


def start(recipe: Recipe, text: bytes, recipe_folder: Path, ready: Ready, runs: str | Path | None) -> RunFolder:
    """Lay out the folder of a run whose data passed every check: recipe, rows, what a repetition needs.

    Args:
        recipe: resolved.
        text: the recipe as it was given.
        recipe_folder: for its relative paths.
        ready: its base and its rows.
        runs: where runs are kept.
    """
    base, prepared = ready
    folder = create_run_folder(recipe.name, dump_recipe(recipe), runs)
    write_file_atomically(folder.path / "recipe.yaml", text)
    write_file_atomically(folder.recipe, dump_recipe(recipe).encode())
    save_json(folder.data / "ids.json", _list_ids(prepared))
    save_json(folder.data / "findings.json", findings_to_json(prepared.findings))
    save_json(folder.data / "task.json", prepared.task.to_config())
    if base.reference == SCRATCH.reference:
        prepared.tokenizer.save_pretrained(folder.tokenizer)
    for split, examples in prepared.examples.items():
        examples.save(folder.examples(split))
    shape = prepared.task.build_shape(base, recipe.model, prepared.tokenizer)
    save_json(
        folder.lock,
        describe_host()
        | {
            "seed": recipe.train.seed,
            "precision": choose_precision(recipe.train.precision),
            "base": {
                "reference": base.reference,
                "origin": base.origin,
                "sha256": base.compute_fingerprint(),
                "pooling": getattr(shape.config, "pooling", None),  # `auto` asks files that a cache may lack
            },
            "adapters": compute_fingerprints(recipe.model.adapters),
            "data": {"name": prepared.source_name, "sha256": prepared.fingerprint},
        },
    )
    folder.update_status(state="started", recipe_folder=str(recipe_folder.resolve()))
    return folder


def _list_ids(prepared: Prepared) -> dict[str, dict[str, list[str]]]:
    """Task name -> split -> ids of its rows."""
    return {
        name: {split: [row.id for row in rows] for split, rows in part.splits.items()}
        for name, part in prepared.parts.items()
    }


def prepare_again(folder: RunFolder, recipe: Recipe) -> Ready:
    """Base and rows of a run, read anew and held against what it was started with.

    Raises:
        DataError: the data changed since, or how they are split.
        ModelError: the base's weights did.
    """
    base, prepared = prepare_rows(recipe, folder.recipe_folder, load_learned_tokenizer(folder))
    lock = load_json(folder.lock)
    expected, found = lock["base"]["sha256"], base.compute_fingerprint()
    if expected != found:
        raise ModelError(
            f"model.base: {base.reference} must be the weights that {folder.name} was started with (sha256 "
            f"{expected[:12]}), got others (sha256 {found[:12]}). Restore them, or start a new run."
        )
    expected, found = lock["data"]["sha256"], prepared.fingerprint
    if expected != found:
        raise DataError(
            f"{prepared.origin}: must be the data that {folder.name} was started with (sha256 {expected[:12]}), "
            f"got other rows (sha256 {found[:12]}). Restore the file, or start a new run."
        )
    if load_json(folder.data / "ids.json") != _list_ids(prepared):
        raise DataError(
            f"{prepared.origin}: must be split as when {folder.name} was started (data/ids.json), got other splits: "
            "another version of the toolkit deals rows out otherwise, and test rows were learned from. Start a new run."
        )
    return base, prepared


def load_learned_tokenizer(folder: RunFolder) -> Any:
    """The tokenizer that a run learned at its start; None where it uses its base's."""
    path = folder.tokenizer
    return load_tokenizer(BaseModel(str(path), path, "this run")) if path.is_dir() else None
