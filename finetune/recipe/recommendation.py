"""The schema of what only tasks of type `recommendation` have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from finetune.recipe.reference import SCRATCH_BASE
from finetune.recipe.section import Ratio, Section, raise_all

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe, TaskSection

FEATURES = ("sequence", "co_occurrence", "ease", "text", "popularity", "recency", "repeats", "history")
"""What `rank.features` can name beside columns of the catalogue."""
EVENT_SPLITS = ("time_cut", "leave_one_out")
"""Values of `split.by` for recommendation."""


class ItemsSection(Section):
    """The catalogue of the items that events name: where it lies and which of its columns are read."""

    file: str | None = None
    """The catalogue, beside the events; without it, an item is what its first event says in these columns."""
    id: str = Field(default="item", min_length=1)
    """The column of the catalogue that events name."""
    text: list[str] = Field(default_factory=list)
    """Columns that say in words what an item is, such as title and description, in this order."""
    categorical: list[str] = Field(default_factory=list)
    """Columns that name one of several kinds, such as a category."""
    numeric: list[str] = Field(default_factory=list)
    """Columns of numbers, such as a price."""

    @model_validator(mode="after")
    def _check(self) -> ItemsSection:
        both = [column for column in self.numeric if column in self.categorical]
        raise_all([f"numeric: must not repeat a column of `categorical`, got {column!r}." for column in both])
        return self


class RankSection(Section):
    """The second stage: trees that weigh the candidates against each other (the extra `recommend`)."""

    features: list[str] = Field(
        default_factory=lambda: ["sequence", "co_occurrence", "ease", "text", "popularity", "recency", "history"],
        min_length=1,
    )
    """What the trees see of a candidate: `sequence`, the first stage's score; `co_occurrence`, what followed the same
    items; `ease`; `text`, how near its text is to what the person had; `popularity` before the cut and of late;
    `recency`, days since its first event; `repeats`, how often and how lately the person had it; `history`, how much
    the person had; and declared columns of the catalogue."""
    candidates: int = Field(default=100, ge=10, le=10_000)
    """Items from each source that become candidates."""


class RecommendSection(Section):
    """How a recommender is asked, and how its first stage reads histories."""

    requests: int = Field(default=10, ge=1)
    """At most so many moments of each person are asked for; the more, the longer it takes and the tighter the
    intervals. With leave_one_out test asks for the last event alone, and this holds for validation."""
    exclude_seen: bool = True
    """Leave out what a person had. False where things are bought again."""
    vectors: Literal["both", "ids", "text"] = "both"
    """What an item is to the first stage: an embedding of its own, its text as `model.base` embeds it (frozen), or a
    gated mixture, in which items that training never saw speak by their text alone."""
    item_dropout: Ratio = 0.2
    """Share of the items that speak by their text alone in a training step, so that texts learn to."""
    loss: Literal["softmax", "sampled", "gbce"] = "softmax"
    """`softmax` over all items; `sampled`, over `negatives` drawn by popularity, for large catalogues; `gbce`,
    generalised binary cross-entropy (arXiv:2308.07192)."""
    negatives: int = Field(default=512, ge=1)
    """Items drawn for each step of `sampled` and `gbce`."""


def list_recommendation_problems(recipe: Recipe, where: str, task: TaskSection) -> list[str]:
    """What keeps a task's keys from going together."""
    given = {"items": task.items, "recommend": task.recommend, "rank": task.rank}
    if task.type != "recommendation":
        problems = [
            f"{where}.{key}: must be left out for {task.type}, got a section." for key, value in given.items() if value
        ]
        if task.split.by in EVENT_SPLITS:
            problems.append(f"{where}.split.by: must part rows, not events, for {task.type}, got {task.split.by!r}.")
        return problems
    problems = []
    if task.split.by not in EVENT_SPLITS:
        expected = " or ".join(EVENT_SPLITS)
        problems.append(f"{where}.split.by: must be {expected} for recommendation, got {task.split.by!r}.")
    if recipe.adapter.method != "full":
        problems.append(
            f"adapter.method: must be full for recommendation, got {recipe.adapter.method!r}: the first stage starts "
            "from random weights, and the texts' encoder stays as it is."
        )
    if recipe.model.base == SCRATCH_BASE:
        problems.append(
            "model.base: must be the encoder of the items' texts for recommendation, got 'scratch'. For ids alone set "
            f"{where}.recommend.vectors: ids."
        )
    return problems
