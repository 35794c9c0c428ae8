"""What the tests share: no network, one thread, a base model of a few thousand weights, and a recipe that trains on it."""

from __future__ import annotations

import os

# Before any library reads them. On a GPU sums are not bit for bit repeatable, so the tests stay on the CPU unless asked.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import csv
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
HEADLINES = ROOT / "data" / "samples" / "financial_headlines" / "headlines.csv"
KEYWORDS = {
    "negative": ["falls", "loss", "cuts", "warns", "weak", "lawsuit"],
    "neutral": ["names", "meeting", "schedule", "unchanged", "files", "moves"],
    "positive": ["gains", "beats", "raises", "record", "wins", "strong"],
}
WORDS = 600
ROWS_PER_CLASS = 30

torch.set_num_threads(1)


def read_headline_words() -> list[str]:
    """The commonest lower-case words of the sample headlines, letters only, no keyword among them."""
    with HEADLINES.open(encoding="utf-8", newline="") as file:
        words = Counter(word for row in csv.DictReader(file) for word in row["text"].lower().split() if word.isalpha())
    keywords = {word for group in KEYWORDS.values() for word in group}
    return [word for word, _ in words.most_common(WORDS) if word.isascii() and word not in keywords]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of 2 layers x 32, random but the same every time, and a WordPiece tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "base"
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    keywords = [word for group in KEYWORDS.values() for word in group]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *keywords])
    vocabulary = list(pieces | dict.fromkeys(read_headline_words()))
    tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(vocabulary)}, model_max_length=64)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows_per_class: int = ROWS_PER_CLASS) -> Path:
    """A CSV of text and label: headline words in random order, with two keywords that give the class away."""
    generator = np.random.default_rng(7)
    words = np.array(read_headline_words())
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows_per_class):
            for label, keywords in KEYWORDS.items():
                filler = generator.choice(words, size=int(generator.integers(3, 12)), replace=False)
                chosen = generator.choice(keywords, size=2, replace=False)
                writer.writerow([" ".join(generator.permutation([*filler, *chosen])), label])
    return path


def merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries key by key; anything else is replaced."""
    for key, change in changes.items():
        both = isinstance(change, Mapping) and isinstance(values.get(key), dict)
        values[key] = merge(values[key], change) if both else change
    return values


@pytest.fixture(scope="session")
def write_recipe(tiny_base: Path) -> Callable[..., Path]:
    """A function (folder, **changes) -> recipe.yaml, with its rows.csv beside it.

    A change replaces a key of the recipe; a dictionary is merged: `write_recipe(folder, train={"epochs": 1})`.
    """

    def write(folder: Path, **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "rows.csv")
        recipe: dict[str, Any] = {
            "recipe": 1,
            "name": "tiny",
            "model": {"base": str(tiny_base), "max_length": 32},
            "adapter": {"method": "lora", "rank": 4, "alpha": 8},
            "tasks": {
                "tone": {
                    "type": "text_classification",
                    "data": "rows.csv",
                    "columns": {"text": "text", "label": "label"},
                    "labels": list(KEYWORDS),
                }
            },
            "train": {"epochs": 2, "tokens_per_batch": 128, "learning_rate": 0.01, "precision": "float32"},
            "evaluate": {"resamples": 100, "baselines": ["majority"]},
        }
        path = folder / "recipe.yaml"
        with path.open("w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump(merge(recipe, changes), file)
        return path

    return write
