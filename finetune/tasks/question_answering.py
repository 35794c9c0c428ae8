"""Extractive question answering: from a question and a passage to a span of the passage, or to no answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import IGNORED, Batch, Examples, Indices
from finetune.data.rows import Row
from finetune.data.windows import Windows, encode_windows
from finetune.errors import DataError, DivergedError, ModelError
from finetune.evaluation.answer_baselines import find_sentences
from finetune.evaluation.answer_metrics import build_answer_statistics, compute_answer_f1, tune_threshold
from finetune.evaluation.corpus_metrics import compute_corpus_metric
from finetune.evaluation.corpus_scoring import CorpusSplit, SystemOutput, score_corpus
from finetune.models.base import BaseModel, load_tokenizer
from finetune.models.classifier import get_padding, list_head_modules, list_new_modules
from finetune.models.prediction import compute_by_row, scatter_rows
from finetune.models.question_answering import (
    build_answerer,
    build_answerer_shape,
    compute_span_logits,
    find_best_spans,
    load_saved_answerer,
)
from finetune.recipe.schema import ModelSection, TaskSection
from finetune.tasks import language
from finetune.tasks.task import HeldOut, Judgement, Outputs

TARGETS = 4
"""Of a window: first and last token of the answer, 0 and 0 where it holds none; first and last token of the passage."""
OUTPUTS = 7
"""Of a window: loss; logits of no answer and of the best span; the span's first and last token, and the answer's."""
NEVER = -1e4
"""The margin of a passage that no span lies in; finite, so that a threshold can be, and far below any other."""
NOTHING = "(no answer)"
MISTAKES = 5  # rows that a message names


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
class QuestionAnswering:
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
    scored_by: ClassVar[str] = "spans"
    # PEFT's own class for answers (0.21) hands on neither positions nor token types.
    peft_type: ClassVar[str] = "TOKEN_CLS"
    cuts_rows: ClassVar[bool] = False
    labels: ClassVar[None] = None

    @classmethod
    def build(
        cls, section: TaskSection, card_labels: list[str] | dict[str, str] | None, rows: Sequence[Row]
    ) -> QuestionAnswering:
        """Nothing is left to the data.

        Raises:
            DataError: the recipe names a column for `answer_start` that is not there.
        """
        named = section.columns.get("answer_start")
        if named is not None and rows and named not in rows[0].values:
            raise DataError(
                f"{section.data}: column {named!r} must exist, got columns {', '.join(rows[0].values)}. "
                "Correct tasks.<name>.columns."
            )
        return cls(section.stride, section.max_answer_tokens, named or "answer_start")

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Find each answer in its passage: `answer_start` is a character, or None where the answer is "".

        Raises:
            DataError: an answer that is not where it should be.
        """
        found = [(row, _find_start(row, self.start_column)) for row in rows]
        if wrong := [(row, start) for row, start in found if isinstance(start, str)]:
            more = f" and {len(wrong) - MISTAKES:,} more" if len(wrong) > MISTAKES else ""
            listed = "; ".join(f"{row.id} {reason}" for row, reason in wrong[:MISTAKES])
            raise DataError(
                f"question_answering: every answer must stand in its passage, got {listed}{more}. Correct the rows; an "
                "empty answer says that there is none."
            )
        return [replace(row, values={**row.values, "answer_start": start}) for row, start in found]

    def build_tokenizer(self, base: BaseModel, rows: Sequence[Row], section: ModelSection) -> Any:
        """The base's."""
        return load_tokenizer(base)

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

    def list_modules(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """The head."""
        return list_new_modules(model), list_head_modules(model)

    def start(self, model: nn.Module, train: Examples, pad_token_id: int | None) -> None:
        """Nothing to start."""

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Mean cross-entropy of the first and the last token of each window's answer, (B,)."""
        starts, ends = compute_span_logits(model, batch)
        return _compute_losses(starts, ends, _get_targets(batch), label_smoothing)

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
            losses = _compute_losses(starts, ends, targets, 0.0)
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
        spans = {
            name: self.find_spans(held_out.model, held_out.tokenizer, rows[name], held_out.max_length)
            for name in held_out.judged
        }
        if held_out.settings is not None:
            threshold = float(held_out.settings.get("threshold", 0.0))
        else:
            threshold = _tune([(span.text, span.margin) for span in spans["validation"]], rows["validation"])
        answers = {name: [span.decide(threshold) for span in found] for name, found in spans.items()}
        baselines = _compute_baselines(held_out)
        scored = {
            name: score_corpus(
                CorpusSplit(
                    name=name,
                    model=SystemOutput(texts=[answer.text for answer in found], settings={"threshold": threshold}),
                    references=[row.values["answer"] for row in rows[name]],
                    inputs=[row.values["passage"] for row in rows[name]],
                    values=[row.values for row in rows[name]],
                    baselines=baselines[name],
                    opened=held_out.opened if name == "test" else None,
                ),
                held_out.section,
                held_out.seed,
            )
            for name, found in answers.items()
        }
        tested = answers["test"]
        return Judgement(
            scored=scored,
            predictions={
                "id": [row.id for row in rows["test"]],
                "text": [row.values["text"] for row in rows["test"]],
                "reference": [row.values["answer"] for row in rows["test"]],
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


def _find_start(row: Row, column: str) -> int | str | None:
    """Where the row's answer starts, None for no answer, or what is wrong with it."""
    passage, answer = row.values.get("passage") or "", row.values.get("answer") or ""
    given = row.values.get(column)
    if not answer:
        return None
    if given in (None, ""):
        start = passage.find(answer)
        return start if start >= 0 else f"has {_shorten(answer)}, which is not there"
    try:
        start = int(float(given))
    except (TypeError, ValueError):
        return f"has {column} {given!r}, which is no number"
    if start < 0 or not passage.startswith(answer, start):
        there = passage[start : start + len(answer)] if start >= 0 else ""
        return f"has {_shorten(answer)} with {column} {start}, where {_shorten(there)} stands"
    return start


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


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


def _compute_losses(
    starts: torch.Tensor, ends: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Logits (B, T) and targets (B, 4) -> (B,); 0 where the target is -100."""
    parts = []
    for logits, places in ((starts, targets[:, 0]), (ends, targets[:, 1])):
        logs = logits.log_softmax(dim=1)
        losses = nn.functional.nll_loss(logs, places, reduction="none", ignore_index=IGNORED)
        if label_smoothing:
            real = logits > -torch.inf
            spread = -logs.masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)
            losses = (1 - label_smoothing) * losses + label_smoothing * spread * (places != IGNORED)
        parts.append(losses)
    return (parts[0] + parts[1]) / 2


def _tune(found: Sequence[tuple[str, float]], rows: Sequence[Row]) -> float:
    """The threshold of texts with margins that suits rows best."""
    references = [row.values["answer"] for row in rows]
    return tune_threshold(
        np.array([margin for _, margin in found]),
        np.array([compute_answer_f1(text, other) for (text, _), other in zip(found, references, strict=True)]),
        np.array([compute_answer_f1("", other) for other in references]),
    )


def _compute_baselines(held_out: HeldOut) -> dict[str, dict[str, SystemOutput]]:
    """Split -> baseline -> what it says; the sentence is tuned like the model."""
    found: dict[str, dict[str, SystemOutput]] = {name: {} for name in held_out.judged}
    names = held_out.section.baselines
    if "bm25_sentence" in names:
        sentences = {
            name: find_sentences([row.values["text"] for row in rows], [row.values["passage"] for row in rows])
            for name, rows in held_out.rows.items()
            if name != "train"
        }
        texts, scores = sentences["validation"]
        threshold = _tune(list(zip(texts, scores.tolist(), strict=True)), held_out.rows["validation"])
        for name, said in found.items():
            texts, scores = sentences[name]
            said["bm25_sentence"] = SystemOutput(
                texts=[text if score > threshold else "" for text, score in zip(texts, scores, strict=True)],
                settings={"threshold": threshold},
            )
    if "no_answer" in names:
        for name, said in found.items():
            said["no_answer"] = SystemOutput(texts=[""] * len(held_out.rows[name]))
    return {name: {baseline: said[baseline] for baseline in names} for name, said in found.items()}


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
