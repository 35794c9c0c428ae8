"""Times as files write them -> seconds since 1970 UTC."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute as pc

from finetune.errors import DataError
from finetune.recipe.messages import show

EPOCH_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
EPOCH_BOUND = 10**11
"""Epoch seconds lie below it until the year 5138; as milliseconds it is the year 1973. Other units likewise."""

MAX_ZONE_HOURS = 14

_NUMBER = r"^[+-]?[0-9]{1,19}(\.[0-9]*)?$"
_ISO = (
    r"^(?P<year>[0-9]{4})[-/](?P<month>[0-9]{1,2})[-/](?P<day>[0-9]{1,2})"
    r"(?P<clock>[Tt ]+(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:[.,][0-9]+)?)?"
    r"(?P<zone> ?(?:[Zz]|UTC|(?P<sign>[+-])(?P<zone_hour>[0-9]{2}):?(?P<zone_minute>[0-9]{2})?))?)?$"
)
_FIX = "Write times as 2011-04-13 or 2011-04-13T09:30:00+01:00, or as seconds since 1970."

Seconds = npt.NDArray[np.int64]


def parse_times(column: pyarrow.ChunkedArray, where: str) -> tuple[Seconds, dict[str, int]]:
    """Read times of any mixture of forms.

    Args:
        column: (E,) dates, times, numbers or text, none missing. Numbers are epoch seconds, milliseconds, microseconds
            or nanoseconds, told apart by their size. Text is such a number, an ISO date (its midnight is meant) or an
            ISO date with a time. What has no zone is UTC.
        where: begins messages.

    Returns:
        (E,) seconds since 1970 UTC, rounded down; and form -> how many times have it.

    Raises:
        DataError: the first row that is no time, or that may be one of two: 03/04/2011, or 20110403 as a number.
    """
    kind = column.type
    if pyarrow.types.is_timestamp(kind) or pyarrow.types.is_date(kind):
        # A cast to seconds refuses to drop a fraction; nanoseconds hold the years 1678 to 2261 only.
        micros = column.cast(pyarrow.timestamp("us", tz=getattr(kind, "tz", None)), safe=False)
        return _to_numpy(micros.cast(pyarrow.int64())) // 10**6, {str(kind): len(column)}
    if pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind):
        return _scale(_to_numpy(column), where, np.arange(len(column)))
    if not pyarrow.types.is_string(kind):
        raise DataError(f"{where}: must hold times, got {kind}. {_FIX}")
    return _parse_text(pc.utf8_trim_whitespace(column).combine_chunks(), where)


def _parse_text(texts: pyarrow.Array, where: str) -> tuple[Seconds, dict[str, int]]:
    seconds = np.zeros(len(texts), np.int64)
    is_number = _to_numpy(pc.match_substring_regex(texts, _NUMBER))
    forms: dict[str, int] = {}
    numbers = np.flatnonzero(is_number)
    if len(numbers):
        written = texts.take(pyarrow.array(numbers))
        whole = pc.replace_substring_regex(pc.utf8_ltrim(written, "+"), r"\..*$", "")
        try:
            values = _to_numpy(whole.cast(pyarrow.int64()))
        except pyarrow.ArrowInvalid:
            raise DataError(f"{where}: must be times, got a number above 2^63. {_FIX}") from None
        seconds[numbers], forms = _scale(values, where, numbers)
    dates = np.flatnonzero(~is_number)
    if len(dates):
        fields = pc.extract_regex(texts.take(pyarrow.array(dates)), _ISO)
        refused = np.flatnonzero(_to_numpy(fields.is_null()))
        if len(refused):
            raise _refuse(texts, int(dates[refused[0]]), len(refused), where)
        parts = {name: pc.struct_field(fields, name) for name in ("clock", "zone")}
        seconds[dates], invalid = _compute_seconds(fields)
        if invalid.any():
            raise _refuse(texts, int(dates[np.argmax(invalid)]), int(invalid.sum()), where)
        has_clock, has_zone = (_to_numpy(pc.not_equal(part, "")) for part in parts.values())
        for form, mask in (
            ("ISO dates", ~has_clock),
            ("ISO times without a zone", has_clock & ~has_zone),
            ("ISO times with a zone", has_zone),
        ):
            if mask.any():
                forms[form] = int(mask.sum())
    return seconds, forms


def _compute_seconds(fields: pyarrow.StructArray) -> tuple[Seconds, npt.NDArray[np.bool_]]:
    """Seconds since 1970 of the fields of `_ISO`; and which are no time of the calendar."""

    def get(name: str) -> Seconds:
        text = pc.struct_field(fields, name)
        return cast("Seconds", _to_numpy(pc.if_else(pc.equal(text, ""), "0", text).cast(pyarrow.int64())))

    year, month, day = (get(name) for name in ("year", "month", "day"))
    hour, minute, second = (get(name) for name in ("hour", "minute", "second"))
    months = ((year - 1970) * 12 + np.clip(month, 1, 12) - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    invalid = (month < 1) | (month > 12) | (days.astype("datetime64[M]") != months)
    invalid |= (hour > 23) | (minute > 59) | (second > 59) | (get("zone_hour") > MAX_ZONE_HOURS)
    sign = np.where(_to_numpy(pc.equal(pc.struct_field(fields, "sign"), "-")), -1, 1)
    offset = sign * (get("zone_hour") * 3600 + get("zone_minute") * 60)
    return days.astype(np.int64) * 86400 + hour * 3600 + minute * 60 + second - offset, invalid


def _scale(values: npt.NDArray[np.generic], where: str, rows: npt.NDArray[np.intp]) -> tuple[Seconds, dict[str, int]]:
    """Epoch numbers -> seconds and their units; `rows` are their positions in the file."""
    if not np.isfinite(values).all():
        row = int(rows[np.argmin(np.isfinite(values))])
        raise DataError(f"{where}: row {row + 1}: must be a time, got no finite number. {_FIX}")
    if _look_like_dates(np.floor(values).astype(np.int64)):
        got = f"{int(values[0])}, which may be a date or seconds since 1970"
        raise DataError(f"{where}: row {int(rows[0]) + 1}: must be a time of one meaning, got {got}. {_FIX}")
    size = np.abs(values)
    unit = np.searchsorted(np.array([EPOCH_BOUND * factor for factor in (1, 10**3, 10**6)], float), size, side="right")
    factors = np.array(list(EPOCH_UNITS.values()))
    counts = np.bincount(unit, minlength=len(factors))
    forms = {f"epoch {name}": int(count) for name, count in zip(EPOCH_UNITS, counts, strict=True) if count}
    return np.floor_divide(values, factors[unit]).astype(np.int64), forms


def _look_like_dates(values: Seconds) -> bool:
    """Whether all could be 20110403."""
    year, month, day = values // 10_000, values // 100 % 100, values % 100
    dates = (year >= 1900) & (year < 2100) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    return bool(dates.all())


def _refuse(texts: pyarrow.Array, row: int, count: int, where: str) -> DataError:
    text = texts[row].as_py()
    fields = pc.extract_regex(texts[row], r"^(?P<a>[0-9]{1,2})[-/.](?P<b>[0-9]{1,2})[-/.][0-9]{2,4}").as_py()
    got = show(text)
    if fields and max(int(fields["a"]), int(fields["b"])) <= 12:
        got += ", which names the day or the month first"
    return DataError(f"{where}: row {row + 1}: must be a time ({count:,} rows are not), got {got}. {_FIX}")


def _to_numpy(array: pyarrow.Array | pyarrow.ChunkedArray) -> Any:
    if isinstance(array, pyarrow.ChunkedArray):
        return array.to_numpy()
    return array.to_numpy(zero_copy_only=False)
