"""The documents say what is there: trees, commands, keys, links, and one README in two languages.

    .venv/bin/python tests/contracts/test_docs.py

writes the generated tables of docs/recipes.md anew.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

import finetune
from finetune.cli.main import app
from finetune.data.rows import Row
from finetune.data.sources import load_rows
from finetune.data.splits import split_rows
from finetune.evaluation.corpus_metrics import CORPUS_METRICS
from finetune.evaluation.metrics import METRICS, OUTSIDE_METRICS
from finetune.recipe import Card, HubSource, Recipe, Section, TaskSection, load_recipe
from finetune.recipe.comparison import Comparison
from finetune.recipe.defaults import (
    CONTRASTIVE_DEFAULTS,
    METHOD_HEAD_RATE,
    METHOD_RATES,
    SCRATCH_DEFAULTS,
    TYPE_DEFAULTS,
)
from finetune.recipe.schema import SplitSection
from finetune.recipe.sweep import Sweep, Values

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "docs" / "recipes.md"
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}
# Of the machine that a text was written on; `~/` and `$FINETUNE_DATA/` are anybody's.
MACHINE = re.compile(r"(?<![\w$~.])/(?:home|root|work|tmp|mnt|opt|Users|var)/|\b[A-Z]:\\|\b\d{1,3}(?:\.\d{1,3}){3}\b")


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)


# What the documents say


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def read_part(path: Path, name: str) -> str:
    """What stands between `<!-- name:begin -->` and `<!-- name:end -->`."""
    return read(path).partition(f"<!-- {name}:begin -->\n")[2].partition(f"<!-- {name}:end -->")[0]


def list_blocks(path: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(read(path))


def list_inline(path: Path) -> list[str]:
    """Inline code; where a line ends inside of one, there is a space."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", BLOCK.sub("", read(path)))]


def list_lines_of_code(path: Path) -> list[str]:
    """Inline code, and the lines of shell blocks."""
    return [
        *list_inline(path),
        *(line for kind, text in list_blocks(path) if kind == "sh" for line in text.splitlines()),
    ]


def list_commands(path: Path) -> list[list[str]]:
    """Words of every `finetune VERB ...`, without what stands before `finetune`."""
    found = (re.match(r"(?:\w+=\S+ |\.venv/bin/)?finetune (.+)", line) for line in list_lines_of_code(path))
    return [shlex.split(match[1]) for match in found if match]


def read_tree(text: str, pattern: str) -> list[str]:
    """Paths in a tree whose lines are indented by two spaces a level; group 1 of the pattern is the name."""
    paths: list[str] = []
    stack: list[str] = []
    for line in text.splitlines():
        found = re.match(r"( *)" + pattern, line)
        if found:
            stack = [*stack[: len(found[1]) // 2], found[2]]
            paths.append("".join(stack))
    return paths


def read_readme_tree(path: Path) -> list[str]:
    return read_tree(read(path), r"- `([\w.]+/?)`[:：]")  # noqa: RUF001  (the colon of the Chinese text)


# What is there


def list_modules() -> set[str]:
    """Every module and template of the package; a room's `__init__.py` is the room."""
    package = ROOT / "finetune"
    files = {path.relative_to(ROOT).as_posix() for kind in ("*.py", "*.j2") for path in package.rglob(kind)}
    rooms = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in package.rglob("__init__.py")}
    return rooms | {name for name in files if not re.fullmatch(r"finetune/.+/__init__\.py", name)}


def list_folders() -> set[str]:
    """Folders at the top that are part of the project and hold something."""
    ignored = set(read(ROOT / ".gitignore").split())
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return {name for name in folders - ignored if any((ROOT / name).iterdir())}


def list_verbs(command: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    commands = getattr(command, "commands", None)
    if commands is None:
        yield names
        return
    for name, child in commands.items():
        yield from list_verbs(child, (*names, name))


def parse_command(words: list[str]) -> tuple[str, ...]:
    """The verb of a command line.

    Raises:
        TyperException: no such verb or option, or an argument is missing.
    """
    command: Any = get_command(app)
    verb: list[str] = []
    rest = list(words)
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        verb.append(rest.pop(0))
        command = command.commands[verb[-1]]
    command.make_context(" ".join(["finetune", *verb]), rest)
    return tuple(verb)


# The generated part


def describe_type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(describe_type(one) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {describe_type(schema['items'])}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties") or next(iter(schema["patternProperties"].values()))
        return "mapping" if inner is True else f"mapping to {describe_type(inner)}"
    limits = [(sign, schema[key]) for key, sign in BOUNDS.items() if key in schema]
    bounds = ", ".join(f"{sign} {limit if isinstance(limit, int) else f'{limit:g}'}" for sign, limit in limits)
    return f"{TYPES[schema['type']]} {bounds}".rstrip()


def describe_value(value: Any) -> str:
    """A default as YAML writes it."""
    if isinstance(value, list):
        return "[" + ", ".join(map(describe_value, value)) + "]"
    special = ((None, "null"), (True, "true"), (False, "false"))
    return next((word for one, word in special if value is one), str(value) or '""')


def escape(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


def is_optional(field: Any) -> bool:
    return type(None) in getattr(field.annotation, "__args__", ())


def describe_default(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default_factory_takes_validated_data:
        return "`name`"
    return f"`{describe_value(field.get_default(call_default_factory=True))}`"


def find_section(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section that a key holds, if any, and whether the key maps names to sections."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    arguments = getattr(annotation, "__args__", ())
    sections = [one for one in arguments if isinstance(one, type) and issubclass(one, Section)]
    return (sections[0] if sections else None), getattr(annotation, "__origin__", None) is dict


def build_tables(section: type[Section], title: str, prefix: str = "") -> Iterator[str]:
    """One table for a section, then one for each section in it."""
    properties = section.model_json_schema()["properties"]
    inner: list[tuple[type[Section], str]] = []
    purpose = (section.__doc__ or "").partition("\n\n")[0]
    yield f"### {title}\n\n{' '.join(purpose.split())}\n\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|\n"
    for name, field in section.model_fields.items():
        child, is_mapping = find_section(field.annotation)
        if child:
            inner.append((child, f"{prefix}{name}" + (".<name>" if is_mapping else "")))
            kind = "mapping to section" if is_mapping else "section or null" if is_optional(field) else "section"
            default = "below" if isinstance(field.default_factory, type) else describe_default(field)
        else:
            kind, default = describe_type(properties[name]), describe_default(field)
        meaning = " ".join((field.description or "").split())
        yield f"| `{name}` | {kind} | {default} | {escape(meaning)} |\n"
    yield "\n"
    for child, path in inner:
        yield from build_tables(child, f"`{path}`", f"{path}.")


def build_metrics() -> str:
    rows = (
        f"| `{info.name}` | {'larger' if info.larger_is_better else 'smaller'} | {escape(info.formula)} |\n"
        for info in [*METRICS.values(), *CORPUS_METRICS.values()]
    )
    outside = (f"| `{name}` | larger | {escape(formula)} |\n" for name, formula in OUTSIDE_METRICS.items())
    return "| name | better | formula |\n|---|---|---|\n" + "".join([*rows, *outside])


def list_leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of nested sections with its value."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from list_leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def build_defaults() -> str:
    """What stands in place of the schema's defaults, by what a recipe says."""
    rates = {
        f"`adapter.method: {name}`": {"train": {"learning_rate": rate, "head_learning_rate": METHOD_HEAD_RATE}}
        for name, rate in METHOD_RATES.items()
    }
    sections = {
        **{f"`type: {name}`": defaults for name, defaults in TYPE_DEFAULTS.items()},
        "`model.base: scratch`": SCRATCH_DEFAULTS,
        "`train.few_shot: contrastive` on a Triad": CONTRASTIVE_DEFAULTS,
        **rates,
    }
    rows = (
        f"| {where} | {', '.join(f'`{key}: {describe_value(value)}`' for key, value in list_leaves(section))} |\n"
        for where, section in sections.items()
    )
    return "| where a recipe has | default |\n|---|---|\n" + "".join(rows)


GENERATED: dict[str, Callable[[], str]] = {
    "defaults": build_defaults,
    "recipe": lambda: "".join(build_tables(Recipe, "The recipe")).rstrip() + "\n",
    "metrics": build_metrics,
    "comparison": lambda: "".join(build_tables(Comparison, "The comparison")).rstrip() + "\n",
    "sweep": lambda: "".join(build_tables(Sweep, "The sweep")).rstrip() + "\n",
    "card": lambda: "".join(build_tables(Card, "The card")).rstrip() + "\n",
}


def rewrite(text: str) -> str:
    """The text of docs/recipes.md with its tables built anew."""
    for name, build in GENERATED.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        text = before + begin + build() + end + rest.partition(end)[2]
    return text


# Trees


def test_architecture_lists_every_module_and_no_other() -> None:
    listed = read_tree(read_part(ROOT / "docs" / "architecture.md", "tree"), r"([\w.]+/?)(?:\s|$)")
    assert sorted(listed) == sorted(list_modules())


def test_every_module_of_the_architecture_has_a_purpose() -> None:
    lines = read_part(ROOT / "docs" / "architecture.md", "tree").splitlines()
    assert [line for line in lines if re.match(r" +\S+$", line)] == []


@pytest.mark.parametrize("path", [ENGLISH, CHINESE], ids=by_name)
def test_readme_lists_every_folder_and_room(path: Path) -> None:
    rooms = {name for name in list_modules() if name.count("/") == 2 and name.endswith("/")}
    assert set(read_readme_tree(path)) == list_folders() | rooms | {"finetune/runner.py"}


# Commands


@each_document
def test_commands_are_commands(path: Path) -> None:
    verbs = set(list_verbs(get_command(app)))
    for words in list_commands(path):
        if words == ["--help"] or tuple(words) in verbs:  # a verb that a sentence speaks about
            continue
        try:
            assert parse_command(words) in verbs
        except typer.TyperException as error:
            pytest.fail(f"{by_name(path)}: finetune {' '.join(words)}: {error}")


def test_readme_has_a_command_line_for_every_verb() -> None:
    verbs = set(list_verbs(get_command(app)))
    needs_nothing = {verb for verb in verbs if verb[-1] in ("list", "doctor", "schema")}
    lines = {parse_command(words) for words in list_commands(ENGLISH) if tuple(words) not in verbs - needs_nothing}
    assert lines == verbs


def test_every_option_is_in_a_document() -> None:
    text = "\n".join(map(read, DOCUMENTS))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))
    command = get_command(app)
    given = {
        f"{' '.join(verb)} {option}"
        for verb in list_verbs(command)
        for parameter in reduce(lambda group, name: group.commands[name], verb, command).params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--") and option not in named
    }
    assert not given


@each_document
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    named = {match[1] for line in list_lines_of_code(path) if (match := re.match(r"make ([a-z-]+)", line))}
    assert named <= targets


def test_readme_python_uses_the_public_api() -> None:
    code = "\n".join(text for kind, text in list_blocks(ENGLISH) if kind == "python")
    calls = {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "finetune"
    }
    named = set(re.findall(r"`finetune\.(\w+)`", read(ENGLISH)))
    assert calls | named <= set(finetune.__all__)
    assert {"run", "load"} <= calls
    imported = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    assert all(hasattr(import_module(str(node.module)), name.name) for node in imported for name in node.names)


# Data


def test_readme_recipe_is_a_recipe(tmp_path: Path) -> None:
    [text] = [text for kind, text in list_blocks(ENGLISH) if kind == "yaml"]
    assert len(text.splitlines()) == 5
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert next(iter(load_recipe(path).tasks.values())).columns == {"text": "body", "label": "queue"}


def test_the_files_of_every_catalog_card_are_named() -> None:
    from finetune.data.catalog import load_card

    text = read(ROOT / "docs" / "data.md")

    for path in (ROOT / "data" / "catalog").glob("*.yaml"):
        card = load_card(path.stem)
        names = [name for names in card.files.values() for name in ([names] if isinstance(names, str) else names)]
        for name in names:
            assert f"`{card.local}/{name.partition('#')[0]}`" in text
        assert f"| `{card.name}` | [" in text
        assert f"]({card.source}) | {'yes' if card.hub else 'no'} | {card.licence} |" in text


def test_the_row_that_architecture_follows_is_there() -> None:
    text = " ".join(read(ROOT / "docs" / "architecture.md").split())
    source = load_rows("financial_headlines", {})
    row = next(row for row in source.rows if row.id == "headlines:6")
    assert f'"{row.values["text"]}", labelled `{row.values["label"]}`' in text
    assert row.number == 6
    recipe = load_recipe(ROOT / "recipes" / "sentiment.yaml")
    splits: dict[str, list[Row]] = split_rows(source.rows, recipe.tasks["sentiment"].split, seed=recipe.train.seed)
    assert row in splits["test"]


# Two languages


def test_chinese_readme_has_the_headings_of_the_english_one() -> None:
    levels = [re.findall(r"^(#+) ", BLOCK.sub("", read(path)), re.MULTILINE) for path in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]


def test_chinese_readme_has_the_code_of_the_english_one() -> None:
    assert list_blocks(ENGLISH) == list_blocks(CHINESE)
    assert list_commands(ENGLISH) == list_commands(CHINESE)
    assert sorted(set(list_inline(ENGLISH))) == sorted(set(list_inline(CHINESE)))


@pytest.mark.parametrize("path", [ENGLISH, CHINESE], ids=by_name)
def test_readme_has_one_place_for_results(path: Path) -> None:
    assert read_part(path, "results").strip()
    assert read(path).count("<!-- results:begin -->") == read(path).count("<!-- results:end -->") == 1


# Keys


def test_tables_of_keys_are_up_to_date() -> None:
    text = read(RECIPES)
    assert rewrite(text) == text, "docs/recipes.md is out of date. Run: .venv/bin/python tests/contracts/test_docs.py"


@pytest.mark.parametrize("section", [Recipe, TaskSection, SplitSection, Comparison, Sweep, Values, Card, HubSource])
def test_every_key_has_a_meaning(section: type[Section]) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []


# Decisions and style


@pytest.mark.parametrize("path", DECISIONS, ids=by_name)
def test_a_decision_has_its_four_parts(path: Path) -> None:
    headings = re.findall(r"^#+ .*$", read(path), re.MULTILINE)
    assert headings[1:] == ["## Context", "## Findings", "## Decision", "## Consequences"]
    assert headings[0].startswith(f"# {int(path.name[:4])}. ")


def test_decisions_are_numbered_and_listed() -> None:
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    listed = re.findall(r"^- \[.*\]\((decisions/.*)\)$", read(ROOT / "docs" / "architecture.md"), re.MULTILINE)
    assert listed == [f"decisions/{path.name}" for path in DECISIONS]


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", BLOCK.sub("", read(path)))
    assert [target for target in targets if "://" not in target and not (path.parent / target).exists()] == []


@each_document
def test_no_machine_is_named(path: Path) -> None:
    assert MACHINE.findall(read(path)) == []


if __name__ == "__main__":
    RECIPES.write_text(rewrite(read(RECIPES)), encoding="utf-8")
