"""What must not leave the house: secrets, paths of this machine, pickles and rows in files that are to be published."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow")
WEIGHTS = ".safetensors"

SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,})"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a password in an address": re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"'{}<>]+:[^\s/@\"'{}<>]+@[\w\[]"),
}
SECRET_VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")
SHORTEST_SECRET = 8
"""Characters under which the value of such a variable may be any word."""

# A tokenizer may know the word "/root": what follows makes it a path.
HOMES = r"(?:/home/[\w.-]+|/Users/[\w.-]+|/root|[A-Za-z]:[\\/]+Users[\\/]+[\w.-]+)[\\/]+\w"
ABSOLUTE = re.compile(r"(?<![\w.:/$~-])(?:/|[A-Za-z]:[\\/]+)(?:[\w.@+~-]+[\\/]+)+([\w.@+~-]+)")


def scan_file(name: str, path: Path, own: Iterable[str] = ()) -> list[str]:
    """What keeps a file from being published, a sentence each; the secret itself is not in it.

    Args:
        name: what the file will be called.
        path: where it lies.
        own: paths of this machine that must not stand in it, such as the run's.
    """
    if problem := _check_kind(name, path):
        return [problem]
    text = read_text(path)
    return [*_find_secrets(name, text), *_find_paths(name, text, own)]


def read_text(path: Path) -> str:
    """The text of a file; of weights, the text of their header; "" of other bytes."""
    if path.suffix == WEIGHTS:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return file.read(min(length, path.stat().st_size)).decode("utf-8", errors="replace")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def shorten_paths(text: str) -> str:
    """Text whose absolute paths are cut to their last part."""
    return ABSOLUTE.sub(r"\1", text)


def _check_kind(name: str, path: Path) -> str | None:
    """What a file is that is never published; None where it may be."""
    suffix = Path(name).suffix.lower()
    if suffix in DATA_SUFFIXES:
        return f"{name}: must be no data, which a push leaves at home. Take the file out of the run's model/ folder."
    with path.open("rb") as file:
        head = file.read(9)
    is_pickle = suffix in PICKLE_SUFFIXES or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and head[8:9] != b"{")
    if is_pickle or (head[:2] == b"PK" and _holds_pickle(path)):
        return (
            f"{name}: must be no pickle, which can run code when it is opened. Save weights as safetensors, or take "
            "the file out of the run's model/ folder."
        )
    return None


def _holds_pickle(path: Path) -> bool:
    """Whether a file is what `torch.save` writes: an archive with a pickle in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(PICKLE_SUFFIXES) for name in archive.namelist())


def _find_secrets(name: str, text: str) -> Iterator[str]:
    patterns = SECRETS | {
        f"the value of ${variable}": re.compile(re.escape(value))
        for variable, value in _list_secret_variables(os.environ).items()
    }
    for what, pattern in patterns.items():
        if match := pattern.search(text):
            yield (
                f"{name}, line {_line_of(text, match)}: must hold no secret, got {what}. "
                "Take it out, and make a new one: it may have been seen."
            )


def _list_secret_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variable -> its value, of those whose name says that it is a secret and which are no path."""
    return {
        name: value
        for name, value in environment.items()
        if SECRET_VARIABLE.search(name) and len(value) >= SHORTEST_SECRET and not value.startswith(("/", "~"))
    }


def _find_paths(name: str, text: str, own: Iterable[str]) -> Iterator[str]:
    known = [rf"{re.escape(path)}(?![\w.-])" for path in own if len(Path(path).parts) > 2]
    pattern = rf"(?<![\w.:/$~-])(?:{'|'.join([*known, HOMES])})[^\s\"',;`]*"
    if match := re.search(pattern, text):  # the first leads to the others
        yield (
            f"{name}, line {_line_of(text, match)}: must hold no path of this machine, got {match.group()}. "
            "Write a relative path, or a name."
        )


def _line_of(text: str, match: re.Match[str]) -> int:
    return text.count("\n", 0, match.start()) + 1
