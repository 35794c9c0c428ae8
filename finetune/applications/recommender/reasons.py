"""Why an item is recommended: what the features add to its score, and what the person had that they come from.

The trees say how much each feature adds (SHAP values). A feature that adds something is then dealt out to the items of
the history in proportion to what each of them gives it: its co-occurrence with the recommended item, how alike the
texts are, and so on, the older the less. Only the features that are named to people give such reasons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune.applications.recommender.records import SHOWN_FEATURES, Because
from finetune.data.interactions import Catalogue
from finetune.evaluation.counting import Numbers, Scores
from finetune.tasks.items import Counts, normalize
from finetune.tasks.ranker import LAST_EVENTS

DECAY = 0.8
"""Of the weight of an item of the history, with each event that is newer: the ranker's middle one."""
MATRICES = {"co_occurrence": "follows 20", "ease": "ease"}
"""Feature -> the counts that deal it out."""
MAX_REASONS = 2
LEAST_SHARE = 0.2
"""Of what speaks for a recommended item: less is no reason."""
SEQUENCE_ALONE: Mapping[str, float] = {"sequence": 1.0}


@dataclass(frozen=True)
class Reasons:
    """What is needed to give reasons.

    Args:
        catalogue: I items.
        counts: as the ranker sees them.
        item_vectors: of the sequence model, (I, D).
        texts: vectors of length 1 of the items' texts, (I, S); None where it reads none.
    """

    catalogue: Catalogue
    counts: Counts
    item_vectors: npt.NDArray[np.float32]
    texts: npt.NDArray[np.float32] | None

    def find(
        self, history: Numbers, items: Numbers, features: Sequence[Mapping[str, float]]
    ) -> list[tuple[Because, ...]]:
        """What speaks for each item, the strongest first.

        Args:
            history: numbers of items, oldest first.
            items: (N,) recommended.
            features: of each, what adds how much to its score, the largest first; `SEQUENCE_ALONE` for one that has no
                other stage.
        """
        if not len(history) or not len(items):
            return [()] * len(items)
        recent = history[-LAST_EVENTS:]
        had, place = np.unique(recent, return_inverse=True)
        weights = np.bincount(place, DECAY ** np.arange(len(recent) - 1, -1, -1)).astype(np.float32)
        parts = {
            name: _deal_out(weights[:, None] * np.maximum(values, 0))
            for name, values in self._compare(had, items).items()
        }
        return [self._list(had, column, parts, own) for column, own in enumerate(features)]

    def _compare(self, had: Numbers, items: Numbers) -> dict[str, Scores]:
        """What items that a person had, (H,), give each recommended one, (N,), by feature: (H, N)."""
        found = {
            "sequence": normalize(self.item_vectors[had]) @ normalize(self.item_vectors[items]).T,
            "repeats": (had[:, None] == items).astype(np.float32),
        }
        for name, matrix in MATRICES.items():
            found[name] = self.counts.matrices[matrix][had][:, items].toarray()
        if self.texts is not None:
            found["text"] = self.texts[had] @ self.texts[items].T
        return found

    def _list(
        self, had: Numbers, column: int, parts: Mapping[str, Scores], features: Mapping[str, float]
    ) -> tuple[Because, ...]:
        """For one recommended item."""
        carried = [name for name, value in features.items() if value > 0][:SHOWN_FEATURES]
        adding = {name: features[name] for name in carried if name in parts and parts[name][:, column].any()}
        if not adding:
            return ()
        weights = np.array(list(adding.values())) / sum(adding.values())
        total = np.column_stack([parts[name][:, column] for name in adding]) @ weights  # (H,)
        found: list[Because] = []
        for row in np.argsort(-total, kind="stable")[:MAX_REASONS].tolist():
            if total[row] < LEAST_SHARE and found:
                break
            shares = {name: round(float(parts[name][row, column]), 4) for name in adding}
            through = {name: share for name, share in sorted(shares.items(), key=lambda pair: -pair[1]) if share > 0}
            found.append(Because(self.catalogue.ids[had[row]], self.catalogue.texts[had[row]], through))
        return tuple(found)


def _deal_out(values: Scores) -> Scores:
    """Columns that sum to 1, or to 0."""
    sums = values.sum(axis=0, keepdims=True)
    dealt: Scores = np.divide(values, sums, out=np.zeros_like(values), where=sums > 0)
    return dealt
