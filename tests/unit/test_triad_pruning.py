"""What is cut from a Triad: parts that say nothing change nothing, and importance is the gradient of a gate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from finetune.errors import ModelError
from finetune.models.triad import TriadConfig, TriadForSeq2SeqLM, TriadForSequenceClassification
from finetune.models.triad.pruning import (
    Importance,
    compute_importance,
    drop_layers,
    prune,
    rank_layers,
    trim_embeddings,
)

SHAPES = {
    "BERT": {"norm_position": "post", "position": "learned", "activation": "gelu", "embedding_norm": True},
    "Llama": {
        "shape": "decoder",
        "norm_position": "pre",
        "norm": "rmsnorm",
        "position": "rotary",
        "activation": "swiglu",
        "num_key_value_heads": 2,
        "pooling": "last",
        "attention_bias": False,
        "output_bias": False,
        "mlp_bias": False,
    },
}
KEPT_HEADS = [np.array([1]), np.array([0]), np.array([1])]
KEPT_CHANNELS = [np.arange(0, 24, 2), np.arange(12), np.arange(12, 24)]


def build(kind: str) -> TriadForSequenceClassification:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
    config = TriadConfig(
        **sizes | SHAPES[kind], vocab_size=40, intermediate_size=24, num_labels=3, initializer_range=0.3, dropout=0.0
    )
    return TriadForSequenceClassification(config).eval().requires_grad_(False)


def draw_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(6, 9, dtype=torch.int64)
    mask[::2, 6:] = 0
    return {"input_ids": torch.randint(1, 40, (6, 9), generator=generator) * mask, "attention_mask": mask}


def compute_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = torch.arange(len(batch["input_ids"])) % 3
    return nn.functional.cross_entropy(model(**batch).logits, labels, reduction="none")


@pytest.mark.parametrize("kind", SHAPES)
def test_parts_whose_output_is_zero_are_cut_without_a_trace(kind):
    model, batch = build(kind), draw_batch()
    groups = model.config.num_key_value_heads
    of_groups = [np.arange(groups // 2) if kept[0] == 0 else np.arange(groups // 2, groups) for kept in KEPT_HEADS]
    for layer, heads, channels in zip(model.model.first.layers, of_groups, KEPT_CHANNELS, strict=True):
        columns = layer.attention.o_proj.weight.view(32, groups, -1)
        columns[:, np.setdiff1d(np.arange(groups), heads)] = 0
        layer.mlp.down_proj.weight[:, np.setdiff1d(np.arange(24), channels)] = 0
    pruned = prune(model, of_groups, KEPT_CHANNELS)
    assert (pruned.config.num_attention_heads, pruned.config.intermediate_size) == (2, 12)
    assert pruned.num_parameters() < 0.8 * model.num_parameters()
    torch.testing.assert_close(pruned(**batch).logits, model(**batch).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_importance_is_the_gradient_of_a_gate_on_each_row(kind):
    """A factor at each head and channel, one row at a time, by autograd on the weights themselves."""
    model, batch = build(kind), draw_batch()
    halves = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 4), slice(4, 6))]
    labels = [torch.arange(6) % 3][0]

    def losses_of(part: dict[str, torch.Tensor]) -> torch.Tensor:
        own = labels[:4] if len(part["input_ids"]) == 4 else labels[4:]
        return nn.functional.cross_entropy(model(**part).logits, own, reduction="none")

    found = compute_importance(model, halves, losses_of)
    groups = model.config.num_key_value_heads
    heads, channels = torch.zeros(3, groups), torch.zeros(3, 24)
    model.requires_grad_(True)
    for row in range(6):
        model.zero_grad()
        compute = model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).logits
        nn.functional.cross_entropy(compute, labels[row : row + 1]).backward()
        for number, layer in enumerate(model.model.first.layers):
            out, down = layer.attention.o_proj.weight, layer.mlp.down_proj.weight
            heads[number] += (out * out.grad).view(32, groups, -1).sum((0, 2)).abs()
            channels[number] += (down * down.grad).sum(0).abs()
    torch.testing.assert_close(found.heads.float(), heads, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.channels.float(), channels, rtol=1e-3, atol=1e-5)


def test_the_most_important_parts_stay_in_their_order():
    importance = Importance(torch.tensor([[1.0, 4.0, 3.0], [9.0, 0.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    heads, channels = importance.choose(2, 1)
    assert [part.tolist() for part in heads] == [[1, 2], [0, 2]]
    assert [part.tolist() for part in channels] == [[1], [0]]


def test_a_layer_that_adds_nothing_is_dropped_without_a_trace_and_found_first():
    model, batch = build("Llama"), draw_batch()
    silent = model.model.first.layers[1]
    for module in (silent.attention.o_proj, silent.mlp.down_proj):
        module.weight.zero_()
    before = model(**batch).logits
    order = rank_layers(model, 1, lambda changed: (changed(**batch).logits - before).square().sum().item())
    assert order[0] == 1
    assert len(order) == 2
    assert len(model.model.first.layers) == 3  # put back
    smaller = drop_layers(model, [0, 2])
    assert smaller.config.num_hidden_layers == 2
    torch.testing.assert_close(smaller(**batch).logits, before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_trimmed_table_gives_the_same_logits_under_new_numbers(kind):
    model, batch = build(kind), draw_batch()
    used = np.unique(batch["input_ids"].numpy())
    trimmed = trim_embeddings(model, used)
    assert trimmed.config.vocab_size == len(used) < 40
    again = batch | {"input_ids": torch.from_numpy(np.searchsorted(used, batch["input_ids"].numpy()))}
    torch.testing.assert_close(trimmed(**again).logits, model(**batch).logits, rtol=0, atol=0)


def test_a_model_of_two_stacks_is_refused():
    config = TriadConfig(
        shape="encoder_decoder", vocab_size=20, hidden_size=16, num_hidden_layers=1, intermediate_size=8
    )
    with pytest.raises(ModelError, match=r"pruning: must get a Triad of one stack, got TriadForSeq2SeqLM\. Train with"):
        drop_layers(TriadForSeq2SeqLM(config), [0])
