"""What a recipe may say about an adapter, how each refusal is worded, and how a method is described."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertConfig, RobertaConfig

import finetune
from finetune.adapters.attach import attach_adapter, check_adapter, check_length, count_positions
from finetune.adapters.methods import METHODS, describe
from finetune.adapters.targets import find_feed_forward, find_keys_and_values, find_norms
from finetune.errors import RecipeError
from finetune.models.triad import TriadForSequenceClassification
from finetune.models.triad.conversion import convert_config
from finetune.recipe.adapter import ADAPTER_KEYS
from finetune.recipe.defaults import METHOD_HEAD_RATE, METHOD_RATES
from finetune.recipe.schema import AdapterSection, Recipe

SIZE = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
VALUES: dict[str, Any] = {
    "rank": 4,
    "alpha": 3.0,
    "dropout": 0.1,
    "targets": "attention",
    "dora": True,
    "rslora": True,
    "init": "eva",
    "learning_rate_ratio": 2.0,
    "final_rank": 2,
    "virtual_tokens": 7,
    "frequencies": 9,
    "block_size": 4,
    "style": "houlsby",
    "reduction": 8,
    "activation": "gelu",
}


def build(width: int = 24, **changes: Any) -> Any:
    with torch.device("meta"):
        config = BertConfig(hidden_size=width, intermediate_size=40, **{**SIZE, **changes})
        return AutoModelForSequenceClassification.from_config(config)


def attach(model: Any, **values: Any) -> nn.Module:
    return attach_adapter(model, AdapterSection(**values), ["classifier", "bert.pooler"], "acme/tiny")


# Keys


def test_every_method_stands_in_every_table():
    words = get_args(AdapterSection.model_fields["method"].annotation)
    assert list(words) == list(ADAPTER_KEYS) == list(METHODS)
    assert set(VALUES) == set(AdapterSection.model_fields) - {"method"}
    assert {key for keys in ADAPTER_KEYS.values() for key in keys} == set(VALUES)


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize("method", [method for method in ADAPTER_KEYS if method != "full"])
def test_a_key_is_read_or_refused(method, key):
    values = {"method": method, key: VALUES[key]}
    if key in ADAPTER_KEYS[method]:
        assert getattr(AdapterSection(**values), key) == VALUES[key]
        return
    known = ", ".join(ADAPTER_KEYS[method]) or "no key besides method"
    with pytest.raises(ValidationError) as caught:
        AdapterSection(**values)
    assert f"{key}: must be left out for {method}, which reads {known}; got {VALUES[key]!r}." in str(caught.value)


def test_full_tuning_leaves_alone_what_is_given():
    """So that `--set adapter.method=full` works on every recipe."""
    section = AdapterSection(method="full", rank=4, targets="attention")
    assert section.model_dump() == {"method": "full"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"method": "adalora", "rank": 8, "final_rank": 8},
            "final_rank: must be below rank, which is 8, got 8.",
        ),
        ({"method": "adalora", "rank": 1}, "rank: must be at least 2 for adalora, which lowers it, got 1."),
        (
            {"dora": True, "init": "pissa"},
            "init: must be default or eva with dora, got 'pissa': the base's weights are taken apart twice.",
        ),
    ],
)
def test_words_for_keys_that_do_not_go_together(values, words):
    with pytest.raises(ValidationError) as caught:
        AdapterSection(**values)
    assert words in str(caught.value)


def test_a_written_section_is_read_again(case, methods):
    section = AdapterSection(**methods[case])
    again = AdapterSection(**section.model_dump(mode="json"))
    assert again == section
    assert set(section.model_dump()) == {"method", *ADAPTER_KEYS[section.method]}


def test_defaults_of_a_method():
    assert AdapterSection(method="vera").rank == 256
    assert AdapterSection(method="vera", rank=8).rank == 8
    assert AdapterSection(method="fourierft").alpha == 150.0


def build_recipe(train: dict[str, Any], **adapter: Any) -> Recipe:
    task = {"type": "text_classification", "data": "rows.csv"}
    values = {"recipe": 1, "name": "rates", "tasks": {"only": task}, "adapter": adapter, "train": train}
    return Recipe.model_validate(values)


@pytest.mark.parametrize("method", ADAPTER_KEYS)
def test_each_method_has_a_rate_of_its_own(method):
    section = build_recipe({}, method=method).train
    assert section.learning_rate == METHOD_RATES.get(method, 1e-3)
    assert section.head_learning_rate == (METHOD_HEAD_RATE if method in METHOD_RATES else None)


def test_a_given_rate_stays():
    section = build_recipe({"learning_rate": 0.5, "head_learning_rate": None}, method="ia3").train
    assert (section.learning_rate, section.head_learning_rate) == (0.5, None)


# Bases


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"method": "oft", "block_size": 16},
            "adapter.block_size: must divide the inputs of each target, got 16 for "
            "bert.encoder.layer.0.attention.self.query with 24 inputs.",
        ),
        (
            {"method": "fourierft", "frequencies": 577},
            "adapter.frequencies: must be at most the weights of each target, got 577 for "
            "bert.encoder.layer.0.attention.self.query with 576.",
        ),
        *(
            (
                {"init": init, "rank": 25},
                f"adapter.rank: must be at most 24 with init {init}, the width of "
                "bert.encoder.layer.0.attention.self.query, got 25.",
            )
            for init in ("pissa", "olora", "eva")
        ),
    ],
)
def test_words_for_sizes_that_do_not_fit(values, words):
    with pytest.raises(RecipeError) as caught:
        attach(build(), **values)
    assert str(caught.value) == words
    assert caught.value.exit_code == 2


def test_words_for_a_base_without_known_layers():
    model = nn.Sequential(nn.Linear(2, 2))
    for find, endings in (
        (find_keys_and_values, "k_proj, v_proj, key, value, k_lin, v_lin, k, v, c_attn, Wqkv, qkv_proj"),
        (find_feed_forward, "down_proj, output.dense, fc2, ffn.lin2, wo, mlp.c_proj, mlp.Wo"),
    ):
        with pytest.raises(RecipeError) as caught:
            find(model)
        assert str(caught.value) == (
            f"adapter.method: ia3 needs layers of known names, got a base without any called {endings}. "
            "Set model.architecture: triad, or adapter.method: lora."
        )


def test_words_for_a_base_without_norms():
    with pytest.raises(RecipeError) as caught:
        find_norms(nn.Sequential(nn.Linear(2, 2)), [])
    assert str(caught.value) == "adapter.method: ln_tuning needs a base with norms, got one without. Take lora."


def test_the_layers_that_ia3_scales():
    model = build()
    layer = "bert.encoder.layer.0"
    assert find_keys_and_values(model) == [f"{layer}.attention.self.key", f"{layer}.attention.self.value"]
    assert find_feed_forward(model) == [f"{layer}.output.dense"]


def test_the_norms():
    layer = "bert.encoder.layer.0"
    assert find_norms(build(), ["bert.pooler"]) == [
        "bert.embeddings.LayerNorm",
        f"{layer}.attention.output.LayerNorm",
        f"{layer}.output.LayerNorm",
    ]


def build_triad(position: str) -> Any:
    config = convert_config(BertConfig(hidden_size=24, intermediate_size=40, **SIZE))
    config.position = position
    with torch.device("meta"):
        return TriadForSequenceClassification(config)


def build_roberta() -> Any:
    config = RobertaConfig(hidden_size=24, intermediate_size=40, **{**SIZE, "max_position_embeddings": 66})
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning"])
@pytest.mark.parametrize(
    "base", [build, lambda: build_triad("learned"), build_roberta], ids=["bert", "triad", "roberta"]
)
def test_virtual_tokens_need_positions(method, base):
    section = AdapterSection(method=method, virtual_tokens=24)
    check_adapter(base(), section, max_length=40)
    with pytest.raises(RecipeError) as caught:
        check_adapter(base(), section, max_length=41)
    assert str(caught.value) == (
        "adapter.virtual_tokens: must fit into the 64 positions of the base together with model.max_length, got "
        "24 + 41. Lower one of them."
    )


@pytest.mark.parametrize(
    ("family", "sizes", "room"),
    [
        ("bert", {"max_position_embeddings": 64}, 64),
        ("roberta", {"max_position_embeddings": 66}, 64),
        ("mpnet", {"max_position_embeddings": 66}, 64),
        ("distilbert", {"max_position_embeddings": 64}, 64),
        ("gpt2", {"n_positions": 64}, 64),
        ("opt", {"max_position_embeddings": 64}, 64),
        ("bart", {"max_position_embeddings": 64}, 64),
        ("llama", {"max_position_embeddings": 64}, None),
        ("t5", {"n_positions": 64}, None),
    ],
)
def test_no_text_is_longer_than_the_positions(family, sizes, room):
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **sizes))
    assert count_positions(model) == room
    check_length(model, room or 1000, "acme/base")
    if room:
        with pytest.raises(RecipeError) as caught:
            check_length(model, room + 1, "acme/base")
        assert str(caught.value) == "model.max_length: must be at most 64, the positions that acme/base has, got 65."


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_a_triad_has_as_many_positions_as_its_family(position):
    assert count_positions(build_triad(position)) == (64 if position == "learned" else None)
    with torch.device("meta"):
        roberta = TriadForSequenceClassification(convert_config(RobertaConfig(max_position_embeddings=66)))
    assert count_positions(roberta) == 64


@pytest.mark.parametrize("architecture", ["triad", "native"])
def test_check_refuses_texts_longer_than_the_positions(command, write_recipe, tiny_base, tmp_path, architecture):
    path = write_recipe(tmp_path / "in")
    done = command("check", path, "--set", f"model={{base: {tiny_base}, max_length: 65, architecture: {architecture}}}")
    assert done.code == 2
    assert f"model.max_length: must be at most 64, the positions that {tiny_base} has, got 65." in done.err


def test_computed_positions_have_no_end():
    check_adapter(build_triad("rotary"), AdapterSection(method="prompt", virtual_tokens=500), max_length=400)


def test_other_methods_take_no_positions():
    check_adapter(build(), AdapterSection(method="lora"), max_length=64)


def test_check_says_it_before_anything_is_trained(command, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in")
    done = command("check", path, "--set", "adapter={method: prompt, virtual_tokens: 40}")
    assert done.code == 2
    assert "adapter.virtual_tokens: must fit into the 64 positions of the base" in done.err
    done = command("check", path, "--set", "adapter.method=ia3")
    assert done.code == 2
    assert "adapter.rank: must be left out for ia3, which reads no key besides method; got 8." in done.err


# Words


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "full"}, "full tuning"),
        ({}, "LoRA, rank 16, alpha 32, all-linear"),
        (
            {"dora": True, "rslora": True, "dropout": 0.1, "targets": ["query", "value"], "learning_rate_ratio": 16.0},
            "DoRA, rank 16, alpha 32, dropout 0.1, rank-stabilized, LoRA+ ratio 16, query, value",
        ),
        ({"init": "pissa"}, "LoRA, rank 16, alpha 32, pissa start, all-linear"),
        ({"method": "adalora", "final_rank": 4}, "AdaLoRA, rank 16, final rank 4, alpha 32, all-linear"),
        ({"method": "ia3"}, "(IA)^3"),
        ({"method": "prompt"}, "prompt tuning, 20 virtual tokens"),
        ({"method": "vera"}, "VeRA, rank 256, all-linear"),
        ({"method": "oft"}, "OFT, blocks of 32, all-linear"),
        ({"method": "fourierft"}, "FourierFT, alpha 150, 1,000 frequencies, all-linear"),
    ],
)
def test_a_method_in_words(values, words):
    assert describe(AdapterSection(**values)) == words


def test_a_run_with_virtual_tokens(write_recipe, tmp_path):
    """On a Triad, which packs otherwise: trained, read again, judged, described, and asked."""
    overrides = ["adapter={method: prompt, virtual_tokens: 3}", "train.max_steps=4"]
    run = finetune.run(write_recipe(tmp_path / "in"), overrides, runs=tmp_path / "runs", quiet=True)
    predictor = run.load()
    texts = ["falls loss", "a meeting of names today", "wins"]
    together = predictor.compute_scores(texts)
    alone = np.concatenate([predictor.compute_scores([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    page = (run.folder.evaluation / "report.html").read_text()
    assert "prompt tuning, 3 virtual tokens" in page
    card = run.folder.card.read_text()
    assert "prompt tuning, 3 virtual tokens: " in card
    assert "library_name: peft" in card
    assert not list(Path(run.folder.model).glob("README.md"))
