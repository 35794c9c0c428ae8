"""What benchmarks/monitor_quality.py computes, on rows whose truth is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from finetune.applications.monitor.shares import fit_quantifier
from finetune.applications.monitor.thresholds import SHARES, SIZES, Thresholds, list_choices
from finetune.recipe.applications import MonitorSection

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "monitor_quality.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("monitor_quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "monitor_quality", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def perfect(script):
    """A model that is never wrong, and hardly ever sure of less than all."""
    truths = np.arange(500) < 100
    known = np.where(truths, 0.999, 0.001)
    return script.make_rows(known, known > 0.5, truths), fit_quantifier(known, truths)


def test_a_perfect_model_has_no_error(script, perfect):
    found = script.measure_shares(*perfect, size=20, draws=3, seed=1)
    assert found["windows"] == 63
    assert [found[name]["mae"] for name in ("sld", "pacc", "counted")] == pytest.approx([0, 0, 0], abs=5e-3)
    assert found["coverage"] > 0.85


def test_a_model_that_calls_all_the_same_is_off_by_the_share_itself(script, perfect):
    rows, quantifier = perfect
    blind = script.Rows(rows.bins, np.zeros_like(rows.called), rows.truths)
    found = script.measure_shares(blind, quantifier, size=20, draws=2, seed=1)
    assert found["counted"]["mae"] == pytest.approx(0.5)  # the mean of 0, .05, ..., 1


def test_delays_and_run_lengths_are_counted_from_the_rise(script, perfect):
    section = MonitorSection(reference_windows=8, cooldown_windows=0)
    everywhere = np.ones((len(SIZES), len(SHARES)))
    table = {"warning": 6 * everywhere, "alarm": 9 * everywhere}
    thresholds = Thresholds(table, table, {"warning": 20.0, "alarm": 30.0}, list_choices(section))
    options = script.build_parser().parse_args(
        ["run", "--streams", "4", "--windows", "10", "--window", "100", "--rise", "0.5"]
    )
    found = script.measure_detection(*perfect, thresholds, section, options)
    assert found["usual_share"] == 0.2
    assert found["delay"]["alert"]["median"] == 1  # .7 of 100 items against .2
    assert found["windows_without_change"] == 40
    assert found["alerts_without_change"]["alert"] == 0
    assert found["run_length"]["alert"] == 40  # at least, where there was none


def test_a_run_or_a_rehearsal_is_named(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["monitor_quality.py"])
    with pytest.raises(SystemExit):
        script.main()
    assert "must have a run, or --rehearse FOLDER, and not both." in capsys.readouterr().err
