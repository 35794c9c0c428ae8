"""Retrieval and reranking: rows and their companions, losses by hand, and the rankings that are judged."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from finetune.artifact.predictor import MultiPredictor, Predictor
from finetune.data.batches import Examples, collate, plan_batches_with_companions, split_batch
from finetune.data.knowledge import Entry
from finetune.data.rows import Row
from finetune.errors import DataError, DivergedError
from finetune.evaluation.corpus_metrics import compute_rank_statistics
from finetune.evaluation.ranking_baselines import compute_ranking_baselines, find_places
from finetune.models.base import BaseModel, load_tokenizer
from finetune.recipe.schema import ModelSection, TaskSection
from finetune.tasks import Reranking, Retrieval, load_task
from finetune.tasks.encoding import encode_texts
from finetune.tasks.task import TaskData

ENTRIES = [
    Entry("returns", "How long can I return shoes?", "Thirty days.", "a"),
    Entry("delivery", "How long does delivery take?", "Two days.", "a"),
    Entry("shoes", "Which shoes do you sell?", "Red shoes and blue shoes.", "a"),
    Entry("other", "How long can I return hats?", "Never.", "b"),
]
ROWS = [
    Row("r:1", "train", 1, {"text": "how long can I return them", "entry": "returns", "context": "Customer: red ones"}),
    Row("r:2", "train", 2, {"text": "when does it come", "entry": "delivery returns", "context": ""}),
]


def build(shape, rows=ROWS, columns=None, **keys):
    section = TaskSection(type=shape.type, data="rows.csv", columns=columns or {}, **keys)
    return shape.build(section, TaskData(rows, entries=ENTRIES))


@pytest.fixture(scope="module")
def base(tiny_base):
    return BaseModel(str(tiny_base), tiny_base, "local folder")


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


# Rows


def test_a_question_has_its_right_entries_and_hard_ones_beside_it(tokenizer):
    task = build(Retrieval, negatives=1)
    examples = task.build_examples(ROWS, tokenizer, 64)
    # Answers are sorted: (0,) is the first, (0, 1) the second. "how long can I return" is most like `returns`, which is
    # right, and then like `delivery`; `other` is as alike, but its group is no row's.
    assert examples.labels.tolist() == [4, 5, 0, 1, 2]
    assert [examples.get_companions(row).tolist() for row in range(5)] == [[2, 3], [2, 3, 4], [], [], []]
    passages = encode_texts([entry.passage for entry in ENTRIES], tokenizer, 64)
    rows = np.split(examples.input_ids, examples.starts[1:-1])
    assert rows[3].tolist() == passages[1]
    assert task.compute_row_weights(examples, "none").tolist() == [1, 1, 0, 0, 0]


def test_what_was_said_before_stands_in_front_of_the_question_where_it_is_read(tokenizer):
    plain, with_context = build(Retrieval), build(Retrieval, columns={"context": "context"})
    alone = plain.build_examples(ROWS, tokenizer, 64).lengths[0]
    assert with_context.build_examples(ROWS, tokenizer, 64).lengths[0] > alone
    short = with_context.build_examples(ROWS, tokenizer, 8)
    end = tokenizer("how long can I return them")["input_ids"][-6:]
    assert np.split(short.input_ids, short.starts[1:-1])[0][-6:].tolist() == end, "the newest words stay"
    assert tokenizer.truncation_side == "right"


def test_drawn_entries_follow_those_that_share_words_and_are_the_same_each_time():
    library = build(Retrieval).library
    mined = library.mine(ROWS, 2, 1)
    assert mined == library.mine(ROWS, 2, 1)
    assert mined[0][:1] == library.mine(ROWS, 1)[0]
    for row, wrong in zip(ROWS, mined, strict=True):
        assert not set(wrong) & set(library.find_right(row))
        assert len(set(wrong)) == len(wrong)


def test_pairs_hold_the_question_and_the_entry(tokenizer):
    examples = build(Reranking, negatives=2).build_examples(ROWS, tokenizer, 64)
    assert examples.labels.tolist() == [1, 0, 0, 3, 3, 2]
    expected = tokenizer(ROWS[1].values["text"], ENTRIES[1].passage)["input_ids"]
    assert np.split(examples.input_ids, examples.starts[1:-1])[4].tolist() == expected
    assert build(Reranking).compute_row_weights(examples, "none").tolist() == [1, 0.5, 0.5, 0.5, 0.5, 1]


def test_unknown_entries_are_named():
    rows = [Row("r:1", None, 1, {"text": "a", "entry": "returns retuns"})]
    with pytest.raises(DataError, match=r"entry: must be ids of the 4 entries .* got in r:1 'retuns'\. Correct"):
        build(Retrieval, rows)


@pytest.mark.parametrize("shape", [Retrieval, Reranking])
def test_rows_without_an_entry_are_left_out(shape):
    rows = [*ROWS, Row("r:3", None, 3, {"text": "hello", "entry": ""})]
    assert [row.id for row in build(shape, rows).prepare_rows(rows)] == ["r:1", "r:2"]


@pytest.mark.parametrize("shape", [Retrieval, Reranking])
def test_the_configuration_comes_back_without_the_entries(shape):
    task = build(shape, negatives=3, clean=["html"], columns={"context": "context"})
    loaded = load_task(task.to_config())
    assert loaded.to_config() == task.to_config()
    assert loaded.codes == task.codes
    assert not loaded.entries


# Losses


def test_the_loss_of_a_question_is_the_cross_entropy_over_the_entries_of_the_batch():
    task = build(Retrieval)
    features = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    labels = torch.tensor([4, 0, 1, 2, 5])  # two questions: the first is answered by 0, the second by 0 and 1
    losses = task.compute_loss(features, labels, 0.0)
    cosines = 20 * features[[0, 4]] @ features[1:4].T
    assert losses[0].item() == pytest.approx(cross_entropy(cosines[0], torch.tensor(0)).item(), rel=1e-5)
    shares = cosines[1].softmax(0)
    assert losses[4].item() == pytest.approx(-torch.log(shares[0] + shares[1]).item(), abs=1e-6)
    assert losses[1:4].tolist() == [0, 0, 0]


@pytest.mark.parametrize("labels", [[4], [0], [4, 2]])
def test_a_share_that_has_nothing_to_compare_has_no_loss_and_a_gradient(labels):
    features = torch.ones(len(labels), 8, requires_grad=True)
    losses = build(Retrieval).compute_loss(features, torch.tensor(labels), 0.0)
    losses.sum().backward()
    assert losses.tolist() == [0] * len(labels)
    assert features.grad.abs().sum() == 0


def test_each_pair_is_judged_by_itself():
    losses = build(Reranking).compute_loss(torch.tensor([[2.0], [1.0]]), torch.tensor([3, 2]), 0.0)
    assert losses.tolist() == pytest.approx([np.log1p(np.exp(-2)), np.log1p(np.exp(1))])


@pytest.mark.parametrize("shape", [Retrieval, Reranking])
def test_packed_rows_have_the_losses_of_padded_ones(shape, base, tokenizer):
    task = build(shape)
    model = task.build_model(base, ModelSection(), tokenizer, 3).eval()
    examples = task.build_examples(ROWS, tokenizer, 64)
    rows = np.arange(len(examples))
    packed, padded = (task.compute_losses(model, collate(examples, rows, pad), 0.0) for pad in (None, 0))
    np.testing.assert_allclose(packed.detach(), padded.detach(), atol=1e-5)


# Batches


@given(st.integers(0, 50), st.integers(1, 5), st.integers(20, 400))
@settings(max_examples=30, deadline=None)
def test_every_row_finds_its_companions_once_in_its_batch_and_in_its_share(seed, parts, budget):
    generator = np.random.default_rng(seed)
    leaders, shared = 30, 8
    needs = [generator.choice(shared, size=generator.integers(0, 4), replace=False) + leaders for _ in range(leaders)]
    lengths = generator.integers(3, 20, size=leaders + shared)
    examples = Examples.build([[1] * length for length in lengths], companions=[*needs, *([] for _ in range(shared))])
    batches = plan_batches_with_companions(examples, budget, seed=seed, epoch=2)
    dealt = np.concatenate(batches)
    assert sorted(dealt[dealt < leaders].tolist()) == list(range(leaders))
    for batch in batches:
        assert len(set(batch.tolist())) == len(batch)
        lead = batch[batch < leaders].tolist()
        assert set(batch[batch >= leaders].tolist()) == {row for leader in lead for row in needs[leader].tolist()}
        assert len(lead) == 1 or lengths[batch].sum() <= budget
        shares = split_batch(examples, batch, parts)
        assert len(shares) == parts
        assert sorted(row for share in shares for row in share if row < leaders) == sorted(lead)
        for share in shares:
            own = share[share < leaders].tolist()
            assert set(share[share >= leaders].tolist()) == {row for leader in own for row in needs[leader].tolist()}


def test_the_order_changes_with_the_epoch_and_not_with_anything_else():
    examples = Examples.build([[1]] * 40, companions=[[39], *[[] for _ in range(39)]])
    first, again, other = (plan_batches_with_companions(examples, 8, seed=1, epoch=epoch) for epoch in (0, 0, 1))
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in again]
    assert [rows.tolist() for rows in first] != [rows.tolist() for rows in other]


# Rankings


def test_metrics_by_hand():
    places = [np.array([2]), np.array([1, 4]), np.array([11])]
    names = ("mrr", "recall_at_1", "recall_at_5")
    values = {name: compute_rank_statistics(name, places)[:, 0].tolist() for name in names}
    assert values["mrr"] == pytest.approx([1 / 2, 1, 1 / 11])
    assert values["recall_at_1"] == [0, 1, 0]
    assert values["recall_at_5"] == [1, 1, 0]


def test_gain_is_that_of_scikit_learn():
    from sklearn.metrics import ndcg_score

    generator = np.random.default_rng(7)
    for right in ([3], [0, 5, 9], list(range(12))):
        scores = generator.normal(size=30).astype(np.float32)
        relevant = np.isin(np.arange(30), right)
        value = compute_rank_statistics("ndcg_at_10", [find_places(scores, right)])[0, 0]
        assert value == pytest.approx(ndcg_score([relevant], [scores], k=10))


def test_what_scores_alike_stands_behind():
    assert find_places(np.array([1.0, 1.0, 1.0, 0.0], dtype=np.float32), [1]).tolist() == [3]


def test_scores_that_are_no_numbers_are_no_ranking():
    for right in ([0], [2]):
        with pytest.raises(DivergedError) as caught:
            find_places(np.array([np.nan, 1.0, 2.0], dtype=np.float32), right)
        assert str(caught.value) == (
            "ranking: scores must be numbers, got nan for 1 of 3 entries. Lower train.learning_rate, or set "
            "train.precision: float32."
        )
    assert find_places(np.array([-np.inf, 1.0, -np.inf]), [0]).tolist() == [3], "what is not to be shown is last"


LONG = "https://shop.example/42 " + "red shoes blue hats " * 9 + "how long can I return them"


def load_trained(task, base, tokenizer):
    """A model of the task as it answers once it is loaded, without its entries."""
    model = task.build_model(base, ModelSection(), tokenizer, 0).eval()
    return Predictor(model, tokenizer, type(task).from_config(task.to_config()), 1.0, 16)


def test_questions_and_entries_are_embedded_as_when_the_model_was_judged(base, tokenizer):
    task = build(Retrieval, clean=["urls"], columns={"context": "context"})
    predictor = load_trained(task, base, tokenizer)
    rows = [Row("r:1", None, 1, {"text": LONG, "entry": "returns", "context": "Customer: red ones"})]
    questions = task.library.encode_questions(task.prepare_rows(rows), tokenizer, 16)
    entry = encode_texts([LONG], tokenizer, 16)
    judged = [task.compute_outputs(predictor.model, Examples.build(part), 0) for part in (questions, entry)]
    assert not np.allclose(*judged, atol=1e-3)
    np.testing.assert_allclose(predictor.embed([LONG], ["Customer: red ones"]), judged[0], atol=1e-6)
    np.testing.assert_allclose(predictor.embed([LONG]), judged[0], atol=1e-6)  # the context is cut away
    np.testing.assert_allclose(predictor.embed([LONG], entries=True), judged[1], atol=1e-6)


def test_a_pair_is_scored_as_when_the_model_was_judged(base, tokenizer):
    task = build(Reranking, clean=["urls"])
    predictor = load_trained(task, base, tokenizer)
    pairs = task.encode_pairs(["how long can I"], ["Thirty days."], tokenizer, 16)
    logits = task.compute_outputs(predictor.model, pairs, 0)[:, 0]
    found = predictor.score_pairs("how long can I https://shop.example/42", ["Thirty days."])
    assert found == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-6)


def test_several_heads_read_a_text_as_each_was_judged(base, tokenizer):
    """A stand-in for the heads says what it was given."""
    tasks = {name: build(Retrieval, clean=clean) for name, clean in (("answer", ["urls"]), ("other", []), ("as", []))}
    passes = []

    def compute_outputs(_model, examples, _pad_token_id):
        passes.append(tokenizer.decode(examples.input_ids, skip_special_tokens=True))
        return np.array([[len(passes)]])

    several = SimpleNamespace(
        compute_outputs=compute_outputs, split_outputs=lambda outputs: ((name, outputs) for name in tasks)
    )
    parts = {name: load_trained(task, base, tokenizer) for name, task in tasks.items()}
    found = MultiPredictor(parts["answer"].model, several, parts).read("how long https://x.example", "Customer: hats")
    assert {name: int(value[0, 0]) for name, value in found.items()} == {"answer": 1, "other": 2, "as": 2}
    assert passes[0].endswith("hats how long")
    assert passes[1].endswith("example")


def test_fused_ranks_are_those_of_both():
    vectors, passages = np.eye(3, dtype=np.float32), ["red", "blue", "red shoes"]
    rankings = compute_ranking_baselines(["fused"], ["red"], passages, lambda: (vectors[[2]], vectors))
    # BM25 puts the shorter of two texts first; the base puts the third first, and has the others in order.
    assert rankings["fused"][0] == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 63, 1 / 62 + 1 / 61])


@pytest.mark.parametrize("shape", [Retrieval, Reranking])
def test_metrics_while_training_are_those_of_the_ranking(shape, tokenizer):
    task = build(shape, negatives=3)
    references = task.build_examples(ROWS, tokenizer, 64).labels
    if shape is Reranking:  # pairs of the first question: right in the second place; of the other: first and last
        outputs = np.array([[1.0], [2.0], [0.0], [5.0], [1.0], [3.0]], dtype=np.float32)
    else:  # entries 0, 1, 2; the first question is nearest to 1, the second to 1 too
        place = {0: [1, 0, 0], 1: [0, 1, 0], 2: [0, 0, 1], 4: [0.6, 0.8, 0], 5: [0, 1, 0]}
        outputs = np.array([place[label] for label in references.tolist()], dtype=np.float32)
    metrics = task.compute_metrics(outputs, references, ["mrr", "recall_at_1"])
    assert metrics["mrr"] == pytest.approx(0.75)
    assert metrics["recall_at_1"] == 0.5
    assert metrics["loss"] > 0


def test_a_baseline_reads_as_many_turns_as_serve_it_best_on_validation(base, tokenizer):
    """BM25 needs the last turn, which names the thing, and is misled by the one before it."""
    rows = [
        Row(f"r:{n}", None, n, {"text": "how long?", "entry": entry, "context": f"Agent: {other}\nCustomer: {thing}"})
        for n, (entry, thing, other) in enumerate(
            [("returns", "return shoes", "hats sell sell red blue"), ("delivery", "delivery", "shoes shoes return")] * 2
        )
    ]
    task = build(Retrieval, rows, columns={"context": "context"})
    held_out = SimpleNamespace(rows={"validation": rows[:2]}, base=base, max_length=64)
    scores, settings = task.library.rank_baselines(held_out, rows[2:], ["bm25"])["bm25"]
    assert settings == {"turns": 1}
    assert scores.argmax(axis=1).tolist() == [0, 1]
    alone = build(Retrieval, rows).library.rank_baselines(held_out, rows[2:], ["bm25"])["bm25"]
    assert alone[1] == {}
