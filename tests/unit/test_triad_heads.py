"""The heads on Triad: how rows are pooled, what the logits are, and which loss which labels give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, layer_norm, mse_loss

from finetune.models.triad import (
    TriadConfig,
    TriadForCausalLM,
    TriadForMaskedLM,
    TriadForMultiTask,
    TriadForQuestionAnswering,
    TriadForSentenceEmbedding,
    TriadForSeq2SeqLM,
    TriadForSequenceClassification,
    TriadForTokenClassification,
)
from finetune.models.triad.modeling_triad import Pack, TriadPooler

V, D, K = 20, 16, 3
IDS = torch.tensor([[5, 9, 14, 3, 0, 0], [7, 4, 2, 11, 8, 2], [6, 0, 0, 0, 0, 0]])
MASK = (IDS != 0).long()
LENGTHS = [4, 6, 1]
PADDED = {"input_ids": IDS, "attention_mask": MASK}
PACKED = {
    "input_ids": IDS[MASK.bool()][None],
    "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
}
LEFT = {
    "input_ids": torch.stack([row.roll(6 - length) for row, length in zip(IDS, LENGTHS, strict=True)]),
    "attention_mask": MASK.flip(1),
    "position_ids": (MASK.flip(1).cumsum(1) - 1).clamp(min=0),
}
HEADS = {
    "tone": {"type": "sequence_classification", "num_labels": 3},
    "names": {"type": "token_classification", "num_labels": 5},
    "topic": {"type": "sequence_classification", "num_labels": 2},
}


def build(model_class: Any, **changes: Any) -> Any:
    """A model whose every weight is random: biases start at 0 and norms at 1."""
    settings: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 10,
        "dropout": 0.0,
        "num_labels": K,
        "decoder_start_token_id": 1,
    }
    model = model_class(TriadConfig(**(settings | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return model.eval()


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def get_states(model: Any, **changes: Any) -> torch.Tensor:
    return model.model(**(PADDED | changes)).last_hidden_state


# One vector for each row


def pool_by_hand(pooler: TriadPooler, states: torch.Tensor) -> torch.Tensor:
    """The states of one row, without padding, as the configuration's words say."""
    if pooler.pooling == "mean":
        return states.sum(0) / len(states)
    chosen = states[-1] if pooler.pooling == "last" else states[0]
    return pooler.dense.weight @ chosen + pooler.dense.bias if pooler.pooling == "pooler" else chosen


@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "pooler"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_pooling_by_hand(pooling: str, activation: str) -> None:
    model = build(TriadForSequenceClassification, pooling=pooling, pooler_activation=activation)
    rows = [pool_by_hand(model.pooler, row[:length]) for row, length in zip(get_states(model), LENGTHS, strict=True)]
    pooled = torch.stack(rows)
    if pooling == "pooler":
        pooled = pooled.tanh() if activation == "tanh" else pooled.clamp(min=0)
    expected = pooled @ model.classifier.weight.T + model.classifier.bias
    for batch in (PADDED, PACKED, LEFT):
        check_close(model(**batch).logits, expected)
    check_close(model(IDS[1:2]).logits, expected[1:2])  # no mask, no padding


def test_a_head_may_read_vectors_of_length_1() -> None:
    plain, model = (build(TriadForSequenceClassification, normalize_pooled=flag) for flag in (False, True))
    model.load_state_dict(plain.state_dict())
    head = plain.classifier
    plain.classifier = nn.Identity()
    features = plain(**PADDED).logits
    expected = head(features / features.square().sum(1, keepdim=True).sqrt())
    for batch in (PADDED, PACKED, LEFT):
        check_close(model(**batch).logits, expected)


@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
def test_a_mask_may_be_of_truth_values(pooling: str) -> None:
    model = build(TriadForSequenceClassification, pooling=pooling)
    check_close(model(IDS, MASK.bool()).logits, model(IDS, MASK).logits)


def test_a_mean_in_bf16_is_rounded_once() -> None:
    """Summed in bf16, 500 values are off by more than the rounding of the result."""
    states = (1 + torch.rand(1, 1000, D, generator=torch.Generator().manual_seed(0))).bfloat16()
    pooler = TriadPooler(TriadConfig(hidden_size=D))
    found = pooler(states, None, Pack([(2, 500)]))
    expected = states[0].float().unflatten(0, (2, 500)).mean(1)
    torch.testing.assert_close(found.float(), expected, atol=0, rtol=2**-8)


def test_the_classifier_may_have_no_bias() -> None:
    assert build(TriadForSequenceClassification, classifier_bias=False).classifier.bias is None


@pytest.mark.parametrize(
    ("changes", "varies"),
    [({"dropout": 0.0}, False), ({"dropout": 0.0, "classifier_dropout": 0.5}, True), ({"dropout": 0.5}, True)],
)
def test_the_head_drops_features_in_training(changes: dict[str, Any], varies: bool) -> None:
    torch.manual_seed(0)
    model = build(TriadForSequenceClassification, **changes)
    model.model.eval()
    model.dropout.train()
    outputs = {tuple(model(**PADDED).logits.flatten().tolist()) for _ in range(3)}
    assert (len(outputs) > 1) is varies


def test_dropout_may_be_for_the_base_alone() -> None:
    assert build(TriadForSequenceClassification, dropout=0.3, classifier_dropout=0.0).dropout.p == 0.0
    assert build(TriadForSequenceClassification, dropout=0.3).dropout.p == 0.3


@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "pooler"])
def test_sentence_embeddings_have_length_1(pooling: str) -> None:
    model = build(TriadForSentenceEmbedding, pooling=pooling)
    found = model(**PADDED).embeddings
    assert found.shape == (3, D)
    check_close(found.norm(dim=1), torch.ones(3))
    check_close(model(**PACKED).embeddings, found)
    model.config.normalize_embeddings = False
    raw = model(**PADDED).embeddings
    assert not torch.allclose(raw.norm(dim=1), torch.ones(3), atol=1e-2)
    check_close(raw / raw.norm(dim=1, keepdim=True), found)


# Losses


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_one_label_of_several_is_cross_entropy(problem_type: str | None) -> None:
    model = build(TriadForSequenceClassification, problem_type=problem_type)
    labels = torch.tensor([2, -100, 0])
    output = model(**PADDED, labels=labels)
    scores = output.logits.softmax(-1)
    check_close(output.loss, -(scores[0, 2].log() + scores[2, 0].log()) / 2)
    check_close(model(**PADDED, labels=labels, num_items_in_batch=8).loss, output.loss * 2 / 8)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_number_is_squared_error(num_labels: int) -> None:
    problem_type = None if num_labels == 1 else "regression"
    model = build(TriadForSequenceClassification, num_labels=num_labels, problem_type=problem_type)
    labels = torch.tensor([[0.5, 2.0], [-1.0, 0.0], [3.0, 1.0]])[:, :num_labels]
    output = model(**PADDED, labels=labels)
    check_close(output.loss, mse_loss(output.logits, labels))
    check_close(output.loss, ((output.logits - labels) ** 2).sum() / labels.numel())


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_several_labels_at_once_are_binary_cross_entropy(problem_type: str | None) -> None:
    model = build(TriadForSequenceClassification, problem_type=problem_type)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    output = model(**PADDED, labels=labels)
    check_close(output.loss, binary_cross_entropy_with_logits(output.logits, labels))


TOKEN_LABELS = torch.tensor([[0, 2, -100, 1, -100, -100], [2, 2, 1, 0, -100, 1], [1, -100, -100, -100, -100, -100]])


def test_token_labels() -> None:
    model = build(TriadForTokenClassification)
    output = model(**PADDED, labels=TOKEN_LABELS)
    assert output.logits.shape == (3, 6, K)
    check_close(output.logits, get_states(model) @ model.classifier.weight.T + model.classifier.bias)
    counted = TOKEN_LABELS != -100
    expected = cross_entropy(output.logits[counted], TOKEN_LABELS[counted])
    check_close(output.loss, expected)
    found = model(**PADDED, labels=TOKEN_LABELS, num_items_in_batch=torch.tensor(32)).loss
    check_close(found, expected * int(counted.sum()) / 32)
    packed = model(**PACKED, labels=TOKEN_LABELS[MASK.bool()][None])
    check_close(packed.logits[0], output.logits[MASK.bool()])
    check_close(packed.loss, expected)


def test_answers() -> None:
    model = build(TriadForQuestionAnswering)
    starts, ends = torch.tensor([1, 0, 0]), torch.tensor([3, 5, 0])
    output = model(**PADDED, start_positions=starts, end_positions=ends)
    assert output.start_logits.shape == output.end_logits.shape == (3, 6)
    both = get_states(model) @ model.qa_outputs.weight.T + model.qa_outputs.bias
    check_close(output.start_logits, both[..., 0])
    check_close(output.end_logits, both[..., 1])
    expected = (cross_entropy(both[..., 0], starts) + cross_entropy(both[..., 1], ends)) / 2
    check_close(output.loss, expected)
    assert model(**PADDED, start_positions=starts).loss is None


def test_masked_tokens() -> None:
    model = build(TriadForMaskedLM, lm_head_bias=True, activation="gelu", norm_eps=1e-3)
    labels = torch.where(torch.rand(3, 6, generator=torch.Generator().manual_seed(2)) < 0.4, IDS, -100)
    output = model(**PADDED, labels=labels)
    assert output.logits.shape == (3, 6, V)
    inner = nn.functional.gelu(get_states(model) @ model.transform.weight.T + model.transform.bias)
    inner = layer_norm(inner, (D,), model.transform_norm.weight, model.transform_norm.bias, 1e-3)
    check_close(output.logits, inner @ model.get_input_embeddings().weight.T + model.lm_head.bias)
    counted = labels != -100
    assert 0 < counted.sum() < 18
    expected = cross_entropy(output.logits[counted], labels[counted])
    check_close(output.loss, expected)
    check_close(model(**PADDED, labels=labels, num_items_in_batch=5).loss, expected * int(counted.sum()) / 5)


def test_next_tokens() -> None:
    model = build(TriadForCausalLM, shape="decoder")
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[1, 2] = -100
    output = model(**PADDED, labels=labels)
    assert output.logits.shape == (3, 6, V)
    check_close(output.logits, get_states(model) @ model.get_input_embeddings().weight.T)
    said = [(row, place) for row in range(3) for place in range(5) if labels[row, place + 1] != -100]
    scores = output.logits.log_softmax(-1)
    total = -sum(scores[row, place, labels[row, place + 1]] for row, place in said)
    assert len(said) == 7
    check_close(output.loss, total / 7)
    check_close(model(**PADDED, labels=labels, num_items_in_batch=10).loss, total / 10)
    check_close(model(**PADDED, logits_to_keep=2).logits, output.logits[:, -2:])
    check_close(model(**PADDED, logits_to_keep=torch.tensor([0, 4])).logits, output.logits[:, [0, 4]])


def test_target_tokens() -> None:
    model = build(TriadForSeq2SeqLM, shape="encoder_decoder")
    labels = torch.tensor([[8, 3, 2, -100], [4, 2, -100, -100], [9, 9, 9, 2]])
    by_hand = torch.tensor([[1, 8, 3, 2], [1, 4, 2, 0], [1, 9, 9, 9]])  # 1 starts, 0 pads
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), by_hand)
    output = model(**PADDED, labels=labels)
    check_close(output.logits, model(**PADDED, decoder_input_ids=by_hand).logits)
    counted = labels != -100
    expected = cross_entropy(output.logits[counted], labels[counted])
    check_close(output.loss, expected)
    check_close(model(**PADDED, labels=labels, num_items_in_batch=20).loss, expected * 9 / 20)
    given = model(**PADDED, labels=labels, decoder_input_ids=by_hand.flip(1))
    check_close(given.logits, model(**PADDED, decoder_input_ids=by_hand.flip(1)).logits)


@pytest.mark.parametrize(
    ("model_class", "shape"),
    [(TriadForMaskedLM, "encoder"), (TriadForCausalLM, "decoder"), (TriadForSeq2SeqLM, "encoder_decoder")],
)
def test_the_losses_of_micro_steps_add_up_to_that_of_the_batch(model_class: Any, shape: str) -> None:
    model = build(model_class, shape=shape)
    labels = IDS.masked_fill(MASK == 0, -100)
    shifted = labels[:, 1:] if shape == "decoder" else labels
    counted = int((shifted != -100).sum())
    parts = [
        model(IDS[rows], MASK[rows], labels=labels[rows], num_items_in_batch=counted).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    check_close(sum(parts), model(**PADDED, labels=labels).loss)


# Several heads


@pytest.mark.parametrize("batch", [PADDED, PACKED, LEFT], ids=["padded", "packed", "left"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "pooler"])
def test_a_head_alone_says_what_it_says_among_all(batch: dict[str, torch.Tensor], pooling: str) -> None:
    model = build(TriadForMultiTask, heads=HEADS, pooling=pooling)
    together = model(**batch).logits
    assert set(together) == set(HEADS)
    for name, logits in together.items():
        check_close(model(**batch, task=name).logits, logits)
    tokens = batch["input_ids"].shape
    assert {name: tuple(logits.shape) for name, logits in together.items()} == {
        "tone": (3, 3),
        "names": (*tokens, 5),
        "topic": (3, 2),
    }


def test_a_head_is_that_of_the_model_with_one_head() -> None:
    model = build(TriadForMultiTask, heads=HEADS)
    for name, model_class in (
        ("tone", TriadForSequenceClassification),
        ("names", TriadForTokenClassification),
    ):
        single = build(model_class, num_labels=HEADS[name]["num_labels"])
        single.model.load_state_dict(model.model.state_dict())
        single.classifier.load_state_dict(model.classifiers[name].state_dict())
        check_close(model(**PADDED, task=name).logits, single(**PADDED).logits)


TASK_LABELS = {"tone": torch.tensor([2, -100, 0]), "names": TOKEN_LABELS, "topic": torch.tensor([1, 0, 1])}


@pytest.mark.parametrize("task", HEADS)
def test_labels_teach_their_own_head_and_the_base(task: str) -> None:
    model = build(TriadForMultiTask, heads=HEADS)
    labels = TASK_LABELS[task]
    output = model(**PADDED, task=task, labels=labels)
    counted = labels != -100
    expected = cross_entropy(output.logits[counted], labels[counted])
    check_close(output.loss, expected)
    found = model(**PADDED, task=task, labels=labels, num_items_in_batch=16).loss
    check_close(found, expected * int(counted.sum()) / 16)
    output.loss.backward()
    for name in HEADS:
        gradient = model.classifiers[name].weight.grad
        assert (gradient is not None and gradient.any()) == (name == task)
    assert all(p.grad.any() for name, p in model.model.named_parameters() if "k_proj.bias" not in name)


def test_packed_labels_of_tokens_and_rows() -> None:
    model = build(TriadForMultiTask, heads=HEADS)
    packed_labels = TASK_LABELS | {"names": TOKEN_LABELS[MASK.bool()][None]}
    for task, labels in TASK_LABELS.items():
        padded = model(**PADDED, task=task, labels=labels)
        packed = model(**PACKED, task=task, labels=packed_labels[task])
        check_close(packed.loss, padded.loss)


def test_heads_survive_saving(tmp_path: Path) -> None:
    model = build(TriadForMultiTask, heads=HEADS)
    model.save_pretrained(tmp_path)
    loaded = TriadForMultiTask.from_pretrained(tmp_path).eval()
    for name, logits in loaded(**PADDED).logits.items():
        check_close(logits, model(**PADDED, task=name).logits)


def test_a_task_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"^task must be one of names, tone, topic, got 'mood'\.$"):
        build(TriadForMultiTask, heads=HEADS)(**PADDED, task="mood")


def test_labels_of_no_task_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^labels need to come with the task that they belong to\.$"):
        build(TriadForMultiTask, heads=HEADS)(**PADDED, labels=TASK_LABELS["tone"])
