"""The weighted sum of LoRA adapters, held against matrices multiplied out and against PEFT's own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import finetune
from finetune.adapters.attach import load_adapter
from finetune.adapters.merging import add_updates, cut_rank, load_updates
from finetune.artifact.merge import merge_adapters
from finetune.artifact.saved import open_saved
from finetune.errors import ModelError, UsageError
from finetune.models.base import resolve_base

TEXTS = ["profit falls and the board cuts the dividend", "shares gain", "a new meeting schedule for the spring"]
PREFIX = "base_model.model."
QUERY = "model.encoder.layers.0.attention.q_proj"
HEAD = f"{PREFIX}classifier.weight"


@pytest.fixture(scope="module")
def sources(save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rank 4, scale 6 / 4, on all layers; and rank 2, scale 5 / sqrt(2), on queries and values."""
    folder = tmp_path_factory.mktemp("sources")
    other = {"r": 2, "lora_alpha": 5, "use_rslora": True, "targets": ["q_proj", "v_proj"]}
    return save_adapter(folder / "a", seed=1), save_adapter(folder / "b", seed=2, **other)


def multiply_out(folder: Path, scale: float) -> dict[str, torch.Tensor]:
    """Layer -> B A scale, from the file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removesuffix(".lora_A.weight"): tensors[key.replace("lora_A", "lora_B")] @ tensors[key] * scale
        for key in tensors
        if "lora_A" in key
    }


def load_plain(folder: Path) -> PeftModel:
    saved = open_saved(folder)
    return load_adapter(saved.task.load_model(folder, resolve_base(saved.base)), folder)


def test_updates_are_the_weighted_sum(sources, tmp_path):
    merged = merge_adapters({sources[0]: 0.7, sources[1]: 0.3}, tmp_path / "merged")
    assert (merged.folder, merged.rank, merged.error) == (tmp_path / "merged", 6, 0.0)
    first, second = multiply_out(sources[0], 6 / 4), multiply_out(sources[1], 5 / math.sqrt(2))
    found = multiply_out(merged.folder, 1)
    assert set(found) == set(first) > set(second)
    for layer, update in found.items():
        torch.testing.assert_close(update, 0.7 * first[layer] + 0.3 * second.get(layer, 0), atol=1e-6, rtol=1e-5)
    config = json.loads((merged.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)


def test_updates_are_those_of_peft(save_adapter, tmp_path):
    """PEFT refuses adapters with heads, so it is given them without."""
    folders = [save_adapter(tmp_path / name, seed=seed, r=seed) for seed, name in ((2, "a"), (5, "b"))]
    headless = [Path(shutil.copytree(folder, tmp_path / f"{folder.name}-headless")) for folder in folders]
    for folder in headless:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None, "task_type": None}))
    saved = open_saved(folders[0])
    model = saved.task.load_model(folders[0], resolve_base(saved.base))
    peft_model = PeftModel.from_pretrained(model, str(headless[0]))
    peft_model.load_adapter(str(headless[1]), "other")
    peft_model.add_weighted_adapter(["default", "other"], [0.4, 1.5], "sum", "cat")
    ours = load_plain(merge_adapters({folders[0]: 0.4, folders[1]: 1.5}, tmp_path / "merged").folder)
    theirs = {name: m.get_delta_weight("sum") for name, m in peft_model.named_modules() if isinstance(m, LoraLayer)}
    found = {name: m.get_delta_weight("default") for name, m in ours.named_modules() if isinstance(m, LoraLayer)}
    assert set(theirs) == set(found)
    for name, update in theirs.items():
        torch.testing.assert_close(found[name], update, atol=1e-6, rtol=1e-5)


def test_heads_are_the_weighted_mean(sources, tmp_path):
    merged = merge_adapters({sources[0]: 3, sources[1]: 1}, tmp_path / "merged").folder
    heads = [load_file(folder / "adapter_model.safetensors")[HEAD] for folder in (*sources, merged)]
    torch.testing.assert_close(heads[2], 0.75 * heads[0] + 0.25 * heads[1])


def test_halves_of_one_adapter_are_the_adapter(sources, tmp_path):
    """And the folder needs no other: neither of the two is there any more when it is loaded."""
    twin = Path(shutil.copytree(sources[0], tmp_path / "twin"))
    own = Path(shutil.copytree(sources[0], tmp_path / "own"))
    expected = finetune.load(own).compute_scores(TEXTS)
    merged = finetune.merge_adapters({own: 0.5, twin: 0.5}, tmp_path / "merged").folder
    shutil.rmtree(own)
    shutil.rmtree(twin)
    assert finetune.load(merged).compute_scores(TEXTS) == pytest.approx(expected, abs=1e-6)


def test_what_was_fitted_is_not_inherited_and_the_longest_text_fits(save_adapter, tmp_path):
    rule = {"score": "energy", "threshold": -3.0, "slope": 2.0, "intercept": 1.0}
    fitted = {"temperatures": {"tone": 0.5}, "fitted": {"tone": {"temperature": 0.5, "outside": rule}}}
    one = save_adapter(tmp_path / "a", seed=1, settings={"temperature": 0.5, "max_length": 16} | fitted)
    other = save_adapter(tmp_path / "b", seed=2, settings={"temperature": 2.0, "max_length": 24})
    merged = merge_adapters({one: 1, other: 1}, tmp_path / "merged").folder
    loaded = finetune.load(merged)
    assert (loaded.temperature, loaded.max_length) == (1.0, 24)
    assert finetune.load(one).outside is not None
    assert loaded.outside is None
    assert open_saved(merged).settings["temperatures"] == {"tone": 1.0}


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_cut_sum_is_the_nearest_of_its_rank(sources, tmp_path, rank):
    """By the singular values of the whole matrices."""
    exact = multiply_out(merge_adapters({sources[0]: 0.7, sources[1]: 0.3}, tmp_path / "exact").folder, 1)
    merged = merge_adapters({sources[0]: 0.7, sources[1]: 0.3}, tmp_path / "cut", rank=rank)
    cut = whole = 0.0
    for layer, update in multiply_out(merged.folder, 1).items():
        u, values, v = np.linalg.svd(exact[layer].double().numpy())
        nearest = (u[:, :rank] * values[:rank]) @ v[:rank]
        assert update.numpy() == pytest.approx(nearest, abs=1e-5)
        cut, whole = cut + (values[rank:] ** 2).sum(), whole + (values**2).sum()
    assert merged.rank == rank
    assert merged.error == pytest.approx(math.sqrt(cut / whole), abs=1e-6)
    assert merged.error > 0.01


def test_a_rank_that_is_large_enough_cuts_nothing(sources):
    parts = add_updates([load_updates(folder) for folder in sources], [1, 1])
    same, error = cut_rank(parts, 6)
    assert error == 0
    assert all(torch.equal(same.factors[layer][0], down) for layer, (down, _) in parts.factors.items())


def test_patterns_of_rank_and_alpha_are_read(save_adapter, tmp_path):
    """As EVA leaves them: a layer with a rank and a scale of its own."""
    patterns = {"rank_pattern": {QUERY: 2}, "alpha_pattern": {QUERY: 9}}
    folder = save_adapter(tmp_path / "a", seed=1, **patterns)
    down, up = load_updates(folder).factors[QUERY]
    layer = load_plain(folder).base_model.model.get_submodule(QUERY)
    assert down.shape[0] == 2
    torch.testing.assert_close(up @ down, layer.get_delta_weight("default"))


def test_command(command, sources, tmp_path):
    output = tmp_path / "merged"
    done = command("adapters", "merge", f"{sources[0]}=0.7", f"{sources[1]}=0.3", "--output", output)
    assert (done.code, done.out) == (0, f"{output}: 2 adapters, rank 6, exact; not calibrated.\n")
    predicted = command("predict", output, "shares gain", "--json")
    assert sum(json.loads(predicted.out)[0]["scores"].values()) == pytest.approx(1)
    cut = command(
        "adapters", "merge", f"{sources[0]}=1", f"{sources[1]}=1", "--output", tmp_path / "c", "--rank", 2, "--json"
    )
    report = json.loads(cut.out)
    assert (report["output"], report["rank"]) == (str(tmp_path / "c"), 2)
    assert 0 < report["error"] < 1


def test_a_cut_that_loses_much_is_warned_of(command, sources, tmp_path):
    given = ("adapters", "merge", f"{sources[0]}=1", f"{sources[1]}=1", "--output")
    much = command(*given, tmp_path / "much", "--rank", 1)
    assert "warning: rank 1 loses " in much.out
    assert "Raise --rank or leave it out, and score both: finetune evaluate --model FOLDER --data FILE." in much.out
    assert "warning" not in command(*given, tmp_path / "all", "--rank", 6).out


@pytest.mark.parametrize("verb", [["evaluate"], ["push"], ["export", "--format", "onnx"], ["compress"]])
def test_a_merged_adapter_is_no_run_and_the_words_say_what_takes_it(command, sources, tmp_path, verb):
    merged = tmp_path / "merged"
    merge_adapters({sources[0]: 0.7, sources[1]: 0.3}, merged)
    words = f"It is what finetune predict takes; score it: finetune evaluate --model {merged} --data FILE."
    done = command(verb[0], merged, *verb[1:])
    assert done.code == 2
    assert f"{merged}: must be a finished run, got a saved model. {words}" in done.err


def test_a_runs_own_model_leads_to_its_run(command, sources, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sources[0], run / "model")
    (run / "status.json").write_text('{"state": "finished"}')
    done = command("export", run / "model", "--format", "onnx")
    assert f"got a saved model. Its run is {run}." in done.err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a"], "merge: each run must come with its weight, got 'a'. Write RUN=0.5."),
        (["a=much"], "merge: each run must come with its weight, got 'a=much'. Write RUN=0.5."),
        (["a=1", "a=2"], "merge: each run must be given once, got a twice. Add its weights up."),
        (["a=1"], "merge: must get at least two runs, got 1. Name each with its weight."),
        (["a=1", "b=0"], "b: its weight must be a number above 0, got 0."),
        (["a=1", "b=nan"], "b: its weight must be a number above 0, got nan."),
        (["a=1", "b=1", "--rank", "0"], "rank: must be at least 1, got 0. Leave it out for the exact sum."),
    ],
)
def test_words_for_a_command(command, tmp_path, given, words):
    done = command("adapters", "merge", *given, "--output", tmp_path / "merged")
    assert (done.code, done.err) == (2, f"finetune: {words}\n")


def test_words_for_an_output_that_exists(command, sources, tmp_path):
    done = command("adapters", "merge", f"{sources[0]}=1", f"{sources[1]}=1", "--output", tmp_path)
    assert done.code == 2
    assert done.err == (f"finetune: {tmp_path}: must be a new folder, got one that exists. Choose another --output.\n")


def refuse(runs: dict[str | Path, float], folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        merge_adapters(runs, folder / "merged")
    assert not (folder / "merged").exists()
    return str(caught.value)


def test_words_for_other_classes(save_adapter, sources, tmp_path):
    other = save_adapter(tmp_path / "other", ["positive", "neutral", "negative"])
    assert refuse({sources[0]: 1, other: 1}, tmp_path) == (
        "merge: heads must have the same classes in the same order, got ['negative', 'neutral', 'positive'] in "
        f"{sources[0]} and ['positive', 'neutral', 'negative'] in {other}. "
        "Use both on one base instead: finetune.load_adapters."
    )


def test_words_for_another_cleaning(save_adapter, sources, tmp_path):
    other = save_adapter(tmp_path / "other", clean=("html",))
    assert refuse({sources[0]: 1, other: 1}, tmp_path) == (
        f"merge: runs must share their task's clean, got [] in {sources[0]} and ['html'] in {other}. "
        "Train one anew like the other."
    )


@pytest.mark.filterwarnings("ignore:Adapter .default.")  # PEFT takes a bias for a damaged factor
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "ia3"}, "must be LoRA to be added to others, got ia3. Other methods do not add up."),
        (
            {"use_dora": True},
            "must be plain LoRA to be added to others, got DoRA's magnitudes, which do not add up.",
        ),
        (
            {"lora_bias": True},
            "must be plain LoRA to be added to others, got base_model.model.model.encoder.layers.0.attention.k_proj."
            "lora_B.bias, which do not add up.",
        ),
    ],
)
def test_words_for_what_is_no_sum(save_adapter, sources, tmp_path, options, words):
    other = save_adapter(tmp_path / "other", **options)
    assert refuse({sources[0]: 1, other: 1}, tmp_path) == f"{other}: {words}"


def test_words_for_whole_weights(save_adapter, sources, tmp_path):
    other = save_adapter(tmp_path / "other", method="full")
    assert "must be an adapter on a base, got a model whose every weight was tuned" in refuse(
        {sources[0]: 1, other: 1}, tmp_path
    )


def test_words_for_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ModelError, match="must hold an adapter that can be read; "):
        load_updates(tmp_path)
