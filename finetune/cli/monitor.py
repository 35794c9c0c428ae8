"""`finetune monitor`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from finetune.cli.output import (
    AsJson,
    Engine,
    RunArgument,
    make_printable,
    print_json,
    print_note,
    print_table,
    print_text,
)

if TYPE_CHECKING:
    from finetune.applications.monitor.load import Monitor
    from finetune.applications.monitor.records import Alert, Share
    from finetune.applications.monitor.sinks import JsonlSink
    from finetune.applications.monitor.sources import Source
    from finetune.applications.monitor.store import Store
    from finetune.applications.monitor.webhook import WebhookSink

LEVELS = ("warning", "alarm")
SUMMARY = ("lines", "items", "repeats", "late", "rejected", "note", "windows", "windows passed over", "alerts")
OPTIONS = {"file": "alerts", "webhook": "webhook"}
STYLES = {"warning": "yellow", "alarm": "red", "recovery": "green"}


def monitor_command(
    run: RunArgument,
    source: Annotated[
        str | None, typer.Option("--input", metavar="FILE", help="Items, one JSON object a line; - is standard input.")
    ] = None,
    feeds: Annotated[
        list[str] | None, typer.Option("--feed", metavar="URL", help="An RSS or Atom feed; repeatable.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as the file grows and the feeds change.")] = False,
    alerts: Annotated[Path | None, typer.Option("--alerts", help="Append alerts to this file, one a line.")] = None,
    webhook: Annotated[
        str | None,
        typer.Option("--webhook", metavar="URL", help="Post alerts there, signed with FINETUNE_WEBHOOK_SECRET."),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="Answer Prometheus at this port of 127.0.0.1.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="What is remembered; default the alerts' file, ending in .db.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a page of all windows here at the end.")
    ] = None,
    backtest: Annotated[
        Path | None, typer.Option("--backtest", metavar="FILE", help="Replay labelled items, and judge the alerts.")
    ] = None,
    close: Annotated[
        bool,
        typer.Option("--close", help="Nothing is missing: judge the last windows too, which may still take items."),
    ] = False,
    engine: Engine = None,
    fail_on: Annotated[
        str | None, typer.Option("--fail-on", metavar="LEVEL", help="Exit with 4 if this run raised: warning, alarm.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Watch a stream of texts: the negative share of each topic, and alerts when it or the volume changes.

    At the end of the input, windows that may still take items stay open: a later call goes on with what was appended
    since, as if all had been there at once. --close judges them, with or without more input.

    The same command goes on where it was stopped or killed; no item is lost, no alert raised twice. Of standard input
    a kill loses what was not read yet. --json prints one object a line: alerts as they are raised, a summary at the
    end.
    """
    from finetune.errors import UsageError

    if backtest is not None:
        others = (source, feeds, follow, alerts, webhook, metrics_port is not None, state, report, fail_on, close)
        if any(others):
            raise UsageError("monitor: --backtest must come with --engine and --json at most, got more. Leave it out.")
        _replay(_build(run, engine), backtest, as_json)
        return
    has_input = bool(source or feeds or close)  # closing raises alerts, too
    _check_options(has_input, follow, fail_on, alerts, report)
    if close and follow:
        raise UsageError("--close: must come without --follow, which never ends by itself. Leave one out.")
    place = _find_state(source, alerts, state, has_input=has_input)
    sources, sinks = _Sources(source, feeds or [], follow), _build_sinks(alerts, webhook)
    monitor = _build(run, engine)  # takes seconds: what can be refused has been
    with ExitStack() as opened:
        from finetune.applications.monitor.store import Store

        store = opened.enter_context(Store(place))
        watching = _Watching(monitor, store, sources, sinks, as_json)
        if has_input:
            watching.run(opened, metrics_port, is_complete=close)
        if report is not None:
            _write_report(store, monitor, report)
        watching.end(fail_on)


def _build(run: str, engine: str | None) -> Monitor:
    """The monitor of a run; a missed gate ends `finetune run` before it is built."""
    from finetune.applications.monitor.build import build_monitor
    from finetune.applications.monitor.load import is_built, load_monitor

    if is_built(run):
        return load_monitor(run, engine=engine)
    print_note("building the monitor: shares on validation, thresholds by simulation, the shares of the test rows")
    build_monitor(run)
    monitor = load_monitor(run, engine=engine)
    for note in monitor.section.list_notes():
        print_note(note)
    return monitor


def _find_state(source: str | None, alerts: Path | None, state: Path | None, *, has_input: bool) -> Path:
    """Where the state is.

    Raises:
        UsageError: there is no place for it, or it is one of the other files.
    """
    from finetune.errors import UsageError

    if has_input and alerts is None:
        raise UsageError("monitor: must get --alerts FILE, got none. Add --alerts alerts.jsonl.")
    place = state or (alerts.with_suffix(".db") if alerts else None)
    if place is None:
        raise UsageError("monitor: must get --input FILE or --feed URL, got neither. - is standard input.")
    named = [path.resolve() for path in (place, alerts, Path(source) if source not in (None, "-") else None) if path]
    if len(set(named)) < len(named):
        raise UsageError("monitor: --input, --alerts and --state must be three files, got one of them twice.")
    return place


def _check_options(
    has_input: bool, follow: bool, fail_on: str | None, alerts: Path | None, report: Path | None
) -> None:
    from finetune.errors import UsageError

    if fail_on is not None and fail_on not in LEVELS:
        raise UsageError(f"--fail-on: must be one of {', '.join(LEVELS)}, got {fail_on!r}.")
    if fail_on is not None and follow:
        raise UsageError("--fail-on: must come without --follow, which never ends by itself. Leave one out.")
    if not has_input and report is None:
        raise UsageError("monitor: must get --input FILE or --feed URL, got neither. - is standard input.")
    if alerts is not None and alerts.is_dir():
        raise UsageError(f"--alerts: must be a file, got the folder {alerts}.")


class _Sources:
    """What is read."""

    def __init__(self, path: str | None, urls: list[str], follow: bool) -> None:
        from finetune.applications.monitor.exchange import check_url
        from finetune.applications.monitor.feeds import FeedSource
        from finetune.applications.monitor.sources import FileSource

        for url in urls:
            check_url(url, "--feed")
        self._pipe = path if path and (path == "-" or Path(path).is_fifo()) else None
        self._file = FileSource(Path(path), is_followed=follow) if path and not self._pipe else None
        self._feeds = FeedSource(urls, is_followed=follow) if urls else None

    def open(self, store: Store) -> Source:
        """All of them as one, from where they were left."""
        from finetune.applications.monitor.sources import read_in_turn, read_stream

        positions = store.read_positions()
        if self._file:
            self._file.go_on(positions.get(self._file.origin))
        if self._feeds:
            self._feeds.go_on(positions)
        pipe = read_stream(_open_pipe(self._pipe), self._pipe) if self._pipe else None
        return read_in_turn([source for source in (pipe, self._file, self._feeds) if source is not None])

    @property
    def troubles(self) -> list[str]:
        """What did not answer, in words."""
        return self._feeds.troubles if self._feeds else []


class _Watching:
    """One run of the loop, and what it tells people or programs."""

    def __init__(
        self, monitor: Monitor, store: Store, sources: _Sources, sinks: list[JsonlSink | WebhookSink], as_json: bool
    ) -> None:
        self._monitor, self._store, self._sources, self._sinks = monitor, store, sources, sinks
        self._as_json = as_json
        self._before, self._refused_before = store.read_counts(), set(store.read_refusals())
        self._is_finished, self._stopped_by = True, ""
        self._console = Console()  # one for both: an alert must not land in the line that changes

    def run(self, opened: ExitStack, metrics_port: int | None, *, is_complete: bool) -> None:
        """Watch until the source ends or somebody stops it."""
        from finetune.applications.monitor.metrics import MetricsServer, render_metrics
        from finetune.applications.monitor.watch import Options, watch
        from finetune.training.signals import StopRequest

        server = opened.enter_context(MetricsServer(metrics_port)) if metrics_port is not None else None
        if server:
            print_note(f"metrics: http://127.0.0.1:{server.port}/metrics")
        names = [sink.name for sink in self._sinks]
        with StopRequest() as request, self._show_progress() as show:

            def on_batch() -> None:
                show()
                if server:
                    server.publish(render_metrics(self._store, names))

            options = Options(
                is_stopped=lambda: request.requested, on_alert=self._tell, on_batch=on_batch, is_complete=is_complete
            )
            self._is_finished = watch(self._sources.open(self._store), self._monitor, self._store, self._sinks, options)
            self._stopped_by = request.signal_name or ""

    @contextmanager
    def _show_progress(self) -> Iterator[Callable[[], None]]:
        """One line that changes, where somebody looks."""
        if self._as_json or not self._console.is_terminal:
            yield lambda: None
            return
        with self._console.status("waiting for items") as status:
            yield lambda: status.update(_describe_counts(self._count()))

    def _tell(self, alert: Alert) -> None:
        if self._as_json:
            from finetune.applications.monitor.json_lines import dump_alert

            _print_line({"event": "alert", "alert": json.loads(dump_alert(alert))})
        else:
            self._console.print(
                _describe_alert(alert), style=STYLES[alert.level], markup=False, highlight=False, soft_wrap=True
            )

    def end(self, fail_on: str | None) -> None:
        """Say what came of it, and with which exit code.

        Raises:
            Interrupted: somebody stopped it.
            ResourceError: a feed or a sink did not answer.
            GateError: an alert of the level was raised for which a script waits.
        """
        from finetune.errors import GateError, Interrupted, ResourceError

        counts, troubles = self._count(), self._list_troubles()
        self._show_summary(counts, troubles)
        if not self._is_finished:
            raise Interrupted(f"stopped by {self._stopped_by}; the same command goes on where it was.")
        if troubles:
            raise ResourceError("\n".join(troubles))
        wanted = LEVELS[LEVELS.index(fail_on) :] if fail_on else ()
        raised = {level: counts.get(f"alerts: {level}", 0) for level in wanted}
        if any(raised.values()):
            found = " and ".join(f"{number} of level {level}" for level, number in raised.items() if number)
            raise GateError(f"--fail-on {fail_on}: this run must raise no such alert, got {found}.")

    def _count(self) -> dict[str, int]:
        """What was counted since this run began."""
        counts = {name: value - self._before.get(name, 0) for name, value in self._store.read_counts().items()}
        return {name: value for name, value in counts.items() if value}

    def _list_troubles(self) -> list[str]:
        troubles = self._sources.troubles
        for sink in self._sinks:
            if waiting := self._store.count_outbox(sink.name):
                reason = f", {sink.trouble}" if sink.trouble else ""
                troubles.append(
                    f"--{OPTIONS[sink.name]}: must take every alert{reason}; {waiting} wait in {self._store.path}. "
                    "The same command sends them."
                )
        return [*troubles, *(words for words in self._store.read_refusals() if words not in self._refused_before)]

    def _show_summary(self, counts: Mapping[str, int], troubles: list[str]) -> None:
        from finetune.recipe.messages import count_of

        rejected = self._store.read_rejections() if any(name.startswith("rejected: ") for name in counts) else []
        number_open = len(self._store.list_open_starts())
        if self._as_json:
            found = {"counts": counts, "open": number_open, "rejected": rejected, "troubles": troubles}
            _print_line({"event": "summary"} | found)
            return
        names = sorted(counts, key=lambda name: SUMMARY.index(name.partition(":")[0]))
        print_table(["in this run", ""], [[name, f"{counts[name]:,}"] for name in names if name[:6] != "note: "])
        for note, words in _list_notes().items():
            if number := counts.get(f"note: {note}", 0):
                print_text(f"{number:,} {words}.")
        if number_open and self._is_finished:
            print_text(
                f"{count_of(number_open, 'window')} may still take items, to be judged once later ones come. "
                "If nothing is missing, --close judges now."
            )
        if rejected:
            print_text("Rejected, the first of each kind:")
            for words in rejected:
                print_text(f"  {make_printable(words)}")


def _list_notes() -> Mapping[Any, str]:
    from finetune.applications.monitor.items import NOTES

    return NOTES


def _build_sinks(alerts: Path | None, webhook: str | None) -> list[JsonlSink | WebhookSink]:
    from finetune.applications.monitor.sinks import JsonlSink

    sinks: list[JsonlSink | WebhookSink] = [JsonlSink(alerts)] if alerts else []
    return [*sinks, _build_webhook(webhook)] if webhook is not None else sinks


def _build_webhook(url: str) -> WebhookSink:
    from finetune.applications.monitor.exchange import check_url
    from finetune.applications.monitor.webhook import SECRET_VARIABLE, WebhookSink, read_secret

    check_url(url, "--webhook")
    key = read_secret(os.environ.get(SECRET_VARIABLE))
    if key is None:
        print_note(f"webhook: {SECRET_VARIABLE} is not set; the alerts are not signed")
    return WebhookSink(url, key)


def _open_pipe(path: str) -> Callable[[int], bytes]:
    """Reads what is there, without waiting for as much as was asked for."""
    if path != "-":
        return Path(path).open("rb", buffering=0).read
    try:
        number = sys.stdin.fileno()
    except (OSError, ValueError):
        return sys.stdin.buffer.read
    return lambda size: os.read(number, size)


def _replay(monitor: Monitor, path: Path, as_json: bool) -> None:
    from finetune.applications.monitor.backtest import build_tables, run_backtest

    found = run_backtest(monitor, path)
    if as_json:
        print_json(found)
        return
    for title, columns, rows in build_tables(found):
        print_text(title)  # longer than many a table is wide
        print_table(columns, rows)


def _write_report(store: Store, monitor: Monitor, path: Path) -> None:
    from finetune.applications.monitor.report import write_report

    write_report(store, monitor.section, path)
    print_note(f"report  {path}")


def _describe_counts(counts: Mapping[str, int]) -> str:
    shown = {name: counts.get(name, 0) for name in ("items", "repeats", "late", "windows")}
    shown["rejected"] = sum(value for name, value in counts.items() if name.startswith("rejected: "))
    shown["alerts"] = sum(value for name, value in counts.items() if name.startswith("alerts: "))
    return "  ".join(f"{value:,} {name}" for name, value in shown.items())


def _describe_alert(alert: Alert) -> str:
    """One line: when, how bad, where, what, from what to what, by which test."""
    if alert.cause == "share":
        change = f"{_describe_share(alert.before)} -> {_describe_share(alert.after)}"
    else:
        change = f"{alert.volume_before:.1f} -> {alert.volume_after} items"
    volume = "more news" if alert.volume_after > alert.volume_before else "less news"
    words = "over" if alert.level == "recovery" else "worse news" if alert.cause == "share" else volume
    test = f"{alert.test} {alert.statistic:.2f}, threshold {alert.threshold:.2f}"
    if alert.test == "reference":  # no test: it lasted until it was usual
        test = "usual now"
    return f"{alert.start:%Y-%m-%d %H:%M}  {alert.level:8}  {make_printable(alert.topic)}  {words}  {change}  {test}"


def _describe_share(share: Share) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})" if share.items else "no items"


def _print_line(content: Mapping[str, Any]) -> None:
    """One JSON value on a line, at once: the other program waits for it."""
    sys.stdout.write(json.dumps(content, ensure_ascii=True, allow_nan=False) + "\n")
    sys.stdout.flush()
