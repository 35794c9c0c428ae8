"""What a model that points at answers must beat: the sentence that shares most words with the question."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from finetune.data.ranking import LexicalIndex
from finetune.evaluation.answer_metrics import Floats

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")  # noqa: RUF001  (Chinese punctuation)


def split_sentences(passage: str) -> list[str]:
    """The sentences of a passage, at least one; an abbreviation's dot ends one too."""
    return [part.strip() for part in _SENTENCE_END.split(passage) if part.strip()] or [passage]


def find_sentences(questions: Sequence[str], passages: Sequence[str]) -> tuple[list[str], Floats]:
    """The sentence of each passage with the highest BM25 score for its question; of equals the first.

    Args:
        questions, passages: N texts each.

    Returns:
        N sentences, and their scores, (N,).
    """
    known: dict[str, tuple[list[str], LexicalIndex]] = {}
    found, scores = [], []
    for question, passage in zip(questions, passages, strict=True):
        if passage not in known:
            sentences = split_sentences(passage)
            known[passage] = sentences, LexicalIndex(sentences)
        sentences, index = known[passage]
        of_sentences = index.compute_scores(question)
        found.append(sentences[int(of_sentences.argmax())])
        scores.append(float(of_sentences.max()))
    return found, np.array(scores)
