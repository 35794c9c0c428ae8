"""What a model that points at answers must beat: the sentence that shares most words with the question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.ranking import LexicalIndex
from finetune.evaluation.answer_metrics import Floats, tune_threshold
from finetune.evaluation.corpus_scoring import SystemOutput

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")  # noqa: RUF001  (Chinese punctuation)


@dataclass(frozen=True, slots=True)
class Questions:
    """N rows of a split."""

    texts: Sequence[str]
    """The questions."""
    passages: Sequence[str]
    answers: Sequence[str]
    """What should be found; "" where a passage holds no answer."""


def compute_answer_baselines(
    names: Sequence[str], validation: Questions, test: Questions
) -> dict[str, dict[str, SystemOutput]]:
    """What the baselines of a recipe say; which sentences are too far from their question is tuned on validation.

    Args:
        names: `no_answer`: there never is one. `bm25_sentence`: see `find_sentences`.
        validation, test: rows.

    Returns:
        Split -> baseline -> its answers.
    """
    splits = {"validation": validation, "test": test}
    found: dict[str, dict[str, SystemOutput]] = {split: {} for split in splits}
    for name in names:
        if name == "no_answer":
            for split, questions in splits.items():
                found[split][name] = SystemOutput(texts=[""] * len(questions.texts))
            continue
        said = {split: find_sentences(questions.texts, questions.passages) for split, questions in splits.items()}
        sentences, scores = said["validation"]
        threshold = tune_threshold(scores, sentences, validation.answers)
        for split, (sentences, scores) in said.items():
            texts = [text if score > threshold else "" for text, score in zip(sentences, scores, strict=True)]
            found[split][name] = SystemOutput(texts=texts, settings={"threshold": threshold})
    return found


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
