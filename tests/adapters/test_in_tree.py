"""One battery over bottlenecks, BitFit and the head alone, on Triad's three shapes and on each family's own class."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from finetune.adapters.bias import BiasConfig
from finetune.adapters.bottleneck import BottleneckConfig
from finetune.adapters.frozen import HeadConfig, register, route
from finetune.errors import UsageError
from finetune.models.triad import (
    TriadConfig,
    TriadForCausalLM,
    TriadForSeq2SeqLM,
    TriadForSequenceClassification,
)

WIDTH, LAYERS, INNER, VOCABULARY = 16, 2, 24, 30
HEADS = ["classifier", "pooler", "bert.pooler", "pre_classifier"]
METHODS: dict[str, Callable[..., Any]] = {
    style: partial(BottleneckConfig, style=style, reduction=4) for style in ("houlsby", "pfeiffer", "parallel")
} | {"bitfit": BiasConfig, "head": HeadConfig}

register()


def build_triad(model_class: Any, **changes: Any) -> Any:
    choices: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "dropout": 0.0,
        "num_labels": 3,
        "decoder_start_token_id": 2,
        "eos_token_id": 1,
    }
    return model_class(TriadConfig(**(choices | changes)))


def build_native(model_class: Any, config_class: Any, **changes: Any) -> Any:
    choices: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 34,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    return model_class(config_class(**(choices | changes)))


BERT_LIKE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BASES: dict[str, Callable[[], Any]] = {
    "triad encoder": partial(build_triad, TriadForSequenceClassification),
    "triad pooler": partial(build_triad, TriadForSequenceClassification, pooling="pooler", embedding_norm=True),
    "triad decoder": partial(
        build_triad, TriadForCausalLM, shape="decoder", norm_position="pre", activation="swiglu", position="rotary"
    ),
    "triad encoder_decoder": partial(build_triad, TriadForSeq2SeqLM, shape="encoder_decoder"),
    "bert": partial(build_native, BertForSequenceClassification, BertConfig, **BERT_LIKE),
    "roberta": partial(build_native, RobertaForSequenceClassification, RobertaConfig, **BERT_LIKE),
    "mpnet": partial(build_native, MPNetForSequenceClassification, MPNetConfig, **BERT_LIKE),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=WIDTH,
            n_layers=LAYERS,
            n_heads=2,
            hidden_dim=INNER,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            num_labels=3,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=2,
            n_inner=INNER,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=2,
            eos_token_id=1,
        )
    ),
    "llama": partial(build_native, LlamaForCausalLM, LlamaConfig, num_key_value_heads=1),
    "marian": lambda: MarianMTModel(
        MarianConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=INNER,
            decoder_ffn_dim=INNER,
            max_position_embeddings=32,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            pad_token_id=0,
            decoder_start_token_id=2,
            eos_token_id=1,
            forced_eos_token_id=None,
        )
    ),
}
ENCODER_DECODERS = ("triad encoder_decoder", "marian")
CLASSIFIERS = ("triad encoder", "triad pooler", "bert", "roberta", "mpnet", "distilbert")
PAIRS = [
    (base, method)
    for base in BASES
    for method in METHODS
    if not (base == "llama" and method == "bitfit")
    and not (base not in CLASSIFIERS and method == "head")
    and not (base not in ("triad encoder", "bert") and method == "pfeiffer")  # half of houlsby
]
every_pair = pytest.mark.parametrize(("base", "method"), PAIRS, ids=[f"{base}-{method}" for base, method in PAIRS])
TRIAD_PAIRS = [("triad encoder", method) for method in METHODS] + [("triad pooler", "houlsby")]


def build_base(base: str) -> Any:
    """Weights at random, norms and biases too, the same every time."""
    torch.manual_seed(3)
    model = BASES[base]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 10)
            elif "embed" not in name:
                parameter.mul_(8)
    return model


def get_head(model: nn.Module) -> list[str]:
    modules = dict(model.named_modules())
    return [name for name in HEADS if name in modules and list(modules[name].parameters())]


def attach(base: str, method: str, *, scramble: bool = True, **options: Any) -> Any:
    """A model with an adapter; `scramble` gives what is trained random weights, as if it had been."""
    torch.manual_seed(4)
    model = build_base(base)
    wrapped = get_peft_model(model, METHODS[method](modules_to_save=get_head(model) or None, **options)).eval()
    return scramble_trained(wrapped) if scramble else wrapped


@torch.no_grad()
def scramble_trained(model: Any, seed: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def build_inputs(base: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[1:3, 5:] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    return inputs | ({"decoder_input_ids": ids[:, :5]} if base in ENCODER_DECODERS else {})


def compute(model: Any, base: str, **options: Any) -> torch.Tensor:
    """Logits of real tokens, or of rows."""
    with torch.no_grad():
        logits: torch.Tensor = model(**build_inputs(base), **options).logits
    return logits if logits.ndim == 2 or base in ENCODER_DECODERS else logits[build_inputs(base)["attention_mask"] == 1]


@every_pair
def test_the_start_is_the_base_to_the_bit(base, method):
    plain = compute(build_base(base), base)
    assert torch.equal(compute(attach(base, method, scramble=False), base), plain)


@every_pair
def test_gradients_in_adapter_and_head_only(base, method):
    """Each weight of the adapter takes part: its layer is called as a module on every path."""
    model = attach(base, method).train()
    model(**build_inputs(base)).logits.square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # The biases of keys shift all products of a query alike, which softmax takes away.
    silent = {
        name for name in with_gradient if model.get_parameter(name).grad.abs().max() < 1e-6 and not is_of_keys(name)
    }
    assert silent == set()
    ours = [name for name in with_gradient if any(prefix in name for prefix in ("bottleneck_", "bitfit_"))]
    assert bool(ours) == (method != "head")
    assert all(".modules_to_save." in name for name in with_gradient - set(ours))


def is_of_keys(name: str) -> bool:
    return any(part in name for part in ("k_proj", "key", "k_lin", "attn.k."))


@every_pair
def test_training_touches_no_bit_of_the_base(base, method):
    before = build_base(base).state_dict()
    model = attach(base, method, scramble=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**build_inputs(base)).logits.square().sum().backward()
        optimizer.step()
    model.eval()
    assert not torch.equal(compute(model, base), compute(build_base(base), base))
    with model.disable_adapter():
        assert torch.equal(compute(model, base), compute(build_base(base), base))
    unloaded = model.unload().state_dict()
    head = tuple(get_head(build_base(base)))
    assert set(unloaded) == set(before)
    for name, tensor in before.items():
        assert torch.equal(unloaded[name], tensor) or name.startswith(head), name


@every_pair
def test_a_saved_adapter_comes_back(base, method, tmp_path):
    model = attach(base, method)
    logits = compute(model, base)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == model.get_nb_trainable_parameters()[0]
    loaded = PeftModel.from_pretrained(build_base(base), tmp_path).eval()
    assert torch.equal(compute(loaded, base), logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    light = PeftModel.from_pretrained(build_base(base), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(compute(light, base), logits)


def test_the_file_says_what_was_asked_for_and_is_the_same_each_time(tmp_path):
    """PEFT turns twenty targets and more into a set, whose order differs from run to run."""
    model = build_triad(TriadForSequenceClassification, num_hidden_layers=3)
    wrapped = get_peft_model(model, BiasConfig(modules_to_save=["classifier"]))
    wrapped.save_pretrained(tmp_path / "bias")
    targets = json.loads((tmp_path / "bias" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    assert sum(".bitfit_delta." in name for name, _ in wrapped.named_parameters()) == 3 * 8
    attach("bert", "parallel", activation="gelu").save_pretrained(tmp_path / "parallel")
    saved = json.loads((tmp_path / "parallel" / "adapter_config.json").read_text())
    layers = [f"bert.encoder.layer.{layer}.output.dense" for layer in range(LAYERS)]
    named = {key: saved[key] for key in ("peft_type", "style", "reduction", "activation", "scaling", "target_modules")}
    assert named == {
        "peft_type": "BOTTLENECK",
        "style": "parallel",
        "reduction": 4,
        "activation": "gelu",
        "scaling": 4.0,
        "target_modules": layers,
    }


@pytest.mark.parametrize(("base", "method"), [*TRIAD_PAIRS, ("bert", "parallel"), ("distilbert", "head")])
def test_two_adapters_on_one_base(base, method, tmp_path):
    """Switched, each alone; one deleted, the other stays; unloaded, the base."""
    alone = {}
    for name, seed in (("first", 7), ("second", 8)):
        model = scramble_trained(attach(base, method), seed)
        alone[name] = compute(model, base)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    model = PeftModel.from_pretrained(build_base(base), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(compute(model, base), alone["first"])
    model.set_adapter("second")
    assert torch.equal(compute(model, base), alone["second"])
    model.set_adapter("first", inference_mode=True)
    model.delete_adapter("second")
    assert torch.equal(compute(model, base), alone["first"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(".second." in name for name in model.state_dict())
    model.load_adapter(tmp_path / "second", adapter_name="third")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which one it takes
        model.delete_adapter("first")
    assert model.active_adapters == ["third"]
    assert torch.equal(compute(model, base), alone["second"])


def test_bottlenecks_of_several_styles_share_a_base(tmp_path):
    alone = {}
    for style in ("pfeiffer", "parallel", "houlsby"):
        model = attach("triad encoder", style)
        alone[style] = compute(model, "triad encoder")
        model.save_pretrained(tmp_path / style)
    model = PeftModel.from_pretrained(
        build_base("triad encoder"), tmp_path / "pfeiffer", adapter_name="pfeiffer"
    ).eval()
    model.load_adapter(tmp_path / "parallel", adapter_name="parallel")
    model.load_adapter(tmp_path / "houlsby", adapter_name="houlsby")
    for style, logits in alone.items():
        model.set_adapter(style)
        assert torch.equal(compute(model, "triad encoder"), logits)


def test_a_second_adapter_finds_its_layers_on_a_wrapped_base():
    model = attach("bert", "parallel")
    model.add_adapter("houlsby", METHODS["houlsby"](modules_to_save=None))
    names = {name.rpartition(".bottleneck_up.")[0] for name, _ in model.named_parameters() if "_up.houlsby" in name}
    prefix = "base_model.model.bert.encoder.layer"
    layers = ("attention.output.dense", "output.dense")
    assert names == {f"{prefix}.{number}.{layer}" for number in range(LAYERS) for layer in layers}
    wrapped = attach("bert", "bitfit")
    wrapped.add_adapter("other", BiasConfig())
    added = {name for name in wrapped.state_dict() if name.endswith("bitfit_delta.other")}
    assert {name.replace(".other", ".default") for name in added} == {
        name for name in wrapped.state_dict() if name.endswith("bitfit_delta.default")
    }


@pytest.mark.parametrize(("base", "method"), TRIAD_PAIRS)
def test_packed_rows_equal_padded_ones(base, method):
    model, inputs = attach(base, method), build_inputs(base)
    padded = compute(model, base)
    rows = [ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat(rows)[None], position_ids=places).logits
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", ["triad encoder", "triad decoder", "bert", "gpt2", "marian"])
@pytest.mark.parametrize("method", ["houlsby", "parallel", "bitfit"])
def test_gradient_checkpointing_gives_the_same_gradients(base, method):
    gradients = []
    for checkpoints in (False, True):
        model = attach(base, method).train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(**build_inputs(base), use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("base", ["triad encoder", "triad decoder", "bert"])
@pytest.mark.parametrize("method", ["houlsby", "parallel", "bitfit"])
@pytest.mark.parametrize("way", ["base", "autocast"])
def test_bf16_gives_finite_numbers_near_those_of_float32(base, method, way):
    """A base in bf16 with weights of the adapter in float32, or all in float32 under autocast."""
    exact = compute(attach(base, method), base)
    if way == "base":
        torch.manual_seed(4)
        model = get_peft_model(build_base(base).to(torch.bfloat16), METHODS[method]()).eval()
        started = model(**build_inputs(base)).logits
        with model.disable_adapter():
            assert torch.equal(model(**build_inputs(base)).logits, started)
        trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert trained == {torch.float32}
        exact = compute(scramble_trained(get_peft_model(build_base(base), METHODS[method]()).eval()), base)
        scramble_trained(model)
    else:
        model = attach(base, method)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        logits = model(**build_inputs(base)).logits
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    error = (compute(model, base).float() - exact).abs().max() / exact.abs().max()
    assert error < 0.1


@pytest.mark.parametrize("base", ["triad decoder", "gpt2"])
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel", "bitfit"])
def test_generation_with_a_cache_is_generation_without(base, method):
    model = attach(base, method)
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    options |= {"pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(prompts)}
    cached, plain = (model.generate(input_ids=prompts, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(plain.scores), atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(model.generate(input_ids=prompts, **options).scores[0], cached.scores[0])


@pytest.mark.parametrize(("base", "method"), [*PAIRS[:5], ("bert", "parallel"), ("bert", "bitfit")])
def test_shapes_alone_tell_what_will_be_trained(base, method):
    with torch.device("meta"):
        model = BASES[base]()
    head = get_head(model) or None
    planned = get_peft_model(model, METHODS[method](modules_to_save=head))
    assert all(parameter.is_meta for parameter in planned.parameters())
    assert planned.get_nb_trainable_parameters() == attach(base, method).get_nb_trainable_parameters()


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_is_on_its_own(method):
    model = attach("triad encoder", method)
    logits = compute(model, "triad encoder")
    twin = copy.deepcopy(model)
    scramble_trained(model)
    assert torch.equal(compute(twin, "triad encoder"), logits)
    assert not torch.equal(compute(model, "triad encoder"), logits)


def test_registering_twice_is_registering_once():
    known = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    assert known == PEFT_TYPE_TO_CONFIG_MAPPING
    assert {"BOTTLENECK", "BITFIT", "HEAD"} <= set(known)


# Rows of one batch with an adapter each


def build_pair(base: str, method: str, tmp_path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with two adapters, and the logits of a batch under each of them and under none."""
    for name, seed in (("first", 7), ("second", 8)):
        scramble_trained(attach(base, method), seed).save_pretrained(tmp_path / name, save_embedding_layers=False)
    model = PeftModel.from_pretrained(build_base(base), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    logits = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        logits[name] = compute_rows(model, base)
    with model.disable_adapter():
        logits["__base__"] = compute_rows(model, base)
    return model, logits


@torch.no_grad()
def compute_rows(model: Any, base: str, **options: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**build_inputs(base), **options).logits
    return logits


ROWS = ["second", "first", "__base__", "first"]


@pytest.mark.parametrize(
    ("base", "method"),
    [pair for pair in PAIRS if pair[0] in ("triad pooler", "triad decoder", "marian", "distilbert", "bert")],
)
def test_rows_of_a_batch_take_the_adapters_that_they_name(base, method, tmp_path):
    model, logits = build_pair(base, method, tmp_path)
    mixed = compute_rows(model, base, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(mixed[row], logits[name][row], atol=1e-5, rtol=1e-4)
    assert torch.equal(compute_rows(model, base), logits["second"])  # nothing stays behind
    with model.disable_adapter(), route(model, {"first": torch.ones(4, dtype=torch.bool)}):
        assert torch.equal(compute_rows(model, base), logits["__base__"])


@pytest.mark.parametrize("method", ["houlsby", "parallel", "bitfit"])
def test_packed_tokens_take_the_adapters_of_their_rows(method, tmp_path):
    model, logits = build_pair("triad decoder", method, tmp_path)
    inputs = build_inputs("triad decoder")
    rows = [ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    lengths = [len(row) for row in rows]
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    named = [name for name, length in zip(ROWS, lengths, strict=True) for _ in range(length)]
    masks = {name: torch.tensor([[name == other for other in named]]) for name in ("first", "second")}
    with route(model, masks), torch.no_grad():
        packed = model(input_ids=torch.cat(rows)[None], position_ids=places).logits[0].split(lengths)
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(packed[row], logits[name][row, : lengths[row]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["parallel", "head"])
def test_packed_rows_take_their_heads(method, tmp_path):
    base = "triad pooler"
    model, logits = build_pair(base, method, tmp_path)
    inputs = build_inputs(base)
    rows = [ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    named = [name for name, row in zip(ROWS, rows, strict=True) for _ in row]
    masks = {name: torch.tensor([[name == other for other in named]]) for name in ("first", "second")}
    head_masks = {name: torch.tensor([name == other for other in ROWS]) for name in ("first", "second")}
    with route(model, masks, head_masks), torch.no_grad():
        packed = model(input_ids=torch.cat(rows)[None], position_ids=places).logits
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(packed[row], logits[name][row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", ["triad encoder_decoder", "marian"])
def test_beams_take_the_adapter_of_their_row(base, tmp_path):
    model, _ = build_pair(base, "houlsby", tmp_path)
    inputs = {name: tensor for name, tensor in build_inputs(base).items() if name != "decoder_input_ids"}
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    mixed = model.generate(**inputs, **options, adapter_names=ROWS)
    for name in ("first", "second"):
        model.set_adapter(name)
        alone = model.generate(**inputs, **options)
        for row in (row for row, other in enumerate(ROWS) if other == name):
            width = min(alone.shape[1], mixed.shape[1])
            assert torch.equal(mixed[row, :width], alone[row, :width])


def test_words_for_adapters_by_row(tmp_path):
    model, _ = build_pair("triad encoder", "bitfit", tmp_path)
    with pytest.raises(UsageError, match=r"^adapter_names: must be among first, second, got third\.$"):
        compute_rows(model, "triad encoder", adapter_names=["first", "third", "second", "first"])
    with pytest.raises(UsageError) as caught:
        compute_rows(model, "triad encoder", adapter_names=["first", "second"])
    assert str(caught.value) == (
        "adapter_names: must say for each row which adapter it takes, got (2,) for a batch of (4, 7) tokens. Give one "
        "name a row; packed rows need a mask of tokens each."
    )
    model.train()
    with pytest.raises(UsageError, match=r"^adapter_names: must come in evaluation mode, .* Call model\.eval\(\)\.$"):
        compute_rows(model, "triad encoder", adapter_names=ROWS)
    model.eval().merge_adapter()
    with pytest.raises(
        UsageError, match=r"^adapter_names: must meet a base without merged .* unmerge_adapter first\.$"
    ):
        compute_rows(model, "triad encoder", adapter_names=ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    compute_rows(model, "triad encoder", adapter_names=ROWS)
