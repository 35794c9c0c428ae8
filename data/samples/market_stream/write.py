"""Writes stream.jsonl: clauses written by hand, drawn and combined with a fixed seed.

    python data/samples/market_stream/write.py

Every head tells its topic and its tone by itself; a tail of the same topic and tone follows. Nothing here is news.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from pathlib import Path
from typing import Any

SEED = 20250901
START, DAYS = datetime(2025, 9, 1, tzinfo=UTC), 42
ITEMS_A_DAY = 11
"""Of each topic, on average."""
SHARES = {"negative": 0.25, "neutral": 0.4, "positive": 0.35}
SURGE = {"topic": "legal", "days": range(24, 32), "shares": {"negative": 0.7, "neutral": 0.2, "positive": 0.1}}
"""Worse news, and no more of it than before."""
BURST = {"topic": "earnings", "days": range(35, 38), "times": 4}
"""More news, and no worse than before."""
COPIES, LATE, TOO_LATE = 45, 55, 8
"""Repeated by another wire; hours late; days late."""

COMPANIES = {
    **{"Hartwick Stores": "HWK", "Kaufwelle": "KWLE", "Brakelund": "BKLD", "Veltrano": "VLTR", "Grocello": "GRCL"},
    **{"Stromwerk Elbe": "SWEL", "Tirevia": "TRVA", "Lindqvale Home": "LQVH", "Severnbrook Water": "SVBW"},
    **{"Drakensund Energy": "DKSE", "Jetara": "JTRA", "Pannonia Foods": "PNFD", "Brewmont": "BRMT", "Zapateo": "ZPTO"},
    **{"Castano Trucks": "CSTT", "Gearwright": "GRWT", "Modavera": "MDVR", "Solquora": "SLQR", "Genovique": "GNVQ"},
    **{"Ostravia": "OSTV", "Brightwire Media": "BWMD", "Telverra": "TLVR", "Oatfield Dairy": "OATD"},
    **{"Mikawa Wafer": "MKWF", "Cordalis": "CDLH", "Ferrovale": "FRVL", "Ondara": "ODRA", "Castellio": "CSTL"},
    **{"Heliotessa": "HLTS", "Norrvind": "NRVD", "Alumarra": "ALMR", "Petrolane Iberica": "PTLI"},
}
SOURCES = ("Norden Wire", "Harbour News", "City Tape", "Kontor Daily", "Rialto Markets")
CITIES = ("Lyon", "Vienna", "Porto", "Oslo", "Leeds", "Turin", "Ghent", "Aarhus", "Bremen", "Zaragoza")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
MONTHS = ("October", "November", "December", "January", "February")

# topic -> tone -> heads, tails
CLAUSES: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "earnings": {
        "negative": (
            [
                "{c} swings to a quarterly loss of {m}",
                "{c} misses profit estimates for the {o} quarter running",
                "{q} sales at {c} fall {p}, worse than any analyst had pencilled in",
                "{c} earns {p} less than a year ago",
                "Operating profit of {c} more than halves to {m}",
                "{c} books a writedown of {m} on last year's purchase",
                "Margins at {c} shrink for the {o} time in a row",
                "{c}'s {q} orders dry up, down {p}",
                "Costs eat up the sales growth of {c}, net profit down {p}",
            ],
            [
                " as customers hold back",
                ", blaming wages and freight",
                " and the finance chief sees no quick relief",
                ", shares mark their low of the year",
                " after its biggest market stalled",
                "; every division did worse",
                " as discounts failed to clear the shelves",
                ", far from what had been hoped for in spring",
            ],
        ),
        "neutral": (
            [
                "{c} reports {q} results on {d}",
                "{c} sales flat at {m}",
                "{q} profit of {c} in line with forecasts at {m}",
                "{c} publishes the consensus ahead of its {q} figures",
                "{c} moves its results date to {d}",
                "Revenue of {c} comes to {m}, as it said last month",
                "{c} restates {q} segments, group profit unchanged",
                "{c} to hold its earnings call on {d} in {city}",
                "Half-year accounts of {c} go to shareholders by {d}",
            ],
            [
                ", its website shows",
                ", as usual before the market opens",
                ", a spokesperson said",
                " and leaves its calendar otherwise as it was",
                ", in line with past years",
                "; a webcast will follow",
                ", according to a notice to the exchange",
                ", without further comment",
            ],
        ),
        "positive": (
            [
                "{c} lifts quarterly profit by {p}",
                "{c} beats every estimate with {q} profit of {m}",
                "{q} sales at {c} jump {p}",
                "{c} returns to profit, {m} against a loss a year ago",
                "Record {q} for {c}: operating profit reaches {m}",
                "Margins at {c} widen for the {o} quarter in a row",
                "{c}'s order book grows {p}, fuller than ever",
                "{c} earns {m}, more than the most hopeful analyst thought",
                "Cost cuts pay off at {c}, profit up {p}",
            ],
            [
                ", shares jump at the open",
                " as demand holds up in every region",
                " and hires again",
                ", helped by cheaper energy",
                "; the chief executive calls the quarter the best in years",
                " as customers return",
                ", well ahead of its rivals",
                " and rewards its staff",
            ],
        ),
    },
    "debt": {
        "negative": (
            [
                "{c} asks lenders for more time to repay {m}",
                "{c} breaches a covenant on its loan of {m}",
                "Ratings agency cuts the debt of {c} to junk",
                "{c} fails to place its bond of {m}",
                "{c} skips a coupon on its {y} notes",
                "Bonds of {c} plunge {n} cents on worries about its cash",
                "{c} has cash for only {n} more months, auditors warn",
                "Banks refuse to renew the credit line of {c}",
                "{c} pays a punishing rate on its new loan of {m}",
            ],
            [
                " and talks with creditors drag on",
                ", raising fears of a default",
                " after its cash flow turned negative",
                "; suppliers demand cash up front",
                ", the second setback for bondholders this year",
                " as its banks lose patience",
                ", and the rescue plan is in doubt",
                " despite the sale of its best unit",
            ],
        ),
        "neutral": (
            [
                "{c} mandates banks for a bond of {m}",
                "{c} repays its {y} notes at maturity as planned",
                "{c} prices a {n}-year bond within the guided range",
                "Ratings agency affirms the debt of {c}, outlook stable",
                "{c} renews its commercial paper programme of {m}",
                "{c} to meet bond investors in {city} on {d}",
                "{c} swaps {m} of floating debt into fixed",
                "{c} lists its {y} notes in {city}",
            ],
            [
                ", the term sheet shows",
                ", as announced in spring",
                "; terms are unchanged",
                ", subject to market conditions",
                ", the treasurer said",
                ", for general corporate purposes",
                " under its existing programme",
                ", banks said",
            ],
        ),
        "positive": (
            [
                "{c} repays a loan of {m} ahead of schedule",
                "Ratings agency lifts the debt of {c} to investment grade",
                "{c}'s bond of {m} is {n} times oversubscribed",
                "{c} cuts its interest bill by {p}",
                "Lenders waive the covenant, {c} is out of the woods",
                "{c} is free of net debt for the first time in {n} years",
                "{c} refinances {m} at much better terms",
                "Bonds of {c} rally after a surprise upgrade",
            ],
            [
                ", giving it room to invest",
                " and lifts its liquidity to a record",
                "; creditors applaud",
                " as cash flow improves faster than planned",
                ", default fears fade",
                ", thanks to a good price for its warehouses",
                " and the outlook is positive",
                ", well before its banks had asked for it",
            ],
        ),
    },
    "legal": {
        "negative": (
            [
                "Prosecutors search the offices of {c}",
                "{c} is fined {m} for price fixing",
                "Court orders {c} to pay {m} in damages",
                "Regulator opens an inquiry into the accounts of {c}",
                "{c} loses its patent case against a rival",
                "Shareholders sue {c} for {m}",
                "Tax office demands {m} from {c} and threatens to sue",
                "Judge bars {c} from selling its main line in {city}",
                "Former managers of {c} are charged with fraud",
                "Cartel office threatens {c} with a fine of {m}",
            ],
            [
                " over invoices from {city}",
                ", a bigger blow than expected",
                " and the shares tumble",
                "; it may have to set aside more",
                " after a whistleblower came forward",
                " in a case that has hung over it for years",
                ", and further claims are piling up",
                " as the scandal widens",
            ],
        ),
        "neutral": (
            [
                "{c} and a former distributor go to arbitration in {city}",
                "Court sets {d} for the hearing of {c}",
                "Regulator extends its routine review of {c} to {month}",
                "{c} files for renewal of its licence in {city}",
                "Court adjourns the case of {c} to {month}",
                "{c} adapts its contracts to the new data-protection law",
                "Judges hear both sides in the patent case of {c}",
                "{c} answers the regulator's questionnaire on fees",
            ],
            [
                ", the court calendar shows",
                ", as both sides had agreed",
                "; no ruling is due this year",
                ", a formality",
                ", lawyers said",
                " along with {n} other firms",
                ", and no date for a ruling was set",
                " as the rules require",
            ],
        ),
        "positive": (
            [
                "Court throws out the suit against {c}",
                "{c} wins its patent case and is awarded {m}",
                "Regulator closes its inquiry into {c} without charges",
                "{c} settles the lawsuit for {m}, far less than feared",
                "Judges lift the sales ban on {c} in {city}",
                "Appeal court cancels the fine of {m} for {c}",
                "{c} gets the all-clear from the cartel office",
                "Tax office drops its claim of {m} against {c}",
            ],
            [
                ", ending years of doubt",
                " and the shares leap",
                "; money set aside for it can be released",
                ", sooner than its lawyers had hoped",
                ", clearing the way for expansion",
                " in a complete victory",
                ", a relief for shareholders",
                " and its costs are refunded",
            ],
        ),
    },
    "product": {
        "negative": (
            [
                "{c} recalls {k} units over a fire risk",
                "{c} delays the launch of its new line by {n} months",
                "{c} scraps its most promising project after failed tests",
                "Fault stops the production lines of {c} in {city}",
                "Customers of {c} report outages for the {o} day",
                "{c}'s new model flops, {k} stand unsold",
                "Testers give the latest product of {c} the worst grade",
                "{c} halts sales of its bestseller on safety doubts",
            ],
            [
                ", repairs will take weeks",
                " and angry customers want their money back",
                "; retailers clear their shelves of it",
                " after injuries were reported",
                ", a gift to its rivals",
                " and nobody can say when it will end",
                ", the third mishap this year",
                " as quality problems mount",
            ],
        ),
        "neutral": (
            [
                "{c} shows a prototype at the {city} trade fair",
                "{c} updates its catalogue for {month}",
                "{c} renames its smallest product line",
                "{c} adds {n} colours to its range",
                "{c} to present its winter range on {d}",
                "{c} starts a product trial with {k} testers in {city}",
                "{c} changes the packaging of its main line",
                "{c} adds {city} to the towns where its app works",
            ],
            [
                ", prices stay as they are",
                "; a decision on series production is open",
                ", as announced in June",
                ", the company said",
                ", no sales target was given",
                " with delivery from {month}",
                ", like every year",
                ", its shops were told",
            ],
        ),
        "positive": (
            [
                "{c}'s new line sells out within {n} days",
                "Approval comes early for the new product of {c}",
                "{c} lands an order for {k} units, its largest ever",
                "{c} launches its new model in {city} ahead of schedule",
                "Testers name {c}'s latest product the best of the year",
                "{c} doubles output to meet demand for its bestseller",
                "Product trial of {c} meets every goal",
                "Waiting list for {c}'s new model reaches {k}",
            ],
            [
                ", and more is on its way",
                "; retailers ask for more",
                ", leaving rivals behind",
                " and raises its sales target",
                " after glowing reviews",
                ", a year sooner than planned",
                " as customers queue",
                ", its biggest success so far",
            ],
        ),
    },
}


class Writer:
    """Draws texts that differ: no pair of head and tail returns before all of its kind were used."""

    def __init__(self, random_source: random.Random) -> None:
        self.random = random_source
        self.pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
        self.seen: set[str] = set()

    def write(self, topic: str, tone: str) -> tuple[str, str]:
        """A text, and the ticker of its company."""
        left = self.pairs.setdefault((topic, tone), [])
        if not left:
            left.extend(product(*CLAUSES[topic][tone]))
            self.random.shuffle(left)
        pattern = "".join(left.pop())
        while True:
            company, ticker = self.random.choice(list(COMPANIES.items()))
            text = pattern.format(c=self._name(company, ticker), **self._draw_figures())
            if text not in self.seen:
                self.seen.add(text)
                return text[0].upper() + text[1:], ticker

    def _name(self, company: str, ticker: str) -> str:
        return self.random.choices([company, f"${ticker}", f"{company} ({ticker})"], [8, 2, 1])[0]

    def _draw_figures(self) -> dict[str, Any]:
        pick, whole = self.random.choice, self.random.randint
        money = pick(["{} mln euros", "EUR {} mln", "{} million", "${}m"]).format(whole(12, 940))
        return {
            "m": money,
            "p": f"{whole(6, 48)}{pick(['%', ' %', ' pct', ' percent'])}",
            "q": pick(["Q2", "Q3", "third-quarter", "summer"]),
            "o": pick(["second", "third", "fourth", "fifth"]),
            "n": whole(3, 12),
            "k": f"{whole(2, 96)},{whole(0, 9)}00",
            "y": whole(2026, 2033),
            "d": pick(WEEKDAYS),
            "city": pick(CITIES),
            "month": pick(MONTHS),
        }


def draw_items(source: random.Random) -> Iterator[tuple[datetime, dict[str, Any]]]:
    """Every item once, with the moment of its arrival."""
    writer = Writer(source)
    for day, topic in product(range(DAYS), CLAUSES):
        shares = SURGE["shares"] if topic == SURGE["topic"] and day in SURGE["days"] else SHARES
        times = BURST["times"] if topic == BURST["topic"] and day in BURST["days"] else 1
        for _ in range(times * ITEMS_A_DAY + source.randint(-3, 3)):
            tone = source.choices(list(shares), list(shares.values()))[0]
            text, ticker = writer.write(topic, tone)
            moment = START + timedelta(days=day, minutes=source.randint(0, 24 * 60 - 1))
            item = {"time": moment, "text": text, "source": source.choice(SOURCES), "ticker": ticker}
            yield (
                moment + timedelta(minutes=source.randint(0, 9)),
                item | {"labels": {"sentiment": tone, "topic": topic}},
            )


def copy_item(source: random.Random, arrival: datetime, item: dict[str, Any]) -> tuple[datetime, dict[str, Any]]:
    """The same story on another wire, some minutes later."""
    delay = timedelta(minutes=source.randint(2, 50))
    other = source.choice([name for name in SOURCES if name != item["source"]])
    text = source.choice(["RPT-{}", "UPDATE 1-{}", "{} - {other}", "{} (repeats)"]).format(item["text"], other=other)
    return arrival + delay, item | {"time": item["time"] + delay, "text": text, "source": other}


def build_stream() -> list[dict[str, Any]]:
    """The items as they arrive."""
    source = random.Random(SEED)
    arrivals = list(draw_items(source))
    arrivals += [copy_item(source, *arrivals[i]) for i in source.sample(range(len(arrivals)), COPIES)]
    delayed = source.sample(range(len(arrivals)), LATE + TOO_LATE)
    for place, i in enumerate(delayed):
        hours = source.randint(1, 9) if place < LATE else source.randint(60, 90)
        arrivals[i] = (arrivals[i][0] + timedelta(hours=hours), arrivals[i][1])
    arrivals.sort(key=lambda pair: pair[0])
    return [name_item(number, item) for number, (_, item) in enumerate(arrivals, start=1)]


def name_item(number: int, item: dict[str, Any]) -> dict[str, Any]:
    """With an id, a link, and the time as its source writes it: one of them uses its own zone."""
    zone = timezone(timedelta(hours=2)) if item["source"] == "Kontor Daily" else UTC
    time = item["time"].astimezone(zone).isoformat().replace("+00:00", "Z")
    name = f"ms-{number:04d}"
    return {"id": name} | item | {"time": time, "link": f"https://news.example/{name}"}


if __name__ == "__main__":
    path = Path(__file__).with_name("stream.jsonl")
    path.write_text("".join(json.dumps(item) + "\n" for item in build_stream()), encoding="utf-8")
