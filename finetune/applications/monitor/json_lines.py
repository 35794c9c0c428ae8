"""Alerts and shares as JSON, and back. JSON has no infinities and no "not a number": they are null, and read as NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

import numpy as np

from finetune.applications.monitor.records import Alert, Share


def dump_alert(alert: Alert) -> str:
    """An alert as one line of JSON."""
    return dump_json(asdict(alert) | {"start": alert.start.isoformat(), "end": alert.end.isoformat()})


def read_alert(fields: Mapping[str, Any]) -> Alert:
    """What `dump_alert` wrote."""
    times = {name: datetime.fromisoformat(fields[name]) for name in ("start", "end")}
    shares = {name: read_share(fields[name]) for name in ("before", "after")}
    numbers = {
        name: math.nan if fields[name] is None else fields[name] for name in ("volume_before", "statistic", "threshold")
    }
    return Alert(**{**fields, **times, **shares, **numbers, "items": tuple(fields["items"])})


def read_share(fields: Mapping[str, Any]) -> Share:
    """A share from its fields."""
    numbers = {name: math.nan if value is None else value for name, value in fields.items() if name != "items"}
    return Share(**numbers, items=fields["items"])


def dump_json(content: Mapping[str, Any]) -> str:
    """One line of JSON; numbers that are not finite become null."""
    return json.dumps(_without_infinities(content), ensure_ascii=False, allow_nan=False)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_infinities(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
