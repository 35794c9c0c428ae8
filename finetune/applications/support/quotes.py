"""What of an entry is said: the entry itself, its answering sentences, or words of a writer that the entry supports."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Protocol

import numpy as np

from finetune.applications.support.reader import Reader
from finetune.data.knowledge import Entry
from finetune.data.ranking import LexicalIndex, split_words

WHOLE_CHARACTERS = 320
"""An entry of up to so many is quoted whole."""
QUOTED_SENTENCES = 2
READ_SENTENCES = 12
"""Of a long entry; those that share most words with the question are read."""
SENTENCE_CHARACTERS = 600
MIN_SHARED_WORDS = 0.75

_END = re.compile(r"(?<=[.!?])\s+(?=[^a-z\s])|(?<=[\u3002\uff01\uff1f])\s*")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")


class Writer(Protocol):
    """A model that writes an answer out of a passage."""

    def write(self, text: str, context: str, passage: str) -> str:
        """The answer in its own words."""


def quote_answer(entry: Entry, text: str, context: str, reader: Reader) -> str:
    """The entry's text if it is short, else the sentences that answer best, in their order."""
    if len(entry.text) <= WHOLE_CHARACTERS:
        return entry.text
    sentences = split_sentences(entry.text)
    shared = LexicalIndex(sentences).compute_scores(text)
    read = np.sort(np.argsort(-shared, kind="stable")[:READ_SENTENCES])
    scores = reader.rerank(text, context, [f"{entry.title} {sentences[index]}".strip() for index in read])
    chosen = sorted(int(read[place]) for place in np.argsort(-scores, kind="stable")[:QUOTED_SENTENCES])
    pieces = [sentences[chosen[0]]]
    for former, index in pairwise(chosen):
        pieces += [" " if index == former + 1 else " … ", sentences[index]]
    return "".join(pieces)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; one of more than `SENTENCE_CHARACTERS` is cut."""
    return [sentence[:SENTENCE_CHARACTERS] for sentence in _END.split(text) if sentence.strip()]


def compose_answer(writer: Writer, entry: Entry, text: str, context: str) -> str | None:
    """What the writer says, if the entry supports every sentence of it; else None."""
    answer = " ".join(writer.write(text, context, entry.passage).split())
    return answer if answer and not find_unsupported(answer, entry.passage) else None


def find_unsupported(answer: str, passage: str) -> list[str]:
    """The sentences of an answer that say what the passage does not.

    A sentence is supported when at least three quarters of its words, and each of its numbers, stand in the passage.
    That finds invented facts, and not a denial in the passage's own words.
    """
    words, numbers = set(split_words(passage)), set(_NUMBER.findall(passage))
    unsupported = []
    for sentence in split_sentences(answer):
        said = split_words(sentence)
        shared = sum(word in words for word in said) / max(1, len(said))
        if shared < MIN_SHARED_WORDS or not numbers.issuperset(_NUMBER.findall(sentence)):
            unsupported.append(sentence)
    return unsupported
