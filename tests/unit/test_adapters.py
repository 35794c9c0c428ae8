from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from finetune.adapters.attach import (
    attach_adapter,
    can_merge,
    count_parameters,
    list_trained,
    load_adapter,
    merge_adapter,
    plan_parameters,
    read_adapter_base,
)
from finetune.adapters.fast_lora import restore_lora
from finetune.adapters.methods import METHODS
from finetune.adapters.targets import find_targets
from finetune.data.batches import Examples
from finetune.errors import ModelError, RecipeError
from finetune.models.base import BaseModel
from finetune.models.classifier import build_classifier, list_head_modules
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import AdapterSection, ModelSection
from finetune.tasks.text_classification import TextClassification
from finetune.training.loop import Problem

TASK = TextClassification(["a", "b", "c"], {})
HEAD = ["classifier", "bert.pooler"]
NATIVE = ModelSection(architecture="native")  # the names in this file are BERT's


@pytest.fixture
def model(tiny_base: Path) -> nn.Module:
    return build_classifier(BaseModel("tiny", tiny_base, "local folder"), TASK.labels, NATIVE, seed=0)


def attach(model: nn.Module, **section: Any) -> nn.Module:
    return attach_adapter(model, AdapterSection(**section), HEAD, "acme/tiny")


@pytest.mark.parametrize(
    "section", [{"method": "full"}, {"rank": 3}, {"targets": "attention"}, {"targets": ["query", "dense"]}]
)
def test_the_plan_counts_what_will_be_trained(model: nn.Module, section: dict[str, Any]):
    plan = plan_parameters(model, AdapterSection(**section), HEAD)
    assert plan == count_parameters(attach(model, **section))


def test_heads_of_the_families():
    """What a family trains from scratch: all beside the base, and the pooler where there is one."""
    size = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    found = {}
    for config in (
        BertConfig(**size),
        RobertaConfig(**size),
        ElectraConfig(**size, embedding_size=8),
        MPNetConfig(**size),
        DebertaV2Config(**size),
        AlbertConfig(**size, embedding_size=8),
        ModernBertConfig(**size, pad_token_id=0),
        DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=8),
    ):
        with torch.device("meta"):
            found[config.model_type] = sorted(list_head_modules(AutoModelForSequenceClassification.from_config(config)))
    assert found == {
        "bert": ["bert.pooler", "classifier"],
        "roberta": ["classifier"],
        "electra": ["classifier"],
        "mpnet": ["classifier"],
        "deberta-v2": ["classifier", "pooler"],
        "albert": ["albert.pooler", "classifier"],
        "modernbert": ["classifier", "head"],
        "distilbert": ["classifier", "pre_classifier"],
    }


ATTENTION = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
LINEAR = [*ATTENTION, "intermediate.dense", "output.dense"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LINEAR),
        ("attention", ATTENTION),
        (["query", "value"], ["attention.self.query", "attention.self.value"]),
        (["attention.output.dense"], ["attention.output.dense"]),
        (["dense"], ["attention.output.dense", "intermediate.dense", "output.dense"]),
    ],
)
def test_targets(model, targets, expected):
    names = [f"bert.encoder.layer.{layer}.{name}" for layer in range(2) for name in expected]
    assert sorted(find_targets(model, targets, HEAD)) == sorted(names)


def test_one_layer_can_be_named(model):
    name = "bert.encoder.layer.1.attention.self.query"
    assert find_targets(model, [name], HEAD) == [name]


def test_attention_by_its_name_in_any_case():
    """T5's is called SelfAttention."""
    config = T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    found = find_targets(T5ForConditionalGeneration(config), "attention", [])
    ends = {name.rpartition("layer.")[2] for name in found}
    assert ends == {f"{at}Attention.{part}" for at in ("0.Self", "1.EncDec") for part in "qkvo"}


def test_words_for_a_base_whose_attention_has_another_name():
    base = nn.ModuleDict({"mixer": nn.Linear(2, 2), "ffn": nn.Linear(2, 2)})
    with pytest.raises(RecipeError) as caught:
        find_targets(base, "attention", [])
    assert str(caught.value) == (
        "adapter.targets: attention needs a base whose attention layers are called so, got none. Name them: this base "
        "has ffn, mixer; or say all-linear."
    )


@pytest.mark.parametrize("method", list(METHODS))
def test_what_is_listed_as_merging_can_be_merged(model, method):
    settings = {"fourierft": {"frequencies": 10}, "oft": {"block_size": 8}}
    assert can_merge(attach(model, method=method, **settings.get(method, {}))) == METHODS[method].merges


@pytest.mark.parametrize("targets", [["quary", "value", "LayerNorm"], ["quary", "LayerNorm"]])
def test_words_for_an_unknown_target(model, targets):
    with pytest.raises(RecipeError) as caught:
        find_targets(model, targets, HEAD)
    assert str(caught.value) == (
        "adapter.targets: each name must end the name of a linear layer of the base, got quary, LayerNorm. "
        "This base has dense, key, query, value; or say all-linear or attention."
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("target", ["classifier", "pooler.dense", "ense"])
def test_head_and_parts_of_names_are_no_targets(model, target):
    with pytest.raises(RecipeError, match="must end the name of a linear layer of the base"):
        find_targets(model, [target], HEAD)


# Pooler 32 x 32 + 32, classifier 3 x 32 + 3.
HEAD_WEIGHTS = 1056 + 99
# An update of rank r on a layer of n inputs and m outputs has r * (n + m) weights; four layers 32 -> 32 make 4 * 64 r,
# one 32 -> 64 and one 64 -> 32 make 2 * 96 r; there are two of each.
COUNTS = [
    ({"rank": 1}, 2 * (4 * 64 + 2 * 96)),
    ({"rank": 8}, 2 * (4 * 64 + 2 * 96) * 8),
    ({"rank": 8, "targets": "attention"}, 2 * 4 * 64 * 8),
    ({"rank": 3, "targets": ["query"]}, 2 * 64 * 3),
]


@pytest.mark.parametrize(("section", "adapter"), COUNTS)
def test_counts_by_hand(model, section, adapter):
    plain = sum(parameter.numel() for parameter in model.parameters())
    count = count_parameters(attach(model, **section))
    assert count.trained == adapter + HEAD_WEIGHTS
    assert count.total == plain + adapter
    assert str(count) == (
        f"{count.trained:,} of {count.total:,} parameters are trained ({100 * count.trained / count.total:.2f}%)"
    )


def test_full_tuning_trains_every_weight(model):
    plain = sum(parameter.numel() for parameter in model.parameters())
    tuned = attach(model, method="full")
    assert tuned is model
    assert count_parameters(tuned).trained == count_parameters(tuned).total == plain


def test_the_section_reaches_the_updates(model):
    wrapped = attach(model, rank=4, alpha=10, dropout=0.25)
    layer = wrapped.base_model.model.bert.encoder.layer[0].attention.self.query
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (4, 2.5, 0.25)


def test_a_fresh_adapter_changes_nothing(model):
    examples = build_examples()
    before = compute_logits(model, examples, 0)
    np.testing.assert_array_equal(compute_logits(attach(model), examples, 0), before)


def build_examples() -> Examples:
    generator = np.random.default_rng(0)
    rows = [generator.integers(5, 300, size=generator.integers(2, 12)).tolist() for _ in range(24)]
    return Examples.build(rows, [row[0] % 3 for row in rows])


def is_ours(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def test_only_adapter_and_head_get_gradients(model):
    wrapped = attach(model)
    batch = {"input_ids": torch.randint(5, 300, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.int64)}
    batch["labels"] = torch.tensor([0, 1, 2, 0])
    TASK.compute_losses(wrapped, batch, 0.0).mean().backward()
    with_gradient = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(list_trained(wrapped))
    assert with_gradient == {name for name, _ in wrapped.named_parameters() if is_ours(name)}
    modules = {name.rsplit(".", 2)[0] for name in with_gradient if ".modules_to_save." in name}
    assert modules == {
        "base_model.model.classifier.modules_to_save",
        "base_model.model.bert.pooler.modules_to_save.default",
    }


def test_training_touches_no_bit_of_the_base(model, training):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = attach(model, rank=4)
    started = {name: parameter.detach().clone() for name, parameter in list_trained(wrapped).items()}
    examples = build_examples()
    problem = Problem(
        train=examples,
        validation=examples,
        row_weights=np.ones(len(examples), dtype=np.float32),
        compute_losses=lambda model, batch: TASK.compute_losses(model, batch, 0.0),
        compute_metrics=partial(TASK.compute_metrics, names=[]),
        is_larger_better=lambda _name: False,
        head=HEAD,
        pad_token_id=0,
    )
    training.fit(wrapped, problem, weight_decay=0.5)
    after = wrapped.state_dict()
    names = {name: name.removeprefix("base_model.model.") for name in after if not is_ours(name)}
    # PEFT keeps what it wraps under longer names, the head as it was among them.
    originals = {name: old.replace(".base_layer", "").replace(".original_module", "") for name, old in names.items()}
    assert set(originals.values()) == set(before)
    for name, original in originals.items():
        assert torch.equal(after[name], before[original]), original
    for name, tensor in started.items():
        assert not torch.equal(after[name], tensor), name


def save_and_spoil(model: nn.Module, folder: Path, change: Any) -> Path:
    attach(model, rank=4).save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return folder


def test_a_saved_adapter_names_its_base(model, tmp_path):
    attach(model).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert read_adapter_base(tmp_path / "adapter") == "acme/tiny"
    assert read_adapter_base(tmp_path) is None


def test_a_saved_adapter_keeps_the_revision_apart(model, tmp_path):
    attach_adapter(model, AdapterSection(), list_head_modules(model), "acme/tiny@v1").save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("acme/tiny", "v1")
    assert read_adapter_base(tmp_path) == "acme/tiny@v1"


def test_a_loaded_adapter_is_frozen_and_merges(model, tiny_base, tmp_path):
    trained = attach(model, rank=4)
    with torch.no_grad():
        for parameter in list_trained(trained).values():
            parameter.add_(torch.randn_like(parameter) / 5)
    trained.save_pretrained(tmp_path, save_embedding_layers=False)
    base = build_classifier(BaseModel("tiny", tiny_base, "local folder"), TASK.labels, NATIVE, seed=5)
    loaded = load_adapter(base, tmp_path)
    assert list_trained(loaded) == {}
    examples = build_examples()
    logits = compute_logits(restore_lora(trained), examples, 0)  # in PEFT's own order of operations, to the bit
    np.testing.assert_array_equal(compute_logits(loaded, examples, 0), logits)
    np.testing.assert_allclose(compute_logits(merge_adapter(loaded), examples, 0), logits, atol=1e-5)


def test_words_for_an_adapter_of_another_size(model, tiny_base, tmp_path):
    folder = save_and_spoil(model, tmp_path, lambda tensors: {name: torch.zeros(5, 5) for name in tensors})
    base = build_classifier(BaseModel("tiny", tiny_base, "local folder"), TASK.labels, NATIVE, seed=0)
    with pytest.raises(ModelError, match=f"^{folder}: must hold an adapter that fits its base model; .*size mismatch"):
        load_adapter(base, folder)


def test_words_for_an_adapter_without_its_head(model, tiny_base, tmp_path):
    """PEFT would warn and go on with a random head."""
    folder = save_and_spoil(
        model, tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    )
    base = build_classifier(BaseModel("tiny", tiny_base, "local folder"), TASK.labels, NATIVE, seed=0)
    with pytest.raises(ModelError, match=f"^{folder}: must hold an adapter that fits its base model; .*classifier"):
        load_adapter(base, folder)


def test_words_for_a_broken_adapter(model, tiny_base, tmp_path):
    folder = save_and_spoil(model, tmp_path, dict)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 50)
    base = build_classifier(BaseModel("tiny", tiny_base, "local folder"), TASK.labels, NATIVE, seed=0)
    with pytest.raises(ModelError, match=f"^{folder}: must hold an adapter that fits its base model; "):
        load_adapter(base, folder)


def test_the_adapter_file_says_which_layers(model, tmp_path):
    attach(model, targets="attention").save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"query", "key", "value", "dense"}
    assert not any("intermediate" in name for name in config["target_modules"])
