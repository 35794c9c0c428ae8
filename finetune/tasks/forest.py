"""Trees that score many candidates at once, as LightGBM does one row after another.

QuickScorer (Lucchese et al., SIGIR 2015): each split that a row fails strikes out the leaves to its left; the first
leaf that stands in the end is the row's. A row fails a split when its value is above the threshold, so what it strikes
out in all trees follows from where the value lies among the thresholds of a feature, and is looked up. For 520
candidates and 400 trees that takes a fifth of LightGBM's own time, which was a third of what a person's list took.

Shapes: N rows, F features, T trees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.evaluation.counting import Scores

MOST_LEAVES = 16
"""Of a tree: a bit for each."""
BLOCK = 256
"""Rows whose leaves stay in the processor's cache while feature after feature strikes out some."""
EVERY = 2**MOST_LEAVES - 1
FIRST = np.array([MOST_LEAVES, *((number & -number).bit_length() - 1 for number in range(1, EVERY + 1))], np.int16)
"""Bits -> the first that is set."""


@dataclass(frozen=True)
class Forest:
    """Trees as tables.

    Args:
        thresholds: of each feature that some split asks for, ascending float32.
        features: its number.
        standing: of each, the leaves that stand in every tree, uint16 (thresholds + 2, T): in row b where b thresholds
            lie below the value, and in the last where there is no value.
        values: of the leaves, (T * 16,).
    """

    thresholds: tuple[Scores, ...]
    features: tuple[int, ...]
    standing: tuple[npt.NDArray[np.uint16], ...]
    values: npt.NDArray[np.float64]

    @classmethod
    def build(cls, trees: Any) -> Forest:
        """From LightGBM's model: of numbers only, at most 16 leaves a tree, and 0 is a value like others."""
        structures = [tree["tree_structure"] for tree in trees.dump_model()["tree_info"]]
        values = np.zeros((len(structures), MOST_LEAVES))
        splits: dict[int, list[_Split]] = {}
        for number, structure in enumerate(structures):
            leaves: list[float] = []
            for feature, split in _list_splits(structure, number, leaves):
                splits.setdefault(feature, []).append(split)
            values[number, : len(leaves)] = leaves
        features = sorted(splits)
        thresholds = [np.unique([split.threshold for split in splits[feature]]) for feature in features]
        pairs = zip(features, thresholds, strict=True)
        standing = [_build_standing(splits[feature], own, len(structures)) for feature, own in pairs]
        return cls(tuple(thresholds), tuple(features), tuple(standing), values.ravel())

    def score(self, rows: Scores) -> npt.NDArray[np.float64]:
        """Sum of each row's leaves, (N,), from features (N, F) float32; nan for a missing one."""
        count = len(self.values) // MOST_LEAVES
        columns = np.ascontiguousarray(rows.T)
        places = [self._find_places(number, columns[feature]) for number, feature in enumerate(self.features)]
        found = np.empty(len(rows))
        offsets = MOST_LEAVES * np.arange(count)
        left = np.empty((BLOCK, count), np.uint16)
        struck = np.empty_like(left)
        for start in range(0, len(rows), BLOCK):
            size = min(BLOCK, len(rows) - start)
            own, other = left[:size], struck[:size]
            own[:] = EVERY
            for place, standing in zip(places, self.standing, strict=True):
                own &= np.take(standing, place[start : start + size], axis=0, out=other, mode="clip")
            found[start : start + size] = self.values[FIRST[own] + offsets].sum(axis=1)
        return found

    def _find_places(self, number: int, values: Scores) -> npt.NDArray[np.intp]:
        """Row of `standing` for each value."""
        thresholds = self.thresholds[number]
        return np.where(np.isnan(values), len(thresholds) + 1, np.searchsorted(thresholds, values))


@dataclass(frozen=True)
class _Split:
    """A question of a tree: whether a value is at most a threshold, whether a missing one counts as if it were, and the
    bits of all leaves but those of a yes."""

    tree: int
    threshold: np.float32
    missing: bool
    others: int


def _list_splits(node: Mapping[str, Any], tree: int, leaves: list[float]) -> Iterator[tuple[int, _Split]]:
    """Splits with their features; values of the leaves from left to right go to `leaves`."""
    if "leaf_value" in node:
        leaves.append(node["leaf_value"])
        return
    first = len(leaves)
    yield from _list_splits(node["left_child"], tree, leaves)
    others = EVERY & ~((1 << len(leaves)) - (1 << first))
    yield from _list_splits(node["right_child"], tree, leaves)
    # Values are float32: what is at most a float64 is at most the float32 that it is, or that lies below it.
    with np.errstate(over="ignore"):
        threshold = np.float32(node["threshold"])
    if float(threshold) > node["threshold"]:
        threshold = np.nextafter(threshold, np.float32(-np.inf))
    # Where training saw no value missing, LightGBM takes 0 for it.
    missing = node["default_left"] if node["missing_type"] == "NaN" else node["threshold"] >= 0
    yield node["split_feature"], _Split(tree, threshold, missing, others)


def _build_standing(splits: list[_Split], thresholds: Scores, trees: int) -> npt.NDArray[np.uint16]:
    struck = np.full((len(thresholds) + 2, trees), EVERY, np.uint16)
    for split in splits:
        struck[np.searchsorted(thresholds, split.threshold) + 1, split.tree] &= split.others
    standing = np.bitwise_and.accumulate(struck, axis=0)
    standing[-1] = EVERY
    for split in splits:
        if not split.missing:
            standing[-1, split.tree] &= split.others
    return standing
