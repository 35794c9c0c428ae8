"""What the tasks that look for entries share: which entries are right for a row, and which look right and are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.batches import Examples
from finetune.data.cleaning import clean_text
from finetune.data.knowledge import Entry
from finetune.data.ranking import LexicalIndex
from finetune.data.rows import Row
from finetune.data.turns import CONTEXT
from finetune.errors import DataError
from finetune.evaluation.corpus_metrics import compute_rank_statistics
from finetune.evaluation.corpus_scoring import CorpusSplit, SystemOutput, score_corpus
from finetune.evaluation.metrics import Ints
from finetune.evaluation.ranking_baselines import Rankings, compute_ranking_baselines, find_places
from finetune.models.base import load_tokenizer
from finetune.models.embedding import compute_embeddings
from finetune.recipe.schema import TextStep
from finetune.tasks.encoding import encode_texts, join_context, read_question
from finetune.tasks.task import HeldOut, Judgement

ENTRY = "entry"
"""The role that names the right entries of a row: their ids, parted by spaces."""
SHOWN_ROWS = 5
TURNS = (0, 1, 2, None)
"""How many of the last turns a baseline may read; None: all of them."""


@dataclass(frozen=True)
class Library:
    """The entries of a recipe.

    Args:
        entries: E of them, with different ids.
        reads_context: whether a row's context belongs to its question.
    """

    entries: tuple[Entry, ...]
    reads_context: bool

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Id -> number of the entry."""
        return {entry.id: number for number, entry in enumerate(self.entries)}

    def check(self, rows: Sequence[Row]) -> None:
        """Every id of every row must be that of an entry.

        Raises:
            DataError: names the first rows that have another.
        """
        wrong = [f"{row.id} {name!r}" for row in rows for name in row.values[ENTRY].split() if name not in self.numbers]
        if wrong:
            more = f" and {len(wrong) - SHOWN_ROWS} more" if len(wrong) > SHOWN_ROWS else ""
            raise DataError(
                f"entry: must be ids of the {len(self.entries):,} entries of the knowledge, parted by spaces, got in "
                f"{', '.join(wrong[:SHOWN_ROWS])}{more}. Correct the rows, or add the entries."
            )

    def keep_answered(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that name an entry."""
        return [row for row in rows if row.values[ENTRY].split()]

    def prepare(self, rows: Sequence[Row], clean: Sequence[TextStep]) -> list[Row]:
        """The rows that name an entry, all where no entries are at hand, with cleaned texts."""
        return [
            replace(row, values={**row.values, "text": clean_text(row.values["text"], clean)})
            for row in (self.keep_answered(rows) if self.entries else rows)
        ]

    def find_right(self, row: Row) -> tuple[int, ...]:
        """Numbers of a row's right entries, sorted."""
        return tuple(sorted({self.numbers[name] for name in row.values[ENTRY].split()}))

    def mine(self, rows: Sequence[Row], count: int, drawn: int = 0) -> list[list[int]]:
        """Entries that share words with a question and do not answer it, the most alike first.

        They are looked for among the entries that some of `rows` name and those of the same groups: what belongs to
        other splits stays unseen.

        Args:
            rows: of one split.
            count: at most so many for a row.
            drawn: of these so many are drawn from the others, whatever their words.

        Returns:
            Numbers of entries for each row.
        """
        named = {number for row in rows for number in self.find_right(row)}
        groups = {self.entries[number].group for number in named} - {None}
        pool = np.array(
            [n for n, entry in enumerate(self.entries) if n in named or entry.group in groups], dtype=np.int64
        )
        index = LexicalIndex([self.entries[number].passage for number in pool])
        mined, generator = [], np.random.default_rng(len(rows))
        for row in rows:
            scores = index.compute_scores(read_question(row, self.reads_context))
            scores[np.isin(pool, self.find_right(row))] = -np.inf
            order = np.argsort(-scores, kind="stable")
            order = order[np.isfinite(scores[order])]
            alike, others = order[: count - drawn], order[count - drawn :]
            mined.append(pool[[*alike, *generator.permutation(others)[:drawn]]].tolist())
        return mined

    def encode_questions(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[list[int]]:
        """Token ids of each row's question; of a long one the end stays."""
        return encode_texts([read_question(row, self.reads_context) for row in rows], tokenizer, max_length, keep="end")

    def rank_baselines(
        self, held_out: HeldOut, rows: Sequence[Row], names: Sequence[str]
    ) -> dict[str, tuple[Rankings, dict[str, Any]]]:
        """What systems without training make of questions.

        A whole dialogue drowns the question for them. So each reads as many of its last turns as serve it best on
        validation, and without such rows the question alone.

        Returns:
            Name -> scores of all entries, (N, E), and what was chosen.
        """
        asked = {"validation": held_out.rows["validation"], "rows": rows}
        variants: Sequence[int | None] = (None,)
        if self.reads_context:
            variants = TURNS if asked["validation"] else TURNS[:1]
        texts = {
            (part, turns): [self._read_last(row, turns) for row in part_rows]
            for part, part_rows in asked.items()
            for turns in variants
        }
        passages = [entry.passage for entry in self.entries]
        embedded: dict[Any, npt.NDArray[np.float32]] = {}

        def embed(key: tuple[str, int | None]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
            if not embedded:  # the base is loaded once, for all
                embedded.update(_embed_frozen(held_out, texts | {"entries": passages}))
            return embedded[key], embedded["entries"]

        def rank(part: str, turns: int | None) -> dict[str, Rankings]:
            key = (part, turns)
            return compute_ranking_baselines(names, texts[key], passages, lambda: embed(key))

        chosen: dict[str, int | None] = dict.fromkeys(names, variants[0])
        if len(variants) > 1:
            tried = {turns: rank("validation", turns) for turns in variants}
            for name in names:
                chosen[name] = max(variants, key=lambda turns: self._score(asked["validation"], tried[turns][name]))
        found = {turns: rank("rows", turns) for turns in set(chosen.values())}
        return {
            name: (found[turns][name], {"turns": "all" if turns is None else turns} if self.reads_context else {})
            for name, turns in chosen.items()
        }

    def _read_last(self, row: Row, turns: int | None) -> str:
        """A row's question behind the last turns of its context; all of them where that is None."""
        context = (row.values.get(CONTEXT) or "") if self.reads_context else ""
        lines = context.splitlines()
        return join_context(row.values["text"], "\n".join(lines if turns is None else lines[len(lines) - turns :]))

    def _score(self, rows: Sequence[Row], scores: Rankings) -> float:
        return compute_mean_metrics(["mrr"], self._find_places(rows, scores))["mrr"]

    def judge(
        self, held_out: HeldOut, rankings: Mapping[str, Rankings], baselines: Mapping[str, Mapping[str, Any]]
    ) -> Judgement:
        """Score what the model and the baselines made of each split.

        Args:
            held_out: the splits.
            rankings: split -> scores of the model, (N, E).
            baselines: split -> what `rank_baselines` gave.
        """
        scored = {}
        for name, scores in rankings.items():
            rows = held_out.rows[name]
            split = CorpusSplit(
                name=name,
                model=SystemOutput(places=self._find_places(rows, scores)),
                references=None,
                inputs=[row.values["text"] for row in rows],
                values=[row.values for row in rows],
                baselines={
                    system: SystemOutput(places=self._find_places(rows, other), settings=settings)
                    for system, (other, settings) in baselines[name].items()
                },
                resampling=held_out.resample(name),
                opened=held_out.opened if name == "test" else None,
            )
            scored[name] = score_corpus(split, held_out.section) | {"entries": len(self.entries)}
        rows, scores = held_out.rows["test"], rankings["test"]
        first, places = scores.argmax(axis=1), self._find_places(rows, scores)
        return Judgement(
            scored=scored,
            predictions={
                "id": [row.id for row in rows],
                "text": [row.values["text"] for row in rows],
                "reference": [row.values[ENTRY] for row in rows],
                "prediction": [self.entries[number].id for number in first],
                "score": scores.max(axis=1),
                "places": [of_row.tolist() for of_row in places],
            },
            samples=self._show_samples(rows, first, places, held_out.section.samples),
            samples_title="Questions that it answered worst",
        )

    def _find_places(self, rows: Sequence[Row], scores: Rankings) -> list[Ints]:
        return [find_places(part, self.find_right(row)) for row, part in zip(rows, scores, strict=True)]

    def _show_samples(
        self, rows: Sequence[Row], first: Ints, places: Sequence[Ints], count: int
    ) -> list[dict[str, Any]]:
        order = np.argsort([-int(of_row[0]) for of_row in places], kind="stable")[:count]
        return [
            {
                "input": read_question(rows[i], self.reads_context),
                "output": self.entries[first[i]].passage,
                "reference": " | ".join(self.entries[number].passage for number in self.find_right(rows[i])),
                "note": f"place {int(places[i][0])} of {len(self.entries):,}",
            }
            for i in order
        ]


def _embed_frozen(held_out: HeldOut, texts: Mapping[Any, Sequence[str]]) -> dict[Any, npt.NDArray[np.float32]]:
    """The frozen base's embeddings of several lists of texts, by their keys; of a long text the end stays."""
    tokenizer = load_tokenizer(held_out.base)
    parts = [
        Examples.build(encode_texts(part, tokenizer, held_out.max_length, keep="start" if key == "entries" else "end"))
        for key, part in texts.items()
    ]
    return dict(zip(texts, compute_embeddings(held_out.base, parts, tokenizer.pad_token_id), strict=True))


def compute_mean_metrics(names: Sequence[str], places: Sequence[Ints]) -> dict[str, float]:
    """The named ranking metrics, means over questions; nan without questions."""
    if not places:
        return dict.fromkeys(names, float("nan"))
    return {name: float(compute_rank_statistics(name, places)[:, 0].mean()) for name in names}
