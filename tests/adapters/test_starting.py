"""Runs that start from saved adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import finetune
from finetune.adapters.attach import attach_adapter
from finetune.adapters.inheriting import bare_head, check_inheritance, inherit
from finetune.artifact.merge import merge_adapters
from finetune.artifact.starting import settle_adapters
from finetune.errors import RecipeError, UsageError
from finetune.models.base import BaseModel
from finetune.recipe.files import compute_sha256
from finetune.recipe.schema import AdapterSection, ModelSection
from finetune.tasks import TextClassification

LABELS = ["negative", "neutral", "positive"]
TEXTS = ["profit falls and the board cuts the dividend", "shares gain", "a new meeting schedule for the spring"]
HEAD = ["pooler", "classifier"]
WEIGHTS = "adapter_model.safetensors"
DORA = LoraConfig(target_modules=["q_proj"], use_dora=True)
FIX = "Make the recipe's adapter section that of the saved adapter, or leave model.adapters out."


@pytest.fixture
def attach(tiny_base: Path) -> Callable[..., PeftModel]:
    """A function (**adapter) -> the tiny base with a new adapter, as a run makes it."""

    def build(**section: Any) -> PeftModel:
        task, base = TextClassification(LABELS, {}), BaseModel(str(tiny_base), tiny_base, "local folder")
        model = task.build_model(base, ModelSection(), None, 0)
        return attach_adapter(model, AdapterSection(**section), task.list_modules(model)[1], str(tiny_base))

    return build


def read_adapter(model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    """As it would be saved."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return load_file(folder / WEIGHTS)


def test_one_adapter_is_taken_over_whole(attach, save_adapter, tmp_path):
    folder = save_adapter(tmp_path / "a", seed=1)
    model = attach(rank=4, alpha=6)
    check_inheritance(model, [folder], HEAD)
    assert inherit(model, [folder], HEAD, takes_head=True) == 0
    found, expected = read_adapter(model, tmp_path / "found"), load_file(folder / WEIGHTS)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_head_may_be_left(attach, save_adapter, tmp_path):
    folder = save_adapter(tmp_path / "a", seed=1)
    model = attach(rank=4, alpha=6)
    before = read_adapter(model, tmp_path / "before")
    inherit(model, [folder], HEAD, takes_head=False)
    found, saved = read_adapter(model, tmp_path / "found"), load_file(folder / WEIGHTS)
    for name, tensor in found.items():
        expected = saved if ".lora_" in name else before
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("rank", [2, 6, 9])
def test_several_start_at_their_mean(attach, save_adapter, tmp_path, rank):
    """As the merged adapter, which has its own tests: cut, of the very rank, and with room to spare."""
    folders = [save_adapter(tmp_path / "a", seed=1), save_adapter(tmp_path / "b", seed=2, r=2, lora_alpha=9)]
    merged = merge_adapters(dict.fromkeys(folders, 0.5), tmp_path / "merged", rank=min(rank, 6))
    model = attach(rank=rank, alpha=5)
    fresh = read_adapter(model, tmp_path / "fresh")
    check_inheritance(model, folders, HEAD)
    error = inherit(model, folders, HEAD, takes_head=True)
    assert error == pytest.approx(merged.error)
    assert (error > 0) == (rank == 2)
    found, expected = read_adapter(model, tmp_path / "found"), load_file(merged.folder / WEIGHTS)
    for name, down in found.items():
        if "lora_A" in name:
            up = name.replace("lora_A", "lora_B")
            torch.testing.assert_close(found[up] @ down * 5 / rank, expected[up] @ expected[name], atol=1e-6, rtol=1e-4)
            if rank == 9:  # what is to spare can still learn
                assert torch.equal(down[6:], fresh[name][6:])
                assert down[6:].abs().min() > 0
        elif "lora_B" not in name:
            torch.testing.assert_close(found[name], expected[name])


def test_a_layer_that_no_adapter_changed_starts_at_zero(attach, save_adapter, tmp_path):
    folders = [save_adapter(tmp_path / name, seed=seed, targets=["q_proj"]) for seed, name in enumerate("ab")]
    model = attach(rank=8)
    inherit(model, folders, HEAD, takes_head=False)
    updates = {
        name: bool((module.get_delta_weight("default") != 0).any())
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert {name.endswith("q_proj") for name, changes in updates.items() if changes} == {True}
    assert sum(updates.values()) == 2


def test_a_new_head_can_start_inside_of_the_adapter(attach):
    model = attach(rank=4)
    wrapped = model.base_model.model.classifier
    with bare_head(model, ["classifier"]) as inner:
        assert inner.classifier is wrapped.modules_to_save["default"]
        torch.nn.init.constant_(inner.classifier.weight, 2.0)
    assert model.base_model.model.classifier is wrapped
    assert bool((wrapped.modules_to_save["default"].weight == 2).all())


# Whole runs


def run_from(write_recipe: Callable[..., Path], folder: Path, adapters: list[Path], **changes: Any) -> finetune.Run:
    recipe = write_recipe(folder / "in", model={"adapters": [str(path) for path in adapters]}, **changes)
    return finetune.run(recipe, runs=folder / "runs", quiet=True)


# One step at a rate that moves nothing: what is saved is what was started from.
STILL = {"max_steps": 1, "learning_rate": 1e-12, "ema_decay": None, "weight_decay": 0.0}


def test_a_run_goes_on_from_a_run(write_recipe, finished_run, tmp_path):
    run = run_from(write_recipe, tmp_path, [finished_run.parent], train=STILL)
    expected = finetune.load(finished_run)
    found = run.load()
    rows = expected.clean(TEXTS)
    assert found.compute_logits(rows) == pytest.approx(expected.compute_logits(rows), abs=1e-5)
    resolved = (run.folder.path / "recipe.resolved.yaml").read_text()
    assert str(finished_run / "model") in resolved, "the name alone may mean another run tomorrow"
    (sha256,) = json.loads(run.folder.lock.read_text())["adapters"].values()
    assert sha256 == compute_sha256(finished_run / "model" / WEIGHTS)
    config = json.loads((run.folder.model / "adapter_config.json").read_text())
    assert (
        config["base_model_name_or_path"]
        == json.loads((finished_run / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )


def test_a_head_for_other_classes_starts_anew(write_recipe, finished_run, tmp_path):
    tasks = {"tone": {"labels": ["positive", "neutral", "negative"]}}
    run = run_from(write_recipe, tmp_path, [finished_run], train=STILL, tasks=tasks)
    found, saved = (load_file(folder / WEIGHTS) for folder in (run.folder.model, finished_run / "model"))
    for name in [name for name in found if ".lora_" in name]:
        torch.testing.assert_close(found[name], saved[name])
    name = "base_model.model.classifier.weight"
    assert not torch.allclose(found[name], saved[name])
    assert run.test["metrics"]["macro_f1"]["value"] > 0.8, "centroids of what the adapter has learned"


def test_a_folder_of_peft_alone(write_recipe, finished_run, tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy(finished_run / "model" / name, folder)
    plan = finetune.check(write_recipe(tmp_path / "in", model={"adapters": [str(folder)]}))
    assert plan["parameters"] == finetune.check(write_recipe(tmp_path / "in"))["parameters"]


def test_a_stopped_run_goes_on_from_its_checkpoint(write_recipe, finished_run, tmp_path):
    """The adapters are where it started, not where it goes on."""
    whole = run_from(write_recipe, tmp_path / "whole", [finished_run])
    stopped = run_from(write_recipe, tmp_path / "stopped", [finished_run])
    shutil.rmtree(stopped.folder.model)
    for checkpoint in sorted(stopped.folder.checkpoints.iterdir())[1:]:
        shutil.rmtree(checkpoint)
    stopped.folder.update_status(state="stopped")
    resumed = finetune.resume(stopped.folder.path, quiet=True)
    expected, found = (load_file(run.folder.model / WEIGHTS) for run in (whole, resumed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Words


def refuse(write_recipe: Callable[..., Path], folder: Path, adapters: list[Any], **changes: Any) -> str:
    """`check` refuses, and so does `run`, before it makes a folder."""
    model = {"adapters": [str(path) for path in adapters], **changes.pop("model", {})}
    path = write_recipe(folder / "in", model=model, **changes)
    with pytest.raises((RecipeError, UsageError)) as caught:
        finetune.check(path)
    with pytest.raises((RecipeError, UsageError)):
        finetune.run(path, runs=folder / "runs", quiet=True)
    assert not (folder / "runs").exists()
    return str(caught.value)


LORA = {"method": "lora", "rank": 4, "alpha": 6}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "ia3"}, "adapter.method: must be ia3, as in {folder}, got lora. {fix}"),
        ({"r": 5}, "adapter.rank: must be 5, as in {folder}, got 4. {fix}"),
        ({"lora_alpha": 7}, "adapter.alpha: must be 7, as in {folder}, got 6. {fix}"),
        (
            {"targets": ["q_proj"]},
            "model.adapters: {folder} must change every layer that the new adapter changes, lacks 20: "
            "base_model.model.model.encoder.layers.0.attention.k_proj.lora_A.weight first. {fix}",
        ),
        ({"rank_pattern": {"q_proj": 2}}, "model.adapters: {folder} must have the shapes of the new adapter, got "),
        (
            {"architecture": "native"},
            "model.adapters: {folder} must be an adapter of a triad model, got one of a bert model. "
            "Set model.architecture: native.",
        ),
    ],
)
def test_words_for_an_adapter_that_does_not_fit(write_recipe, save_adapter, tmp_path, options, words):
    folder = save_adapter(tmp_path / "a", **options)
    found = refuse(write_recipe, tmp_path, [folder], adapter=LORA)
    assert found.startswith(words.format(folder=folder, fix=FIX))


def test_words_for_layers_that_the_new_adapter_leaves(write_recipe, save_adapter, tmp_path):
    folder = save_adapter(tmp_path / "a")
    found = refuse(write_recipe, tmp_path, [folder], adapter=LORA | {"targets": ["q_proj"]})
    assert found == (
        f"model.adapters: {folder} must change only layers that the new adapter changes too, has 20 more: "
        f"base_model.model.model.encoder.layers.0.attention.k_proj.lora_A.weight first. {FIX}"
    )


def test_words_for_several_that_do_not_add_up(write_recipe, save_adapter, tmp_path):
    folders = [save_adapter(tmp_path / "a"), save_adapter(tmp_path / "b", use_dora=True)]
    assert refuse(write_recipe, tmp_path, folders, adapter=LORA) == (
        f"{folders[1]}: must be plain LoRA to be added to others, got DoRA's magnitudes, which do not add up."
    )


@pytest.mark.parametrize("config", [IA3Config(target_modules=["q_proj"], feedforward_modules=[]), DORA])
def test_words_for_several_where_the_new_adapter_does_not_add_up(save_adapter, tiny_base, tmp_path, config):
    base = BaseModel(str(tiny_base), tiny_base, "local folder")
    model = get_peft_model(TextClassification(LABELS, {}).build_model(base, ModelSection(), None, 0), config)
    with pytest.raises(RecipeError) as caught:
        check_inheritance(model, [save_adapter(tmp_path / name) for name in "ab"], HEAD)
    assert str(caught.value) == (
        "model.adapters: must name one adapter unless adapter.method is plain lora, got 2: other methods do not add up."
    )


def test_words_for_another_base(write_recipe, save_adapter, tiny_base, tmp_path):
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors")
    folder = save_adapter(tmp_path / "a", base=other)
    assert refuse(write_recipe, tmp_path, [folder], adapter=LORA) == (
        f"model.adapters: {folder} must be an adapter of model.base, {tiny_base}, got one of {other}. "
        f"Set model.base: {other}."
    )


def test_a_base_may_be_named_in_two_ways(write_recipe, save_adapter, tiny_base, tmp_path):
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    folder = save_adapter(tmp_path / "a", base=other)
    finetune.check(write_recipe(tmp_path / "in", model={"adapters": [str(folder)]}, adapter=LORA))


def test_words_for_whole_weights(save_adapter, tmp_path):
    folder = save_adapter(tmp_path / "a", method="full")
    with pytest.raises(RecipeError) as caught:
        settle_adapters([str(folder)])
    assert str(caught.value) == (
        f"model.adapters: '{folder}' must be an adapter, got a model whose every weight was tuned. "
        "Set model.base to it."
    )


def test_words_for_no_adapter(tmp_path):
    with pytest.raises(RecipeError) as caught:
        settle_adapters([str(tmp_path / "nothing")])
    assert str(caught.value) == (
        f"model.adapters: '{tmp_path / 'nothing'}' must be a run, its model/ folder or a folder with an "
        "adapter_config.json, got none of these."
    )


def test_words_for_full_tuning(write_recipe, finished_run, tmp_path):
    found = refuse(write_recipe, tmp_path, [finished_run], adapter={"method": "full"})
    assert (
        "model.adapters: must be left out when adapter.method is full, got 1: nothing would take their place." in found
    )
