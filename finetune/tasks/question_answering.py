"""Extractive question answering: from a question and a passage to a span of the passage, or to no answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.answers import find_answers
from finetune.data.batches import IGNORED, Batch, Examples, Indices
from finetune.data.rows import Row
from finetune.data.windows import Windows, encode_windows
from finetune.errors import DataError, DivergedError, ModelError
from finetune.evaluation.answer_baselines import Questions, compute_answer_baselines
from finetune.evaluation.answer_metrics import build_answer_statistics, compute_answer_f1, tune_threshold
from finetune.evaluation.corpus_metrics import compute_corpus_metric
from finetune.evaluation.corpus_scoring import CorpusSplit, SystemOutput, score_corpus
from finetune.models.base import BaseModel
from finetune.models.classifier import get_padding
from finetune.models.prediction import compute_by_row, scatter_rows
from finetune.models.question_answering import (
    build_answerer,
    build_answerer_shape,
    compute_span_logits,
    compute_span_losses,
    find_best_spans,
    load_saved_answerer,
)
from finetune.recipe.schema import ModelSection, TaskSection
from finetune.tasks import language
from finetune.tasks.shapes import OnBase
from finetune.tasks.task import HeldOut, Judgement, Outputs, TaskData

TARGETS = 4
"""Of a window: first and last token of the answer, 0 and 0 where it holds none; first and last token of the passage."""
OUTPUTS = 7
"""Of a window: loss; logits of no answer and of the best span; the span's first and last token, and the answer's."""
NEVER = -1e4
"""The margin of a passage that no span lies in; finite, so that a threshold can be, and far below any other."""
NOTHING = "(no answer)"


@dataclass(frozen=True)
class Answer:
    """What a passage says to a question.

    Args:
        text: the part of the passage that answers; "" where it holds no answer.
        start, end: its characters; None where there is no answer.
        score: of the passage's best span against no answer, from 0 to 1, above 0.5 where it is given; not calibrated.
    """

    text: str
    start: int | None
    end: int | None
    score: float


@dataclass(frozen=True)
class Span:
    """The best span of a passage, whether it is an answer or not.

    Args:
        text: of the passage.
        start, end: its characters.
        margin: its logit minus that of no answer.
    """

    text: str
    start: int
    end: int
    margin: float

    def decide(self, threshold: float) -> Answer:
        """The span where its margin is above the threshold, else no answer."""
        score = float(1 / (1 + np.exp(np.clip(threshold - self.margin, -50, 50))))
        is_given = self.margin > threshold
        return Answer(self.text, self.start, self.end, score) if is_given else Answer("", None, None, score)


@dataclass(frozen=True)
class QuestionAnswering(OnBase):
    """The shape of SQuAD 2.0 (arXiv:1806.03822): some questions have no answer in their passage.

    An example is a window of a row's passage; its label is the number of the row in its split.

    Args:
        stride: tokens that two windows share; None for a third of their length.
        max_answer_tokens: most tokens of an answer.
        start_column: holds the character of the passage at which the answer starts, where the data say so.
    """

    stride: int | None = None
    max_answer_tokens: int = 30
    start_column: str = "answer_start"

    type: ClassVar[str] = "question_answering"
    roles: ClassVar[tuple[str, ...]] = ("text", "passage", "answer")
    optional_roles: ClassVar[tuple[str, ...]] = ()
    scored_by: ClassVar[str] = "spans"
    # PEFT's own class for answers (0.21) hands on neither positions nor token types.
    peft_type: ClassVar[str] = "TOKEN_CLS"
    cuts_rows: ClassVar[bool] = False
    labels: ClassVar[None] = None

    @classmethod
    def build(cls, section: TaskSection, data: TaskData) -> QuestionAnswering:
        """Nothing is left to the data.

        Raises:
            DataError: the recipe names a column for `answer_start` that is not there.
        """
        named = section.columns.get("answer_start")
        if named is not None and data.rows and named not in data.rows[0].values:
            raise DataError(
                f"{section.data}: column {named!r} must exist, got columns {', '.join(data.rows[0].values)}. "
                "Correct tasks.<name>.columns."
            )
        return cls(section.stride, section.max_answer_tokens, named or "answer_start")

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Find each answer in its passage: `answer_start` is a character, or None where the answer is "".

        Raises:
            DataError: an answer that is not where it should be.
        """
        return find_answers(rows, self.start_column)

    def bind(self, tokenizer: Any) -> QuestionAnswering:
        """Nothing is left to the tokenizer.

        Raises:
            ModelError: it puts no token in front of a question, at which "no answer" could be said.
        """
        ids = tokenizer("a", "b")["input_ids"]
        if not tokenizer.is_fast or not ids or ids[0] not in tokenizer.all_special_ids:
            raise ModelError(
                "question_answering: the tokenizer must be a fast one that begins texts with a special token such as "
                "[CLS], which stands for no answer. Take an encoder such as BERT as base."
            )
        return self

    def encode(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Windows:
        """The windows of rows with `text` and `passage`."""
        return encode_windows(
            [row.values["text"] for row in rows],
            [row.values["passage"] for row in rows],
            tokenizer,
            max_length=max_length,
            stride=max_length // 3 if self.stride is None else self.stride,
        )

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Encode prepared rows as windows of at most `max_length` tokens.

        A window that lacks a part of the answer says no answer, as in BERT's own training. Where no window holds the
        whole, which takes an answer longer than the stride, nothing is learned from the row: its targets are -100.
        """
        return _build_examples(rows, self.encode(rows, tokenizer, max_length))

    def build_model(self, base: BaseModel, section: ModelSection, tokenizer: Any, seed: int) -> nn.Module:
        """The base with a new head, in float32."""
        return build_answerer(base, section, seed=seed)

    def build_shape(self, base: BaseModel, section: ModelSection, tokenizer: Any) -> nn.Module:
        """The same without weights."""
        return build_answerer_shape(base, section)

    def load_model(self, folder: Path, base: BaseModel | None = None) -> nn.Module:
        """A whole model as `save_pretrained` wrote it, or the base with a saved adapter's configuration."""
        return load_saved_answerer(folder, base)

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Mean cross-entropy of the first and the last token of each window's answer, (B,)."""
        starts, ends = compute_span_logits(model, batch)
        return compute_span_losses(starts, ends, _get_targets(batch)[:, :2], label_smoothing)

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """1 for every window."""
        return np.ones(len(examples), dtype=np.float32)

    def compute_outputs(
        self,
        model: nn.Module,
        examples: Examples,
        pad_token_id: int | None,
        *,
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> Outputs:
        """What `OUTPUTS` says of each window, (W, 7)."""

        def compute(batch: Batch, _rows: Indices) -> torch.Tensor:
            starts, ends = compute_span_logits(model, batch)
            targets = _get_targets(batch)
            best, first, last = find_best_spans(starts, ends, targets[:, 2:], self.max_answer_tokens)
            losses = compute_span_losses(starts, ends, targets[:, :2], 0.0)
            return torch.stack([losses, starts[:, 0] + ends[:, 0], best, first, last, *targets[:, :2].T], dim=1)

        found = compute_by_row(model, examples, pad_token_id, compute, share=share, advance=advance)
        return scatter_rows(found, len(examples), OUTPUTS)

    def compute_metrics(
        self, outputs: Outputs, references: npt.NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, float]:
        """Loss of the windows, and the named metrics with tokens in place of words and 0 as threshold.

        Args:
            outputs: of W windows.
            references: number of the row that each is of, (W,).
            names: metrics.
        """
        chosen, margins = choose_windows(outputs, references)
        first, last, answer_first, answer_last = outputs[chosen, 3:].astype(np.int64).T
        given = margins > 0
        has_answer = np.bincount(references, weights=outputs[:, 5] != 0)[np.unique(references)] > 0
        overlap = np.minimum(last, answer_last) - np.maximum(first, answer_first) + 1
        lengths = (last - first + 1) + (answer_last - answer_first + 1)
        shared = np.where(answer_first > 0, np.maximum(overlap, 0) * 2 / np.maximum(lengths, 1), 0.0)
        f1 = np.where(given, shared, ~has_answer)
        table = build_answer_statistics(f1 == 1, f1, has_answer)
        values = {name: compute_corpus_metric(name, table) for name in names}
        loss = float(outputs[:, 0].mean())
        return {"loss": loss} | {name: float("nan") if value is None else value for name, value in values.items()}

    def find_spans(
        self,
        model: nn.Module,
        tokenizer: Any,
        rows: Sequence[Row],
        max_length: int,
        *,
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> list[Span]:
        """The best span of each row's passage.

        Args:
            model: in evaluation mode.
            tokenizer: the model's.
            rows: N of them, with `text` and `passage`.
            max_length: tokens of a window.
            advance: called with the number of windows after each batch.

        Raises:
            DivergedError: the model's logits hold nan or infinity.
        """
        windows = self.encode(rows, tokenizer, max_length)
        examples = _build_examples(rows, windows)
        outputs = self.compute_outputs(model, examples, get_padding(model, tokenizer), advance=advance)
        if not np.isfinite(outputs[:, 1]).all():
            raise DivergedError(
                "question_answering: the model's logits must be finite, got nan or infinity. Lower "
                "train.learning_rate, or set train.precision: float32."
            )
        chosen, margins = choose_windows(outputs, windows.owners)
        spans = []
        for row, window, margin in zip(rows, chosen, margins.tolist(), strict=True):
            first, last = outputs[window, 3:5].astype(np.int64)
            places = windows.places[window]
            start, end = (0, 0) if margin == NEVER else (int(places[first, 0]), int(places[last, 1]))
            spans.append(Span(row.values["passage"][start:end], start, end, margin))
        return spans

    def judge(self, held_out: HeldOut) -> Judgement:
        """Tune the threshold on validation, and score validation and test."""
        rows = held_out.rows
        questions = {
            name: Questions(*([row.values[role] for row in part] for role in self.roles)) for name, part in rows.items()
        }
        spans = {
            name: self.find_spans(held_out.model, held_out.tokenizer, rows[name], held_out.max_length)
            for name in held_out.judged
        }
        if held_out.settings is not None:
            threshold = float(held_out.settings.get("threshold", 0.0))
        else:
            margins = np.array([span.margin for span in spans["validation"]])
            texts = [span.text for span in spans["validation"]]
            threshold = tune_threshold(margins, texts, questions["validation"].answers)
        answers = {name: [span.decide(threshold) for span in found] for name, found in spans.items()}
        baselines = compute_answer_baselines(held_out.section.baselines, questions["validation"], questions["test"])
        scored = {
            name: score_corpus(
                CorpusSplit(
                    name=name,
                    model=SystemOutput(texts=[answer.text for answer in said]),
                    references=questions[name].answers,
                    inputs=questions[name].passages,
                    values=[row.values for row in rows[name]],
                    baselines=baselines[name],
                    resampling=held_out.resample(name),
                    opened=held_out.opened if name == "test" else None,
                ),
                held_out.section,
            )
            for name, said in answers.items()
        }
        tested = answers["test"]
        return Judgement(
            scored=scored,
            predictions={
                "id": [row.id for row in rows["test"]],
                "text": questions["test"].texts,
                "reference": questions["test"].answers,
                "prediction": [answer.text for answer in tested],
                "start": [answer.start for answer in tested],
                "end": [answer.end for answer in tested],
                "score": [answer.score for answer in tested],
            },
            samples=_show_samples(rows["test"], tested, held_out.section.samples),
            samples_title="Answers",
            settings={"threshold": threshold},
        )

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {
            "type": self.type,
            "stride": self.stride,
            "max_answer_tokens": self.max_answer_tokens,
            "start_column": self.start_column,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuestionAnswering:
        """Inverse of `to_config`."""
        return cls(config["stride"], config["max_answer_tokens"], config["start_column"])


def choose_windows(outputs: Outputs, owners: Indices) -> tuple[Indices, npt.NDArray[np.float64]]:
    """Put the windows of a row together, as for SQuAD 2.0: its best span, against no answer where that is least likely.

    Args:
        outputs: of W windows, (W, 7).
        owners: number of the row of each, (W,).

    Returns:
        For each of N rows in ascending order the window of its best span, (N,), and the span's margin, (N,).
    """
    order = np.lexsort((-outputs[:, 2], owners))
    firsts = np.flatnonzero(np.diff(owners[order], prepend=-1))
    chosen = order[firsts]
    nothing = np.minimum.reduceat(outputs[order, 1].astype(np.float64), firsts) if len(firsts) else np.zeros(0)
    return chosen, np.maximum(outputs[chosen, 2].astype(np.float64) - nothing, NEVER)


def _build_examples(rows: Sequence[Row], windows: Windows) -> Examples:
    spans: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        answer, start = row.values.get("answer"), row.values.get("answer_start")
        length = len(answer) if answer and start is not None else 0
        found = windows.locate(number, start or 0, (start or 0) + length)
        lost = bool(length) and not any(found)
        spans += [place or ((IGNORED, IGNORED) if lost else (0, 0)) for place in found]
    targets = np.hstack([np.array(spans, dtype=np.int64).reshape(-1, 2), windows.parts])
    return Examples.build(
        windows.input_ids, windows.owners.tolist(), targets=targets.tolist(), types=windows.token_type_ids
    )


def _get_targets(batch: Batch) -> torch.Tensor:
    """What `TARGETS` says of each window, (B, 4); packed they come as one row."""
    return batch["labels"].view(-1, TARGETS)


def _show_samples(rows: Sequence[Row], answers: Sequence[Answer], count: int) -> list[dict[str, Any]]:
    """Rows from the worst to the best answer."""
    scores = [compute_answer_f1(answer.text, row.values["answer"]) for row, answer in zip(rows, answers, strict=True)]
    order = np.argsort(scores, kind="stable")
    return [
        {
            "input": f"{rows[i].values['text']}\n\n{rows[i].values['passage']}",
            "output": answers[i].text or NOTHING,
            "reference": rows[i].values["answer"] or NOTHING,
            "note": f"F1 {scores[i]:.2f}, score {answers[i].score:.2f}",
        }
        for i in (int(order[place]) for place in language.spread_rows(rows, count))
    ]
