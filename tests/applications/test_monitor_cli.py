"""`finetune monitor` with a monitor made of word lists in the place of a trained one."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune.applications.monitor import backtest, report
from finetune.applications.monitor import load as loading
from finetune.applications.monitor import watch as watching
from finetune.applications.monitor.feeds import FeedSource
from finetune.applications.monitor.records import Alert, Share
from finetune.cli.monitor import _describe_alert


@pytest.fixture
def stream(words, tmp_path):
    """Two windows: `acme` stays in the first and falls in the second."""
    path = tmp_path / "stream.jsonl"
    lines = [{"id": f"s{n}", "time": words.BEGIN + 60, "text": f"acme stays {n}"} for n in range(6)]
    lines += [{"id": f"f{n}", "time": words.BEGIN + 660, "text": f"acme falls {n}"} for n in range(6)]
    lines += [lines[-1], "no JSON", {"id": "x", "time": "2020-04-09 00:12", "text": "beta ends"}]
    words.write_stream(path, lines)
    return path


@pytest.fixture
def monitor(command, words, tmp_path, monkeypatch):
    """The command; without `--alerts` where a test names one itself."""
    monkeypatch.setattr(loading, "is_built", lambda run: True)
    monkeypatch.setattr(loading, "load_monitor", lambda run, engine: words.WordMonitor())
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: None)

    def run(*options, alerts=tmp_path / "alerts.jsonl"):
        return command("monitor", "runs/any", *options, *(["--alerts", alerts] if alerts else []))

    return run


def read_lines(text):
    return [json.loads(line) for line in text.splitlines()]


# What people and programs see


def test_what_people_see(monitor, stream, tmp_path):
    done = monitor("--input", stream, "--close")
    assert (done.code, done.err) == (0, "")
    alert, *rest = done.out.splitlines()
    assert alert == (
        "2020-04-09 00:10  alarm     acme  worse news  0.0% (0.0% to 0.0%) -> 100.0% (100.0% to 100.0%)  "
        "step 1.00, threshold 0.15"
    )
    table = {tuple(line.rsplit(maxsplit=1)) for line in rest if line[:1] != " " and line}
    for name, number in (("items", 13), ("repeats", 1), ("lines", 15), ("rejected: no JSON", 1), ("windows", 2)):
        assert (name, str(number)) in table
    assert rest[-3:] == [
        "1 had a time without a zone, which was taken as UTC.",
        "Rejected, the first of each kind:",
        f"  {stream}: line 14: must be a JSON object, got 'no JSON'.",
    ]
    assert [line["id"] for line in read_lines((tmp_path / "alerts.jsonl").read_text())] == ["acme:20200409T0010:alarm"]
    again = monitor("--input", stream, "--close")
    assert (again.code, "alarm" in again.out, "repeats" in again.out) == (0, False, False)


def test_one_object_a_line_for_programs(monitor, stream):
    alert, summary = read_lines(monitor("--input", stream, "--close", "--json").out)
    assert (alert["event"], alert["alert"]["level"], len(alert["alert"]["items"])) == ("alert", "alarm", 5)
    assert summary == {
        "event": "summary",
        "counts": {
            "alerts: alarm": 1,
            "items": 13,
            "lines": 15,
            "note: zone assumed": 1,
            "rejected: no JSON": 1,
            "repeats": 1,
            "windows": 2,
        },
        "open": 0,
        "rejected": [f"{stream}: line 14: must be a JSON object, got 'no JSON'."],
        "troubles": [],
    }


def test_what_may_still_take_items_is_left_open_and_said(monitor, stream, tmp_path):
    done = monitor("--input", stream)
    assert (done.code, "alarm" in done.out) == (0, False)
    words = (
        "2 windows may still take items, to be judged once later ones come. If nothing is missing, --close judges now."
    )
    assert words in done.out.splitlines()
    assert read_lines(monitor("--input", stream, "--json").out) == [
        {"event": "summary", "counts": {}, "open": 2, "rejected": [], "troubles": []}
    ]
    alert, summary = read_lines(monitor("--close", "--json").out)
    assert (alert["event"], summary["counts"], summary["open"]) == ("alert", {"alerts: alarm": 1, "windows": 2}, 0)
    assert [line["id"] for line in read_lines((tmp_path / "alerts.jsonl").read_text())] == ["acme:20200409T0010:alarm"]
    assert "may still take items" not in monitor("--input", stream).out


def test_half_of_a_past_day_now_and_half_later_is_the_whole_day(monitor, words, tmp_path, monkeypatch):
    """The day is long over by the clock, and its second half is as much in time as its first."""
    section = words.MonitorSection(window_minutes=1440, lateness_minutes=720)
    monkeypatch.setattr(loading, "load_monitor", lambda run, engine: words.WordMonitor(section=section))
    path, done = tmp_path / "day.jsonl", []
    lines = [{"id": n, "time": words.BEGIN + 1_800 * n, "text": f"acme report {n}"} for n in range(48)]
    for end in (24, 48):
        words.write_stream(path, lines[:end])
        done.append(monitor("--input", path, "--json"))
    counts = [read_lines(one.out)[-1]["counts"] for one in done]
    assert [(found["items"], found.get("late", 0)) for found in counts] == [(24, 0), (24, 0)]


def test_what_comes_behind_a_close_is_late_and_the_reason_is_said(monitor, words, stream):
    monitor("--input", stream, "--close")
    with stream.open("a") as file:
        file.write(json.dumps({"id": "z", "time": words.BEGIN + 720, "text": "beta opens"}) + "\n")
    assert monitor("--input", stream).out.splitlines()[-1] == (
        "1 came within the lateness, for a window that --close or a silence had closed: late all the same."
    )


def test_standard_input(monitor, stream, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stream.read_bytes()), "utf-8"))
    _, summary = read_lines(monitor("--input", "-", "--close", "--json").out)
    assert (summary["counts"]["items"], summary["rejected"][0][:24]) == (13, "standard input: line 14:")


def test_a_named_pipe(monitor, stream, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=pipe.write_bytes, args=(stream.read_bytes(),))
    thread.start()
    _, summary = read_lines(monitor("--input", pipe, "--close", "--json").out)
    thread.join()
    assert (summary["counts"]["items"], summary["rejected"][0]) == (
        13,
        f"{pipe}: line 14: must be a JSON object, got 'no JSON'.",
    )


def test_a_file_that_is_gone_is_said(monitor, stream):
    monitor("--input", stream, "--close")
    stream.write_text("")
    assert monitor("--input", stream, "--close").out.splitlines()[-1] == (
        "1 time the file of the last position was gone: what else it held was not read."
    )
    assert "gone" not in monitor("--input", stream, "--close").out


def test_a_line_whose_end_comes_late_is_one_item(monitor, stream):
    line = json.dumps({"id": "last", "time": "2020-04-09T00:12Z", "text": "beta ends today"})
    counts = []
    for part in (line[:40], line[40:], "\n"):
        with stream.open("a") as file:
            file.write(part)
        counts.append(read_lines(monitor("--input", stream, "--json").out)[-1]["counts"])
    assert [(found.get("lines", 0), found.get("rejected: no JSON", 0)) for found in counts] == [(15, 1), (1, 0), (0, 0)]


def test_a_pause_of_a_year_is_passed_over_and_said(monitor, words, stream, tmp_path):
    with stream.open("a") as file:
        file.write(json.dumps({"id": "y", "time": words.BEGIN + 365 * 86_400, "text": "acme stays"}) + "\n")
    done = monitor("--input", stream, "--close")
    # Ten-minute windows 0 and 1 hold items, 2 to 52,559 none, of which four are judged: what is usual is not known yet.
    assert re.search(r"^windows passed over +52,554$", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("after", "level", "said"), [(90, "alarm", "more news"), (3, "warning", "less news"), (40, "recovery", "over")]
)
def test_more_news_and_less_news_are_told_apart_from_worse_news(after, level, said):
    share, noon = Share(0.2, 0.1, 0.3, 0.2, 0.2, 40), datetime(2020, 4, 9, 12, tzinfo=UTC)
    alert = Alert("a", "ac\x1bme", "volume", level, noon, noon, share, share, 41.25, after, "burst", 9.0, 4.0)
    line = _describe_alert(alert)
    assert line == f"2020-04-09 12:00  {level:8}  acme  {said}  41.2 -> {after} items  burst 9.00, threshold 4.00"


def test_no_number_is_made_up_where_there_are_no_items_and_no_test():
    share, none, noon = Share(0.2, 0.1, 0.3, 0.2, 0.2, 40), Share(0.3, 0.0, 1.0, 0.3, 0.3, 0), datetime(2020, 4, 9, 12)
    alert = Alert("a", "acme", "share", "recovery", noon, noon, share, none, 41.25, 0, "reference", 9.0, 4.0)
    assert _describe_alert(alert) == (
        "2020-04-09 12:00  recovery  acme  over  20.0% (10.0% to 30.0%) -> no items  usual now"
    )


# Exit codes


@pytest.mark.parametrize(("level", "code"), [("alarm", 4), ("warning", 4), (None, 0)])
def test_a_script_can_wait_for_an_alarm(monitor, stream, level, code):
    done = monitor("--input", stream, "--close", *(["--fail-on", level] if level else []))
    assert done.code == code
    if code:
        assert done.err == f"finetune: --fail-on {level}: this run must raise no such alert, got 1 of level alarm.\n"
    assert monitor("--input", stream, "--close", "--fail-on", "warning").code == 0  # it was raised before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_after_the_batch_and_it_can_go_on(monitor, words, stream, tmp_path, monkeypatch, name):
    class Reader(words.WordReader):
        def read(self, texts):
            os.kill(os.getpid(), getattr(signal, name))
            return super().read(texts)

    with monkeypatch.context() as patched:
        patched.setattr(loading, "load_monitor", lambda run, engine: words.WordMonitor(reader=Reader()))
        done = monitor("--input", stream, "--follow")
    assert (done.code, done.err) == (75, f"finetune: stopped by {name}; the same command goes on where it was.\n")
    assert "items" in done.out
    _, summary = read_lines(monitor("--input", stream, "--close", "--json").out)
    assert summary["counts"] == {"alerts: alarm": 1, "windows": 2}


def test_a_feed_that_does_not_answer_exits_with_5_after_the_rest_was_read(monitor, stream, monkeypatch):
    ticks = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(
        FeedSource.__init__, "__defaults__", (*FeedSource.__init__.__defaults__[:-1], lambda: next(ticks))
    )
    done = monitor("--input", stream, "--close", "--feed", "http://127.0.0.1:1/rss")
    assert done.code == 5
    assert "finetune: http://127.0.0.1:1/rss: must answer with a feed, got Connection refused.\n" in done.err
    assert "alarm" in done.out


class Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.taken.append((dict(self.headers), json.loads(body)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_an_alert_arrives_at_a_webhook_signed_and_one_that_is_down_exits_with_5(monitor, stream, monkeypatch):
    monkeypatch.setattr(watching.Options, "drain_seconds", 0.0)
    defaults = watching.Options.__init__.__defaults__
    monkeypatch.setattr(watching.Options.__init__, "__defaults__", (*defaults[:3], 0.0, *defaults[4:]))
    monkeypatch.setenv("FINETUNE_WEBHOOK_SECRET", "0123456789abcdef")
    down = monitor("--input", stream, "--close", "--webhook", "http://127.0.0.1:1/")
    assert down.code == 5
    assert "finetune: --webhook: must take every alert, got Connection refused; 1 wait in " in down.err
    assert down.err.endswith("alerts.db. The same command sends them.\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.taken, server.status = [], 204
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hook = ("--webhook", f"http://127.0.0.1:{server.server_address[1]}/")
    done = monitor("--input", stream, "--close", *hook)
    server.status = 422
    other = stream.with_name("other")
    refused = [monitor("--input", stream, "--close", *hook, alerts=other) for _ in range(2)]
    server.shutdown()
    server.server_close()
    assert (done.code, done.err) == (0, "")
    assert [run.code for run in refused] == [5, 0]
    assert refused[0].err == "finetune: alert acme:20200409T0010:alarm: the webhook answered 422.\n"
    (headers, body), _ = server.taken
    assert (body["id"], headers["Webhook-Signature"][:3]) == ("acme:20200409T0010:alarm", "v1,")


def test_metrics_can_be_asked_while_it_runs(monitor, words, stream, monkeypatch, capsys):
    seen = []

    class Watcher(words.StepWatcher):
        def to_state(self, topic):
            port = capsys.readouterr().err.partition("http://127.0.0.1:")[2].partition("/")[0]
            if port:
                ports.append(port)
            with suppress(OSError):
                seen.append(urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/metrics").read().decode())
            return super().to_state(topic)

    ports = []
    monkeypatch.setattr(loading, "load_monitor", lambda run, engine: words.WordMonitor(watcher=Watcher()))
    assert monitor("--input", stream, "--metrics-port", "0").code == 0
    assert seen
    assert "finetune_monitor_items_total 13" in seen[-1]


# The parts of others


def test_a_report_is_written_at_the_end_or_from_the_state_alone(monitor, stream, tmp_path, monkeypatch):
    written = []

    def write_report(store, section, path):
        written.append((len(store.read_windows()), section.window_minutes, path))

    monkeypatch.setattr(report, "write_report", write_report)
    page = tmp_path / "page.html"
    assert monitor("--input", stream, "--report", page).code == 0
    done = monitor("--state", tmp_path / "alerts.db", "--report", page, alerts=None)
    assert (done.code, done.err) == (0, f"report  {page}\n")
    assert written == [(6, 10, page)] * 2


def test_a_backtest_comes_alone(monitor, stream, monkeypatch):
    found = {"windows": 3}
    monkeypatch.setattr(backtest, "run_backtest", lambda run, path: found)
    monkeypatch.setattr(backtest, "build_tables", lambda found: [("title", ["head"], [["cell"]])])
    done = monitor("--backtest", stream, alerts=None)
    assert (done.code, [line.strip() for line in done.out.splitlines()]) == (0, ["title", "head", "cell"])
    assert json.loads(monitor("--backtest", stream, "--json", alerts=None).out) == found
    done = monitor("--backtest", stream)
    assert (done.code, done.err) == (
        2,
        "finetune: monitor: --backtest must come with --engine and --json at most, got more. Leave it out.\n",
    )


@pytest.mark.parametrize(
    "option",
    [
        ["--follow"],
        ["--fail-on", "nonsense"],
        ["--metrics-port", "0"],
        ["--state", "a.db"],
        ["--report", "a"],
        ["--close"],
    ],
)
def test_a_backtest_takes_none_of_the_other_options(monitor, stream, option):
    done = monitor("--backtest", stream, *option, alerts=None)
    assert (done.code, "--backtest must come with --engine and --json at most, got more." in done.err) == (2, True)


# Words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "monitor: must get --input FILE or --feed URL, got neither. - is standard input."),
        (["--input", "s.jsonl"], "monitor: must get --alerts FILE, got none. Add --alerts alerts.jsonl."),
        (["--alerts", "a.jsonl"], "monitor: must get --input FILE or --feed URL, got neither. - is standard input."),
        (["--input", "a", "--alerts", "a"], "monitor: --input, --alerts and --state must be three files, got one of"),
        (["--input", "a", "--alerts", "b.db"], "monitor: --input, --alerts and --state must be three files, got one"),
        (["--input", "a", "--alerts", "b", "--fail-on", "all"], "--fail-on: must be one of warning, alarm, got 'all'."),
        (
            ["--input", "a", "--alerts", "b", "--fail-on", "alarm", "--follow"],
            "--fail-on: must come without --follow, which never ends by itself. Leave one out.",
        ),
        (
            ["--input", "a", "--alerts", "b", "--close", "--follow"],
            "--close: must come without --follow, which never ends by itself. Leave one out.",
        ),
        (["--close"], "monitor: must get --alerts FILE, got none. Add --alerts alerts.jsonl."),
        (
            ["--input", "gone", "--alerts", "b"],
            "gone: must be a file of JSON lines, got no file. Check the name, or add --follow to wait for it.",
        ),
        (["--input", ".", "--alerts", "b"], ".: must be a file of JSON lines, got a folder. Name a file in it."),
        (["--feed", "a", "--alerts", "b"], "--feed: must be an address such as https://example.org/path, got 'a'."),
        (
            ["--feed", "http://a", "--alerts", "b", "--webhook", "b"],
            "--webhook: must be an address such as https://example",
        ),
        (["--input", "a", "--alerts", "."], "--alerts: must be a file, got the folder ."),
    ],
)
def test_a_command_that_cannot_be_meant(monitor, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    done = monitor(*options, alerts=None)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"finetune: {message}")


def test_a_webhook_without_a_secret_is_said_to_be_unsigned(monitor, stream, monkeypatch):
    monkeypatch.delenv("FINETUNE_WEBHOOK_SECRET", raising=False)
    done = monitor("--input", stream, "--webhook", "http://a:x")
    assert done.code == 2
    monkeypatch.setattr(watching, "_drain", lambda *_: None)
    done = monitor("--input", stream, "--webhook", "http://127.0.0.1:1/")
    assert "webhook: FINETUNE_WEBHOOK_SECRET is not set; the alerts are not signed\n" in done.err
