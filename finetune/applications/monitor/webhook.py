"""Alerts posted to an address, signed after Standard Webhooks (standardwebhooks.com, specification 1.0).

    webhook-id         the alert's id: the same for every attempt, so that a receiver can drop a second arrival
    webhook-timestamp  epoch seconds of the attempt
    webhook-signature  v1,<base64 of HMAC-SHA256 over "id.timestamp.body">

The alerts go one after the other. While the address does not answer, all wait, longer after each attempt.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.applications.monitor.exchange import Answer, Bounds, ExchangeError, exchange
from finetune.applications.monitor.store import Parcel, Store
from finetune.errors import UsageError

SECRET_VARIABLE = "FINETUNE_WEBHOOK_SECRET"
MIN_SECRET_BYTES = 16
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 1.0, 300.0
BOUNDS = Bounds(seconds=10.0, body_bytes=2**16, is_status_enough=True)
REFUSALS = (400, 413, 415, 422)
"""Answers that are about this alert; another attempt would get the same. All others may pass."""

Send = Callable[[str, Mapping[str, str], Bounds, bytes], Answer]


def read_secret(text: str | None) -> bytes | None:
    """The key of the signatures: `whsec_` and base64, as the specification has it, or any text; None for no text.

    Raises:
        UsageError: it is too short to keep anybody out.
    """
    if not text:
        return None
    try:
        key = (
            base64.b64decode(text.removeprefix("whsec_"), validate=True) if text.startswith("whsec_") else text.encode()
        )
    except binascii.Error:
        raise UsageError(f"{SECRET_VARIABLE}: must be base64 after whsec_, got something else.") from None
    if len(key) < MIN_SECRET_BYTES:
        raise UsageError(f"{SECRET_VARIABLE}: must have at least {MIN_SECRET_BYTES} bytes, got {len(key)}.")
    return key


def sign(key: bytes, name: str, timestamp: int, body: bytes) -> str:
    """The signature of a message, as in the header."""
    digest = hmac.new(key, f"{name}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


@dataclass
class WebhookSink:
    """An address that takes alerts.

    Args:
        url: to which they are posted; redirects are not followed.
        key: of the signatures; None leaves them out.
        clock: epoch seconds, for the time stamps.
        tick: seconds of a clock that never jumps, for the waits.
        send: posts; raises `ExchangeError`.
        trouble: why the last attempt failed, in words; None after one that did not.
    """

    url: str
    key: bytes | None = None
    clock: Callable[[], float] = time.time
    tick: Callable[[], float] = time.monotonic
    send: Send = exchange
    trouble: str | None = None
    _wait: float = 0.0
    _next: float = float("-inf")

    name = "webhook"

    def deliver(self, store: Store) -> None:
        """Post what waits, until an attempt fails."""
        while self.tick() >= self._next and (parcels := store.read_outbox(self.name, limit=1)):
            parcel = parcels[0]
            try:
                answer = self.send(self.url, self._build_headers(parcel), BOUNDS, parcel.body.encode())
            except ExchangeError as error:
                self._back_off(f"got {error}", {})
                return
            if 200 <= answer.status < 300:
                store.mark_delivered(self.name, parcel)
            elif answer.status in REFUSALS:
                store.mark_refused(self.name, parcel, f"alert {parcel.id}: the webhook answered {answer.status}.")
            else:
                self._back_off(f"got status {answer.status}", answer.headers)
                return
            self._wait, self.trouble = 0.0, None

    def _build_headers(self, parcel: Parcel) -> dict[str, str]:
        timestamp = int(self.clock())
        headers = {
            "Content-Type": "application/json",
            "webhook-id": parcel.id,
            "webhook-timestamp": str(timestamp),
        }
        if self.key:
            headers["webhook-signature"] = sign(self.key, parcel.id, timestamp, parcel.body.encode())
        return headers

    def _back_off(self, words: str, headers: Mapping[str, Any]) -> None:
        self._wait = min(MAX_WAIT_SECONDS, max(FIRST_WAIT_SECONDS, 2 * self._wait, read_wait(headers)))
        self._next = self.tick() + self._wait
        self.trouble = words


def read_wait(headers: Mapping[str, Any]) -> float:
    """Seconds that a server asks to be left alone; 0 where it does not say so in seconds."""
    asked = str(headers.get("retry-after", ""))
    return float(asked) if asked.isdecimal() else 0.0
