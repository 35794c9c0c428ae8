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
