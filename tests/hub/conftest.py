"""A Hub on loopback, a client in this process that talks to it, and runs to push."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BASE = "acme/tiny-base"


def load_server() -> Any:
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_server"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub() -> Iterator[Any]:
    """A Hub without repositories."""
    server = load_server().HubServer()
    yield server
    server.close()


@pytest.fixture
def waits(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Let the client of this process talk to the Hub as somebody who may write.

    Returns:
        The seconds that it would have slept.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    pages = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pages)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", hub.writer)
    slept: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=slept.append))
    yield slept
    _http.close_session()


def put_on_hub_base(run: Path, base: str, folder: str = BASE, origin: str = "Hub cache") -> None:
    """Rewrite a run as if its base had come from the Hub."""
    for name in ("model/adapter_config.json", "recipe.yaml", "recipe.resolved.yaml", "run.lock"):
        path = run / name
        path.write_text(path.read_text().replace(base, folder).replace("local folder", origin))
    reseal(run)


@pytest.fixture
def rebase() -> Callable[..., None]:
    """`put_on_hub_base`, for tests."""
    return put_on_hub_base


def reseal(run: Path) -> None:
    """Make the checksums of a run's `model/` those of its files."""
    from finetune.recipe.files import compute_sha256

    path = run / "model" / "finetune.json"
    settings = json.loads(path.read_text())
    settings["files"] = {name: compute_sha256(run / "model" / name) for name in settings["files"]}
    path.write_text(json.dumps(settings))


@pytest.fixture
def copy_for_hub(tiny_base: Path, tmp_path: Path) -> Callable[[Path], Path]:
    """A function: a finished run -> a copy of it, with an adapter on a base from the Hub."""

    def copy(run: Path) -> Path:
        path = Path(shutil.copytree(run, tmp_path / "pushed" / "tiny" / run.name))
        put_on_hub_base(path, str(tiny_base))
        return path

    return copy


@pytest.fixture
def run(finished_run: Path, copy_for_hub: Callable[[Path], Path]) -> Path:
    """A finished run with an adapter on a base from the Hub."""
    return copy_for_hub(finished_run)
