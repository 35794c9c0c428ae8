"""Question answering: windows, targets, losses and spans against Hugging Face's own model and a brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches import IGNORED, Examples, collate
from finetune.data.rows import Row
from finetune.data.windows import encode_windows
from finetune.errors import DataError, DivergedError, ModelError, RecipeError
from finetune.models.base import BaseModel, load_tokenizer
from finetune.models.question_answering import build_answerer, build_answerer_config, find_best_spans
from finetune.recipe.schema import ModelSection, TaskSection
from finetune.tasks.question_answering import NEVER, QuestionAnswering, Span, choose_windows
from finetune.tasks.task import TaskData

PASSAGE = "The company names the meeting. The loss cuts the gains, and (as of 2024) no bank warns. Oil falls 3.9%."
QUESTIONS = ["what cuts the gains?", "when?", "who wins?"]
ANSWERS = ["The loss", "as", ""]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModel:
    return BaseModel(str(tiny_base), tiny_base, "test")


@pytest.fixture(scope="module")
def tokenizer(base: BaseModel) -> Any:
    return load_tokenizer(base)


def build_rows(passages: list[str] | None = None) -> list[Row]:
    rows = zip(QUESTIONS, passages or [PASSAGE, "long since " + PASSAGE, PASSAGE], ANSWERS, strict=True)
    return [
        Row(f"rows:{i}", None, i, {"text": question, "passage": passage, "answer": answer})
        for i, (question, passage, answer) in enumerate(rows, start=1)
    ]


def build_model(base: BaseModel, **choices: Any) -> Any:
    model = build_answerer(base, ModelSection(max_length=64, **choices), seed=0).eval()
    torch.nn.init.normal_(model.qa_outputs.weight, generator=torch.Generator().manual_seed(1))
    return model


def build_examples(
    tokenizer: Any, max_length: int = 64, stride: int | None = None
) -> tuple[QuestionAnswering, Examples]:
    task = QuestionAnswering(stride)
    return task, task.build_examples(task.prepare_rows(build_rows()), tokenizer, max_length)


# Rows


def test_answers_are_found_in_their_passages() -> None:
    starts = [row.values["answer_start"] for row in QuestionAnswering().prepare_rows(build_rows())]
    assert starts == [PASSAGE.index("The loss"), PASSAGE.index("as ") + len("long since "), None]


@pytest.mark.parametrize("kind", [int, str, float])
def test_a_given_start_says_which_of_several_places(kind: type) -> None:
    place = PASSAGE.index("the gains")
    row = Row("rows:1", None, 1, {"text": "q", "passage": PASSAGE, "answer": "the", "answer_start": kind(place)})
    (prepared,) = QuestionAnswering().prepare_rows([row])
    assert prepared.values["answer_start"] == place > PASSAGE.index("the")


@pytest.mark.parametrize(
    ("answer", "start", "words"),
    [
        ("The profit", "", "rows:7 has 'The profit', which is not there"),
        ("The loss", 3, "rows:7 has 'The loss' with answer_start 3, where ' company' stands"),
        ("The loss", -1, "rows:7 has 'The loss' with answer_start -1, where '' stands"),
        ("The loss", "soon", "rows:7 has answer_start 'soon', which is no number"),
    ],
)
def test_an_answer_that_does_not_stand_there_names_its_row(answer: str, start: object, words: str) -> None:
    row = Row("rows:7", None, 7, {"text": "q", "passage": PASSAGE, "answer": answer, "answer_start": start})
    with pytest.raises(DataError) as caught:
        QuestionAnswering().prepare_rows([row])
    assert str(caught.value) == (
        f"question_answering: every answer must stand in its passage, got {words}. Correct the rows; an empty answer "
        "says that there is none."
    )


def test_many_wrong_answers_are_counted() -> None:
    rows = [Row(f"rows:{i}", None, i, {"text": "q", "passage": "x", "answer": "y"}) for i in range(8)]
    with pytest.raises(DataError, match=r"rows:4 has 'y', which is not there and 3 more\. Correct"):
        QuestionAnswering().prepare_rows(rows)


def test_a_column_of_starts_that_is_not_there() -> None:
    section = TaskSection(type="question_answering", data="a.csv", columns={"answer_start": "at"})
    with pytest.raises(DataError, match=r"a\.csv: column 'at' must exist, got columns text, passage, answer\."):
        QuestionAnswering.build(section, TaskData(build_rows()))


def test_config_comes_back() -> None:
    task = QuestionAnswering(16, 12, "at")
    assert QuestionAnswering.from_config(task.to_config()) == task


# Windows


@given(
    words=st.lists(st.sampled_from(["loss", "gains", "zq", "3.9%", "x-y", "été", "\n"]), min_size=1, max_size=60),
    question=st.integers(1, 40),
    max_length=st.integers(8, 40),
    share=st.floats(0, 1),
)
def test_windows_cover_every_token_and_their_places_are_the_texts(
    tokenizer: Any, words: list[str], question: int, max_length: int, share: float
) -> None:
    passage = " ".join(words)
    stride = int(share * (max_length // 2 - 1))
    found = encode_windows(
        ["wins " * question, "wins"], [passage, "loss"], tokenizer, max_length=max_length, stride=stride
    )
    whole = tokenizer(passage, add_special_tokens=False, return_offsets_mapping=True)
    covered: list[tuple[int, int]] = []
    for window in np.flatnonzero(found.owners == 0):
        ids, places, (first, last) = found.input_ids[window], found.places[window], found.parts[window]
        assert len(ids) <= max_length
        assert ids[0] == tokenizer.cls_token_id
        assert ids[-1] == tokenizer.sep_token_id
        inside = [tuple(place) for place in places[first : last + 1].tolist()]
        assert (places[:first] == -1).all()
        assert (places[last + 1 :] == -1).all()
        assert set(inside[:stride]) <= set(covered) or not covered  # what it shares with the one before
        covered += [place for place in inside if place not in covered]
        for token, (start, end) in zip(ids[first : last + 1], inside, strict=True):
            piece = tokenizer.convert_ids_to_tokens(token).removeprefix("##")
            assert piece == passage[start:end].lower() or piece == "[UNK]" or not passage[start:end].isascii()
    assert covered == [tuple(place) for place in whole["offset_mapping"]]
    assert found.owners.tolist()[-1] == 1


@pytest.mark.parametrize(("max_length", "stride"), [(64, None), (24, 11), (24, 0)])
def test_targets_point_at_the_answer(tokenizer: Any, max_length: int, stride: int | None) -> None:
    _, examples = build_examples(tokenizer, max_length, stride)
    assert examples.target_ids is not None
    targets = examples.target_ids.reshape(-1, 4)
    held = dict.fromkeys(range(3), 0)
    for row, start, (first, last, _, _) in zip(examples.labels, examples.starts, targets, strict=False):
        if first > 0:
            said = tokenizer.decode(examples.input_ids[start + first : start + last + 1]).replace(" ", "")
            assert said == ANSWERS[row].lower().replace(" ", "")
            held[int(row)] += 1
        else:
            assert first == last == 0
    assert held[2] == 0
    assert min(held[0], held[1]) >= 1
    if max_length == 24:
        assert len(examples) > 6


def test_nothing_is_learned_from_an_answer_that_no_window_holds(tokenizer: Any) -> None:
    task = QuestionAnswering(0)
    long = " ".join(PASSAGE.split()[2:14])
    rows = [Row("rows:1", None, 1, {"text": "what?", "passage": PASSAGE, "answer": long})]
    examples = task.build_examples(task.prepare_rows(rows), tokenizer, 16)
    assert examples.target_ids is not None
    assert (examples.target_ids.reshape(-1, 4)[:, :2] == IGNORED).all()


# Losses and logits


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["triad", "native"])
def test_loss_and_logits_are_those_of_bert(base: BaseModel, tokenizer: Any, architecture: str) -> None:
    from transformers import BertForQuestionAnswering

    model = build_model(base, architecture=architecture)
    reference = BertForQuestionAnswering.from_pretrained(base.folder).eval()
    reference.qa_outputs.load_state_dict(model.qa_outputs.state_dict())
    task, examples = build_examples(tokenizer, 24, 8)
    for packed in (False, True) if architecture == "triad" else (False,):
        batch = collate(examples, np.arange(len(examples)), None if packed else tokenizer.pad_token_id)
        losses = task.compute_losses(model, batch, 0.0)
        for row, loss in enumerate(losses.tolist()):
            one = collate(examples, np.array([row]), tokenizer.pad_token_id)
            targets = one.pop("labels")
            expected = reference(**one, start_positions=targets[:, 0], end_positions=targets[:, 1])
            assert loss == pytest.approx(float(expected.loss), abs=1e-5)
            outputs = task.compute_outputs(model, examples, None if packed else tokenizer.pad_token_id)[row]
            starts, ends = expected.start_logits[0].numpy(), expected.end_logits[0].numpy()
            assert outputs[1] == pytest.approx(starts[0] + ends[0], abs=1e-4)
            first, last = outputs[3:5].astype(int)
            assert outputs[2] == pytest.approx(starts[first] + ends[last], abs=1e-4)
            assert tuple(outputs[5:]) == tuple(targets[0, :2].tolist())


@torch.no_grad()
def test_the_second_text_has_a_type_of_its_own(base: BaseModel, tokenizer: Any) -> None:
    model = build_model(base)
    model.model.first.embeddings.token_types.weight.data[1].normal_(std=3, generator=torch.Generator().manual_seed(0))
    task, examples = build_examples(tokenizer)
    plain = Examples(
        *(getattr(examples, name) for name in ("input_ids", "starts", "labels", "target_ids", "target_starts"))
    )
    assert examples.token_type_ids is not None
    changed = [task.compute_outputs(model, one, None)[:, 0] for one in (examples, plain)]
    assert np.abs(changed[0] - changed[1]).min() > 0.01


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padded_and_packed_rows_have_one_loss_and_one_gradient(
    base: BaseModel, tokenizer: Any, smoothing: float
) -> None:
    task, examples = build_examples(tokenizer, 32, 8)
    assert len(set(examples.lengths.tolist())) > 1
    found = []
    for padding in (None, tokenizer.pad_token_id):
        model = build_model(base)
        losses = task.compute_losses(model, collate(examples, np.arange(len(examples)), padding), smoothing)
        losses.sum().backward()
        found.append((losses.detach(), model.model.first.embeddings.tokens.weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_label_smoothing_is_that_of_torch(base: BaseModel, tokenizer: Any) -> None:
    task, examples = build_examples(tokenizer)
    model = build_model(base)
    batch = collate(examples, np.array([0]), None)
    outputs = model(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"])
    first, last = batch["labels"][0, :2]
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    expected = (smooth(outputs.start_logits[0], first) + smooth(outputs.end_logits[0], last)) / 2
    torch.testing.assert_close(task.compute_losses(model, batch, 0.3)[0], expected)


@torch.no_grad()
def test_a_row_without_targets_has_no_loss(base: BaseModel, tokenizer: Any) -> None:
    task, examples = build_examples(tokenizer)
    batch = collate(examples, np.arange(3), None)
    batch["labels"].view(-1, 4)[1, :2] = IGNORED
    for smoothing in (0.0, 0.3):
        losses = task.compute_losses(build_model(base), batch, smoothing)
        assert losses[1] == 0
        assert losses[0] > 0


# Spans


@given(
    length=st.integers(1, 12),
    rows=st.integers(1, 4),
    max_tokens=st.integers(1, 14),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_the_best_span_is_that_of_trying_all(
    length: int, rows: int, max_tokens: int, seed: int, data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    starts, ends = generator.normal(size=(2, rows, length)).astype(np.float32)
    parts = [
        (first, data.draw(st.integers(first - 1, length - 1)))
        for first in (data.draw(st.integers(0, length - 1)) for _ in range(rows))
    ]
    best, first, last = find_best_spans(torch.tensor(starts), torch.tensor(ends), torch.tensor(parts), max_tokens)
    for row, (low, high) in enumerate(parts):
        tried = {
            (i, j): starts[row, i] + ends[row, j]
            for i in range(low, high + 1)
            for j in range(i, min(i + max_tokens, high + 1))
        }
        if not tried:
            assert best[row] == -torch.inf
            continue
        assert best[row] == max(tried.values())
        assert tried[int(first[row]), int(last[row])] == best[row]


def test_windows_of_a_row_are_put_together() -> None:
    outputs = np.zeros((4, 7), dtype=np.float32)
    outputs[:, 1] = [5, -1, 2, 3]  # no answer
    outputs[:, 2] = [1, 4, 6, -np.inf]  # best span
    chosen, margins = choose_windows(outputs, np.array([0, 0, 0, 2]))
    assert chosen.tolist() == [2, 3]
    assert margins.tolist() == [6 - -1, NEVER]


def test_metrics_while_training_put_tokens_for_words() -> None:
    rows = [  # loss, no answer, best, its first and last token, the answer's
        [1.0, 0, 2, 5, 6, 5, 6],  # right
        [3.0, 0, 2, 5, 8, 8, 9],  # one token of four and of two
        [2.0, 3, 2, 5, 6, 5, 6],  # withheld
        [0.0, 3, 2, 5, 6, 0, 0],  # rightly withheld
        [0.0, 0, 2, 5, 6, 0, 0],  # given where there is none
        [0.0, 0, 1, 5, 6, 4, 6],  # two windows: the other one is chosen, and does not hold the answer
        [0.0, 0, 2, 5, 6, 0, 0],
    ]
    found = QuestionAnswering().compute_metrics(
        np.array(rows, dtype=np.float32),
        np.array([0, 1, 2, 3, 4, 5, 5]),
        ["answer_f1", "exact_match", "has_answer_f1", "no_answer_accuracy"],
    )
    assert found == pytest.approx(
        {
            "loss": 6 / 7,
            "answer_f1": (1 + 1 / 3 + 0 + 1 + 0 + 0) / 6,
            "exact_match": 2 / 6,
            "has_answer_f1": (1 + 1 / 3) / 4,
            "no_answer_accuracy": 1 / 2,
        }
    )


@pytest.mark.parametrize("max_length", [64, 24])
def test_a_model_that_knows_the_answer_quotes_it(
    base: BaseModel, tokenizer: Any, max_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = QuestionAnswering(stride=max_length // 3)
    rows = task.prepare_rows(build_rows())

    def know(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        targets = batch["labels"].view(-1, 4)
        size = int(batch["position_ids"].max()) + 1
        return tuple(10.0 * torch.nn.functional.one_hot(targets[:, side], size) for side in (0, 1))

    monkeypatch.setattr("finetune.tasks.question_answering.compute_span_logits", know)
    spans = task.find_spans(build_model(base), tokenizer, rows, max_length)
    answers = [span.decide(0.0) for span in spans]
    assert [answer.text for answer in answers] == ANSWERS
    for row, answer in zip(rows, answers, strict=True):
        assert (answer.start is None) == (answer.score <= 0.5) == (not answer.text)
        if answer.start is not None:
            assert row.values["passage"][answer.start : answer.end] == answer.text
            assert answer.start == row.values["answer_start"]


def test_an_empty_passage_has_no_answer(base: BaseModel, tokenizer: Any) -> None:
    row = Row("1", None, 1, {"text": "what?", "passage": " "})
    (span,) = QuestionAnswering().find_spans(build_model(base), tokenizer, [row], 64)
    assert span == Span("", 0, 0, NEVER)
    assert span.decide(-1000.0).text == ""
    assert span.decide(0.0).score == pytest.approx(0.0)
    assert QuestionAnswering().find_spans(build_model(base), tokenizer, [], 64) == []


def test_broken_weights_are_an_error(base: BaseModel, tokenizer: Any) -> None:
    model = build_model(base)
    model.qa_outputs.weight.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="the model's logits must be finite, got nan or infinity"):
        QuestionAnswering().find_spans(model, tokenizer, build_rows(), 64)


# Bases


@pytest.mark.parametrize("architecture", ["triad", "native"])
def test_a_decoder_is_refused(tmp_path: Path, architecture: str) -> None:
    from transformers import GPT2Config, T5Config

    (GPT2Config(n_layer=1) if architecture == "triad" else T5Config()).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.base: question_answering needs an encoder, .* Name another base\."):
        build_answerer_config(BaseModel("b", tmp_path, "test"), ModelSection(architecture=architecture))


def test_a_tokenizer_without_a_token_in_front_is_refused(tokenizer: Any) -> None:
    from finetune.models.tokenizer import train_tokenizer

    assert QuestionAnswering().bind(tokenizer) == QuestionAnswering()
    plain = train_tokenizer(["a b c"], "characters", 32, 16, appends_end=False)
    with pytest.raises(ModelError, match=r"must be a fast one that begins texts with a special token such as \[CLS\]"):
        QuestionAnswering().bind(plain)
