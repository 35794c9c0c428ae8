"""What the sections of applications say where a recipe leaves them open."""

from __future__ import annotations

import pytest

from finetune.recipe.applications import MonitorSection


@pytest.mark.parametrize(
    ("minutes", "named", "windows"),
    [
        (60, None, 168),
        (45, None, 224),
        (5, None, 672),
        (720, None, 21),
        (1440, None, 21),
        (10080, None, 21),
        (60, 48, 48),
    ],
)
def test_what_is_usual_is_what_was_so_for_a_week(minutes, named, windows):
    assert MonitorSection(window_minutes=minutes, reference_windows=named).reference_size == windows


def test_a_reference_that_has_seen_no_weekend_is_said():
    for quiet in (MonitorSection(), MonitorSection(window_minutes=15), MonitorSection(window_minutes=1440)):
        assert quiet.list_notes() == []
    assert MonitorSection(window_minutes=1440, reference_windows=8).list_notes() == []
    (note,) = MonitorSection(reference_windows=48).list_notes()
    assert note.startswith("monitor.reference_windows: 48 windows of 60 minutes are 2.0 days. Where weekends have less")
    assert note.endswith("Leave the key out, and take windows of 15 minutes or more.")
