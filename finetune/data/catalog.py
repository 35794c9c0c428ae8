"""The cards that come with the toolkit, and where the rows behind a card lie."""

from __future__ import annotations

import os
from pathlib import Path

from finetune.errors import DataError
from finetune.recipe.card import Card
from finetune.recipe.loading import load_document
from finetune.recipe.messages import suggest
from finetune.recipe.shipped import shipped_folder

DATA_VARIABLE = "FINETUNE_DATA"
"""Environment variable: the folder that holds public data sets, each in its card's `local` folder."""


def list_cards() -> list[Card]:
    """Every card of the catalog and the samples, by name.

    Raises:
        RecipeError: a card breaks the schema.
        DataError: a card's name is not that of its file or folder.
    """
    return [load_card(name) for name in card_names()]


def card_names() -> list[str]:
    """The names of all cards, sorted, without reading one."""
    return sorted(_card_paths())


def load_card(name: str) -> Card:
    """Read one card.

    Raises:
        DataError: no card has this name.
        RecipeError: the card breaks the schema.
    """
    paths = _card_paths()
    if name not in paths:
        known = ", ".join(sorted(paths)) or "none"
        raise DataError(f"data: must name a card, got {name!r}.{suggest(name, paths)} Cards: {known}.")
    card = load_document(paths[name], Card)
    if card.name != name:
        raise DataError(f"{paths[name]}: name must be {name!r} as the file or folder, got {card.name!r}. Rename one.")
    return card


def find_card_folder(card: Card) -> Path | None:
    """The folder that holds a card's files; None when they must come from the Hub.

    A sample lies beside its card, a public data set in `$FINETUNE_DATA/<card.local>`.
    """
    path = _card_paths().get(card.name)
    if path is not None and path.name == "card.yaml":
        return path.parent
    root = os.environ.get(DATA_VARIABLE)
    folder = Path(root).expanduser() / card.local if root else None
    return folder if folder is not None and folder.is_dir() and card.files else None


def find_card_file(card: Card, folder: Path, file: str) -> Path:
    """A file of a card in its folder.

    Raises:
        DataError: the file is not there, or it is a link that leads out of the folder.
    """
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DataError(f"{card.name}: {file} must lie in {folder}, got a link to {path}. Put the file itself there.")
    if not path.is_file():
        raise DataError(f"{card.name}: {file} must lie in {folder}, got nothing there. Get the whole data set.")
    return path


def describe_location(card: Card) -> str:
    """Where a card's rows come from, in words and without paths of this machine."""
    folder = find_card_folder(card)
    if folder is not None:
        is_sample = (folder / "card.yaml").is_file()
        return f"folder data/samples/{card.name}" if is_sample else f"folder ${DATA_VARIABLE}/{card.local}"
    return f"Hub {card.hub.id}@{card.hub.revision[:12]}" if card.hub else "not at hand"


def _card_paths() -> dict[str, Path]:
    root = shipped_folder("data")
    catalog = {path.stem: path for path in root.glob("catalog/*.yaml")}
    return catalog | {path.parent.name: path for path in root.glob("samples/*/card.yaml")}
