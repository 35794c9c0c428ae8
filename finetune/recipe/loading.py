"""From a YAML file to a checked section, and back."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from finetune.errors import RecipeError
from finetune.recipe.document import Document, parse_yaml
from finetune.recipe.messages import OVERRIDE, KeyPath, Problem, explain, format_problems, show
from finetune.recipe.schema import Recipe, Section

MAX_BYTES = 1_000_000
KINDS = {
    "compare": ("a comparison", "finetune compare"),
    "sweep": ("a sweep", "finetune sweep"),
    "recipe": ("a recipe", "finetune run"),
}
"""Key that tells what a file is -> what it is, and the command that takes it. The first two name a `recipe` too."""

S = TypeVar("S", bound=Section)


class _Representer(SafeRepresenter):
    """Puts text with line breaks or control characters in quotes: plain, ruamel.yaml does not read its own U+0085."""

    def represent_text(self, text: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_text)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. See `load_document`."""
    return load_document(path, Recipe, overrides)


def load_document(path: Path, schema: type[S], overrides: Sequence[str] = ()) -> S:
    """Read a YAML 1.2 file, apply overrides, and check the result against a schema.

    Args:
        path: a UTF-8 file of at most 1 MB.
        schema: what the file must hold.
        overrides: `train.epochs=1`, or several of these; the value is YAML, and the last of two wins.

    Raises:
        RecipeError: with every problem found, each with its line.
    """
    document = read_document(path, schema, overrides)
    section = check_document(document, schema)
    if section is None:
        raise RecipeError(format_problems(str(path), document.problems))
    return section


def check_document(document: Document, schema: type[S]) -> S | None:
    """The section that a document holds; None where it has problems, which are then all in `document.problems`."""
    section = _check(document.values, schema, document.lines, document.problems) if document.readable else None
    return None if document.problems else section


def read_document(path: Path, schema: type[Section], overrides: Sequence[str] = ()) -> Document:
    """Read a YAML 1.2 file that holds keys and values and apply overrides, without checking them: no defaults in them.

    Raises:
        RecipeError: the file cannot be read, holds something else, or is of another kind: a recipe, a comparison, a
            sweep. Other problems are in the document.
    """
    document = parse_yaml(_read(path))
    if not document.readable:
        return document
    key = next(iter(schema.model_fields))
    if not isinstance(document.values, dict):
        got = "an empty file" if document.values is None else show(document.values)
        fix = " Start from a copy: finetune recipes copy sentiment mine.yaml" if key in KINDS else ""
        raise RecipeError(f"{path}: the file must hold keys and values, such as `{key}: ...`, got {got}.{fix}")
    kind = next((kind for kind in KINDS if kind in document.values), key)
    if key in KINDS and kind != key:
        raise RecipeError(f"{path}: must be {KINDS[key][0]}, got {KINDS[kind][0]}. Try: {KINDS[kind][1]} {path}")
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _apply_override(override, document.values, document.lines, document.problems)
    return document


def build_recipe(values: dict[str, Any], changes: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """A recipe out of values that were read, with some changed.

    Args:
        values: of a recipe's file; they stay as they are.
        changes: `train.epochs` -> value, the last of two wins.

    Returns:
        The recipe, or None, and every problem, without a place.
    """
    values, problems = deepcopy(values), list[Problem]()
    for key, value in changes.items():
        _set_value(key, value, values, {}, problems)
    recipe = _check(values, Recipe, {}, problems)
    return (None if problems else recipe), problems


def dump_recipe(recipe: Recipe) -> str:
    """YAML of every key with its resolved value; loads back to an equal recipe."""
    return dump_values(recipe.to_dict())


def dump_values(values: Any) -> str:
    """Plain values as YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel.yaml annotates this switch as None
    yaml.width = 10**6  # a folded value reads worse than a long line
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors that speak to a YAML language server."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "finetune recipe"}


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise RecipeError(f"{path}: must be a YAML file, is a folder.")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: the file must exist. Check the path.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: the file must be readable, got: {error}.") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: the file must be at most {MAX_BYTES:,} bytes. Is it a YAML file?")
    if content.startswith(b"\xef\xbb\xbf"):
        raise RecipeError(f"{path}: the file must not begin with a byte order mark. Save it as UTF-8 without BOM.")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise RecipeError(f"{path}: the file must be text, got a NUL byte on line {line}. Save it as UTF-8.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{content[error.start]:02x} on line {line}"
        raise RecipeError(f"{path}: the file must be UTF-8, got {got}. Save it as UTF-8.") from None
    return text


def _apply_override(
    override: str, values: dict[str, Any], where: dict[KeyPath, int | str], problems: list[Problem]
) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        sentence = f"must have the form key=value, such as train.epochs=1, got {show(override)}."
        problems.append(Problem(OVERRIDE, (), sentence))
        return
    # `evaluate.gates.macro_f1=>= 0.8` after the shell has taken the quotes: a folded text makes no sense here.
    parsed = Document(values=text) if text.lstrip()[:1] in (">", "|") else parse_yaml(text)
    problems += [Problem(OVERRIDE, tuple(key.strip().split(".")), problem.sentence) for problem in parsed.problems]
    if parsed.readable:
        _set_value(key.strip(), parsed.values, values, where, problems)


def _set_value(
    key: str, value: Any, values: dict[str, Any], where: dict[KeyPath, int | str], problems: list[Problem]
) -> None:
    """Put a value where `train.epochs` says, in place."""
    path: KeyPath = ()
    parts = key.split(".")
    while True:
        # The name of a task may hold dots: prefer the longest key that is there.
        taken = next((n for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in values), 1)
        name, parts = ".".join(parts[:taken]), parts[taken:]
        path = (*path, name)
        if not parts:
            break
        if values.get(name) is None:
            values[name], where[path] = {}, OVERRIDE
        values = values[name]
        if not isinstance(values, dict):
            sentence = f"must be a section to set {'.'.join(parts)!r} in it, got {show(values)}."
            problems.append(Problem(OVERRIDE, path, sentence))
            return
    values[name] = value
    for old in [old for old in where if old[: len(path)] == path]:
        del where[old]
    where[path] = OVERRIDE


def _check(
    values: dict[str, Any], schema: type[S], where: dict[KeyPath, int | str], problems: list[Problem]
) -> S | None:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        for path, sentence in explain(error.errors(include_url=False), schema):
            problems.append(Problem(_place(path, where), path, sentence))
        return None


def _place(path: KeyPath, where: dict[KeyPath, int | str]) -> int | str | None:
    """The line of a key; of the section around it when the key is missing."""
    for length in range(len(path), -1, -1):
        if path[:length] in where:
            return where[path[:length]]
    return None
