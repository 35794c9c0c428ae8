"""Triad does what Hugging Face's own models do: loading, outputs, generation, pipelines, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch.export import Dim, export
from transformers import AutoConfig, AutoTokenizer, pipeline

from finetune.models import triad

VOCABULARY = 61
DECODER = {
    "shape": "decoder",
    "position": "rotary",
    "norm": "rmsnorm",
    "norm_position": "pre",
    "activation": "swiglu",
    "num_key_value_heads": 2,
    "pooling": "last",
}
SEQ2SEQ = {"shape": "encoder_decoder", "num_decoder_layers": 3, "decoder_start_token_id": 1}
HEADS = {
    "tone": {"type": "sequence_classification", "num_labels": 3},
    "names": {"type": "token_classification", "num_labels": 4},
}
# class, the Auto class that finds it, its choices
MODELS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "encoder": ("TriadModel", "AutoModel", {}),
    "decoder": ("TriadModel", "AutoModel", DECODER),
    "both": ("TriadModel", "AutoModel", SEQ2SEQ),
    "masked": ("TriadForMaskedLM", "AutoModelForMaskedLM", {"lm_head_bias": True}),
    "causal": ("TriadForCausalLM", "AutoModelForCausalLM", DECODER),
    "causal, untied": ("TriadForCausalLM", "AutoModelForCausalLM", DECODER | {"tie_word_embeddings": False}),
    "seq2seq": ("TriadForSeq2SeqLM", "AutoModelForSeq2SeqLM", SEQ2SEQ),
    "seq2seq, untied": ("TriadForSeq2SeqLM", "AutoModelForSeq2SeqLM", SEQ2SEQ | {"tie_word_embeddings": False}),
    "rows": ("TriadForSequenceClassification", "AutoModelForSequenceClassification", {"pooling": "pooler"}),
    "rows, decoder": ("TriadForSequenceClassification", "AutoModelForSequenceClassification", DECODER),
    "tokens": ("TriadForTokenClassification", "AutoModelForTokenClassification", {"type_vocab_size": 2}),
    "answers": ("TriadForQuestionAnswering", "AutoModelForQuestionAnswering", {"position": "learned"}),
    "embedding": ("TriadForSentenceEmbedding", None, {}),
    "tasks": ("TriadForMultiTask", None, {"heads": HEADS}),
    "items": ("TriadForNextItem", None, DECODER | {"num_items": VOCABULARY, "item_text_size": 6}),
}
TOKEN_MODELS = [name for name in MODELS if name != "items"]
LANGUAGE_MODELS = [name for name in MODELS if name.startswith(("masked", "causal", "seq2seq"))]
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def build_config(**choices: Any) -> triad.TriadConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    given = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "bos_token_id": 1, "num_labels": 3}
    return triad.TriadConfig(**sizes | given | choices)


def build(name: str, attention: str = "sdpa", **choices: Any) -> Any:
    """A model whose weights are all random, biases and norms too."""
    class_name, _, own = MODELS[name]
    torch.manual_seed(0)
    model = getattr(triad, class_name)._from_config(build_config(**own | choices), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def run(model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK, **options: Any) -> Any:
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = ids[:, :5]
    return model(input_ids=ids, attention_mask=mask, **options)


def list_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, those of several heads too."""
    values = [value for field in output.values() for value in (field.values() if isinstance(field, dict) else [field])]
    return [value for value in values if isinstance(value, torch.Tensor)]


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit."""
    pairs = list(zip(list_tensors(found), list_tensors(expected), strict=True))
    assert pairs
    assert all(torch.equal(one, other) for one, other in pairs)


# Loading and saving


@pytest.mark.parametrize("name", MODELS)
def test_loaded_by_its_auto_class(name: str, tmp_path: Path) -> None:
    class_name, auto_name, _ = MODELS[name]
    model = build(name)
    model.save_pretrained(tmp_path)
    auto = getattr(transformers, auto_name) if auto_name else getattr(triad, class_name)
    loaded, problems = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is triad.TriadConfig
    assert not any(problems.values())
    assert_same(run(loaded), run(model))


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_the_file_holds_each_weight_once_and_no_buffer(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118  (no dict)
    assert saved == model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_number_of_parameters_worked_by_hand() -> None:
    layer = 4 * (32 * 32 + 32) + (32 * 48 + 48) + (48 * 32 + 32) + 2 * 2 * 32
    assert build("encoder").num_parameters() == VOCABULARY * 32 + 2 * layer
    # Tied: one matrix of tokens for both stacks and the head; three layers that look at the encoder, too.
    crossing = layer + 4 * (32 * 32 + 32) + 2 * 32
    for name in ("both", "seq2seq"):
        assert build(name).num_parameters() == VOCABULARY * 32 + 2 * layer + 3 * crossing
    assert build("seq2seq, untied").num_parameters() == 3 * VOCABULARY * 32 + 2 * layer + 3 * crossing


def test_a_bare_model_starts_a_classifier(tmp_path: Path) -> None:
    bare = build("encoder")
    bare.save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    loaded, problems = auto.from_pretrained(tmp_path, num_labels=50, output_loading_info=True)
    assert set(problems["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not problems["unexpected_keys"]
    assert_same(run(loaded.model.eval()), run(bare))
    assert loaded.classifier.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not loaded.classifier.bias.any()


@pytest.mark.parametrize("name", MODELS)
def test_built_without_memory_and_filled_later(name: str) -> None:
    """No tensor is made outside of the state dict: what is not in it would hold garbage here."""
    model = build(name)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(model.state_dict())
    assert_same(run(filled), run(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    found = list_tensors(run(loaded))
    assert all(one.dtype == dtype and one.isfinite().all() for one in found)
    assert_same(run(model.to(dtype)), run(loaded))


@pytest.mark.parametrize("name", MODELS)
def test_the_attention_implementations_agree(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    outputs = []
    for attention in ("eager", "sdpa"):
        model = getattr(triad, MODELS[name][0]).from_pretrained(tmp_path, attn_implementation=attention)
        assert model.config._attn_implementation == attention
        outputs.append(list_tensors(run(model)))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_new_tokens(name: str, tmp_path: Path) -> None:
    model = build(name)
    before = list_tensors(run(model))
    assert model.resize_token_embeddings(VOCABULARY + 9).weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == VOCABULARY + 9
    for old, new in zip(before, list_tensors(run(model)), strict=True):
        torch.testing.assert_close(new[..., : old.shape[-1]], old, atol=1e-6, rtol=1e-6)
    if name in LANGUAGE_MODELS:
        assert run(model)["logits"].shape[-1] == VOCABULARY + 9
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert is_tied is not name.endswith("untied")
    model.save_pretrained(tmp_path)
    latest = torch.full_like(IDS, VOCABULARY + 8)
    assert_same(run(type(model).from_pretrained(tmp_path), latest), run(model, latest))


# Outputs


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_attentions(name: str) -> None:
    model = build(name, "eager")
    output = run(model, output_hidden_states=True, output_attentions=True)
    is_both = model.config.is_encoder_decoder
    stack = "decoder_" if is_both else ""
    layers, length = (3, 5) if is_both else (2, 9)
    hidden, weights = output[f"{stack}hidden_states"], output[f"{stack}attentions"]
    assert [tuple(states.shape) for states in hidden] == [(2, length, 32)] * (layers + 1)
    assert [tuple(matrix.shape) for matrix in weights] == [(2, 4, length, length)] * layers
    bare = model if hasattr(output, "last_hidden_state") else model.model
    assert torch.equal(hidden[-1], run(bare).last_hidden_state)
    if is_both:
        assert [tuple(states.shape) for states in output.encoder_hidden_states] == [(2, 9, 32)] * 3
        assert [tuple(matrix.shape) for matrix in output.encoder_attentions] == [(2, 4, 9, 9)] * 2
        assert [tuple(matrix.shape) for matrix in output.cross_attentions] == [(2, 4, 5, 9)] * 3
        weights = output.encoder_attentions + output.cross_attentions
    for matrix in weights:
        torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:-1]))
        if matrix.shape[-1] == 9:  # nobody looks at padding
            assert not matrix[1, :, :, 6:].any()


@pytest.mark.parametrize("name", MODELS)
def test_tuples(name: str) -> None:
    model = build(name)
    named = run(model, output_hidden_states=True, use_cache=False)
    asked = run(model, output_hidden_states=True, use_cache=False, return_dict=False)
    model.config.return_dict = False
    configured = run(model, output_hidden_states=True, use_cache=False)
    for found in (asked, configured):
        assert type(found) is tuple
        assert len(found) == len(named.to_tuple())
        first, expected = found[0], named[0]
        assert first.keys() == expected.keys() if isinstance(first, dict) else torch.equal(first, expected)


def test_a_task_counts_its_labels_as_trainer_asks() -> None:
    model = build("tasks")
    labels = torch.tensor([0, 2])
    one, whole = (
        model(IDS, MASK, task="tone", labels=labels, **options).loss for options in ({}, {"num_items_in_batch": 8})
    )
    torch.testing.assert_close(whole, one * len(labels) / 8)
    logits = model(IDS, MASK, task="tone").logits
    torch.testing.assert_close(one, torch.nn.functional.cross_entropy(logits, labels))


# Generation


@torch.no_grad()
def continue_by_hand(model: Any, ids: torch.Tensor, steps: int, **options: Any) -> torch.Tensor:
    """The likeliest token again and again, all tokens computed anew each time."""
    is_both = model.config.is_encoder_decoder
    known = torch.ones(len(ids), 1, dtype=torch.long) if is_both else ids
    for _ in range(steps):
        output = model(ids, decoder_input_ids=known, **options) if is_both else model(known, **options)
        known = torch.cat([known, output.logits[:, -1:].argmax(-1)], dim=1)
    return known


@pytest.mark.parametrize("name", ["causal", "seq2seq"])
def test_greedy(name: str) -> None:
    model = build(name)
    options = {"attention_mask": MASK} if name == "seq2seq" else {}
    expected = continue_by_hand(model, IDS, 8, **options)
    for use_cache in (True, False):
        found = model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use_cache, **options)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["causal", "seq2seq"])
def test_beams_as_wide_as_the_vocabulary_find_the_best_pair(name: str) -> None:
    model = build(name)
    one = IDS[:1]
    pairs = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    with torch.no_grad():
        if name == "causal":
            logits = model(torch.cat([one.expand(len(pairs), -1), pairs], dim=1)).logits[:, -3:-1]
        else:
            start = torch.ones(len(pairs), 1, dtype=torch.long)
            given = torch.cat([start, pairs[:, :1]], dim=1)
            logits = model(one.expand(len(pairs), -1), decoder_input_ids=given).logits
    scores = logits.log_softmax(-1).gather(-1, pairs[..., None]).sum((1, 2))
    options = {"max_new_tokens": 2, "num_beams": VOCABULARY, "do_sample": False}
    for use_cache in (True, False):
        assert torch.equal(model.generate(one, use_cache=use_cache, **options)[0, -2:], pairs[scores.argmax()])


@pytest.mark.parametrize("name", ["causal", "seq2seq"])
def test_sampling(name: str) -> None:
    model = build(name)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(IDS, max_new_tokens=12, do_sample=True, temperature=3.0, use_cache=use_cache))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], model.generate(IDS, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal"])
def test_padding_on_the_left_changes_nothing(position: str) -> None:
    model = build("causal", position=position)
    rows = [IDS[0, :4], IDS[1, :7]]
    padded = torch.zeros(2, 7, dtype=torch.long)
    for row, ids in zip(padded, rows, strict=True):
        row[-len(ids) :] = ids
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        found = model.generate(padded, attention_mask=(padded > 0).long(), max_new_tokens=6, **options)
        for row, ids in zip(found, rows, strict=True):
            assert torch.equal(row[-6:], model.generate(ids[None], max_new_tokens=6, **options)[0, -6:])


# Pipelines


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


TEXTS = ["gains and wins", "falls"]


def encode(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, return_tensors="pt")


@torch.no_grad()
def test_text_classification(tokenizer: Any) -> None:
    model = build("rows", vocab_size=len(tokenizer))
    answers = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(TEXTS, batch_size=2)
    for text, answer in zip(TEXTS, answers, strict=True):
        scores = model(**encode(tokenizer, text)).logits[0].softmax(-1)
        found = {one["label"]: one["score"] for one in answer}
        assert found == pytest.approx({f"LABEL_{i}": score for i, score in enumerate(scores.tolist())}, abs=1e-6)


@torch.no_grad()
def test_token_classification(tokenizer: Any) -> None:
    model = build("tokens", vocab_size=len(tokenizer))
    answer = pipeline("token-classification", model=model, tokenizer=tokenizer)(TEXTS[0])
    scores, labels = model(**encode(tokenizer, TEXTS[0])).logits[0, 1:-1].softmax(-1).max(-1)
    assert [one["entity"] for one in answer] == [f"LABEL_{label}" for label in labels]
    assert [one["score"] for one in answer] == pytest.approx(scores.tolist(), abs=1e-6)


@torch.no_grad()
def test_fill_mask(tokenizer: Any) -> None:
    model = build("masked", vocab_size=len(tokenizer))
    text = "gains [MASK] wins"
    answer = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=3)(text)
    encoded = encode(tokenizer, text)
    place = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
    scores, tokens = model(**encoded).logits[0, place].softmax(-1).topk(3)
    assert [one["token"] for one in answer] == tokens.tolist()
    assert [one["score"] for one in answer] == pytest.approx(scores.tolist(), abs=1e-6)


def test_text_generation(tokenizer: Any) -> None:
    model = build("causal", vocab_size=len(tokenizer))
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answers = pipe(TEXTS, batch_size=2, max_new_tokens=5, do_sample=False, return_tensors=True)
    for text, answer in zip(TEXTS, answers, strict=True):
        expected = continue_by_hand(model, encode(tokenizer, text)["input_ids"], 5)
        assert answer[0]["generated_token_ids"][-5:] == expected[0, -5:].tolist()


# Export


@pytest.mark.parametrize("name", ["rows", "causal"])
def test_exported_for_any_batch_and_length(name: str) -> None:
    model = build(name, num_hidden_layers=1)
    model.config.use_cache = False
    sizes = {0: Dim("batch", max=64), 1: Dim("length", min=2, max=40)}
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    program = export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes)).module()
    ids = torch.randint(3, VOCABULARY, (5, 17), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([17, 1, 9, 12, 17])
    for rows in (slice(None), slice(1, 2)):
        mask = (torch.arange(17) < lengths[rows, None]).long()
        found = program(input_ids=ids[rows], attention_mask=mask).logits
        torch.testing.assert_close(found, run(model, ids[rows], mask).logits, atol=1e-6, rtol=1e-6)
