"""Knowledge entries that are found by words and by meaning, and then read by the model in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from finetune.applications.support.links import Links, load_links, save_links
from finetune.applications.support.reader import Floats, Reader, Reading
from finetune.applications.support.relevance import Relevance, collect_evidence, compute_shares
from finetune.artifact.run_folder import load_json, save_json
from finetune.data.knowledge import Entry, load_knowledge, save_knowledge
from finetune.data.ranking import LexicalIndex, fuse_rankings
from finetune.data.turns import CUSTOMER
from finetune.errors import ResourceError, UsageError
from finetune.recipe.files import compute_sha256, write_file_atomically

NEAREST, RERANKED = 3, 4
"""How many entries the model reads in full for each question, which takes most of the time of a reply, and how many of
them are the nearest by meaning; the others are the first by all rankings together."""

FUSED = 100
"""How many entries each ranking puts forward."""

_KNOWLEDGE, _FEATURES, _LINKS, _INDEX = "knowledge.jsonl", "features.safetensors", "links.json", "index.json"
BUILD_AGAIN = "Build it in Python: finetune.applications.support.build.build_assistant(RUN)"


@dataclass(frozen=True, slots=True)
class Found:
    """An entry, and the probability that it answers the question."""

    entry: Entry
    score: float


class KnowledgeIndex:
    """E entries and their features.

    Args:
        entries: with ids that differ.
        features: (E, D), each of length 1.
        fingerprint: of the model that made the features.
        links: which intents ask for which entries.
    """

    def __init__(self, entries: Sequence[Entry], features: Floats, fingerprint: str, links: Links) -> None:
        self.entries = list(entries)
        self.features = features
        self.fingerprint = fingerprint
        self.links = links
        self._places = links.align([entry.id for entry in self.entries])
        self._lexical = LexicalIndex([entry.passage for entry in self.entries])

    @classmethod
    def build(
        cls,
        entries: Sequence[Entry],
        reader: Reader,
        known: KnowledgeIndex | None = None,
        links: Links | None = None,
    ) -> KnowledgeIndex:
        """Read the entries with the model.

        Args:
            entries: at least one.
            reader: the model.
            known: an index of the same model, whose features are kept for passages that did not change, and its links
                for entries that answer the same question: with the id and the title of one before.
            links: which intents ask for which entries; None for those of `known`.
        """
        same = known is not None and known.fingerprint == reader.fingerprint
        kept = (
            {entry.passage: row for entry, row in zip(known.entries, known.features, strict=True)}
            if known and same
            else {}
        )
        new = list(dict.fromkeys(entry.passage for entry in entries if entry.passage not in kept))
        if new:
            kept |= dict(zip(new, np.asarray(reader.embed(new), dtype=np.float32), strict=True))
        if links is None:
            links = known.links if known and same else Links.count(reader.intents, [])
            before = {entry.id: entry.title or entry.text for entry in known.entries} if known and same else {}
            links = links.keep([entry.id for entry in entries if before.get(entry.id) == (entry.title or entry.text)])
        return cls(entries, np.stack([kept[entry.passage] for entry in entries]), reader.fingerprint, links)

    def find(
        self, text: str, context: str, reading: Reading, reader: Reader, relevance: Relevance | None = None
    ) -> list[Found]:
        """The entries that answer best, best first, at most `RERANKED`.

        Args:
            text: the question.
            context: the dialogue before it.
            reading: what the model makes of the text.
            reader: reads the first few.
            relevance: weighs what speaks for them; None for the reader's word alone.
        """
        weights = relevance or Relevance()
        first, evidence = self.examine(text, context, reading, reader if weights.reread else None)
        scores = weights.compute_probabilities(evidence)
        if weights.unlinked:
            unlinked = weights.unlinked.compute_probabilities(evidence)
            scores = np.where(self._places[first] < 0, unlinked, scores)
        best = np.argsort(-scores, kind="stable")
        return [Found(self.entries[first[place]], float(scores[place])) for place in best]

    def examine(
        self, text: str, context: str, reading: Reading, reader: Reader | None
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """The numbers of the first few entries, (n,), and what speaks for each, (n, 5); see `collect_evidence`.

        These are the nearest by meaning, and the first where the rankings by words (BM25) and by meaning are fused by
        reciprocal ranks. The `reader` takes a second look at them; None where that has no weight.
        Where there is a context, the customer's turn before this one is a third ranking: "and for the other card?"
        shares no word with what it asks for.
        """
        dense = self._compare(reading)
        turns = [text, *find_last_customer_turn(context)]
        rankings = [dense, *(self._rank_by_words(question, dense) for question in turns)]
        # An entry that is far down in every ranking cannot come first: only the tops are sorted.
        tops = np.unique(np.concatenate([_find_largest(scores, FUSED) for scores in rankings]))
        fused = fuse_rankings([scores[tops] for scores in rankings])
        nearest = tops[np.argsort(-dense[tops], kind="stable")[:NEAREST]]
        others = tops[np.argsort(-fused, kind="stable")]
        first = np.concatenate([nearest, others[~np.isin(others, nearest)]])[:RERANKED]
        reread: npt.ArrayLike = np.full(len(first), 0.5)
        if reader is not None:
            reread = reader.rerank(text, context, [self.entries[index].passage for index in first])
        asked = self.links.weigh_entries(reading.scores, self._places[first])
        return first, collect_evidence(dense, self._lexical.compute_scores(text), asked, first, reread)

    def weigh_intents(self, reading: Reading) -> Floats:
        """The probabilities of the intents, by the model's word and by the entries that its vector finds, (K,)."""
        return self.links.weigh_intents(reading.scores, self.compute_shares(reading), self._places)

    def collect_intent_evidence(self, reading: Reading) -> npt.NDArray[np.float64]:
        """What speaks for each intent, (K, 2); see `Links.collect_evidence`."""
        return self.links.collect_evidence(reading.scores, self.compute_shares(reading), self._places)

    def compute_shares(self, reading: Reading) -> npt.NDArray[np.float64]:
        """The share of each entry in what was found by meaning, (E,)."""
        return compute_shares(self._compare(reading))

    def _compare(self, reading: Reading) -> Floats:
        """Likeness of a message to each entry, (E,).

        Not by `@`: numpy's BLAS has threads of its own, which go on spinning beside the model's and made one message in
        thirteen wait 60 ms for a core.
        """
        likeness: Floats = np.einsum("ed,d->e", self.features, reading.features)
        return likeness

    def save(self, folder: Path) -> None:
        """Write knowledge, features, links and what they belong to; a crash in between leaves an index that is
        refused."""
        folder.mkdir(parents=True, exist_ok=True)
        save_links(folder / _LINKS, self.links)
        save_knowledge(self.entries, folder / _KNOWLEDGE)
        write_file_atomically(folder / _FEATURES, save_tensors({"features": np.ascontiguousarray(self.features)}))
        sha256 = compute_sha256(folder / _KNOWLEDGE)
        save_json(
            folder / _INDEX, {"model": self.fingerprint, "entries": len(self.entries), "knowledge_sha256": sha256}
        )

    @classmethod
    def load(cls, folder: Path, reader: Reader) -> KnowledgeIndex:
        """Read what `save` wrote.

        Raises:
            UsageError: the index is of another model or of other entries.
            ResourceError: a file is missing or damaged.
        """
        missing = [name for name in (_INDEX, _KNOWLEDGE, _FEATURES, _LINKS) if not (folder / name).is_file()]
        if missing:
            raise ResourceError(f"{folder}: must hold an index, got no {', '.join(missing)}. {BUILD_AGAIN}")
        about = load_json(folder / _INDEX)
        if about.get("model") != reader.fingerprint:
            raise UsageError(
                f"{folder}: the index must be built by this model, {reader.fingerprint[:12]}, got one of "
                f"{str(about.get('model'))[:12]}. {BUILD_AGAIN}"
            )
        entries = load_knowledge(str(folder / _KNOWLEDGE))
        features = _load_features(folder / _FEATURES)
        if not len(entries) == len(features) == about.get("entries"):
            raise UsageError(
                f"{folder}: the index must have as many features as entries, got {len(features):,} features, "
                f"{len(entries):,} entries, and {about.get('entries')} when it was built. {BUILD_AGAIN}"
            )
        if about.get("knowledge_sha256") != compute_sha256(folder / _KNOWLEDGE):
            raise UsageError(
                f"{folder / _KNOWLEDGE}: must be what the index was built from, got other text. {BUILD_AGAIN}"
            )
        return cls(entries, features, reader.fingerprint, load_links(folder / _LINKS, reader.intents))

    def _rank_by_words(self, question: str, dense: Floats) -> Floats:
        """BM25; entries that share no word follow by meaning, for their order in the file says nothing."""
        scores = self._lexical.compute_scores(question)
        return np.where(scores > 0, scores, dense - 2)


def find_last_customer_turn(context: str) -> list[str]:
    """The newest of the customer's lines in a context, without the speaker; empty where there is none."""
    lines = [line.removeprefix(CUSTOMER) for line in context.splitlines() if line.startswith(CUSTOMER)]
    return lines[-1:]


def _find_largest(scores: Floats, count: int) -> npt.NDArray[np.intp]:
    """The places of the largest scores, in any order."""
    if count >= len(scores):
        return np.arange(len(scores))
    return np.argpartition(-scores, count)[:count]


def _load_features(path: Path) -> Floats:
    try:
        features: Floats = load_tensors(path.read_bytes())["features"]
    except (SafetensorError, KeyError, OSError) as error:
        raise ResourceError(f"{path}: must hold features, got a damaged file ({error}). {BUILD_AGAIN}") from None
    if features.ndim != 2 or features.dtype != np.float32 or not np.isfinite(features).all():
        raise ResourceError(f"{path}: must hold finite float32 features, got others. {BUILD_AGAIN}")
    return features
