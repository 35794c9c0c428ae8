"""What is kept and what goes out: the store on bad days, the alerts' file, the webhook, the metrics."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import re
import sqlite3
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from finetune.applications.monitor.exchange import Answer, ExchangeError
from finetune.applications.monitor.metrics import MetricsServer, render_metrics
from finetune.applications.monitor.records import Alert, Share, Tally
from finetune.applications.monitor.sinks import JsonlSink
from finetune.applications.monitor.store import Store, WindowRecord
from finetune.applications.monitor.webhook import MAX_WAIT_SECONDS, WebhookSink, read_secret
from finetune.errors import ResourceError, UsageError

NOON = datetime(2020, 4, 9, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
START = int(NOON.timestamp())
SHARE = Share(0.25, 0.125, 0.5, 0.3, 0.2, 40)
ALERT = Alert(
    "acme/1",
    "acme",
    "share",
    "alarm",
    NOON,
    NOON + HOUR,
    SHARE,
    SHARE,
    12.5,
    40,
    "cusum",
    7.5,
    5.0,
    ({"id": "a", "text": "Acme fällt", "link": None, "negative": 0.9},),
)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "state.db") as store:
        yield store


def add_alerts(store, *names, sinks=("file", "webhook")):
    with store.transaction():
        return [store.add_alert(replace(ALERT, id=name), sinks) for name in names]


def build_tally(*bins):
    tally = Tally()
    for negative in bins:
        tally.add(negative, negative >= 0.5)
    return tally


# The store


def test_all_that_was_kept_is_there_again(tmp_path):
    path = tmp_path / "new" / "state.db"
    empty = Share(math.nan, 0.0, 1.0, math.nan, math.nan, 0)
    with Store(path) as store, store.transaction():
        store.save_tally(START, "acme", build_tally(0.1, 0.9, 0.95))
        store.save_tally(START + 3600, "acme", build_tally(0.2))
        store.save_window(START, START + 3600, "acme", SHARE, store.load_tally(START, "acme"), is_closed=True)
        store.save_window(START, START + 3600, "beta", empty, Tally(), is_closed=True)
        store.save_window(START + 3600, START + 7200, "acme", SHARE, build_tally(0.2), is_closed=False)
        store.save_state("acme", {"cusum": 1.5})
        store.save_position("file", {"offset": 7})
        store.add_alert(ALERT, [])
        store.add_alert(replace(ALERT, id="2", statistic=math.inf, volume_before=math.nan), [])
    with Store(path) as store:
        first, other, still_open = store.read_windows()
        assert first == WindowRecord("acme", NOON, NOON + HOUR, SHARE, 2, 3, True)
        assert math.isnan(other.share.value)
        assert (other.share.items, other.total, other.share.high) == (0, 0, 1.0)
        assert (still_open.start, still_open.is_closed) == (NOON + HOUR, False)
        assert [window.topic for window in store.read_latest_windows()] == ["acme", "beta"]
        assert store.list_open_starts() == [START + 3600]
        assert store.load_tally(START + 3600, "acme").bins.tolist() == build_tally(0.2).bins.tolist()
        assert (store.read_states(), store.read_positions()) == ({"acme": {"cusum": 1.5}}, {"file": {"offset": 7}})
        one, two = store.read_alerts()
        assert one == ALERT
        assert (math.isnan(two.statistic), math.isnan(two.volume_before)) == (True, True)


def test_the_most_negative_items_of_a_window_are_kept(store):
    items = [{"id": str(n), "time": f"T{n}", "negative": n % 4 / 4} for n in range(12)]
    with store.transaction():
        store.add_top_items("acme", START, items[:7])
        store.add_top_items("acme", START, items[7:])
        store.add_top_items("acme", START + 3600, items[:1])
    assert [item["id"] for item in store.read_top_items("acme", NOON)] == ["11", "3", "7", "10", "2"]
    assert store.read_top_items("beta", NOON) == []


def test_a_transaction_is_whole_or_nothing(store):
    with suppress(ZeroDivisionError), store.transaction():
        store.count("items")
        store.count("late", 1 // 0)
    with store.transaction():
        store.count("late", 2)
        store.count("late")
    assert store.read_counts() == {"late": 3}


def test_the_first_few_lines_of_each_reason_are_kept(store):
    with store.transaction():
        for number in range(5):
            store.add_rejection("no time", f"line {number}")
        store.add_rejection("no id", "line 9")
    assert store.read_rejections() == ["line 9", "line 0", "line 1", "line 2"]
    assert store.read_counts() == {"rejected: no id": 1, "rejected: no time": 5}


def test_one_monitor_at_a_time(store):
    with pytest.raises(
        UsageError, match=r"state\.db: must belong to one monitor at a time, got a second one\. Wait for"
    ):
        Store(store.path)


def test_a_locked_database_is_an_error_and_loses_nothing(tmp_path):
    with Store(tmp_path / "state.db", seconds=0.01) as store:
        other = sqlite3.connect(store.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            ResourceError, match=r"got 'database is locked'\. Close the program that has it locked; the s"
        ):
            add_alerts(store, "a")
        other.execute("ROLLBACK")
        other.close()
        assert add_alerts(store, "a") == [True]


def test_a_full_disk_is_an_error_and_loses_nothing(store):
    add_alerts(store, "a")
    pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
    store.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(
        ResourceError, match=r"got 'database or disk is full'\. Make room on the disk; the same command g"
    ):
        add_alerts(store, *(f"b{number}" for number in range(200)))
    store.connection.execute("PRAGMA max_page_count = 100000")
    assert [alert.id for alert in store.read_alerts()] == ["a"]
    assert add_alerts(store, "b0") == [True]


@pytest.mark.parametrize("content", [b"id,text\n1,a\n" * 99, None])
def test_a_file_that_is_no_state_is_left_alone(tmp_path, content):
    path = tmp_path / "other.db"
    if content:
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE people (name)")
        other.close()
    before = path.read_bytes()
    with pytest.raises(
        UsageError, match=r"other\.db: must be the state of a monitor.*Name another file with --state\."
    ):
        Store(path)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"must be in a folder that can be written, got"):
        Store(tmp_path / "file" / "state.db")


def test_a_fact_stays_what_it_was(store):
    store.check_fact("topics", ["a", "b"], "Go back.")
    store.check_fact("topics", ["a", "b"], "Go back.")
    with pytest.raises(UsageError, match=r"state\.db: topics must be a, b as before, got a\. Go back\."):
        store.check_fact("topics", ["a"], "Go back.")


# The file of alerts


def test_an_alert_is_raised_once_and_written_once(store, tmp_path):
    sink = JsonlSink(tmp_path / "out" / "alerts.jsonl")
    assert add_alerts(store, "a", "b", "a") == [True, True, False]
    sink.deliver(store)
    add_alerts(store, "c")
    sink.deliver(store)
    lines = [json.loads(line) for line in sink.path.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert (lines[0]["start"], lines[0]["items"][0]["text"]) == ("2020-04-09T12:00:00+00:00", "Acme fällt")
    assert (store.count_outbox("file"), store.count_outbox("webhook")) == (0, 3)


def test_a_crash_between_the_file_and_the_outbox_writes_nothing_twice(store, tmp_path):
    path = tmp_path / "alerts.jsonl"
    add_alerts(store, "a", "b", "c")
    bodies = [parcel.body.encode() for parcel in store.read_outbox("file")]
    path.write_bytes(b"not ours\n[]\n" + bodies[0] + b"\n" + bodies[1][:40])  # killed while it wrote the second
    JsonlSink(path).deliver(store)
    assert path.read_bytes() == b"not ours\n[]\n" + b"".join(body + b"\n" for body in bodies)


def test_a_file_that_cannot_be_written_leaves_the_alerts_in_the_outbox(store, tmp_path):
    add_alerts(store, "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"alerts\.jsonl"):
        JsonlSink(tmp_path / "file" / "alerts.jsonl").deliver(store)
    assert store.count_outbox("file") == 1


# The webhook


class Receiver:
    """Answers with what stands in `answers`, and 204 when there is nothing."""

    def __init__(self, *answers):
        self.answers, self.now, self.taken, self.attempts = list(answers), 0.0, [], []

    def __call__(self, url, headers, bounds, body):
        self.attempts.append(self.now)
        answer = self.answers.pop(0) if self.answers else 204
        if isinstance(answer, Exception):
            raise answer
        status, headers_back = answer if isinstance(answer, tuple) else (answer, {})
        if status < 300:
            self.taken.append((headers, json.loads(body)))
        return Answer(status, headers_back, b"")

    def build_sink(self, key=None):
        return WebhookSink("https://example.org/hook", key, clock=lambda: START, tick=lambda: self.now, send=self)


def test_a_signature_is_what_the_specification_says(store):
    """Made by hand, as a receiver would check it."""
    receiver, key = Receiver(), b"0123456789abcdef"
    sink = receiver.build_sink(key)
    add_alerts(store, "0a1b")
    sink.deliver(store)
    ((headers, body),) = receiver.taken
    assert (body["id"], body["items"][0]["text"]) == ("0a1b", "Acme fällt")
    signed = f"0a1b.{START}.{json.dumps(body, ensure_ascii=False)}".encode()
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers == {
        "Content-Type": "application/json",
        "webhook-id": "0a1b",
        "webhook-timestamp": str(START),
        "webhook-signature": f"v1,{expected}",
    }


def test_a_webhook_that_was_down_for_an_hour_gets_all_in_order_once(store):
    receiver = Receiver()
    receiver.answers = [ExchangeError("Connection refused")] * 999
    sink = receiver.build_sink()
    for second in range(3600):
        receiver.now = float(second)
        if second % 600 == 0:
            add_alerts(store, f"a{second}")
        sink.deliver(store)
    waits = [b - a for a, b in zip(receiver.attempts, receiver.attempts[1:], strict=False)]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256] + [MAX_WAIT_SECONDS] * (len(waits) - 9)
    assert (sink.trouble, store.count_outbox("webhook")) == ("got Connection refused", 6)
    receiver.answers, receiver.now = [], 3600.0 + MAX_WAIT_SECONDS
    sink.deliver(store)
    sink.deliver(store)
    assert [body["id"] for _, body in receiver.taken] == [f"a{second}" for second in range(0, 3600, 600)]
    assert (sink.trouble, store.count_outbox("webhook")) == (None, 0)
    assert "webhook-signature" not in receiver.taken[0][0]


def test_an_alert_that_is_refused_blocks_no_other_and_is_named(store):
    receiver = Receiver(422)
    add_alerts(store, "a", "b")
    receiver.build_sink().deliver(store)
    assert [body["id"] for _, body in receiver.taken] == ["b"]
    assert store.read_refusals() == ["alert a: the webhook answered 422."]
    assert store.count_outbox("webhook") == 0


@pytest.mark.parametrize(
    ("answer", "wait", "words"),
    [
        (302, 1, "got status 302"),
        (401, 1, "got status 401"),
        ((429, {"retry-after": "60"}), 60, "got status 429"),
        ((503, {"retry-after": "9999999"}), MAX_WAIT_SECONDS, "got status 503"),
    ],
)
def test_what_may_pass_is_waited_for(store, answer, wait, words):
    receiver = Receiver(answer)
    sink = receiver.build_sink()
    add_alerts(store, "a")
    sink.deliver(store)
    assert sink.trouble == words
    receiver.now = wait - 0.1
    sink.deliver(store)
    assert receiver.taken == []
    receiver.now = wait
    sink.deliver(store)
    assert len(receiver.taken) == 1


def test_a_secret_is_text_or_base64_and_long_enough():
    assert (read_secret(None), read_secret("")) == (None, None)
    assert read_secret("whsec_" + base64.b64encode(b"k" * 24).decode()) == b"k" * 24
    assert read_secret("a long enough text") == b"a long enough text"
    with pytest.raises(UsageError, match=r"FINETUNE_WEBHOOK_SECRET: must have at least 16 bytes, got 5\."):
        read_secret("short")
    with pytest.raises(UsageError, match=r"FINETUNE_WEBHOOK_SECRET: must be base64 after whsec_, got something else\."):
        read_secret("whsec_!!!")


# Metrics


def test_metrics_are_what_the_store_counted(store):
    with store.transaction():
        store.count("items", 7)
        store.add_rejection('no "id"', "words")
        store.count("alerts: alarm", 2)
        for start, value in ((START, 0.5), (START + 3600, math.nan)):
            tally = build_tally(0.1, 0.9)
            store.save_window(start, start + 3600, 'a"b\\c\n', replace(SHARE, value=value), tally, is_closed=True)
    add_alerts(store, "a", "b")
    text = render_metrics(store, ["file", "webhook"])
    lines = text.splitlines()
    for expected in (
        "# TYPE finetune_monitor_items_total counter",
        "finetune_monitor_items_total 7",
        "finetune_monitor_late_total 0",
        'finetune_monitor_rejected_total{reason="no \\"id\\""} 1',
        'finetune_monitor_alerts_total{level="alarm"} 2',
        'finetune_monitor_outbox{sink="webhook"} 2',
        'finetune_monitor_share{topic="a\\"b\\\\c\\n"} NaN',
        'finetune_monitor_share_low{topic="a\\"b\\\\c\\n"} 0.125',
        'finetune_monitor_window_items{topic="a\\"b\\\\c\\n"} 2',
    ):
        assert lines.count(expected) == 1, expected
    shape = re.compile(r'(# (HELP|TYPE) \w+ .+|\w+(\{\w+="([^"\\]|\\.)*"(,\w+="([^"\\]|\\.)*")*\})? \S+)')
    assert all(shape.fullmatch(line) for line in lines)
    assert text.endswith("\n")


def test_a_share_of_no_items_is_no_metric(store):
    with store.transaction():
        for topic, tally in (("quiet", Tally()), ("acme", build_tally(0.9))):
            store.save_window(START, START + 3600, topic, SHARE, tally, is_closed=True)
    text = render_metrics(store, [])
    assert [line for line in text.splitlines() if 'topic="quiet"' in line] == [
        'finetune_monitor_window_items{topic="quiet"} 0'
    ]
    assert 'finetune_monitor_share{topic="acme"} 0.25' in text


def test_a_port_answers_with_what_was_published_last():
    with MetricsServer(0) as server:
        server.publish("one 1\n")
        server.publish("two 2\n")
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
            assert (answer.read(), answer.headers["Content-Type"][:10]) == (b"two 2\n", "text/plain")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/")
        with pytest.raises(
            UsageError, match=rf"--metrics-port: must be a free port, got {server.port} \(.+\)\. Name an"
        ):
            MetricsServer(server.port)
    with pytest.raises(UsageError, match=r"--metrics-port: must be a free port, got 99999"):
        MetricsServer(99999)
