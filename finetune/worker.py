"""One of several training processes: `python -m torch.distributed.run ... -m finetune.worker RUN_FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finetune.artifact.run_folder import RunFolder
from finetune.errors import FinetuneError, Interrupted
from finetune.fitting import train
from finetune.training.processes import is_main_process


def main(path: str, quiet: str) -> int:
    """Take part in training; the main process leaves its error in status.json for the command that started it, which
    hears of no other process: those say theirs themselves."""
    folder = RunFolder(Path(path))
    try:
        train(folder, quiet=quiet == "quiet")
    except FinetuneError as error:
        if is_main_process():
            folder.update_status(error_type=type(error).__name__, error=str(error))
        elif not isinstance(error, Interrupted):  # that all are told
            sys.stderr.write(f"finetune: process {os.environ['RANK']}: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
