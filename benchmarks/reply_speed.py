"""How long one reply of the support assistant takes when it searches 10,000 entries: reading, searching, reranking.

A second reply has another message before it, and is read with and without it.

python benchmarks/reply_speed.py runs/support
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np

from finetune.applications.support import Session, load_assistant
from finetune.applications.support.assistant import Assistant
from finetune.applications.support.index import KnowledgeIndex
from finetune.data.knowledge import Entry
from finetune.data.sources import load_rows


def grow(index: KnowledgeIndex, size: int, seed: int) -> KnowledgeIndex:
    """The index with entries made of the words of its own, up to `size`, and random features beside theirs."""
    generator = np.random.default_rng(seed)
    words = sorted({word for entry in index.entries for word in entry.passage.split()})
    count = size - len(index.entries)
    lengths = generator.choice([len(entry.passage.split()) for entry in index.entries], count)
    made = [Entry(f"made-{i}", "", " ".join(generator.choice(words, n))) for i, n in enumerate(lengths)]
    features = generator.standard_normal((count, index.features.shape[1]), dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features = np.concatenate([index.features, features])
    return KnowledgeIndex([*index.entries, *made], features, index.fingerprint, index.links)


def main() -> None:
    """Print the median and the 95th percentile over the messages of the sample's test split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run with an assistant")
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=200)
    parser.add_argument("--engine", help="an export of the run that reads in its place")
    options = parser.parse_args()
    known = load_assistant(options.run, engine=options.engine)
    index = grow(known.index, options.entries, seed=13)
    assistant = Assistant(known.reader, index, known.intents, known.sure, known.relevance)
    rows = [row for row in load_rows("shop_support", {}).rows if row.split == "test"][: options.messages]
    times: dict[str, list[float]] = {"reply": [], "second reply": [], "reading alone": []}
    for row in rows[:10]:
        assistant.reply(row.values["text"], Session())  # warm up
    for before, row in pairwise([rows[-1], *rows]):
        text, session = row.values["text"], Session()
        session.add("customer", before.values["text"])
        session.add("agent", "What can I do for you?")
        works: dict[str, Callable[[], object]] = {
            "reply": partial(assistant.reply, text, Session()),
            "second reply": partial(assistant.reply, text, session),
            "reading alone": partial(assistant.reader.read, text, ""),
        }
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        median, late = np.percentile(np.array(seconds) * 1000, [50, 95])
        print(f"{name:14} median {median:6.1f} ms   p95 {late:6.1f} ms   ({len(seconds)} messages)")


if __name__ == "__main__":
    main()
