"""What must not leave the house: secrets, paths of this machine, pickles and rows in files that are to be published."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from finetune.recipe.document import parse_yaml

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow")
WEIGHTS = ".safetensors"

SECRETS = {
    "a Hugging Face token": r"hf_[A-Za-z0-9]{20,}",
    "an AWS key": r"(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,})",
    "a GitLab token": r"gl(?:pat|dt|rt|ptt|agent|oas|soat|ft|imt|cbt)-[\w.-]{20,}",
    # OpenAI's, Anthropic's and those made like them.
    "the key of a language model's provider": (
        r"(?:sk-(?:(?:proj|svcacct|admin|ant|or)-[\w-]{20,}|[A-Za-z0-9]{32,})"
        r"|gsk_[A-Za-z0-9]{50,}|r8_[A-Za-z0-9]{37}|xai-[A-Za-z0-9]{60,}|pplx-[A-Za-z0-9]{48})"
    ),
    "a Google key": r"(?:AIza[\w-]{35}|GOCSPX-[\w-]{28}|ya29\.[\w-]{30,})",
    "an Azure key": r"(?:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{40,}=",
    "a Slack token": r"(?:xox[a-z]-[\w-]{10,}|xapp-\d-[\w-]{10,}|hooks\.slack\.com/services/[\w/]{20,})",
    "a Stripe key": r"(?:(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/]{24,})",
    "a SendGrid key": r"SG\.[\w-]{20,24}\.[\w-]{40,}",
    "a Telegram token": r"\d{8,10}:AA[\w-]{33}",
    "a token of a package registry": r"(?:npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{40,}|dckr_pat_[\w-]{20,})",
    "a signed web token": r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a password in an address": r"[a-z][a-z0-9+.-]*://[^\s/:@\"'{}<>]+:[^\s/@\"'{}<>]+@[\w\[]",
}
ESCAPED = re.compile(r"\\[nrt]")
"""Ends of lines in JSON, whose letter would hide where a word begins."""
ANY_SECRET = re.compile(rf"(?<!\w)(?:{'|'.join(SECRETS.values())})")
SECRET_VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")
SHORTEST_SECRET = 8
"""Characters under which the value of such a variable may be any word."""

# A tokenizer may know the word "/root": what follows makes it a path.
HOMES = r"(?:/home/[\w.-]+|/Users/[\w.-]+|/root|[A-Za-z]:[\\/]+Users[\\/]+[\w. -]+)[\\/]+\w"
PATH_KEYS = ("data", "knowledge", "file", "base", "adapters", "teacher", "templates", "writer", "reference")
"""Keys of a recipe and of run.lock that name files and folders."""
FILE_SCHEME = "file://"


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


def list_paths(text: str) -> list[str]:
    """The absolute paths that a recipe or a run.lock names: values of `PATH_KEYS`."""
    return [str(node.value) for node in _find_path_nodes(text)]


def shorten_paths(text: str) -> str:
    """A recipe or a run.lock whose absolute paths are cut to their last part; all else stays letter by letter."""
    for node in reversed(_find_path_nodes(text)):
        last = _split_path(node.value)[-1]
        is_plain = node.style is None and re.fullmatch(r"[\w.-]+", last) and parse_yaml(last).values == last
        anchor = f"&{node.anchor} " if node.anchor else ""  # the node begins with it
        written = anchor + (last if is_plain else json.dumps(last, ensure_ascii=False))
        text = text[: node.start_mark.index] + written + text[node.end_mark.index :]
    return text


def _find_path_nodes(text: str) -> list[ScalarNode]:
    """In the order of the text. JSON is YAML, too."""
    found: dict[int, ScalarNode] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, MappingNode):
            for name, value in node.value:
                walk(name, key)  # run.lock has folders of adapters as keys
                walk(value, str(name.value))
        elif isinstance(node, SequenceNode):
            for value in node.value:
                walk(value, key)
        elif isinstance(node, ScalarNode) and key in PATH_KEYS and _is_absolute(node.value):
            found[node.start_mark.index] = node  # an alias leads to the same one again

    walk(YAML(typ="safe", pure=True).compose(text), "")
    return [found[index] for index in sorted(found)]


def _is_absolute(path: str) -> bool:
    if not path.isprintable() or not _split_path(path):
        return False
    return any(kind(path).is_absolute() for kind in (PurePosixPath, PureWindowsPath)) or path.startswith(FILE_SCHEME)


def _split_path(path: str) -> list[str]:
    """The names in a path of any system."""
    return [part for part in re.split(r"[\\/]+", path.removeprefix(FILE_SCHEME)) if part]


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
    values = {f"the value of ${variable}": value for variable, value in _list_secret_variables(os.environ).items()}
    found = [(what, re.search(re.escape(value), text)) for what, value in values.items()]
    plain = ESCAPED.sub("  ", text)  # of the same length
    if ANY_SECRET.search(plain):  # which most texts have not: one search tells
        found += [(what, re.search(rf"(?<!\w){form}", plain)) for what, form in SECRETS.items()]
    for what, match in found:
        if match:
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
    told = {form for path in own if len(_split_path(path)) > 1 for form in (path, json.dumps(path)[1:-1])}
    known = [rf"{re.escape(path)}(?![\w.-])" for path in sorted(told)]
    pattern = rf"(?<![\w.:/$~-])(?:{FILE_SCHEME})?(?:{'|'.join([*known, HOMES])})[^\s\"',;`]*"
    if match := re.search(pattern, text):  # the first leads to the others
        yield (
            f"{name}, line {_line_of(text, match)}: must hold no path of this machine, got {match.group()}. "
            "Write a relative path, or a name."
        )


def _line_of(text: str, match: re.Match[str]) -> int:
    return text.count("\n", 0, match.start()) + 1
