"""Several adapters on one base answer as each of them does alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

import finetune
from finetune.adapters.attach import load_adapter
from finetune.artifact.load import build_predictor
from finetune.artifact.pool import AdapterPool, load_adapters
from finetune.artifact.saved import open_saved
from finetune.errors import ModelError, UsageError
from finetune.models.base import resolve_base

TEXTS = [
    "profit falls and the board cuts the dividend",
    "shares gain",
    "the chairman names a new meeting schedule for the spring",
    "sales beat all hopes, and the dividend raises",
    "unchanged",
    "loss",
    "wins &amp; gains",
]
THREE = ["negative", "neutral", "positive"]
FIVE = ["a", "b", "c", "d", "e"]
TOLERANCE = 1e-5
"""Of probabilities in float32; the logits lie a few units apart."""


def compute_alone(folder: Path) -> np.ndarray:
    """As PEFT's own layers have it, nothing merged and nothing shared."""
    saved = open_saved(folder)
    assert saved.base
    model = load_adapter(saved.task.load_model(folder, resolve_base(saved.base)), folder)
    return build_predictor(saved, model.eval()).compute_scores(TEXTS)


def check_mixed(pool: AdapterPool, folders: Mapping[str, Path], tolerance: float = TOLERANCE) -> None:
    """All texts with all adapters, in one batch and in an order that keeps no two neighbours together."""
    names = [name for name in folders for _ in TEXTS]
    texts = TEXTS * len(folders)
    order = np.random.default_rng(3).permutation(len(texts))
    mixed = pool.compute_scores([texts[i] for i in order], [names[i] for i in order])
    expected = {name: compute_alone(folder) for name, folder in folders.items()}
    for place, i in enumerate(order):
        assert mixed[place] == pytest.approx(expected[names[i]][i % len(TEXTS)], abs=tolerance)
    (first, second, *_) = expected.values()
    assert first.shape != second.shape or np.abs(first - second).max() > 0.05, "else nothing could be mixed up"


@pytest.mark.parametrize("architecture", ["triad", "native"])
def test_rows_of_different_lora_adapters_in_one_batch(save_adapter, tmp_path, architecture):
    """They differ in rank, scale, targets, classes and seeds."""
    folders = {
        "a": save_adapter(tmp_path / "a", seed=1, architecture=architecture),
        "b": save_adapter(tmp_path / "b", seed=2, architecture=architecture, r=7, lora_alpha=3, use_rslora=True),
        "v1.five": save_adapter(tmp_path / "c", FIVE, seed=3, architecture=architecture, targets=["query", "value"])
        if architecture == "native"
        else save_adapter(tmp_path / "c", FIVE, seed=3, targets=["q_proj", "v_proj"]),
    }
    pool = load_adapters(folders)
    check_mixed(pool, folders)
    assert pool.mixes
    assert pool.names == ["a", "b", "v1.five"]
    assert pool.get_labels("v1.five") == FIVE


@pytest.mark.parametrize("architecture", ["triad", "native"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"method": "bottleneck", "style": "houlsby"}, {"method": "bottleneck", "style": "parallel", "reduction": 4}),
        ({"method": "bitfit"}, {"method": "bitfit"}),
        ({"method": "head"}, {"method": "head"}),
        ({"use_dora": True}, {"use_dora": True, "r": 7}),
        ({"use_dora": True}, {}),
    ],
    ids=["bottleneck", "bitfit", "head", "dora", "dora beside lora"],
)
def test_rows_of_different_adapters_of_other_methods_in_one_batch(save_adapter, tmp_path, architecture, one, other):
    folders = {
        "a": save_adapter(tmp_path / "a", seed=1, architecture=architecture, **one),
        "b": save_adapter(tmp_path / "b", FIVE, seed=2, architecture=architecture, **other),
    }
    pool = load_adapters(folders)
    check_mixed(pool, folders)
    assert pool.mixes
    for name, folder in folders.items():  # nothing stays behind
        assert np.array(pool.compute_scores(TEXTS, name)) == pytest.approx(compute_alone(folder), abs=TOLERANCE)


@pytest.mark.parametrize("architecture", ["triad", "native"])
def test_methods_without_routing_run_one_after_another(save_adapter, tmp_path, architecture):
    folders = {
        "a": save_adapter(tmp_path / "a", seed=1, architecture=architecture, method="ia3"),
        "b": save_adapter(tmp_path / "b", FIVE, seed=2, architecture=architecture, method="ia3"),
    }
    pool = load_adapters(folders)
    assert not pool.mixes
    check_mixed(pool, folders)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_layers_that_see_more_than_the_batch_run_one_after_another(save_adapter, tiny_base, tmp_path, method):
    """DeBERTa's projections also see the table of relative positions, which belongs to no row."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "deberta"))
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
    vocabulary = json.loads((tiny_base / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    DebertaV2Model(DebertaV2Config(vocab_size=vocabulary, **size, **relative)).save_pretrained(base)
    folders = {
        name: save_adapter(tmp_path / name, seed=seed, architecture="native", base=base, method=method)
        for seed, name in enumerate("ab")
    }
    pool = load_adapters(folders)
    assert pool.mixes
    check_mixed(pool, folders)
    assert not pool.mixes


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_switching_leaves_no_trace(save_adapter, tmp_path, method):
    folders = {name: save_adapter(tmp_path / name, seed=seed, method=method) for seed, name in enumerate("ab")}
    pool = load_adapters(folders)
    first = {name: pool.compute_scores(TEXTS, name) for name in "ab"}
    mixed = pool.compute_scores(TEXTS, list("abababa"))
    for name in "ba":
        assert np.array_equal(pool.compute_scores(TEXTS, name), first[name])
    assert np.array_equal(pool.compute_scores(TEXTS, list("abababa")), mixed)
    assert not any(parameter.requires_grad for parameter in pool._model.parameters())


def test_the_base_is_computed_once_for_all(save_adapter, tmp_path):
    pool = load_adapters({name: save_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("abc")})
    seen = []
    layer = next(module for name, module in pool._model.named_modules() if name.endswith("up_proj.base_layer"))
    layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[1]))
    pool.predict(TEXTS, list("abcabca"))
    assert seen == [sum(len(pool._members["a"].encode([text]).input_ids) for text in TEXTS)]


def test_each_run_keeps_its_cleaning_length_and_temperature(save_adapter, tmp_path):
    folders = {
        "raw": save_adapter(tmp_path / "raw", seed=1, settings={"temperature": 0.5}),
        "clean": save_adapter(tmp_path / "clean", seed=1, clean=("html",), settings={"max_length": 4}),
    }
    pool = load_adapters(folders)
    check_mixed(pool, folders)
    (cleaned,) = pool.compute_scores(["profit &amp; loss falls again"], "clean")
    assert cleaned == pytest.approx(pool.compute_scores(["profit & loss"], ["clean"])[0], abs=1e-6)


def test_predictions_name_the_classes_of_their_run(save_adapter, tmp_path):
    pool = finetune.load_adapters(
        {"tone": save_adapter(tmp_path / "a", seed=1), "topic": save_adapter(tmp_path / "b", FIVE, seed=2)}
    )
    assert isinstance(pool, finetune.AdapterPool)
    tone, topic = pool.predict(TEXTS[:2], ["tone", "topic"])
    assert (list(tone.scores), list(topic.scores)) == (THREE, FIVE)
    for prediction in (tone, topic):
        assert prediction.confidence == prediction.scores[prediction.label] == max(prediction.scores.values())
        assert sum(prediction.scores.values()) == pytest.approx(1)
    assert pool.predict([], "tone") == pool.predict([], []) == []


def test_a_base_may_be_named_in_two_ways(save_adapter, tiny_base, tmp_path):
    other = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    folders = {"a": save_adapter(tmp_path / "a", seed=1), "b": save_adapter(tmp_path / "b", seed=2, base=other)}
    check_mixed(load_adapters(folders), folders)


def test_runs_join_by_their_name(finished_run):
    pool = load_adapters({"old": finished_run, "new": finished_run.parent})
    alone = finetune.load(finished_run).compute_scores(TEXTS)
    assert pool.compute_scores(TEXTS, ["old", "new"] * 3 + ["old"]) == pytest.approx(alone, abs=TOLERANCE)


def refuse(runs: Mapping[str, Path], error: type[Exception] = UsageError) -> str:
    with pytest.raises(error) as caught:
        load_adapters(runs)
    return str(caught.value)


def test_words_for_a_run_that_was_tuned_whole(save_adapter, tmp_path):
    runs = {"a": save_adapter(tmp_path / "a"), "b": save_adapter(tmp_path / "b", method="full")}
    assert refuse(runs) == (
        "b: must be an adapter on a base, got a model whose every weight was tuned. "
        "Load it alone, or train it anew with adapter: {method: lora}."
    )


def test_words_for_another_base(save_adapter, tiny_base, tmp_path):
    from transformers import BertModel

    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    torch.manual_seed(5)
    BertModel(BertModel.from_pretrained(other).config).save_pretrained(other)
    runs = {"a": save_adapter(tmp_path / "a"), "b": save_adapter(tmp_path / "b", base=other)}
    assert refuse(runs) == (
        f"adapters: must stand on one base, got a on {tiny_base}, b on {other}. "
        "Load each base's adapters by themselves."
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "native"}, "model_type 'triad' in a and 'bert'"),
        ({"pooling": "mean"}, "'pooler' in a and 'mean'"),
    ],
)
def test_words_for_another_architecture(save_adapter, tmp_path, change, words):
    runs = {"a": save_adapter(tmp_path / "a"), "b": save_adapter(tmp_path / "b", **change)}
    found = refuse(runs)
    assert found.startswith("adapters: must share one architecture to share a base, got ")
    assert words in found
    assert found.endswith(" in b. Train both with the same model section.")


def test_words_for_another_method(save_adapter, tmp_path):
    runs = {"a": save_adapter(tmp_path / "a"), "b": save_adapter(tmp_path / "b", method="ia3")}
    assert refuse(runs) == (
        f"adapters: must share one method to stand on one base, got lora ({tmp_path / 'a'}), ia3 ({tmp_path / 'b'}). "
        "Load the others alone."
    )


def test_words_for_a_task_without_labels(save_adapter, tmp_path):
    folder = save_adapter(tmp_path / "a")
    settings = json.loads((folder / "finetune.json").read_text())
    settings["task"] = {"type": "causal_lm", "separator": None, "clean": []}
    (folder / "finetune.json").write_text(json.dumps(settings))
    assert refuse({"a": folder}) == "a: must be a run that gives labels, got causal_lm. Load it alone."


def test_words_for_nothing_to_load():
    assert refuse({}) == "load_adapters: must get at least one run, got none. Give {name: run}."


def test_words_for_a_head_that_is_not_there(save_adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "classifier" not in k}, weights)
    settings = json.loads((folder / "finetune.json").read_text())
    (folder / "finetune.json").write_text(json.dumps(settings | {"files": {}}))
    assert refuse({"a": folder}, ModelError) == (
        f"{folder}: must hold an adapter that fits its base model; 'base_model.model.classifier.weight'"
    )


@pytest.fixture(scope="module")
def pool(save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> AdapterPool:
    folder = tmp_path_factory.mktemp("pool")
    return load_adapters({name: save_adapter(folder / name, seed=seed) for seed, name in enumerate("ab")})


@pytest.mark.parametrize(
    ("texts", "adapters", "words"),
    [
        (["x"], "c", "adapters: must be among a, b, got 'c'."),
        (["x", "y"], ["a", "c"], "adapters: must be among a, b, got 'c'."),
        (
            ["x", "y", "z"],
            ["a", "b"],
            "predict: adapters must be one name, or one for each of the 3 texts, got 2 names.",
        ),
        ("x", "a", "predict: texts must be a list of texts, got one text. Write predict([text])."),
        (["x", ""], "a", "predict: no text may be empty, got 1 text (2). Leave out what is empty."),
    ],
)
def test_words_for_a_request(pool, texts, adapters, words):
    with pytest.raises(UsageError) as caught:
        pool.predict(texts, adapters)
    assert str(caught.value) == words
