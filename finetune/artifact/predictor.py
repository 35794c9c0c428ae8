"""What a loaded model answers: labels, vectors, texts, spans, of one task or of several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn

from finetune.data.batches import Examples
from finetune.data.rows import Row
from finetune.errors import UsageError
from finetune.evaluation.outside import OutsideRule
from finetune.models.classifier import get_padding
from finetune.models.generation import generate_texts, stream_text
from finetune.models.prediction import compute_logits
from finetune.recipe.messages import count_of
from finetune.recipe.schema import GenerateSection
from finetune.tasks import Completion, MultiTask, QuestionAnswering, Reranking, Retrieval, Task, TextClassification
from finetune.tasks.encoding import Side, encode_texts, join_context
from finetune.tasks.question_answering import Answer

WRITING = ("causal_lm", "seq2seq", "completion")
"""Task types whose models write text."""
USE_AS_BASE = "It is a base for other recipes: set model.base to this run, and train a task on it."
USES = {
    "text_classification": "Use finetune predict.",
    "multi_task": "Use finetune predict.",
    "causal_lm": "Use finetune generate.",
    "seq2seq": "Use finetune generate.",
    "completion": "Use finetune generate.",
    "retrieval": "Use its `embed` from Python.",
    "reranking": "Use its `score_pairs` from Python.",
    "recommendation": "Use finetune recommend.",
    "question_answering": "In Python: finetune.load(RUN).answer(question, passage).",
}
"""Task type -> what its runs are for; all others are bases."""
SHOWN_EMPTY = 20
Shape = TypeVar("Shape", TextClassification, Retrieval, Reranking)


@dataclass(frozen=True)
class Prediction:
    """The answer for one text.

    Args:
        label: the most likely class.
        confidence: its calibrated probability.
        scores: class -> calibrated probability.
        outside: the probability that the text belongs to no class, where such texts are as frequent as in validation;
            None where the run had none there to fit it on.
    """

    label: str
    confidence: float
    scores: dict[str, float]
    outside: float | None = None


def build_prediction(
    labels: Sequence[str], scores: npt.NDArray[np.float64], outside: float | None = None
) -> Prediction:
    """The answer that a row of scores, (K,), means."""
    return Prediction(
        outside=outside,
        label=labels[int(scores.argmax())],
        confidence=float(scores.max()),
        scores={label: float(score) for label, score in zip(labels, scores, strict=True)},
    )


@dataclass(frozen=True)
class Predictor:
    """A model ready to answer.

    Args:
        model: in evaluation mode, on the best device.
        tokenizer: the base's.
        task: labels and text cleaning.
        temperature: fitted on validation; 1 where not calibrated.
        max_length: tokens after which a text is cut.
        writing: how text is written, where the task writes text.
        fitted: what else was fitted on validation.
    """

    model: nn.Module
    tokenizer: Any
    task: Task
    temperature: float
    max_length: int
    writing: GenerateSection = field(default_factory=GenerateSection)
    fitted: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outside(self) -> OutsideRule | None:
        """What tells texts of no class, where the run was trained with `out_of_scope`."""
        rule = self.fitted.get("outside")
        return OutsideRule(**rule) if rule else None

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of the logits; UsageError where the task gives none."""
        return self._classify().labels

    def predict(self, texts: Iterable[str], *, advance: Callable[[int], None] = lambda _rows: None) -> list[Prediction]:
        """Score texts, in order.

        Args:
            texts: any number, as they come, none empty; the cleaning of the recipe is applied.
            advance: called with the number of texts after each batch.

        Raises:
            UsageError: one text in place of a list, what is no text, an empty one, or a run that gives no labels.
        """
        texts = check_texts(texts)
        return self.build_predictions(self.compute_text_logits(texts, advance))

    def build_predictions(self, logits: npt.NDArray[np.floating[Any]]) -> list[Prediction]:
        """The answers that logits, (N, K), mean."""
        scores = self.calibrate(logits)
        rule = self.outside
        outside = rule.compute_probabilities(logits) if rule else None
        found = [None] * len(scores) if outside is None else outside.tolist()
        return [build_prediction(self.labels, row, out) for row, out in zip(scores, found, strict=True)]

    def build_columns(self, logits: npt.NDArray[np.floating[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The same as columns of a file, (N,) each: a row of many classes takes the room of its scores."""
        scores = self.calibrate(logits)
        outside = self.outside.compute_probabilities(logits) if self.outside else None
        return {
            "predicted_label": np.array(self.labels)[scores.argmax(axis=1)],
            "confidence": scores.max(axis=1),
            **({} if outside is None else {"outside": outside}),
            **{f"score_{label}": column for label, column in zip(self.labels, scores.T, strict=True)},
        }

    def compute_scores(
        self, texts: Sequence[str], *, advance: Callable[[int], None] = lambda _rows: None
    ) -> npt.NDArray[np.float64]:
        """Calibrated probabilities, (N, K)."""
        return self.calibrate(self.compute_text_logits(texts, advance))

    def calibrate(self, logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """Calibrated probabilities from logits, both (N, K)."""
        return self._classify().compute_scores(logits, self.temperature)

    def compute_text_logits(
        self, texts: Sequence[str], advance: Callable[[int], None] = lambda _rows: None
    ) -> npt.NDArray[np.float32]:
        """Raw outputs of a classifier for texts as they come, (N, K)."""
        return self.compute_logits(self.clean(texts), advance)

    def compute_logits(
        self, rows: Sequence[Row], advance: Callable[[int], None] = lambda _rows: None
    ) -> npt.NDArray[np.float32]:
        """Raw outputs of a classifier for prepared rows, (N, K)."""
        examples = self._classify().build_examples(rows, self.tokenizer, self.max_length)
        return compute_logits(self.model, examples, get_padding(self.model, self.tokenizer), advance=advance)

    def encode(self, texts: Sequence[str]) -> Examples:
        """Texts as the classifier reads them."""
        return self._classify().build_examples(self.clean(texts), self.tokenizer, self.max_length)

    def embed(
        self,
        texts: Sequence[str],
        contexts: Sequence[str] | None = None,
        *,
        entries: bool = False,
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> npt.NDArray[np.float32]:
        """Vectors of length 1, (N, D), of a `retrieval` model: the nearer a question's to an entry's, the better.

        Args:
            texts: questions, any number, as they come; the cleaning of the recipe is applied, and of a long one the end
                stays.
            contexts: what was said before each.
            entries: whether the texts are entries, which are not cleaned, and of which the start stays.
            advance: called with the number of texts after each batch.
        """
        task = self._get(Retrieval, "embed", "vectors of texts")
        read = texts if entries else self.read_questions(texts, contexts or [""] * len(texts))
        keep: Side = "start" if entries else "end"
        examples = Examples.build(encode_texts(read, self.tokenizer, self.max_length, keep=keep))
        pad_token_id = get_padding(self.model, self.tokenizer)
        return task.compute_outputs(self.model, examples, pad_token_id, advance=advance).astype(np.float32)

    def score_pairs(self, question: str, passages: Sequence[str], context: str = "") -> npt.NDArray[np.float64]:
        """How likely each passage answers the question, of a `reranking` model: (N,), in [0, 1]. The question gets the
        cleaning of the recipe."""
        task = self._get(Reranking, "score_pairs", "scores of pairs")
        questions = self.read_questions([question], [context]) * len(passages)
        pairs = task.encode_pairs(questions, passages, self.tokenizer, self.max_length)
        logits = task.compute_outputs(self.model, pairs, get_padding(self.model, self.tokenizer))
        return np.asarray(1 / (1 + np.exp(-logits[:, 0].astype(np.float64))))

    def generate(
        self,
        texts: Sequence[str],
        section: GenerateSection | None = None,
        *,
        columns: Sequence[Mapping[str, str]] | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> list[str]:
        """Translate texts, go on with them, or complete the prompts that they belong to.

        Args:
            texts: any number, as they come; the cleaning of the recipe is applied.
            section: how tokens are chosen; default the recipe's `evaluate.generate`.
            columns: what else of each row the recipe's prompt names: column -> text.
            seed: of the sampling.
            advance: called with the number of texts after each batch.
        """
        if isinstance(texts, str):
            raise UsageError("generate: texts must be a list of texts, got one text. Write generate([text]).")
        return generate_texts(
            self.model,
            self.tokenizer,
            self._prepare_prompts(texts, section or self.writing, columns),
            section or self.writing,
            kind=self.task.type,
            max_length=self.max_length,
            seed=seed,
            advance=advance,
        )

    def stream(
        self,
        text: str,
        emit: Callable[[str], None],
        section: GenerateSection | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        """Hand on what `generate` writes to one text piece by piece, as it comes.

        Args:
            text: as it comes; the cleaning of the recipe is applied.
            emit: takes each piece. What it raises ends the writing.
            section, seed: as in `generate`.
            columns: of its row, as there.
        """
        (prompt,) = self._prepare_prompts([text], section or self.writing, [columns or {}])
        stream_text(
            self.model,
            self.tokenizer,
            prompt,
            section or self.writing,
            emit,
            kind=self.task.type,
            max_length=self.max_length,
            seed=seed,
        )

    def answer(self, question: str, passage: str) -> Answer:
        """Find the answer to a question in a passage of any length."""
        return self.answer_all([(question, passage)])[0]

    def answer_all(
        self, pairs: Sequence[tuple[str, str]], *, advance: Callable[[int], None] = lambda _rows: None
    ) -> list[Answer]:
        """Find the answers of several pairs of a question and a passage, in order.

        Args:
            pairs: any number.
            advance: called with the number of windows after each batch; a long passage has several.

        Raises:
            UsageError: the run answers no questions.
        """
        task = self.task
        if not isinstance(task, QuestionAnswering):
            raise UsageError(f"answer: must get a run of type question_answering, got {task.type}.")
        rows = [
            Row(id=str(i), split=None, number=i, values={"text": question, "passage": passage})
            for i, (question, passage) in enumerate(pairs, start=1)
        ]
        spans = task.find_spans(self.model, self.tokenizer, rows, self.max_length, advance=advance)
        return [span.decide(self.fitted.get("threshold", 0.0)) for span in spans]

    def _prepare_prompts(
        self, texts: Sequence[str], section: GenerateSection, columns: Sequence[Mapping[str, str]] | None
    ) -> list[str] | list[list[int]]:
        """Cleaned texts; one that goes on with nothing begins where one does in training: behind what separates two."""
        check_writes(self.task)
        if isinstance(self.task, Completion):
            rows = [
                replace(row, values={**more, **row.values})
                for row, more in zip(self._build_rows(texts), columns or [{}] * len(texts), strict=True)
            ]
            self.task.check_columns(rows, "generate", "Add --with {column}=TEXT.")
            rows = self.task.prepare_rows(rows)
            return self.task.encode_for_writing(rows, self.tokenizer, self.max_length, section)
        beginning = getattr(self.task, "separator", None) or ""
        return [row.values["text"] or beginning for row in self.clean(texts)]

    def clean(self, texts: Sequence[str]) -> list[Row]:
        """The rows that a task makes of texts."""
        return self.task.prepare_rows(self._build_rows(texts))

    def read_questions(self, texts: Sequence[str], contexts: Sequence[str]) -> list[str]:
        """Cleaned texts, each behind its context."""
        return [
            join_context(row.values["text"], context) for row, context in zip(self.clean(texts), contexts, strict=True)
        ]

    def _build_rows(self, texts: Sequence[str]) -> list[Row]:
        return [
            Row(id=f"row {i}", split=None, number=i, values={"text": text}) for i, text in enumerate(texts, start=1)
        ]

    def _classify(self) -> TextClassification:
        """The task; UsageError unless it gives labels."""
        return self._get(TextClassification, "predict", "labels")

    def _get(self, shape: type[Shape], verb: str, gives: str) -> Shape:
        """The task; UsageError unless it has that shape."""
        if isinstance(self.task, shape):
            return self.task
        fix = USES.get(self.task.type, USE_AS_BASE)
        raise UsageError(f"{verb}: must get a run that gives {gives}, got {self.task.type}. {fix}")


@dataclass(frozen=True)
class MultiPredictor:
    """A model with several heads: one pass through the base answers for every task.

    Args:
        model: in evaluation mode, on the best device.
        task: the tasks on it.
        predictors: task name -> what answers for that task alone.
    """

    model: nn.Module
    task: MultiTask
    predictors: Mapping[str, Predictor]

    def __getitem__(self, name: str) -> Predictor:
        """The predictor of one task."""
        if name not in self.predictors:
            raise UsageError(f"task: must be one of {', '.join(self.predictors)}, got {name!r}.")
        return self.predictors[name]

    def predict(
        self, texts: Iterable[str], *, advance: Callable[[int], None] = lambda _rows: None
    ) -> dict[str, list[Prediction]]:
        """Score texts, in order.

        Args:
            texts, advance: as in `Predictor.predict`.

        Returns:
            Task name -> a prediction for each text.
        """
        texts = check_texts(texts)
        logits = self.compute_logits(texts, advance=advance)
        return {name: self[name].build_predictions(part) for name, part in logits.items()}

    def read(self, text: str, context: str = "") -> dict[str, npt.NDArray[np.floating[Any]]]:
        """What every head makes of one text behind its context: task name -> (1, K), from one pass through the base, or
        one for each way to clean the text where the tasks differ."""
        read: dict[str, dict[str, npt.NDArray[np.floating[Any]]]] = {}
        found = {}
        for name, predictor in self.predictors.items():
            (question,) = predictor.read_questions([text], [context])
            if question not in read:
                tokens = encode_texts([question], predictor.tokenizer, predictor.max_length, keep="end")
                pad_token_id = get_padding(self.model, predictor.tokenizer)
                outputs = self.task.compute_outputs(self.model, Examples.build(tokens), pad_token_id)
                read[question] = dict(self.task.split_outputs(outputs))
            found[name] = read[question][name]
        return found

    def compute_scores(
        self, texts: Sequence[str], *, advance: Callable[[int], None] = lambda _rows: None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Task with labels -> calibrated probabilities, (N, K)."""
        logits = self.compute_logits(texts, advance=advance)
        return {name: self[name].calibrate(part) for name, part in logits.items()}

    def compute_logits(
        self, texts: Sequence[str], *, advance: Callable[[int], None] = lambda _rows: None
    ) -> dict[str, npt.NDArray[np.floating[Any]]]:
        """Task with labels -> raw outputs, (N, K). Texts are cleaned once if the tasks agree how."""
        tasks = {name: task for name, task in self.task.tasks.items() if isinstance(task, TextClassification)}
        if len({task.clean for task in tasks.values()}) != 1:
            return {name: self[name].compute_text_logits(texts, advance) for name in tasks}
        predictor = self[next(iter(tasks))]
        pad_token_id = get_padding(self.model, predictor.tokenizer)
        outputs = self.task.compute_outputs(self.model, predictor.encode(texts), pad_token_id, advance=advance)
        return {name: part for name, part in self.task.split_outputs(outputs) if name in tasks}


def check_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list.

    Raises:
        UsageError: one text in place of a list; something that is no text, such as the nan of an empty cell; or empty
            texts, of which no class is true.
    """
    if isinstance(texts, str):
        raise UsageError("predict: texts must be a list of texts, got one text. Write predict([text]).")
    texts = list(texts)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UsageError(
                f"predict: every text must be a str, got {text!r:.80} as text {number:,}. Leave out what is missing, "
                "and write numbers as text."
            )
    if empty := describe_empty(texts, "text"):
        raise UsageError(f"predict: no text may be empty, got {empty}. Leave out what is empty.")
    return texts


def describe_empty(texts: Sequence[str], one: str) -> str:
    """How many texts are empty or white space, and which, from 1: `2 rows (3, 7)` if `one` is a row; "" for none."""
    empty = [f"{number:,}" for number, text in enumerate(texts, start=1) if not text.strip()]
    more = ", ..." if len(empty) > SHOWN_EMPTY else ""
    return f"{count_of(len(empty), one)} ({', '.join(empty[:SHOWN_EMPTY])}{more})" if empty else ""


def check_writes(task: Task | MultiTask) -> None:
    """Raise UsageError unless the task writes text."""
    if task.type not in WRITING:
        raise UsageError(
            f"generate: must get a run that writes text ({', '.join(WRITING)}), got {task.type}. "
            + USES.get(task.type, USE_AS_BASE)
        )
