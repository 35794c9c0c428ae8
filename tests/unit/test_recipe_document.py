"""YAML 1.2 text becomes plain values with lines; what is not plain data is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.recipe.document import MAX_DEPTH, MAX_NODES, Document, parse_scalar, parse_yaml

# YAML 1.2.2, section 10.3.2, and its differences from YAML 1.1.
SCALARS: list[tuple[str, Any]] = [
    ("2e-5", 2e-5),
    ("1E3", 1000.0),
    (".5", 0.5),
    ("3.", 3.0),
    ("+12", 12),
    ("012", 12),
    ("0o14", 12),
    ("0x1F", 31),
    ("-.inf", float("-inf")),
    ("true", True),
    ("FALSE", False),
    ("~", None),
    ("", None),
    ("Null", None),
    ("no", "no"),
    ("on", "on"),
    ("off", "off"),
    ("yes", "yes"),
    ("y", "y"),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("12:30:45", "12:30:45"),
    ("2026-01-02", "2026-01-02"),
    ("1e", "1e"),
    (".", "."),
    ("٣", "٣"),
]


def _sentence(text: str) -> tuple[int | str | None, str]:
    problems = parse_yaml(text).problems
    assert len(problems) == 1
    return problems[0].where, problems[0].sentence


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_plain_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_scalar(text)
    assert read == value
    assert type(read) is type(value)
    assert parse_yaml(f"key: {text}").values == {"key": value}


def test_not_a_number_is_read() -> None:
    assert str(parse_scalar(".nan")) == "nan"


def test_digits_beyond_what_python_converts_stay_text() -> None:
    digits = "9" * 5000
    assert parse_scalar(digits) == digits


@pytest.mark.parametrize("text", ["'5'", '"5"', "|-\n  5", ">-\n  5"])
def test_quoted_and_folded_scalars_are_text(text: str) -> None:
    assert parse_yaml(f"key: {text}").values == {"key": "5"}


def test_a_version_directive_does_not_bring_back_yaml_1_1() -> None:
    assert parse_yaml("%YAML 1.1\n---\nkey: on").values == {"key": "on"}


def test_keys_are_text_as_written() -> None:
    assert parse_yaml("{0: a, 1.10: b, true: c}").values == {"0": "a", "1.10": "b", "true": "c"}


def test_every_key_and_entry_has_its_line() -> None:
    text = "# why\na: 1\nb:\n  c: [x,\n      y]\n  d:\n    - e: 2\n"
    assert parse_yaml(text).lines == {
        (): 2,
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "c", 0): 4,
        ("b", "c", 1): 5,
        ("b", "d"): 6,
        ("b", "d", 0): 7,
        ("b", "d", 0, "e"): 7,
    }


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n"])
def test_nothing_is_none(text: str) -> None:
    assert parse_yaml(text) == Document()


def test_duplicate_keys_are_reported_with_both_lines_and_all_of_them() -> None:
    document = parse_yaml("a: 1\nb:\n  c: 1\na: 2\nd: 3\nd: 4\n")
    assert [(p.where, p.path, p.sentence) for p in document.problems] == [
        (4, ("a",), "must be given once, is on lines 1 and 4. Remove one."),
        (6, ("d",), "must be given once, is on lines 5 and 6. Remove one."),
    ]


def test_duplicate_keys_on_one_line() -> None:
    assert _sentence("{a: 1, a: 2}") == (1, "must be given once, is twice on line 1. Remove one.")


@pytest.mark.parametrize(
    ("tag", "shown"),
    [
        ("!!python/object/apply:os.system", "!!python/object/apply:os.system"),
        ("!!python/name:os.system", "!!python/name:os.system"),
        ("!!str", "!!str"),
        ("!mine", "!mine"),
        ("!", "!"),
        ("!<tag:example.org,2000:x>", "tag:example.org,2000:x"),
    ],
)
def test_tags_are_refused(tag: str, shown: str) -> None:
    expected = f"must not have a tag, got '{shown}'. Files are data, not code: remove the tag."
    assert _sentence(f"a: 1\nb: {tag} x") == (2, expected)
    assert _sentence(f"a: 1\nb: {tag} [x]") == (2, expected)
    assert _sentence(f"a: 1\n{tag} b: x") == (2, expected)


def test_a_gadget_is_read_as_data_and_nothing_runs(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    document = parse_yaml(f'a: !!python/object/apply:os.mkdir ["{witness}"]\n')
    assert document.problems
    assert not witness.exists()


def test_aliases_are_filled_in_as_copies() -> None:
    document = parse_yaml("a: &x {k: [1]}\nb: *x\n")
    assert document.values == {"a": {"k": [1]}, "b": {"k": [1]}}
    assert document.values["a"]["k"] is not document.values["b"]["k"]


@pytest.mark.parametrize("text", ["a: &x [*x]", "a: &x {b: {c: *x}}"])
def test_a_value_that_holds_itself_is_refused(text: str) -> None:
    assert _sentence(text) == (1, "must not hold itself: '*x' stands inside '&x'.")


def test_an_alias_without_anchor_is_refused() -> None:
    assert _sentence("a: 1\nb: *y") == (2, "must name an anchor above it, got '*y' without '&y'.")


def test_an_alias_bomb_is_refused() -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    where, sentence = _sentence("\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *levels]))
    assert sentence == f"must hold at most {MAX_NODES:,} values, aliases filled in."
    assert where == 5


def test_deep_nesting_is_refused() -> None:
    assert _sentence("[" * 5000) == (1, f"must not be nested deeper than {MAX_DEPTH} levels.")
    nested = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_yaml(nested).readable


def test_merge_keys_are_refused_and_quoted_ones_are_keys() -> None:
    expected = "must not merge with `<<`, which is YAML 1.1. Write the keys out."
    assert _sentence("a: &x {b: 1}\nc:\n  <<: *x\n") == (3, expected)
    assert parse_yaml('"<<": 1').values == {"<<": 1}


@pytest.mark.parametrize("text", ["? [a]\n: b", "? {a: b}\n: c", "&x a: 1\n? *x\n: c"])
def test_keys_that_are_not_text_are_refused(text: str) -> None:
    assert _sentence(text)[1] == "must have plain text as keys, got a list, a mapping or an alias."


def test_a_second_document_is_refused() -> None:
    assert _sentence("a: 1\n---\nb: 2\n") == (2, "must hold one document. Remove the second '---'.")


@pytest.mark.parametrize("text", [r'a: "\ud800"', r'a: "x\0"', r'"\udfff": a'])
def test_text_that_no_file_can_hold_is_refused(text: str) -> None:
    assert "must be text without NUL and lone surrogates, got '" in _sentence(text)[1]


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        ("a: 1\nb: c: d", 2, "a ':' too many here, or none on the line above. Text with ': ' needs quotes."),
        ("a\nb: c", 2, "a ':' too many here, or none on the line above. Text with ': ' needs quotes."),
        ("a:\n\tb: 1", 2, "a tab cannot indent. Use spaces."),
        ("a: @x", 1, "a plain text cannot start with '@'. Put it in quotes."),
        ("a: %x", 1, "a plain text cannot start with '%'. Put it in quotes."),
        ("a: >= 0.8", 1, "'>' and '|' start a folded text. Put conditions in quotes: \">= 0.80\"."),
        ("a: 'x\n", 2, "a quote is opened and not closed."),
        ("a: [1, 2", 1, "a comma or ']' is missing."),
        ("a: {b: c", 1, "a comma or '}' is missing."),
        (r'a: "C:\data"', 1, r"'\d' in double quotes is no character. Use single quotes."),
        ("a: - b", 1, "a '- ' cannot stand here. Check the indentation."),
        ('"a" "b"', 1, "text after the end. Check indentation, quotes and brackets."),
        ("--- a\n... b", 2, "text after the end. Check indentation, quotes and brackets."),
        ("a: ]", 1, "a value is missing."),
        ("a: !e!x y", 1, "a '!' begins a tag. Put the text in quotes."),
        ("a: *", 1, "'&' and '*' begin an anchor and an alias. Put the text in quotes."),
        ("a: 1\nb", 2, "a ':' is missing after the key."),
        ("a: 'b' c", 1, "the indentation does not fit, or text follows a closing quote or bracket."),
        (r'a: "\UFFFFFFFF"', None, r"an escape such as \UFFFFFFFF is no character."),
    ],
)
def test_text_that_is_not_yaml(text: str, line: int | None, sentence: str) -> None:
    assert _sentence(text) == (line, f"is not YAML: {sentence}")
    assert not parse_yaml(text).readable


def test_control_characters_are_refused_with_their_line() -> None:
    assert _sentence("a: 1\nb: x\x07") == (2, "must be printable text, got the character U+0007.")
