"""Where items come from: files that grow, are replaced and cut short, pipes, feeds of a server with bad days."""

from __future__ import annotations

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest

from finetune.applications.monitor import feeds as feeds_module
from finetune.applications.monitor.exchange import Bounds, ExchangeError, check_url, exchange
from finetune.applications.monitor.feeds import ATTEMPTS, FeedSource
from finetune.applications.monitor.items import MAX_LINE_BYTES
from finetune.applications.monitor.sources import FileSource, Record, read_in_turn, read_stream
from finetune.errors import ResourceError, UsageError


def contents(records):
    return [record.content for record in records if record is not None]


def until_idle(running):
    """The records until the source has nothing."""
    records = []
    for record in running:
        if record is None:
            break
        records.append(record)
    return records


# Files


def test_a_file_is_read_to_its_end_and_gone_on_with(tmp_path):
    path = tmp_path / "s.jsonl"
    last = '{"id": "thrée"}'.encode()
    path.write_bytes(b"one\ntwo\r\n\n" + last)
    records = list(FileSource(path))
    assert contents(records) == [b"one", b"two\r", b"", last]
    assert [record.where for record in records] == [f"{path}: line {line}" for line in (1, 2, 3, 4)]
    for number, record in enumerate(records, start=1):
        again = FileSource(path)
        again.go_on(json.loads(json.dumps(record.position)))
        assert list(again) == records[number:]
    with path.open("ab") as file:
        file.write(b"\nfour\n")
    again = FileSource(path)
    again.go_on(records[2].position)
    assert contents(again) == [last, b"four"]
    again.go_on(records[3].position)
    assert contents(again) == [b"", b"four"]


def test_a_last_line_that_is_still_being_written_is_left_for_the_next_time(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 2, "labels": {"tone": "bad"}')
    records = list(FileSource(path))
    assert contents(records) == [b'{"id": 1}']
    with path.open("ab") as file:
        file.write(b', "text": "x"}\n{"id": 3}\n')
    again = FileSource(path)
    again.go_on(records[-1].position)
    assert contents(again) == [b'{"id": 2, "labels": {"tone": "bad"}, "text": "x"}', b'{"id": 3}']


def test_a_line_without_end_is_held_no_further_than_shows_that_it_is_too_long(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"a" * (3 * MAX_LINE_BYTES) + b"\nb\n")
    long, short = FileSource(path)
    assert (len(long.content), short.content) == (MAX_LINE_BYTES + 1, b"b")
    assert short.position["offset"] == path.stat().st_size


def test_a_followed_file_is_waited_for_grows_is_replaced_and_cut_short(tmp_path):
    path = tmp_path / "s.jsonl"
    source = FileSource(path, is_followed=True)
    running = iter(source)
    assert until_idle(running) == []
    path.write_bytes(b"one\ntw")
    assert contents(until_idle(running)) == [b"one"]
    with path.open("ab") as file:
        file.write(b"o\n")
        file.flush()
        assert contents(until_idle(running)) == [b"two"]
        path.rename(tmp_path / "s.jsonl.1")
        file.write(b"last word\n")
        file.flush()
        assert contents(until_idle(running)) == [b"last word"]
        path.write_bytes(b"new\n")
        file.write(b"very last\n")
    records = until_idle(running)
    assert contents(records) == [b"very last", b"new"]
    assert records[-1].where == f"{path}: line 1"
    os.truncate(path, 0)
    assert until_idle(running) == []
    with path.open("ab") as file:
        file.write(b"x\n")
    records = until_idle(running)
    assert (contents(records), records[0].position["offset"]) == ([b"x"], 2)


def test_a_file_that_was_replaced_meanwhile_is_found_beside_its_name(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"one\ntwo\nthree\n")
    position = next(iter(FileSource(path))).position
    path.rename(tmp_path / "s.jsonl.1")
    (tmp_path / "s.jsonl.0").write_bytes(b"another\n")
    os.utime(tmp_path / "s.jsonl.0", (1, 1))  # older than what was read
    path.write_bytes(b"four\n")
    for is_followed in (False, True):
        source = FileSource(path, is_followed=is_followed)
        source.go_on(position)
        assert contents(islice(source, 3)) == [b"two", b"three", b"four"]


@pytest.mark.parametrize("is_followed", [False, True])
def test_all_files_that_were_put_aside_since_are_read_in_order(tmp_path, is_followed):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"one\ntwo\n")
    position = next(iter(FileSource(path))).position
    path.rename(tmp_path / "s.jsonl.10")
    (tmp_path / "s.jsonl.9").write_bytes(b"three\nfour")
    (tmp_path / "s.jsonl.2").write_bytes(b"five\n")
    (tmp_path / "s.jsonl.11").write_bytes(b"older\n")
    (tmp_path / "s.jsonl.db").write_bytes(b"no rotation\n")
    path.write_bytes(b"six\n")
    for at, name in enumerate(["s.jsonl.11", "s.jsonl.10", "s.jsonl.9", "s.jsonl.db", "s.jsonl.2", "s.jsonl"]):
        os.utime(tmp_path / name, (1_000 + at, 1_000 + at))
    source = FileSource(path, is_followed=is_followed)
    source.go_on(position)
    assert contents(islice(source, 5)) == [b"two", b"three", b"four", b"five", b"six"]


@pytest.mark.parametrize("is_followed", [False, True])
def test_a_position_whose_file_is_gone_is_said_once(tmp_path, is_followed):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"one\ntwo\n")
    position = next(iter(FileSource(path))).position
    path.write_bytes(b"")
    source = FileSource(path, is_followed=is_followed)
    source.go_on(position)
    (record,) = until_idle(source)
    assert (record.content, record.note) == (None, "file gone")
    path.write_bytes(b"three\n")
    again = FileSource(path)
    again.go_on(record.position)
    (record,) = again
    assert (record.content, record.note) == (b"three", None)


def test_a_file_that_is_none_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.jsonl: must be a file of JSON lines, got no file\."):
        FileSource(tmp_path / "gone.jsonl")
    with pytest.raises(UsageError, match=r"must be a file of JSON lines, got a folder\."):
        FileSource(tmp_path, is_followed=True)


# Pipes, and several at once


def test_a_pipe_gives_what_is_there_and_says_when_there_is_nothing():
    out, into = os.pipe()
    running = read_stream(lambda size: os.read(out, size))
    os.write(into, b'{"a": 1}\n{"b"')
    first = next(record for record in running if record is not None)
    assert (first.content, first.where, first.origin) == (b'{"a": 1}', "standard input: line 1", None)
    assert next(running) is None
    os.write(into, b": 2}")
    os.close(into)
    assert contents(running) == [b'{"b": 2}']
    os.close(out)


def test_a_pipe_that_breaks_is_an_error():
    def read(_size):
        raise OSError(5, "Input/output error")

    with pytest.raises(ResourceError, match=r"standard input: must be readable, got Input/output error\."):
        list(read_stream(read))


def test_several_sources_have_their_turns():
    one, two = Record("one", b"1"), Record("two", b"2")
    assert list(read_in_turn([[one, one], [two, None, two]])) == [one, one, two, two]
    assert list(read_in_turn([[None, one], [None]])) == [None, one]
    many = list(read_in_turn([[one] * 250, [two]]))
    assert (many.index(two), len(many)) == (100, 251)


# Feeds

ENTRY = "<item><guid>{0}</guid><title>{1}</title><link>https://example.org/{0}</link><pubDate>{2}</pubDate></item>"
DAY = "Thu, 09 Apr 2020 {}:00 {}"


def build_rss(*entries):
    items = "".join(ENTRY.format(*entry) for entry in entries)
    return f'<?xml version="1.0"?><rss version="2.0"><channel><title>Wire</title>{items}</channel></rss>'.encode()


class Server:
    """Answers each path with what stands in `answers`: a list of (status, headers, body), of which the last stays."""

    def __init__(self):
        self.answers, self.requests = {}, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                size = int(self.headers.get("Content-Length", 0))
                server.requests.append((self.path, dict(self.headers), self.rfile.read(size)))
                answers = server.answers[self.path]
                status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    if isinstance(body, bytes):
                        self.wfile.write(body)
                    else:
                        while not server.is_closed:
                            self.wfile.write(b"<item>" * 10_000)
                except OSError:
                    pass

            do_POST = do_GET  # noqa: N815  (the name is Python's)

            def log_message(self, *_):
                pass

        self.is_closed = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.is_closed = True
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


class Ticks:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_entries_of_several_feeds_come_in_order_of_time_each_once(server):
    new = ("3", "Third", DAY.format("12:30", "GMT"))
    server.answers = {
        "/a": [
            (
                200,
                {"ETag": '"1"', "Last-Modified": "Thu"},
                build_rss(new, ("1", "A &amp;amp; B <b>falls</b>", DAY.format("12:00", "+0200"))),
            ),
            (304, {}, b""),
            (200, {}, build_rss(("4", "Fourth", DAY.format("13:00", "GMT")), new)),
        ],
        "/b": [(200, {}, build_rss(("2", "Second", DAY.format("11:00", "GMT")), ("0", "No time", "")))],
    }
    ticks = Ticks()
    source = FeedSource([f"{server.url}/a", f"{server.url}/b"], is_followed=True, tick=ticks)
    running = iter(source)
    records = until_idle(running)
    items = [record.content for record in records if record.content]
    assert [item["text"] for item in items] == ["No time", "A &amp; B falls", "Second", "Third"]
    assert items[1] == {
        "id": f"{server.url}/a 1",
        "time": 1586426400,
        "text": "A &amp; B falls",
        "link": "https://example.org/1",
        "source": f"{server.url}/a",
    }
    assert items[0]["time"] is None
    assert [record.origin for record in records if record.content is None] == [
        f"feed {server.url}/{name}" for name in "ab"
    ]
    assert until_idle(running) == []  # not yet due
    assert len(server.requests) == 2
    ticks.now += 300
    assert contents(until_idle(running)) == [None, None]
    asked = next(headers for path, headers, _ in server.requests[2:] if path == "/a")
    assert (asked["If-None-Match"], asked["If-Modified-Since"]) == ('"1"', "Thu")
    position = {record.origin: record.position for record in records if record.origin}
    again = FeedSource([f"{server.url}/a"], tick=ticks)
    again.go_on(json.loads(json.dumps(position)))
    assert [content["text"] for content in contents(again) if content] == ["Fourth"]


def test_what_is_secret_in_an_address_stays_there(server):
    entry = ("7", "Acme falls", DAY.format("11:00", "GMT"))
    server.answers = {f"/rss?{query}": [(200, {}, build_rss(entry))] for query in ("token=SECRET", "token=OTHER")}
    server.answers["/down?token=SECRET"] = [(500, {}, b"")]
    names = ("rss?token=SECRET", "rss?token=OTHER", "down?token=SECRET")
    source = FeedSource([f"{server.url}/{name}" for name in names], is_followed=True)
    records = until_idle(iter(source))
    one, other = (record.content for record in records if record.content)
    assert one["source"] == other["source"] == f"{server.url}/rss"
    assert one["id"] != other["id"]
    assert source.troubles == [f"{server.url}/down: must answer with a feed, got status 500."]
    assert "SECRET" not in "".join(f"{record.where} {record.content}" for record in records)
    assert FeedSource(["https://me:SECRET@news.example:8080/rss"]).feeds[0].name == "https://news.example:8080/rss"


def test_an_atom_feed_in_another_encoding_and_one_in_a_broken_one(server):
    atom = (
        '<?xml version="1.0" encoding="iso-8859-1"?><feed xmlns="http://www.w3.org/2005/Atom"><entry>'
        "<id>tag:wire,2020:e</id><title>Société falls</title>"
        "<updated>2020-04-09T12:00:00+01:00</updated></entry></feed>"
    )
    broken = build_rss(("b", "Soci\u00e9t\u00e9", DAY.format("12:00", "GMT"))).decode().encode("latin-1")
    server.answers = {"/atom": [(200, {}, atom.encode("latin-1"))], "/broken": [(200, {}, broken)]}
    atom_item, _ = (record.content for record in FeedSource([f"{server.url}/atom"]) if record is not None)
    assert (atom_item["id"], atom_item["text"], atom_item["time"]) == ("tag:wire,2020:e", "Société falls", 1586430000)
    source = FeedSource([f"{server.url}/broken"])
    (item, _) = contents(source)
    assert (item["id"], item["text"][:4], source.troubles) == (f"{server.url}/broken b", "Soci", [])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((500, {}, b"oops"), "got status 500."),
        ((200, {}, None), "got an answer of more than 1,000,000 bytes."),
        ((200, {}, b"\x00\xff" * 50), "got something else ("),
        ((200, {"Content-Length": "99"}, b"<rss"), "got an answer that broke off."),
        ((302, {"Location": "file:///etc/hostname"}, b""), "got status 302."),
    ],
)
def test_a_feed_with_a_bad_day_is_asked_a_few_times_and_then_named(server, monkeypatch, answer, words):
    monkeypatch.setattr(feeds_module, "BOUNDS", Bounds(seconds=5, body_bytes=1_000_000, is_redirected=True))
    server.answers = {"/a": [answer], "/b": [(200, {}, build_rss(("2", "Second", DAY.format("11:00", "GMT"))))]}
    ticks = Ticks()
    source = FeedSource([f"{server.url}/a", f"{server.url}/b"], tick=ticks)
    items, waits = [], []
    for record in source:
        if record is None:
            due = min((feed.next_poll for feed in source.feeds if not feed.is_done), default=ticks.now)
            waits.append(due - ticks.now)
            ticks.now = due
        elif record.content:
            items.append(record.content["text"])
    assert items == ["Second"]
    assert waits[: ATTEMPTS - 1] == [2, 4, 8]
    assert sum(path == "/a" for path, *_ in server.requests) == ATTEMPTS
    (trouble,) = source.troubles
    assert trouble.startswith(f"{server.url}/a: must answer with a feed, got ")
    assert words in trouble


def test_a_followed_feed_recovers_and_is_left_alone_as_long_as_it_asks(server):
    good = build_rss(("2", "Second", DAY.format("11:00", "GMT")))
    server.answers = {"/a": [(503, {"Retry-After": "120"}, b""), (200, {}, good)]}
    ticks = Ticks()
    source = FeedSource([f"{server.url}/a"], is_followed=True, tick=ticks)
    running = iter(source)
    assert until_idle(running) == []
    ticks.now = 119
    assert until_idle(running) == []
    assert (len(server.requests), len(source.troubles)) == (1, 1)
    ticks.now = 120
    assert [content["text"] for content in contents(until_idle(running)) if content] == ["Second"]
    assert source.troubles == []


def test_without_feedparser_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "feedparser", None)
    with pytest.raises(
        ResourceError, match=r"feedparser: must be installed to read feeds, got no such package\. pip in"
    ):
        FeedSource(["https://example.org"])


# One request


def test_an_answer_that_drips_is_given_up_after_its_time(server):
    server.answers = {"/": [(200, {}, b"a" * 10)]}
    ticks = iter([0.0, 6.0])
    with pytest.raises(ExchangeError, match="an answer that was not complete after 5 s"):
        exchange(f"{server.url}/", {}, Bounds(5, 100), tick=lambda: next(ticks))
    with pytest.raises(ExchangeError, match="refused"):
        exchange("http://127.0.0.1:1/", {}, Bounds(5, 100))


@pytest.mark.parametrize("answer", [(200, {}, b"a" * 200), (200, {"Content-Length": "99"}, b"a"), (200, {}, None)])
def test_where_the_status_says_all_what_comes_behind_it_is_dropped(server, answer):
    server.answers = {"/": [answer]}
    with pytest.raises(ExchangeError):
        exchange(f"{server.url}/", {}, Bounds(5, 100), b"body")
    found = exchange(f"{server.url}/", {}, Bounds(5, 100, is_status_enough=True), b"body")
    assert (found.status, found.body) == (200, b"")


def test_redirects_are_followed_only_where_that_is_meant(server):
    server.answers = {"/": [(302, {"Location": "/next"}, b"")], "/next": [(200, {}, b"here")]}
    assert exchange(f"{server.url}/", {}, Bounds(5, 100)).status == 302
    assert exchange(f"{server.url}/", {}, Bounds(5, 100, is_redirected=True)).body == b"here"


@pytest.mark.parametrize("url", ["", "example.org", "file:///etc", "http://", "http://a b", "http://a:x", "ftp://a"])
def test_what_is_no_address_is_an_error(url):
    with pytest.raises(UsageError, match=r"--feed: must be an address such as https://example\.org/path, got"):
        check_url(url, "--feed")
