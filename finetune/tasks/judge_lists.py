"""How a recommender is judged: both of its stages and every baseline, on the same requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from finetune.data.histories import Held
from finetune.evaluation.counting import COUNTINGS, Histories, Scores
from finetune.evaluation.recommending import (
    Judging,
    Questions,
    Ranked,
    average_by_person,
    choose_settings,
    group_items,
    rank_all,
    rank_by_counting,
    score_lists,
)
from finetune.evaluation.report_samples import LIST_LABELS
from finetune.evaluation.scoring import round_numbers
from finetune.tasks.items import Counts
from finetune.tasks.ranker import ROUNDS, Ranker, Table, fit_trees
from finetune.tasks.recommendation import Recommendation, Record, compute_sequence_scores
from finetune.tasks.task import HeldOut, Judgement

RANKER_FILE = "ranker.txt"
COUNTS_FILE = "counts.safetensors"
LESSONS = 3000
"""Requests of validation at most, drawn where there are more: the trees learn little from further ones, and their
candidates fill the memory."""
FOLDS = 3
"""Parts of the people of validation; each is ranked by trees that were fitted on the others."""
HIDDEN_SHARE = 0.15
"""Items that the trees learn without knowing them."""
SEQUENCE = "sequence"
"""The first stage alone, as a system that the two together are compared with."""
SHOWN = 5
"""Items of a history, and of a list, in the report."""
SHOWN_CHARACTERS = 100
"""Of an item's text, which there is its first sentence, or title."""
HEADLINE = "ndcg_at_10"
"""What the number of trees is chosen by."""
BEHIND = 1e3
"""What parts candidates from other items in one array of scores."""


def judge_lists(task: Recommendation, record: Record, held_out: HeldOut) -> Judgement:
    """Score validation and test.

    Everything that is fitted knows only what lies before the split's own cut: on validation, counts see train, and
    each person is ranked by trees that were fitted on other people; on test, counts see train and validation.
    """
    scored: dict[str, dict[str, Any]] = {}
    systems: dict[str, Ranked] = {}
    ranker: Ranker | None = None
    chosen: dict[str, dict[str, float]] = {}
    items = np.array(task.counts, dtype=np.float32)
    groups = group_items(items)
    splits: tuple[Held, ...] = ("validation", "test")
    track, metric = held_out.track, held_out.section.metrics[0]
    for name in splits:
        questions = _ask(task, record, name, held_out.seed)
        events = record.list_known(name)
        if name == "validation":
            chosen = {
                baseline: choose_settings(
                    COUNTINGS[baseline], events, questions, metric, partial(track, f"{name}: settings of {baseline}")
                )
                for baseline in held_out.section.baselines
            }
        counts = Counts.fit(events)
        first = _First(held_out.model, held_out.max_length, counts.rank_lately())
        chunks = questions.chunk()
        systems = {SEQUENCE: rank_all(questions, first.score, groups, track(f"{name}: first stage", chunks))}
        fresh = task.build_ranker(held_out.model, counts)
        if fresh is not None:
            if name == "validation":
                trees, ranked = _fit_ranker(fresh, first, questions, groups, held_out)
            else:
                ranker = replace(fresh, trees=trees)
                score = _Both(first, ranker).score
                ranked = rank_all(questions, score, groups, track(f"{name}: both stages", chunks))
            systems = {"both": ranked, **systems}
        systems |= {
            baseline: rank_by_counting(COUNTINGS[baseline], chosen[baseline], events, questions, groups)
            for baseline in track(f"{name}: baselines", held_out.section.baselines)
        }
        opened = held_out.opened if name == "test" else None
        scored[name] = score_lists(name, questions, systems, items, Judging(held_out.section, held_out.seed, opened))
    files, fits = {COUNTS_FILE: save(counts.to_arrays())}, {}
    if ranker is not None:
        files[RANKER_FILE] = ranker.trees.model_to_string().encode()
        fits = {"importances": round_numbers(ranker.compute_importances())}
        scored["test"]["ranker"] = fits
    model = next(iter(systems.values()))
    return Judgement(
        scored=scored,
        predictions=_list_predictions(task, record, questions, model),
        samples=_show_people(task, questions, model, held_out),
        samples_title="People, what they had, and their lists",
        settings=fits,
        files=files,
    )


def _ask(task: Recommendation, record: Record, split: Held, seed: int) -> Questions:
    """The requests of a split; of validation no more than what the trees need."""
    questions = record.ask(split, exclude_seen=task.section.exclude_seen)
    return questions.draw(LESSONS, seed) if split == "validation" else questions


class _First:
    """The first stage: the sequence model, and where the history is empty what was popular of late."""

    def __init__(self, model: Any, max_length: int, popular: Scores) -> None:
        self.model, self.max_length, self.popular = model, max_length, popular

    def compute(self, histories: Histories) -> Scores:
        """(R, I); nan where a history is empty."""
        return compute_sequence_scores(self.model, histories, self.max_length)

    @contextmanager
    def without(self, items: npt.NDArray[np.bool_]) -> Iterator[None]:
        """Within it the model takes some items, (I,) true, for items that training never saw."""
        known = self.model.known.clone()
        self.model.set_known(known & ~torch.from_numpy(items).to(known.device))
        try:
            yield
        finally:
            self.model.set_known(known)

    def score(self, questions: Questions) -> Scores:
        """(R, I)."""
        return fill_popular(self.compute(questions.histories), questions.histories, self.popular)


class _Both:
    """Both stages: candidates by the second, the others behind them by the first."""

    def __init__(self, first: _First, ranker: Ranker) -> None:
        self.first, self.ranker = first, ranker

    def score(self, questions: Questions) -> Scores:
        """(R, I)."""
        sequence = self.first.compute(questions.histories)
        table = self.ranker.build_table(questions.histories, sequence)
        filled = fill_popular(sequence, questions.histories, self.first.popular)
        return place_candidates(filled, table, self.ranker.score(table), questions.histories)


def fill_popular(scores: Scores, histories: Histories, popular: Scores) -> Scores:
    """Popularity, (I,), in the place of the scores of the first stage, (R, I), where a history is empty."""
    nobody = histories.lengths == 0
    if not nobody.any():
        return scores
    filled = scores.copy()
    filled[nobody] = popular
    return filled


def place_candidates(scores: Scores, table: Table, ranks: npt.NDArray[np.float64], histories: Histories) -> Scores:
    """Scores of the first stage with the candidates of the second in front, (R, I); people without a history keep
    those of the first, which then are popularity."""
    has_history = histories.lengths > 0
    known = has_history[table.request]
    placed = np.array(scores, np.float32)
    placed[has_history] -= np.float32(BEHIND)
    placed[table.request[known], table.item[known]] = ranks[known]
    return placed


def _fit_ranker(
    ranker: Ranker,
    first: _First,
    questions: Questions,
    groups: Mapping[str, npt.NDArray[np.bool_]],
    held_out: HeldOut,
) -> tuple[Any, Ranked]:
    """Trees fitted on all of validation, and its ranking by trees that were fitted on other people.

    How many trees there are is what is best for the latter. They learn from each request twice: as it is, and with a
    share of the items hidden from counts and ids, as items are that come out later. Of those validation may hold few,
    and the trees would take "never seen" for "not wanted".
    """
    chunks, seed, track = questions.chunk(), held_out.seed, held_out.track
    sequences, tables = _build_tables(ranker, first, questions, track("validation: candidates", chunks))
    lessons, copies = list(tables), 1
    if ranker.items.texts is not None:
        hidden = np.random.default_rng(seed).random(len(ranker.counts.vectors["age"])) < HIDDEN_SHARE
        with first.without(hidden):
            fewer = replace(ranker, counts=ranker.counts.hide(hidden))
            parts = track("validation: candidates, some items hidden", chunks)
            lessons += _build_tables(fewer, first, questions, parts)[1]
        copies = 2
    _, number = np.unique(questions.person, return_inverse=True)
    ranks = {rounds: [np.zeros(len(table.item)) for table in tables] for rounds in ROUNDS}
    for fold in track("validation: trees", range(FOLDS)):
        others = [_keep(questions, rows, number % FOLDS != fold) for rows in chunks] * copies
        trees = fit_trees(lessons, others, seed)
        for place, (table, rows) in enumerate(zip(tables, chunks, strict=True)):
            own = (number[rows] % FOLDS == fold)[table.request]
            if own.any():
                for rounds, found in ranks.items():
                    found[place][own] = trees.predict(table.values[own], num_iteration=rounds)
    ranked: dict[int, Ranked] = {}
    scores: dict[int, float] = {}
    for rounds, found in ranks.items():
        ranked[rounds] = Ranked()
        for rows, sequence, table, rank in zip(chunks, sequences, tables, found, strict=True):
            part = questions.take(rows)
            filled = fill_popular(sequence, part.histories, first.popular)
            ranked[rounds].add(place_candidates(filled, table, rank, part.histories), part, groups)
        means = average_by_person(ranked[rounds].places, questions.person, [HEADLINE])[HEADLINE]
        scores[rounds] = float(means[:, 0].mean())
    best = max(scores, key=lambda rounds: scores[rounds])
    return fit_trees(lessons, [_keep(questions, rows) for rows in chunks] * copies, seed, best), ranked[best]


def _build_tables(
    ranker: Ranker, first: _First, questions: Questions, chunks: Iterable[slice]
) -> tuple[list[Scores], list[Table]]:
    """Scores of the first stage, and candidates with features, of each chunk."""
    sequences, tables = [], []
    for rows in chunks:
        histories = questions.histories.take(rows)
        sequences.append(first.compute(histories))
        tables.append(ranker.build_table(histories, sequences[-1]))
    return sequences, tables


def _keep(questions: Questions, rows: slice, mask: npt.NDArray[np.bool_] | None = None) -> list[Any]:
    """Targets of a chunk; none for the requests that are left out, and for those without a history."""
    part = questions.take(rows)
    nothing = np.zeros(0, np.int64)
    chosen = np.ones(len(part), bool) if mask is None else mask[rows]
    chosen = chosen & (part.histories.lengths > 0)
    return [targets if keep else nothing for targets, keep in zip(part.targets, chosen, strict=True)]


def _list_predictions(task: Recommendation, record: Record, questions: Questions, model: Ranked) -> dict[str, Any]:
    """A row for each request of test."""
    ids, users = task.catalogue.ids, record.find("test")[0].users
    lengths = questions.histories.lengths
    return {
        "id": [f"test:{users[person]}:{row}" for row, person in enumerate(questions.person)],
        "user": [users[person] for person in questions.person],
        "history": lengths.tolist(),
        "reference": [[ids[item] for item in targets] for targets in questions.targets],
        "prediction": [[ids[item] for item in items] for items in model.lists],
        "places": [places.tolist() for places in model.places],
    }


def _show_people(task: Recommendation, questions: Questions, model: Ranked, held_out: HeldOut) -> list[dict[str, Any]]:
    """Some people, spread over all that have a history, at their first request."""
    _, first = np.unique(questions.person, return_index=True)
    lengths = questions.histories.lengths
    known = [int(row) for row in first if lengths[row]]
    count = min(held_out.section.samples, len(known))
    chosen = [known[place * len(known) // count] for place in range(count)] if count else []

    def name(items: Sequence[Any]) -> str:
        texts = [task.catalogue.texts[item].partition(". ")[0] or task.catalogue.ids[item] for item in items]
        return "\n".join(text[:SHOWN_CHARACTERS] for text in texts)

    return [
        {
            "input": name(questions.histories.get(row)[-SHOWN:].tolist()),
            "output": name(model.lists[row][:SHOWN].tolist()),
            "reference": name(questions.targets[row][:SHOWN].tolist()),
            "labels": LIST_LABELS,
            "note": f"{int(lengths[row]):,} events before, first hit at place {int(model.places[row][0]):,}",
        }
        for row in chosen
    ]
