"""What surrounds the loop: devices and processes through Accelerate, the state to resume from, events and progress."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from finetune.errors import CheckpointError, ResourceError
from finetune.recipe.schema import TrainSection
from finetune.training.average import WeightAverage
from finetune.training.checkpoint import has_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from finetune.training.events import EventLog
from finetune.training.precision import choose_precision
from finetune.training.processes import PROCESS_GROUP_TIMEOUT, is_cpu_only
from finetune.training.rule import StepRule

AVERAGE = "average"  # the checkpoint's file of averaged weights; empty without them
RULE = "rule"  # the checkpoint's file of what a rule knows; only where there is one
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class LoopState:
    """All that the loop knows besides weights and moments. The order of the data and dropout follow from `step`."""

    step: int = 0  # optimizer steps done
    best_step: int | None = None
    best_value: float | None = None
    evaluations_without_best: int = 0
    non_finite_in_a_row: int = 0
    skipped_steps: int = 0
    micro_steps: int = 1
    seconds: float = 0.0  # spent in the loop, over all sessions
    stopped_early: bool = False

    def record(self, value: float, larger_is_better: bool, *, patience_counts: bool) -> LoopState:
        """Take in a validation score."""
        if self.best_value is None or is_improvement(value, self.best_value, larger_is_better):
            return replace(self, best_step=self.step, best_value=value, evaluations_without_best=0)
        waited = self.evaluations_without_best + 1 if patience_counts else 0
        return replace(self, evaluations_without_best=waited)


def is_improvement(value: float, best: float, larger_is_better: bool) -> bool:
    """Whether a validation score beats the best so far; a score that is not a number never does."""
    if math.isnan(best):
        return not math.isnan(value)
    return value > best if larger_is_better else value < best


@dataclass
class Session:
    """One process's part in a training run.

    Args:
        accelerator: Accelerate's, already started.
        checkpoints: folder of the run's checkpoints.
        log: events of the main process.
    """

    accelerator: Accelerator
    checkpoints: Path
    log: EventLog
    saved_at: float = field(default_factory=time.monotonic)

    def save(
        self,
        trained: Mapping[str, nn.Parameter],
        optimizer: Any,
        average: WeightAverage,
        state: LoopState,
        keep: int,
        rule: StepRule | None = None,
    ) -> None:
        """Write a checkpoint from the main process; the others wait."""
        self.saved_at = time.monotonic()
        if self.accelerator.is_main_process:
            tensors = {
                "model": {name: parameter.detach() for name, parameter in trained.items()},
                "optimizer": _export_moments(trained, optimizer),
                AVERAGE: average.tensors,
            }
            if rule is not None:
                tensors[RULE] = rule.export_state()
            save_checkpoint(self.checkpoints, state.step, tensors, asdict(state))
            prune_checkpoints(self.checkpoints, keep, state.best_step)
        self.accelerator.wait_for_everyone()

    def restore(
        self,
        trained: Mapping[str, nn.Parameter],
        optimizer: Any,
        average: WeightAverage,
        rule: StepRule | None = None,
    ) -> LoopState | None:
        """Load the newest checkpoint that verifies, in place; None where the run has none yet."""
        if not has_checkpoint(self.checkpoints):
            self.log.truncate_after_step(0)  # a crash before the first checkpoint: all steps are done again
            return None
        checkpoint = load_checkpoint(self.checkpoints)
        for reason in checkpoint.skipped:
            self.log.write("checkpoint_skipped", reason=reason)
        load_weights(trained, checkpoint.tensors["model"])
        _import_moments(trained, optimizer, checkpoint.tensors["optimizer"])
        load_weights(average.tensors, checkpoint.tensors[AVERAGE])
        if rule is not None:
            rule.import_state(checkpoint.tensors[RULE])
        self.log.truncate_after_step(checkpoint.step)
        self.log.write("resumed", step=checkpoint.step)
        return LoopState(**checkpoint.state)

    def load_best(self, trained: Mapping[str, nn.Parameter], state: LoopState) -> None:
        """Put the weights of the best checkpoint into the model."""
        if state.best_step is not None:
            tensors = load_checkpoint(self.checkpoints, step=state.best_step).tensors
            load_weights(trained, tensors[AVERAGE] or tensors["model"])

    def close(self) -> None:
        """Finish the trackers, leave the process group and close the log."""
        self.accelerator.end_training()
        # Accelerate keeps precision and group for the whole process; the next run in it may want others.
        AcceleratorState._reset_state(reset_partial_state=True)
        self.log.close()


def build_session(section: TrainSection, folder: Path, precision: str) -> Session:
    """Start Accelerate for a run's folder.

    Raises:
        ResourceError: a tracker whose package is not installed.
    """
    for name in section.trackers:
        if importlib.util.find_spec(name) is None:
            raise ResourceError(
                f"train.trackers: {name} must be installed to be used, got no such package. pip install {name}"
            )
    accelerator = Accelerator(
        cpu=is_cpu_only(),
        mixed_precision="bf16" if choose_precision(precision) == "bf16" else "no",
        gradient_accumulation_steps=section.micro_steps,
        log_with=list(section.trackers) or None,
        project_dir=folder / "trackers",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)],
    )
    if section.trackers:
        settings = {key: value for key, value in section.model_dump().items() if isinstance(value, int | float | str)}
        trackers = folder / "trackers"
        trackers.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("finetune", config=settings, init_kwargs={"wandb": {"dir": str(trackers)}})
    log = EventLog(folder / "events.jsonl") if accelerator.is_main_process else _Silent()
    return Session(accelerator, folder / "checkpoints", log)


def load_weights(trained: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy saved weights into a model's.

    Raises:
        CheckpointError: the names differ, so the checkpoint belongs to another model.
    """
    if trained.keys() != saved.keys():
        odd = sorted(trained.keys() ^ saved.keys())
        raise CheckpointError(
            f"checkpoint: must hold the weights that this recipe trains, got a difference in {len(odd)} of them, "
            f"such as {odd[0]}. Resume with the recipe that the run was started with."
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def _export_moments(trained: Mapping[str, nn.Parameter], optimizer: Any) -> dict[str, torch.Tensor]:
    state = optimizer.optimizer.state  # Accelerate wraps the optimizer once
    return {
        f"{moment}/{name}": state[parameter][moment]
        for name, parameter in trained.items()
        if parameter in state
        for moment in MOMENTS
    }


def _import_moments(trained: Mapping[str, nn.Parameter], optimizer: Any, saved: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in trained.items():
        if f"step/{name}" in saved:
            optimizer.optimizer.state[parameter] = {
                # AdamW's fused kernel wants the step count on the weight's device.
                moment: saved[f"{moment}/{name}"].to(parameter.device, copy=True)
                for moment in MOMENTS
            }


class _Silent(EventLog):
    """The log of every process but the main one."""

    def __init__(self) -> None:
        """Open nothing."""

    def write(self, event: str, **fields: Any) -> None:
        """Write nothing."""

    def truncate_after_step(self, step: int) -> int:  # noqa: ARG002  (the log's own signature)
        """Cut nothing."""
        return 0

    def close(self) -> None:
        """Close nothing."""
