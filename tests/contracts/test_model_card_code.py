"""What the model card tells people to write runs as it stands: where this toolkit is not installed, and where it is."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast

import finetune
from finetune.adapters.attach import attach_adapter, list_trained
from finetune.adapters.bottleneck import STYLES
from finetune.adapters.methods import IN_TREE
from finetune.artifact.card import Publication, build_model_card
from finetune.artifact.save import save_model
from finetune.models.base import SCRATCH, BaseModel
from finetune.models.classifier import list_head_modules
from finetune.models.tokenizer import train_tokenizer
from finetune.recipe.schema import Recipe
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
from finetune.tasks.shapes import OnLanguageModel

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
LOCK = {
    "precision": "float32",
    "versions": {"torch": "2", "transformers": "5", "peft": "0"},
    "base": {"reference": "base", "origin": "local folder"},
}
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
    "completion": {},
    "question_answering": {"adapter": {"method": "full"}},
    "retrieval": {"adapter": {"method": "full"}},
    "reranking": {"adapter": {"method": "full"}},
}
TASKS: dict[str, Task] = {
    "text_classification": TextClassification(["bad", "good"], {}),
    "masked_lm": MaskedLM(),
    "causal_lm": CausalLM(),
    "seq2seq": Seq2Seq(),
    "completion": Completion(),
    "question_answering": QuestionAnswering(),
    "retrieval": Retrieval(size=0, answers=()),
    "reranking": Reranking(size=0),
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

LOGITS = """
import json, os, sys
import torch
torch.set_num_threads(1)
found = {}
for folder, code in json.loads(sys.argv[1]).items():
    os.chdir(folder)
    exec(code, names := {})
    tokens = names["tokenizer"](["some text"], return_tensors="pt")
    with torch.no_grad():
        found[os.path.basename(folder)] = names["model"].eval()(**tokens).logits.tolist()
print(json.dumps(found))
"""


def build_recipe(kind: str, tiny_base: Path, **sections: Any) -> Recipe:
    scratch = isinstance(TASKS[kind], OnLanguageModel)
    model_section = {"base": "scratch", "scratch": SIZE} if scratch else {"base": str(tiny_base)}
    return Recipe.model_validate(
        {
            "recipe": 1,
            "name": kind.replace("_", "-"),
            "model": model_section | {"max_length": 16} | sections.pop("model", {}),
            "tasks": {"only": {"type": kind, "data": "rows.csv"}},
        }
        | KINDS[kind]
        | sections
    )


def save_run(kind: str, folder: Path, tiny_base: Path, **sections: Any) -> list[str]:
    """A run's `model/` with random weights, and the Python of its card: without the toolkit, and with it."""
    folder.mkdir()
    recipe = build_recipe(kind, tiny_base, **sections)
    if isinstance(TASKS[kind], OnLanguageModel):
        tokenizer = train_tokenizer(
            TEXTS, "bpe", 300, 16, appends_end=kind == "seq2seq", reads_special=kind == "masked_lm"
        )
        base = SCRATCH
    else:
        tokenizer = BertTokenizerFast.from_pretrained(tiny_base)
        base = BaseModel(str(tiny_base), tiny_base, "local folder")
    model = TASKS[kind].build_model(base, recipe.model, tokenizer, 1)
    if recipe.adapter.method in IN_TREE:
        model = attach_adapter(model, recipe.adapter, list_head_modules(model), str(tiny_base))
        generator = torch.Generator().manual_seed(0)
        for weight in list_trained(model).values():
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    settings = {"task": TASKS[kind].to_config(), "max_length": 16, "temperature": 1.0}
    save_model(model, tokenizer, folder / "model", settings | {"generate": recipe.evaluate.generate.model_dump()})
    (name,) = recipe.tasks
    card = build_model_card(recipe, {name: None}, {name: TEST}, STATUS, LOCK)
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.fixture(scope="module")
def cards(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Task type -> a run's folder and the Python of its card."""
    root = tmp_path_factory.mktemp("cards")
    return {kind: (root / kind, save_run(kind, root / kind, tiny_base)) for kind in KINDS}


@pytest.fixture(scope="module")
def found(
    cards: dict[str, tuple[Path, list[str]]],
    tmp_path_factory: pytest.TempPathFactory,
    run_without_toolkit: Callable[..., Any],
) -> dict[str, Any]:
    """Task type -> class of the card's model, whether it is in training mode, what the card's code printed.

    All in one process that has no toolkit.
    """
    root = tmp_path_factory.mktemp("clean")
    codes = {str(folder): blocks[0] for folder, blocks in cards.values()}
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
        ("completion", "TriadForCausalLM"),
        ("question_answering", "TriadForQuestionAnswering"),
        ("retrieval", "TriadForSentenceEmbedding"),
        ("reranking", "TriadForSequenceClassification"),
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


def test_methods_that_peft_lacks_bring_their_code(
    tiny_base: Path, tmp_path: Path, run_without_toolkit: Callable[..., Any]
) -> None:
    """The same logits where the toolkit is not installed, from the lines of the card as they stand."""
    codes = {}
    for architecture in ("triad", "native"):
        for adapter in [
            *({"method": "adapter", "style": style} for style in STYLES),
            *({"method": m} for m in IN_TREE),
        ]:
            folder = tmp_path / "-".join([architecture, *adapter.values()])
            sections = {"model": {"architecture": architecture}, "adapter": adapter}
            codes[str(folder)] = save_run("text_classification", folder, tiny_base, **sections)[0]
            (folder / tiny_base.name).symlink_to(tiny_base)  # the card of a run on a local base knows its name
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = run_without_toolkit(tmp_path, LOGITS, json.dumps(codes), **environment)
    assert len({str(logits) for logits in found.values()}) > len(IN_TREE)
    for name, logits in found.items():
        expected = finetune.load(tmp_path / name / "model").compute_text_logits(["some text"])
        np.testing.assert_allclose(logits, expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "masked_lm"])  # which is a base for recipes
def test_the_toolkits_own_lines_answer(
    cards: dict[str, tuple[Path, list[str]]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (_, code) = cards[kind]
    monkeypatch.chdir(folder)
    start, _, last = code.strip().rpartition("\n")
    names: dict[str, Any] = {}
    exec(f"{start}\nanswer = {last}", names)
    answer = names["answer"]
    loaded: Any = finetune.load(folder / "model")
    again = {
        "text_classification": lambda: loaded.predict(["some text"]),
        "question_answering": lambda: loaded.answer_all([("some question", "some passage")])[0],
        "retrieval": lambda: loaded.embed(["an entry"], entries=True) @ loaded.embed(["a question"]).T,
        "reranking": lambda: loaded.score_pairs("a question", ["an entry", "another"]),
    }.get(kind, lambda: loaded.generate(["some text"]))()
    assert answer == pytest.approx(again, abs=1e-6) if kind in ("retrieval", "reranking") else answer == again
    assert len(str(answer)) > 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("causal_lm", "finetune evaluate --model acme/it --data FILE"),
        ("retrieval", "finetune evaluate --model acme/it --data FILE --knowledge FILE"),
        ("reranking", "finetune evaluate --model acme/it --data FILE --knowledge FILE"),
    ],
)
def test_a_published_card_says_how_to_score_it_elsewhere(kind: str, words: str, tiny_base: Path) -> None:
    card = build_model_card(
        build_recipe(kind, tiny_base), {"only": None}, {"only": TEST}, STATUS, LOCK, Publication("acme/it")
    )
    assert f"`{words}`" in card
