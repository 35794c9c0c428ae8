"""A plain model of transformers, ready to be asked like one of this toolkit's: what it is for is read off its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from finetune.artifact.load import choose_device
from finetune.artifact.predictor import Predictor
from finetune.data.files import read_json
from finetune.errors import ModelError, UsageError
from finetune.models.base import BaseModel, load_config
from finetune.models.classifier import load_saved_classifier, load_weights
from finetune.models.encoder import ENCODER
from finetune.models.triad.conversion import convert_config
from finetune.models.triad.families import FAMILIES
from finetune.recipe.defaults import TYPE_DEFAULTS
from finetune.recipe.schema import EvaluateSection, ModelSection
from finetune.tasks import (
    CausalLM,
    Completion,
    MaskedLM,
    QuestionAnswering,
    Reranking,
    Retrieval,
    Seq2Seq,
    Task,
    TextClassification,
)

LONGEST = 512
"""Tokens after which a text is cut for a model that does not say how many it was made for."""
ENDINGS = {
    "ForSequenceClassification": (TextClassification.type, Reranking.type),
    "ForQuestionAnswering": (QuestionAnswering.type,),
    "ForMaskedLM": (MaskedLM.type, Retrieval.type),
    "ForPreTraining": (MaskedLM.type, Retrieval.type),
    "ForCausalLM": (CausalLM.type, Completion.type),
    "LMHeadModel": (CausalLM.type, Completion.type),
    "ForConditionalGeneration": (Seq2Seq.type,),
    "ForSeq2SeqLM": (Seq2Seq.type,),
    "MTModel": (Seq2Seq.type,),
    "Model": (Retrieval.type,),
}
"""How the class of a model ends -> the task types that it has all weights for, the usual one first."""
SHAPES: dict[str, Task] = {
    QuestionAnswering.type: QuestionAnswering(),
    MaskedLM.type: MaskedLM(),
    CausalLM.type: CausalLM(),
    Seq2Seq.type: Seq2Seq(),
    Completion.type: Completion(),
    Retrieval.type: Retrieval(size=0, answers=()),  # the entries come with the data
    Reranking.type: Reranking(size=0, reads_types=True),
}
MODULES = {"Transformer", "Pooling", "Normalize"}
"""What a sentence encoder of sentence-transformers may consist of."""
POOLINGS = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls", "lasttoken": "last"}
"""What sentence-transformers calls a way to make one vector of a text's -> what Triad calls it."""


def load_plain(folder: Path, reference: str, task: str | None) -> Predictor:
    """Load a model that transformers or sentence-transformers saved, uncalibrated, and asked as a run is by default.

    Args:
        folder: configuration, safetensors and tokenizer.
        reference: how messages call it.
        task: its task type; None for the usual one of its class.

    Raises:
        UsageError: it has no weights for that task.
        ModelError: no class that can be scored, or files that cannot be loaded.
    """
    base = BaseModel(reference, folder, "saved model")
    config = load_config(base)
    kind = _choose_task(base, config, task)
    classes = [config.id2label[i] for i in range(config.num_labels)]
    shape: Task = SHAPES[kind] if kind in SHAPES else TextClassification(classes, {})
    tokenizer = shape.build_tokenizer(base, [], ModelSection())
    section = ModelSection(architecture="native", max_length=_count_tokens(base, config, tokenizer, kind))
    shape = shape.bind(tokenizer)
    if isinstance(shape, TextClassification | Reranking):
        model = load_saved_classifier(folder, None)
    elif isinstance(shape, Retrieval):
        model = _load_encoder(base, config)
    else:  # as the base of a recipe is loaded, with its checks; all weights are there
        model = shape.build_model(base, section, tokenizer, 0)
    return Predictor(
        model=model.eval().requires_grad_(False).to(choose_device()),
        tokenizer=tokenizer,
        task=shape,
        temperature=1.0,
        max_length=section.max_length,
        writing=EvaluateSection(**TYPE_DEFAULTS[kind]["evaluate"]).generate,
    )


def _choose_task(base: BaseModel, config: Any, task: str | None) -> str:
    name = next(iter(config.architectures or []), "no architecture")
    known = next((types for ending, types in ENDINGS.items() if name.endswith(ending)), None)
    if known is None:
        raise ModelError(
            f"{base.reference}: must be a model of this toolkit, or one of transformers whose class ends with "
            f"{', '.join(ENDINGS)}, got {name}. Train it on a task first: set model.base to it."
        )
    if TextClassification.type in known:  # a cross-encoder gives a pair one number
        known, name = (known[1:], f"{name} with one output") if config.num_labels == 1 else (known[:1], name)
    if task is not None and task not in known:
        raise UsageError(
            f"--task: must be {' or '.join(known)} for {base.reference}, a {name}, got {task!r}. Leave it out; to have "
            "a model for another task, train it: set model.base to it."
        )
    usual = known[-1] if (base.folder / "modules.json").exists() else known[0]  # as sentence-transformers saves them
    return task or usual


def _count_tokens(base: BaseModel, config: Any, tokenizer: Any, kind: str) -> int:
    """What a run of that type reads by default, or `LONGEST`; less where the model was made for less."""
    most = TYPE_DEFAULTS[kind].get("model", {}).get("max_length", LONGEST)
    path = base.folder / "sentence_bert_config.json"
    own = read_json(path).get("max_seq_length") if path.exists() and kind == Retrieval.type else None
    places = getattr(config, "max_position_embeddings", None)
    return int(min(most, tokenizer.model_max_length, places or most, own or most))


def _load_encoder(base: BaseModel, config: Any) -> nn.Module:
    """A sentence encoder, as a Triad.

    Raises:
        ModelError: a family that Triad has no form of, or layers behind it that would be left out.
    """
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{base.reference}: a sentence encoder must be of one of {', '.join(sorted(FAMILIES))}, got "
            f"{config.model_type}. Take another one."
        )
    config = convert_config(config)
    config.pooling, config.normalize_embeddings = _read_pooling(base), True
    return load_weights(base.folder, config, ENCODER)


def _read_pooling(base: BaseModel) -> str:
    """How it makes one vector of a text; the mean where it says nothing, as sentence-transformers has it."""
    path = base.folder / "modules.json"
    if not path.exists():
        return "mean"
    modules = {module["type"].rpartition(".")[2]: module["path"] for module in read_json(path)}
    ways = _list_ways(read_json(base.folder / modules["Pooling"] / "config.json")) if "Pooling" in modules else []
    if set(modules) <= MODULES and len(ways) == 1 and ways[0] in POOLINGS:
        return POOLINGS[ways[0]]
    raise ModelError(
        f"{base.reference}: a sentence encoder must pool by the mean, the first or the last token, with nothing behind "
        f"it, got {', '.join([*modules, *ways])}. Take another one."
    )


def _list_ways(pooling: dict[str, Any]) -> list[str]:
    """The ways to pool that are on: a name, or in older files a flag each."""
    if isinstance(way := pooling.get("pooling_mode"), str):
        return [way]
    return [key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True and "_mode_" in key]
