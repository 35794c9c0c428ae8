"""Tasks by problem shape; a new shape is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.tasks.causal_lm import CausalLM
from finetune.tasks.completion import Completion
from finetune.tasks.masked_lm import MaskedLM
from finetune.tasks.multi_task import MultiTask
from finetune.tasks.question_answering import QuestionAnswering
from finetune.tasks.recommendation import Recommendation
from finetune.tasks.reranking import Reranking
from finetune.tasks.retrieval import Retrieval
from finetune.tasks.seq2seq import Seq2Seq
from finetune.tasks.task import HeldOut, Judgement, Task, Trainable
from finetune.tasks.text_classification import TextClassification

TASKS: dict[str, type[Task]] = {
    TextClassification.type: TextClassification,
    CausalLM.type: CausalLM,
    MaskedLM.type: MaskedLM,
    Seq2Seq.type: Seq2Seq,
    Completion.type: Completion,
    Retrieval.type: Retrieval,
    Reranking.type: Reranking,
    QuestionAnswering.type: QuestionAnswering,
    Recommendation.type: Recommendation,
}


def load_task(config: Mapping[str, Any]) -> Task | MultiTask:
    """The task, or the several on one base, whose `to_config` this was."""
    if config["type"] == MultiTask.type:
        return MultiTask.from_config(config)
    return TASKS[config["type"]].from_config(config)


__all__ = [
    "TASKS",
    "CausalLM",
    "Completion",
    "HeldOut",
    "Judgement",
    "MaskedLM",
    "MultiTask",
    "QuestionAnswering",
    "Recommendation",
    "Reranking",
    "Retrieval",
    "Seq2Seq",
    "Task",
    "TextClassification",
    "Trainable",
    "load_task",
]
