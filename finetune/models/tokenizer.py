"""Tokenizers that a recipe learns from its own train split: byte pairs, or single characters."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from finetune.errors import RecipeError

# Role -> token; their ids are 0 to 4, in this order.
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
}
LEAST_BPE = len(SPECIAL_TOKENS) + 256  # and a token for each byte


def train_tokenizer(
    texts: Iterable[str],
    kind: Literal["bpe", "characters"],
    vocab_size: int,
    max_length: int,
    *,
    appends_end: bool,
    reads_special: bool = False,
) -> Any:
    """Learn a vocabulary; the same texts give the same one, whatever their order.

    Args:
        texts: of the train split only.
        kind: bpe: merges of bytes within words (arXiv:1508.07909), split as GPT-2 does; no text is unknown to it.
            characters: a token for each of the commonest characters; any other is <unk>.
        vocab_size: most tokens, the special ones included; fewer where the texts have no more.
        max_length: tokens after which `truncation=True` cuts.
        appends_end: each encoded text ends in </s>.
        reads_special: "<mask>" in a text is that token, as people write it to have it filled in. Otherwise it is six
            characters like any others: HTML has <s> too.

    Returns:
        A `PreTrainedTokenizerFast`. Decoding what it encoded gives the text in Unicode's composed form (NFC), in which
        one letter is always written in one way.

    Raises:
        RecipeError: too small a vocabulary for single bytes.
    """
    from transformers import PreTrainedTokenizerFast

    backend = _train_bpe(texts, vocab_size) if kind == "bpe" else _train_characters(texts, vocab_size)
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(list(SPECIAL_TOKENS.values()))
    if appends_end:
        end = SPECIAL_TOKENS["eos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {end}",
            pair=f"$A {end} $B:1 {end}:1",
            special_tokens=[(end, backend.token_to_id(end))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        split_special_tokens=not reads_special,
        **SPECIAL_TOKENS,
    )


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    if vocab_size < LEAST_BPE:
        raise RecipeError(
            f"model.scratch.vocab_size: must be at least {LEAST_BPE} for byte pairs (256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens), got {vocab_size}. Raise it, or set "
            "model.scratch.tokenizer: characters."
        )
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once would make a word that nothing else has into a token
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_characters(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte pairs without a merge: each character stays a token."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(unicodedata.normalize("NFC", text))
    commonest = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(commonest[: vocab_size - len(SPECIAL_TOKENS)])
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS.values(), *kept])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.decoder = decoders.Fuse()
    return backend
