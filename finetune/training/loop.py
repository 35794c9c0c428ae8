"""The one training loop, from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from finetune.data.batches import (
    Batch,
    Examples,
    Indices,
    collate,
    plan_batches,
    plan_batches_with_companions,
    plan_class_batches,
    split_batch,
)
from finetune.errors import DivergedError, Interrupted, ResourceError
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import EarlyStopSection, TrainSection
from finetune.training.average import WeightAverage
from finetune.training.optimizer import build_optimizer, compute_rate_factor, set_learning_rate
from finetune.training.progress import TrainingProgress
from finetune.training.rule import StepRule
from finetune.training.session import LoopState, Session
from finetune.training.shortage import is_out_of_memory
from finetune.training.signals import StopRequest

NON_FINITE_LIMIT = 3

GivesUp: TypeAlias = Callable[[float, Mapping[str, float]], bool]


def never(share: float, metrics: Mapping[str, float]) -> bool:  # noqa: ARG001  (the signature of GivesUp)
    """Train to the end."""
    return False


@dataclass(frozen=True)
class Problem:
    """What the loop needs of a task: its encoded rows and its functions.

    Args:
        train, validation: encoded rows.
        row_weights: weight of each training row in the loss, (N,).
        compute_losses: (model, batch) -> loss of each row, (B,).
        compute_outputs: (model, encoded rows, padding token, share of the batches) -> what the metrics need of each
            row, (N, K), zeros for rows of others' shares.
        compute_metrics: (those outputs, references (N,)) -> point values, `loss` among them.
        is_larger_better: metric name -> which way is up.
        head: names of the modules that start at random and take the head's learning rate.
        pad_token_id: the tokenizer's; None for a model that takes packed rows.
        compares_rows: whether a row's loss depends on the others of its batch, which then cannot be split.
        rate_factor: name of a weight -> its learning rate as a multiple of the recipe's.
        rule: what is done to the weights after each step, if anything.
        gives_up: (share of the steps done, validation metrics) -> whether to stop here, as a search does with a run
            that will not be its best; must be the same in every process.
    """

    train: Examples
    validation: Examples
    row_weights: npt.NDArray[np.float32]
    compute_losses: Callable[[nn.Module, Batch], torch.Tensor]
    compute_metrics: Callable[[npt.NDArray[np.floating[Any]], npt.NDArray[np.int64]], dict[str, float]]
    is_larger_better: Callable[[str], bool]
    head: Sequence[str]
    pad_token_id: int | None
    compares_rows: bool = False
    compute_outputs: Callable[..., npt.NDArray[np.floating[Any]]] = compute_logits
    rate_factor: Callable[[str], float] = lambda _name: 1.0
    rule: StepRule | None = None
    gives_up: GivesUp = never


@dataclass(frozen=True)
class Step:
    """One optimizer step of the plan: which rows, in which epoch, and whether validation follows."""

    number: int  # 1-based
    epoch: int  # 0-based
    rows: Indices
    evaluate: bool


def fit(
    model: nn.Module, problem: Problem, section: TrainSection, session: Session, *, quiet: bool = False
) -> LoopState:
    """Train a model in place; at the end it holds the weights that were best on validation
    (the last ones without `early_stop`); with `ema_decay` these are averages.

    If the session's folder has checkpoints, training goes on from the newest that verifies, to bitwise the same
    weights as if it had never stopped (same device, same versions).

    Args:
        model: with the weights to train marked by `requires_grad`.
        problem: the task's rows and functions.
        section: the recipe's `train`.
        session: Accelerate, checkpoints and events.
        quiet: no progress bar.

    Returns:
        The final state.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; a checkpoint was written.
        DivergedError: non-finite losses or gradients three steps in a row.
        ResourceError: no memory for a single row (a batch, where rows are compared), or no room for a checkpoint.
    """
    accelerator = session.accelerator
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    replica, optimizer, average, state = _prepare(model, trained, problem, section, session)
    total = count_steps(problem.train, section)
    model.train()

    with (
        StopRequest() as stop,
        TrainingProgress(total, state.step, quiet or not accelerator.is_main_process) as progress,
    ):
        started = time.monotonic() - state.seconds
        for step in _iterate_steps(problem, section, after=state.step, total=total):
            if state.stopped_early:
                progress.stop_early(state.step, state.best_step)
                break
            rate = set_learning_rate(
                optimizer, compute_rate_factor(step.number - 1, total, section.warmup_ratio, section.schedule)
            )
            # Dropout depends on the step alone, so that a checkpoint needs no generator state.
            torch.manual_seed(derive_seed(section.seed, step.number, accelerator.process_index))
            loss, norm, micro_steps = _compute_gradients(
                replica, trained, problem, section, session, step, state.micro_steps
            )
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                _update(optimizer, average, problem.rule, step.number)
            optimizer.zero_grad()
            state = replace(
                state,
                step=step.number,
                micro_steps=micro_steps,
                seconds=time.monotonic() - started,
                non_finite_in_a_row=0 if finite else state.non_finite_in_a_row + 1,
                skipped_steps=state.skipped_steps + (not finite),
            )
            values = {"loss": loss, "learning_rate": rate, "grad_norm": norm}
            session.log.write("step", step=step.number, epoch=step.epoch, seconds=state.seconds, **values)
            accelerator.log(values, step=step.number)
            progress.advance(loss=loss, rate=rate)
            _check_divergence(state, step, rate, loss, norm)

            if step.evaluate:
                with average.applied():
                    metrics = _evaluate(model, problem, session)
                state = _record(state, metrics, problem, section.early_stop, share=step.number / total)
                session.log.write("evaluation", step=step.number, epoch=step.epoch, metrics=metrics)
                accelerator.log({f"validation_{name}": value for name, value in metrics.items()}, step=step.number)
                progress.show(step.number, metrics)
            stopping, overdue = _agree(
                session, stop.requested, time.monotonic() - session.saved_at > section.checkpoint_seconds
            )
            if step.evaluate or stopping or overdue:
                session.save(trained, optimizer, average, state, section.keep_checkpoints, problem.rule)
            if stopping:
                raise Interrupted(
                    f"stopped by {stop.signal_name or 'a signal'} after step {step.number} of {total}; saved."
                )

    average.keep()
    session.load_best(trained, state)
    return state


def _prepare(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    problem: Problem,
    section: TrainSection,
    session: Session,
) -> tuple[Any, Any, WeightAverage, LoopState]:
    """The model on its device and in all processes, the optimizer, the average and the state, from where a run was."""
    if session.accelerator.num_processes > 1:
        # What nothing trains is the same in each process, and may be in bits that no collective can send.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # type: ignore[no-untyped-call]
    replica, optimizer = session.accelerator.prepare(
        model, build_optimizer(trained, problem.head, section, problem.rate_factor)
    )
    average = WeightAverage(trained, section.ema_decay, problem.rule)
    state = session.restore(trained, optimizer, average, problem.rule) or LoopState()
    # The recipe may ask for more of them than were saved: that is how a run goes on that ran out of memory.
    return replica, optimizer, average, replace(state, micro_steps=max(state.micro_steps, section.micro_steps))


def _update(optimizer: Any, average: WeightAverage, rule: StepRule | None, step: int) -> None:
    optimizer.step()
    if rule is not None:
        rule.after_step(step)
    average.update(step)


def _record(
    state: LoopState,
    metrics: Mapping[str, float],
    problem: Problem,
    early_stop: EarlyStopSection | None,
    *,
    share: float,
) -> LoopState:
    """Take in validation scores after that share of the steps; without early stopping nothing is chosen by them, and
    the last weights stay.
    """
    stop = bool(problem.gives_up(share, metrics))
    if early_stop is not None:
        larger = problem.is_larger_better(early_stop.metric)
        state = state.record(metrics[early_stop.metric], larger, patience_counts=share > 0.5)
        stop = stop or state.evaluations_without_best >= early_stop.patience
    return replace(state, stopped_early=stop)


def derive_seed(*parts: int) -> int:
    """One seed from several integers, independent of each other (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def count_steps(train: Examples, section: TrainSection) -> int:
    """Optimizer steps of the whole run."""
    steps = 0
    for epoch in range(section.epochs):
        steps += len(_plan(train, section, epoch))
        if section.max_steps is not None and steps >= section.max_steps:
            return section.max_steps
    return steps


def _plan(train: Examples, section: TrainSection, epoch: int) -> list[Indices]:
    if train.companions is not None:
        return plan_batches_with_companions(train, section.tokens_per_batch, seed=section.seed, epoch=epoch)
    if section.few_shot == "contrastive":
        return plan_class_batches(train.labels, train.sizes, section.tokens_per_batch, seed=section.seed, epoch=epoch)
    return plan_batches(train.sizes, section.tokens_per_batch, seed=section.seed, epoch=epoch)


def _iterate_steps(problem: Problem, section: TrainSection, *, after: int, total: int) -> Iterator[Step]:
    """The plan of the whole run from a step on; the step count alone says where in the data it is."""
    number = 0
    for epoch in range(section.epochs):
        plan = _plan(problem.train, section, epoch)
        parts = min(section.evaluations_per_epoch, len(plan))
        due = {math.ceil(len(plan) * part / parts) for part in range(1, parts + 1)}
        for position, rows in enumerate(plan, start=1):
            number += 1
            if number > total:
                return
            if number > after:
                yield Step(number, epoch, rows, evaluate=position in due or number == total)


def _compute_gradients(  # noqa: PLR0913  (the loop's own inner part: everything it needs is named, nothing is hidden)
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    problem: Problem,
    section: TrainSection,
    session: Session,
    step: Step,
    micro_steps: int,
) -> tuple[float, float, int]:
    """Run one step's forward and backward passes, halving the micro-batch while memory runs out.

    Returns:
        The loss (weighted mean over the global batch), the gradient's norm before clipping, the micro-steps used.
    """
    accelerator = session.accelerator
    while True:
        accelerator.step, accelerator.gradient_accumulation_steps = 0, micro_steps
        try:
            loss = _accumulate(model, problem, accelerator, step.rows, micro_steps)
            norm = accelerator.clip_grad_norm_(trained.values(), section.clip_norm)
            return accelerator.reduce(loss, "sum").item(), float(norm), micro_steps
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if problem.compares_rows:
                raise ResourceError(
                    "memory: a whole batch must fit, whose rows are compared with each other, got out of memory. "
                    f"Start a new run with train.tokens_per_batch below {section.tokens_per_batch}."
                ) from error
            if micro_steps >= len(step.rows) or accelerator.num_processes > 1:
                raise ResourceError(_describe_memory(len(step.rows), micro_steps, accelerator.num_processes)) from error
        # Not sooner: inside of the block the error's traceback holds on to all that filled the memory.
        micro_steps = min(2 * micro_steps, len(step.rows))
        session.log.write("out_of_memory", step=step.number, micro_steps=micro_steps)
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _accumulate(model: nn.Module, problem: Problem, accelerator: Any, rows: Indices, micro_steps: int) -> torch.Tensor:
    """Sum the gradients of this process's share of a global batch, as if the batch had been one.

    Each row's loss is divided by the weight of the whole global batch, so neither the number of micro-steps nor that of
    processes changes the sum. Accelerate divides by the micro-steps and averages over processes; both are undone.
    """
    processes = accelerator.num_processes
    weight = float(problem.row_weights[rows].sum())
    total = torch.zeros((), device=accelerator.device)
    for part in split_batch(problem.train, rows, processes * micro_steps)[accelerator.process_index :: processes]:
        # A share without rows still takes part in the reduction, with a row that weighs nothing.
        chosen, weights = (part, problem.row_weights[part]) if len(part) else (rows[:1], np.zeros(1, dtype=np.float32))
        batch = {
            key: value.to(accelerator.device)
            for key, value in collate(problem.train, chosen, problem.pad_token_id).items()
        }
        with accelerator.accumulate(model):
            losses = problem.compute_losses(model, batch)  # (B,)
            share = (losses * torch.from_numpy(weights).to(losses.device)).sum() / weight
            accelerator.backward(share * processes * micro_steps)
        total += share.detach()
    return total


def _evaluate(model: nn.Module, problem: Problem, session: Session) -> dict[str, float]:
    """Score validation, each process its share.

    On the model itself, not on its distributed replica: that one would wait for as many batches in every process.
    """
    accelerator = session.accelerator
    share = (accelerator.process_index, accelerator.num_processes)
    outputs = problem.compute_outputs(model, problem.validation, problem.pad_token_id, share=share)
    summed = accelerator.reduce(torch.from_numpy(outputs).to(accelerator.device), "sum").cpu().numpy()
    return problem.compute_metrics(summed, problem.validation.labels)


def _agree(session: Session, *flags: bool) -> list[bool]:
    """What any process wants, all do."""
    tensor = torch.tensor([float(flag) for flag in flags], device=session.accelerator.device)
    return [value > 0 for value in session.accelerator.reduce(tensor, "sum").tolist()]


def _describe_memory(rows: int, micro_steps: int, processes: int) -> str:
    if processes > 1:
        return (
            f"memory: a micro-batch of {rows // (micro_steps * processes)} rows per process must fit, got out of "
            f"memory. Set train.micro_steps: {2 * micro_steps} in the run's recipe.resolved.yaml and resume it, or "
            f"start it anew with --set train.micro_steps={2 * micro_steps} (the update stays the same)."
        )
    return "memory: a single row must fit, got out of memory. Lower model.max_length or take a smaller base."


def _check_divergence(state: LoopState, step: Step, rate: float, loss: float, norm: float) -> None:
    if state.non_finite_in_a_row >= NON_FINITE_LIMIT:
        raise DivergedError(
            f"training, step {step.number}: loss and gradient must be finite, got loss {loss} and gradient norm {norm} "
            f"at learning rate {rate:.2g}, {NON_FINITE_LIMIT} steps in a row ({state.skipped_steps} skipped in all; "
            "none was applied). Lower train.learning_rate, or set train.precision: float32. "
            "The last good checkpoint is kept."
        )
