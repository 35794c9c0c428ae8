"""Whether what was written stands in its source: a check of words and facts, which trusts no model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from finetune.applications.support.quotes import split_sentences
from finetune.data.ranking import split_words

MIN_SHARED = 2 / 3
"""The share of a claim's content words that its source must have."""

MAX_CLAUSES = 3

# Where a denial ends: "no American Express, cheques or cash" goes over commas, "no box needed; all parts" not further.
_CLAUSE_END = re.compile(r"(?<=[;:])\s|,?\s(?=but\b|without\b)")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+|\b[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b(?:/\S*)?", re.IGNORECASE)
_MONEY = r"[$\u20ac\u00a3\u00a5\u20b9]|usd\b|eur\b|gbp\b|chf\b|dollars?\b|euros?\b|pounds?\b|cents?\b"
_NUMBER = re.compile(
    rf"(?P<before>{_MONEY})?\s?(?P<number>\d+(?:[.,:]\d+)*)(?:st|nd|rd|th)?"
    rf"(?:\s?(?P<after>{_MONEY}|%|percent\b|[ap]\.?m\b))?",
    re.IGNORECASE,
)
_CAPITALISED = re.compile(r"(?<=[\w,;:)'\"] )[A-Z]\w*")
_CODE = re.compile(r"\b(?=\w*\d)(?=\w*[A-Za-z])[\w-]+\b")

_UNITS = {
    **dict.fromkeys(("$", "usd", "dollar", "dollars"), "$"),
    **dict.fromkeys(("\u20ac", "eur", "euro", "euros"), "\u20ac"),
    **dict.fromkeys(("\u00a3", "gbp", "pound", "pounds"), "\u00a3"),
    **dict.fromkeys(("%", "percent"), "%"),
    **dict.fromkeys(("cent", "cents"), "c"),
}
_SMALL_NUMBERS = split_words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_SMALL_NUMBERS)} | {
    word: str(10 * value) for value, word in enumerate(split_words("thirty forty fifty sixty seventy eighty ninety"), 3)
}
_CALENDAR = {
    *split_words("january february march april june july august september october november december"),
    *split_words("monday tuesday wednesday thursday friday saturday sunday today tomorrow yesterday"),
}
_NEGATIONS = set(split_words("no not never none nothing neither nor without cannot unable"))
_FUNCTION_WORDS = {
    *split_words("a an the this that these those it its they them their there here he she his her we us our you your"),
    *split_words("i me my is are was were be been being am do does did done have has had having will would can could"),
    *split_words(
        "shall should may might must and or but so if then than as at by for from in into of on onto out over"
    ),
    *split_words("to up with about when while which who whom whose what where how also just only very yes sure sorry"),
    *split_words("please well too any some all both each such own s t re ve ll d m"),
    # What replies say of anything that there is.
    *split_words(
        "offer offers offered offering provide provides provided available availability able allowed get need"
    ),
}
_QUOTES = str.maketrans({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
_ENDINGS = ("ing", "ed", "es", "s", "ly", "e")


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence of an answer, and what speaks against it; "" where its source supports it."""

    sentence: str
    problem: str


def check_claims(answer: str, passage: str) -> list[Claim]:
    """Hold each sentence of an answer against the passage that it was written from.

    A sentence is supported by up to three neighbouring clauses of the passage, when they hold each of its numbers
    (with its currency, percent, or half of the day), dates, addresses, codes and names, at least two thirds of its
    other content words, and a denial if and only if it denies. The first sentence, an entry's title, stands beside each
    of them. Sentences that claim nothing are left out: questions, and those without a content word or fact, such
    as "Yes, they do.".

    It finds what was invented. It does not find words of the passage that were put together to another meaning.
    """
    windows = list(_list_windows(passage))
    claims = []
    for sentence in split_sentences(_normalize(answer)):
        said = _read(sentence)
        if sentence.rstrip().endswith("?") or not (said.words or said.facts):
            continue
        claims.append(Claim(sentence.strip(), _find_problem(said, windows)))
    return claims


@dataclass(frozen=True, slots=True)
class _Said:
    """What a text says, as far as it can be compared."""

    words: frozenset[str]
    """Stems of its content words."""
    facts: frozenset[str]
    denies: bool


def _find_problem(said: _Said, windows: list[_Said]) -> str:
    """Of the window that comes nearest."""
    known = frozenset[str]().union(*(window.facts | window.words for window in windows))
    if invented := sorted(fact for fact in said.facts if fact not in known):
        return f"{invented[0]!r} is not in it"
    having = [window for window in windows if said.facts <= window.facts | window.words]
    if not having:
        return "its facts stand in different places of it"
    near = [window for window in having if len(said.words & window.words) >= MIN_SHARED * len(said.words)]
    if not near:
        return "its words are not those of it"
    agrees = any(window.denies == said.denies for window in near)
    return "" if agrees else "it denies what is said there, or the reverse"


def _list_windows(passage: str) -> Iterator[_Said]:
    """Each run of up to `MAX_CLAUSES` clauses, beside the first sentence."""
    sentences = split_sentences(_normalize(passage))
    title = _read(sentences[0]) if sentences else None
    clauses = [part for sentence in sentences for part in _CLAUSE_END.split(sentence) if part.strip()]
    for first in range(len(clauses)):
        for last in range(first + 1, min(first + MAX_CLAUSES, len(clauses)) + 1):
            yield _join(title, _read(" ".join(clauses[first:last])))


def _join(title: _Said | None, said: _Said) -> _Said:
    if title is None:
        return said
    return _Said(said.words | title.words, said.facts | title.facts, said.denies)


def _read(text: str) -> _Said:
    facts, rest = set(), text
    for address in _ADDRESS.findall(text):
        facts.add(address.casefold().strip(".,;:!?()<>\"'").removeprefix("https://").removeprefix("http://"))
        rest = rest.replace(address, " ")
    facts |= {code.casefold() for code in _CODE.findall(rest) if not _NUMBER.fullmatch(code)}
    for match in _NUMBER.finditer(rest):
        facts.add(_write_number(match))
    for name in _CAPITALISED.findall(rest):
        if name.casefold() not in _FUNCTION_WORDS:
            facts.add(_stem(name.casefold()))
    words = set()
    tokens = split_words(rest)
    for token in tokens:
        if token in _NUMBER_WORDS:
            facts.add(_NUMBER_WORDS[token])
        elif token in _CALENDAR:
            facts.add(token)
        elif token not in _FUNCTION_WORDS and token not in _NEGATIONS and not any(map(str.isdigit, token)):
            words.add(_stem(token))
    lowered = rest.casefold()
    denies = not _NEGATIONS.isdisjoint(tokens) or "n't" in lowered
    return _Said(frozenset(words - facts), frozenset(facts), denies)


def _write_number(match: re.Match[str]) -> str:
    """`$1,200.00`, `1200 dollars` and `$ 1200` are one, `5 pm` is `17:00`, and `30` is not `30 %`."""
    number = re.sub(r",(?=\d{3}(?!\d))", "", match["number"])
    units = {unit.casefold().replace(".", "") for unit in (match["before"], match["after"]) if unit}
    if half := units & {"am", "pm"}:
        hour, _, minutes = re.sub(r"[.,]", ":", number).partition(":")  # 9.30 am and 9,30 am are 9:30 am
        return f"{int(hour) % 12 + (12 if 'pm' in half else 0)}:{minutes or '00'}"
    hour, _, minutes = number.partition(":")
    if minutes:
        return f"{int(hour)}:{minutes}" if hour.isdigit() else number
    if re.fullmatch(r"\d+[.,]\d{1,2}", number):
        number = number.replace(",", ".").rstrip("0").rstrip(".")
    return (number.lstrip("0") or "0") + "".join(sorted(_UNITS.get(unit, unit) for unit in units))


def _stem(word: str) -> str:
    """A word without its ending, roughly: `delivers`, `delivered` and `delivering` are one."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word


def _normalize(text: str) -> str:
    """One form for digits of other scripts, wide letters, curly quotes and unseen characters."""
    shown = (character for character in unicodedata.normalize("NFKC", text) if unicodedata.category(character) != "Cf")
    plain = (str(unicodedata.decimal(character, character)) for character in shown)
    return "".join(plain).translate(_QUOTES)
