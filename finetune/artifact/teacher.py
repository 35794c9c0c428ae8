"""What a saved classifier says of the rows that another one learns from."""

from __future__ import annotations

from dataclasses import replace

from finetune.artifact.load import load
from finetune.artifact.predictor import MultiPredictor, Predictor
from finetune.errors import UsageError
from finetune.models.classifier import get_padding
from finetune.recipe.schema import DistillSection
from finetune.tasks import MultiTask, Task, TextClassification
from finetune.tasks.preparation import Prepared
from finetune.tasks.task import Outputs

KEY = "train.distill.teacher"


def ask_teacher(prepared: Prepared, section: DistillSection) -> Prepared:
    """The rows of a recipe with what its teacher says of those of train; it reads them with its own tokenizer.

    Raises:
        UsageError: no such run, or one for other classes.
    """
    (part,) = prepared.parts.values()
    teacher = load(section.teacher)
    task = _check_teacher(section.teacher, teacher, part.task)
    assert isinstance(teacher, Predictor)  # one task, as was checked
    examples = task.build_examples(part.splits["train"], teacher.tokenizer, teacher.max_length)
    return add_teacher_logits(
        prepared, task.compute_outputs(teacher.model, examples, get_padding(teacher.model, teacher.tokenizer))
    )


def add_teacher_logits(prepared: Prepared, logits: Outputs) -> Prepared:
    """The same rows, those of train with a teacher's logits, (N, K)."""
    train = replace(prepared.examples["train"], teacher_logits=logits)
    return replace(prepared, examples=prepared.examples | {"train": train})


def _check_teacher(name: str, teacher: Predictor | MultiPredictor, pupil: Task | MultiTask) -> TextClassification:
    """What the teacher was trained for, which must be what its pupil is."""
    task = teacher.task
    assert isinstance(pupil, TextClassification)  # the schema lets no other in
    if not isinstance(task, TextClassification):
        raise UsageError(f"{KEY}: must be a run of type text_classification, got {task.type}: {name}.")
    if task.labels != pupil.labels:
        raise UsageError(
            f"{KEY}: must have the classes {', '.join(pupil.labels)}, in this order, got {', '.join(task.labels)}: "
            f"{name}."
        )
    if task.reads_context and not pupil.reads_context:
        raise UsageError(f"{KEY}: must read what its pupil reads, got a run that reads `context` too: {name}.")
    return task
