"""Which intents ask for which entries: each of the two says something about the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.applications.support.reader import Floats
from finetune.artifact.run_folder import load_json, save_json
from finetune.errors import ResourceError

Numbers = npt.NDArray[np.float64]

UNSEEN = 0.05
"""Messages that are added to every count: what was never asked may be asked."""
LEAST = 1e-6
"""Probabilities are not taken as smaller, for their logarithms are summed."""


@dataclass(frozen=True)
class Links:
    """How often training messages of an intent asked for an entry.

    Args:
        intents: K of them, as the model orders them.
        entries: the ids of the entries that were asked for, L of them.
        counts: (K, L).
        own, linked: exponents of the model's own probabilities of the intents, and of those that the entries found
            suggest, in their product. As they stand the model's word is all.
    """

    intents: Sequence[str]
    entries: Sequence[str]
    counts: Numbers
    own: float = 1.0
    linked: float = 0.0

    @classmethod
    def count(cls, intents: Sequence[str], messages: Iterable[tuple[str | None, Iterable[str]]]) -> Links:
        """Count messages, each with its intent (None out of scope) and the ids of the entries that answer it."""
        pairs = [(intent, entry) for intent, entries in messages if intent is not None for entry in entries]
        known = sorted({entry for _, entry in pairs})
        rows, columns = ({name: place for place, name in enumerate(names)} for names in (intents, known))
        counts = np.zeros((len(intents), len(known)))
        for intent, entry in pairs:
            counts[rows[intent], columns[entry]] += 1
        return cls(intents, known, counts)

    def keep(self, entries: Collection[str]) -> Links:
        """The links of some of the entries."""
        kept = [place for place, entry in enumerate(self.entries) if entry in entries]
        return replace(self, entries=[self.entries[place] for place in kept], counts=self.counts[:, kept])

    def align(self, entries: Sequence[str]) -> npt.NDArray[np.intp]:
        """Where each of E entries stands among those that were asked for, (E,); -1 for a new one."""
        return np.array([self._columns.get(entry, -1) for entry in entries], dtype=np.intp)

    def weigh_entries(self, scores: Floats, places: npt.NDArray[np.intp]) -> Numbers:
        """How likely each entry is asked for, by the intents alone.

        Args:
            scores: probabilities of the intents, (K,).
            places: of the entries, (n,), as `align` gives them. A new entry gets an even share.

        Returns:
            The logarithm of each one's share among all that were asked for, (n,).
        """
        even = 1 / max(1, len(self.entries))
        shares = np.append(scores @ self._entries_of_intents, even)
        return np.asarray(np.log(np.maximum(shares[places], LEAST)))

    def weigh_intents(self, scores: Floats, shares: Numbers, places: npt.NDArray[np.intp]) -> Floats:
        """The probabilities of the intents, by the model and by the entries that it finds, (K,).

        Args:
            scores: as the model gives them, (K,).
            shares: of all entries in what was found, (E,), which sum to 1.
            places: of these entries, (E,). New ones speak for every intent alike.
        """
        logits = self.collect_evidence(scores, shares, places) @ [self.own, self.linked]
        weights = np.exp(logits - logits.max())
        return np.asarray(weights / weights.sum(), dtype=np.float32)

    def collect_evidence(self, scores: Floats, shares: Numbers, places: npt.NDArray[np.intp]) -> Numbers:
        """Logarithms of both probabilities of each intent, (K, 2); arguments as in `weigh_intents`."""
        count = len(self.intents)
        known = np.bincount(places[places >= 0], shares[places >= 0], minlength=len(self.entries))
        suggested = self._intents_of_entries @ known + shares[places < 0].sum() / count
        return np.asarray(np.log(np.maximum(np.column_stack([scores, suggested]), LEAST)))

    def to_json(self) -> dict[str, Any]:
        """Inverse of `load_links`."""
        return {
            "intents": list(self.intents),
            "entries": list(self.entries),
            "counts": self.counts.astype(int).tolist(),
            "own": self.own,
            "linked": self.linked,
        }

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {entry: place for place, entry in enumerate(self.entries)}

    @cached_property
    def _entries_of_intents(self) -> Numbers:
        """(K, L), rows sum to 1."""
        padded = self.counts + UNSEEN
        return np.asarray(padded / padded.sum(axis=1, keepdims=True))

    @cached_property
    def _intents_of_entries(self) -> Numbers:
        """(K, L), columns sum to 1."""
        padded = self.counts + UNSEEN
        return np.asarray(padded / padded.sum(axis=0, keepdims=True))


def fit_exponents(evidence: Sequence[Numbers], truth: Sequence[int]) -> tuple[float, float]:
    """The exponents under which the intents of validation messages are likeliest: a conditional logit.

    Args:
        evidence: of each message, (K, 2), as `collect_evidence` gives it.
        truth: the place of each one's intent.

    Returns:
        `own` and `linked`, neither below 0; (1, 0) without messages.
    """
    from scipy.optimize import minimize

    if not truth:
        return 1.0, 0.0
    stacked, rows = np.stack(evidence), np.arange(len(truth))  # (N, K, 2)

    def compute_loss(exponents: Numbers) -> float:
        logits = stacked @ exponents
        peaks = logits.max(axis=1)
        return float(np.mean(peaks + np.log(np.exp(logits - peaks[:, None]).sum(axis=1)) - logits[rows, truth]))

    found = minimize(compute_loss, [1.0, 0.0], bounds=[(0.0, 10.0), (0.0, 10.0)], method="L-BFGS-B")
    own, linked = map(float, found.x)
    return own, linked


def save_links(path: Path, links: Links) -> None:
    """Write them as JSON."""
    save_json(path, links.to_json())


def load_links(path: Path, intents: Sequence[str]) -> Links:
    """Read what `save_links` wrote.

    Raises:
        ResourceError: the file is damaged, or speaks of other intents.
    """
    found = load_json(path)
    try:
        links = Links(
            found["intents"], found["entries"], np.array(found["counts"], float), found["own"], found["linked"]
        )
        whole = links.counts.shape == (len(links.intents), len(links.entries)) and np.isfinite(links.counts).all()
        good = whole and links.intents == list(intents) and bool(np.isfinite([links.own, links.linked]).all())
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ResourceError(
            f"{path}: must hold counts of this model's intents and entries, got others. Build the assistant again."
        )
    return links
