"""The schema of the systems that a recipe may build on its trained tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.recipe.section import Section

if TYPE_CHECKING:
    from finetune.recipe.schema import TaskSection

ASSISTANT_TYPES = ("text_classification", "retrieval", "reranking")
"""The tasks of a customer-service assistant, one of each."""
DAY_MINUTES = 24 * 60
WEEK_MINUTES = 7 * DAY_MINUTES
LEAST_REFERENCE, MOST_REFERENCE = 21, 672
"""Windows that are taken as the reference where the recipe names no number; the most are a week of quarter hours."""


class AssistantSection(Section):
    """The customer-service assistant that is built on the trained tasks: one each of `text_classification`, `retrieval`
    and `reranking`."""

    templates: str | None = None
    """A JSONL file of intents: `intent`, `description`, `template` with slots in braces or null, `slots`. null: the
    card's own."""
    reply: Literal["extract", "generate"] = "extract"
    """What is said of an entry: `extract` quotes it; with `generate` a `writer` answers out of it, and where the entry
    does not support what it wrote, the entry is quoted all the same."""
    writer: str | None = None
    """The run that writes, of type `completion`, such as `runs/support_writer`."""
    wrong_cost: float = Field(default=5.0, ge=0)
    """What a wrong answer costs; what it costs against a hand-over decides how sure the assistant must be."""
    handover_cost: float = Field(default=1.0, ge=0)
    """What it costs to hand a question over that could have been answered."""
    question_cost: float = Field(default=0.5, ge=0)
    """What it costs to ask back."""

    def list_problems(self, tasks: Mapping[str, TaskSection]) -> list[str]:
        """What keeps it from being built on these tasks."""
        problems = []
        if self.reply == "generate" and self.writer is None:
            problems.append(
                "assistant.writer: must name a run of type completion where reply is generate, got nothing."
            )
        if self.reply == "extract" and self.writer is not None:
            problems.append(f"assistant.writer: must be left out unless reply is generate, got {self.writer!r}.")
        types = sorted(task.type for task in tasks.values())
        if types == sorted(ASSISTANT_TYPES):
            return problems
        return [
            *problems,
            f"assistant: must have one task each of {', '.join(ASSISTANT_TYPES)}, got {', '.join(types)}.",
        ]


class MonitorSection(Section):
    """The monitor that is built on the trained tasks: the share of negative texts per topic and window of time."""

    sentiment: str = "sentiment"
    """The task that tells negative texts from others, a `text_classification`."""
    negative: str = "negative"
    """Its class whose share is watched."""
    topic: str | None = None
    """The task that tells topics, a `text_classification` too. null: all texts are one topic."""
    window_minutes: int = Field(default=60, ge=1, le=WEEK_MINUTES)
    """Length of a window; windows begin at midnight UTC of 1 January 1970 and every so many minutes after."""
    lateness_minutes: int = Field(default=60, ge=0)
    """How long after its end a window still takes items; later ones are counted and left out."""
    reference_windows: int | None = Field(default=None, ge=8)
    """Past windows of a topic that say what is usual for it. null: as many as a week has, at least 21, at most 672."""
    false_alarm_windows: int = Field(default=500, ge=20)
    """Windows between two false alarms of a topic, on average, while nothing changes: what thresholds are chosen
    for."""
    rise: float = Field(default=0.1, gt=0, lt=1)
    """The rise of the negative share that is to be found soonest."""
    cooldown_windows: int = Field(default=6, ge=0)
    """Windows for which a topic that was alerted is not alerted again at the same level."""

    @property
    def reference_size(self) -> int:
        """`reference_windows`, also where the recipe leaves it open."""
        week = -(-WEEK_MINUTES // self.window_minutes)
        return self.reference_windows or min(MOST_REFERENCE, max(LEAST_REFERENCE, week))

    def list_notes(self) -> list[str]:
        """What to know before it is built."""
        days = self.reference_size * self.window_minutes / DAY_MINUTES
        if self.window_minutes >= DAY_MINUTES or days >= WEEK_MINUTES / DAY_MINUTES:
            return []
        return [
            f"monitor.reference_windows: {self.reference_size} windows of {self.window_minutes} minutes are "
            f"{days:.1f} days. Where weekends have less news than other days, less than 7 days of reference make every "
            "Monday more news than usual. Leave the key out, and take windows of 15 minutes or more."
        ]

    def list_problems(self, tasks: Mapping[str, TaskSection]) -> list[str]:
        """What keeps it from being built on these tasks."""
        problems = []
        for key, name in (("sentiment", self.sentiment), ("topic", self.topic)):
            if name is not None and (name not in tasks or tasks[name].type != "text_classification"):
                known = [name for name, task in tasks.items() if task.type == "text_classification"]
                problems.append(
                    f"monitor.{key}: must be a task of type text_classification ({', '.join(known) or 'none here'}), "
                    f"got {name!r}."
                )
        labels = tasks[self.sentiment].labels if self.sentiment in tasks else None
        classes = list(labels.values() if isinstance(labels, dict) else labels or [self.negative])
        if self.negative not in classes:
            problems.append(
                f"monitor.negative: must be a class of {self.sentiment} ({', '.join(classes)}), got {self.negative!r}."
            )
        return problems
