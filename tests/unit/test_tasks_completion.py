"""Completion: what of a row is read and what is learned, and that its loss is the one Hugging Face computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches import IGNORED, Examples, collate
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.models.base import SCRATCH
from finetune.models.generation import generate_texts
from finetune.recipe.prompt import Piece, list_columns, parse_prompt
from finetune.recipe.schema import EvaluateSection, GenerateSection, ModelSection, ScratchSection, TaskSection
from finetune.tasks import Completion
from finetune.tasks.completion import share_room
from finetune.tasks.task import TaskData

SECTION = ModelSection(
    base="scratch",
    max_length=48,
    scratch=ScratchSection(tokenizer="characters", vocab_size=96, hidden_size=32, num_hidden_layers=2),
)
PROMPT = "</s>Q {text} P {passage}>"
ROWS = [
    ("is it open", "open until five", "yes, until five"),
    ("how much", "it costs 3", "3"),
    ("a dog", "no dogs</s>", "none"),
]


def build_rows(rows: list[tuple[str, str, str]] = ROWS) -> list[Row]:
    return [
        Row(f"r:{number}", None, number, {"text": text, "passage": passage, "target": target})
        for number, (text, passage, target) in enumerate(rows, start=1)
    ]


@pytest.fixture(scope="module")
def built() -> SimpleNamespace:
    """A task with its tokenizer and a model of random weights."""
    task = Completion(PROMPT)
    rows = task.prepare_rows(build_rows())
    tokenizer = task.build_tokenizer(SCRATCH, rows, SECTION)
    model: Any = task.build_model(SCRATCH, SECTION, tokenizer, 0).eval()
    return SimpleNamespace(task=task, rows=rows, tokenizer=tokenizer, model=model)


def take_row(examples: Examples, number: int) -> tuple[list[int], list[int]]:
    assert examples.target_ids is not None
    place = slice(examples.starts[number], examples.starts[number + 1])
    return examples.input_ids[place].tolist(), examples.target_ids[place].tolist()


# What is read, and what is learned


def test_only_the_target_and_its_end_are_learned(built: SimpleNamespace) -> None:
    """By hand: each character is a token, and each position says the next."""
    read, said = take_row(built.task.build_examples(built.rows, built.tokenizer, 48), 1)
    letters = built.tokenizer.convert_ids_to_tokens(read)
    assert letters == ["</s>", *"Q how much P it costs 3>", "3"]
    assert said[:-2] == [IGNORED] * (len(letters) - 2)
    assert built.tokenizer.convert_ids_to_tokens(said[-2:]) == ["3", "</s>"]


def test_special_tokens_count_in_the_recipe_and_not_in_a_row(built: SimpleNamespace) -> None:
    read, _ = take_row(built.task.build_examples(built.rows, built.tokenizer, 48), 2)
    ends = [place for place, token in enumerate(read) if token == built.tokenizer.eos_token_id]
    assert ends == [0]
    assert "<" in built.tokenizer.convert_ids_to_tokens(read)


@pytest.mark.parametrize(
    ("max_length", "whole"),
    [
        (60, "Q is it open P open until five>yes, until five|"),
        (43, "Q is it open P open until >yes, until five|"),
        # Each keeps half, and the end was not reached. Of 10 tokens 7 are the prompt's own.
        (20, "Q i P op>yes, until "),
    ],
)
def test_what_does_not_fit_is_cut(built: SimpleNamespace, max_length: int, whole: str) -> None:
    """The longest column gives way by what is lacking."""
    read, said = take_row(built.task.build_examples(built.rows[:1], built.tokenizer, max_length), 0)
    letters = built.tokenizer.convert_ids_to_tokens([*read, said[-1]])
    assert "".join(letters).replace("</s>", "|") == f"|{whole}"
    assert len(read) == min(max_length, len(whole))  # the last of them is only said


def test_of_a_context_the_end_stays(built: SimpleNamespace) -> None:
    row = Row("r:1", None, 1, {"text": "why", "context": "old words and new", "passage": "because of"})
    (ids,) = Completion("{context} {passage} {text}").encode_prompts([row], built.tokenizer, [16])
    assert built.tokenizer.decode(ids) == "nd new ecaus why".replace("ecaus", "<unk>ecau")


@given(st.lists(st.integers(0, 60), max_size=6), st.integers(0, 120))
def test_room_is_shared_so_that_the_longest_give_way(lengths: list[int], room: int) -> None:
    shares = share_room(lengths, room)
    assert all(0 <= share <= length for share, length in zip(shares, lengths, strict=True))
    assert sum(shares) == min(room, sum(lengths))
    cut = [share for share, length in zip(shares, lengths, strict=True) if share < length]
    assert not cut or max(shares) - min(cut) <= 1


# The loss


def test_the_loss_is_hugging_faces_on_the_same_labels(built: SimpleNamespace) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(built.tokenizer), **size, **ids)).eval()
    examples = built.task.build_examples(built.rows, built.tokenizer, 48)
    losses = built.task.compute_losses(model, collate(examples, np.arange(3), 0), 0.0)
    for number, loss in enumerate(losses):
        read, said = take_row(examples, number)
        # Hugging Face shifts by itself: whole rows, with the prompt's labels put out.
        labels = torch.tensor([[IGNORED, *said]])
        whole = torch.tensor([[*read, said[-1]]])
        torch.testing.assert_close(loss, model(input_ids=whole, labels=labels).loss)


@torch.no_grad()
def test_packed_and_alone_give_the_same(built: SimpleNamespace) -> None:
    examples = built.task.build_examples(built.rows, built.tokenizer, 48)
    together = built.task.compute_losses(built.model, collate(examples, np.arange(3), None), 0.0)
    alone = [built.task.compute_losses(built.model, collate(examples, np.array([i]), None), 0.0) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    outputs = built.task.compute_outputs(built.model, examples, None)
    torch.testing.assert_close(torch.tensor(outputs[:, 0] / outputs[:, 1]).float(), together)


def test_rows_weigh_by_what_is_learned_of_them(built: SimpleNamespace) -> None:
    examples = built.task.build_examples(built.rows, built.tokenizer, 48)
    assert built.task.compute_row_weights(examples, "none").tolist() == [16.0, 2.0, 5.0]


# Writing


def test_it_writes_what_the_model_says_behind_the_prompt(built: SimpleNamespace) -> None:
    """As Hugging Face's own `generate` does, whatever stands beside it in the batch."""
    section = GenerateSection(max_new_tokens=6)
    prompts = built.task.encode_for_writing(built.rows, built.tokenizer, 48, section)
    written = generate_texts(built.model, built.tokenizer, prompts, section, kind="completion", max_length=48)
    for prompt, text in zip(prompts, written, strict=True):
        output = built.model.generate(
            torch.tensor([prompt]), max_length=len(prompt) + 6, do_sample=False, pad_token_id=0, eos_token_id=3
        )
        assert built.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True) == text
    assert all(len(prompt) <= 42 for prompt in prompts)


def test_the_quote_is_the_sentence_nearest_to_the_question() -> None:
    section = EvaluateSection(baselines=["bm25_sentence", "copy"])
    rows = build_rows([("when is it open", "It costs three. It is open until five.", "Until five.")])
    found = Completion(PROMPT).compute_baselines(SimpleNamespace(section=section), rows)  # type: ignore[arg-type]
    assert found["bm25_sentence"].texts == ["It is open until five."]
    assert found["copy"].texts == ["when is it open"]


# Words


def test_a_config_comes_back() -> None:
    task = Completion("{text}!", ("urls",))
    assert Completion.from_config(task.to_config()) == task


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda task, tokenizer: task.build(
                TaskSection(type="completion", data="x", prompt="{text} {pasage}"), TaskData(build_rows())
            ),
            "tasks.<name>.prompt: must find the column 'pasage' in r:1, got text, passage, target. Did you mean "
            "'passage'?",
        ),
        (
            lambda task, tokenizer: task.build_examples(build_rows(), tokenizer, 8),
            "tasks.<name>.prompt: must leave room for the rows, got 7 tokens of its own where 4 fit. "
            "Raise model.max_length, or shorten the prompt.",
        ),
        (
            lambda task, tokenizer: task.compute_baselines(
                SimpleNamespace(section=EvaluateSection(baselines=["bm25_sentence"])),
                [Row("r:1", None, 1, {"text": "a", "target": "b"})],
            ),
            "evaluate.baselines: bm25_sentence must find the role passage in the rows, got none. "
            "Set tasks.<name>.columns: {passage: <column>}, or leave it out.",
        ),
    ],
)
def test_what_cannot_be_is_said(built: SimpleNamespace, call: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        call(built.task, built.tokenizer)
    assert str(caught.value) == words


def test_a_prompt_in_pieces() -> None:
    assert parse_prompt("a {x} {{b}} {y}") == [Piece("a ", "x"), Piece(" {", None), Piece("b}", None), Piece(" ", "y")]
    assert list_columns("{x} {y} {x}") == ["x", "y"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("no column", "must name at least one column in braces, such as {text}, got 'no column'."),
        ("{text", "must name columns in braces, {{ and }} being braces themselves; expected '}' before end of string"),
        ("{text!r}", "must hold the name of a column between braces, got {text!r}."),
        ("{a.b}", "must hold the name of a column between braces, got {a.b}."),
        ("{}", "must hold the name of a column between braces, got {}."),
    ],
)
def test_a_prompt_that_names_no_columns_is_refused(prompt: str, words: str) -> None:
    with pytest.raises(ValueError, match="prompt") as caught:
        TaskSection(type="completion", data="x", prompt=prompt)
    assert words in str(caught.value)
