"""A model made of word lists, and a shop small enough to know by heart."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from ruamel.yaml import YAML

from finetune.applications.support.assistant import Assistant
from finetune.applications.support.index import KnowledgeIndex
from finetune.applications.support.reader import Floats, Reading
from finetune.applications.support.templates import Intent
from finetune.data.knowledge import Entry
from finetune.data.ranking import split_words

KEYWORDS = {
    "cancel_order": {"cancel", "stop"},
    "change_email": {"email", "mail"},
    "change_address": {"address", "moved"},
    "returns": {"return", "returns", "refund"},
    "delivery": {"delivery", "arrive", "shipping"},
}
COMMON = set(
    split_words("a an and are can do does for how i in is it long me my of on or please take the to want what")
)
FEATURES = 256


class WordReader:
    """Reads by word lists.

    An intent's logit is four times the number of its words in the text; a text without any is out of scope; a passage
    answers by the share of the text's rarer words in it. "And ...?" is read with the customer's turn before it.
    """

    def __init__(self) -> None:
        self.intents = list(KEYWORDS)
        self.fingerprint = "a" * 64
        self.embedded: list[str] = []
        self.reranked: list[int] = []

    def read(self, text: str, context: str) -> Reading:
        words = self._read_words(text, context)
        counts = np.array([sum(word in keywords for word in words) for keywords in KEYWORDS.values()])
        logits = np.exp(4.0 * np.minimum(counts, 5))
        outside = 0.05 if counts.any() else 0.95
        return Reading((logits / logits.sum()).astype(np.float32), outside, self._hash(words))

    def embed(self, passages: Sequence[str]) -> Floats:
        self.embedded += passages
        return np.stack([self._hash(split_words(passage)) for passage in passages])

    def rerank(self, text: str, context: str, passages: Sequence[str]) -> Floats:
        self.reranked.append(len(passages))
        words = set(self._read_words(text, context)) - COMMON
        shares = [len(words & set(split_words(passage))) / max(1, len(words)) for passage in passages]
        return np.array(shares, dtype=np.float32)

    def _read_words(self, text: str, context: str) -> list[str]:
        words = split_words(text)
        turns = [line for line in context.splitlines() if line.startswith("Customer: ")]
        return words + split_words(turns[-1]) if words[:1] == ["and"] and turns else words

    def _hash(self, words: Sequence[str]) -> Floats:
        features = np.full(FEATURES, 1e-3, dtype=np.float32)
        for word in words:
            features[crc32(word.encode()) % FEATURES] += word not in COMMON
        return features / np.linalg.norm(features)


LONG = (
    "Delivery takes two working days. Bulky furniture takes longer and is brought by a partner of ours. Shipping to "
    "islands takes five days. We write to you when the parcel leaves our house. A parcel that nobody accepts goes to "
    "the nearest shop for a week. After that it travels back to us and we pay what you paid. Nothing is delivered on "
    "public holidays. Ask us for a day that suits you."
)
ENTRIES = [
    Entry("returns-01", "How do returns work?", "You can return shoes within thirty days.", "returns"),
    Entry("delivery-01", "How long does delivery take?", LONG, "delivery"),
    Entry("gifts-01", "Do you wrap gifts?", "We wrap gifts in paper for two euros.", "gifts"),
]
INTENTS = [
    Intent("cancel_order", "cancel an order", "I have cancelled order {order_id}.", ("order_id",)),
    Intent("change_email", "change your e-mail address", "Your address is now {new_email}.", ("new_email",)),
    Intent(
        "change_address", "change the address", "We will send {order_id} to {new_address}.", ("order_id", "new_address")
    ),
    Intent("returns", "return shoes", None, ()),
    Intent("delivery", "ask about delivery", None, ()),
]
SURE = 0.57


@pytest.fixture
def reader() -> WordReader:
    return WordReader()


@pytest.fixture
def assistant(reader: WordReader) -> Assistant:
    return make_assistant(reader, ENTRIES)


@pytest.fixture
def make(reader: WordReader):
    """An assistant that answers from the given entries."""
    return lambda *entries: make_assistant(reader, entries)


@pytest.fixture
def intents_file(tmp_path: Path) -> Path:
    """The intents of the shop as a file."""
    path = tmp_path / "intents.jsonl"
    keys = ("name", "description", "template", "slots")
    records = [{"intent" if key == "name" else key: getattr(intent, key) for key in keys} for intent in INTENTS]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def entries() -> list[Entry]:
    return list(ENTRIES)


def make_assistant(reader: WordReader, entries: Sequence[Entry]) -> Assistant:
    intents = {intent.name: intent for intent in INTENTS}
    return Assistant(reader, KnowledgeIndex.build(entries, reader), intents, SURE)


@pytest.fixture(scope="session")
def words():
    """The monitor made of word lists, a script that a test also runs as a child process."""
    spec = importlib.util.spec_from_file_location("word_monitor", Path(__file__).with_name("word_monitor.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["word_monitor"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shop_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The folder of a finished recommender of the bookshop, hardly trained; only to be read."""
    import finetune

    folder = tmp_path_factory.mktemp("shop")
    features = ["sequence", "co_occurrence", "ease", "text", "popularity", "price", "category"]
    recipe = {
        "recipe": 1,
        "name": "shop",
        "model": {
            "base": str(tiny_base),
            "max_length": 20,
            "scratch": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
        "tasks": {
            "shop": {
                "type": "recommendation",
                "data": "bookshop",
                "recommend": {"requests": 1},
                "rank": {"features": features, "candidates": 20},
            }
        },
        "train": {"epochs": 1, "precision": "float32"},
        "evaluate": {"resamples": 100, "baselines": ["popular"], "slices": []},
    }
    path = folder / "shop.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(recipe, file)
    return finetune.run(path, runs=folder / "runs", quiet=True).folder.path
