"""What of an entry is quoted: all of it, or the sentences that answer."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np

from finetune.applications.support.reader import Reader
from finetune.data.knowledge import Entry
from finetune.data.ranking import LexicalIndex

WHOLE_CHARACTERS = 320
"""An entry of up to so many is quoted whole."""
QUOTED_SENTENCES = 2
READ_SENTENCES = 12
"""Of a long entry; those that share most words with the question are read."""
SENTENCE_CHARACTERS = 600

_END = re.compile(r"(?<=[.!?])\s+(?=[^a-z\s])|(?<=[\u3002\uff01\uff1f])\s*")


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
