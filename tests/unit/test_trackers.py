from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.errors import ResourceError
from finetune.training.events import load_events


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_tensorboard_shows_what_the_diary_holds(training, tiny_classifier):
    training.fit(tiny_classifier(), trackers=["tensorboard"], learning_rate=0.02)
    events = load_events(training.root / "run" / "events.jsonl")
    files = list((training.root / "run" / "trackers").rglob("events.out.tfevents*"))
    scalars: dict[str, list[tuple[int, float]]] = {}
    for path in files:
        reader = EventAccumulator(str(path)).Reload()
        for name in reader.Tags()["scalars"]:
            scalars[name] = [(event.step, event.value) for event in reader.Scalars(name)]
    for name in ("loss", "learning_rate", "grad_norm"):
        expected = [(event["step"], event[name]) for event in events if event["event"] == "step"]
        assert [step for step, _ in scalars[name]] == [step for step, _ in expected]
        assert [value for _, value in scalars[name]] == pytest.approx([value for _, value in expected])
    evaluations = [(event["step"], event["metrics"]) for event in events if event["event"] == "evaluation"]
    for name in ("loss", "macro_f1"):
        assert [step for step, _ in scalars[f"validation_{name}"]] == [step for step, _ in evaluations]
        assert [value for _, value in scalars[f"validation_{name}"]] == pytest.approx(
            [metrics[name] for _, metrics in evaluations]
        )


def test_wandb_offline_writes_into_the_run_and_needs_no_network(training, tiny_classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens: a request would fail
    training.fit(tiny_classifier(), trackers=["wandb"], epochs=1)
    files = list_files(training.root / "run" / "trackers")
    assert [name for name in files if Path(name).match("wandb/offline-run-*/run-*.wandb")]
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_words_for_a_tracker_that_is_not_installed(training, tiny_classifier, monkeypatch, name):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == name else find_spec(module, *rest)
    )
    with pytest.raises(ResourceError) as caught:
        training.fit(tiny_classifier(), trackers=[name])
    assert str(caught.value) == (
        f"train.trackers: {name} must be installed to be used, got no such package. pip install {name}"
    )
    assert not os.path.lexists(training.root / "run")


def test_no_tracker_no_folder(training, tiny_classifier):
    training.fit(tiny_classifier(), epochs=1)
    assert not (training.root / "run" / "trackers").exists()
