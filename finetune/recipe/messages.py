"""Problems of a YAML file as sentences: where, what must hold, got what; then the fix."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from finetune.recipe.card import HUB_ID_PATTERN, REVISION_PATTERN
from finetune.recipe.schema import NAME_PATTERN, REPO_PATTERN

KeyPath = tuple[str | int, ...]
OVERRIDE = "--set"
MAX_SHOWN = 50  # problems in one message

_PATTERNS = {
    NAME_PATTERN: "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit",
    REPO_PATTERN: "`owner/name`",
    HUB_ID_PATTERN: "`owner/name`",
    REVISION_PATTERN: "a commit of 40 hex digits, which a branch name is not",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_WORDS = {"yes": "true", "on": "true", "no": "false", "off": "false"}  # booleans of YAML 1.1, text in 1.2
_NOUNS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    where: int | str | None
    """Line, 1-based; `--set` for an override; None where there is no line."""
    path: KeyPath
    """The key; () for the whole file."""
    sentence: str


def format_problems(name: str, problems: Iterable[Problem]) -> str:
    """The message of a file with problems: one line each, lines in order, overrides last.

    Example:
        recipes/x.yaml: 2 problems
          line 9   train.epochs: must be at least 1, got 0.
          line 15  train.lerning_rate: unknown key. Did you mean 'learning_rate'?
    """
    unique = list(dict.fromkeys(problems))
    unique.sort(key=lambda problem: problem.where if isinstance(problem.where, int) else 10**9)
    places = [f"line {p.where}" if isinstance(p.where, int) else (p.where or "file") for p in unique]
    width = max(len(place) for place in places)
    lines = [f"{name}: {len(unique)} problem{'s' if len(unique) > 1 else ''}"]
    for place, problem in list(zip(places, unique, strict=True))[:MAX_SHOWN]:
        key = f"{format_path(problem.path)}: " if problem.path else ""
        sentence = problem.sentence if len(problem.sentence) <= 400 else problem.sentence[:397] + "..."
        lines.append(f"  {place:<{width}}  {key}{sentence}")
    if len(unique) > MAX_SHOWN:
        lines.append(f"  and {len(unique) - MAX_SHOWN:,} more")
    return "\n".join(lines)


def format_path(path: KeyPath) -> str:
    """`tasks.sentiment.labels[1]`; list entries count from 0."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[\w.+<-]+", part) else show(part))
    return text


def show(value: object) -> str:
    """A value as its writer knows it, at most 80 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(inner)}" for key, inner in list(value.items())[:10]) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(show(inner) for inner in value[:10]) + "]"
    elif isinstance(value, int) and abs(value) > 10**20:
        text = "a very large number"
    elif isinstance(value, float) and not math.isfinite(value):
        text = str(value).replace("inf", ".inf").replace("nan", ".nan")
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def count_of(count: int, one: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def suggest(word: str, choices: Iterable[str], likeness: float = 0.6) -> str:
    """` Did you mean 'x'?`, or nothing when no choice is as alike as `likeness`, in [0, 1]."""
    spellings = {choice.lower(): choice for choice in choices}
    word = word[:100].lower()
    close = difflib.get_close_matches(word, spellings, n=1, cutoff=likeness)
    close += [spelling for spelling in spellings if len(word) >= 3 and spelling.startswith(word)]
    return f" Did you mean {spellings[close[0]]!r}?" if close else ""


@dataclass(slots=True)
class _Place:
    """Where one of Pydantic's errors lies in the schema."""

    wanted: Any
    """The type there; None where the schema has no such key."""
    path: KeyPath = ()
    owner: type[BaseModel] | None = None
    """The section that the last key belongs to."""
    container: Any = None
    """The mapping type that the last key belongs to."""
    union: KeyPath | None = None
    """Path of the innermost value with several types."""
    in_member: bool = False
    """True when the error lies inside the value, so that the value has the shape of that member of the union."""
    is_key: bool = False
    """True when the key itself is wrong, not its value."""


def explain(errors: Sequence[ErrorDetails], schema: type[BaseModel]) -> list[tuple[KeyPath, str]]:
    """Pydantic's errors as (key, sentence), one for each thing that is wrong.

    A value that fits no member of a union gives one error per member there, and one sentence here.
    """
    found = [(error, _find(error["loc"], schema)) for error in errors]
    entered = {place.union for _, place in found if place.in_member}
    sentences: list[tuple[KeyPath, str]] = []
    for error, place in found:
        follows_from_another = error["type"] == "default_factory_not_called"
        other_member = place.union is not None and not place.in_member and place.union in entered
        if not follows_from_another and not other_member:
            sentences += _sentences(error, place, schema)
    return list(dict.fromkeys(sentences))


def find_types(path: KeyPath, schema: type[BaseModel]) -> list[Any]:
    """The types that a schema gives the value of a key, None left out; [] for a key that it does not have."""
    return _members(_find(path, schema).wanted)


def _find(loc: tuple[int | str, ...], schema: type[BaseModel]) -> _Place:
    """Walk the schema's types along `loc`, leaving out the names that Pydantic adds for the members of a union."""
    place = _Place(wanted=schema)
    for index, part in enumerate(loc):
        if part == "[key]" and place.container is not None:
            place.is_key, place.wanted = True, get_args(place.container)[0]
            continue
        members = _members(place.wanted)
        if len(members) > 1:  # `part` names a member: "str", "list[str]", "literal['all-linear','attention']"
            place.union, place.in_member = place.path, index + 1 < len(loc)
            if place.in_member:
                kind = str(part).partition("[")[0]
                place.wanted = next((m for m in members if _origin(m).__name__.lower() == kind), None)
            continue
        _step(place, part, members[0] if members else None)
    return place


def _step(place: _Place, part: int | str, wanted: Any) -> None:
    place.path = (*place.path, part)
    place.owner = place.container = place.wanted = None
    if _is_section(wanted):
        place.owner = wanted
        info = wanted.model_fields.get(str(part))
        place.wanted = info.annotation if info else None
    elif _origin(wanted) is dict:
        place.container, place.wanted = wanted, get_args(wanted)[1]
    elif _origin(wanted) is list:
        place.wanted = get_args(wanted)[0]


def _members(wanted: Any) -> list[Any]:
    """The types that a value may have, None left out."""
    if get_origin(wanted) is Annotated:
        return _members(get_args(wanted)[0])
    if get_origin(wanted) in (Union, types.UnionType):
        return [inner for member in get_args(wanted) for inner in _members(member)]
    return [] if wanted in (None, type(None)) else [wanted]


def _origin(wanted: Any) -> Any:
    return get_origin(wanted) or wanted


def _is_section(wanted: Any) -> bool:
    return isinstance(wanted, type) and issubclass(wanted, BaseModel)


def _sentences(error: ErrorDetails, place: _Place, schema: type[BaseModel]) -> list[tuple[KeyPath, str]]:
    if error["type"] == "value_error":
        return [_from_validator(line, place.path) for line in str(error["ctx"]["error"]).split("\n")]
    if error["type"] == "missing":
        return [(place.path, _missing(place))]
    if error["type"] == "extra_forbidden":
        return [(place.path, _unknown_key(place, schema))]
    return [(place.path, f"{'the key must' if place.is_key else 'must'} {_requirement(error, place)}")]


def _from_validator(line: str, path: KeyPath) -> tuple[KeyPath, str]:
    key, colon, sentence = line.partition(": ")
    if not colon or line.startswith("must "):
        return path, line
    return (*path, *key.split(".")), sentence


def _requirement(error: ErrorDetails, place: _Place) -> str:
    """What follows "must": "be at least 1, got 0."."""
    kind, value, ctx = error["type"], error["input"], error.get("ctx", {})
    if kind in ("too_short", "too_long"):
        word, limit = ("at least", ctx["min_length"]) if kind == "too_short" else ("at most", ctx["max_length"])
        return f"have {word} {limit} {'entry' if limit == 1 else 'entries'}, got {len(value)}."
    if kind in _LIMITS:
        word, key = _LIMITS[kind]
        must_be, fix = f"{word} {_limit(ctx[key])}", ""
    elif kind == "string_pattern_mismatch":
        must_be, fix = _PATTERNS.get(ctx["pattern"], f"text like {ctx['pattern']}"), ""
    elif kind == "string_too_short":
        must_be, fix = f"text of {ctx['min_length']} or more characters", ""
    elif kind == "finite_number":
        must_be, fix = "a finite number", ""
    else:
        must_be, fix = _describe(place.wanted), _hint(place.wanted, value)
    return f"be {must_be}, got {show(value)}.{fix}"


def _limit(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _describe(wanted: Any) -> str:
    members = _members(wanted)
    if len(members) == 1 and (choices := _choices(wanted)):
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
    parts: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            parts += map(str, get_args(member))
        elif _is_section(member):
            parts.append(f"a section with the keys {', '.join(member.model_fields)}")
        elif _origin(member) is list and len(members) > 1:
            parts.append(f"a list of {_describe(get_args(member)[0])}")
        else:
            parts.append(_NOUNS.get(_origin(member), "a value of another type"))
    return " or ".join(filter(None, [", ".join(parts[:-1]), parts[-1] if parts else "left out"]))


def _choices(wanted: Any) -> list[Any]:
    return [choice for m in _members(wanted) if get_origin(m) is Literal for choice in get_args(m)]


def _hint(wanted: Any, value: object) -> str:
    """The fix, where the value tells it."""
    members = _members(wanted)
    kinds = {_origin(member) for member in members}
    if value is None:
        return " Give it a value or remove the key."
    if isinstance(value, str):
        if kinds & {int, float} and (number := _number(value)) is not None:
            return f" Write {number}."
        if kinds == {bool} and value.lower() in _WORDS:
            return f" Write {_WORDS[value.lower()]}."
        if kinds == {list}:
            return f" Write [{value}]." if len(value) < 40 else ""
        return suggest(value, map(str, _choices(wanted)))
    if str in kinds and isinstance(value, (int, float)):
        return " Put it in quotes."
    if str in kinds and isinstance(value, dict):  # YAML's braces
        return f' Put it in quotes: "{{{", ".join(map(str, value))}}}"; behind --set, within those of the shell.'
    return ""


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if abs(number) < 1e15 else None  # false for infinity and NaN too
    return None


def _missing(place: _Place) -> str:
    key = place.path[-1]
    choices = _choices(place.wanted)
    if len(choices) == 1:
        return f"must be given. Write `{key}: {choices[0]}`."
    if choices:
        return f"must be given, as one of {', '.join(map(str, choices))}."
    info = place.owner.model_fields.get(str(key)) if place.owner else None
    return " ".join(["must be given.", *((info.description or "").splitlines() if info else [])]).strip()


def _unknown_key(place: _Place, schema: type[BaseModel]) -> str:
    key = str(place.path[-1])
    known = list(place.owner.model_fields) if place.owner else []
    fix = suggest(key, known, likeness=0.75)
    if not fix and (home := _home(key, schema)):
        fix = f" Did you mean {home!r}?"
    return f"unknown key.{fix or suggest(key, known) or ' Known here: ' + ', '.join(known) + '.'}"


def _home(key: str, schema: type[BaseModel]) -> str | None:
    """Where in the schema a key of this name stands: `train.epochs`, `tasks.<name>.type`."""
    if key in schema.model_fields:
        return key
    for name, info in schema.model_fields.items():
        for member in _members(info.annotation):
            inside_mapping = _origin(member) is dict
            section = _members(get_args(member)[1])[0] if inside_mapping else member
            if _is_section(section) and (home := _home(key, section)):
                return f"{name}.<name>.{home}" if inside_mapping else f"{name}.{home}"
    return None
