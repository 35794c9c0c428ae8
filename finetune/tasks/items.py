"""What a ranker knows of items: what was counted of them before a cut, and their texts and columns.

Shapes: I items, S width of the texts' vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from finetune.data.interactions import Catalogue
from finetune.evaluation.counting import (
    DAY,
    NEIGHBOURS,
    Events,
    Matrix,
    Scores,
    count_ease,
    count_following,
    count_preceding,
    keep_strongest,
)

WINDOWS = (1, 5, 20)
RECENT_DAYS = (7, 30, 180)
WEEK = RECENT_DAYS[0]
"""Of what is popular in the place of a list, where nothing is known of a person."""
WEIGHTED = "weighted"
EASE_PENALTY = 200.0
PRIOR_PEOPLE = 5


@dataclass(frozen=True)
class Counts:
    """What was counted before a cut.

    Args:
        matrices: name -> items by items, CSR (I, I): `follows <window>`, `precedes`, `ease`.
        vectors: name -> (I,) float32: `popularity`, `popularity <days>`, `again`, the share of its people who had it
            more than once, `age`, days since its first event, nan where there was none; and where events have weights
            `weighted`, their sum over the last week.
    """

    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, Scores]

    @classmethod
    def fit(cls, events: Events) -> Counts:
        """Count events that all lie before `events.now`."""
        followed = {f"follows {window}": count_following(events, window) for window in WINDOWS}
        followed["precedes"] = count_preceding(events, WINDOWS[1])
        matrices = {name: keep_strongest(matrix, NEIGHBOURS) for name, matrix in followed.items()}
        matrices["ease"] = count_ease(events, EASE_PENALTY, NEIGHBOURS)
        first = np.full(events.items, np.inf)
        np.minimum.at(first, events.item, events.time)
        age = np.where(np.isfinite(first), (events.now - first) / DAY, np.nan)
        plain = replace(events, weight=None)
        vectors = {"popularity": plain.count(), "age": age.astype(np.float32), "again": _count_again(events)}
        vectors |= {f"popularity {days}": plain.count(events.now - days * DAY) for days in RECENT_DAYS}
        if events.weight is not None:
            vectors[WEIGHTED] = events.count(events.now - WEEK * DAY)
        return cls(matrices, vectors)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """As named arrays, for a safetensors file."""
        arrays: dict[str, npt.NDArray[Any]] = dict(self.vectors)
        for name, matrix in self.matrices.items():
            parts = {"data": np.float32, "indices": np.int32, "indptr": np.int64}
            arrays |= {f"{name}/{part}": getattr(matrix, part).astype(kind) for part, kind in parts.items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Counts:
        """Inverse of `to_arrays`."""
        names = dict.fromkeys(name.rpartition("/")[0] for name in arrays if "/" in name)
        size = len(arrays["age"])
        matrices = {
            name: sparse.csr_matrix(
                tuple(arrays[f"{name}/{part}"] for part in ("data", "indices", "indptr")), shape=(size, size)
            )
            for name in names
        }
        return cls(matrices, {name: array for name, array in arrays.items() if "/" not in name})

    def hide(self, items: npt.NDArray[np.bool_]) -> Counts:
        """As if nobody ever had some of the items, (I,) true."""
        keep = sparse.diags((~items).astype(np.float32))
        vectors = {
            name: np.where(items, np.float32(np.nan if name == "age" else 0), vector)
            for name, vector in self.vectors.items()
        }
        return Counts({name: (keep @ matrix @ keep).tocsr() for name, matrix in self.matrices.items()}, vectors)

    def extend(self, count: int) -> Counts:
        """With so many items at the end that nothing is known of."""
        size = len(self.vectors["age"]) + count
        matrices = {}
        for name, matrix in self.matrices.items():
            indptr = np.concatenate([matrix.indptr, np.full(count, matrix.indptr[-1])])
            matrices[name] = sparse.csr_matrix((matrix.data, matrix.indices, indptr), shape=(size, size))
        missing = {"age": np.nan}
        vectors = {
            name: np.concatenate([vector, np.full(count, missing.get(name, 0.0), np.float32)])
            for name, vector in self.vectors.items()
        }
        return Counts(matrices, vectors)

    def rank_popular(self, days: int) -> Scores:
        """Events of the last so many days, one of `RECENT_DAYS`; of equals who has more at all is first, (I,)."""
        recent: Scores = self.vectors[f"popularity {days}"] + 1e-6 * self.vectors["popularity"]
        return recent

    def rank_lately(self) -> Scores:
        """What comes after an empty history: events of the last week, or their weights where they have some, (I,)."""
        if WEIGHTED not in self.vectors:
            return self.rank_popular(WEEK)
        lately: Scores = self.vectors[WEIGHTED] + 1e-6 * self.vectors["popularity"]
        return lately

    @cached_property
    def logs(self) -> dict[str, Scores]:
        """log(1 + count) of each item, (I,), for each vector of counts."""
        return {name: np.log1p(vector) for name, vector in self.vectors.items() if name.startswith("popularity")}


@dataclass(frozen=True)
class Items:
    """What is known of the items themselves.

    Args:
        catalogue: I items.
        texts: vectors of their texts of length 1, (I, S); None for a model that reads none.
    """

    catalogue: Catalogue
    texts: npt.NDArray[np.float32] | None = None

    @cached_property
    def numeric(self) -> dict[str, Scores]:
        """Column -> values (I,), nan where missing."""
        return {
            name: np.array([np.nan if value is None else value for value in values], np.float32)
            for name, values in self.catalogue.columns.items()
            if name in self.catalogue.numeric
        }

    @cached_property
    def kinds(self) -> dict[str, Matrix]:
        """Categorical column -> CSR (I, kinds): a row of ones over the number of kinds of an item; kinds of one value
        are parted by commas, as in `Comedy, Drama`."""
        found = {}
        for name, values in self.catalogue.columns.items():
            if name in self.numeric:
                continue
            parts = [[part.strip() for part in value.split(",")] if isinstance(value, str) else [] for value in values]
            numbers: dict[str, int] = {}
            pairs = [(row, numbers.setdefault(kind, len(numbers))) for row, kinds in enumerate(parts) for kind in kinds]
            weights = [1 / len(parts[row]) for row, _ in pairs]
            rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
            shape = (len(values), max(1, len(numbers)))
            found[name] = sparse.csr_matrix((np.array(weights, np.float32), (rows, columns)), shape=shape)
        return found


def _count_again(events: Events) -> Scores:
    """Share of an item's people who had it more than once, (I,); towards 0 where they are few."""
    pairs, times = np.unique(events.user * events.items + events.item, return_counts=True)
    item = pairs % events.items
    people, often = (np.bincount(item[chosen], minlength=events.items) for chosen in (times > 0, times > 1))
    return (often / (people + PRIOR_PEOPLE)).astype(np.float32)


def normalize(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows of length 1; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-9), np.float32)
