"""Tokenizers that are learned: merges worked by hand, and texts that come back as they were."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune.errors import RecipeError
from finetune.models.tokenizer import LEAST_BPE, SPECIAL_TOKENS, train_tokenizer
from finetune.models.triad import TriadConfig

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\nThe dog sleeps.",
    "Der schnelle braune Fuchs springt über den faulen Hund, the dog sleeps.",
    "床前明月光\n疑是地上霜。",
]
KINDS = ("bpe", "characters")
both = pytest.mark.parametrize("kind", KINDS)
anything = st.text(st.characters(exclude_categories=["Cs", "Cn"]))  # no halves of characters, none of the future


def train(kind: str, texts: list[str] = TEXTS, vocab_size: int = 300, **options: bool):
    return train_tokenizer(texts, kind, vocab_size, 16, **{"appends_end": False, **options})


TRAINED = {kind: train(kind) for kind in KINDS}


def list_merges(tokenizer) -> list[str]:
    return ["".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


@both
def test_special_tokens_come_first(kind):
    tokenizer = TRAINED[kind]
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    assert [getattr(tokenizer, f"{role}_id") for role in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_merges_are_those_of_the_commonest_pairs():
    """Counts of ug 20, un 16, then h + ug 15: worked by hand, as in Hugging Face's course (chapter 6)."""
    words = ["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["bun"] * 4 + ["hugs"] * 5
    tokenizer = train("bpe", words, LEAST_BPE + 3)
    assert list_merges(tokenizer) == ["ug", "un", "hug"]
    assert len(tokenizer) == LEAST_BPE + 3
    assert tokenizer.tokenize("hugs bun") == ["hug", "s", "Ġ", "b", "un"]


def test_a_pair_that_occurs_once_is_not_merged():
    assert len(train("bpe", ["abc"])) == LEAST_BPE
    assert list_merges(train("bpe", ["abc", "ab"])) == ["ab"]


@both
def test_the_order_of_the_texts_does_not_matter(kind):
    again = train(kind, [*TEXTS[::-1]])
    assert again.backend_tokenizer.to_str() == TRAINED[kind].backend_tokenizer.to_str()


@given(anything)
def test_byte_pairs_give_back_any_text(text):
    tokenizer = TRAINED["bpe"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text)


@given(st.lists(st.sampled_from(sorted(set("".join(TEXTS))))).map("".join))
def test_characters_are_tokens_and_come_back(text):
    tokenizer = TRAINED["characters"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == list(text)
    assert tokenizer.decode(ids) == text


@given(anything)
def test_each_strange_character_is_unknown(text):
    known = set("".join(TEXTS))
    composed = unicodedata.normalize("NFC", text)
    tokens = TRAINED["characters"].convert_ids_to_tokens(TRAINED["characters"](text)["input_ids"])
    assert tokens == [character if character in known else "<unk>" for character in composed]


@both
def test_a_letter_has_one_spelling(kind):
    assert TRAINED[kind]("u\u0308ber")["input_ids"] == TRAINED[kind]("über")["input_ids"]
    assert "ü" in train("characters", ["u\u0308"]).get_vocab()


def test_the_commonest_characters_are_kept():
    tokenizer = train("characters", ["dcc", "bbac"], vocab_size=8)  # c 3, b 2; a and d once
    assert tokenizer.convert_ids_to_tokens(range(5, 8)) == ["a", "b", "c"]
    assert tokenizer.tokenize("abcd") == ["a", "b", "c", "<unk>"]
    assert len(train("characters", ["dcc", "bbac"])) == 9


@both
def test_the_end_is_appended_and_survives_a_cut(kind):
    tokenizer = train(kind, appends_end=True)
    short, long = tokenizer(["dog", "dog " * 20], truncation=True)["input_ids"]
    assert short[:-1] == TRAINED[kind]("dog")["input_ids"]
    assert len(long) == 16
    assert short[-1] == long[-1] == 3
    assert tokenizer("dog", "fox")["input_ids"] == short + tokenizer("fox")["input_ids"]
    assert tokenizer("dog", add_special_tokens=False)["input_ids"] == short[:-1]
    assert tokenizer.decode(short, skip_special_tokens=True) == "dog"


@both
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS.values(), "dog", " "])).map("".join))
def test_no_text_can_write_a_special_token(kind, text):
    """Struck-through HTML would end a translation in its middle."""
    ids = TRAINED[kind](text)["input_ids"]
    assert not {0, 2, 3, 4} & set(ids)
    if kind == "bpe":
        assert TRAINED[kind].decode(ids, skip_special_tokens=True) == text


@both
def test_unless_it_is_asked_for(kind):
    tokenizer = train(kind, reads_special=True)
    ids = tokenizer("the <mask> sleeps")["input_ids"]
    assert ids.count(4) == 1
    assert tokenizer.decode(ids) == "the <mask> sleeps"


@both
@pytest.mark.parametrize("options", [{"appends_end": True}, {"appends_end": False, "reads_special": True}])
@pytest.mark.parametrize("beside", ["alone", "beside a model"])
def test_a_saved_one_is_the_same(kind, options, beside, tmp_path):
    tokenizer = train(kind, **options)
    tokenizer.save_pretrained(tmp_path)
    if beside == "beside a model":
        TriadConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["The dog <mask> sleeps. " * 3, "e\u0301 霜\n\n <s>"]
    expected = tokenizer(texts, truncation=True, padding=True)
    found = loaded(texts, truncation=True, padding=True)
    assert dict(found) == dict(expected)
    assert sorted(found) == ["attention_mask", "input_ids"]
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert (len(loaded), loaded.model_max_length) == (len(tokenizer), 16)
    for ids in expected["input_ids"]:
        assert loaded.decode(ids) == tokenizer.decode(ids)


def test_words_for_a_vocabulary_smaller_than_the_bytes():
    with pytest.raises(RecipeError) as caught:
        train("bpe", vocab_size=260)
    assert str(caught.value) == (
        "model.scratch.vocab_size: must be at least 261 for byte pairs (256 bytes and 5 special tokens), got 260. "
        "Raise it, or set model.scratch.tokenizer: characters."
    )
    assert len(train("bpe", vocab_size=261)) == 261
