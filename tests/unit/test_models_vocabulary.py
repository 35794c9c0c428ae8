"""Tokenizers cut to what some texts use: the same pieces for those, and pieces for all others too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from finetune.errors import ModelError
from finetune.models.vocabulary import trim_tokenizer

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
KEPT = ["Shares slump after a profit warning.", "Profits beat the forecast by 12 percent", "the merger"]
OTHERS = ["Shareholders forecast slumping warnings", "Zebra crossings after hours!", "beatable profiteers"]


def learn(kind: str) -> Any:
    """A tokenizer of some 300 pieces, with what stands around a text written in a way of its own."""
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL.values())
    options: dict[str, Any] = {"special_tokens": special, "vocab_size": 320, "show_progress": False}
    if kind == "BPE":
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "Unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
        trainer = trainers.WordPieceTrainer(**options)
    texts = [f"{text} {other}" for text in KEPT for other in OTHERS]
    backend.train_from_iterator(
        [*texts, "the slumping shareholders", "after warning hours", "profitable beat"], trainer
    )
    ends = [(piece, backend.token_to_id(piece)) for piece in ("</s>", "<s>")]
    backend.post_processor = {
        "BPE": processors.Sequence([processors.ByteLevel(), processors.RobertaProcessing(*ends)]),
        "Unigram": processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends),
        "WordPiece": processors.BertProcessing(*ends),
    }[kind]
    backend.add_tokens(["§"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **SPECIAL)
    backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token="<pad>")
    return tokenizer


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_the_same_pieces_for_kept_tokens_and_pieces_for_all_others(kind, tmp_path: Path):
    tokenizer = learn(kind)
    used = {number for text in KEPT for number in tokenizer(text)["input_ids"]}
    trimmed, kept = trim_tokenizer(tokenizer, used)
    assert len(trimmed) == len(kept) < len(tokenizer) - 4
    assert set(used) <= set(kept.tolist())
    trimmed.save_pretrained(tmp_path)
    reloaded = type(trimmed).from_pretrained(tmp_path)
    for text in [*KEPT, f"{KEPT[0]} {KEPT[1]}", "§"]:
        before, after = tokenizer(text)["input_ids"], trimmed(text)["input_ids"]
        assert kept[after].tolist() == before
        assert trimmed.convert_ids_to_tokens(after) == tokenizer.convert_ids_to_tokens(before)
        assert reloaded(text)["input_ids"] == after
        assert trimmed.decode(after, skip_special_tokens=True) == tokenizer.decode(before, skip_special_tokens=True)
    for text in OTHERS:
        pieces = trimmed(text)["input_ids"]
        assert len(pieces) >= len(tokenizer(text)["input_ids"])
        assert tokenizer.unk_token_id in tokenizer(text)["input_ids"] or trimmed.unk_token_id not in pieces
    assert {role: getattr(trimmed, role) for role in SPECIAL} == SPECIAL
    assert tokenizer.convert_ids_to_tokens(int(kept[trimmed.pad_token_id])) == "<pad>"


def test_single_characters_stay_though_nobody_used_them():
    tokenizer = learn("BPE")
    trimmed, _ = trim_tokenizer(tokenizer, [])
    assert trimmed.decode(trimmed("Straße 漢 \N{PILE OF POO}")["input_ids"][1:-1]) == "Straße 漢 \N{PILE OF POO}"
    assert set(np.array([len(piece) for piece in trimmed.get_vocab() if piece not in SPECIAL.values()])) == {1}


def test_bert_as_people_have_it(tiny_base: Path):
    """Its class builds a tokenizer of its own from the pieces; numbers stand in its template too."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    text = "Profit falls, shares raises GAINS 7"
    trimmed, kept = trim_tokenizer(tokenizer, tokenizer(text)["input_ids"])
    assert type(trimmed) is type(tokenizer)
    assert trimmed.model_max_length == tokenizer.model_max_length
    assert kept[trimmed(text, "gains")["input_ids"]].tolist() == tokenizer(text, "gains")["input_ids"]
    assert trimmed(text, "gains")["token_type_ids"] == tokenizer(text, "gains")["token_type_ids"]


def test_the_first_of_the_vocabulary_fill_up_what_is_wanted_at_least():
    tokenizer = learn("BPE")
    used = [number for piece, number in tokenizer.get_vocab().items() if len(piece) > 6][:1]
    few, some = (trim_tokenizer(tokenizer, used, least) for least in (0, 290))
    assert len(few.kept) < 290 <= len(some.kept) < 300  # a piece brings those that it is merged from
    assert set(few.kept) < set(some.kept)
    left_out = sorted(set(range(len(tokenizer))) - set(some.kept.tolist()))
    filled = sorted(set(some.kept.tolist()) - set(few.kept.tolist()))
    assert max(filled) < min(left_out)


def test_another_kind_of_vocabulary_is_refused():
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(
        ModelError, match=r"vocabulary: must be of WordPiece, BPE, Unigram in a fast .*, got WordLevel\."
    ):
        trim_tokenizer(tokenizer, [1])
