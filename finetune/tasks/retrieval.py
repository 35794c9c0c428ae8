"""Retrieval: a question, and the entries that answer it, found among all by the cosine of two vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import Batch, Examples, Indices, list_inputs
from finetune.data.knowledge import Entry
from finetune.data.ranking import COSINE_SCALE
from finetune.data.rows import Row
from finetune.data.turns import CONTEXT
from finetune.evaluation.ranking_baselines import find_places
from finetune.models.base import BaseModel
from finetune.models.classifier import get_padding
from finetune.models.encoder import build_encoder, build_encoder_shape, load_saved_encoder, read_features
from finetune.models.prediction import compute_by_row, scatter_rows
from finetune.recipe.schema import ModelSection, TaskSection, TextStep
from finetune.tasks.encoding import encode_texts
from finetune.tasks.entries import ENTRY, Library, compute_mean_metrics
from finetune.tasks.shapes import OnBase
from finetune.tasks.task import HeldOut, Judgement, Outputs, TaskData


@dataclass(frozen=True)
class Retrieval(OnBase):
    """The shape of finding answers and products.

    A question is trained on beside its right entries, and entries that look right and are not. The label of an entry is
    its number; that of a question is E plus the number of its answer, a set of entries.

    Args:
        size: E, entries that there are.
        answers: the sets of entries that answer a question of the data.
        clean: steps on each question before it is encoded.
        reads_context: whether what was said before belongs to the question.
        negatives: wrong entries beside a question.
        entries: E of them; none where a trained model was loaded.
    """

    size: int
    answers: tuple[tuple[int, ...], ...]
    clean: tuple[TextStep, ...] = ()
    reads_context: bool = False
    negatives: int = 4
    entries: tuple[Entry, ...] = ()

    type: ClassVar[str] = "retrieval"
    roles: ClassVar[tuple[str, ...]] = ("text", ENTRY)
    optional_roles: ClassVar[tuple[str, ...]] = (CONTEXT,)
    scored_by: ClassVar[str] = "ranking"
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    cuts_rows: ClassVar[bool] = False
    labels: ClassVar[None] = None
    head: ClassVar[dict[str, Any]] = {"type": "sentence_embedding"}
    width: ClassVar[None] = None

    @cached_property
    def library(self) -> Library:
        """The entries, and what rows say of them."""
        return Library(self.entries, self.reads_context)

    @property
    def codes(self) -> int:
        """Labels that there are."""
        return self.size + len(self.answers)

    @classmethod
    def build(cls, section: TaskSection, data: TaskData) -> Retrieval:
        """Settle the entries and the answers.

        Raises:
            DataError: a row names no entry of the knowledge.
        """
        library = Library(tuple(data.entries), CONTEXT in section.columns)
        library.check(data.rows)
        answers = sorted({library.find_right(row) for row in library.keep_answered(data.rows)})
        return cls(
            len(data.entries),
            tuple(answers),
            tuple(section.clean),
            library.reads_context,
            section.negatives,
            library.entries,
        )

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Clean the questions; what no entry answers is left out."""
        return self.library.prepare(rows, self.clean)

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """The questions, each with its right entries and wrong ones as companions, and behind them these entries; of a
        long question the end stays."""
        numbers = {answer: self.size + number for number, answer in enumerate(self.answers)}
        questions = self.library.encode_questions(rows, tokenizer, max_length)
        right = [self.library.find_right(row) for row in rows]
        wrong = self.library.mine(rows, self.negatives)
        needed = sorted({entry for entries in (*right, *wrong) for entry in entries})
        places = {entry: len(rows) + place for place, entry in enumerate(needed)}
        passages = encode_texts([self.entries[entry].passage for entry in needed], tokenizer, max_length)
        companions = [
            [places[entry] for entry in (*rights, *wrongs)] for rights, wrongs in zip(right, wrong, strict=True)
        ]
        return Examples.build(
            [*questions, *passages],
            [*(numbers[answer] for answer in right), *needed],
            companions=[*companions, *([] for _ in needed)],
        )

    def build_model(self, base: BaseModel, section: ModelSection, tokenizer: Any, seed: int) -> nn.Module:
        """The base as a sentence encoder, in float32."""
        return build_encoder(base, section)

    def build_shape(self, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
        """The same without weights."""
        return build_encoder_shape(base, section)

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A whole model as `save_pretrained` wrote it, or the base with a saved adapter's configuration."""
        return load_saved_encoder(folder, base)

    def list_modules(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Nothing stands beside the base."""
        return [], []

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Loss of each question, (B,); 0 for entries."""
        return self.compute_loss(read_features(model(**list_inputs(batch))), batch["labels"], label_smoothing)

    def compute_loss(self, features: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Multiple negatives ranking loss: of the entries in a batch, those that answer should be nearest to a question
        (arXiv:1705.00652, section 4.4; here with several right entries, whose shares add up).

        Args:
            features: (B, D), of length 1.
            labels: (B,).
            label_smoothing: not used.

        Returns:
            (B,): -log of the right entries' share in the softmax of 20 * cosine; 0 for entries.
        """
        losses = features.sum(dim=1) * 0.0  # a gradient for every process, also where it has nothing to compare
        asked, known = torch.nonzero(labels >= self.size).squeeze(1), torch.nonzero(labels < self.size).squeeze(1)
        if not len(asked) or not len(known):
            return losses
        right = torch.stack(
            [
                torch.isin(labels[known], torch.tensor(self.answers[answer], device=labels.device))
                for answer in (labels[asked] - self.size).tolist()
            ]
        )
        logits = COSINE_SCALE * features[asked].float() @ features[known].float().T  # (questions, entries)
        found = logits.masked_fill(~right, -torch.inf).logsumexp(1)
        has_answer = right.any(1)  # not where a share of a batch holds a question alone
        part = torch.where(has_answer, logits.logsumexp(1) - found.masked_fill(~has_answer, 0.0), 0.0)
        return losses.float().index_add(0, asked, part)

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """1 for questions, 0 for entries."""
        return (examples.labels >= self.size).astype(np.float32)

    def compute_outputs(
        self,
        model: nn.Module,
        examples: Examples,
        pad_token_id: int | None,
        *,
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> Outputs:
        """Features of length 1, (N, D)."""

        def compute(batch: Batch, _rows: Indices) -> torch.Tensor:
            return read_features(model(**list_inputs(batch)))

        found = compute_by_row(model, examples, pad_token_id, compute, share=share, advance=advance)
        width = found[0][1].shape[1] if found else int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]  # a transformers config
        return scatter_rows(found, len(examples), width)

    def compute_metrics(
        self, outputs: Outputs, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Loss, and the named metrics of a ranking of the entries that occur: fewer than there are in all."""
        known, where = np.unique(references[references < self.size], return_index=True)
        entries = outputs[references < self.size][where]
        asked = references >= self.size
        places = [
            find_places(entries @ features, np.flatnonzero(np.isin(known, self.answers[answer])).tolist())
            for features, answer in zip(outputs[asked], references[asked] - self.size, strict=True)
        ]
        losses = self.compute_loss(torch.from_numpy(outputs), torch.from_numpy(references), 0.0)[
            torch.from_numpy(asked)
        ]
        return {"loss": losses.mean().item()} | compute_mean_metrics(names, places)

    def judge(self, held_out: HeldOut) -> Judgement:
        """Rank all entries for the questions of validation and test."""
        pad_token_id = get_padding(held_out.model, held_out.tokenizer)
        passages = [entry.passage for entry in self.entries]

        def embed(encoded: Sequence[list[int]]) -> Outputs:
            return self.compute_outputs(held_out.model, Examples.build(encoded), pad_token_id)

        known = embed(encode_texts(passages, held_out.tokenizer, held_out.max_length))
        rankings, baselines = {}, {}
        for name in held_out.judged:
            rows = held_out.rows[name]
            asked = embed(self.library.encode_questions(rows, held_out.tokenizer, held_out.max_length))
            rankings[name] = (asked @ known.T).astype(np.float32)
            baselines[name] = self.library.rank_baselines(held_out, rows, held_out.section.baselines)
        return self.library.judge(held_out, rankings, baselines)

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights; the entries are no part of it."""
        return {
            "type": self.type,
            "size": self.size,
            "answers": [list(answer) for answer in self.answers],
            "clean": list(self.clean),
            "reads_context": self.reads_context,
            "negatives": self.negatives,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Retrieval:
        """Inverse of `to_config`."""
        answers = tuple(tuple(answer) for answer in config["answers"])
        return cls(config["size"], answers, tuple(config["clean"]), config["reads_context"], config["negatives"])
