"""The peak memory of a run is its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune.training import memory
from finetune.training.memory import read_peak_memory_mb

SHOW = "from finetune.training.memory import read_peak_memory_mb; print(read_peak_memory_mb())"


def test_the_peak_grows_with_what_was_held_and_stays() -> None:
    before = read_peak_memory_mb() or 0
    held = np.ones((before + 100) * 2**17)  # that many MB, so that the peak must move
    assert (read_peak_memory_mb() or 0) >= before + 90  # Linux counts pages by the batch
    del held
    assert (read_peak_memory_mb() or 0) >= before + 90


def test_a_child_does_not_inherit_the_peak_of_its_parent() -> None:
    held = np.ones(1500 * 2**17)  # 1,500 MB
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    del held
    assert 50 < int(done.stdout) < 1200


def test_other_systems_ask_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LINUX_STATUS", Path("nowhere"))
    assert read_peak_memory_mb() == pytest.approx(read_peak_memory_mb(), abs=5)
    assert (read_peak_memory_mb() or 0) > 50
