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

from finetune.applications.support.reader import Floats, Reader
from finetune.applications.support.relevance import Relevance, collect_evidence
from finetune.artifact.run_folder import load_json, save_json
from finetune.data.knowledge import Entry, load_knowledge, save_knowledge
from finetune.data.ranking import LexicalIndex, fuse_rankings
from finetune.errors import ResourceError, UsageError
from finetune.recipe.files import compute_sha256, write_file_atomically

RERANKED = 8
"""How many entries the model reads in full for each question: nearly all of the time of a reply."""

FUSED = 100
"""How many entries each ranking puts forward."""

_KNOWLEDGE, _FEATURES, _INDEX = "knowledge.jsonl", "features.safetensors", "index.json"


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
    """

    def __init__(self, entries: Sequence[Entry], features: Floats, fingerprint: str) -> None:
        self.entries = list(entries)
        self.features = features
        self.fingerprint = fingerprint
        self._lexical = LexicalIndex([entry.passage for entry in self.entries])

    @classmethod
    def build(cls, entries: Sequence[Entry], reader: Reader, known: KnowledgeIndex | None = None) -> KnowledgeIndex:
        """Read the entries with the model.

        Args:
            entries: at least one.
            reader: the model.
            known: an index of the same model, whose features are kept for passages that did not change.
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
        return cls(entries, np.stack([kept[entry.passage] for entry in entries]), reader.fingerprint)

    def find(
        self, text: str, context: str, features: Floats, reader: Reader, relevance: Relevance | None = None
    ) -> list[Found]:
        """The entries that answer best, best first, at most `RERANKED`.

        Args:
            text: the question.
            context: the dialogue before it.
            features: of the text, (D,).
            reader: reads the first few.
            relevance: weighs what speaks for them; None for the reader's word alone.
        """
        first, evidence = self.examine(text, context, features, reader)
        scores = (relevance or Relevance()).compute_probabilities(evidence)
        best = np.argsort(-scores, kind="stable")
        return [Found(self.entries[first[place]], float(scores[place])) for place in best]

    def examine(
        self, text: str, context: str, features: Floats, reader: Reader
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """The numbers of the first few entries, (n,), and what speaks for each, (n, 3); see `collect_evidence`.

        The rankings by words (BM25) and by meaning are fused by reciprocal ranks; the model then reads the first few.
        Where there is a context, the customer's turn before this one is a third ranking: "and for the other card?"
        shares no word with what it asks for.
        """
        dense = self.features @ features  # (E,)
        asked = [text, *find_last_customer_turn(context)]
        rankings = [dense, *(self._rank_by_words(question, dense) for question in asked)]
        # An entry that is far down in every ranking cannot come first: only the tops are sorted.
        tops = np.unique(np.concatenate([_find_largest(scores, FUSED) for scores in rankings]))
        fused = fuse_rankings([scores[tops] for scores in rankings])
        first = tops[np.argsort(-fused, kind="stable")[:RERANKED]]
        reread = reader.rerank(text, context, [self.entries[index].passage for index in first])
        return first, collect_evidence(dense, first, reread)

    def save(self, folder: Path) -> None:
        """Write knowledge, features and what they belong to; a crash in between leaves an index that is refused."""
        folder.mkdir(parents=True, exist_ok=True)
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
        missing = [name for name in (_INDEX, _KNOWLEDGE, _FEATURES) if not (folder / name).is_file()]
        if missing:
            raise ResourceError(f"{folder}: must hold an index, got no {', '.join(missing)}. {_BUILD_AGAIN}")
        about = load_json(folder / _INDEX)
        if about.get("model") != reader.fingerprint:
            raise UsageError(
                f"{folder}: the index must be built by this model, {reader.fingerprint[:12]}, got one of "
                f"{str(about.get('model'))[:12]}. {_BUILD_AGAIN}"
            )
        entries = load_knowledge(str(folder / _KNOWLEDGE))
        features = _load_features(folder / _FEATURES)
        if not len(entries) == len(features) == about.get("entries"):
            raise UsageError(
                f"{folder}: the index must have as many features as entries, got {len(features):,} features, "
                f"{len(entries):,} entries, and {about.get('entries')} when it was built. {_BUILD_AGAIN}"
            )
        if about.get("knowledge_sha256") != compute_sha256(folder / _KNOWLEDGE):
            raise UsageError(
                f"{folder / _KNOWLEDGE}: must be what the index was built from, got other text. {_BUILD_AGAIN}"
            )
        return cls(entries, features, reader.fingerprint)

    def _rank_by_words(self, question: str, dense: Floats) -> Floats:
        """BM25; entries that share no word follow by meaning, for their order in the file says nothing."""
        scores = self._lexical.compute_scores(question)
        return np.where(scores > 0, scores, dense - 2)


_BUILD_AGAIN = "Build it again: --knowledge with the file of entries."


def find_last_customer_turn(context: str) -> list[str]:
    """The newest of the customer's lines in a context, without the speaker; empty where there is none."""
    lines = [line.removeprefix("Customer: ") for line in context.splitlines() if line.startswith("Customer: ")]
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
        raise ResourceError(f"{path}: must hold features, got a damaged file ({error}). {_BUILD_AGAIN}") from None
    if features.ndim != 2 or features.dtype != np.float32 or not np.isfinite(features).all():
        raise ResourceError(f"{path}: must hold finite float32 features, got others. {_BUILD_AGAIN}")
    return features
