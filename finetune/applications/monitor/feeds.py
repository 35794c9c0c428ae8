"""RSS and Atom feeds as a source: asked now and then, politely, and never trusted."""

from __future__ import annotations

import calendar
import hashlib
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from finetune.applications.monitor.exchange import Answer, Bounds, ExchangeError, exchange
from finetune.applications.monitor.sources import Record
from finetune.applications.monitor.webhook import read_wait
from finetune.errors import ResourceError

POLL_SECONDS = 300.0
ATTEMPTS = 4
"""In a row; after the last one a feed is left alone until the next poll, and one that is read once is given up."""
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 2.0, 3600.0
BOUNDS = Bounds(seconds=30.0, body_bytes=10 * 2**20, is_redirected=True)
MAX_ENTRIES = 1_000
ACCEPT = "application/atom+xml, application/rss+xml, application/xml;q=0.9, text/xml;q=0.9"

_TAG = re.compile(r"<[^<>]*>")

Get = Callable[[str, Mapping[str, str], Bounds], Answer]


@dataclass
class Feed:
    """What is known of one feed.

    Args:
        url: its address.
        etag, modified: of the last answer, for the server to compare.
        seen: hashes of the entries of the last answer.
        next_poll: when it is asked again.
        failures: attempts in a row that failed.
        trouble: why the last one did, in words.
        is_done: whether it is asked no more.
    """

    url: str
    etag: str | None = None
    modified: str | None = None
    seen: Sequence[str] = ()
    next_poll: float = float("-inf")
    failures: int = 0
    trouble: str | None = None
    is_done: bool = False

    @property
    def origin(self) -> str:
        """Its name in the store."""
        return f"feed {self.url}"

    @property
    def name(self) -> str:
        """Its address for people and receivers, without what may be a secret: the query, user and password."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    @property
    def scope(self) -> str:
        """What ids are put behind that are one among those of this feed only: its name, and a hash of its query."""
        query = urlsplit(self.url).query
        return f"{self.name} {hashlib.sha256(query.encode()).hexdigest()[:8]}" if query else self.name

    def to_position(self) -> dict[str, Any]:
        """What a later monitor goes on with."""
        return {"etag": self.etag, "modified": self.modified, "seen": list(self.seen)}


@dataclass
class FeedSource:
    """The new entries of several feeds; those that were fetched together come in order of time.

    One source for all of them: their backlogs overlap in time, and read one after the other, the second one's would be
    late.

    Args:
        urls: of the feeds.
        is_followed: whether the feeds are asked again and again; else each is read once.
        poll_seconds: between two polls of a feed.
        get: fetches; raises `ExchangeError`.
        tick: seconds of a clock that never jumps.
    """

    urls: Sequence[str]
    is_followed: bool = False
    poll_seconds: float = POLL_SECONDS
    get: Get = exchange
    tick: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        import_feedparser()
        self.feeds = [Feed(url) for url in self.urls]

    def go_on(self, positions: Mapping[str, Any]) -> None:
        """Begin where a former source stopped; positions by origin."""
        for feed in self.feeds:
            if known := positions.get(feed.origin):
                feed.etag, feed.modified, feed.seen = known["etag"], known["modified"], known["seen"]

    @property
    def troubles(self) -> list[str]:
        """The feeds that do not answer as they should, in words."""
        return [f"{feed.name}: must answer with a feed, got {feed.trouble}." for feed in self.feeds if feed.trouble]

    def __iter__(self) -> Iterator[Record | None]:
        while not all(feed.is_done for feed in self.feeds):
            now = self.tick()
            due = [feed for feed in self.feeds if not feed.is_done and feed.next_poll <= now]
            records: list[Record] = []
            for feed in due:
                records += self._poll(feed)
            yield from sorted(records, key=_read_time)
            for feed in due:
                # Behind all entries: a crash among them fetches the feed again, and what was taken in is known.
                if feed.trouble is None:
                    yield Record(feed.name, None, feed.origin, feed.to_position())
            yield None

    def _poll(self, feed: Feed) -> list[Record]:
        """The new entries of one feed; what goes wrong is noted in it."""
        headers = {"Accept": ACCEPT}
        if feed.etag:
            headers["If-None-Match"] = feed.etag
        if feed.modified:
            headers["If-Modified-Since"] = feed.modified
        answer = None
        try:
            answer = self.get(feed.url, headers, BOUNDS)
            entries = _read_answer(answer, feed.scope)
        except ExchangeError as error:
            self._back_off(feed, str(error), answer)
            return []
        feed.failures, feed.trouble = 0, None
        feed.next_poll, feed.is_done = self.tick() + self.poll_seconds, not self.is_followed
        if entries is None:
            return []
        feed.etag, feed.modified = answer.headers.get("etag"), answer.headers.get("last-modified")
        known, feed.seen = set(feed.seen), [_hash(entry) for entry in entries]
        fresh = [entry for entry, name in zip(entries, feed.seen, strict=True) if name not in known]
        return [
            Record(f"{feed.name}: entry {entry['id'].removeprefix(feed.scope).strip()}", {**entry, "source": feed.name})
            for entry in fresh
        ]

    def _back_off(self, feed: Feed, words: str, answer: Answer | None) -> None:
        feed.failures += 1
        feed.trouble = words
        wait = FIRST_WAIT_SECONDS * 2 ** (feed.failures - 1)
        if feed.failures >= ATTEMPTS:
            feed.is_done, wait = not self.is_followed, max(wait, self.poll_seconds)
            feed.failures = 0
        asked = read_wait(answer.headers) if answer else 0.0
        feed.next_poll = self.tick() + min(MAX_WAIT_SECONDS, max(wait, asked))


def _read_answer(answer: Answer, scope: str) -> list[dict[str, Any]] | None:
    """The entries; None where nothing is new.

    Raises:
        ExchangeError: it is no feed.
    """
    if answer.status == 304:
        return None
    if answer.status != 200:
        raise ExchangeError(f"status {answer.status}")
    # A file object: given bytes, feedparser might take them for an address or a file name.
    parsed = import_feedparser().parse(io.BytesIO(answer.body), response_headers=dict(answer.headers))
    if parsed.bozo and not parsed.entries and not parsed.version:
        raise ExchangeError(f"something else ({type(parsed.bozo_exception).__name__})")
    return [_read_entry(entry, scope) for entry in parsed.entries[:MAX_ENTRIES]]


def _read_entry(entry: Mapping[str, Any], scope: str) -> dict[str, Any]:
    """An entry with an item's keys. The text is the title; markup is left out, entities are left to the model."""
    text = entry.get("title") or entry.get("summary") or ""
    when = entry.get("published_parsed") or entry.get("updated_parsed")  # in UTC, whatever the feed said
    name = entry.get("id") or entry.get("link") or hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    if not name.startswith(("http:", "https:", "tag:", "urn:")):
        name = f"{scope} {name}"  # such an id is one among those of its feed only
    return {
        "id": name,
        "time": calendar.timegm(when) if when else None,
        "text": " ".join(_TAG.sub(" ", text).split()),
        "link": entry.get("link"),
    }


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(entry.items())).encode("utf-8", "replace")).hexdigest()[:16]


def _read_time(record: Record) -> float:
    """For the order; what has no time is refused later on, whenever it comes."""
    time = record.content.get("time") if isinstance(record.content, Mapping) else None
    return float("-inf") if time is None else float(time)


def import_feedparser() -> Any:
    """The package.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import feedparser
    except ImportError:
        raise ResourceError(
            "feedparser: must be installed to read feeds, got no such package. pip install feedparser"
        ) from None
    return feedparser
