"""Weights in a GGUF file, the form of llama.cpp, converted once to what the rest of the house reads."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from tokenizers import pre_tokenizers

from finetune.errors import ModelError, ResourceError
from finetune.models.quiet import quiet_transformers


def convert_gguf(source: Path, sha256: str) -> Path:
    """The folder of configuration, float32 safetensors and tokenizer that a GGUF file comes to.

    It lies in the Hub's home (`HF_HOME`) under the checksum, is made on first use, and appears whole or not at all.

    Args:
        source: the file, of a family that transformers reads, with a byte-pair tokenizer.
        sha256: its checksum, which was compared.

    Raises:
        ModelError: the package gguf is missing, or transformers cannot read the file.
        ResourceError: the folder cannot be written.
    """
    folder = Path(constants.HF_HOME) / "finetune" / f"{source.stem}-{sha256[:12]}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{source.name}: the package gguf must be there to read it, got none. pip install gguf")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise ResourceError(f"{folder}: must be writable, got {error}. Set HF_HOME to a folder that is.") from error
    try:
        _convert(source, place)
        place.chmod(0o755)  # a temporary folder is its maker's alone
        place.rename(folder)
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{source.name}: must be a GGUF file that transformers reads; {error}") from error
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise ResourceError(f"{folder}: must be writable, got {error}. Set HF_HOME to a folder that is.") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return folder


def _convert(source: Path, place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
        # Saved as it is it would say that it is quantized, which its weights no longer are.
        settings = read.config.to_dict()
        settings.pop("quantization_config", None)
        model = type(read)(type(read.config)(**settings))
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.save_pretrained(place)
    _split_digits(tokenizer)
    tokenizer.save_pretrained(place)


def _split_digits(tokenizer: Any) -> None:
    """Part every digit from what stands beside it where the vocabulary has single digits only.

    GGUF names the rule by which a text is split before its pairs are merged, and transformers reads no such name.
    """
    if any(sum(character.isdigit() for character in token) > 1 for token in tokenizer.get_vocab()):
        return
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
