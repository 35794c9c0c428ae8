"""Weights that people have, as a Triad and back: BERT, RoBERTa, DistilBERT, GPT-2, Llama (SmolLM2 too) and Marian.

`families.py` says what is called how. Logits and hidden states stay the same, with three remarks: dropout that one side
lacks is left out; RoBERTa's positions are counted from the left, padding or not; a decoder's classifier finds the last
token by the attention mask, where Hugging Face's own looks for the padding token.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from finetune.errors import ModelError
from finetune.models.quiet import quiet_transformers
from finetune.models.triad.configuration_triad import TriadConfig
from finetune.models.triad.families import FAMILIES, Family, Names, State
from finetune.models.triad.modeling_triad import (
    TriadForCausalLM,
    TriadForMaskedLM,
    TriadForQuestionAnswering,
    TriadForSeq2SeqLM,
    TriadForSequenceClassification,
    TriadForTokenClassification,
    TriadModel,
)

# Models that do the same in transformers: class here -> its table from configurations to classes.
COUNTERPARTS: dict[type[PreTrainedModel], Mapping[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    TriadModel: transformers.MODEL_MAPPING,
    TriadForMaskedLM: transformers.MODEL_FOR_MASKED_LM_MAPPING,
    TriadForCausalLM: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    TriadForSeq2SeqLM: transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    TriadForSequenceClassification: transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    TriadForTokenClassification: transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    TriadForQuestionAnswering: transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}
LANGUAGE_MODELS = (TriadForMaskedLM, TriadForCausalLM, TriadForSeq2SeqLM)
# Settings that only some models read; others need not agree on them.
READERS = {
    "pooling": (TriadForSequenceClassification,),
    "pooler_activation": (TriadForSequenceClassification,),
    "normalize_pooled": (TriadForSequenceClassification,),
    "classifier_bias": (TriadForSequenceClassification,),
    "lm_head_bias": LANGUAGE_MODELS,
    "tie_word_embeddings": LANGUAGE_MODELS,
}
# Settings that change no number of a trained model.
FREE = {"normalize_embeddings", "heads", "base_key_mapping", "initializer_range", "use_cache", "decoder_start_token_id"}
FREE |= {name for name in TriadConfig.__annotations__ if "dropout" in name}
# Weights without a counterpart: a pooler that no head reads, computed sinusoids, a second name of the same matrix.
DROPPED = re.compile(r"^pooler\.|embed_positions\.|shared\.")
NATIVE = "Set model.architecture: native to take the family's own class."


# Configurations


def convert_config(config: Any) -> TriadConfig:
    """A Hugging Face configuration of a supported family as Triad's; Triad's own comes back as a copy.

    Raises:
        ModelError: an unsupported family, or settings that Triad cannot express; the message names all of them.
    """
    if config.model_type == TriadConfig.model_type:
        return copy.deepcopy(config)
    family = _find_family(config.model_type, NATIVE)
    problems = [
        f"{name} must be {value!r}, got {found!r}"
        for name, value in family.required.items()
        if (found := _read(config, name)) not in (None, value)
    ]
    values = dict(family.fixed)
    for there, here in family.settings:
        value = _read(config, there)
        if here == "activation":
            if value not in family.activations:
                problems.append(f"{there} must be one of {', '.join(family.activations)}, got {value!r}")
            value = family.activations.get(value)
        first = next(name for name, counterpart in family.settings if counterpart == here)
        if first != there and values[here] != value:
            problems.append(f"{there} must be {values[here]!r} like {first}, got {value!r}")
        values[here] = value
    if problems:
        raise ModelError(f"{type(config).__name__} cannot become a Triad: {'; '.join(problems)}. {NATIVE}")
    if family.split is None:
        values["base_key_mapping"] = build_key_mapping(config.model_type)
    try:
        return TriadConfig(**(values | family.derive(config)))
    except ValueError as error:
        reason = str(error).removeprefix("TriadConfig: ")
        raise ModelError(f"{type(config).__name__} cannot become a Triad: {reason} {NATIVE}") from error


def _convert_config_back(model: PreTrainedModel, name: str) -> Any:
    """The family's configuration that says the same; found out by converting it forth again."""
    family, config = FAMILIES[name], model.config
    values: dict[str, Any] = {}
    for there, here in family.settings:
        value = getattr(config, here)
        if here == "activation":
            names = {old: new for new, old in reversed(list(family.activations.items()))}
            value = names.get(value, next(iter(family.activations)))
        if here == "classifier_dropout" and value is None:
            continue
        outer, _, inner = there.partition(".")
        values[outer] = {inner: value} if inner else value
    try:
        converted = family.config(**values)
        again = convert_config(converted)
    except (ValueError, StrictDataclassError) as error:
        raise ModelError(f"{type(model).__name__} cannot become {name}: {error}") from error
    free = FREE | {setting for setting, readers in READERS.items() if type(model) not in readers}
    problems = [
        f"{setting} must be {getattr(again, setting)!r}, got {getattr(config, setting)!r}"
        for setting in TriadConfig.__annotations__
        if setting not in free and getattr(again, setting) != getattr(config, setting)
    ]
    if problems:
        raise ModelError(
            f"{type(model).__name__} cannot become {name}: {'; '.join(problems)}. Keep it as a Triad: its folder loads "
            "with transformers alone."
        )
    return converted


def _find_family(model_type: Any, fix: str = "") -> Family:
    if model_type not in FAMILIES:
        raise ModelError(f"model_type must be one of {', '.join(sorted(FAMILIES))}, got {model_type!r}. {fix}".rstrip())
    return FAMILIES[model_type]


def _read(config: Any, path: str) -> Any:
    """A setting; a dot leads into a dictionary. None where there is none."""
    outer, _, inner = path.partition(".")
    value = getattr(config, outer, None)
    return (value or {}).get(inner) if inner else value


# Names


def build_key_mapping(model_type: str) -> dict[str, str]:
    r"""Pattern -> new name: what a Triad's `from_pretrained(..., key_mapping=...)` takes to load a family's checkpoint.

    It names modules in full, with or without the bare model's prefix, so it also renames the tensors of an adapter:
    `PeftModel.from_pretrained(..., key_mapping=...)`. Both libraries allow one group, `\1`: the layer.

    Raises:
        ModelError: an unsupported family, or one whose weights need more than new names.
    """
    family = _find_family(model_type)
    if family.split is not None:
        raise ModelError(
            f"{model_type}: its weights need more than new names. Load them with load_from_checkpoint, "
            "or take a model to convert_to_triad."
        )
    return dict(_list_rules_to_triad(family))


def _list_rules_to_triad(family: Family) -> list[tuple[str, str]]:
    heads = [pair for names in family.heads.values() for pair in names if pair[0] != pair[1]]
    legacy = [(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")]  # from TensorFlow
    return [*legacy, *_build_rules(family.base, rf"(?:{family.prefix}\.)?", "model."), *_build_rules(heads)]


def _build_rules(names: Iterable[tuple[str, str]], old: str = "", new: str = "") -> list[tuple[str, str]]:
    """Pairs of names as patterns and replacements, behind an old prefix (a pattern) and a new one."""
    return [
        (
            "^" + old + re.escape(before).replace(r"\*", r"(\d+)") + r"(?=\.|$)",
            new + after.replace("*", r"\1"),
        )
        for before, after in names
    ]


def _rename(state: Mapping[str, torch.Tensor], rules: list[tuple[str, str]]) -> State:
    """Apply the first rule that fits each name; the rest keep theirs."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            changed, count = re.subn(pattern, replacement, name)
            if count:
                name = changed
                break
        renamed[name] = tensor
    return renamed


def _swap(names: Names) -> Names:
    return tuple((here, there) for there, here in names)


# Models


def convert_to_triad(model: PreTrainedModel) -> PreTrainedModel:
    """A Hugging Face model of a supported family as the Triad that does the same, with weights of its own.

    Args:
        model: bare, for masked, causal or sequence-to-sequence language modelling, for classification of rows or
            tokens, or for question answering. The pooler of a bare BERT or RoBERTa is left out.

    Raises:
        ModelError: an unsupported family or class, or settings that Triad cannot express.
    """
    family = _find_family(model.config.model_type)
    config = convert_config(model.config)
    classes = {table[family.config]: here for here, table in COUNTERPARTS.items() if family.config in table}
    if type(model) not in classes:
        raise ModelError(f"{type(model).__name__} has no counterpart in Triad. {_list_classes(family)}")
    state = family.split(model.state_dict()) if family.split else model.state_dict()
    return _load_state(classes[type(model)], config, _rename(state, _list_rules_to_triad(family)), model)


def convert_from_triad(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """A Triad as Hugging Face's own class of a family, with weights of its own.

    Args:
        model: a Triad, fine-tuned or from scratch; merge an adapter first.
        family: bert, roberta, distilbert, gpt2, llama or marian.

    Raises:
        ModelError: the family has no such class, or its class cannot express the model; the message says what.
    """
    table = _find_family(family)
    classes = COUNTERPARTS.get(type(model), {})
    if table.config not in classes:
        raise ModelError(
            f"{type(model).__name__} has no counterpart in {family}. {_list_classes(table)} "
            "The base alone: convert_from_triad(model.model, ...)."
        )
    target = classes[table.config]
    config = _convert_config_back(model, family)
    rules = _build_rules(_swap(table.base), r"(?:model\.)?", f"{target.base_model_prefix}.")
    rules += _build_rules(_swap(table.heads.get(type(model), ())))
    options = table.bare_options if type(model) is TriadModel else {}
    return _load_state(target, config, table.fuse(_rename(model.state_dict(), rules)), model, **options)


def load_from_checkpoint(triad_class: type[PreTrainedModel], folder: Path, config: TriadConfig) -> PreTrainedModel:
    """A Triad in float32 with the weights of a folder, that of a supported family or a Triad's own.

    A head that the folder lacks, or has for another number of labels, starts at random.

    Args:
        triad_class: any class of Triad; it need not be the counterpart of what was saved.
        folder: config.json and safetensors.
        config: from `convert_config`, with changes such as labels or pooling.

    Raises:
        ModelError: an unsupported family; files that cannot be read; base weights that the configuration does not
            fit, the vocabulary first of all.
    """
    settings = _load_settings(folder)
    model_type = settings.get("model_type")
    options: dict[str, Any] = {}
    if model_type != TriadConfig.model_type:
        family = _find_family(model_type, NATIVE)
        if family.split is None:
            options["key_mapping"] = build_key_mapping(family.config.model_type)
        else:
            state = _rename(family.split(_load_tensors(folder)), _list_rules_to_triad(family))
            # Transposed matrices and parts of larger ones could be trained, but not saved.
            options["state_dict"] = {
                name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
            }
    source = None if "state_dict" in options else folder
    options |= {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    try:
        if source is None:
            options["generation_config"] = _load_generation_config(folder, settings)
        model, report = _load_quietly(triad_class, source, config, **options)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: must load as {triad_class.__name__}; {error}") from error
    _check_base(report, folder, config)
    model.config.name_or_path = str(folder)
    return model


def _load_state(
    model_class: type[PreTrainedModel], config: Any, state: State, source: PreTrainedModel, **options: Any
) -> PreTrainedModel:
    """A model with copies of the weights, in their precision and on their device; each must find its place."""
    weights = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    options |= {"generation_config": getattr(source, "generation_config", None), "dtype": source.dtype}
    try:
        model, report = _load_quietly(model_class, None, config, state_dict=weights, **options)
    except ValueError as error:
        raise ModelError(f"{type(source).__name__} cannot become {model_class.__name__}: {error}") from error
    left = report["missing_keys"] | report["unexpected_keys"] | {name for name, *_ in report["mismatched_keys"]}
    left = [name for name in sorted(left) if not DROPPED.search(name)]
    if left:
        names = f"{type(source).__name__} cannot become {model_class.__name__}"
        raise ModelError(f"{names}: only one has {', '.join(left)} in this shape.")
    return model.to(source.device)


def _load_quietly(
    model_class: Any, source: Path | None, config: Any, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what was missing, unexpected or of another shape: transformers prints a table of that."""
    with quiet_transformers():
        model, report = model_class.from_pretrained(
            source, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        return model, report


def _check_base(report: Mapping[str, Any], folder: Path, config: TriadConfig) -> None:
    """Weights of the base must be there, be used and fit; without a word they would start at random or be dropped."""
    is_base = re.compile(r"^(model\.)?(encoder|decoder)\.").match
    for name, found, wanted in sorted(report["mismatched_keys"]):
        if name.endswith("embeddings.tokens.weight") and found[0] != wanted[0]:
            raise ModelError(
                f"{folder}: vocab_size must be that of the weights, {found[0]}, got {config.vocab_size}. Load with "
                "theirs, then call resize_token_embeddings."
            )
        if is_base(name):
            raise ModelError(f"{folder}: {name} must have shape {tuple(wanted)}, got {tuple(found)}.")
    missing = sorted(filter(is_base, report["missing_keys"]))
    if missing:
        raise ModelError(f"{folder}: must hold all weights of the base, lacks {len(missing)}: {missing[0]} first.")
    unused = sorted(filter(is_base, report["unexpected_keys"]))
    if unused:
        raise ModelError(
            f"{folder}: the configuration must have a place for all weights of the base, leaves out {len(unused)}: "
            f"{unused[0]} first."
        )


def _load_settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return settings
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: must hold a config.json that can be read; {error}") from error


def _load_tensors(folder: Path) -> State:
    """All tensors of a folder's safetensors, in one file or as its index lists them."""
    index = folder / "model.safetensors.index.json"
    try:
        names = {"model.safetensors"}
        if index.exists():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return {key: tensor for name in sorted(names) for key, tensor in load_file(folder / name).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder}: must hold safetensors that can be read; {error}") from error


def _load_generation_config(folder: Path, settings: dict[str, Any]) -> GenerationConfig:
    """From its own file; before there was one, from the model's configuration."""
    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(settings)


def _list_classes(family: Family) -> str:
    names = sorted(table[family.config].__name__ for table in COUNTERPARTS.values() if family.config in table)
    return f"Classes that have one: {', '.join(names)}."
