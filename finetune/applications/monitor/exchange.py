"""One HTTP request with bounds: on time as a whole, on the size of the answer, on redirects."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from finetune.errors import UsageError

BLOCK_BYTES = 2**16
USER_AGENT = "finetune-monitor"


class ExchangeError(Exception):
    """No usable answer came; the message says why, for people."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said.

    Args:
        status: of HTTP, also one that says no.
        headers: names in lower case.
        body: all of it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an exchange may cost.

    Args:
        seconds: for the whole of it, and for every silence of the server in it.
        body_bytes: of the answer.
        is_redirected: whether a redirect is followed; else it is an answer like others.
        is_status_enough: whether what is wrong with the body is no matter; it is dropped then.
    """

    seconds: float
    body_bytes: int
    is_redirected: bool = False
    is_status_enough: bool = False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Go nowhere else: whoever answers there has not been named."""


def check_url(url: str, option: str) -> None:
    """See that an address can be meant.

    Raises:
        UsageError: it cannot.
    """
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_good = False
    if not is_good or any(character.isspace() for character in url):
        raise UsageError(f"{option}: must be an address such as https://example.org/path, got {url!r}.")


def exchange(
    url: str,
    headers: Mapping[str, str],
    bounds: Bounds,
    body: bytes | None = None,
    tick: Callable[[], float] = time.monotonic,
) -> Answer:
    """Get an address, or post a body to it.

    Raises:
        ExchangeError: there was no answer, or none within the bounds.
    """
    began = tick()
    request = urllib.request.Request(url, data=body, headers={"User-Agent": USER_AGENT, **headers})
    try:
        with _open(request, bounds) as response:
            kept = {name.lower(): value for name, value in response.headers.items()}
            try:
                found = _read_body(response, bounds, began, tick)
            except (ExchangeError, OSError, http.client.HTTPException):
                if not bounds.is_status_enough:
                    raise
                found = b""
            return Answer(response.status, kept, found)
    except TimeoutError:
        raise ExchangeError(f"no answer within {bounds.seconds:g} s") from None
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, TimeoutError):
            raise ExchangeError(f"no answer within {bounds.seconds:g} s") from None
        raise ExchangeError(getattr(reason, "strerror", None) or str(reason)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ExchangeError(str(error) or type(error).__name__) from None


def _read_body(response: Any, bounds: Bounds, began: float, tick: Callable[[], float]) -> bytes:
    parts, size = [], 0
    while part := response.read1(BLOCK_BYTES):
        size += len(part)
        if size > bounds.body_bytes:
            raise ExchangeError(f"an answer of more than {bounds.body_bytes:,} bytes")
        if tick() - began > bounds.seconds:
            raise ExchangeError(f"an answer that was not complete after {bounds.seconds:g} s")
        parts.append(part)
    if getattr(response, "length", None):  # `read1` takes an early end for the end
        raise ExchangeError("an answer that broke off")
    return b"".join(parts)


def _open(request: urllib.request.Request, bounds: Bounds) -> Any:
    """The response, also one that says no."""
    opener = urllib.request.OpenerDirector()
    redirects = urllib.request.HTTPRedirectHandler() if bounds.is_redirected else _NoRedirect()
    for handler in (  # neither files nor FTP, which the usual opener reads as well
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        redirects,
    ):
        opener.add_handler(handler)
    try:
        return opener.open(request, timeout=bounds.seconds)
    except urllib.error.HTTPError as answer:
        return answer
