"""Reranking: a question and an entry read together, one score that says whether the entry answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import Batch, Examples, list_inputs
from finetune.data.knowledge import Entry
from finetune.data.rows import Row
from finetune.data.turns import CONTEXT
from finetune.evaluation.ranking_baselines import Rankings, find_places
from finetune.models.base import BaseModel
from finetune.models.classifier import (
    build_classifier,
    build_classifier_shape,
    get_padding,
    load_saved_classifier,
)
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import ModelSection, TaskSection, TextStep
from finetune.tasks.encoding import read_question
from finetune.tasks.entries import ENTRY, Library, compute_mean_metrics
from finetune.tasks.shapes import OnBase
from finetune.tasks.task import HeldOut, Judgement, Outputs, TaskData

RELEVANT = "relevant"
"""The one class."""


@dataclass(frozen=True)
class Reranking(OnBase):
    """The shape of a second look at what a first search found: a cross-encoder (arXiv:1901.04085).

    A question is trained on with its right entries and with entries that look right and are not. The label of a pair is
    2 * the number of its question, plus 1 where the entry is right.

    Args:
        size: questions in the data, at least as many as in any of their splits.
        clean: steps on each question before it is encoded.
        reads_context: whether what was said before belongs to the question.
        negatives: wrong entries for a question.
        candidates: entries that are looked at again when the model is judged, the best of `first_search`.
        entries: what the questions are answered from; none where a trained model was loaded.
        first_search: the baseline that finds them.
        reads_types: whether the model is told which of the two texts a token belongs to, where its tokenizer says so;
            what is trained here is not.
    """

    size: int
    clean: tuple[TextStep, ...] = ()
    reads_context: bool = False
    negatives: int = 4
    candidates: int = 20
    entries: tuple[Entry, ...] = ()
    first_search: str = "fused"
    reads_types: bool = False

    type: ClassVar[str] = "reranking"
    roles: ClassVar[tuple[str, ...]] = ("text", ENTRY)
    optional_roles: ClassVar[tuple[str, ...]] = (CONTEXT,)
    scored_by: ClassVar[str] = "ranking"
    peft_type: ClassVar[str] = "SEQ_CLS"
    cuts_rows: ClassVar[bool] = False
    labels: ClassVar[None] = None
    head: ClassVar[dict[str, Any]] = {"type": "sequence_classification", "num_labels": 1, "labels": [RELEVANT]}
    width: ClassVar[int] = 1

    @cached_property
    def library(self) -> Library:
        """The entries, and what rows say of them."""
        return Library(self.entries, self.reads_context)

    @property
    def codes(self) -> int:
        """Labels that there are."""
        return 2 * self.size

    @classmethod
    def build(cls, section: TaskSection, data: TaskData) -> Reranking:
        """Settle the entries.

        Raises:
            DataError: a row names no entry of the knowledge.
        """
        library = Library(tuple(data.entries), CONTEXT in section.columns)
        library.check(data.rows)
        return cls(
            size=len(data.rows),
            clean=tuple(section.clean),
            reads_context=library.reads_context,
            negatives=section.negatives,
            candidates=section.candidates,
            entries=library.entries,
        )

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Clean the questions; what no entry answers is left out."""
        return self.library.prepare(rows, self.clean)

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Pairs, question by question; where a pair is too long, the longer text is cut."""
        questions: list[str] = []
        passages: list[str] = []
        labels: list[int] = []
        # Half of them drawn: what it looks at again was found by meaning, and often shares no word.
        mined = self.library.mine(rows, self.negatives, self.negatives // 2)
        for number, (row, wrong) in enumerate(zip(rows, mined, strict=True)):
            right = self.library.find_right(row)
            questions += [read_question(row, self.reads_context)] * (len(right) + len(wrong))
            passages += [self.entries[entry].passage for entry in (*right, *wrong)]
            labels += [2 * number + 1] * len(right) + [2 * number] * len(wrong)
        return self.encode_pairs(questions, passages, tokenizer, max_length, labels)

    def encode_pairs(
        self,
        questions: Sequence[str],
        passages: Sequence[str],
        tokenizer: Any,
        max_length: int,
        labels: Sequence[int] | None = None,
    ) -> Examples:
        """Each question with its passage; where both are too long, the longer one is cut."""
        if not questions:
            return Examples.build([], labels)
        encoded = tokenizer(list(questions), list(passages), truncation="longest_first", max_length=max_length)
        types = encoded.get("token_type_ids") if self.reads_types else None
        return Examples.build(encoded["input_ids"], labels, types=types)

    def build_model(self, base: BaseModel, section: ModelSection, tokenizer: Any, seed: int) -> nn.Module:
        """The base with a new head of one score, in float32."""
        return build_classifier(base, [RELEVANT], section, seed=seed)

    def build_shape(self, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
        """The same without weights."""
        return build_classifier_shape(base, [RELEVANT], section)

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A whole model as `save_pretrained` wrote it, or the base with a saved adapter's configuration."""
        return load_saved_classifier(folder, base)

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Loss of each pair, (B,)."""
        return self.compute_loss(model(**list_inputs(batch)).logits, batch["labels"], label_smoothing)

    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Binary cross-entropy of each pair by itself, so that a score also says when no entry answers.

        Args:
            logits: (B, 1).
            labels: (B,).
            label_smoothing: not used.
        """
        return nn.functional.binary_cross_entropy_with_logits(
            logits[:, 0].float(), (labels % 2).float(), reduction="none"
        )

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """Of every question the right pairs count 1 together, and the wrong ones too."""
        return self._weigh(examples.labels)

    def _weigh(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return (1 / np.bincount(labels)[labels]).astype(np.float32)

    def compute_outputs(
        self,
        model: nn.Module,
        examples: Examples,
        pad_token_id: int | None,
        *,
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> Outputs:
        """Logits, (N, 1)."""
        return compute_logits(model, examples, pad_token_id, share=share, advance=advance)

    def compute_metrics(
        self, outputs: Outputs, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Loss, and the named metrics of each question's ranking of its own pairs."""
        losses = self.compute_loss(torch.from_numpy(outputs), torch.from_numpy(references), 0.0)
        questions, places = references // 2, []
        for question in np.unique(questions):
            rows = np.flatnonzero(questions == question)
            places.append(find_places(outputs[rows, 0], np.flatnonzero(references[rows] % 2).tolist()))
        loss = np.average(losses.numpy(), weights=self._weigh(references))
        return {"loss": float(loss)} | compute_mean_metrics(names, places)

    def judge(self, held_out: HeldOut) -> Judgement:
        """Rank again the best of `first_search`; behind them everything stays as it was."""
        rankings: dict[str, Rankings] = {}
        baselines: dict[str, dict[str, Any]] = {}
        for name in held_out.judged:
            rows = held_out.rows[name]
            names = list(dict.fromkeys([*held_out.section.baselines, self.first_search]))
            found = self.library.rank_baselines(held_out, rows, names)
            rankings[name] = self._rerank(held_out, rows, found[self.first_search][0])
            baselines[name] = {system: found[system] for system in held_out.section.baselines}
        judgement = self.library.judge(held_out, rankings, baselines)
        how = {"first_search": self.first_search, "candidates": self.candidates}
        return replace(judgement, scored={name: scored | how for name, scored in judgement.scored.items()})

    def _rerank(self, held_out: HeldOut, rows: Sequence[Row], first: Rankings) -> Rankings:
        """`first`, (N, E), with the best of each row in the order of the model's scores."""
        count = min(self.candidates, len(self.entries))
        chosen = np.argsort(-first, axis=1, kind="stable")[:, :count]
        questions = [text for row in rows for text in [read_question(row, self.reads_context)] * count]
        passages = [self.entries[number].passage for numbers in chosen for number in numbers]
        pairs = self.encode_pairs(questions, passages, held_out.tokenizer, held_out.max_length)
        logits = self.compute_outputs(held_out.model, pairs, get_padding(held_out.model, held_out.tokenizer))
        ranking = first.copy()
        lowest, highest = logits.min(initial=0.0), first.max(initial=0.0)
        np.put_along_axis(ranking, chosen, highest + 1 + logits.reshape(chosen.shape) - lowest, axis=1)
        return ranking

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights; the entries are no part of it."""
        return {
            "type": self.type,
            "size": self.size,
            "clean": list(self.clean),
            "reads_context": self.reads_context,
            "negatives": self.negatives,
            "candidates": self.candidates,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Reranking:
        """Inverse of `to_config`."""
        return cls(
            config["size"],
            tuple(config["clean"]),
            config["reads_context"],
            config["negatives"],
            config["candidates"],
        )
