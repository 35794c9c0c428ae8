"""What the assistant asks of a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model makes of one text."""

    scores: Floats
    """Calibrated probabilities of the intents, (K,), which sum to 1."""
    outside: float
    """How much the text looks out of scope, in [0, 1]."""
    features: Floats
    """Where the text lies among the passages, (D,), of length 1."""


class Reader(Protocol):
    """A trained model as the assistant sees it.

    `context` is the dialogue before the text, as lines "Customer: ..." and "Agent: ...", newest last; often empty.
    """

    @property
    def intents(self) -> Sequence[str]:
        """The classes, K of them, in the order of the scores."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model; an index that another model built is refused."""

    def read(self, text: str, context: str) -> Reading:
        """Intent, scope and features of one text."""

    def embed(self, passages: Sequence[str]) -> Floats:
        """Features of passages, (E, D), each of length 1: the product with a text's features is their cosine."""

    def rerank(self, text: str, context: str, passages: Sequence[str]) -> Floats:
        """The probability that each passage answers the text, (n,), in [0, 1]."""


class RememberingReader:
    """A reader that reads nothing twice: the same questions are asked to weigh entries, to choose the threshold, and to
    be answered.

    Args:
        reader: the model.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._readings: dict[tuple[str, str], Reading] = {}
        self._scores: dict[tuple[str, str, tuple[str, ...]], Floats] = {}

    @property
    def intents(self) -> Sequence[str]:
        """The model's."""
        return self._reader.intents

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self._reader.fingerprint

    def read(self, text: str, context: str) -> Reading:
        """As the model does."""
        key = (text, context)
        if key not in self._readings:
            self._readings[key] = self._reader.read(text, context)
        return self._readings[key]

    def embed(self, passages: Sequence[str]) -> Floats:
        """As the model does."""
        return self._reader.embed(passages)

    def rerank(self, text: str, context: str, passages: Sequence[str]) -> Floats:
        """As the model does."""
        key = (text, context, tuple(passages))
        if key not in self._scores:
            self._scores[key] = self._reader.rerank(text, context, passages)
        return self._scores[key]
