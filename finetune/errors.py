"""What a user can get wrong, as a tree.

Every message says where, what must hold, what was there instead, and the fix. The command line prints the message
without a traceback and exits with `exit_code`; anything that is not a `FinetuneError` is a bug and exits with 70.

    FinetuneError
    ├── UsageError        2   a command, a path or a run that cannot be meant
    ├── RecipeError       2   the YAML of a run
    ├── DataError         3   the rows
    │   └── ColumnError   3   a column that they lack
    ├── GateError         4   the model is not what the recipe asked for
    │   └── DivergedError 4   training produced no finite numbers
    ├── ResourceError     5   memory, disk, network, a missing package
    │   ├── ModelError    5   a base model that is not at hand or cannot be trusted
    │   └── CheckpointError 5 no checkpoint that verifies
    └── Interrupted      75   stopped on request; `finetune resume` goes on
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class FinetuneError(Exception):
    """Base of every error whose message is meant for the user."""

    exit_code = 70


class UsageError(FinetuneError):
    """A command, a path or a run folder that cannot be meant."""

    exit_code = 2


class RecipeError(FinetuneError):
    """A recipe with problems; the message lists all of them."""

    exit_code = 2


class DataError(FinetuneError):
    """Rows that cannot be trained on or scored.

    Where checks of the rows have failed, `findings` holds all that they saw, as `data.checks.findings_to_json` has it.
    """

    exit_code = 3
    findings: Sequence[Mapping[str, Any]] = ()


class ColumnError(DataError):
    """A column that a task reads is not there.

    Args:
        problem: which, and what is there instead.
        fix: what to change in a recipe.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem = problem

    def __str__(self) -> str:
        """Both."""
        return " ".join(self.args).rstrip()


class GateError(FinetuneError):
    """A finished model that misses what `evaluate.gates` demands.

    Args:
        message: what was missed.
        run: the folder of the finished run, where its scores are; None where no run has missed its gates.
    """

    exit_code = 4

    def __init__(self, message: str, run: Path | None = None) -> None:
        super().__init__(message)
        self.run = run


class DivergedError(GateError):
    """Training gave non-finite losses or gradients several steps in a row."""


class ResourceError(FinetuneError):
    """Memory, disk, network or a package that is missing."""

    exit_code = 5


class ModelError(ResourceError):
    """A base model that is not at hand, or that cannot be trusted."""


class CheckpointError(ResourceError):
    """No checkpoint in a folder verifies."""


class Interrupted(FinetuneError):  # noqa: N818  (an outcome, not a mistake)
    """Stopped by a signal after saving; the run can be resumed."""

    exit_code = 75
