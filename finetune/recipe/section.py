"""What every block of a recipe or card is built on."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """One block of a recipe: unknown keys and silently converted types are errors, and values cannot change.

    A validator raises `ValueError` with one sentence per line, each `sentence` or `key: sentence`; the sentence begins
    with what must hold. `finetune.recipe.messages` puts the file, the line and the full key in front.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def raise_all(problems: list[str]) -> None:
    """Raise ValueError with one sentence per line when there are any."""
    if problems:
        raise ValueError("\n".join(problems))
