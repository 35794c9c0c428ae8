"""Recommendation: the items that a person turns to next, from the order of what the person had and the items' texts.

Two stages. A decoder reads histories and scores every item (SASRec, arXiv:1808.09781, with a softmax over all items);
trees then weigh its candidates against counts, texts and columns (`ranker.py`), fitted on validation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import IGNORED, Batch, Examples, Indices, list_inputs
from finetune.data.histories import Cuts, Held, Requests, train_mask
from finetune.data.interactions import Catalogue, Interactions
from finetune.data.rows import Row
from finetune.errors import UsageError
from finetune.evaluation.corpus_metrics import compute_rank_statistics
from finetune.evaluation.counting import Events, Histories, Scores
from finetune.evaluation.ranking_baselines import find_places
from finetune.evaluation.recommending import Questions, build_questions
from finetune.models.base import BaseModel, load_config, load_tokenizer
from finetune.models.embedding import compute_embeddings
from finetune.models.next_item import ItemChoices, build_next_item, build_next_item_shape, load_next_item
from finetune.models.next_item_loss import draw_negatives, full_softmax, gbce, sampled_softmax
from finetune.models.prediction import compute_by_row, scatter_rows
from finetune.recipe.schema import ModelSection, RankSection, RecommendSection, TaskSection
from finetune.tasks.encoding import encode_texts
from finetune.tasks.items import Counts, Items, normalize
from finetune.tasks.language import sum_by_row
from finetune.tasks.ranker import Ranker
from finetune.tasks.task import HeldOut, Judgement, Outputs, TaskData

CHECKED = 1000
"""Requests of validation that are scored while training."""
ITEM_TOKENS = 64
"""Tokens after which an item's text is cut."""
POPULARITY_POWER = 0.75
"""Negatives are drawn by an item's events to this power (word2vec's, arXiv:1310.4546)."""
WATCHED = ("loss", "ndcg_at_10", "recall_at_10", "mrr")


@dataclass(frozen=True)
class Record:
    """The events that a recipe names, and how they are split.

    Args:
        interactions: all events.
        requests: of validation and test.
        cuts: the two cuts in time; None where each person's last event is left out.
        others: other events, and the requests in them that are asked in the place of test; nothing is counted of them.
    """

    interactions: Interactions
    requests: Mapping[Held, Requests]
    cuts: Cuts | None
    others: tuple[Interactions, Requests] | None = None

    def list_known(self, at: Held) -> Events:
        """What may be counted before a split is asked for."""
        log = self.interactions
        mask = train_mask(log, self.requests, at, self.cuts)
        last = int(log.time[mask].max()) + 1
        now = last if self.cuts is None else self.cuts[0 if at == "validation" else 1]
        weight = None if log.weight is None else log.weight[mask] / log.weight[mask].mean()
        return Events(log.user[mask], log.item[mask], log.time[mask], len(log.catalogue.ids), now, weight)

    def find(self, at: Held) -> tuple[Interactions, Requests]:
        """The events that a split asks about, and its requests in them."""
        return self.others if at == "test" and self.others else (self.interactions, self.requests[at])

    def ask(self, at: Held, *, exclude_seen: bool) -> Questions:
        """The requests of a split with their answers."""
        log, asked = self.find(at)
        item = log.item
        targets = [item[start:end] for start, end in zip(asked.target_start, asked.target_end, strict=True)]
        histories = Histories(item, asked.start, asked.end)
        return build_questions(asked.person, histories, targets, exclude_seen=exclude_seen)


@dataclass(frozen=True)
class Recommendation:
    """The shape of shops, libraries and channels.

    Args:
        catalogue: I items.
        counts: events of each in train, (I,); what has none is scored by its text alone.
        section: how histories are read and lists are made.
        rank: the second stage; None for the first alone.
        by_moment: whether what a person does at one time, such as a basket, is one answer.
        record: the events; None where a trained model was loaded.
    """

    catalogue: Catalogue
    counts: tuple[int, ...]
    section: RecommendSection
    rank: RankSection | None
    by_moment: bool = True
    record: Record | None = field(default=None, compare=False)

    type: ClassVar[str] = "recommendation"
    roles: ClassVar[tuple[str, ...]] = ("user", "item", "time")
    optional_roles: ClassVar[tuple[str, ...]] = ()
    scored_by: ClassVar[str] = "next_items"
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    cuts_rows: ClassVar[bool] = False
    labels: ClassVar[None] = None

    @classmethod
    def build(cls, section: TaskSection, data: TaskData) -> Recommendation:
        """Not from rows: `tasks.people` builds it from events."""
        raise UsageError(f"{section.data}: must be read as events for recommendation.")

    @property
    def reads_texts(self) -> bool:
        """Whether items speak by their texts."""
        return self.section.vectors != "ids"

    @cached_property
    def known(self) -> npt.NDArray[np.bool_]:
        """(I,) the items that training sees."""
        return np.array(self.counts) > 0

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """People need no cleaning."""
        return list(rows)

    def build_tokenizer(self, base: BaseModel, rows: Sequence[Row], section: ModelSection) -> Any:
        """That of the texts' encoder."""
        return load_tokenizer(base)

    def bind(self, tokenizer: Any) -> Recommendation:
        """Nothing is left to the tokenizer."""
        return self

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Of train, each person's items with what came next at each; of other splits, histories with their answers."""
        split = rows[0].split if rows else "train"
        if split == "train":
            people = np.array([row.values["person"] for row in rows])
            return _build_sequences(self._get_record(), people, max_length, by_moment=self.by_moment)
        held: Held = "validation" if split == "validation" else "test"
        asked = self._get_record().ask(held, exclude_seen=self.section.exclude_seen)
        chosen = [row for row in range(len(asked)) if len(asked.histories.get(row))]
        step = max(1, len(chosen) // CHECKED)
        return encode_questions(asked, chosen[::step], max_length)

    # Model

    def build_model(self, base: BaseModel, section: ModelSection, tokenizer: Any, seed: int) -> nn.Module:
        """A decoder from random weights; the items' texts as the base embeds them."""
        vectors = embed_items(base, tokenizer, self.catalogue.texts) if self.reads_texts else None
        texts = None if vectors is None else torch.from_numpy(vectors)
        known = torch.from_numpy(self.known)
        return build_next_item(section, len(self.counts), texts, known, self._choices, seed=seed)

    def build_shape(self, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
        """The same without weights."""
        width = int(load_config(base).hidden_size) if self.reads_texts else 0
        return build_next_item_shape(section, len(self.counts), width, self._choices)

    @property
    def _choices(self) -> ItemChoices:
        return ItemChoices(ids=self.section.vectors != "text", dropout=self.section.item_dropout, bias=True)

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A whole model as `save_pretrained` wrote it."""
        return load_next_item(folder)

    def list_modules(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """All is new, and one."""
        return [], []

    def start(self, model: nn.Module, train: Examples, pad_token_id: int | None) -> None:
        """Nothing to start."""

    # Training

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Mean loss of each row over the positions that have a next item, (B,)."""
        inner: Any = getattr(model, "module", model)
        labels = batch["labels"]
        vectors = inner.compute_item_vectors()
        states = model(**list_inputs(batch), item_vectors=vectors).last_hidden_state  # (1, total, D)
        scored = labels != IGNORED
        losses = self._compute_loss(states[scored], labels[scored], vectors, inner.compute_item_bias())
        by_token = states.new_zeros(labels.shape, dtype=torch.float32).masked_scatter(scored, losses)
        return sum_by_row(by_token, batch) / sum_by_row(scored.float(), batch).clamp(min=1)

    def _compute_loss(
        self, states: torch.Tensor, targets: torch.Tensor, vectors: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """(N,). Items that training does not see are no wrong answers: their texts would learn to be unlikely."""
        known = torch.from_numpy(self.known).to(states.device)
        if self.section.loss == "softmax":
            free = states.new_zeros(len(known)) if bias is None else bias
            return full_softmax(states, targets, vectors, free.masked_fill(~known, -torch.inf))
        if self.section.loss == "gbce":
            negatives, _ = draw_negatives(known.float(), self.section.negatives)
            return gbce(states, targets, vectors, negatives, bias)
        weights = torch.tensor(self.counts, device=states.device).float() ** POPULARITY_POWER * known
        negatives, log_counts = draw_negatives(weights, self.section.negatives)
        return sampled_softmax(states, targets, vectors, negatives, log_counts, bias)

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """Positions that have a next item."""
        return examples.target_lengths.astype(np.float32)

    def compute_outputs(
        self,
        model: nn.Module,
        examples: Examples,
        pad_token_id: int | None,
        *,
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> Outputs:
        """Nats of each request's answers, and its metrics, (N, 4), in the order of `WATCHED`."""
        inner: Any = getattr(model, "module", model)
        with torch.inference_mode():
            vectors = _compute_vectors(inner)
        starts, answers = examples.target_starts, examples.target_ids
        assert starts is not None
        assert answers is not None

        def measure(batch: Batch, rows: Indices) -> torch.Tensor:
            states = inner.encode(**list_inputs(batch), item_vectors=vectors)
            scores = inner.score(states, item_vectors=vectors).float().log_softmax(-1).cpu().numpy()
            found = []
            for own, row in zip(scores, rows.tolist(), strict=True):
                targets = answers[starts[row] : starts[row + 1]].astype(np.int64)
                loss = -own[targets].mean()
                if self.section.exclude_seen:
                    own[examples.input_ids[examples.starts[row] : examples.starts[row + 1]]] = -np.inf
                found.append([loss, *_measure_places(find_places(own, targets))])
            return torch.tensor(found)

        parts = compute_by_row(model, examples, pad_token_id, measure, share=share, advance=advance)
        return scatter_rows(parts, len(examples), len(WATCHED))

    def compute_metrics(
        self, outputs: Outputs, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Means over requests; people with several count several times, which is good enough to choose weights by."""
        means = dict(zip(WATCHED, outputs.mean(axis=0).tolist(), strict=True)) if len(outputs) else {}
        return {name: means.get(name, float("nan")) for name in ("loss", *names)}

    # Judging

    def judge(self, held_out: HeldOut) -> Judgement:
        """Rank the requests of validation and test with both stages and with every baseline."""
        from finetune.tasks.judge_lists import judge_lists  # it needs this module

        return judge_lists(self, self._get_record(), held_out)

    def build_ranker(self, model: nn.Module, counts: Counts) -> Ranker | None:
        """The second stage before it is fitted; None where there is none."""
        if self.rank is None:
            return None
        vectors: Any = model.text_vectors if self.reads_texts else None
        texts = None if vectors is None else normalize(vectors.float().cpu().numpy())
        items = Items(self.catalogue, texts)
        return Ranker(tuple(self.rank.features), self.rank.candidates, self.section.exclude_seen, counts, items)

    def _get_record(self) -> Record:
        if self.record is None:
            raise UsageError("recommendation: must have its events at hand, got a model alone.")
        return self.record

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {
            "type": self.type,
            "items": list(self.catalogue.ids),
            "texts": list(self.catalogue.texts),
            "columns": {name: list(values) for name, values in self.catalogue.columns.items()},
            "counts": list(self.counts),
            "recommend": self.section.model_dump(mode="json"),
            "rank": None if self.rank is None else self.rank.model_dump(mode="json"),
            "by_moment": self.by_moment,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Recommendation:
        """Inverse of `to_config`."""
        columns = {name: tuple(values) for name, values in config["columns"].items()}
        return cls(
            Catalogue(tuple(config["items"]), tuple(config["texts"]), columns),
            tuple(config["counts"]),
            RecommendSection.model_validate(config["recommend"]),
            None if config["rank"] is None else RankSection.model_validate(config["rank"]),
            config["by_moment"],
        )


def embed_items(base: BaseModel, tokenizer: Any, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Vectors of items' texts as a base gives them without training, of length 1: (I, S); zeros without a text."""
    examples = Examples.build(encode_texts([text or "-" for text in texts], tokenizer, ITEM_TOKENS))
    (vectors,) = compute_embeddings(base, [examples], tokenizer.pad_token_id)
    vectors[[not text for text in texts]] = 0
    return vectors


def encode_questions(questions: Questions, rows: Sequence[int], max_length: int) -> Examples:
    """Some requests, none with an empty history: the newest items of each, and its answer."""
    return Examples.build(
        [questions.histories.get(row)[-max_length:].astype(np.int32) for row in rows],
        targets=[questions.targets[row].astype(np.int32) for row in rows],
    )


@torch.inference_mode()
def compute_sequence_scores(
    model: nn.Module, histories: Histories, max_length: int, item_vectors: torch.Tensor | None = None
) -> Scores:
    """Log probability of every item after each history, (R, I); nan where the history is empty.

    `item_vectors`: of all items, (I, D), where they are computed already.
    """
    inner: Any = model
    size = int(inner.config.num_items)
    if not histories.lengths.any():
        return np.full((len(histories), size), np.nan, np.float32)
    vectors = _compute_vectors(inner) if item_vectors is None else item_vectors
    rows, states = compute_states(model, histories, max_length, vectors)
    found = inner.score(torch.from_numpy(states).to(vectors), item_vectors=vectors).float().log_softmax(-1).cpu()
    if len(rows) == len(histories):  # all of one kind: no copy
        return np.asarray(found.numpy())
    scores = np.full((len(histories), size), np.nan, np.float32)
    scores[rows] = found.numpy()
    return scores


def compute_states(
    model: nn.Module, histories: Histories, max_length: int, item_vectors: torch.Tensor
) -> tuple[Indices, npt.NDArray[np.float32]]:
    """What items are scored by after each history that is not empty: their rows (N,) and states (N, D)."""
    inner: Any = model
    rows = np.flatnonzero(histories.lengths)
    examples = Examples.build([histories.get(row)[-max_length:].astype(np.int32) for row in rows.tolist()])

    def encode(batch: Batch, _rows: Indices) -> torch.Tensor:
        states: torch.Tensor = inner.encode(**list_inputs(batch), item_vectors=item_vectors)
        return states

    found = compute_by_row(model, examples, None, encode)
    return rows, scatter_rows(found, len(rows), item_vectors.shape[1])


def _compute_vectors(model: Any) -> torch.Tensor:
    """All item vectors, without dropout."""
    was_training = model.training
    model.eval()
    vectors: torch.Tensor = model.compute_item_vectors()
    model.train(was_training)
    return vectors


def _measure_places(places: npt.NDArray[np.int64]) -> list[float]:
    return [float(compute_rank_statistics(name, [places])[0, 0]) for name in WATCHED[1:]]


def _build_sequences(record: Record, people: npt.NDArray[np.int64], max_length: int, *, by_moment: bool) -> Examples:
    """What people had, cut into pieces of at most `max_length`, and what came next at each place.

    `by_moment`: next is one of the things that the person did at the next time, in turns, so that each place of a
    basket learns another item of the basket that follows, and none of its own.
    """
    log = record.interactions
    mask = train_mask(log, record.requests, "validation", record.cuts)
    item, user, time = log.item[mask], log.user[mask], log.time[mask]
    inputs, targets = [], []
    for person in people.tolist():
        first, last = np.searchsorted(user, [person, person + 1])
        own = item[first:last]
        following = _find_next(time[first:last]) if by_moment else np.arange(1, len(own) + 1)
        length = int((following < len(own)).sum())  # places that something follows; they come first
        for start in range(0, length, max_length):
            end = min(start + max_length, length)
            inputs.append(own[start:end].astype(np.int32))
            targets.append(own[following[start:end]].astype(np.int32))
    return Examples.build(inputs, targets=targets)


def _find_next(time: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Of each event of one person, an event at the next time, in turns; the number of events where there is none."""
    starts = np.flatnonzero(np.diff(time, prepend=time[:1] - 1))
    edges = np.append(starts, len(time))
    moment = np.repeat(np.arange(len(starts)), np.diff(edges))
    place = np.arange(len(time)) - starts[moment]
    after = np.minimum(moment + 1, len(starts))
    sizes = np.append(np.diff(edges), 1)
    following: npt.NDArray[np.int64] = edges[after] + place % sizes[after]
    return following
