"""Tasks by problem shape; a new shape is one file and one line here."""

from __future__ import annotations

from finetune.tasks.causal_lm import CausalLM
from finetune.tasks.masked_lm import MaskedLM
from finetune.tasks.seq2seq import Seq2Seq
from finetune.tasks.task import HeldOut, Judgement, Task
from finetune.tasks.text_classification import TextClassification

TASKS: dict[str, type[Task]] = {
    TextClassification.type: TextClassification,
    CausalLM.type: CausalLM,
    MaskedLM.type: MaskedLM,
    Seq2Seq.type: Seq2Seq,
}

__all__ = ["TASKS", "CausalLM", "HeldOut", "Judgement", "MaskedLM", "Seq2Seq", "Task", "TextClassification"]
