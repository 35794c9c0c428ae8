"""The loop: what it makes of a stream, however that is cut, delayed and killed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.applications.monitor.sinks import JsonlSink
from finetune.applications.monitor.sources import FileSource, Record
from finetune.applications.monitor.store import Store
from finetune.applications.monitor.watch import Options, watch
from finetune.errors import ResourceError, UsageError
from finetune.recipe.applications import MonitorSection

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "state.db") as store:
        yield store


@pytest.fixture
def options(words):
    return Options(batch_items=16, batch_seconds=1e9, clock=lambda: words.NOW, sleep=lambda _: None)


def build_records(*items):
    return [Record(f"item {number}", item) for number, item in enumerate(items)]


def build_item(words, minutes, text, name=None):
    return {"id": name or text, "time": words.BEGIN + 60 * minutes, "text": text}


def read_all(store):
    """Everything that people see of a store, comparable also where a share is not a number."""
    return [*map(repr, store.read_windows()), *map(repr, store.read_alerts()), repr(store.read_counts())]


# The story


def test_a_stream_from_items_to_an_alert(words, store, options, tmp_path):
    monitor, told = words.WordMonitor(), []
    quiet = ["acme stays 0", "acme stays 1", "acme stays 5", "beta stays 1"]
    bad = [f"acme falls {number}" for number in range(7)]
    items = [build_item(words, 1, text) for text in quiet] + [build_item(words, 11, text) for text in bad]
    items += [build_item(words, 12, "acme falls 3", name="copy"), build_item(words, 45, "gamma ends"), b"no JSON"]
    items += [build_item(words, 3, "acme is late")]
    listening = Options(batch_items=5, clock=lambda: words.BEGIN + 50 * 60, on_alert=told.append, sleep=lambda _: None)
    assert watch(build_records(*items), monitor, store, [JsonlSink(tmp_path / "a.jsonl")], listening)
    assert store.read_counts() == {
        "alerts: alarm": 1,
        "items": 12,
        "late": 1,
        "lines": 15,
        "rejected: no JSON": 1,
        "repeats": 1,
        "windows": 3,
    }
    assert store.read_rejections() == ["item 13: must be a JSON object, got 'no JSON'."]
    closed = [(w.topic, w.start.minute, w.total, w.called) for w in store.read_windows() if w.is_closed and w.total]
    negative = sum(monitor.reader._read(text).negative >= 0.5 for text in quiet[:3])
    assert closed == [("acme", 0, 3, negative), ("beta", 0, 1, closed[1][3]), ("acme", 10, 7, 7)]
    # 45 minus 10 closes what ended by 35; the window of 45 may still take items, and nobody judged it.
    assert [(w.start.minute, w.total) for w in store.read_windows() if not w.is_closed] == [(40, 0), (40, 0), (40, 1)]
    assert [at for topic, at, _ in monitor.watcher.judged if topic == "other"][:3] == [
        words.BEGIN + 600 * n for n in range(3)
    ]
    (alert,) = told
    assert (alert, alert.after.value) == (store.read_alerts()[0], 1.0)
    assert [item["negative"] for item in alert.items] == [0.95] * 5
    assert alert.items[0] == {
        "id": "acme falls 0",
        "time": "2020-04-09T00:11:00+00:00",
        "text": "acme falls 0",
        "link": None,
        "source": None,
        "ticker": None,
        "negative": 0.95,
    }
    assert json.loads((tmp_path / "a.jsonl").read_text())["id"] == alert.id == "acme:20200409T0010:alarm"


@pytest.mark.parametrize("now", [21, 30, 1e6])
def test_the_end_of_the_input_closes_what_the_items_allow_and_the_rest_where_it_is_complete(words, store, now):
    """The last item is of 21: only what ended by 11 misses nothing, whatever the clock says."""
    items = build_records(*(build_item(words, minutes, f"acme {minutes}") for minutes in (1, 11, 21)))
    options = Options(clock=lambda: words.BEGIN + 60 * now)
    watch(items, words.WordMonitor(), store, (), options)
    assert (store.read_counts()["windows"], len(store.list_open_starts())) == (1, 2)
    for _ in range(2):
        watch([], words.WordMonitor(), store, (), replace(options, is_complete=True))
        assert (store.read_counts()["windows"], store.list_open_starts()) == (3, [])


def test_what_comes_in_time_for_a_window_that_was_closed_as_complete_is_late_and_named(words, store, options):
    complete = replace(options, is_complete=True)
    watch(build_records(build_item(words, 1, "acme a"), build_item(words, 31, "acme b")), words.WordMonitor(), store)
    later = [build_item(words, 32, "in time"), build_item(words, 3, "too late"), build_item(words, 41, "acme c")]
    for items in ([], later):
        watch(build_records(*items), words.WordMonitor(), store, (), complete)
    counts = store.read_counts()
    assert (counts["items"], counts["late"], counts["note: closed early"]) == (3, 2, 1)


def test_a_followed_stream_that_falls_silent_has_its_last_windows_judged(words, store):
    """By the clock, and not before it was silent for the lateness of ten minutes: a stream may be behind the clock."""
    ticks, told, seen = [0.0], [], []
    texts = [*((1, f"acme stays {n}") for n in range(3)), *((11, f"acme falls {n}") for n in range(5))]

    def source():
        yield from build_records(*(build_item(words, *one) for one in texts))
        for _ in range(30):
            yield None
            seen.append((ticks[0], len(told)))

    def sleep(_):
        ticks[0] += 60

    options = Options(
        clock=lambda: words.BEGIN + 25 * 60 + ticks[0],
        tick=lambda: ticks[0],
        sleep=sleep,
        on_alert=told.append,
        is_stopped=lambda: len(seen) == 29,
    )
    assert not watch(source(), words.WordMonitor(), store, (), options)
    # The window from 10 to 20 takes items until 30: five minutes from now. It has been silent for ten minutes at ten.
    assert next(minute // 60 for minute, alerts in seen if alerts) == 11
    assert [alert.id for alert in told] == ["acme:20200409T0010:alarm"]
    assert store.connection.execute("SELECT count(*) FROM top_items").fetchone() == (0,)


def test_a_slow_stream_is_answered_at_once_and_a_fast_one_in_batches(words, store):
    sizes, ticks, records = [], [0.0], build_records(*(build_item(words, 1, f"acme {n}") for n in range(20)))

    class Reader(words.WordReader):
        def read(self, texts):
            sizes.append(len(texts))
            return super().read(texts)

    def source():
        yield records[0]
        yield None  # nothing more for now
        yield None
        yield from records[1:10]  # eight and one
        ticks[0] += 1.0
        yield from records[10:12]  # the first has waited long enough
        yield from records[12:]

    sleeps = []
    options = Options(batch_items=8, batch_seconds=1.0, tick=lambda: ticks[0], sleep=sleeps.append)
    watch(source(), words.WordMonitor(reader=Reader()), store, (), options)
    assert (sizes, sleeps) == ([1, 8, 2, 8, 1], [0.2])


def test_a_stop_ends_after_the_batch_and_the_next_call_goes_on(words, tmp_path, options):
    path = tmp_path / "stream.jsonl"
    words.write_stream(path, words.build_stream(100, 3))
    with Store(tmp_path / "whole.db") as whole, Store(tmp_path / "cut.db") as cut:
        watch(FileSource(path), words.WordMonitor(), whole, (), options)
        runs, ends = 0, False
        while not ends:
            source = FileSource(path)
            source.go_on(cut.read_positions().get(source.origin))
            stopping = Options(batch_items=7, batch_seconds=1e9, clock=options.clock, is_stopped=lambda: True)
            ends = watch(source, words.WordMonitor(), cut, (), stopping)
            runs += 1
        assert runs > 10
        assert read_all(cut) == read_all(whole)


def test_two_monitors_name_their_alerts_differently_and_each_goes_on_with_its_name(words, tmp_path, options):
    streams = []
    for name in ("one", "other", "one"):
        monitor = words.WordMonitor()
        with Store(tmp_path / f"{name}.db") as store:
            watch([], monitor, store, (), options)
        streams.append(monitor.watcher.stream)
    assert streams[0] == streams[2] != streams[1]
    assert len(streams[0]) == 16


@pytest.mark.parametrize(
    ("name", "known", "value"),
    [("window_minutes", 10, 20), ("reference_windows", 8, 9), ("rise", 0.1, 0.2), ("negative", "negative", "bad")],
)
def test_a_state_belongs_to_what_it_was_counted_with(words, store, options, name, known, value):
    watch([], words.WordMonitor(), store, (), options)
    other = words.WordMonitor()
    other.section = other.section.model_copy(update={name: value})
    with pytest.raises(
        UsageError,
        match=rf"state\.db: {name} must be {known} as before, got {value}\. Name another file with --state, or delete",
    ):
        watch([], other, store, (), options)


def test_a_state_belongs_to_its_model_and_topics(words, store, options):
    watch([], words.WordMonitor(), store, (), options)
    other = words.WordMonitor()
    other.reader.fingerprint = "b" * 64
    with pytest.raises(
        UsageError,
        match=r"state\.db: model must be a{12} as before, got b{12}\. Name another file with --state, or",
    ):
        watch([], other, store, (), options)
    other = words.WordMonitor()
    other.reader.topics = ("acme",)
    with pytest.raises(UsageError, match=r"topics must be acme, beta, other as before, got acme\. Name another file"):
        watch([], other, store, (), options)


def test_a_disk_that_fills_up_loses_nothing(words, tmp_path, options):
    path = tmp_path / "stream.jsonl"
    words.write_stream(path, words.build_stream(300, 5))
    with Store(tmp_path / "whole.db") as whole:
        watch(FileSource(path), words.WordMonitor(), whole, (), options)
        expected = read_all(whole)
    with Store(tmp_path / "small.db") as store:
        store.connection.execute("PRAGMA max_page_count = 45")
        with pytest.raises(ResourceError, match=r"small\.db: the state must be written, got .*Make room on the disk"):
            watch(FileSource(path), words.WordMonitor(), store, (), options)
    with Store(tmp_path / "small.db") as store:
        assert 0 < store.read_counts()["items"] < 300
        source = FileSource(path)
        source.go_on(store.read_positions().get(source.origin))
        watch(source, words.WordMonitor(), store, (), options)
        assert read_all(store) == expected


def test_at_the_end_a_sink_that_is_down_gets_a_little_time(words, store, options):
    class Sink:
        name = "webhook"
        attempts = 0

        def deliver(self, store):
            self.attempts += 1

    ticks = [0.0]

    def sleep(seconds):
        ticks[0] += seconds

    texts = [
        (1, "acme stays 0"),
        (1, "acme stays 1"),
        (1, "acme stays 5"),
        *((11, f"acme falls {n}") for n in range(5)),
    ]
    records = build_records(*(build_item(words, *one) for one in texts))
    waiting = replace(options, tick=lambda: ticks[0], sleep=sleep, idle_seconds=0.5, drain_seconds=20, is_complete=True)
    sink = Sink()
    assert watch(records, words.WordMonitor(), store, [sink], waiting)
    assert (sink.attempts, ticks[0], store.count_outbox("webhook")) == (42, 20.0, 1)


# Any order


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 59), min_size=1, max_size=40), st.randoms(use_true_random=False), st.integers(1, 9))
def test_any_order_within_the_lateness_gives_the_same_shares(words, minutes, draw, size):
    """All items lie within an hour, which is how long is waited: nothing is late, whatever comes first."""
    monitor = words.WordMonitor(section=MonitorSection(window_minutes=10, lateness_minutes=60, reference_windows=8))
    names = [f"{draw.choice(['acme', 'beta', 'gamma'])} {number} {draw.random()}" for number in range(len(minutes))]
    items = [build_item(words, at, name) for at, name in zip(minutes, names, strict=True)]
    seen = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "s.db") as store:
            store.connection.execute("PRAGMA synchronous = OFF")
            watch(build_records(*items), monitor, store, (), Options(batch_items=size, clock=lambda: words.NOW))
            seen.append(
                (read_all(store), [store.read_top_items("acme", window.start) for window in store.read_windows()])
            )
        draw.shuffle(items)
        monitor = words.WordMonitor(section=monitor.section)
    assert seen[0] == seen[1]
    reading = {name: monitor.reader._read(name) for name in names}
    expected = Counter((reading[name].topic, at // 10) for at, name in zip(minutes, names, strict=True))
    assert sum(expected.values()) == int(seen[0][0][-1].split("'items': ")[1].split(",")[0].rstrip("}"))


# Any cut into calls


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0, 1), min_size=1, max_size=5), st.booleans())
def test_a_file_that_grows_from_call_to_call_comes_to_the_same_as_one_call(words, seed, cuts, is_complete):
    """Wherever it is cut, within a line too: the same windows, counts, alerts and late items, years after its day."""
    with tempfile.TemporaryDirectory() as name:
        seen = []
        for parts in ([], sorted(cuts)):
            folder = Path(name) / str(len(seen))
            folder.mkdir()
            path = folder / "stream.jsonl"
            words.write_stream(path, words.build_stream(120, seed))
            content = path.read_bytes()
            path.write_bytes(b"")
            (folder / "alerts.jsonl").touch()
            ends = [int(part * len(content)) for part in parts] + [len(content)]
            for begin, end in zip([0, *ends], ends, strict=False):
                with path.open("ab") as file:
                    file.write(content[begin:end])
                with Store(folder / "state.db") as store:
                    store.connection.execute("PRAGMA synchronous = OFF")
                    words.watch_file(folder, store, is_complete=is_complete and end == len(content))
            with Store(folder / "state.db") as store:
                seen.append((read_all(store), len(store.list_open_starts()), (folder / "alerts.jsonl").read_bytes()))
        assert seen[0] == seen[1]
        assert (seen[0][1] == 0) == is_complete


# kill -9


@pytest.mark.parametrize("seed", [11])
def test_killed_again_and_again_it_comes_to_the_same(words, tmp_path, seed):
    """Thirty-two times: inside a transaction, between an alert's line and the outbox, and at any time."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        words.write_stream(tmp_path / name / "stream.jsonl", words.build_stream(3_200, seed))
    begun = time.perf_counter()
    with Store(tmp_path / "whole" / "state.db") as store:
        words.watch_file(tmp_path / "whole", store)
        expected, raised = read_all(store), [alert.id for alert in store.read_alerts()]
    longest = (time.perf_counter() - begun) / 32  # no machine is so fast that it is done before it was killed so often
    done = subprocess.run(
        [sys.executable, Path(words.__file__), tmp_path / "killed", "32", str(seed), str(longest)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    died = json.loads(done.stdout)
    assert sum(died.values()) == 32
    assert min(died.values()) >= 5, died
    with Store(tmp_path / "killed" / "state.db") as store:
        assert read_all(store) == expected
        assert store.count_outbox("file") == 0
    lines = [json.loads(line)["id"] for line in (tmp_path / "killed" / "alerts.jsonl").read_text().splitlines()]
    assert lines == raised
    assert len(lines) > 20
    assert (tmp_path / "killed" / "alerts.jsonl").read_bytes() == (tmp_path / "whole" / "alerts.jsonl").read_bytes()


# Memory


class Forgetful(list):
    def __iadd__(self, other):
        return self

    def append(self, _item):
        pass


def watch_many(words, folder, number, measure):
    """Bytes in use and pages of the state, after half and after all; and the windows that were closed between."""

    def source():
        for index in range(number):
            text = f"{('acme', 'beta', 'gamma')[index % 3]} {index * 7919 % 100_003} {'falls' if index % 5 else 'ends'}"
            yield Record("", {"id": str(index), "time": words.BEGIN + 600 * index, "text": text})
            if index in (number // 2, number - 1):
                measured.append((measure(), *count_pages()))

    def count_pages():
        pages, free = (read_number(f"PRAGMA {name}") for name in ("page_count", "freelist_count"))
        return pages - free, read_number("SELECT count(*) FROM windows")

    def read_number(query):
        return store.connection.execute(query).fetchone()[0]

    measured = []
    with Store(folder / "state.db") as store:
        store.connection.execute("PRAGMA synchronous = OFF")
        monitor = words.WordMonitor(section=MonitorSection(window_minutes=600, lateness_minutes=600))
        monitor.reader.texts, monitor.watcher.judged = Forgetful(), Forgetful()
        watch(source(), monitor, store, (), Options(clock=lambda: math.inf, batch_items=64))
    (first, pages, windows), (second, more_pages, more_windows) = measured
    # A closed window takes a row, and its five most negative items: less than two pages.
    assert more_pages - pages < 2 * (more_windows - windows)
    return first, second


def test_memory_is_flat(words, tmp_path):
    def measure():
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return peak

    tracemalloc.start()
    first, second = watch_many(words, tmp_path, 2_400, measure)
    tracemalloc.stop()
    assert second < 1.2 * first


@pytest.mark.slow
def test_memory_is_flat_over_many_items(words, tmp_path):
    first, second = watch_many(words, tmp_path, 200_000, lambda: psutil.Process().memory_info().rss)
    assert second < first + 20 * 2**20
