"""A trained run as a monitor: read, built, loaded, replayed."""

from __future__ import annotations

import csv
import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from ruamel.yaml import YAML

import finetune
from finetune.applications.monitor import build
from finetune.applications.monitor.backtest import ALL, build_tables, run_backtest
from finetune.applications.monitor.build import DRAWN_ITEMS, ReadRow, build_monitor, draw_windows
from finetune.applications.monitor.load import is_built, load_monitor
from finetune.applications.monitor.records import ALL_TOPICS, Reading
from finetune.applications.monitor.thresholds import choose_thresholds
from finetune.cli.main import main
from finetune.errors import DataError, RecipeError, UsageError

TOPICS = {"debt": "shares", "legal": "meeting"}
"""Topic -> the word that gives it away."""
WATCHED = {"sentiment": "tone", "topic": "topic", "window_minutes": 1440, "reference_windows": 8, "rise": 0.3}


@pytest.fixture(scope="module", autouse=True)
def few_streams():
    """Thresholds from a short simulation: what is chosen is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "choose_thresholds", partial(choose_thresholds, streams=40, windows=20))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_recipe):
    """Tone and topic of the same rows, which have a time: ten a day."""
    folder = tmp_path_factory.mktemp("monitor")
    split = {"by": "time", "column": "time"}
    tasks = {
        "tone": {"split": split},
        "topic": {"type": "text_classification", "data": "rows.csv", "columns": {"label": "topic"}, "split": split},
    }
    path = write_recipe(folder, tasks=tasks, monitor=WATCHED, train={"epochs": 4}, evaluate={"slices": ["numbers"]})
    rows = list(csv.DictReader((folder / "rows.csv").open(encoding="utf-8")))
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "topic", "time"])
        for i, row in enumerate(rows):
            topic = list(TOPICS)[i % 2]
            text = f"{row['text']} {TOPICS[topic]} {TOPICS[topic]}"
            writer.writerow([text, row["label"], topic, f"2025-01-{1 + i // 10:02}T{i % 10:02}:00:00Z"])
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """As `finetune run` leaves it."""
    runs = tmp_path_factory.mktemp("runs")
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit) as ended:
        main(["run", str(recipe), "--runs", str(runs)])
    assert ended.value.code == 0
    (path,) = (runs / "tiny").iterdir()
    return path, said.getvalue()


@pytest.fixture(scope="module")
def monitor(run):
    return load_monitor(run[0])


@pytest.fixture(scope="module")
def texts(recipe):
    rows = csv.DictReader((recipe.parent / "rows.csv").open(encoding="utf-8"))
    return [(row["text"], row["label"], row["topic"]) for row in rows]


@pytest.fixture
def history(texts, tmp_path):
    """Thirty days of six items by topic; on five of them all of the topic legal are negative."""

    def write(**changes):
        generator, lines = np.random.default_rng(0), []
        for day in range(30):
            for number in range(12):
                topic = list(TOPICS)[number % 2]
                is_raised = topic == "legal" and 20 <= day < 25
                tone = "negative" if is_raised else ["negative", "neutral", "positive"][generator.integers(3)]
                known = [text for text, label, of in texts if (label, of) == (tone, topic)]
                words = f"{known[generator.integers(len(known))]} {day} {number}"
                time = f"2025-03-{1 + day:02}T{number:02}:00:00Z"
                labels = {"tone": tone, "topic": topic}
                lines.append({"id": f"{day}-{number}", "time": time, "text": words, "labels": labels} | changes)
        path = tmp_path / "history.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def test_a_reading_is_what_predict_says(run, monitor, texts):
    chosen = [text for text, _, _ in texts[::7]]
    predicted = finetune.load(run[0]).predict(chosen)
    for reading, tone, topic in zip(monitor.reader.read(chosen), predicted["tone"], predicted["topic"], strict=True):
        assert (reading.sentiment, reading.topic) == (tone.label, topic.label)
        assert reading.negative == pytest.approx(tone.scores["negative"], abs=1e-6)
    assert monitor.reader.read([]) == []
    assert list(monitor.reader.topics) == ["debt", "legal"]


def test_run_ends_with_the_error_of_the_shares(run):
    path, said = run
    assert "monitor, test: mean absolute error of the negative share" in said
    assert f"watch   finetune monitor {path.parent}" in said
    figures = json.loads((path / "monitor" / "test.json").read_text())
    assert figures["rows"] == json.loads((path / "evaluation" / "tone" / "test.json").read_text())["rows"] == 18
    assert figures["artificial"]["items_per_window"] == DRAWN_ITEMS
    assert figures["artificial"]["windows"] == 210
    assert figures["artificial"]["corrected"] < figures["artificial"]["counted"] + 0.02
    assert sum(topic["items"] for topic in figures["topics"].values()) == 18
    assert figures["windows"]["window_minutes"] == 1440
    # The rows of test are of two days, ten of each day: five of each topic.
    assert figures["windows"]["windows"] <= 4


def test_a_missed_gate_leaves_the_monitor_to_the_verb_that_uses_it(run, history, command, tmp_path):
    path = shutil.copytree(run[0], tmp_path / "missed")
    shutil.rmtree(path / "monitor")
    recipe = YAML().load(path / "recipe.resolved.yaml")
    recipe["evaluate"]["gates"] = {"macro_f1": "> 1"}
    YAML().dump(recipe, path / "recipe.resolved.yaml")
    (path / "status.json").write_text((path / "status.json").read_text().replace('"finished"', '"trained"'))
    done = command("resume", path)
    assert done.code == 4
    for task in ("tone", "topic"):
        assert f"{task}, test: 18 rows, 95% bootstrap intervals" in done.out
    assert f"monitor: not built, as a gate was missed; finetune monitor {path} builds it\n" in done.err
    assert "evaluate.gates: 2 of 2 missed on test\n" in done.err
    assert not (path / "monitor").exists()
    done = command("monitor", path, "--backtest", history())
    assert done.code == 0
    assert "building the monitor: " in done.err


def test_what_was_built_is_loaded(run, monitor):
    content = {path.name for path in (run[0] / "monitor").iterdir()}
    assert content == {"quantifier.json", "thresholds.json", "built_with.json", "validation.json", "test.json"}
    assert monitor.section.window_minutes == 1440


def test_artificial_windows_have_every_share():
    rows = [ReadRow(Reading("all", "neutral", 0.1), i < 3, "all", None) for i in range(10)]
    windows = list(draw_windows(rows, np.random.default_rng(0)))
    assert [sum(row.is_negative for row in window) for window in windows[::10]] == list(range(0, 201, 10))
    assert list(draw_windows(rows[:3], np.random.default_rng(0))) == []


def test_a_backtest_replays_history(run, monitor, history):
    path = history()
    with path.open("a") as file:  # a repeat, one too late, and one that is no item
        file.write(path.read_text().splitlines()[-1] + "\n")
        late = {"id": "late", "time": "2025-03-01T01:00:00Z", "text": "gains profit", "labels": {"tone": "positive"}}
        file.write(json.dumps(late) + "\nno item\n")
    found = run_backtest(run[0], path)
    assert found["counts"] | {"items": 360, "repeats": 1, "late": 1, "rejected: no JSON": 1} == found["counts"]
    assert found["windows"] == 30
    (change,) = found["alerts"]["changes"]
    assert (change["topic"], change["start"]) == ("legal", "2025-03-21T00:00:00+00:00")
    assert change["after"] == 1.0
    assert found["shares"][ALL]["items"] == 360
    assert set(found["shares"]) == {ALL, "debt", "legal"}
    shares, changes, alerts = build_tables(found)
    assert [row[0] for row in shares[2]] == [ALL, "debt", "legal"]
    assert changes[0].startswith("true rises of 30% or more: ")
    assert changes[2][0][-1] == ("missed" if change["delay"] is None else f"in window {change['delay']}")
    assert len(alerts[2]) == len(found["alerts"]["raised"])


def test_the_truth_of_a_backtest_is_that_of_the_labels(run, monitor, history, texts):
    """A reader that knows every label makes no error, so all that is left is none."""

    class Oracle:
        topics, fingerprint = monitor.reader.topics, monitor.reader.fingerprint

        def read(self, asked):
            known = {text: (label, topic) for text, label, topic in texts}
            readings = []
            for text in asked:
                label, topic = known[text.rsplit(" ", 2)[0]]
                readings.append(Reading(topic, label, float(label == "negative")))
            return readings

    found = run_backtest(replace(load_monitor(run[0]), reader=Oracle()), history())
    assert found["shares"][ALL]["counted"] == 0
    assert found["shares"]["legal"]["windows"] == 30


def test_a_backtest_needs_the_truth_of_every_item(run, history):
    with pytest.raises(DataError, match=r"history.jsonl: item '0-0': labels.tone must be there, got topic. A backtest"):
        run_backtest(run[0], history(labels={"topic": "debt"}))
    with pytest.raises(DataError, match=r"labels.tone must be there, got no labels"):
        run_backtest(run[0], history(labels=None))
    with pytest.raises(DataError, match=r"item '0-0': labels.topic must be one of debt, legal, got 'weather'"):
        run_backtest(run[0], history(labels={"tone": "neutral", "topic": "weather"}))


def test_a_monitor_of_another_model_is_refused(run):
    path = run[0] / "monitor" / "built_with.json"
    content = path.read_text()
    path.write_text(json.dumps(json.loads(content) | {"model": "b" * 64}))
    try:
        with pytest.raises(
            UsageError, match=r"monitor: must be built with this model, \w{12}, got one of bbbbbbbbbbbb. B"
        ):
            load_monitor(run[0])
        path.unlink()
        with pytest.raises(
            UsageError, match=r"must hold a monitor in monitor/, got none. Build it in Python: finetune.ap"
        ):
            load_monitor(run[0])
    finally:
        path.write_text(content)


def test_a_build_that_was_killed_is_none(run, tmp_path, monkeypatch):
    def judge(*values):
        raise KeyboardInterrupt

    path = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(path / "monitor")
    with monkeypatch.context() as patch:
        patch.setattr(build.ShareJudge, "judge", judge)
        with pytest.raises(KeyboardInterrupt):
            build_monitor(path)
    assert not is_built(path)
    build_monitor(path)
    assert is_built(path)


def test_one_task_is_a_monitor_without_topics(write_recipe, tmp_path):
    path = write_recipe(tmp_path, monitor={"sentiment": "tone", "negative": "positive"}, train={"epochs": 4})
    run = finetune.run(path, ["evaluate.gates={}"], runs=tmp_path / "runs", quiet=True)
    figures = build_monitor(run.folder.path)
    assert set(figures["topics"]) == {ALL_TOPICS}
    assert "windows" not in figures, "the rows have no time"
    monitor = load_monitor(run.folder.path)
    (reading,) = monitor.reader.read(["falls loss cuts"])
    (predicted,) = run.load().predict(["falls loss cuts"])
    assert reading == Reading(ALL_TOPICS, predicted.label, pytest.approx(predicted.scores["positive"], abs=1e-6))
    _take_section_away(run.folder)
    with pytest.raises(UsageError, match=r"must come from a recipe with `monitor`, got one without. Add it, and run."):
        load_monitor(run.folder.path)


def _take_section_away(folder):
    text = folder.recipe.read_text()
    start = text.index("monitor:\n")
    rest = text[start:].splitlines(keepends=True)[1:]
    kept = next(i for i, line in enumerate(rest) if not line.startswith(" "))
    folder.recipe.write_text(text[:start] + "".join(rest[kept:]))


def test_a_class_that_is_none_is_refused_by_the_recipe(write_recipe, tmp_path):
    path = write_recipe(tmp_path, monitor={"sentiment": "tone", "negative": "bad"})
    with pytest.raises(
        RecipeError, match=r"monitor.negative: must be a class of tone \(negative, neutral, positive\), got 'bad'"
    ):
        finetune.check(path)
