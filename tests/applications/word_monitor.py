"""A monitor made of word lists, and a child process that is killed again and again while it watches a file.

    python tests/applications/word_monitor.py FOLDER KILLS SEED

watches FOLDER/stream.jsonl into FOLDER/state.db and FOLDER/alerts.jsonl. It imports no torch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from finetune.applications.monitor.records import Alert, Reading, Share, Tally
from finetune.applications.monitor.sinks import JsonlSink
from finetune.applications.monitor.sources import FileSource
from finetune.applications.monitor.store import Store
from finetune.applications.monitor.watch import Options, watch
from finetune.recipe.applications import MonitorSection

BEGIN = 1_586_390_400  # 9 April 2020, midnight UTC
NOW = BEGIN + 10 * 365 * 24 * 3600


class WordReader:
    """`acme` and `beta` are topics, the rest is `other`; texts fall, stay or are as negative as their checksum."""

    topics = ("acme", "beta", "other")
    fingerprint = "a" * 64

    def __init__(self) -> None:
        self.texts: list[str] = []

    def read(self, texts: Sequence[str]) -> list[Reading]:
        self.texts += texts
        return [self._read(text) for text in texts]

    def _read(self, text: str) -> Reading:
        topic = next((name for name in self.topics if name in text), "other")
        said = {word: at for word, at in (("falls", 0.95), ("stays", 0.05)) if word in text}
        negative = next(iter(said.values()), crc32(text.encode()) / 2**32)
        return Reading(topic, "negative" if negative >= 0.5 else "positive", negative)


class StepWatcher:
    """Alerts when the counted share of a topic moves by 15 points from one window to the next.

    Its state is how many windows it has seen and the last share; both are part of an alert, so that a window that is
    judged twice or not at all shows.
    """

    def __init__(self) -> None:
        self.states: dict[str, dict[str, float | None]] = {}
        self.judged: list[tuple[str, int, int]] = []

    def judge(self, topic, start, end, tally: Tally):
        state = self.states.setdefault(topic, {"windows": 0, "last": None})
        self.judged.append((topic, int(start.timestamp()), tally.total))
        value = tally.called / tally.total if tally.total else float("nan")
        share = Share(value, value, value, value, value, tally.total)
        state["windows"] += 1
        last, alerts = state["last"], []
        if tally.total:
            if last is not None and abs(value - last) >= 0.15:
                level = "alarm" if value > last else "recovery"
                before = Share(last, last, last, last, last, 1)
                alerts = [
                    Alert(
                        id=f"{topic}:{start:%Y%m%dT%H%M}:{level}",
                        topic=topic,
                        cause="share",
                        level=level,
                        start=start,
                        end=end,
                        before=before,
                        after=share,
                        volume_before=float(state["windows"]),
                        volume_after=tally.total,
                        test="step",
                        statistic=abs(value - last),
                        threshold=0.15,
                    )
                ]
            state["last"] = value
        return share, alerts

    def to_state(self, topic):
        return dict(self.states.get(topic, {"windows": 0, "last": None}))

    def set_state(self, topic, state):
        self.states[topic] = dict(state)


@dataclass
class WordMonitor:
    reader: WordReader = field(default_factory=WordReader)
    watcher: StepWatcher = field(default_factory=StepWatcher)
    section: MonitorSection = field(
        default_factory=lambda: MonitorSection(window_minutes=10, lateness_minutes=10, reference_windows=8)
    )


def build_stream(number: int, seed: int) -> Iterator[dict | str]:
    """Items in a disorder that the lateness mostly allows, some twice, some too late, and lines that are none."""
    draw = random.Random(seed)
    for index in range(number):
        at = BEGIN + 20 * index + draw.uniform(-300, 300)
        topic = draw.choice(["acme", "beta", "gamma"])
        item = {
            "id": f"n{index}",
            "time": at,
            "text": f"{topic} report {index} {draw.choice(['falls', 'stays', 'ends'])}",
        }
        yield item
        chance = draw.random()
        if chance < 0.03:
            yield item
        elif chance < 0.05:
            yield {**item, "id": f"late{index}", "time": at - 3600, "text": f"{topic} long ago {index}"}
        elif chance < 0.07:
            yield draw.choice(["no JSON", '{"id": 7, "text": "x"}', '{"id": "a", "time": 1, "text": " "}'])


def write_stream(path: Path, lines: Iterator[dict | str]) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def watch_file(folder: Path, store: Store, *, is_complete: bool = True) -> None:
    source = FileSource(folder / "stream.jsonl")
    source.go_on(store.read_positions().get(source.origin))
    options = Options(
        batch_items=16, batch_seconds=1e9, clock=lambda: NOW, sleep=lambda _: None, is_complete=is_complete
    )
    watch(source, WordMonitor(), store, [JsonlSink(folder / "alerts.jsonl")], options)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch_until_killed(folder: Path, way: str, draw: random.Random) -> None:
    """One life: it ends inside a transaction, just after an alert was written, or when the parent says so."""
    with Store(folder / "state.db") as store:
        if way == "in the database":
            left = draw.randint(1, 700)

            def count() -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    die()

            store.connection.set_progress_handler(count, 100)
        elif way == "in the sink":
            sync, left = os.fsync, draw.randint(1, 3)

            def sync_and_count(number: int) -> None:
                nonlocal left
                sync(number)
                left -= 1
                if left == 0:
                    die()

            os.fsync = sync_and_count
        watch_file(folder, store)


def main(folder: Path, kills: int, seed: int, longest: float) -> None:
    """Kill it so many times, and let it end. A life that the parent ends takes at most `longest` seconds."""
    draw, died = random.Random(seed), {"in the database": 0, "in the sink": 0, "at a time": 0}
    while True:
        way = draw.choice(list(died)) if sum(died.values()) < kills else "never"
        child = os.fork()
        if child == 0:
            watch_until_killed(folder, way, draw)
            os._exit(0)
        if way == "at a time":
            time.sleep(draw.uniform(0.0, longest))  # the child's life, not a wait of the test
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            died[way] += 1
        elif os.WEXITSTATUS(status):
            sys.exit(f"a child failed with {os.WEXITSTATUS(status)}")
        else:
            break
    sys.stdout.write(json.dumps(died))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
