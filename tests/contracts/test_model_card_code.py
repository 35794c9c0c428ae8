"""What the model card tells people to write runs as it stands, where this toolkit is not installed."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertTokenizerFast

from finetune.artifact.card import build_model_card
from finetune.artifact.save import save_model
from finetune.models.base import SCRATCH, BaseModel
from finetune.models.classifier import build_classifier
from finetune.models.language import build_language_model
from finetune.models.question_answering import build_answerer
from finetune.models.tokenizer import train_tokenizer
from finetune.recipe.schema import Recipe
from finetune.recipe.together import WITH_HEAD

TEXTS = ["some text and some more", "another text", "more text than some"]
STATUS = {
    "training": {
        "steps": 1,
        "seconds": 1.0,
        "device": "cpu",
        "rows": 3,
        "parameters": {"trained": 1, "total": 1},
    }
}
LOCK = {"precision": "float32", "versions": {"torch": "2", "transformers": "5", "peft": "0"}}
TEST = {
    "rows": 3,
    "confidence": 0.95,
    "resamples": 1,
    "opened": 1,
    "temperature": 1.0,
    "labels": ["bad", "good"],
    "metrics": {"loss": {"value": 1.0, "low": 1.0, "high": 1.0}},
    "baselines": {},
}
SIZE = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "position": "learned"}
BEAMS = {"generate": {"beams": 3, "length_penalty": 0.6, "max_new_tokens": 200}}
SAMPLING = {"generate": {"temperature": 0.8, "max_new_tokens": 200}}
KINDS: dict[str, dict[str, Any]] = {
    "text_classification": {"adapter": {"method": "full"}},
    "masked_lm": {},
    "causal_lm": {"evaluate": SAMPLING},
    "seq2seq": {"evaluate": BEAMS},
    "question_answering": {"adapter": {"method": "full"}},
}
CLEAN = """
import contextlib, io, json, os, sys
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
found = {}
for folder, code in json.loads(sys.argv[1]).items():
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names := {})
    model = names["model"]
    found[os.path.basename(folder)] = [type(model).__name__, model.training, printed.getvalue()]
print(json.dumps(found))
"""


def save_run(kind: str, folder: Path, tiny_base: Path) -> str:
    """A run's `model/` with random weights, and the Python of its card."""
    folder.mkdir()
    scratch = kind not in WITH_HEAD
    model_section = {"base": "scratch", "scratch": SIZE} if scratch else {"base": str(tiny_base)}
    recipe = Recipe.model_validate(
        {
            "recipe": 1,
            "name": kind.replace("_", "-"),
            "model": model_section | {"max_length": 16},
            "tasks": {"only": {"type": kind, "data": "rows.csv"}},
        }
        | KINDS[kind]
    )
    if scratch:
        tokenizer = train_tokenizer(
            TEXTS, "bpe", 300, 16, appends_end=kind == "seq2seq", reads_special=kind == "masked_lm"
        )
        model = build_language_model(kind, SCRATCH, recipe.model, tokenizer, seed=1)
    else:
        tokenizer = BertTokenizerFast.from_pretrained(tiny_base)
        base = BaseModel(str(tiny_base), tiny_base, "local folder")
        if kind == "text_classification":
            model = build_classifier(base, TEST["labels"], recipe.model, seed=1)
        else:
            model = build_answerer(base, recipe.model, seed=1)
    save_model(model, tokenizer, folder / "model", {})
    (name,) = recipe.tasks
    card = build_model_card(recipe, {name: None}, {name: TEST}, STATUS, LOCK)
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]


@pytest.fixture(scope="module")
def found(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, run_without_toolkit: Callable[..., Any]
) -> dict[str, Any]:
    """Task type -> class of the card's model, whether it is in training mode, what the card's code printed.

    All in one process that has no toolkit.
    """
    root = tmp_path_factory.mktemp("cards")
    codes = {str(root / kind): save_run(kind, root / kind, tiny_base) for kind in KINDS}
    environment = {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
    said: dict[str, Any] = run_without_toolkit(root, CLEAN, json.dumps(codes), **environment)
    return said


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("text_classification", "TriadForSequenceClassification"),
        ("masked_lm", "TriadForMaskedLM"),
        ("causal_lm", "TriadForCausalLM"),
        ("seq2seq", "TriadForSeq2SeqLM"),
        ("question_answering", "TriadForQuestionAnswering"),
    ],
)
def test_the_code_loads_the_class_ready_to_answer(found: dict[str, Any], kind: str, model: str) -> None:
    assert found[kind][:2] == [model, False]


def test_a_masked_model_names_five_tokens(found: dict[str, Any]) -> None:
    assert len(ast.literal_eval(found["masked_lm"][2])) == 5


def test_a_language_model_goes_on_with_the_text(found: dict[str, Any]) -> None:
    assert found["causal_lm"][2].startswith("some text")
    assert len(found["causal_lm"][2]) > len("some text\n")


def test_a_sequence_to_sequence_model_writes_a_text(found: dict[str, Any]) -> None:
    assert found["seq2seq"][2].strip()
