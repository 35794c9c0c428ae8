"""YAML 1.2 text -> plain values, with the line of every key. No tags, so nothing in a file can name code.

The scanner and the parser are ruamel.yaml's. Values are built here from the parser's events, because no loader keeps
lines for plain values, reports every duplicate key at once, and limits what aliases may grow into.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)
from ruamel.yaml.reader import ReaderError

from finetune.recipe.messages import KeyPath, Problem, show

MAX_DEPTH = 50
MAX_NODES = 100_000  # values in a file after aliases are filled in

# The core schema of YAML 1.2, section 10.3.2. ruamel's own resolver also takes `1_000` and `0b1`, which are YAML 1.1.
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")

# What ruamel says -> what a writer of YAML can act on.
_SYNTAX = {
    r"mapping values are not allowed": "a ':' too many here, or none on the line above. Text with ': ' needs quotes",
    r"found character '\\t'": "a tab cannot indent. Use spaces",
    r"found character '(.)'": r"a plain text cannot start with '\1'. Put it in quotes",
    r"chomping or indentation indicators": "'>' and '|' start a folded text. Put conditions in quotes: \">= 0.80\"",
    r"unexpected end of stream": "a quote is opened and not closed",
    r"expected ',' or '([]}])'": r"a comma or '\1' is missing",
    r"unknown escape character '(.)'": r"'\\\1' in double quotes is no character. Use single quotes",
    r"sequence entries are not allowed here": "a '- ' cannot stand here. Check the indentation",
    r"expected '<document start>'|document end marker": "text after the end. Check indentation, quotes and brackets",
    r"expected the node content": "a value is missing",
    r"undefined tag handle": "a '!' begins a tag. Put the text in quotes",
    r"expected alphabetic or numeric": "'&' and '*' begin an anchor and an alias. Put the text in quotes",
    r"could not find expected ':'": "a ':' is missing after the key",
    r"expected <block end>": "the indentation does not fit, or text follows a closing quote or bracket",
}


@dataclass
class Document:
    """What a text says."""

    values: Any = None
    """Mappings, lists, text, numbers, booleans and None; keys of mappings are text as written."""
    lines: dict[KeyPath, int | str] = field(default_factory=dict)
    """Path of a key or list entry -> line, 1-based, or `--set`; values behind an alias have the line of the alias."""
    problems: list[Problem] = field(default_factory=list)
    readable: bool = True
    """False when the text is not YAML at all: `values` is then None."""


class _UnreadableError(Exception):
    def __init__(self, line: int | None, sentence: str) -> None:
        super().__init__(sentence)
        self.problem = Problem(line, (), sentence)


def parse_yaml(text: str) -> Document:
    """Read one YAML 1.2 document; an empty text has the value None. Never raises: see `Document.problems`."""
    builder = _Builder()
    try:
        builder.build(text)
    except _UnreadableError as stop:
        builder.document.problems.append(stop.problem)
        return Document(problems=builder.document.problems, readable=False)
    return builder.document


def parse_scalar(text: str) -> Any:
    """The value of a plain scalar by the core schema of YAML 1.2: None, bool, int, float or the text itself."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        try:
            return int(text, base)
        except ValueError:  # more digits than Python converts
            return text
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _NOT_FINITE.fullmatch(text):
        return float(special.group().replace(".", ""))
    return text


def _events(text: str) -> Iterator[Any]:
    try:
        yield from YAML(typ="safe", pure=True).parse(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _UnreadableError(line, f"must be printable text, got the character U+{error.character:04X}.") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem or error.context)
        for pattern, sentence in _SYNTAX.items():
            if match := re.search(pattern, problem):
                problem = match.expand(sentence)
                break
        raise _UnreadableError(mark.line + 1 if mark else None, f"is not YAML: {problem}.") from None
    except (ValueError, OverflowError):  # ruamel.yaml has no check for "\\UFFFFFFFF"
        raise _UnreadableError(None, "is not YAML: an escape such as \\UFFFFFFFF is no character.") from None
    except YAMLError as error:
        raise _UnreadableError(None, f"is not YAML: {error}.") from None


_Node: TypeAlias = AliasEvent | ScalarEvent | CollectionStartEvent


class _Builder:
    """Events -> values. One use each."""

    def __init__(self) -> None:
        self.document = Document()
        self.nodes = 0
        self.anchors: dict[str, tuple[Any, int]] = {}  # name -> value and its number of nodes
        self.open_anchors: set[str] = set()
        self.events: Iterator[Any] = iter(())

    def build(self, text: str) -> None:
        self.events = _events(text)
        documents = 0
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _UnreadableError(_line(event), "must hold one document. Remove the second '---'.")
                root = next(self.events)
                self.document.lines[()] = _line(root)
                self.document.values = self._value(root, ())

    def _value(self, event: _Node, path: KeyPath) -> Any:
        self._count(event, 1, path)
        if isinstance(event, AliasEvent):
            return self._alias(event, path)
        self._refuse_tag(event, path)
        before = self.nodes
        if event.anchor:
            self.open_anchors.add(event.anchor)
        value: Any
        if isinstance(event, ScalarEvent):
            value = self._scalar(event, path)
        elif isinstance(event, MappingStartEvent):
            value = self._mapping(path)
        else:
            value = self._sequence(path)
        if event.anchor:
            self.open_anchors.discard(event.anchor)
            self.anchors[event.anchor] = (value, self.nodes - before)
        return value

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            line = _line(event)
            if not isinstance(event, ScalarEvent):
                raise _UnreadableError(line, "must have plain text as keys, got a list, a mapping or an alias.")
            key = self._key(event, path)
            inner = (*path, key)
            if key in mapping:
                first = self.document.lines[inner]
                lines = f"on lines {first} and {line}" if first != line else f"twice on line {line}"
                sentence = f"must be given once, is {lines}. Remove one."
                self.document.problems.append(Problem(line, inner, sentence))
            self.document.lines[inner] = line
            mapping[key] = self._value(next(self.events), inner)
        return mapping

    def _sequence(self, path: KeyPath) -> list[Any]:
        sequence: list[Any] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            inner = (*path, len(sequence))
            self.document.lines[inner] = _line(event)
            sequence.append(self._value(event, inner))
        return sequence

    def _key(self, event: ScalarEvent, path: KeyPath) -> str:
        self._count(event, 1, path)
        self._refuse_tag(event, path)
        if event.value == "<<" and event.implicit[0]:
            raise _UnreadableError(_line(event), "must not merge with `<<`, which is YAML 1.1. Write the keys out.")
        return self._text(event, path)

    def _scalar(self, event: ScalarEvent, path: KeyPath) -> Any:
        text = self._text(event, path)
        return parse_scalar(text) if event.implicit[0] else text  # quoted and folded texts stay text

    def _text(self, event: ScalarEvent, path: KeyPath) -> str:
        text = str(event.value)
        if re.search("[\0\ud800-\udfff]", text):  # no file name and no UTF-8 file can hold them
            problem = Problem(_line(event), path, f"must be text without NUL and lone surrogates, got {show(text)}.")
            self.document.problems.append(problem)
        return text

    def _alias(self, event: AliasEvent, path: KeyPath) -> Any:
        name = str(event.anchor)
        if name in self.open_anchors:
            raise _UnreadableError(_line(event), f"must not hold itself: '*{name}' stands inside '&{name}'.")
        if name not in self.anchors:
            raise _UnreadableError(_line(event), f"must name an anchor above it, got '*{name}' without '&{name}'.")
        value, nodes = self.anchors[name]
        self._count(event, nodes, path)
        return copy.deepcopy(value)

    def _refuse_tag(self, event: ScalarEvent | CollectionStartEvent, path: KeyPath) -> None:
        if event.tag is not None:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            sentence = f"must not have a tag, got {show(tag)}. Files are data, not code: remove the tag."
            self.document.problems.append(Problem(_line(event), path, sentence))

    def _count(self, event: Event, nodes: int, path: KeyPath) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise _UnreadableError(_line(event), f"must hold at most {MAX_NODES:,} values, aliases filled in.")
        if len(path) > MAX_DEPTH:
            raise _UnreadableError(_line(event), f"must not be nested deeper than {MAX_DEPTH} levels.")


def _line(event: Event) -> int:
    return int(event.start_mark.line) + 1
