"""The three language tasks: how rows become examples, and that a row's loss is the one Hugging Face computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches import IGNORED, Batch, Examples, collate, list_inputs
from finetune.data.rows import Row
from finetune.errors import DataError, ModelError
from finetune.models.base import SCRATCH
from finetune.models.classifier import get_padding
from finetune.recipe.schema import ModelSection, ScratchSection
from finetune.tasks import TASKS, CausalLM, MaskedLM, Seq2Seq, Task

TEXTS = ["the cat sat on the mat", "a dog", "the dog ran after the cat and the cat ran", "rain"]
SECTION = ModelSection(
    base="scratch",
    max_length=16,
    scratch=ScratchSection(
        tokenizer="characters", vocab_size=64, hidden_size=32, num_hidden_layers=2, position="sinusoidal"
    ),
)


def build_rows(texts: list[str]) -> list[Row]:
    return [
        Row(str(number), None, number, {"text": text, "target": text.upper()})
        for number, text in enumerate(texts, start=1)
    ]


def build(task: Task, texts: list[str] = TEXTS) -> tuple[Any, Any, Any, Examples]:
    """The bound task, its tokenizer, a model of random weights, and the encoded rows."""
    rows = task.prepare_rows(build_rows(texts))
    tokenizer = task.build_tokenizer(SCRATCH, rows, SECTION)
    task = task.bind(tokenizer)
    model = task.build_model(SCRATCH, SECTION, tokenizer, 0).eval()
    return task, tokenizer, model, task.build_examples(rows, tokenizer, SECTION.max_length)


def get_batch(examples: Examples, model: Any, tokenizer: Any, rows: list[int]) -> Batch:
    return collate(examples, np.array(rows), get_padding(model, tokenizer))


# Rows to examples


@pytest.mark.parametrize("max_length", [3, 16, 1000])
@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_causal_blocks_are_the_stream_and_each_token_is_a_target_once(max_length: int, separator: str | None) -> None:
    task, tokenizer, _, _ = build(CausalLM(separator))
    examples = task.build_examples(build_rows(TEXTS), tokenizer, max_length)
    end = tokenizer.eos_token if separator is None else ""
    between = end or separator
    text = between.join(TEXTS) + end
    stream = np.append(examples.input_ids, examples.target_ids[-1])
    assert tokenizer.decode(stream) == text
    assert examples.lengths.max() <= max_length
    np.testing.assert_array_equal(examples.lengths, examples.target_lengths)
    np.testing.assert_array_equal(examples.target_ids, stream[1:])


def test_causal_stream_needs_two_tokens() -> None:
    task, tokenizer, _, _ = build(CausalLM("\n"))
    with pytest.raises(DataError, match=r"causal_lm: each split must hold at least 2 tokens, got 1\. Add text\."):
        task.build_examples(build_rows(["a"]), tokenizer, 16)


def test_causal_stream_without_an_end_token_needs_a_separator() -> None:
    task, tokenizer, _, _ = build(CausalLM())
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"must have an end token .* Set tasks\.<name>\.separator\."):
        task.build_examples(build_rows(TEXTS), tokenizer, 16)


def test_seq2seq_cuts_both_sides_and_ends_them() -> None:
    _, tokenizer, _, examples = build(Seq2Seq())
    assert examples.lengths.max() == examples.target_lengths.max() == SECTION.max_length
    assert tokenizer.decode(examples.target_ids[: examples.target_starts[1]][:-1]) == TEXTS[0].upper()[:15]
    assert set(examples.target_ids[examples.target_starts[1:] - 1]) == {tokenizer.eos_token_id}
    np.testing.assert_array_equal(examples.sizes, np.maximum(examples.lengths, examples.target_lengths))


def test_masked_rows_longer_than_the_model_become_several() -> None:
    _, tokenizer, _, examples = build(MaskedLM())
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)
    assert len(examples) > len(TEXTS)
    assert examples.lengths.max() == SECTION.max_length
    assert (examples.target_ids != IGNORED).sum() == tokens  # none is lost, and no end token may be hidden


def test_masked_lm_needs_a_mask_token() -> None:
    task, tokenizer, _, _ = build(MaskedLM())
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match=r"masked_lm: the tokenizer must have a mask token, got none\."):
        task.bind(tokenizer)


# Losses


def compute_reference_loss(model: Any, batch: Batch, labels: torch.Tensor) -> float:
    """Hugging Face's own: the mean over the row's tokens, computed inside of the model."""
    return float(model(**batch, labels=labels).loss)


def test_causal_loss_is_that_of_the_model() -> None:
    task, tokenizer, model, examples = build(CausalLM())
    batch = get_batch(examples, model, tokenizer, list(range(len(examples))))
    losses = task.compute_losses(model, batch, 0.0)
    for row, loss in enumerate(losses.tolist()):
        ids = examples.input_ids[examples.starts[row] : examples.starts[row + 1]]
        ids = torch.tensor([[*ids.tolist(), int(examples.target_ids[examples.starts[row + 1] - 1])]])
        # The model shifts labels itself, and takes one token more to do so.
        assert loss == pytest.approx(compute_reference_loss(model, {"input_ids": ids}, ids), abs=1e-5)


def test_seq2seq_loss_is_that_of_the_model() -> None:
    task, tokenizer, model, examples = build(Seq2Seq())
    losses = task.compute_losses(model, get_batch(examples, model, tokenizer, [0, 1, 2, 3]), 0.0)
    for row, loss in enumerate(losses.tolist()):
        one = get_batch(examples, model, tokenizer, [row])
        assert loss == pytest.approx(compute_reference_loss(model, list_inputs(one), one["labels"]), abs=1e-5)


def test_masked_loss_is_that_of_the_model() -> None:
    task, tokenizer, model, examples = build(MaskedLM(mask_ratio=0.5))
    seen: list[tuple[Batch, torch.Tensor]] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    batch = get_batch(examples, model, tokenizer, list(range(len(examples))))
    torch.manual_seed(0)
    losses = task.compute_losses(model, batch, 0.0)
    given, kept = seen[0]["input_ids"], seen[0]["logits_to_keep"]
    labels = torch.full_like(given, IGNORED)
    labels[0, kept] = batch["labels"][0, kept]
    weights = torch.from_numpy(task.compute_row_weights(examples, "none"))
    inputs = {"input_ids": given, "position_ids": batch["position_ids"]}
    whole = float((losses * weights).sum() / weights.sum())
    assert whole == pytest.approx(compute_reference_loss(model, inputs, labels), abs=1e-5)
    assert weights.sum() == len(kept)


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_label_smoothing_is_that_of_torch(kind: str) -> None:
    task, tokenizer, model, examples = build(TASKS[kind]())
    batch = get_batch(examples, model, tokenizer, [0])
    logits: list[torch.Tensor] = []
    model.register_forward_hook(lambda _m, _a, output: logits.append(output.logits))
    loss = task.compute_losses(model, batch, 0.3)
    expected = torch.nn.functional.cross_entropy(logits[0][0], batch["labels"][0], label_smoothing=0.3)
    torch.testing.assert_close(loss[0], expected)


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "seq2seq"])
def test_outputs_do_not_depend_on_what_shares_the_batch(kind: str) -> None:
    task, tokenizer, model, examples = build(TASKS[kind]())
    padding = get_padding(model, tokenizer)
    whole = task.compute_outputs(model, examples, padding)
    shares = [task.compute_outputs(model, examples, padding, share=(rank, 2)) for rank in range(2)]
    np.testing.assert_allclose(sum(shares), whole, atol=1e-4)
    np.testing.assert_allclose(task.compute_outputs(model, examples, padding), whole, atol=1e-6)
    assert (whole[:, 0] > 0).all()
    assert (whole[:, 1] == task.compute_row_weights(examples, "none")).all()
    assert (whole[:, 2] <= whole[:, 1]).all()


def test_metrics_while_training_are_those_that_need_no_written_text() -> None:
    task, tokenizer, model, examples = build(Seq2Seq())
    outputs = task.compute_outputs(model, examples, get_padding(model, tokenizer))
    metrics = task.compute_metrics(outputs, examples.labels, ["perplexity", "bleu"])
    assert set(metrics) == {"loss", "perplexity"}
    assert metrics["loss"] == pytest.approx(outputs[:, 0].sum() / outputs[:, 1].sum())
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))


# Hidden tokens


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
    packed=st.booleans(),
)
def test_each_row_hides_its_share_and_only_what_may_be_hidden(
    counts: list[int], ratio: float, seed: int, packed: bool
) -> None:
    task = MaskedLM(ratio, (), 4, 64)
    rows = [[IGNORED, *range(5, 5 + count), IGNORED] for count in counts]
    examples = Examples.build(rows, targets=rows)
    batch = collate(examples, np.arange(len(rows)), None if packed else 0)
    noise = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(seed))
    chosen = task.choose(noise, batch)
    assert not (chosen & (batch["labels"] == IGNORED)).any()
    found = [part.sum() for part in (chosen[0].split([len(row) for row in rows]) if packed else chosen)]
    assert [int(one) for one in found] == [min(count, max(1, round(count * ratio))) for count in counts]


def test_most_hidden_tokens_are_masked_some_random_and_some_kept() -> None:
    task, tokenizer, model, examples = build(MaskedLM(0.5), ["the cat sat on the mat " * 40] * 20)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    batch = get_batch(examples, model, tokenizer, list(range(len(examples))))
    torch.manual_seed(0)
    task.compute_losses(model, batch, 0.0)
    kept = seen[0]["logits_to_keep"]
    before, after = batch["input_ids"][0, kept], seen[0]["input_ids"][0, kept]
    masked = (after == task.mask_token_id).float().mean()
    same = (after == before).float().mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert same == pytest.approx(0.1 + 0.1 / len(tokenizer), abs=0.02)


def test_hidden_tokens_are_drawn_anew_for_each_step_and_stay_for_scoring() -> None:
    task, tokenizer, model, examples = build(MaskedLM(0.5))
    batch = get_batch(examples, model, tokenizer, [0, 1])
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(task.compute_losses(model, batch, 0.0))
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    outputs = [task.compute_outputs(model, examples, get_padding(model, tokenizer)) for _ in range(2)]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "seq2seq"])
def test_a_task_comes_back_from_its_configuration(kind: str) -> None:
    task, *_ = build(TASKS[kind]())
    assert TASKS[kind].from_config(task.to_config()) == task
