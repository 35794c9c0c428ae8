"""The story of the monitor: items are read, counted per topic and window, closed windows judged, alerts sent out."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from finetune.applications.monitor.items import ItemError, read_item
from finetune.applications.monitor.records import Alert, Item, Reader, Reading, Watcher
from finetune.applications.monitor.repeats import REMEMBERED_SECONDS, Repeats
from finetune.applications.monitor.sinks import Sink
from finetune.applications.monitor.sources import Record, Source
from finetune.applications.monitor.store import TOP_ITEMS, Store
from finetune.applications.monitor.windows import WindowPlan, to_time
from finetune.recipe.applications import MonitorSection

SHOWN_CHARACTERS = 1_000  # of a text that is kept for people to see
OTHER_STATE = "Name another file with --state, or delete this one and begin anew."


class Monitor(Protocol):
    """What a run gives the loop."""

    @property
    def reader(self) -> Reader:
        """The trained model."""

    @property
    def watcher(self) -> Watcher:
        """What decides."""

    @property
    def section(self) -> MonitorSection:
        """Windows and lateness."""


def _nothing(*_: Any) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Options:
    """How the loop runs.

    Args:
        batch_items: items that are read at once, at most.
        batch_seconds: how long the first of them waits for more; a source that has nothing ends the wait.
        idle_seconds: between two looks at sources that have nothing.
        drain_seconds: at the end of the input, how long alerts are tried that a sink has not taken.
        clock: epoch seconds; only items from the future and silence depend on it.
        tick: seconds of a clock that never jumps.
        sleep: waits for so many seconds.
        is_complete: whether nothing is to come behind the input: at its end, every window is closed.
        is_stopped: whether somebody wants the loop to end after this batch.
        on_alert: is given each new alert, once it is in the store.
        on_batch: is called after each batch.
    """

    batch_items: int = 256
    batch_seconds: float = 1.0
    idle_seconds: float = 0.2
    drain_seconds: float = 20.0
    clock: Callable[[], float] = time.time
    tick: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    is_complete: bool = False
    is_stopped: Callable[[], bool] = bool
    on_alert: Callable[[Alert], None] = _nothing
    on_batch: Callable[[], None] = _nothing


def watch(
    source: Source, monitor: Monitor, store: Store, sinks: Sequence[Sink] = (), options: Options | None = None
) -> bool:
    """Take in a source to its end, or until `options.is_stopped`.

    At its end, windows that may still take items stay open for the next call, unless `options.is_complete`: the input
    may be one portion of several, and how it was cut into calls must change nothing. Of a source that falls silent for
    as long as the lateness, windows are closed whose lateness is over by the clock.

    Returns:
        Whether it came to the end.

    Raises:
        UsageError: the store belongs to another model, or other windows or topics.
        ResourceError: the disk refuses; what was committed stays, and the same call goes on from there.
    """
    options = options or Options()
    loop = _Loop(monitor, store, [sink.name for sink in sinks], options.clock)
    heard, silence = options.tick(), 60 * max(1, monitor.section.lateness_minutes)
    for batch in _batch(source, options):
        if batch:
            _tell(loop.take(batch), options)
        if any(record.content for record in batch):
            heard = options.tick()
        elif options.tick() - heard >= silence:
            _tell(loop.close(until=options.clock() - 60 * monitor.section.lateness_minutes), options)
        _deliver(sinks, store, options)
        if options.is_stopped():
            loop.look_at_open_windows()
            return False
        if not batch:
            options.sleep(options.idle_seconds)
    if options.is_complete:
        _tell(loop.close(until=math.inf), options)
    loop.look_at_open_windows()
    _drain(sinks, store, options)
    return True


def _deliver(sinks: Sequence[Sink], store: Store, options: Options) -> None:
    for sink in sinks:
        sink.deliver(store)
    options.on_batch()


def _drain(sinks: Sequence[Sink], store: Store, options: Options) -> None:
    """The input has ended: give a sink that is down a little time to come back. What it misses waits in the store."""
    began = options.tick()
    _deliver(sinks, store, options)
    while any(store.count_outbox(sink.name) for sink in sinks) and options.tick() - began < options.drain_seconds:
        if options.is_stopped():
            return
        options.sleep(options.idle_seconds)
        _deliver(sinks, store, options)


def _batch(source: Source, options: Options) -> Iterator[list[Record]]:
    """Records until there are enough, the first has waited long enough or there are no more; empty ones while idle."""
    batch: list[Record] = []
    began = 0.0
    for record in source:
        if record is not None:
            began = began if batch else options.tick()
            batch.append(record)
        if record is None or len(batch) >= options.batch_items or options.tick() - began >= options.batch_seconds:
            yield batch
            batch = []
    if batch:
        yield batch


def _tell(alerts: Sequence[Alert], options: Options) -> None:
    for alert in alerts:
        options.on_alert(alert)


class _Loop:
    """What lives from batch to batch; all of it can be built again from the store."""

    def __init__(self, monitor: Monitor, store: Store, sinks: Sequence[str], clock: Callable[[], float]) -> None:
        self._reader, self._watcher, section = monitor.reader, monitor.watcher, monitor.section
        self._negative = section.negative
        self._store, self._sinks, self._clock = store, sinks, clock
        seconds, lateness = 60 * section.window_minutes, 60 * section.lateness_minutes
        with store.transaction():
            for name, value in _list_facts(self._reader, section).items():
                store.check_fact(name, value, OTHER_STATE)
            if store.read_fact("stream") is None:
                store.save_fact("stream", secrets.token_hex(8))
        self._watcher.stream = store.read_fact("stream")
        self._plan = WindowPlan(seconds, lateness, max_silent=section.reference_size)
        if state := store.read_fact("plan"):
            self._plan.set_state(state)
        for topic, state in store.read_states().items():
            self._watcher.set_state(topic, state)
        # An item that comes again after its text is forgotten is too late for its window.
        self._repeats = Repeats(store.connection, seconds=max(REMEMBERED_SECONDS, seconds + lateness))

    def take(self, batch: Sequence[Record]) -> list[Alert]:
        """Take in a batch, whole or not at all."""
        with self._store.transaction():
            items = list(self._list_new_items(batch))
            readings = self._reader.read([item.text for item, _ in items]) if items else []
            self._tally(items, readings)
            alerts = self._judge(self._plan.close(self._store.list_open_starts()))
            if self._plan.newest is not None:
                self._repeats.forget(self._plan.newest)
            for record in batch:
                if record.origin is not None:
                    self._store.save_position(record.origin, record.position)
            self._store.save_fact("plan", self._plan.to_state())
        return alerts

    def close(self, until: float) -> list[Alert]:
        """Close the windows that hold items and end by then, and those between them."""
        starts = self._store.list_open_starts()
        over = [end for start in starts if (end := start + self._plan.seconds) <= until]
        if not over:
            return []
        with self._store.transaction():
            alerts = self._judge(self._plan.close(starts, until=max(over)))
            self._store.save_fact("plan", self._plan.to_state())
        return alerts

    def look_at_open_windows(self) -> None:
        """Keep the shares so far of windows that may still take items, for people to see; nothing is judged."""
        with self._store.transaction():
            for start in self._store.list_open_starts():
                end = start + self._plan.seconds
                for topic in self._reader.topics:
                    tally, state = self._store.load_tally(start, topic), self._watcher.to_state(topic)
                    share, _ = self._watcher.judge(topic, to_time(start), to_time(end), tally)
                    self._watcher.set_state(topic, state)
                    self._store.save_window(start, end, topic, share, tally, is_closed=False)

    def _list_new_items(self, batch: Sequence[Record]) -> Iterator[tuple[Item, int]]:
        """The items that count, each with the start of its window."""
        for record in batch:
            if record.note:
                self._store.count(f"note: {record.note}")
            if not record.content:  # an empty line: perhaps the late end of one that was read without it
                continue
            self._store.count("lines")
            try:
                read = read_item(record.content, self._clock())
            except ItemError as error:
                self._store.add_rejection(error.reason, f"{record.where}: {error}")
                continue
            for note in read.notes:
                self._store.count(f"note: {note}")
            seconds = read.item.time.timestamp()
            is_late = self._plan.is_late(seconds)
            newest = self._plan.newest if is_late and self._plan.newest else self._plan.see(seconds)
            if not self._repeats.is_new(read.item, newest, is_kept=not is_late):
                self._store.count("repeats")
            elif is_late:
                self._store.count("late")
                if self._plan.is_closed_early(seconds):
                    self._store.count("note: closed early")
            else:
                self._store.count("items")
                yield read.item, self._plan.find_start(seconds)

    def _tally(self, items: Sequence[tuple[Item, int]], readings: Sequence[Reading]) -> None:
        groups: dict[tuple[int, str], list[tuple[Item, Reading]]] = {}
        for (item, start), reading in zip(items, readings, strict=True):
            groups.setdefault((start, reading.topic), []).append((item, reading))
        for (start, topic), group in groups.items():
            tally = self._store.load_tally(start, topic)
            for _, reading in group:
                tally.add(reading.negative, reading.sentiment == self._negative)
            self._store.save_tally(start, topic, tally)
            shown = [_show(item, reading) for item, reading in group]
            shown.sort(key=lambda item: (-item["negative"], item["time"], item["id"]))
            self._store.add_top_items(topic, start, shown[:TOP_ITEMS])

    def _judge(self, starts: Iterator[int]) -> list[Alert]:
        """Judge closed windows, in order of time, of every topic; the alerts that are new."""
        alerts: list[Alert] = []
        passed = self._plan.passed
        for start in starts:
            end = start + self._plan.seconds
            for topic in self._reader.topics:
                tally = self._store.load_tally(start, topic)
                share, raised = self._watcher.judge(topic, to_time(start), to_time(end), tally)
                self._store.save_window(start, end, topic, share, tally, is_closed=True)
                self._store.save_state(topic, self._watcher.to_state(topic))
                for alert in raised:
                    told = replace(alert, items=tuple(self._store.read_top_items(topic, to_time(start))))
                    if self._store.add_alert(told, self._sinks):
                        self._store.count(f"alerts: {alert.level}")
                        alerts.append(told)
            self._store.delete_top_items(start)
            self._store.count("windows")
        if self._plan.passed > passed:
            self._store.count("windows passed over", self._plan.passed - passed)
        return alerts


def _list_facts(reader: Reader, section: MonitorSection) -> dict[str, Any]:
    """What a state cannot be read without: its tallies are the probabilities of one model, and its tests count windows
    of one kind."""
    facts = {name: getattr(section, name) for name in ("window_minutes", "negative", "rise")}
    facts |= {"topics": list(reader.topics), "model": reader.fingerprint[:12]}
    return facts | {"reference_windows": section.reference_size}


def _show(item: Item, reading: Reading) -> dict[str, Any]:
    """What people see of an item that tells much."""
    return {
        "id": item.id,
        "time": item.time.isoformat(),
        "text": item.text[:SHOWN_CHARACTERS],
        "link": item.link,
        "source": item.source,
        "ticker": item.ticker,
        "negative": round(float(reading.negative), 4),
    }
