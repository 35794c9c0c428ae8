"""Texts that are almost the same, found without comparing all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

SHINGLE_CHARACTERS = 5
SIMILARITY = 0.8
MAX_SHINGLES = 40_000_000  # over all texts: bounds the memory, and with it how much of each text is compared
MIN_CHARACTERS, MAX_CHARACTERS = 200, 2_000  # compared per text, depending on how many there are
MAX_FREQUENCY = 300  # texts with a shingle; a more frequent one tells little and costs much
MAX_CANDIDATES = 20  # texts compared with one text, those with most rare shingles in common first
_MAX_HASH_BITS = 24
_HASH_MARGIN = 0.02  # by how much collisions may lower a similarity
_ROWS_AT_ONCE = 500
_PAIRS_AT_ONCE = 20_000

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """`texts[index]` is almost `texts[other]`, which is in a later group."""

    index: int
    other: int
    similarity: float
    """Jaccard similarity of the two sets of shingles, in [SIMILARITY, 1]."""


def find_near_duplicates(texts: Sequence[str], groups: Sequence[int]) -> list[NearDuplicate]:
    """Find every text that is almost the same as a text of a later group, with its closest such text.

    Two texts are near duplicates when the Jaccard similarity of their sets of 5-character shingles is at least
    `SIMILARITY`: one short word may differ in a headline. Texts of fewer than 3 characters have no shingles and are
    never found.

    Candidates come from prefix filtering (Xiao et al. 2008, "Efficient similarity joins for near duplicate detection",
    section 3, with k instead of 1 shared shingle): with the shingles of each text in order of rarity, two similar texts
    must share k among the first (1 - SIMILARITY) * size + k. Unlike MinHash this misses nothing, but for two cuts that
    keep texts built from one template from costing the square of their number: `MAX_FREQUENCY` and `MAX_CANDIDATES`.

    Args:
        texts: normalised texts (N).
        groups: a group per text (N), such as 0 for train, 1 for validation, 2 for test.

    Returns:
        At most one entry per text, by index.
    """
    limit = int(np.clip(MAX_SHINGLES // max(len(texts), 1), MIN_CHARACTERS, MAX_CHARACTERS))
    padded = [f" {text[:limit]} " for text in texts]
    if not any(len(text) >= SHINGLE_CHARACTERS for text in padded):
        return []
    index = _Index.build(padded)
    group_of = np.asarray(groups, dtype=np.int64)
    best: dict[int, NearDuplicate] = {}
    for group in np.unique(group_of)[:-1]:
        left, right = np.flatnonzero(group_of == group), np.flatnonzero(group_of > group)
        inverted = index.prefixes[right].T.tocsr()
        for start in range(0, len(left), _ROWS_AT_ONCE):
            rows, others = index.candidates(left[start : start + _ROWS_AT_ONCE], right, inverted)
            for row, other in zip(rows.tolist(), others.tolist(), strict=True):
                if row in best:
                    continue  # its candidates come closest first
                similarity = compute_similarity(padded[row], padded[other])
                if similarity >= SIMILARITY:
                    best[row] = NearDuplicate(row, other, similarity)
    return [best[row] for row in sorted(best)]


def compute_similarity(first: str, second: str) -> float:
    """Jaccard similarity of the sets of shingles of two texts, in [0, 1]; 0 when one has none."""
    one, two = _shingle_set(first), _shingle_set(second)
    return len(one & two) / len(one | two) if one and two else 0.0


def _shingle_set(text: str) -> set[str]:
    return {text[start : start + SHINGLE_CHARACTERS] for start in range(len(text) - SHINGLE_CHARACTERS + 1)}


@dataclass(frozen=True)
class _Index:
    """Sets of hashed shingles, column 0 the rarest."""

    shingles: csr_matrix
    """(N, V) ones, columns sorted within a row."""
    prefixes: csr_matrix
    """(N, V) ones: the rarest shingles of each row, without those that no or too many other texts have."""
    sizes: Integers
    """(N,) number of shingles."""
    required: Integers
    """(N,) k: how many shingles the prefixes of two similar texts share."""
    dropped: Integers
    """(N,) shingles left out of the prefix for their frequency, by which k shrinks."""

    @classmethod
    def build(cls, padded: Sequence[str]) -> _Index:
        hashes, row_of = _hash_shingles(padded)
        frequency_of_hash = np.bincount(hashes)
        used = np.flatnonzero(frequency_of_hash)
        # 16 bits make numpy sort by radix, in a tenth of the time.
        used = used[np.argsort(np.minimum(frequency_of_hash[used], 2**16 - 1).astype(np.uint16), kind="stable")]
        rank = np.empty(len(frequency_of_hash), dtype=np.int32)
        rank[used] = np.arange(len(used), dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(padded)))]).astype(np.int32)
        ones = np.ones(len(hashes), dtype=np.int32)
        shingles = csr_matrix((ones, rank[hashes], starts), shape=(len(padded), len(used)))
        shingles.sum_duplicates()  # sorts the columns as well
        shingles.data[:] = 1

        frequency = frequency_of_hash[used]
        sizes = np.diff(shingles.indptr).astype(np.int64)
        overlap = np.ceil(SIMILARITY * sizes - 1e-9).astype(np.int64)  # shingles shared with any similar text, at least
        required = np.maximum(1, overlap // 8)  # measured: longer prefixes cost more than they filter
        row_of = np.repeat(np.arange(len(padded), dtype=np.int32), sizes)
        in_prefix = np.arange(shingles.nnz) - shingles.indptr[row_of] < (sizes - overlap + required)[row_of]
        too_frequent = frequency[shingles.indices] > MAX_FREQUENCY
        dropped = np.bincount(row_of[in_prefix & too_frequent], minlength=len(padded))
        kept = in_prefix & ~too_frequent & (frequency[shingles.indices] > 1)
        entries = (np.ones(int(kept.sum()), dtype=np.int32), (row_of[kept], shingles.indices[kept]))
        return cls(shingles, csr_matrix(entries, shape=shingles.shape), sizes, required, dropped)

    def candidates(self, left: Integers, right: Integers, inverted: csr_matrix) -> tuple[Integers, Integers]:
        """Pairs that are similar by their hashes, by row and closest first.

        Args:
            left: rows (L).
            right: rows of later groups (R).
            inverted: (V, R), the transpose of the prefixes of `right`.
        """
        shared = (self.prefixes[left] @ inverted).tocoo()
        rows, others, counts = left[shared.row], right[shared.col], shared.data
        needed = np.minimum(self.required[rows], self.required[others])
        needed = np.maximum(1, needed - np.minimum(self.dropped[rows], self.dropped[others]))
        small = np.minimum(self.sizes[rows], self.sizes[others])
        kept = (counts >= needed) & (small >= SIMILARITY * np.maximum(self.sizes[rows], self.sizes[others]))
        rows, others, counts = rows[kept], others[kept], counts[kept]
        order = np.lexsort((others, -counts, rows))
        rows, others = rows[order], others[order]
        first = np.arange(len(rows)) - np.searchsorted(rows, rows) < MAX_CANDIDATES
        rows, others = rows[first], others[first]
        similarities = np.zeros(len(rows))
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            similarities[part] = self._compute_similarities(rows[part], others[part])
        order = np.lexsort((others, -similarities, rows))
        order = order[similarities[order] >= SIMILARITY - _HASH_MARGIN]
        return rows[order], others[order]

    def _compute_similarities(self, rows: Integers, others: Integers) -> npt.NDArray[np.float64]:
        """As `compute_similarity`, but for hash collisions."""
        common = np.asarray(self.shingles[rows].multiply(self.shingles[others]).sum(axis=1)).ravel()
        similarities: npt.NDArray[np.float64] = common / (self.sizes[rows] + self.sizes[others] - common)
        return similarities


def _hash_shingles(padded: Sequence[str]) -> tuple[Integers, Integers]:
    """Hash of each shingle of each text, and the row it is in."""
    lengths = np.fromiter(map(len, padded), dtype=np.int64, count=len(padded))
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    count = len(codes) - SHINGLE_CHARACTERS + 1
    multipliers = np.random.default_rng(0).integers(2**31, size=SHINGLE_CHARACTERS, dtype=np.uint32) * 2 + 1
    hashes = np.zeros(count, dtype=np.uint32)
    for offset, multiplier in enumerate(multipliers):
        hashes += codes[offset : offset + count] * multiplier  # modulo 2**32
    # The low bits of such a sum mix badly: fold, multiply, and keep the high bits (the end of MurmurHash3).
    hashes ^= hashes >> np.uint32(16)
    hashes *= np.uint32(0x85EBCA6B)
    bits = min(_MAX_HASH_BITS, count.bit_length() + 6)  # 64 times as many values as shingles, as far as memory allows
    hashes >>= np.uint32(32 - bits)
    row_of = np.repeat(np.arange(len(padded)), lengths)
    inside = row_of[:count] == row_of[SHINGLE_CHARACTERS - 1 :]
    return hashes[inside].astype(np.int64), row_of[:count][inside]
