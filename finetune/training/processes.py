"""Several processes: started by this toolkit, or by `accelerate launch` and `torchrun`."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

from finetune import errors
from finetune.errors import FinetuneError, Interrupted

# Long enough for one process to check and encode a large data set while the others wait.
PROCESS_GROUP_TIMEOUT = timedelta(hours=6)
# From a signal until workers that still save are killed; torchrun's own 30 seconds are too few for a large checkpoint.
STOP_TIMEOUT_SECONDS = 600
# `python -m` looks for modules in the working folder first: a user's own datasets.py would stand in for the library.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}


def world_size() -> int:
    """Processes that a launcher started, as it says in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def is_cpu_only() -> bool:
    """Whether this machine has nothing but its CPU. Accelerate must be told: else several processes never meet."""
    import torch

    return not torch.accelerator.is_available()


def agree_on(compute: Callable[[], str]) -> str:
    """Compute a text once, in the main process, and give it to all.

    An error of the main process is raised in every process, so that none waits for a group that will never form.
    """
    if world_size() == 1:
        return compute()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=is_cpu_only(), timeout=PROCESS_GROUP_TIMEOUT)
    # Else gloo's threads may abort a process at its end, and a finished run counts as failed.
    atexit.register(state.destroy_process_group)
    said: list[Any] = [None, None]
    if is_main_process():
        try:
            said = [compute(), None]
        except FinetuneError as error:
            said = [type(error).__name__, str(error)]
        except BaseException as error:
            broadcast_object_list(["FinetuneError", f"the main process failed: {error}"])
            raise
    broadcast_object_list(said)
    value, message = said
    if message is not None:
        raise rebuild_error(value, message)
    return str(value)


def rebuild_error(name: str, message: str) -> FinetuneError:
    """The error that another process named."""
    kind: type[FinetuneError] = getattr(errors, name, FinetuneError)
    return kind(message)


def start_workers(module: str, arguments: Sequence[str], processes: int) -> int:
    """Run a module in several processes of one group (NCCL on GPUs, gloo on a CPU), and wait.

    SIGTERM and Ctrl-C are passed on, so that the workers save and stop by themselves.

    Returns:
        The launcher's exit code, 0 only if every worker succeeded; `Interrupted.exit_code` whenever a signal was passed
        on: the workers may have been too young to answer for themselves, or already done.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_TIMEOUT_SECONDS),
        **SAFE_PATH,
    }
    # A session of its own: a Ctrl-C in the terminal reaches the workers once, through us.
    launcher = subprocess.Popen([*command, "-m", module, *arguments], env=environment, start_new_session=True)
    with _passing_signals_to(launcher) as passed:
        code = launcher.wait()
    return Interrupted.exit_code if passed else code


def run_command(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Run a `finetune` command in a process of its own, and wait; SIGTERM and Ctrl-C are passed on to it.

    Returns:
        Exit code, standard output, standard error. The code is `Interrupted.exit_code` whenever a signal was passed
        on: the command may have been too young to answer for itself, or already done.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=os.environ | SAFE_PATH,
        start_new_session=True,
    )
    with _passing_signals_to(process) as passed:
        out, err = process.communicate()
    return Interrupted.exit_code if passed else process.returncode, out, err


@contextmanager
def _passing_signals_to(process: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Send a process the SIGTERM and SIGINT that reach this one; gives the list of those that were sent so far."""
    passed: list[int] = []

    def pass_on(received: int, _frame: FrameType | None) -> None:
        passed.append(received)
        process.send_signal(received)

    # Python allows handlers in the main thread only.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    former = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in former:
            signal.signal(number, pass_on)
        yield passed
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
