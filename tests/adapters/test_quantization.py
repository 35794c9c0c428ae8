"""LoRA on a base in fewer bits, held against a base of the numbers that those bits stand for."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

import finetune
from finetune.adapters.attach import attach_adapter, count_parameters, plan_parameters
from finetune.adapters.targets import find_targets
from finetune.errors import RecipeError, ResourceError
from finetune.models import quantization
from finetune.models.base import BaseModel
from finetune.models.quantization import PACKAGES, quantize_layers
from finetune.recipe.schema import AdapterSection, ModelSection
from finetune.tasks import TextClassification

TASK = TextClassification(["a", "b", "c"], {})
INPUTS = {"input_ids": torch.tensor([[5, 9, 40, 300, 12], [77, 8, 101, 44, 3]]), "attention_mask": torch.ones(2, 5)}
TEXTS = ["profit falls and the board cuts the dividend", "shares gain", "a new meeting schedule for the spring"]
EXPECTED_BYTES = {"int8": 1.0, "nf4": 0.5}


@pytest.fixture(params=list(PACKAGES))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind whose package is installed."""
    pytest.importorskip(PACKAGES[request.param])
    return request.param


@pytest.fixture(params=["triad", "native"])
def build(request: pytest.FixtureRequest, tiny_base: Path) -> Callable[[], nn.Module]:
    base = BaseModel(str(tiny_base), tiny_base, "local folder")
    return lambda: TASK.build_model(base, ModelSection(architecture=request.param), None, 0).eval()


def list_targets(model: nn.Module) -> list[str]:
    return find_targets(model, "all-linear", TASK.list_modules(model)[1])


def restore(weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a quantized weight stands for."""
    if hasattr(weight, "quant_state"):
        return importlib.import_module("bitsandbytes.functional").dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize()


def count_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(count_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    state = getattr(tensor, "quant_state", None)
    scales = count_bytes(state.absmax) if state is not None else 0
    return tensor.numel() * tensor.element_size() + scales


def test_weights_are_rounded_and_all_else_is_left(build, kind):
    whole, model = build(), build()
    targets = list_targets(model)
    quantize_layers(model, targets, kind)
    for name, parameter in whole.named_parameters():
        layer, _, part = name.rpartition(".")
        found = model.get_submodule(layer).get_parameter(part)
        if layer not in targets or part == "bias":
            assert torch.equal(found, parameter)
        elif kind == "int8":  # 127 steps from zero to the largest weight of an output; rounding errs by half of one
            step = parameter.abs().amax(1, keepdim=True) / 127
            assert ((restore(found) - parameter).abs() <= step * 0.501).all()
        else:  # the widest gap between two of the 16 values is that from -1 to -0.696
            error = (restore(found) - parameter).abs().max()
            assert error <= parameter.abs().max() * 0.153
            assert error > 0


def test_memory(build, kind):
    model = build()
    targets = list_targets(model)
    before = sum(model.get_submodule(name).weight.numel() for name in targets)
    quantize_layers(model, targets, kind)
    after = sum(count_bytes(model.get_submodule(name).weight) for name in targets)
    # And a scale and a zero for each row of 32 to 64 weights, or a scale for each 64 weights.
    assert EXPECTED_BYTES[kind] * before < after <= (EXPECTED_BYTES[kind] + 5 / 32) * before


def test_logits_and_gradients_are_those_of_the_rounded_weights(build, kind):
    """With LoRA on it, trained for a step: gradients pass through every layer."""
    models = {"quantized": build(), "restored": build()}
    targets = list_targets(models["quantized"])
    quantize_layers(models["quantized"], targets, kind)
    for name in targets:
        weight = restore(models["quantized"].get_submodule(name).weight)
        models["restored"].get_submodule(name).weight.data.copy_(weight.detach())
    logits, grads = {}, {}
    for name, model in models.items():
        torch.manual_seed(1)
        wrapped = attach_adapter(model, AdapterSection(rank=4), TASK.list_modules(model)[1], "tiny")
        generator = torch.Generator().manual_seed(2)
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_" in parameter_name:
                nn.init.normal_(parameter, std=0.1, generator=generator)
        logits[name] = wrapped(**INPUTS).logits
        nn.functional.cross_entropy(logits[name], torch.tensor([0, 2])).backward()
        grads[name] = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
        assert {n for n, p in wrapped.named_parameters() if p.requires_grad} == set(grads[name])
    torch.testing.assert_close(logits["quantized"], logits["restored"], atol=1e-5, rtol=1e-4)
    assert grads["quantized"].keys() == grads["restored"].keys()
    for name, grad in grads["quantized"].items():
        torch.testing.assert_close(grad, grads["restored"][name], atol=1e-5, rtol=1e-3)


def test_the_plan_counts_what_the_bits_stand_for(build, kind):
    model = build()
    head = TASK.list_modules(model)[1]
    plan = plan_parameters(model, AdapterSection(), head)
    quantize_layers(model, list_targets(model), kind)
    assert count_parameters(attach_adapter(model, AdapterSection(), head, "tiny")) == plan


def test_a_run_saves_an_adapter_for_the_whole_base(write_recipe, tmp_path, tiny_base, kind, capfd):
    """What is judged is the adapter on the whole base; on the rounded one it says almost the same."""
    run = finetune.run(write_recipe(tmp_path / "in", model={"quantize": kind}), runs=tmp_path / "runs", quiet=True)
    assert capfd.readouterr().err == ""
    assert run.test["metrics"]["macro_f1"]["value"] > 0.6
    assert {path.suffix for path in run.folder.model.glob("*.safetensors")} == {".safetensors"}
    config = json.loads((run.folder.model / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_base)
    predictor = finetune.load(run.folder.path)
    whole = predictor.compute_scores(TEXTS)
    rounded = predictor.model
    quantize_layers(rounded, find_targets(rounded, "all-linear", TASK.list_modules(rounded)[1]), kind)
    found = predictor.compute_scores(TEXTS)
    assert found == pytest.approx(whole, abs={"int8": 0.02, "nf4": 0.3}[kind])
    assert (found != whole).any()


def test_none_does_nothing(build):
    model = build()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantize_layers(model, list_targets(model), "none")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_words_for_a_package_that_is_missing(write_recipe, tmp_path, monkeypatch, kind, package):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ResourceError) as caught:
        finetune.check(write_recipe(tmp_path, model={"quantize": kind}))
    assert str(caught.value) == (
        f"model.quantize: {kind} needs the package {package}, which is not installed. "
        f"pip install {package}, or set model.quantize: none."
    )


def test_words_for_layers_that_come_in_no_other_bits(write_recipe, tiny_base, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "gpt2"))
    size = len(AutoTokenizer.from_pretrained(tiny_base))
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=size, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(base)
    model = {"base": str(base), "architecture": "native", "quantize": "int8"}
    with pytest.raises(
        RecipeError, match=r"a base without one \(GPT-2's own class has another kind\)\. Set model\.arch"
    ):
        finetune.check(write_recipe(tmp_path / "in", model=model))


def test_words_for_a_method_that_changes_the_base(write_recipe, tmp_path):
    with pytest.raises(RecipeError) as caught:
        finetune.check(write_recipe(tmp_path, model={"quantize": "int8"}, adapter={"method": "full"}))
    assert "model.quantize: must be none unless adapter.method is lora, got 'int8' with 'full'." in str(caught.value)
