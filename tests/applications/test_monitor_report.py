"""The monitor's page: its words, its charts, and that nothing in a stream can act on it."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest

from finetune.applications.monitor.charts import MAX_POINTS, describe_window, topic_chart
from finetune.applications.monitor.items import check_link
from finetune.applications.monitor.records import Alert, Share, Tally
from finetune.applications.monitor.report import (
    describe_alert,
    describe_length,
    describe_state,
    render_report,
    write_report,
)
from finetune.applications.monitor.store import Store, WindowRecord
from finetune.recipe.applications import MonitorSection

START, DAY = datetime(2025, 9, 1, tzinfo=UTC), timedelta(days=1)
EVIL = "<script>alert(1)</script> & 'co' \" {{ 7 * 7 }}"
SECTION = MonitorSection(window_minutes=1440)


def make_share(value: float, items: int = 20, width: float = 0.1) -> Share:
    return Share(value, max(0.0, value - width), min(1.0, value + width), value, value / 2 + 0.2, items)


def make_windows(*shares: float | None, topic: str = "legal", step: timedelta = DAY) -> list[WindowRecord]:
    """One a step; None is a window without items."""
    return [
        WindowRecord(
            topic, START + i * step, START + (i + 1) * step, make_share(share or 0.0), 0, 20 * (share is not None), True
        )
        for i, share in enumerate(shares)
    ]


def make_alert(day: int = 2, level: str = "alarm", cause: str = "share", topic: str = "legal", items=()) -> Alert:
    start = START + day * DAY
    shares, test = (make_share(0.25), make_share(0.7)), "burst" if cause == "volume" else "cusum"
    return Alert(f"{topic}-{day}", topic, cause, level, start, start + DAY, *shares, 4.25, 20, test, 6.234, 4.1, items)


def make_item(**changes) -> dict:
    item = {"id": "a-1", "time": "2025-09-03T10:20:00+00:00", "text": "Court fines Brakelund", "negative": 0.987}
    return item | {"link": "https://news.example/a-1", "source": "City Tape", "ticker": "BKLD"} | changes


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "state.db") as store:
        yield store


def fill(store, windows=(), alerts=()) -> None:
    with store.transaction():
        for one in windows:
            start, end = (int(time.timestamp()) for time in (one.start, one.end))
            tally = Tally()
            tally.bins[0] = one.total
            store.save_window(start, end, one.topic, one.share, tally, is_closed=one.is_closed)
        for alert in alerts:
            store.add_alert(alert, [])


def read_text(page: str) -> str:
    """What the page says, without its style."""
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)).split())


def test_the_page_says_what_the_store_holds(store, tmp_path):
    quiet = make_windows(0.2, 0.2, 0.2, 0.2, topic="<debt>")
    fill(store, [*make_windows(0.25, 0.3, 0.7, 0.6), *quiet], [make_alert(items=(make_item(),))])
    with store.transaction():
        store.count("items", 1160)
        store.count("repeats", 45)
        store.count("late", 8)
        store.add_rejection("no time", f"stream.jsonl: line 3: time must be there, got {EVIL}.")
    write_report(store, SECTION, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = read_text(page)
    assert "More of the news than usual is negative: legal (70%, usually 25%)." in text
    assert "legal: worse news" in text
    assert "The negative share rose from 25% (15% to 35%) to 70% (60% to 80%). The window has 20 items; 4.2" in text
    assert "3 September 2025; CUSUM 6.23, threshold 4.10" in text
    assert "99% negative City Tape 3 September 2025, 10:20 a-1" in text
    assert "1 September 2025 to 5 September 2025 UTC" in text
    assert "One window is 1 day." in text
    assert "Counted items of a window 1,160" in text
    assert "Repeated the id or the text of an item that came before 45" in text
    assert "Late for a window that was closed already 8" in text
    assert "Rejected no time 1" in text
    assert '<a href="https://news.example/a-1" rel="noopener noreferrer">Court fines Brakelund</a>' in page


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, ""),
        (1, "The last window is not judged yet: it may still take items."),
        (2, "The last 2 windows are not judged yet: they may still take items."),
    ],
)
def test_what_is_not_judged_yet_is_said(store, number, said):
    shares = [0.25] * 4
    windows = [*make_windows(*shares), *make_windows(*shares, topic="debt")]
    fill(store, [replace(one, is_closed=one.start < START + (4 - number) * DAY) for one in windows])
    text = read_text(render_report(store, SECTION))
    assert said in text
    assert ("not judged" in text) == bool(number)


def test_nothing_in_a_stream_acts_on_the_page(store):
    links = ["javascript:alert(1)", " JAVASCRIPT:alert(1)", "data:text/html,x", '" onclick="alert(1)', "//evil.example"]
    items = [make_item(text=EVIL, source=EVIL, id=EVIL, link=link) for link in links]
    windows = [*make_windows(0.2, 0.7, topic=EVIL)]
    fill(store, windows, [make_alert(1, topic=EVIL, items=tuple(items))])
    with store.transaction():
        store.add_rejection("no JSON", EVIL)
    page = render_report(store, SECTION)
    assert "<script" not in page
    assert "<a " not in page
    assert "49" not in read_text(page)
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3 * len(links)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "src=" not in page
    assert "url(" not in page


@pytest.mark.parametrize("link", ["https://a.example/x", "HTTP://a.example"])
def test_an_address_of_the_web_is_a_link(link):
    assert check_link(link) == link


@pytest.mark.parametrize("link", ["javascript:alert(1)", "ftp://a.example", "", None, 7, "\njavascript:x", "/etc"])
def test_anything_else_is_none(link):
    assert check_link(link) is None


def test_the_first_sentence_is_about_now():
    windows = make_windows(0.2, 0.2)
    assert describe_state(windows, []) == "Nothing unusual in 40 items."
    volume = make_alert(1, cause="volume", topic="earnings")
    assert describe_state(windows, [volume]) == "There is more news than usual, but no worse: earnings."
    over = [make_alert(1), make_alert(3, level="recovery")]
    assert describe_state(windows, over) == "All is as usual again; 2 alerts in 40 items."
    both = [*over, make_alert(1, topic="debt"), make_alert(2, topic="macro"), volume]
    expected = "More of the news than usual is negative: debt (70%, usually 25%) and macro (70%, usually 25%)."
    assert describe_state(windows, both) == expected
    assert describe_state([], []) == "Nothing unusual in 0 items."


def test_more_news_is_told_from_worse_news_and_from_the_end_of_both():
    told = [
        describe_alert(make_alert(level=level, cause=cause, items=(make_item(),)))
        for cause in ("share", "volume")
        for level in ("warning", "recovery")
    ]
    assert [one["title"] for one in told] == [
        "legal: worse news",
        "legal: as negative as usual again",
        "legal: more news",
        "legal: as much news as usual again",
    ]
    assert [one["state"] for one in told] == ["care", "good"] * 2
    assert [len(one["items"]) for one in told] == [1, 0] * 2
    assert told[0]["words"].startswith("The negative share rose from 25% (15% to 35%) to 70% (60% to 80%).")
    assert told[1]["words"].startswith("The negative share is 70% (60% to 80%); 25% (15% to 35%) is usual.")
    assert told[2]["words"].startswith("The window has 20 items; 4.2 are usual. The negative share is 70%")
    assert told[2]["test"] == "burst test 6.23, threshold 4.10"


def test_no_number_is_made_up_where_there_are_no_items_and_no_test():
    none = make_share(0.33, items=0)
    for cause in ("share", "volume"):
        over = replace(make_alert(level="recovery", cause=cause), after=none, volume_after=0)
        assert describe_alert(over)["words"] == "The window has 0 items; 4.2 are usual."
    first = replace(make_alert(cause="volume"), before=none)
    assert describe_alert(first)["words"].endswith("4.2 are usual. The negative share is 70% (60% to 80%).")
    renewed = describe_alert(replace(make_alert(level="recovery"), test="reference"))
    assert (renewed["title"], renewed["test"]) == ("legal: what was unusual is usual now", "")


def test_an_empty_store_is_a_page(store):
    text = read_text(render_report(store, SECTION))
    assert "No window yet" in text
    assert "No test exceeded its threshold." in text


def test_a_topic_with_few_items_has_no_chart(store):
    few = make_windows(*[None] * 9, 0.5, topic="macro")
    fill(store, [*make_windows(*[0.2] * 10), *[one for one in few if one.total == 0], few[-1]])
    with store.transaction():
        tally = Tally()
        tally.bins[0] = 19
        last = few[-1]
        times = (int(last.start.timestamp()), int(last.end.timestamp()))
        store.save_window(*times, "macro", last.share, tally, is_closed=True)
    page = render_report(store, SECTION)
    assert page.count('<svg class="chart"') == 1
    assert "Too few items for a chart: macro (19)." in read_text(page)


def list_parts(windows, alerts=()) -> ElementTree.Element:
    return ElementTree.fromstring(str(topic_chart(windows, alerts, "a topic")))


def read_path(root: ElementTree.Element, look: str) -> list[list[tuple[float, float]]]:
    paths = [path.attrib["d"] for path in root.iter("path") if path.attrib["class"] == look]
    return [[tuple(map(float, pair.split())) for pair in re.split("[MLZ]", path) if pair] for path in paths]


def test_the_line_has_the_share_at_the_height_of_each_window():
    (line,) = read_path(list_parts(make_windows(0.25, 0.5, 1.0, 0.0)), "curve")
    heights = [150 * (1 - share) for share in (0.25, 0.5, 1.0, 0.0)]
    assert line == [(250 * (i + edge), heights[i]) for i in range(4) for edge in (0, 1)]
    (band,) = read_path(list_parts(make_windows(0.25, 0.5)), "band")
    assert band[0] == (0.0, pytest.approx(150 * 0.65, abs=0.1))
    assert band[-1] == (0.0, pytest.approx(150 * 0.85, abs=0.1))


def test_windows_without_items_leave_a_gap():
    root = list_parts(make_windows(0.2, None, 0.4, 0.4))
    assert [len(line) for line in read_path(root, "curve")] == [2, 4]
    tall = [float(bar.attrib["height"]) for bar in root.iter("rect") if bar.attrib["class"] == "count"]
    assert tall == [44.0, 0.0, 44.0, 44.0]


def test_many_windows_are_put_together():
    windows = make_windows(*[0.2, 0.4] * MAX_POINTS, step=timedelta(hours=1))
    ((*line,),) = read_path(list_parts(windows), "curve")
    assert len(line) == 2 * MAX_POINTS
    assert {round(height, 1) for _, height in line} == {105.0}


def test_alerts_stand_at_their_windows():
    alerts = [
        make_alert(1, "warning"),
        make_alert(1, "alarm"),
        make_alert(3, "recovery"),
        make_alert(2, cause="volume"),
    ]
    root = list_parts(make_windows(0.2, 0.7, 0.7, 0.2), alerts)
    marks = {(line.attrib["class"], line.attrib["x1"]) for line in root.iter("line") if "at " in line.attrib["class"]}
    assert marks == {
        ("at warning", "37.50%"),
        ("at alarm", "37.50%"),
        ("at recovery", "87.50%"),
        ("at alarm", "62.50%"),
    }
    titles = [title.text for title in root.iter("title")]
    assert "2 September 2025: alarm, share" in titles
    assert "2 September 2025: 20 items, 70% negative (60% to 80%); 55% counted" in titles


def test_times_are_said_as_short_as_they_can_be():
    assert describe_window(START, START + DAY) == "1 September 2025"
    hour = START + timedelta(hours=9)
    assert describe_window(hour, hour + timedelta(hours=1)) == "1 September 2025, 09:00 to 10:00 UTC"
    assert describe_window(START, START + 7 * DAY) == "1 September 2025 to 8 September 2025 UTC"
    assert [describe_length(minutes) for minutes in (1440, 2880, 60, 90)] == ["1 day", "2 days", "1 hour", "90 minutes"]
