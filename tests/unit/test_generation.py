"""Texts out of a language model: what shares a batch, windows, sampling, and pieces as they come."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from finetune.errors import UsageError
from finetune.models import generation
from finetune.models.generation import generate_texts, stream_text
from finetune.models.tokenizer import train_tokenizer
from finetune.models.triad import TriadConfig, TriadForCausalLM, TriadForSeq2SeqLM
from finetune.recipe.schema import GenerateSection

MAX_LENGTH = 16
END = 3
ALPHABET = "".join(chr(code) for code in range(33, 127)) + " äöü价格上涨"
TEXTS = ["to be", "or", "not to be", "x", "that is the", "question:", "whether", "'tis nobler in"]
LONG_TEXTS = ["ab", "fills it up half", "0123456789abcdef", "a text that is longer than all positions", "x", ""]
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END}


def build_tokenizer(kind: str = "causal_lm", unit: str = "characters") -> Any:
    """A token for each character, or for each byte of one."""
    size = 261 if unit == "bpe" else 300
    return train_tokenizer([ALPHABET], unit, size, MAX_LENGTH, appends_end=kind == "seq2seq")


def build(name: str, vocabulary: int, *, end: float = 0.0, **choices: Any) -> Any:
    """Random weights, with which each token depends on those before it; `end` makes Triad's end token likelier."""
    torch.manual_seed(1)
    if name.startswith("Triad"):
        model_class = TriadForCausalLM if name == "Triad decoder" else TriadForSeq2SeqLM
        model: Any = model_class(
            TriadConfig(
                shape=model_class.shape,
                vocab_size=vocabulary,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                max_position_embeddings=MAX_LENGTH,
                pooling="last",
                lm_head_bias=True,
                tie_word_embeddings=False,
                decoder_start_token_id=2,
                **TOKENS,
                **{"position": "learned", "norm_position": "pre"} | choices,
            )
        )
    elif name == "GPT-2":
        sizes = {"n_positions": MAX_LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **TOKENS))
    else:
        sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": MAX_LENGTH}
        sizes |= {f"{stack}_{part}": 2 for stack in ("encoder", "decoder") for part in ("layers", "attention_heads")}
        config = BartConfig(vocab_size=vocabulary, **sizes, **TOKENS, decoder_start_token_id=2)
        config.forced_eos_token_id = None
        model = BartForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if name.startswith("Triad"):
            model.lm_head.bias[END] += end
    return model.eval()


def write(model: Any, tokenizer: Any, texts: Sequence[str], kind: str = "causal_lm", **options: Any) -> list[str]:
    """`generate_texts` with the section's keys among its own."""
    known = {name: options.pop(name) for name in list(options) if name in GenerateSection.model_fields}
    section = GenerateSection(**{"max_new_tokens": 8} | known)
    return generate_texts(model, tokenizer, texts, section, kind=kind, **{"max_length": MAX_LENGTH} | options)


def stream(model: Any, tokenizer: Any, text: str, kind: str = "causal_lm", **known: Any) -> list[str]:
    pieces: list[str] = []
    section = GenerateSection(**{"max_new_tokens": 8} | known)
    stream_text(model, tokenizer, text, section, pieces.append, kind=kind, max_length=MAX_LENGTH)
    return pieces


def write_one(model: Any, tokenizer: Any, text: str, kind: str, **options: Any) -> str:
    """Hugging Face's `generate` on one text, which needs no padding."""
    ids = tokenizer(text, truncation=kind == "seq2seq", max_length=MAX_LENGTH, return_tensors="pt")["input_ids"]
    found = model.generate(ids, **{"max_new_tokens": 8, "do_sample": False} | options)[0]
    return str(tokenizer.decode(found[1 if kind == "seq2seq" else ids.shape[1] :], skip_special_tokens=True))


# A text and its batch


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize(
    ("name", "kind", "choices"),
    [
        ("Triad decoder", "causal_lm", {"position": "learned", "end": 2.0}),
        ("Triad decoder", "causal_lm", {"position": "rotary"}),
        ("Triad decoder", "causal_lm", {"position": "sinusoidal"}),
        ("GPT-2", "causal_lm", {}),
        ("Triad both", "seq2seq", {"end": 5.0}),
        ("BART", "seq2seq", {}),
    ],
)
def test_a_text_is_what_it_would_be_alone(monkeypatch, name, kind, choices, beams):
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 60 * beams)
    tokenizer = build_tokenizer(kind)
    model = build(name, len(tokenizer), **choices)
    texts = [text[:9] for text in TEXTS]  # with 8 more they fill the positions
    seen: list[int] = []
    found = write(model, tokenizer, texts, kind, beams=beams, advance=seen.append)
    assert found == [write_one(model, tokenizer, text, kind, num_beams=beams) for text in texts]
    assert len(set(found)) > 4, "else the order could not be told"
    assert sum(seen) == len(texts)
    assert 2 < len(seen) < len(texts), "several batches of several texts"


@pytest.mark.parametrize(("name", "kind", "end"), [("Triad decoder", "causal_lm", 2.0), ("Triad both", "seq2seq", 5.0)])
def test_writing_ends_at_the_end_token(name, kind, end):
    tokenizer = build_tokenizer(kind)
    model = build(name, len(tokenizer), end=end)
    lengths = [len(text) for text in write(model, tokenizer, TEXTS, kind, max_new_tokens=7)]
    assert min(lengths) < max(lengths) == 7
    never = build(name, len(tokenizer), end=-1000.0)
    assert {len(text) for text in write(never, tokenizer, TEXTS, kind, max_new_tokens=7)} == {7}


def test_length_penalty():
    tokenizer = build_tokenizer("seq2seq")
    model = build("Triad both", len(tokenizer), end=5.0)
    short, long = (
        write(model, tokenizer, TEXTS, "seq2seq", beams=4, length_penalty=penalty) for penalty in (-2.0, 4.0)
    )
    assert sum(map(len, short)) < sum(map(len, long))
    assert long == [write_one(model, tokenizer, text, "seq2seq", num_beams=4, length_penalty=4.0) for text in TEXTS]


def test_an_encoder_reads_the_beginning_and_a_decoder_the_end():
    both, alone = build_tokenizer("seq2seq"), build_tokenizer()
    model = build("Triad both", len(both))
    long = "a text that is longer than all positions"
    assert write(model, both, [long], "seq2seq") == write(model, both, [long[: MAX_LENGTH - 1]], "seq2seq")
    model = build("Triad decoder", len(alone))
    assert write(model, alone, [long]) == write(model, alone, [long[-MAX_LENGTH:]])


def test_an_answer_ends_where_the_positions_do():
    tokenizer = build_tokenizer("seq2seq")
    model = build("Triad both", len(tokenizer), end=-1000.0)
    found = write(model, tokenizer, TEXTS, "seq2seq", max_new_tokens=50)
    assert {len(text) for text in found} == {MAX_LENGTH}
    assert found == [write_one(model, tokenizer, text, "seq2seq", max_new_tokens=MAX_LENGTH) for text in TEXTS]


def test_a_text_begins_behind_the_end_of_another():
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer))
    ids = model.generate(torch.tensor([[END]]), max_new_tokens=8, do_sample=False)[0, 1:]
    assert write(model, tokenizer, [""]) == [tokenizer.decode(ids, skip_special_tokens=True)]
    answers = build_tokenizer("seq2seq")
    assert write(build("Triad both", len(answers)), answers, [""], "seq2seq")[0]


def test_nothing_in_nothing_out():
    tokenizer = build_tokenizer()
    assert write(build("Triad decoder", len(tokenizer)), tokenizer, []) == []


def test_one_text_is_not_a_list_of_texts():
    tokenizer = build_tokenizer()
    with pytest.raises(UsageError, match=r"^generate: texts must be a list of texts, got one text\. Write \[text\]\.$"):
        write(build("Triad decoder", len(tokenizer)), tokenizer, "to be")


# Longer than the positions


@torch.no_grad()
def continue_by_hand(model: Any, tokenizer: Any, text: str, count: int) -> str:
    """The likeliest token again and again, from a window computed anew each time."""
    window = tokenizer(text)["input_ids"][-MAX_LENGTH:] or [END]
    written: list[int] = []
    for _ in range(count):
        if len(window) > MAX_LENGTH:
            window = window[-MAX_LENGTH // 2 :]
        written.append(int(model(torch.tensor([window])).logits[0, -1].argmax()))
        window = [*window, written[-1]]
        if written[-1] == END:
            break
    return str(tokenizer.decode(written, skip_special_tokens=True))


@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal"])
def test_a_long_text_goes_on_from_the_last_half_of_the_window(position):
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer), end=-1000.0, position=position)
    found = write(model, tokenizer, LONG_TEXTS, max_new_tokens=27)
    assert found == [continue_by_hand(model, tokenizer, text, 27) for text in LONG_TEXTS]
    assert {len(text) for text in found} == {27}
    longer = write(model, tokenizer, LONG_TEXTS, max_new_tokens=28)
    assert [text[:27] for text in longer] == found


def test_long_texts_end_each_at_its_end_token():
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer), end=2.5)
    seen: list[int] = []
    found = write(model, tokenizer, LONG_TEXTS, max_new_tokens=40, advance=seen.append)
    assert found == [continue_by_hand(model, tokenizer, text, 40) for text in LONG_TEXTS]
    assert min(map(len, found)) < max(map(len, found))
    assert sum(seen) == len(LONG_TEXTS)


def test_beams_over_several_windows_do_not_depend_on_the_batch():
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer), end=-1000.0)
    together = write(model, tokenizer, LONG_TEXTS[1:4], beams=3, max_new_tokens=22)
    assert together == [write(model, tokenizer, [text], beams=3, max_new_tokens=22)[0] for text in LONG_TEXTS[1:4]]
    assert together != write(model, tokenizer, LONG_TEXTS[1:4], max_new_tokens=22), "beams find something else"


# What the section does not say, the model's own file does not either


def test_a_bases_own_settings_change_nothing_and_give_no_warning(caplog, recwarn):
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer))
    expected = write(model, tokenizer, TEXTS)
    assert any("S" in text for text in expected)
    model.generation_config.update(
        do_sample=True,
        temperature=5.0,
        top_p=0.5,
        max_length=7,
        max_new_tokens=2,
        num_beams=3,
        length_penalty=2.0,
        eos_token_id=tokenizer.convert_tokens_to_ids("S"),
    )
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert write(model, tokenizer, TEXTS) == expected
        write(model, tokenizer, ["a prompt " * 20], temperature=0.5)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []
    assert [str(warning.message) for warning in recwarn] == []


def test_a_tokenizer_without_padding():
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer))
    expected = write(model, tokenizer, TEXTS)
    tokenizer.pad_token = None
    assert write(model, tokenizer, TEXTS) == expected


def test_a_model_in_training_writes_without_dropout_and_trains_on():
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer), dropout=0.5)
    expected = write(model, tokenizer, TEXTS)
    model.train()
    assert write(model, tokenizer, TEXTS) == expected
    assert all(module.training for module in model.modules())


# Sampling


def test_sampling_follows_from_the_seed_and_leaves_torchs_generator_alone():
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer))
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first, again, other = (write(model, tokenizer, TEXTS, temperature=3.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_sampled_tokens_come_as_often_as_they_should():
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer))
    model.generation_config.update(top_k=2, top_p=0.1)  # which count for nothing
    logits, tokens = model(tokenizer("to be", return_tensors="pt")["input_ids"]).logits[0, -1].topk(4)
    scores = (logits / 4).softmax(-1)
    expected: Counter[str] = Counter()
    for token, score in zip(tokens, scores.tolist(), strict=True):
        expected[tokenizer.decode(token, skip_special_tokens=True)] += score
    draws = 4000
    found = Counter(write(model, tokenizer, ["to be"] * draws, max_new_tokens=1, temperature=4.0, top_k=4))
    assert found.keys() == expected.keys()
    for text, score in expected.items():
        assert found[text] / draws == pytest.approx(score, abs=0.03)  # four standard deviations at most


def test_without_top_k_every_token_may_come():
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer))
    found = write(model, tokenizer, ["to be"] * 2000, max_new_tokens=1, temperature=1000.0)
    assert len(set(found)) > 90


# Pieces


@pytest.mark.parametrize("text", ["to be", "", "a text that is longer than all positions"])
@pytest.mark.parametrize(("name", "kind"), [("Triad decoder", "causal_lm"), ("Triad both", "seq2seq")])
@pytest.mark.parametrize("unit", ["characters", "bpe"])
def test_pieces_make_the_text(unit, name, kind, text):
    tokenizer = build_tokenizer(kind, unit)
    model = build(name, len(tokenizer), end=-1000.0)
    pieces = stream(model, tokenizer, text, kind, max_new_tokens=40)
    assert ["".join(pieces)] == write(model, tokenizer, [text], kind, max_new_tokens=40)
    assert len(pieces) > 1
    assert all(pieces)


def test_sampled_pieces_make_the_sampled_text():
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer))
    assert ["".join(stream(model, tokenizer, "to be", temperature=2.0))] == write(
        model, tokenizer, ["to be"], temperature=2.0
    )


def test_beams_come_as_one_piece():
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer))
    assert stream(model, tokenizer, "to be", beams=3) == write(model, tokenizer, ["to be"], beams=3)


class Speaker(torch.nn.Module):
    """Says given tokens and calls the streamer as `generate` does."""

    device = torch.device("cpu")

    def __init__(self, script: Sequence[int], answers: bool = False) -> None:
        super().__init__()
        self.script, self.answers = list(script), answers

    def generate(self, input_ids: torch.Tensor, max_length: int, streamer: Any, **_: Any) -> torch.Tensor:
        first = torch.tensor([[2]]) if self.answers else input_ids
        count = max_length - first.shape[1]
        said, self.script = self.script[:count], self.script[count:]
        if streamer is not None:
            streamer.put(input_ids)
            for token in said:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([first, torch.tensor([said])], dim=1)


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_a_character_comes_when_all_of_its_bytes_are_there(kind):
    tokenizer = build_tokenizer(unit="bpe")
    text = "价格上涨 7 % ½ très bon 🎉!"
    script = tokenizer(text)["input_ids"]
    assert len(script) > len(text) + 10
    pieces = stream(Speaker([*script, END], kind == "seq2seq"), tokenizer, "a", kind, max_new_tokens=100)
    limit = len(script) if kind == "causal_lm" else MAX_LENGTH
    assert "".join(pieces).removesuffix("\ufffd") == tokenizer.decode(script[:limit]).rstrip("\ufffd")
    assert pieces[:4] == list(text[:4])


def test_characters_that_never_become_whole_come_at_the_end():
    tokenizer = build_tokenizer(unit="bpe")
    script = tokenizer("ab涨")["input_ids"][:-1]
    assert stream(Speaker([*script, END]), tokenizer, "x") == ["a", "b", "\ufffd"]


def build_word_tokenizer() -> Any:
    """As SentencePiece writes words: with the space before them, which is dropped at the start of a text."""
    words = ["<pad>", "<unk>", "<s>", "</s>", "▁Hello", "▁wide", "▁world", "!"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(("kind", "expected"), [("causal_lm", " wide world!"), ("seq2seq", "wide world!")])
def test_spaces_between_words_are_kept(kind, expected):
    tokenizer, script = build_word_tokenizer(), [5, 6, 7, END]
    assert write(Speaker(script, kind == "seq2seq"), tokenizer, ["Hello"], kind) == [expected]
    pieces = stream(Speaker(script, kind == "seq2seq"), tokenizer, "Hello", kind)
    assert pieces == [expected.removesuffix(" world!"), " world", "!"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_error_while_a_piece_is_taken_ends_the_writing(error):
    tokenizer = build_tokenizer()
    model = build("Triad decoder", len(tokenizer), end=-1000.0).train()
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise error

    with pytest.raises(error):
        stream_text(model, tokenizer, "to be", GenerateSection(), take, kind="causal_lm", max_length=MAX_LENGTH)
    assert len(pieces) == 3
    assert model.training
