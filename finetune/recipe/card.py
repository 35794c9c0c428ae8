"""The card of a data set: where its files lie, what its columns mean, under which licence it may be used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PureWindowsPath
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from finetune.recipe.recommendation import ItemsSection as ItemsSection
from finetune.recipe.schema import Name, check_classes
from finetune.recipe.section import Section, raise_all

HUB_ID_PATTERN = r"^[\w.-]+(/[\w.-]+)?$"
REVISION_PATTERN = r"^[0-9a-f]{40}$"

FileKey = Literal["train", "validation", "test", "all"]
Revision = Annotated[str, Field(pattern=REVISION_PATTERN)]
RowCount = Annotated[int, Field(ge=0)]


class HubSource(Section):
    """Where the data set lies on the Hugging Face Hub, and what its parts are called there."""

    id: str = Field(pattern=HUB_ID_PATTERN)
    """`org/name`."""
    revision: Revision
    """The commit, 40 hex digits: a branch name would let the data change under a recipe."""
    config: str | None = None
    """Name of the configuration where the repository has several."""
    files: dict[FileKey, str] | None = None
    """Our split -> file in the repository, for repositories that are plain files."""
    splits: dict[FileKey, str] | None = None
    """Our split -> the Hub's split, where the names differ."""
    columns: dict[str, str] | None = None
    """Our column -> the Hub's column, where the names differ."""


class Card(Section):
    """A data set: its files, columns, labels, licence and source."""

    name: Name
    """What a recipe writes in `data`."""
    title: str = Field(min_length=1)
    """The name that people use."""
    description: str = ""
    """What the rows are and where they come from."""
    licence: str = Field(min_length=1)
    """SPDX identifier, or the words of the licence."""
    non_commercial: bool = False
    """True when the licence forbids commercial use."""
    source: str | None = None
    """Address of the original."""
    citation: str | None = None
    """The paper to cite."""
    language: list[str] = Field(default_factory=lambda: ["en"], min_length=1)
    """BCP 47 tags."""
    illustrative: bool = False
    """True for small sets written for this project: they show how things work, their scores say nothing."""
    hub: HubSource | None = None
    """The same data on the Hub."""
    local: Name = Field(default_factory=lambda card: str(card["name"]))
    """Folder name under $FINETUNE_DATA; default `name`. Samples lie beside their card instead."""
    files: dict[FileKey, str | list[str]] = Field(default_factory=dict)
    """Our split -> file or files in the folder; `all` when the set is not split. With `json_splits`:
    `file.json#key`; with `parallel`: one file per column; with `dstc`: the dialogues, then the labels."""
    format: Literal[
        "csv",
        "jsonl",
        "parquet",
        "paragraphs",
        "lines",
        "parallel",
        "headerless_tsv",
        "json_splits",
        "json_list",
        "dstc",
        "movielens",
        "online_retail",
    ] = "csv"
    """`paragraphs`: plain text in a .txt file, a row for what stands between blank lines. `lines`: a row per line.
    `parallel`: line n of each file belongs to row n. `headerless_tsv`: fields parted by tabs, without quotes.
    `json_splits`: one JSON object, split -> list of [text, label]. `json_list`: a list of objects; a list of texts
    becomes the lines of one. `dstc`: the dialogues and labels of a DSTC challenge, or its labels alone.
    `movielens`: CSV; the catalogue gets a `year` from the titles, and genres parted by commas. `online_retail`:
    Parquet; rows without a customer, cancelled or taken back are left out."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column -> what it is; in the order of the files or fields, where those do not name it. `paragraphs` and `lines`
    have one, `text`."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Column -> the key that stands for it in objects of a `json_list` that lack it."""
    roles: dict[str, str] = Field(default_factory=dict)
    """Role -> column, such as `{text: text, label: category}`; those of events are user, item, time and perhaps weight.
    A recipe's `columns` goes before."""
    labels: list[str] | dict[str, str] | None = None
    """The classes in order, or value-in-the-data -> class."""
    knowledge: str | None = None
    """The file in the folder that holds the entries which questions are answered from: `id`, `text`, and perhaps
    `title` and `group`; with `dstc`: domain > entity > FAQ."""
    items: ItemsSection | None = None
    """The catalogue of the items that the rows, which then are events, name."""
    templates: str | None = None
    """The file in the folder that describes the classes as intents of an assistant, with templates of its replies."""
    rows: dict[FileKey, RowCount] = Field(default_factory=dict)
    """Split -> number of rows; a file with another number is reported."""
    notes: str = ""
    """What a user should know before trusting a score."""

    @field_validator("labels")
    @classmethod
    def _labels(cls, labels: list[str] | dict[str, str] | None) -> list[str] | dict[str, str] | None:
        if labels is not None:
            check_classes(labels)
        return labels

    @field_validator("knowledge", "templates")
    @classmethod
    def _inside(cls, name: str | None) -> str | None:
        if name is not None and not _is_inside(name):
            raise ValueError(f"must be a path inside the data set's folder, without '..', got {name!r}.")
        return name

    @field_validator("items")
    @classmethod
    def _items(cls, items: ItemsSection | None) -> ItemsSection | None:
        if items is not None and items.file is not None and not _is_inside(items.file):
            must = "must be a path inside the data set's folder, without '..'"
            raise ValueError(f"file: {must}, got {items.file!r}.")
        return items

    @field_validator("files")
    @classmethod
    def _files(cls, files: dict[FileKey, str | list[str]]) -> dict[FileKey, str | list[str]]:
        problems = [
            f"{split}: must name at least 1 file, got {names!r}." for split, names in files.items() if not names
        ]
        for split, name in _each(files):
            if not _is_inside(name.partition("#")[0]):
                problems.append(f"{split}: must be a path inside the data set's folder, without '..', got {name!r}.")
        if "all" in files and len(files) > 1:
            others = ", ".join(key for key in files if key != "all")
            problems.append(f"all: must stand alone, got also {others}.")
        raise_all(problems)
        return files

    @model_validator(mode="after")
    def _check(self) -> Card:
        problems = [*self._check_columns()]
        if not self.files and self.hub is None:
            problems.append("files: must name at least 1 file when there is no `hub`, got nothing.")
        parts = self.format == "json_splits"
        form = "`file.json#key`" if parts else "a file name without '#'"
        for split, name in _each(self.files):
            if parts != ("#" in name):
                problems.append(f"files.{split}: must be {form} when `format` is {self.format}, got {name!r}.")
        raise_all(problems)
        return self

    def _check_columns(self) -> Iterator[str]:
        names = list(self.columns)
        if self.format in ("parallel", "headerless_tsv", "json_list") and not names:
            yield f"columns: must name the columns in order when `format` is {self.format}, got nothing."
        if self.format in ("paragraphs", "lines") and names not in ([], ["text"]):
            yield f"columns: must name `text` alone when `format` is {self.format}, got {', '.join(names)}."
        if self.aliases and self.format != "json_list":
            yield f"aliases: must be left out unless `format` is json_list, got {', '.join(self.aliases)}."
        for column in self.aliases:
            if column not in self.columns:
                yield f"aliases.{column}: must be one of `columns`, got {column!r}."
        for split, files in self.files.items() if self.format == "parallel" else ():
            count = 1 if isinstance(files, str) else len(files)
            if names and count != len(names):
                got = f"{count} file{'' if count == 1 else 's'} for {', '.join(names)}"
                yield f"files.{split}: must name one file per column when `format` is parallel, got {got}."
        for split, files in self.files.items() if self.format == "dstc" else ():
            if not isinstance(files, str) and len(files) > 2:
                yield (
                    f"files.{split}: must name dialogues and labels, or labels alone, when `format` is dstc, got "
                    f"{len(files)} files."
                )

    def list_files(self) -> Iterator[tuple[FileKey, list[str]]]:
        """Each split with the files that are read as one: a single one, or all of a `parallel` or `dstc` split."""
        for split, names in self.files.items():
            files = [names] if isinstance(names, str) else names
            yield from [(split, files)] if self.format in ("parallel", "dstc") else ((split, [file]) for file in files)


def _each(files: dict[FileKey, str | list[str]]) -> list[tuple[FileKey, str]]:
    return [(split, name) for split, names in files.items() for name in ([names] if isinstance(names, str) else names)]


def _is_inside(name: str) -> bool:
    windows = PureWindowsPath(name)  # knows both kinds of slash, and drives
    absolute = bool(windows.drive or windows.root)
    return bool(name.strip()) and not absolute and ".." not in windows.parts and "\0" not in name
