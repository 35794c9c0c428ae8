"""Every method on models that write: two steps, the base untouched, saved and read again, merged, and writing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
)

from finetune.adapters.attach import (
    attach_adapter,
    can_merge,
    check_adapter,
    count_parameters,
    list_trained,
    load_adapter,
    merge_adapter,
    plan_parameters,
)
from finetune.adapters.budget import start_adapter
from finetune.adapters.methods import METHODS
from finetune.adapters.saving import save_adapter
from finetune.data.batches import Examples, collate
from finetune.errors import RecipeError
from finetune.models.classifier import get_padding
from finetune.models.generation import generate_texts
from finetune.models.tokenizer import train_tokenizer
from finetune.models.triad import TriadForCausalLM, TriadForSeq2SeqLM
from finetune.models.triad.conversion import convert_config
from finetune.recipe.schema import AdapterSection, GenerateSection
from finetune.tasks import CausalLM, Seq2Seq

TOKENS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=48, initializer_range=0.2, **TOKENS),
    "llama": LlamaConfig(
        vocab_size=40, num_key_value_heads=1, max_position_embeddings=48, initializer_range=0.2, **SIZE, **TOKENS
    ),
    "marian": MarianConfig(
        vocab_size=40,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=48,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        scale_embedding=True,
        init_std=0.2,
        **TOKENS,
    ),
}
NATIVE = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "marian": MarianMTModel}
MODELS = ["gpt2, triad", "gpt2, native", "llama, native", "marian, triad", "marian, native"]
# What a class has nothing for; each is refused in words.
REFUSED = {
    "gpt2, native": ("olora", "loha", "lokr", "oft"),
    "marian, native": ("prompt", "p_tuning"),
}
# Llama has no biases, and no language model a head of its own.
WITHOUT = {name: ("head", "bitfit") if "llama" in name else ("head",) for name in MODELS}
TEXTS = ["abca bd", "bb", "c acb dd a"]


def build(name: str) -> Any:
    family, architecture = name.split(", ")
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    if architecture == "native":
        return NATIVE[family](config)
    return (TriadForSeq2SeqLM if family == "marian" else TriadForCausalLM)(convert_config(config))


def get_task(name: str) -> Any:
    return Seq2Seq() if "marian" in name else CausalLM()


def build_examples() -> Examples:
    generator = np.random.default_rng(0)
    rows = [generator.integers(5, 40, size=size).tolist() for size in (3, 9, 6, 5, 7, 4)]
    return Examples.build(rows, targets=rows)


EXAMPLES = build_examples()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["abcdefghijklmnopqrstuvwxyz .,:;-"], "characters", 40, 48, appends_end=False)


@pytest.fixture
def pairs(case: str, methods: dict[str, Any]) -> list[tuple[str, AdapterSection]]:
    """The models that the case goes with, and the recipe's `adapter`."""
    section = AdapterSection(**methods[case])
    return [(name, section) for name in MODELS if case not in (*WITHOUT.get(name, ()), *REFUSED.get(name, ()))]


def attach(name: str, section: AdapterSection) -> Any:
    model, task = build(name), get_task(name)
    check_adapter(model, section, max_length=40)
    plan = plan_parameters(model, section, [], task.peft_type)
    model = attach_adapter(model, section, [], "acme/tiny", task.peft_type, total_steps=4)
    assert count_parameters(model) == plan
    pad = 0 if get_padding(model, _Pads()) == 0 else None
    start_adapter(model, section, EXAMPLES, pad, lambda model, batch: task.compute_losses(model, batch, 0.0))
    return model


class _Pads:
    pad_token_id = 0


def compute(name: str, model: Any, pad: int | None) -> np.ndarray:
    return get_task(name).compute_outputs(model.eval(), EXAMPLES, pad)


def test_trained_saved_read_and_merged(pairs: Any, stir: Callable[..., None], tmp_path: Path) -> None:
    for name, section in pairs:
        model, task = attach(name, section), get_task(name)
        frozen = {key: weight for key, weight in model.named_parameters() if not weight.requires_grad}
        bits = {key: weight.detach().clone() for key, weight in frozen.items()}
        pad = get_padding(model, _Pads())
        assert pad == 0 or (name == "gpt2, triad" and METHODS[section.method].packs)
        optimizer = torch.optim.AdamW(list_trained(model).values(), lr=0.01)
        for _ in range(2):
            losses = task.compute_losses(model.train(), collate(EXAMPLES, np.arange(6), pad), 0.0)
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(weight, bits[key]) for key, weight in frozen.items()), name
        stir(model, 0.02)
        outputs = compute(name, model, pad)
        folder = tmp_path / name
        save_adapter(model, folder)
        loaded = load_adapter(build(name), folder)
        np.testing.assert_allclose(compute(name, loaded, pad), outputs, atol=2e-4, err_msg=name)
        if can_merge(loaded):
            np.testing.assert_allclose(compute(name, merge_adapter(loaded), pad), outputs, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("writer", ["lora", "ia3", "prefix", "prompt", "p_tuning"])
def test_each_text_is_written_as_it_would_be_alone(
    methods: dict[str, Any], stir: Callable[..., None], tokenizer: Any, writer: str
) -> None:
    """With virtual tokens too: padding must not come between them and the text."""
    for name in MODELS:
        if writer in REFUSED.get(name, ()):
            continue
        model = attach(name, AdapterSection(**methods[writer])).eval()
        stir(model)
        kind = "seq2seq" if "marian" in name else "causal_lm"
        options: dict[str, Any] = {"kind": kind, "max_length": 40}
        greedy, beams = GenerateSection(max_new_tokens=6), GenerateSection(max_new_tokens=6, beams=2)
        together = generate_texts(model, tokenizer, TEXTS, greedy, **options)
        assert together == [generate_texts(model, tokenizer, [text], greedy, **options)[0] for text in TEXTS], name
        assert len(generate_texts(model, tokenizer, TEXTS, beams, **options)) == 3
        if kind == "causal_lm":
            assert together[0] == write_greedily(model, tokenizer, TEXTS[0], 6), name


@torch.no_grad()
def write_greedily(model: Any, tokenizer: Any, text: str, count: int) -> str:
    """Without a cache: the whole text through the model for each token."""
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = list(prompt)
    for _ in range(count):
        inputs = torch.tensor([ids])
        following = int(model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0, -1].argmax())
        if following == tokenizer.eos_token_id:
            break
        ids.append(following)
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    return decode(ids)[len(decode(prompt)) :]


CONV1D = (
    "adapter.targets: must be linear layers of the base, got a base without one (GPT-2's own class has another kind). "
    "Set model.architecture: triad, or adapter.method: full."
)
EMBEDDINGS = (
    "adapter.method: {} needs a model that reads embeddings, got marian's own class, which scales only those that it "
    "looks up itself. Set model.architecture: triad."
)


@pytest.mark.parametrize(("name", "refused"), [(name, case) for name, cases in REFUSED.items() for case in cases])
def test_words_for_what_a_class_cannot_do(methods: dict[str, Any], name: str, refused: str) -> None:
    with pytest.raises(RecipeError) as caught:
        attach(name, AdapterSection(**methods[refused]))
    assert str(caught.value) == (EMBEDDINGS.format(refused) if "marian" in name else CONV1D)
