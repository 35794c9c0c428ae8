"""Tasks by problem shape; a new shape is one file and one line here."""

from __future__ import annotations

from finetune.tasks.task import Task
from finetune.tasks.text_classification import TextClassification

TASKS = {TextClassification.type: TextClassification}

__all__ = ["TASKS", "Task", "TextClassification"]
