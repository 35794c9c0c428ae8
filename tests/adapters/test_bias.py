"""BitFit by differences is training the biases themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from finetune.adapters.bias import BiasConfig, find_biases
from finetune.adapters.frozen import register
from finetune.errors import RecipeError, UsageError
from finetune.models.triad import TriadConfig, TriadForCausalLM, TriadForMaskedLM

SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}
HEAD = ["classifier", "bert.pooler"]
IDS = torch.randint(3, 30, (4, 6), generator=torch.Generator().manual_seed(1))

register()


def build_bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(**SIZE, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                nn.init.normal_(parameter, std=0.1)
    return model


def build_gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(config)


def train(model: Any, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        model(IDS).logits.log_softmax(-1)[..., 1].mean().neg().backward()
        optimizer.step()


@pytest.mark.parametrize(("build", "head"), [(build_bert, HEAD), (build_gpt2, [])], ids=["bert", "gpt2"])
def test_it_is_training_the_biases(build, head):
    """Linear layers, GPT-2's Conv1D and norms; the head is trained whole in both."""
    direct = build()
    before = {name: parameter.detach().clone() for name, parameter in direct.named_parameters()}
    trained = [name for name in before if name.endswith(".bias") or name.startswith(tuple(head))]
    train(direct, [direct.get_parameter(name) for name in trained])
    assert all(not torch.equal(direct.get_parameter(name), before[name]) for name in trained if "key" not in name)

    model = get_peft_model(build(), BiasConfig(modules_to_save=head or None))
    train(model, [parameter for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(model(IDS).logits, direct(IDS).logits, atol=1e-5, rtol=1e-5)
    merged = dict(model.merge_and_unload().named_parameters())
    assert set(merged) == set(before)
    for name, parameter in direct.named_parameters():
        torch.testing.assert_close(merged[name], parameter, atol=1e-6, rtol=1e-5)


def scramble(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bitfit_" in name:
                nn.init.normal_(parameter)
    return model.eval()


def test_merging_and_back():
    plain = {name: parameter.detach().clone() for name, parameter in build_bert().named_parameters()}
    model = scramble(get_peft_model(build_bert(), BiasConfig(modules_to_save=HEAD)))
    logits = model(IDS).logits
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(IDS).logits, logits, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, build_bert().eval()(IDS).logits)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, logits)
    for name, parameter in model.unload().named_parameters():
        assert torch.equal(parameter, plain[name]), name


def test_the_sum_of_two_adapters_merges():
    model = scramble(get_peft_model(build_gpt2(), BiasConfig(), adapter_name="first"))
    model.add_adapter("second", BiasConfig())
    scramble(model).base_model.set_adapter(["first", "second"])
    logits = model(IDS).logits
    base = model.base_model.model.transformer.h[0].mlp.c_fc
    both = base.base_layer.bias + base.bitfit_delta["first"] + base.bitfit_delta["second"]
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.transformer.h[0].mlp.c_fc.bias, both)
    torch.testing.assert_close(merged(IDS).logits, logits, atol=1e-5, rtol=1e-5)


def test_words_for_weights_that_are_not_finite():
    model = scramble(get_peft_model(build_bert(), BiasConfig()))
    model.base_model.model.bert.embeddings.LayerNorm.bitfit_delta["default"].data[0] = torch.nan
    with pytest.raises(UsageError) as caught:
        model.merge_and_unload(safe_merge=True)
    assert str(caught.value) == "adapter default: must have finite weights to be merged, got others. Train it anew."


def test_every_bias_but_those_of_the_head():
    """By the model's own list of parameters; the word embeddings' matrix is also that of the logits."""
    model = build_bert()
    expected = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert set(find_biases(model, HEAD)) == {name for name in expected if not name.startswith(tuple(HEAD))}
    masked = TriadForMaskedLM(TriadConfig(**SIZE, lm_head_bias=True))
    found = find_biases(masked, ["transform", "transform_norm"])
    assert "lm_head" not in found
    assert {name.rpartition(".")[2] for name in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "attention_norm", "up_proj", "down_proj", "mlp_norm"),
    }


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 20).map(lambda half: 2 * half),
    inner=st.integers(1, 40),
    layers=st.integers(1, 3),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
)
def test_counts_by_formula(width, inner, layers, biases, norm):
    """A layer: 3 D of queries, keys and values, D behind the heads, inner + D of the feed-forward, D of each norm."""
    attends, outputs, feeds = biases
    config = TriadConfig(
        shape="decoder",
        hidden_size=width,
        num_attention_heads=1,
        num_hidden_layers=layers,
        intermediate_size=inner,
        vocab_size=7,
        norm=norm,
        attention_bias=attends,
        output_bias=outputs,
        mlp_bias=feeds,
    )
    with torch.device("meta"):
        model = TriadForCausalLM(config)
    norms = 2 * width if norm == "layernorm" else 0
    count = layers * (3 * width * attends + width * outputs + (inner + width) * feeds + norms)
    if count:
        wrapped = get_peft_model(model, BiasConfig())
        assert wrapped.get_nb_trainable_parameters()[0] == count
    else:
        with pytest.raises(RecipeError, match=r"got a base without any \(TriadForCausalLM\)"):
            get_peft_model(model, BiasConfig())


def test_words_for_a_base_without_biases():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZE))
    with pytest.raises(RecipeError) as caught:
        get_peft_model(model, BiasConfig())
    assert str(caught.value) == (
        "adapter.method: bitfit must find biases to train, got a base without any (LlamaForCausalLM). Set "
        "adapter.method: lora."
    )


def test_conv1d_is_among_them():
    model = build_gpt2()
    kinds = {type(model.get_submodule(name)) for name in find_biases(model, [])}
    assert kinds == {Conv1D, nn.LayerNorm}
