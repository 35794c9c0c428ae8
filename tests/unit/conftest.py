"""A model and a problem so small that the loop can be followed weight by weight, and a reader of report pages."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune.data.batches import Examples
from finetune.recipe.schema import TrainSection
from finetune.tasks.text_classification import TextClassification
from finetune.training.loop import Problem, fit
from finetune.training.session import LoopState, Session, build_session


class TinyClassifier(torch.nn.Module):
    """A bag of words with one hidden layer: everything that the loop asks of a model, in 300 weights."""

    def __init__(self, classes: int = 3, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(20, 8)
        self.dropout = torch.nn.Dropout(dropout)
        self.hidden = torch.nn.Linear(8, 8)
        self.classifier = torch.nn.Linear(8, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        mask = attention_mask[..., None].to(self.embedding.weight.dtype)
        pooled = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)  # (B, D)
        return SimpleNamespace(logits=self.classifier(self.dropout(torch.tanh(self.hidden(pooled)))))


class TinyTraining:
    """`fit` with everything around it, in a folder of its own."""

    task = TextClassification(["a", "b", "c"], {})

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def build_examples(rows: int, seed: int) -> Examples:
        """Rows of 2 to 9 tokens; the first one is 1 + class, the classes are 3 : 2 : 1."""
        generator = np.random.default_rng(seed)
        labels = np.array([0, 0, 0, 1, 1, 2])[generator.integers(6, size=rows)]
        encoded = [[1 + label, *generator.integers(4, 20, size=generator.integers(1, 9))] for label in labels]
        return Examples.build(encoded, labels.tolist())

    def build_problem(self, **changes: Any) -> Problem:
        train = self.build_examples(40, seed=1)
        problem = Problem(
            train=train,
            validation=self.build_examples(20, seed=2),
            row_weights=np.ones(len(train), dtype=np.float32),
            compute_losses=lambda model, batch: self.task.compute_losses(model, batch, 0.0),
            compute_metrics=partial(self.task.compute_metrics, names=["macro_f1"]),
            is_larger_better=lambda name: name != "loss",
            head=["classifier"],
            pad_token_id=0,
        )
        return replace(problem, **changes)

    @staticmethod
    def build_section(**changes: Any) -> TrainSection:
        values = {"epochs": 2, "tokens_per_batch": 40, "learning_rate": 0.02, "precision": "float32"}
        return TrainSection(**{**values, "early_stop": None, "ema_decay": None, **changes})

    def open_session(self, section: TrainSection, run: str = "run") -> closing[Session]:
        return closing(build_session(section, self.root / run, section.precision))

    def fit(
        self, model: torch.nn.Module, problem: Problem | None = None, run: str = "run", **changes: Any
    ) -> tuple[LoopState, dict[str, torch.Tensor]]:
        """Train, or go on with the run of that name; returns the final state and weights."""
        section = self.build_section(**changes)
        with self.open_session(section, run) as session:
            state = fit(model, problem or self.build_problem(), section, session, quiet=True)
        return state, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def tiny_classifier() -> type[TinyClassifier]:
    """The class, to build as many as a test needs."""
    return TinyClassifier


@pytest.fixture
def training(tmp_path: Path) -> TinyTraining:
    """Problems, sections, sessions and `fit` for a `tiny_classifier`."""
    return TinyTraining(tmp_path)


class Page(HTMLParser):
    """Reads a page, or a part of one, and fails on a tag that is closed in the wrong place or a number that is none."""

    VOID = ("meta", "link", "br", "img", "input", "hr", "wbr")
    GEOMETRY = (
        *("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height"),
        *("d", "dx", "rx", "fill-opacity", "viewbox"),
    )

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        for _, attributes in self.tags:
            for key in self.GEOMETRY:
                assert not re.search(r"nan|inf|None|e[+]?\d\d\d", attributes.get(key) or "", re.IGNORECASE)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        """All words, one space between them."""
        return re.sub(r"\s+", " ", " ".join(self.words))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each tag of that name."""
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    """`read_page(html)` gives the page's text and tags."""
    return Page
