"""The watcher: window by window, whether the news of a topic became worse or more than usual."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from finetune.applications.monitor.detectors import (
    Usual,
    compute_ewma,
    compute_gain,
    compute_score,
    compute_spread,
    compute_squares,
    compute_surprise,
    compute_usual,
    count_guard,
    update_cusum,
    update_ewma,
)
from finetune.applications.monitor.episodes import Episode
from finetune.applications.monitor.records import BINS, Alert, Cause, Level, Share, Tally
from finetune.applications.monitor.shares import Quantifier
from finetune.applications.monitor.thresholds import LEVELS, SIZES, Thresholds, list_choices
from finetune.errors import ResourceError
from finetune.evaluation.quantification import Floats
from finetune.recipe.applications import MonitorSection

RENEWED = "reference"
"""What ends an episode that lasted until it was usual, in place of a test."""
HIGHEST = 1.1
"""How far a statistic goes above its alarm's threshold: from higher up it would take long to come down again."""
CALM = 0.6
"""An episode ends where each test is at most so much of its warning's threshold."""


@dataclass
class Window:
    """What is kept of a past window: its tally, and its squared distance from the usual share."""

    tally: Tally
    square: float = 0.0


@dataclass
class Topic:
    """All that is remembered of one topic.

    Args:
        reference: the windows that say what is usual.
        waiting: later ones, which join it once nothing was found for a while.
        cusum: in nats.
        moments: of the EWMA.
        changed: texts since the CUSUM last was 0: those since the change, where there was one.
        episodes: cause -> what was said of it.
        end: of the last window, epoch seconds.
    """

    reference: list[Window] = field(default_factory=list)
    waiting: list[Window] = field(default_factory=list)
    cusum: float = 0.0
    moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    changed: Tally = field(default_factory=Tally)
    episodes: dict[Cause, Episode] = field(default_factory=lambda: {"share": Episode(), "volume": Episode()})
    end: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether any episode lasts."""
        return any(episode.is_open for episode in self.episodes.values())

    def forget_share(self) -> None:
        """Begin the tests of the share anew."""
        self.cusum, self.moments, self.changed = 0.0, [0.0, 0.0, 0.0], Tally()


@dataclass(frozen=True)
class Finding:
    """A test of a window: its statistic, and the thresholds of its levels."""

    test: str
    statistic: float
    thresholds: Mapping[Level, float]

    @property
    def exceeded(self) -> Level | None:
        """The highest level whose threshold it exceeds."""
        return next((level for level in reversed(LEVELS) if self.statistic > self.thresholds[level]), None)

    @property
    def ratio(self) -> float:
        """Of the statistic to the warning's threshold."""
        return self.statistic / self.thresholds["warning"]


class TopicWatcher:
    """Judges closed windows of every topic.

    Nothing is said of a topic before its reference is full, and nothing of its share while it has fewer items than
    thresholds were simulated for.
    """

    def __init__(self, quantifier: Quantifier, thresholds: Thresholds, section: MonitorSection) -> None:
        """Take what was fitted on validation.

        Raises:
            ResourceError: the thresholds were chosen for other values of the section.
        """
        wanted = list_choices(section)
        if dict(thresholds.chosen_for) != wanted:
            raise ResourceError(
                f"monitor: the thresholds must be chosen for {wanted}, got some for {dict(thresholds.chosen_for)}. "
                "Run the recipe's monitor again."
            )
        self._quantifier, self._thresholds, self._section = quantifier, thresholds, section
        self._topics: dict[str, Topic] = {}
        self.stream = ""

    def judge(self, topic: str, start: datetime, end: datetime, tally: Tally) -> tuple[Share, list[Alert]]:
        """Take the next closed window of a topic, also an empty one, in order of time; alerts come without items.

        Where windows were passed over before it, nobody knows any more what is usual: the topic begins anew.

        Returns:
            The window's share and what it gives reason to say, at most one thing for each cause.
        """
        known = self._topics.setdefault(topic, Topic())
        if known.end is not None and start.timestamp() > known.end:
            known = self._topics[topic] = Topic()
        known.end = end.timestamp()
        share = self._quantifier.estimate(tally)
        window = Window(Tally(tally.bins.copy(), tally.called))
        if len(known.reference) < self._section.reference_size:
            known.reference.append(window)
            if len(known.reference) == self._section.reference_size:
                self._restart(known, known.reference)
            return share, []
        usual, pooled = self._find_usual(known)
        volumes = np.array([each.tally.total for each in known.reference])
        findings: dict[Cause, list[Finding]] = {
            "share": self._test_share(known, window, usual, float(volumes.mean())),
            "volume": [self._test_volume(tally.total, volumes)],
        }
        was_open = known.is_open
        said = self._advance(known, findings)
        said += self._renew(known, window, was_open)
        before = self._quantifier.estimate(pooled) if said else share
        alerts = []
        for cause, level, test in said:
            finding = next((each for each in findings[cause] if each.test == test), findings[cause][0])
            has_change = cause == "share" and level != "recovery" and known.changed.total > 0
            alerts.append(
                Alert(
                    id=name_alert(self.stream, topic, start, cause, level, test),
                    topic=topic,
                    cause=cause,
                    level=level,
                    start=start,
                    end=end,
                    before=before,
                    after=self._quantifier.estimate(known.changed) if has_change else share,
                    volume_before=float(volumes.mean()),
                    volume_after=tally.total,
                    test=test,
                    statistic=finding.statistic,
                    threshold=finding.thresholds["warning" if level == "recovery" else level],
                )
            )
        return share, alerts

    def to_state(self, topic: str) -> dict[str, Any]:
        """All that is remembered of a topic, as JSON values."""
        known = self._topics.get(topic, Topic())
        return {
            "reference": [_pack(each) for each in known.reference],
            "waiting": [_pack(each) for each in known.waiting],
            "cusum": known.cusum,
            "moments": list(known.moments),
            "changed": _pack(Window(known.changed)),
            "episodes": {cause: episode.to_state() for cause, episode in known.episodes.items()},
            "end": known.end,
        }

    def set_state(self, topic: str, state: Mapping[str, Any]) -> None:
        """Go on from what `to_state` gave.

        Raises:
            ResourceError: it is no such state.
        """
        try:
            self._topics[topic] = Topic(
                reference=[_unpack(each) for each in state["reference"]],
                waiting=[_unpack(each) for each in state["waiting"]],
                cusum=float(state["cusum"]),
                moments=[float(each) for each in state["moments"]],
                changed=_unpack(state["changed"]).tally,
                episodes={cause: Episode(**state["episodes"][cause]) for cause in ("share", "volume")},
                end=state.get("end"),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ResourceError(
                f"monitor: the state of topic {topic!r} must be what this watcher gave, got {type(error).__name__} at "
                f"{error}. Start with a new state file."
            ) from error

    def _find_usual(self, known: Topic) -> tuple[Usual, Tally]:
        pooled = Tally(
            np.sum([each.tally.bins for each in known.reference], axis=0),
            sum(each.tally.called for each in known.reference),
        )
        return compute_usual(pooled.bins, self._quantifier.ratios, self._quantifier.prior), pooled

    def _test_share(self, known: Topic, window: Window, usual: Usual, volume: float) -> list[Finding]:
        """Move CUSUM and EWMA on by a window."""
        counts, ratios = window.tally.bins, self._quantifier.ratios
        thresholds = {
            test: {level: self._thresholds.find(test, level, volume, float(usual.share)) for level in LEVELS}
            for test in ("cusum", "ewma")
        }
        window.square = float(compute_squares(counts, ratios, usual))
        if volume < SIZES[0]:
            known.forget_share()
            return [Finding(test, 0.0, thresholds[test]) for test in ("cusum", "ewma")]
        spread = _find_spread(known.reference)
        gain = compute_gain(counts, ratios, usual, self._section.rise)
        known.cusum = min(float(update_cusum(known.cusum, gain, spread)), HIGHEST * thresholds["cusum"]["alarm"])
        known.changed.bins += counts
        known.changed.called += window.tally.called
        if known.cusum == 0:
            known.changed = Tally()
        information = window.tally.total * usual.information
        moments = update_ewma(known.moments, compute_score(counts, ratios, usual), information)
        ewma, most = float(compute_ewma(moments, usual, spread)), HIGHEST * thresholds["ewma"]["alarm"]
        if ewma > most:
            moments[0] *= most / ewma
            ewma = most
        known.moments = [float(each) for each in moments]
        return [Finding("cusum", known.cusum, thresholds["cusum"]), Finding("ewma", ewma, thresholds["ewma"])]

    def _test_volume(self, items: int, volumes: Floats) -> Finding:
        surprise = float(compute_surprise(items, volumes.mean(), volumes.var(ddof=1)))
        return Finding("burst", surprise, self._thresholds.burst)

    def _advance(self, known: Topic, findings: Mapping[Cause, Sequence[Finding]]) -> list[tuple[Cause, Level, str]]:
        """What each cause's tests give reason to say: the test that is farthest above its threshold speaks."""
        said: list[tuple[Cause, Level, str]] = []
        for cause, tests in findings.items():
            episode = known.episodes[cause]
            strongest = max(tests, key=lambda each: (LEVELS.index(each.exceeded) if each.exceeded else -1, each.ratio))
            is_calm = all(each.ratio <= CALM for each in tests)
            level = episode.advance(strongest.exceeded, strongest.test, is_calm, self._section.cooldown_windows)
            if level is not None:
                said.append((cause, level, episode.test or strongest.test))
        return said

    def _renew(self, known: Topic, window: Window, was_open: bool) -> list[tuple[Cause, Level, str]]:
        """Let quiet windows join the reference. What was unusual for as long as the reference is becomes usual, which
        ends its episodes."""
        size = self._section.reference_size
        is_open = known.is_open
        if is_open != was_open:
            known.waiting.clear()  # they may hold the beginning of a change, or all of it
        known.waiting.append(window)
        if is_open and len(known.waiting) == size:
            ended = [(cause, episode.end()) for cause, episode in known.episodes.items()]
            self._restart(known, known.waiting)
            return [(cause, level, RENEWED) for cause, level in ended if level is not None]
        if not is_open and len(known.waiting) > count_guard(size):
            known.reference = [*known.reference[1:], known.waiting.pop(0)]
        return []

    def _restart(self, known: Topic, windows: list[Window]) -> None:
        """Take these windows as the reference, and begin the tests anew."""
        known.reference, known.waiting = list(windows), []
        known.forget_share()
        usual, _ = self._find_usual(known)
        for window in known.reference:
            window.square = float(compute_squares(window.tally.bins, self._quantifier.ratios, usual))


def _find_spread(windows: Sequence[Window]) -> Floats:
    return compute_spread(sum(each.square for each in windows), sum(each.tally.total > 0 for each in windows))


def _pack(window: Window) -> dict[str, Any]:
    places = np.flatnonzero(window.tally.bins)
    counts = [[int(place), int(window.tally.bins[place])] for place in places]
    return {"bins": counts, "called": int(window.tally.called), "square": window.square}


def _unpack(packed: Mapping[str, Any]) -> Window:
    bins = np.zeros(BINS, dtype=np.int64)
    for place, count in packed["bins"]:
        bins[place] = count
    return Window(Tally(bins, int(packed["called"])), float(packed["square"]))


def name_alert(stream: str, *what: str | datetime) -> str:
    """The same name for the same alert of a stream, however often it is raised.

    Args:
        stream: names it among others whose alerts go to the same file or receiver.
        what: topic, start, cause, level and test.
    """
    told = [each.astimezone(UTC).isoformat() if isinstance(each, datetime) else each for each in what]
    return hashlib.sha256(json.dumps([stream, *told]).encode()).hexdigest()[:24]
