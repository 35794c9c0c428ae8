"""Language models from random weights and from a base: what a recipe's section makes of them, and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
)

from finetune.errors import ModelError, RecipeError
from finetune.models.base import SCRATCH, BaseModel, find_base, load_tokenizer, resolve_base
from finetune.models.classifier import build_classifier, build_classifier_config
from finetune.models.language import (
    LANGUAGE_SHAPES,
    build_language_config,
    build_language_model,
    build_language_model_shape,
    load_saved_language_model,
)
from finetune.models.tokenizer import train_tokenizer
from finetune.recipe.schema import ModelSection

TEXTS = ["the dog sleeps and the fox jumps over the dog"] * 2
every_kind = pytest.mark.parametrize("kind", LANGUAGE_SHAPES)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, "bpe", 270, 16, appends_end=False)


@pytest.fixture
def bert(tiny_base: Path) -> BaseModel:
    return BaseModel("tiny", tiny_base, "local folder")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, BaseModel]:
    """A random GPT-2 and a random Marian that fit the tokenizer."""
    torch.manual_seed(0)
    shared = {"vocab_size": 270, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    marian = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 0}
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **shared)),
        "marian": MarianMTModel(MarianConfig(max_position_embeddings=32, **shared, **marian, **heads)),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return {name: BaseModel(name, folder, "local folder") for name, folder in folders.items()}


def build_section(kind: str, **changes) -> ModelSection:
    """Eight wide; positions that the shape can have."""
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    size["position"] = "sinusoidal" if kind == "seq2seq" else "rotary"
    size |= changes.pop("scratch", {})
    return ModelSection(**{"base": "scratch", "max_length": 16, "scratch": size, **changes})


def list_states(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# From scratch


@every_kind
def test_a_model_from_scratch_fits_its_tokenizer(kind, tokenizer):
    model = build_language_model(kind, SCRATCH, build_section(kind, dropout=0.3), tokenizer, seed=0)
    config = model.config
    assert (config.shape, config.vocab_size) == (LANGUAGE_SHAPES[kind][0], 270)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, 3)
    assert config.decoder_start_token_id == (2 if kind == "seq2seq" else None)
    assert config.max_position_embeddings == 16
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} >= {0.3}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    first = model.model.first.embeddings.tokens.weight
    assert model.lm_head.weight is first
    assert not first[0].any()
    assert first[1:].any(dim=1).all()


def test_every_choice_of_the_section_reaches_the_model(tokenizer):
    choices = {
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_decoder_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "activation": "swiglu",
        "norm_position": "post",
        "norm": "rmsnorm",
        "position": "learned",
        "tie_word_embeddings": False,
    }
    section = build_section("seq2seq", scratch=choices)
    assert {**section.scratch.model_dump(), **choices} == section.scratch.model_dump()
    unread = {"tokenizer", "vocab_size"}  # by the model: its vocabulary is the tokenizer's
    assert set(choices) == set(section.scratch.model_dump()) - unread
    model = build_language_model("seq2seq", SCRATCH, section, tokenizer, seed=0)
    assert {name: getattr(model.config, name) for name in choices} == choices
    assert (len(model.model.encoder.layers), len(model.model.decoder.layers)) == (3, 1)
    assert model.lm_head.weight is not model.model.encoder.embeddings.tokens.weight


def test_the_parameters_of_a_decoder_counted_by_hand(tokenizer):
    section = build_section("causal_lm", scratch={"position": "learned"})
    model = build_language_model("causal_lm", SCRATCH, section, tokenizer, seed=0)
    vocabulary, width, layers = 270, 8, 2
    attention = 4 * (width * width + width)
    feed_forward = 2 * width * 4 * width + 4 * width + width
    norms = 2 * width
    expected = (
        vocabulary * width + 16 * width + layers * (attention + feed_forward + 2 * norms) + norms  # the last one too
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@every_kind
def test_the_seed_decides_every_weight(kind, tokenizer):
    section = build_section(kind)
    first, same, other = (
        build_language_model(kind, SCRATCH, section, tokenizer, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    matrices = [name for name, tensor in first.items() if tensor.ndim == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


@pytest.mark.parametrize(
    ("kind", "position"),
    [
        *(("causal_lm", position) for position in ("sinusoidal", "learned", "rotary")),
        *(("masked_lm", position) for position in ("sinusoidal", "learned", "rotary")),
        *(("seq2seq", position) for position in ("sinusoidal", "learned")),
    ],
)
def test_a_fresh_model_knows_nothing(kind, position, tokenizer):
    """Its loss is near ln V, that of a guess: the weights start neither too large nor dead."""
    section = build_section(kind, scratch={"position": position, "hidden_size": 64})
    model = build_language_model(kind, SCRATCH, section, tokenizer, seed=0).eval()
    ids = torch.randint(5, 270, (4, 16), generator=torch.Generator().manual_seed(0))
    targets = torch.randint(5, 270, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids, **({"decoder_input_ids": ids} if kind == "seq2seq" else {})).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert logits.shape == (4, 16, 270)
    assert loss == pytest.approx(math.log(270), abs=0.7)
    assert logits.std() > 0.01


def test_tokens_are_as_large_as_the_sines(tokenizer):
    section = build_section("causal_lm", scratch={"position": "sinusoidal", "hidden_size": 64})
    model = build_language_model("causal_lm", SCRATCH, section, tokenizer, seed=0)
    embeddings = model.model.decoder.embeddings
    states = embeddings.tokens(torch.arange(5, 270))[None]
    scaled = states * math.sqrt(64)
    assert scaled.std().item() == pytest.approx(1.0, abs=0.05)
    sines = embeddings.eval()(states, torch.zeros(1, 265, dtype=torch.long), None) - scaled
    torch.testing.assert_close(sines[0, 0], torch.tensor([0.0, 1.0]).repeat(32))
    rotary = build_language_config("causal_lm", SCRATCH, build_section("causal_lm"), tokenizer)
    assert not rotary.scale_embeddings


@pytest.mark.parametrize(
    ("kind", "scratch", "words"),
    [
        (
            "causal_lm",
            {"hidden_size": 10, "num_attention_heads": 4},
            "hidden_size (10) must be a multiple of num_attention_heads (4), or head_dim be given.",
        ),
        (
            "seq2seq",
            {"position": "rotary"},
            "rotary positions say nothing about tokens of the other stack: take sinusoidal or learned ones.",
        ),
    ],
)
def test_words_for_a_size_that_cannot_work(kind, scratch, words, tokenizer):
    with pytest.raises(RecipeError) as caught:
        build_language_config(kind, SCRATCH, build_section(kind, scratch=scratch), tokenizer)
    assert str(caught.value) == f"model.scratch: {words}"


def test_words_for_a_native_model_from_scratch(tokenizer):
    with pytest.raises(RecipeError) as caught:
        build_language_config("causal_lm", SCRATCH, build_section("causal_lm", architecture="native"), tokenizer)
    assert str(caught.value) == (
        "model.architecture: must be triad where model.base is scratch, got native. Leave it out, or name a base."
    )


def test_scratch_is_found_and_has_no_weights(tmp_path, monkeypatch, tiny_base):
    shutil.copytree(tiny_base, tmp_path / "scratch")
    monkeypatch.chdir(tmp_path)
    assert find_base("scratch") is resolve_base("scratch") is SCRATCH
    assert SCRATCH.compute_fingerprint() == ""
    assert resolve_base("./scratch").compute_fingerprint() != ""


# Saved, and in shape only


@every_kind
def test_a_saved_model_gives_the_same_logits(kind, tokenizer, tmp_path):
    model = build_language_model(kind, SCRATCH, build_section(kind), tokenizer, seed=0).eval()
    model.save_pretrained(tmp_path)
    loaded = load_saved_language_model(kind, tmp_path, None).eval()
    ids = torch.randint(5, 270, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"decoder_input_ids": ids.flip(1)} if kind == "seq2seq" else {}
    with torch.no_grad():
        assert torch.equal(loaded(ids, **inputs).logits, model(ids, **inputs).logits)
    assert loaded.lm_head.weight is loaded.model.first.embeddings.tokens.weight
    base = BaseModel("mine", tmp_path, "local folder")
    again = build_language_model(kind, base, build_section(kind, base="mine", dropout=0.2), tokenizer, seed=1)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert again.config.dropout == 0.2


def test_a_base_in_the_shape_that_an_adapter_was_trained_in(bases, tokenizer, tmp_path):
    model = build_language_model("causal_lm", bases["gpt2"], ModelSection(max_length=16), tokenizer, seed=0)
    model.config.save_pretrained(tmp_path)
    loaded = load_saved_language_model("causal_lm", tmp_path, bases["gpt2"])
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@every_kind
def test_shapes_without_weights(kind, tokenizer):
    section = build_section(kind)
    shape = build_language_model_shape(kind, SCRATCH, section, tokenizer)
    assert {parameter.device.type for parameter in shape.parameters()} == {"meta"}
    assert list_states(shape) == list_states(build_language_model(kind, SCRATCH, section, tokenizer, seed=0))
    shape.tie_weights()
    assert len(list(shape.parameters())) == len(
        list(build_language_model(kind, SCRATCH, section, tokenizer, seed=0).parameters())
    )


@pytest.mark.parametrize("architecture", ["triad", "native"])
@pytest.mark.parametrize(("kind", "name"), [("causal_lm", "gpt2"), ("seq2seq", "marian")])
def test_a_base_and_its_shape_in_both_architectures(kind, name, architecture, bases, tokenizer):
    section = ModelSection(architecture=architecture, max_length=16, dropout=0.2)
    model = build_language_model(kind, bases[name], section, tokenizer, seed=0)
    assert (
        type(model).__name__
        == {
            ("gpt2", "triad"): "TriadForCausalLM",
            ("gpt2", "native"): "GPT2LMHeadModel",
            ("marian", "triad"): "TriadForSeq2SeqLM",
            ("marian", "native"): "MarianMTModel",
        }[name, architecture]
    )
    rates = {
        value
        for key, value in model.config.to_dict().items()
        if "dropout" in key and key != "item_dropout" and value is not None
    }
    assert rates == {0.2}
    shape = build_language_model_shape(kind, bases[name], section, tokenizer)
    assert list_states(shape) == list_states(model)


# Masked language models and the classifiers made of them


@pytest.mark.parametrize(("pooling", "kept"), [("auto", "pooler"), ("first", "pooler"), ("mean", "mean")])
def test_a_masked_language_model_keeps_the_pooling(pooling, kept, bert, tmp_path):
    section = ModelSection(pooling=pooling, max_length=32)
    build_language_model("masked_lm", bert, section, load_tokenizer(bert), seed=0).save_pretrained(tmp_path)
    trained = BaseModel("mine", tmp_path, "local folder")
    assert build_classifier_config(trained, ["a", "b"], ModelSection()).pooling == kept
    first = build_classifier_config(trained, ["a", "b"], ModelSection(pooling="first"))
    assert first.pooling == ("pooler" if kept == "pooler" else "cls")


def test_the_first_token_of_a_decoder_is_never_read(tokenizer, tmp_path):
    model = build_language_model("causal_lm", SCRATCH, build_section("causal_lm"), tokenizer, seed=0)
    assert model.config.pooling == "last"
    model.config.pooling = "mean"
    model.save_pretrained(tmp_path)
    base = BaseModel("mine", tmp_path, "local folder")
    assert build_classifier_config(base, ["a", "b"], ModelSection()).pooling == "mean"
    assert build_classifier_config(base, ["a", "b"], ModelSection(pooling="first")).pooling == "last"


def test_the_native_masked_language_model(bert):
    model = build_language_model(
        "masked_lm", bert, ModelSection(architecture="native", max_length=32), load_tokenizer(bert), seed=0
    )
    assert type(model) is BertForMaskedLM


def test_pretrain_then_transfer(bert, tmp_path):
    """The second of the two commands starts from the weights that the first one left."""
    model = build_language_model(
        "masked_lm", bert, ModelSection(pooling="mean", max_length=32), load_tokenizer(bert), seed=0
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert.folder).save_pretrained(tmp_path)
    trained = resolve_base(str(tmp_path))
    classifier = build_classifier(trained, ["a", "b"], ModelSection(base=str(tmp_path)), seed=0)
    assert all(torch.equal(tensor, model.model.state_dict()[n]) for n, tensor in classifier.model.state_dict().items())
    assert classifier.config.pooling == "mean"


# What is refused


@pytest.mark.parametrize("architecture", ["triad", "native"])
@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("causal_lm", "bert", "causal_lm needs a decoder, got bert, which is an encoder (bert)"),
        ("seq2seq", "bert", "seq2seq needs an encoder-decoder, got bert, which is an encoder (bert)"),
        ("masked_lm", "gpt2", "masked_lm needs an encoder, got gpt2, which is a decoder (gpt2)"),
        ("causal_lm", "marian", "causal_lm needs a decoder, got marian, which is an encoder-decoder (marian)"),
    ],
)
def test_words_for_a_base_of_another_shape(kind, name, words, architecture, bert, bases, tokenizer):
    """A BERT would see the very token that it is asked for, and reach a loss of nearly nothing."""
    base = bases.get(name) or BaseModel("bert", bert.folder, "local folder")
    with pytest.raises(RecipeError) as caught:
        build_language_config(kind, base, ModelSection(architecture=architecture, max_length=16), tokenizer)
    assert str(caught.value) == f"model.base: {words}. Name another base, or scratch."


def test_words_for_a_tokenizer_of_another_model(bases, tokenizer):
    larger = train_tokenizer(TEXTS, "bpe", 275, 16, appends_end=False)
    with pytest.raises(ModelError) as caught:
        build_language_config("causal_lm", bases["gpt2"], ModelSection(max_length=16), larger)
    assert str(caught.value) == (
        "gpt2: tokenizer and weights must belong together, got 275 tokens for a vocabulary of 270. "
        "Get both from where the weights came from."
    )


@pytest.mark.parametrize(
    ("kind", "name", "token"), [("causal_lm", "gpt2", "eos_token"), ("masked_lm", "tiny", "mask_token")]
)
def test_words_for_a_tokenizer_that_lacks_a_token(kind, name, token, bert, bases, tokenizer):
    base = bases.get(name, bert)
    own = load_tokenizer(base)
    setattr(own, token, None)
    with pytest.raises(ModelError) as caught:
        build_language_config(kind, base, ModelSection(max_length=16), own)
    assert str(caught.value) == f"{name}: {kind} needs a tokenizer with a {token}, got none. Name another base."


def test_a_bert_that_looks_back_only_is_a_decoder(tmp_path, tokenizer):
    BertConfig(vocab_size=270, is_decoder=True).save_pretrained(tmp_path)
    base = BaseModel("acme/decoder", tmp_path, "local folder")
    section = ModelSection(architecture="native", max_length=16)
    assert build_language_config("causal_lm", base, section, tokenizer).is_decoder
    with pytest.raises(RecipeError, match=r"^model\.base: masked_lm needs an encoder, .* which is a decoder \(bert\)"):
        build_language_config("masked_lm", base, section, tokenizer)


def test_words_for_a_family_that_triad_has_no_form_of(tmp_path, tokenizer):
    DebertaV2Config(hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^model_type must be one of bert, .* got 'deberta-v2'\. Set .*native"):
        build_language_config("masked_lm", BaseModel("acme", tmp_path, "local folder"), ModelSection(), tokenizer)


@pytest.mark.parametrize("architecture", ["triad", "native"])
def test_words_for_weights_that_are_none(architecture, bases, tokenizer, tmp_path):
    folder = Path(shutil.copytree(bases["gpt2"].folder, tmp_path / "base"))
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    section = ModelSection(architecture=architecture, max_length=16)
    words = r": must (hold safetensors that can be read|load as a causal language model); .*header"
    with pytest.raises(ModelError, match=words):
        build_language_model("causal_lm", BaseModel("acme", folder, "local folder"), section, tokenizer, seed=0)


def test_words_for_a_run_that_holds_only_an_adapter(bert, tmp_path):
    shutil.copy(bert.folder / "config.json", tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ModelError) as caught:
        resolve_base(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: must hold whole weights in model.safetensors, got an adapter alone. A base for others must be "
        "trained with adapter: {method: full}, or pushed with --merge. To train an adapter on: model.adapters."
    )


def test_a_base_without_padding_pads_with_its_end(bases, tokenizer, tmp_path):
    bare = train_tokenizer(TEXTS, "bpe", 270, 16, appends_end=False)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    base = BaseModel("acme/decoder", tmp_path, "local folder")
    assert load_tokenizer(base, pads_with_end=True).pad_token == "</s>"
    assert load_tokenizer(bases["gpt2"], pads_with_end=True).pad_token == "<pad>"
    with pytest.raises(ModelError, match=r"^acme/decoder: the tokenizer must have a padding token, got none\."):
        load_tokenizer(base)
