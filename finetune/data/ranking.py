"""Finding texts by words, and one ranking out of several."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finetune.data.cleaning import WORD

Scores = npt.NDArray[np.float32]

_WORD = re.compile(WORD)
COSINE_SCALE = 20.0
"""What a cosine is multiplied by in a softmax: sentence-transformers' default for ranking losses."""
FUSION_RANK = 60  # the paper's: how little the very first places count


class LexicalIndex:
    """Texts that are found by the words of a question: BM25 (Robertson & Zaragoza 2009), by bm25s (arXiv:2407.03618).

    Args:
        texts: what is searched, E of them.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self._size = len(texts)
        words = [split_words(text) for text in texts]
        self._index = bm25s.BM25() if any(words) else None  # nothing to count is refused there
        if self._index is not None:
            self._index.index(words, show_progress=False)

    def compute_scores(self, question: str) -> Scores:
        """The BM25 score of each text, (E,); 0 where no word is shared."""
        words = split_words(question)
        if self._index is None or not words:
            return np.zeros(self._size, dtype=np.float32)
        scores: Scores = self._index.get_scores(words)
        return scores


def split_words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.casefold())


def fuse_rankings(scores: Sequence[Scores]) -> Scores:
    """Reciprocal rank fusion: the sum over rankings of 1 / (60 + rank) (Cormack, Clarke & Buettcher 2009).

    Args:
        scores: of each ranking, (E,); higher is better; of equals the first comes first.

    Returns:
        (E,); higher is better.
    """
    fused = np.zeros(len(scores[0]), dtype=np.float32)
    for part in scores:
        fused[np.argsort(-part, kind="stable")] += 1 / (FUSION_RANK + np.arange(1, len(part) + 1, dtype=np.float32))
    return fused
