"""Recommenders from random weights: what a recipe's section makes of them, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from finetune.errors import ModelError, RecipeError
from finetune.models.next_item import ItemChoices, build_next_item, build_next_item_shape, load_next_item
from finetune.models.next_item_loss import full_softmax
from finetune.recipe.schema import ModelSection, ScratchSection

ITEMS = 12
TEXT_SIZE = 16
TEXTS = functional.normalize(torch.randn(ITEMS, TEXT_SIZE, generator=torch.Generator().manual_seed(0)), dim=1)


def make_section(**sizes: object) -> ModelSection:
    scratch = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | sizes
    return ModelSection(base="scratch", max_length=20, dropout=0.2, scratch=ScratchSection.model_validate(scratch))


def test_the_section_and_the_choices_say_what_is_built() -> None:
    known = torch.arange(ITEMS) < 9
    section = make_section(position="learned", activation="silu", tie_word_embeddings=False)
    model = build_next_item(section, ITEMS, TEXTS, known, ItemChoices(dropout=0.3, bias=True), seed=1)
    found = model.config.to_dict()
    expected = {
        "num_items": ITEMS,
        "vocab_size": ITEMS,
        "item_text_size": TEXT_SIZE,
        "item_dropout": 0.3,
        "item_bias": True,
        "hidden_size": 16,
        "intermediate_size": 64,
        "position": "learned",
        "activation": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": 20,
        "dropout": 0.2,
    }
    assert {name: found[name] for name in expected} == expected
    assert torch.equal(model.known, known)
    assert torch.equal(model.text_vectors, TEXTS)
    shape = build_next_item_shape(section, ITEMS, TEXT_SIZE, ItemChoices(dropout=0.3, bias=True))
    assert {name: tuple(one.shape) for name, one in shape.state_dict().items()} == {
        name: tuple(one.shape) for name, one in model.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in shape.parameters())


def test_without_texts_there_is_nothing_that_could_speak_for_an_id() -> None:
    model = build_next_item(make_section(), ITEMS, choices=ItemChoices(dropout=0.3), seed=1)
    assert model.config.item_dropout == 0
    assert model.text_vectors is None
    assert model.known.all()


def test_the_seed_decides() -> None:
    one, same, other = (build_next_item(make_section(), ITEMS, TEXTS, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["items.gate.weight"], other["items.gate.weight"])


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = build_next_item(make_section(), ITEMS, TEXTS, torch.arange(ITEMS) < 9, seed=1).eval()
    model.save_pretrained(tmp_path)
    loaded = load_next_item(tmp_path).eval()
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    history = torch.tensor([[3, 11, 0]])
    assert torch.equal(loaded.encode(history), model.encode(history))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_next_item(tmp_path / "nowhere")


def test_a_base_of_tokens_is_no_recommender(tmp_path: Path) -> None:
    from finetune.models.triad import TriadConfig, TriadModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    TriadModel(TriadConfig(shape="decoder", vocab_size=ITEMS, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"must load as TriadForNextItem; .* config\.num_items of at least 1, got 0"):
        load_next_item(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "choices", "words"),
    [
        (
            {"num_attention_heads": 3, "position": "learned"},
            ItemChoices(),
            "hidden_size (16) must be a multiple of num_attention_heads (3), or head_dim be given.",
        ),
        (
            {},
            ItemChoices(ids=False),
            "items need a vector: set item_ids to true, or item_text_size to the width of their texts' vectors.",
        ),
    ],
)
def test_sizes_that_cannot_work(sizes: dict[str, object], choices: ItemChoices, words: str) -> None:
    with pytest.raises(RecipeError, match=f"^{re.escape('model.scratch: ' + words)}$"):
        build_next_item(make_section(**sizes), ITEMS, choices=choices, seed=1)


@pytest.mark.parametrize("kind", ["ids", "text", "both"])
def test_it_learns_which_item_follows_which(kind: str) -> None:
    """Each item is followed by the next number: after some steps the first in the list is right."""
    choices = ItemChoices(ids=kind != "text", dropout=0.2)
    section = make_section().model_copy(update={"dropout": 0.0})
    model = build_next_item(section, ITEMS, None if kind == "ids" else TEXTS, choices=choices, seed=1).train()
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    places = torch.arange(6).repeat(8)[None]
    for _ in range(60):
        starts = torch.randint(0, ITEMS, (8, 1), generator=generator)
        rows = (starts + torch.arange(7)) % ITEMS
        vectors = model.compute_item_vectors()
        states = model(rows[:, :6].reshape(1, -1), position_ids=places, item_vectors=vectors).last_hidden_state[0]
        optimizer.zero_grad()
        full_softmax(states, rows[:, 1:].flatten(), vectors, model.compute_item_bias()).mean().backward()
        optimizer.step()
    model.eval()
    items = torch.arange(ITEMS)
    with torch.no_grad():
        if kind == "both":  # item_dropout taught it to read and to score items by their text alone
            model.set_known(items % 3 > 0)
        histories = torch.stack([(items - 1) % ITEMS, items], dim=1)
        assert torch.equal(model.score(model.encode(histories)).argmax(1), (items + 1) % ITEMS)
