"""What the monitor counts, for Prometheus: text exposition format 0.0.4 at /metrics."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from finetune.applications.monitor.store import Store
from finetune.errors import UsageError

HOST = "127.0.0.1"  # whoever wants it elsewhere puts a proxy before it
_PREFIX = "finetune_monitor_"
_PLAIN = {
    "lines": "Lines and entries that were read.",
    "items": "Items that were counted in a window.",
    "repeats": "Items that came before, by their id or as a copy.",
    "late": "Items whose window was closed.",
    "windows": "Windows that were judged.",
}

Samples = Iterable[tuple[Mapping[str, str], float]]


def render_metrics(store: Store, sinks: Iterable[str]) -> str:
    """All metrics as text. The counters go on after a restart, since they are those of the store."""
    counts = store.read_counts()
    parts = [_render(f"{name}_total", "counter", words, [({}, counts.get(name, 0))]) for name, words in _PLAIN.items()]
    rejected = [({"reason": reason}, value) for reason, value in _select(counts, "rejected: ")]
    alerts = [({"level": level}, value) for level, value in _select(counts, "alerts: ")]
    parts.append(_render("rejected_total", "counter", "Lines that are no items.", rejected))
    parts.append(_render("alerts_total", "counter", "Alerts that were raised.", alerts))
    waiting = [({"sink": sink}, store.count_outbox(sink)) for sink in sinks]
    parts.append(_render("outbox", "gauge", "Alerts that a sink has not taken.", waiting))
    latest = store.read_latest_windows()
    for name, words in (
        ("value", "Negative share of the last closed window, corrected."),
        ("low", "Lower end of its interval."),
        ("high", "Upper end of its interval."),
    ):
        samples = [({"topic": window.topic}, getattr(window.share, name)) for window in latest if window.total]
        parts.append(_render("share" if name == "value" else f"share_{name}", "gauge", words, samples))
    sizes = [({"topic": window.topic}, window.total) for window in latest]
    parts.append(_render("window_items", "gauge", "Items of the last closed window.", sizes))
    return "".join(parts)


def _select(counts: Mapping[str, int], prefix: str) -> list[tuple[str, int]]:
    return [(name.removeprefix(prefix), value) for name, value in counts.items() if name.startswith(prefix)]


def _render(name: str, kind: str, words: str, samples: Samples) -> str:
    lines = [f"# HELP {_PREFIX}{name} {words}", f"# TYPE {_PREFIX}{name} {kind}"]
    for labels, value in samples:
        inner = ",".join(f'{key}="{_escape(label)}"' for key, label in labels.items())
        shown = "NaN" if value != value else f"{value:g}" if isinstance(value, float) else str(value)
        lines.append(f"{_PREFIX}{name}{{{inner}}} {shown}" if inner else f"{_PREFIX}{name} {shown}")
    return "\n".join(lines) + "\n"


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class MetricsServer:
    """A port that answers with what was published last. It never looks into the store, which another thread writes.

    Args:
        port: 0 takes a free one.

    Raises:
        UsageError: the port cannot be had.
    """

    def __init__(self, port: int) -> None:
        self._text = b""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds: a visitor who says nothing holds a thread no longer

            def do_GET(self) -> None:
                found = self.path.partition("?")[0] == "/metrics"
                body = owner._text if found else b"see /metrics\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *_: object) -> None:  # noqa: A002  (the name is Python's)
                """The terminal is for alerts."""

        try:
            self._server = ThreadingHTTPServer((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            words = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"--metrics-port: must be a free port, got {port} ({words}). Name another one.") from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def publish(self, text: str) -> None:
        """Answer with this from now on."""
        self._text = text.encode()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
