"""Times in any form -> seconds since 1970; the reference is Python's own datetime."""

from __future__ import annotations

from datetime import UTC, date, datetime

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.times import parse_times
from finetune.errors import DataError

SECONDS = 1302683400  # 2011-04-13 08:30:00 UTC
MIDNIGHT = 1302652800


def parse(values, kind=None):
    times, forms = parse_times(pyarrow.chunked_array([pyarrow.array(values, kind)]), "a.csv: column 'time'")
    assert times.dtype == np.int64
    return times.tolist(), forms


def refuse(words, values, kind=None):
    with pytest.raises(DataError) as caught:
        parse(values, kind)
    assert words in str(caught.value)
    assert str(caught.value).endswith(
        "Write times as 2011-04-13 or 2011-04-13T09:30:00+01:00, or as seconds since 1970."
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2011-04-13", MIDNIGHT),
        ("2011/4/13", MIDNIGHT),
        ("2011-04-13 08:30:00", SECONDS),
        ("2011-04-13T08:30", SECONDS),
        (" 2011-04-13T08:30:00.999 ", SECONDS),
        ("2011-04-13T08:30:00Z", SECONDS),
        ("2011-04-13 08:30:00 UTC", SECONDS),
        ("2011-04-13T09:30:00+01:00", SECONDS),
        ("2011-04-13T03:00:00-0530", SECONDS),
        ("2011-04-13T10:30:00,5+02", SECONDS),
        ("1969-12-31T23:59:59Z", -1),
        ("2012-02-29", 1330473600),
        (str(SECONDS), SECONDS),
        (f"{SECONDS}.75", SECONDS),
        (f"{SECONDS}000", SECONDS),
        (f"{SECONDS}000000", SECONDS),
        (f"{SECONDS}000000000", SECONDS),
        ("-1", -1),
    ],
)
def test_a_time_as_text(text, seconds):
    assert parse([text])[0] == [seconds]


def test_forms_may_be_mixed_and_are_counted():
    values = ["2011-04-13", str(SECONDS), "2011-04-13T08:30:00Z", "2011-04-13 08:30", f"{SECONDS}000", "2011-04-13"]
    assert parse(values) == (
        [MIDNIGHT, SECONDS, SECONDS, SECONDS, SECONDS, MIDNIGHT],
        {
            "epoch seconds": 1,
            "epoch milliseconds": 1,
            "ISO dates": 2,
            "ISO times without a zone": 1,
            "ISO times with a zone": 1,
        },
    )


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (SECONDS, pyarrow.int32()),
        (SECONDS * 1000, pyarrow.int64()),
        (SECONDS + 0.9, pyarrow.float64()),
        (datetime(2011, 4, 13, 8, 30, 0, 999), pyarrow.timestamp("us")),
        (datetime(2011, 4, 13, 8, 30), pyarrow.timestamp("s")),
        (SECONDS * 10**9 + 1, pyarrow.timestamp("ns")),
        (datetime(2011, 4, 13, 8, 30, tzinfo=UTC), pyarrow.timestamp("ms", tz="Europe/Berlin")),
    ],
)
def test_a_time_as_a_number_or_of_its_own_type(value, kind):
    assert parse([value], kind)[0] == [SECONDS]


def test_a_date_of_its_own_type():
    assert parse([date(2011, 4, 13)])[0] == [MIDNIGHT]


def test_time_before_1970_is_rounded_down():
    assert parse([datetime(1969, 12, 31, 23, 59, 59, 500)])[0] == [-1]


@given(st.lists(st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)), min_size=1, max_size=5), st.timezones())
def test_iso_times_are_those_of_datetime(times, zone):
    aware = [time.replace(tzinfo=zone, microsecond=0) for time in times]
    aware = [time for time in aware if time.utcoffset().total_seconds() % 60 == 0]  # old local mean times have seconds
    texts = [time.isoformat() for time in aware] + [time.isoformat(" ") for time in times]
    expected = [*aware, *(time.replace(tzinfo=UTC) for time in times)]
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert parse(texts)[0] == [int((time.replace(microsecond=0) - epoch).total_seconds()) for time in expected]


@pytest.mark.parametrize("text", ["03/04/2011", "3.4.2011 10:00", "03-04-11"])
def test_day_or_month_first_is_refused(text):
    refuse(
        "a.csv: column 'time': row 2: must be a time (2 rows are not), got "
        f"'{text}', which names the day or the month first. ",
        ["2011-04-13", text, text],
    )


@pytest.mark.parametrize(
    "text",
    [
        "13/04/2011",
        "yesterday",
        "2011-02-29",
        "2011-13-01",
        "2011-00-01",
        "2011-04-31",
        "2011-04-13 24:00",
        "2011-04-13 23:60",
        "2011-04-13T08:30+15:00",
        "2011-04-13 08:30 PM",
        "20110413T083000Z",
    ],
)
def test_what_is_no_time_is_refused(text):
    refuse(f"row 3: must be a time (1 rows are not), got '{text}'. ", ["2011-04-13", "17", text])


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.int64()])
def test_dates_written_as_numbers_are_refused(kind):
    values = [20110413, 20111231]
    got = "row 1: must be a time of one meaning, got 20110413, which may be a date or seconds since 1970. "
    refuse(got, list(map(str, values)) if kind == pyarrow.string() else values, kind)
    assert parse([20110413, 20111232])[0] == [20110413, 20111232]  # no day 32: seconds


def test_numbers_that_are_no_time():
    refuse("row 2: must be a time, got no finite number. ", [1.0, float("nan")])
    refuse("must be times, got a number above 2^63. ", ["9999999999999999999"])
    refuse("must hold times, got bool. ", [True])
