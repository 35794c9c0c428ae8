"""Recipes of the three language tasks, on sentences that a few thousand weights can learn something about."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

GERMAN = {
    "the dog": "der Hund",
    "a cat": "eine Katze",
    "my friend": "mein Freund",
    "this child": "dieses Kind",
    "your sister": "deine Schwester",
    "sees": "sieht",
    "likes": "mag",
    "draws": "malt",
    "a house": "ein Haus",
    "an apple": "einen Apfel",
    "the old bridge": "die alte Brücke",
    "two trees": "zwei Bäume",
    "in Spring": "im Frühling",
    "today": "heute",
    "every Sunday": "jeden Sonntag",
}
PARTS = [list(GERMAN)[start:stop] for start, stop in ((0, 5), (5, 8), (8, 12), (12, 15))]
"""Who does what to whom and when: 180 sentences."""


def draw_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """English sentences and their German, none twice."""
    places = np.random.default_rng(seed).permutation(np.prod([len(part) for part in PARTS]))[:count]
    chosen = np.stack(np.unravel_index(places, [len(part) for part in PARTS]), axis=1)
    sentences = [[part[i] for part, i in zip(PARTS, row, strict=True)] for row in chosen]
    return [(" ".join(words) + ".", " ".join(GERMAN[word] for word in words) + ".") for words in sentences]


def write_language_rows(folder: Path, kind: str, seed: int = 7) -> Path:
    """80 pairs as a CSV for seq2seq, else 40 paragraphs of two sentences each as plain text."""
    pairs = draw_pairs(80, seed)
    if kind == "seq2seq":
        path = folder / "pairs.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("en", "de"), *pairs])
        return path
    path = folder / "notes.txt"
    english = [one for one, _ in pairs]
    paragraphs = [" ".join(english[i : i + 2]) for i in range(0, len(english), 2)]
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def write_language_recipe() -> Callable[..., Path]:
    """A function (folder, kind, *changes) -> recipe.yaml, with its rows beside it.

    Each change is a dictionary that is merged, as `write_recipe` does it.
    """

    def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        for key, change in changes.items():
            both = isinstance(change, dict) and isinstance(values.get(key), dict)
            values[key] = merge(values[key], change) if both else change
        return values

    def write(folder: Path, kind: str, *changes: dict[str, Any]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        rows = write_language_rows(folder, kind)
        size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        size |= {"vocab_size": 64, "tokenizer": "characters"} if kind == "causal_lm" else {"vocab_size": 300}
        task: dict[str, Any] = {"type": kind, "data": rows.name}
        if kind == "seq2seq":
            task["columns"] = {"text": "en", "target": "de"}
        recipe: dict[str, Any] = {
            "recipe": 1,
            "name": kind,
            "model": {"base": "scratch", "max_length": 40, "dropout": 0.1, "scratch": size},
            "tasks": {"only": task | ({"separator": "\n\n"} if kind == "causal_lm" else {})},
            "train": {
                "epochs": 8,
                "tokens_per_batch": 320,
                "learning_rate": 0.02,
                "ema_decay": 0.9,
                "precision": "float32",
            },
            "evaluate": {"resamples": 100, "samples": 2, "generate": {"max_new_tokens": 24}},
        }
        for change in changes:
            merge(recipe, change)
        path = folder / "recipe.yaml"
        with path.open("w", encoding="utf-8") as file:
            YAML().dump(recipe, file)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 of 1 layer x 32, and a tokenizer of characters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from finetune.models.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("gpt2") / "base"
    tokenizer = train_tokenizer([*GERMAN, *GERMAN.values(), ". \n"], "characters", 64, 64, appends_end=False)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3, pad_token_id=0, **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
