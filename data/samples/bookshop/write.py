"""Writes events.csv: simulated people who look at, and sometimes buy, the books of items.csv; drawn with a fixed seed.

    python data/samples/bookshop/write.py

A theme is what the first tag of a book names; its books stand in items.csv in the order in which they are read, and its
last one comes out while people are watched. Nobody here is real.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED = 20250106
START, DAYS = datetime(2025, 1, 6, tzinfo=UTC), 300
PEOPLE = 400
LATE, LATE_DAYS = 20, (246, 284)
"""How many books come out in the last fifth, and on which days; the last books of other themes come out earlier."""
NOISE = 0.15
"""Share of choices that have nothing to do with the person, only with what is popular at the time."""
FOLLOWS = {"series": 0.62, "theme": 0.25}
"""How likely the next book of a series, or of a theme, is taken right after the one before it."""
ZIPF = 1.1
"""Popularity falls with a book's rank to this power; ranks shift every `SHIFT` days."""
SHIFT = 30
NEW, NEW_DAYS = 8.0, 40
"""How much more a new book draws those who like its theme, and for how long."""
LIKED = 4.0
"""How much more a book draws for each of its other tags that the person likes."""
EARLY = 0.2
"""How much less a book of a series draws those who have not read the one before it."""
DRIFT = 0.12
"""How likely one of a person's themes gives way after a choice."""
THEMES = 3
"""Themes that hold a person's interest at one time."""
ONCE, MANY = 14, 150
"""People with 1 or 2 choices; the choices of the one with most."""
BASKET, BUY, LATER = 0.4, 0.6, 0.12
"""How likely a look ends in the basket; that, in a purchase; and what was not bought is bought on another day."""
OUTSIDE = 0.25
"""How much less likely the first and the last of these are outside the person's themes."""
WEIGHTS = {"view": 1, "basket": 2, "buy": 4}


@dataclass(frozen=True)
class Shop:
    """The books as numpy arrays; B books, T themes."""

    ids: tuple[str, ...]
    theme: NDArray[np.int64]  # (B,)
    is_series: NDArray[np.bool_]  # (B,)
    tags: tuple[frozenset[str], ...]  # without the theme
    links: NDArray[np.float64]  # (T, T): where the interest in a theme drifts to
    released: NDArray[np.float64]  # (B,) days; below 0 where a book was there before
    popularity: NDArray[np.float64]  # (DAYS / SHIFT, B)


@dataclass
class Person:
    """What one person likes, and has taken."""

    name: str
    themes: list[int]
    liked: frozenset[str]
    taken: list[int] = field(default_factory=list)


class Draws:
    """All chance comes from `Generator.random`, so that another version of NumPy writes the same file."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def share(self) -> float:
        """In [0, 1)."""
        return float(self.generator.random())

    def between(self, low: float, high: float) -> float:
        """In [low, high)."""
        return low + (high - low) * self.share()

    def pick(self, weights: NDArray[np.float64]) -> int:
        """A position, as likely as its weight is large."""
        ends = np.cumsum(weights)
        return int(np.searchsorted(ends, self.share() * ends[-1], side="right"))

    def order(self, count: int) -> NDArray[np.int64]:
        """The numbers below `count`, shuffled."""
        return np.argsort(self.generator.random(count), kind="stable")


def build_shop(path: Path, draws: Draws) -> Shop:
    """Read items.csv, and draw when books come out and how popular they are."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    tags = [row["tags"].split("; ") for row in rows]
    names = list(dict.fromkeys(own[0] for own in tags))
    theme = np.array([names.index(own[0]) for own in tags])
    return Shop(
        ids=tuple(row["item"] for row in rows),
        theme=theme,
        is_series=np.array([row["title"].endswith(")") for row in rows]),
        tags=tuple(frozenset(own[1:]) for own in tags),
        links=link_themes(theme, [row["category"] for row in rows], tags, draws),
        released=draw_releases(theme, draws),
        popularity=draw_popularity(len(rows), draws),
    )


def link_themes(
    theme: NDArray[np.int64], categories: list[str], tags: list[list[str]], draws: Draws
) -> NDArray[np.float64]:
    """Themes of one category, and those whose books share a tag, are near; one, near or not, mostly comes next."""
    count = int(theme.max()) + 1
    groups = [np.flatnonzero(theme == number) for number in range(count)]
    words = [frozenset(tag for book in books for tag in tags[book]) for books in groups]
    links = np.full((count, count), 0.05)
    for one in range(count):
        for other in range(count):
            same = categories[groups[one][0]] == categories[groups[other][0]]
            links[one, other] += 1.0 * same + 0.5 * len(words[one] & words[other])
    np.fill_diagonal(links, 0)
    for one in range(count):
        links[one, draws.pick(np.where(np.arange(count) == one, 0.0, 1.0))] += 10
    return links


def draw_releases(theme: NDArray[np.int64], draws: Draws) -> NDArray[np.float64]:
    """(B,) days after the start."""
    released = np.full(len(theme), -1.0)
    lasts = [int(np.flatnonzero(theme == number)[-1]) for number in range(int(theme.max()) + 1)]
    for place, number in enumerate(draws.order(len(lasts))):
        released[lasts[number]] = draws.between(*LATE_DAYS) if place < LATE else draws.between(5, 0.75 * DAYS)
    return released


def draw_popularity(books: int, draws: Draws) -> NDArray[np.float64]:
    """(DAYS / SHIFT, B): Zipf's law over ranks that wander."""
    score = draws.generator.random(books)
    months = []
    for _ in range(DAYS // SHIFT):
        rank = np.argsort(np.argsort(-score, kind="stable"), kind="stable")
        months.append(1 / (rank + 1.0) ** ZIPF)
        score = 0.75 * score + 0.25 * draws.generator.random(books)
    return np.array(months)


def choose_book(shop: Shop, person: Person, day: float, draws: Draws) -> int | None:
    """The next book that a person looks at; None when the themes of the moment have none left."""
    free = shop.released <= day
    free[person.taken] = False
    popularity = np.where(free, shop.popularity[int(day) // SHIFT], 0.0)
    if draws.share() < NOISE:
        return draws.pick(popularity)
    if person.taken:
        last = person.taken[-1]
        following = last + 1
        is_next = following < len(free) and shop.theme[following] == shop.theme[last] and free[following]
        if is_next and draws.share() < FOLLOWS["series" if shop.is_series[last] else "theme"]:
            return following
    drift(shop, person, popularity, draws)
    near = np.isin(shop.theme, person.themes) & free
    return draws.pick(popularity * near * weigh_taste(shop, person, day)) if near.any() else None


def weigh_taste(shop: Shop, person: Person, day: float) -> NDArray[np.float64]:
    """(B,) how much more or less than others a person is drawn to each book of a theme."""
    liking = np.array([LIKED ** len(person.liked & own) for own in shop.tags])
    is_new = (shop.released >= 0) & (shop.released > day - NEW_DAYS)
    has_before = shop.is_series & np.append(False, shop.theme[1:] == shop.theme[:-1])
    is_early = has_before & ~np.isin(np.arange(len(shop.ids)) - 1, person.taken)
    return liking * np.where(is_new, NEW, 1.0) * np.where(is_early, EARLY, 1.0)


def drift(shop: Shop, person: Person, popularity: NDArray[np.float64], draws: Draws) -> None:
    """A theme with no book left gives way to one that is near it and popular; so does another, now and then."""
    by_theme = np.bincount(shop.theme, weights=popularity)  # (T,)
    for place, theme in enumerate(person.themes):
        if by_theme[theme] == 0 or draws.share() < DRIFT / THEMES:
            person.themes[place] = draws.pick(shop.links[theme] * np.sqrt(by_theme))


def write_history(shop: Shop, number: int, draws: Draws) -> Iterator[tuple[datetime, str, str, str]]:
    """What one person does: moment, user, item, action."""
    first = draws.pick(np.ones(len(shop.links)))
    themes = [first, draws.pick(shop.links[first]), draws.pick(np.ones(len(shop.links)))]
    words = [tag for own in shop.tags for tag in sorted(own)]  # a common one is liked by more people
    liked = frozenset(words[draws.pick(np.ones(len(words)))] for _ in range(12))
    person = Person(f"P{number:03d}", themes, liked)
    choices = count_choices(number, draws)
    arrival = 0.0 if draws.share() < 0.6 else draws.between(0, DAYS - 20)
    leaving = DAYS if draws.share() < 0.4 else draws.between(arrival, DAYS)
    visits = sorted(int(draws.between(arrival, leaving)) + draws.between(7, 22) / 24 for _ in range(1 + choices // 3))
    for day, books in zip(visits, np.diff(np.linspace(0, choices, len(visits) + 1).astype(int)), strict=True):
        moment = START + timedelta(days=day)
        for _ in range(books):
            book = choose_book(shop, person, day, draws)
            if book is None:
                continue
            person.taken.append(book)
            serious = 1.0 if shop.theme[book] in person.themes else OUTSIDE
            action = "view" if draws.share() >= serious * BASKET else "basket" if draws.share() >= BUY else "buy"
            yield moment, person.name, shop.ids[book], action
            later = moment + timedelta(days=1 + int(6 * draws.share()), minutes=draws.between(0, 40))
            if action != "buy" and draws.share() < serious * LATER and later < START + timedelta(days=DAYS):
                yield later, person.name, shop.ids[book], "buy"
            moment += timedelta(seconds=int(draws.between(20, 600)))


def count_choices(number: int, draws: Draws) -> int:
    """Few for most people, many for some."""
    if number <= ONCE:
        return 1 + number % 2
    if number == ONCE + 1:
        return MANY
    return min(100, int(10 * (1 - draws.share()) ** -0.6))


def build_events() -> list[tuple[str, str, str, str, int]]:
    """The rows of events.csv, in the order of time."""
    draws = Draws(SEED)
    shop = build_shop(Path(__file__).with_name("items.csv"), draws)
    numbers = 1 + draws.order(PEOPLE)  # so that names do not tell who stays
    histories = [event for number in numbers for event in write_history(shop, int(number), draws)]
    return [
        (user, item, moment.strftime("%Y-%m-%dT%H:%M:%SZ"), action, WEIGHTS[action])
        for moment, user, item, action in sorted(histories)
    ]


def write_events(path: Path) -> None:
    """Write events.csv."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["user", "item", "time", "action", "weight"])
        writer.writerows(build_events())


if __name__ == "__main__":
    write_events(Path(__file__).with_name("events.csv"))
