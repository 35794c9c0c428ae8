from __future__ import annotations

import errno
import json
import math
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import ResourceError
from finetune.training import events as module
from finetune.training.events import EventLog, load_events


def get_fields(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key != "time"} for event in load_events(path)]


def test_events_are_lines_with_the_time_in_utc(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "events.jsonl"
    with EventLog(path) as log:
        log.write("start", text="多少\u2028 two\nlines", empty=None, done=False)
        assert len(load_events(path)) == 1, "a line is there at once, not only after closing"
        log.write("step", step=1, loss=0.5)
    assert get_fields(path) == [
        {"event": "start", "text": "多少\u2028 two\nlines", "empty": None, "done": False},
        {"event": "step", "step": 1, "loss": 0.5},
    ]
    time = datetime.fromisoformat(load_events(path)[0]["time"])
    assert time.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=5)


def test_numbers_that_json_lacks_become_null_and_are_named(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("evaluation", loss=math.nan, step=2, metrics={"f1": np.float32("inf"), "per": [1.0, -math.inf]})
    line = (tmp_path / "events.jsonl").read_text()
    event = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (event["loss"], event["metrics"]) == (None, {"f1": None, "per": [1.0, None]})
    assert event["non_finite"] == ["loss", "metrics.f1", "metrics.per.1"]


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("step", step=np.int64(3), loss=np.float32(0.5), pair=(1, True))
    assert get_fields(tmp_path / "events.jsonl") == [{"event": "step", "step": 3, "loss": 0.5, "pair": [1, True]}]


@pytest.mark.parametrize("name", ["time", "non_finite"])
def test_the_names_of_the_log_itself_are_refused(tmp_path: Path, name: str) -> None:
    with EventLog(tmp_path / "events.jsonl") as log, pytest.raises(ValueError, match=f"must not be called '{name}'"):
        log.write("step", **{name: 1})


@settings(max_examples=40, deadline=None, derandomize=True)
@given(count=st.integers(0, 4), cut=st.integers(0, 10_000))
def test_a_log_cut_at_any_byte_keeps_its_complete_lines_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, count: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "events.jsonl"
    with EventLog(path) as log:
        for step in range(count):
            log.write("step", step=step, text="é")
    whole = path.read_bytes()
    left = whole[: cut % (len(whole) + 1)]
    path.write_bytes(left)
    complete = left.count(b"\n")
    assert len(load_events(path)) == complete
    with EventLog(path) as log:
        log.write("resumed")
    assert [event["event"] for event in load_events(path)] == ["step"] * complete + ["resumed"]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("start", step=9)
        for step in (1, 2, 3):
            log.write("step", step=step)
            log.write("evaluation", step=step)
        log.write("checkpoint", step=3)
        log.write("step")
        assert log.truncate_after_step(3) == 0
        assert log.truncate_after_step(1) == 4
        log.write("step", step=2)
    found = [(event["event"], event.get("step")) for event in load_events(path)]
    assert found == [
        ("start", 9), ("step", 1), ("evaluation", 1), ("checkpoint", 3), ("step", None), ("step", 2)
    ]  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["events.jsonl"]


def test_a_truncation_that_the_disk_refuses_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("step", step=5)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            with pytest.raises(ResourceError, match="No space left on device"):
                log.truncate_after_step(1)
        log.write("step", step=6)
    assert [event["step"] for event in load_events(tmp_path / "events.jsonl")] == [5, 6]


def test_no_file_means_no_events(tmp_path: Path) -> None:
    assert load_events(tmp_path / "events.jsonl") == []


@pytest.mark.parametrize("line", ["{torn", "[1]"])
def test_a_spoilt_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(f'{{"event": "start"}}\n{line}\n{{"event": "step"}}\n')
    with pytest.raises(ResourceError) as caught:
        load_events(path)
    words = f"line 2 must be a JSON object, got '{line}'. Delete that line; the checkpoints do not depend on it."
    assert str(caught.value) == f"{path}: {words}"


def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    # The device that every Linux has for this: all writes to it fail with ENOSPC.
    log = EventLog(tmp_path / "events.jsonl")
    log.close()
    with Path("/dev/full").open("ab") as full:
        log._file = full
        with pytest.raises(ResourceError, match=r"events\.jsonl: must be written .* got 'No space left on device'"):
            log.write("step", step=1)
        with pytest.raises(ResourceError, match="No space left on device"):
            log.close()


def test_a_closed_folder_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(module, "_cut_torn_line", refuse)
    with pytest.raises(ResourceError, match=r"got 'Permission denied' with .* Give this user the right to write there"):
        EventLog(tmp_path / "events.jsonl")
