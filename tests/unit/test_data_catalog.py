from __future__ import annotations

import pytest

from finetune.data import catalog
from finetune.data.catalog import describe_location, find_card_folder, list_cards, load_card
from finetune.errors import DataError

CARD = """\
name: {name}
title: A set
licence: MIT
local: somewhere
files: {{all: rows.csv}}
hub: {{id: org/name, revision: 0123456789abcdef0123456789abcdef01234567}}
"""


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A catalog with the card `public` and the sample `sample`."""
    monkeypatch.setattr(catalog, "shipped_folder", lambda _kind: tmp_path / "shipped")
    monkeypatch.delenv("FINETUNE_DATA", raising=False)
    for path, name in (("catalog/public.yaml", "public"), ("samples/sample/card.yaml", "sample")):
        file = tmp_path / "shipped" / path
        file.parent.mkdir(parents=True)
        file.write_text(CARD.format(name=name), encoding="utf-8")
    return tmp_path / "shipped"


def test_shipped_cards_are_valid_and_complete():
    cards = {card.name: card for card in list_cards()}
    assert {"banking77", "clinc150", "twitter_fin_sentiment"} <= set(cards)
    assert {"bitext_intents", "dstc9_faq", "dstc11_faq_val"} <= set(cards)
    assert {"ml_latest_small", "online_retail"} <= set(cards)
    assert {"multi30k_en_de", "tatoeba_en_zh", "tinyshakespeare", "chinese_poetry"} <= set(cards)
    for card in cards.values():
        assert card.licence
        assert card.notes
        assert (card.labels is not None) == ("label" in card.roles)
        optional = {"entry", "context"} | ({"passage"} if "target" in card.roles else set())
        events = {"user", "item", "time"}
        optional |= {"weight"} if card.items else set()
        assert (card.items is not None) == (events <= set(card.roles))
        shapes = (events, {"text", "label"}, {"text", "target"}, {"text", "passage", "answer"}, {"text"})
        assert set(card.roles) - optional in shapes
        assert ("entry" in card.roles) <= (card.knowledge is not None)
        assert set(card.roles.values()) <= set(card.columns)
        assert set(card.rows) == set(card.files)
    assert len(cards["banking77"].labels) == 77
    assert len(cards["bitext_intents"].labels) == 27
    assert len(cards["clinc150"].labels) == 151
    assert cards["clinc150"].labels[-1] == "oos"
    assert cards["twitter_fin_sentiment"].labels == {"0": "negative", "1": "positive", "2": "neutral"}


def test_card_of_unknown_name_gets_a_suggestion(shipped):
    with pytest.raises(DataError, match=r"got 'publik'\. Did you mean 'public'\? Cards: public, sample\."):
        load_card("publik")


def test_card_must_have_the_name_of_its_file(shipped):
    (shipped / "catalog" / "other.yaml").write_text(CARD.format(name="public"), encoding="utf-8")
    with pytest.raises(DataError, match="name must be 'other' as the file or folder, got 'public'"):
        load_card("other")


def test_sample_lies_beside_its_card(shipped):
    card = load_card("sample")
    assert find_card_folder(card) == shipped / "samples" / "sample"
    assert describe_location(card) == "folder data/samples/sample"


def test_public_set_lies_under_the_variable_or_on_the_hub(shipped, tmp_path, monkeypatch):
    card = load_card("public")
    assert find_card_folder(card) is None
    assert describe_location(card) == "Hub org/name@0123456789ab"
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    assert find_card_folder(card) is None
    (tmp_path / "somewhere").mkdir()
    assert find_card_folder(card) == tmp_path / "somewhere"
    assert describe_location(card) == "folder $FINETUNE_DATA/somewhere"
