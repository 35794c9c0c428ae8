"""One model, four ways to have it: as trained, loaded by the toolkit, loaded without it, merged. The same logits."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, BertTokenizerFast, DistilBertConfig, ElectraConfig, RobertaConfig

from finetune.adapters.attach import attach_adapter, merge_adapter
from finetune.artifact.load import load
from finetune.artifact.predictor import Predictor
from finetune.artifact.save import save_model
from finetune.data.batches import Examples
from finetune.data.rows import Row
from finetune.models.base import load_tokenizer, resolve_base
from finetune.models.classifier import get_padding, list_head_modules
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import AdapterSection, ModelSection, TrainSection
from finetune.tasks.text_classification import TextClassification
from finetune.training.loop import Problem, fit
from finetune.training.session import build_session

TASK = TextClassification(["negative", "neutral", "positive"], {})
WORDS = [
    "falls",
    "loss",
    "cuts",
    "names",
    "meeting",
    "schedule",
    "gains",
    "beats",
    "wins",
    "the",
    "of",
    "to",
    "a",
    "in",
]
TOLERANCE = 1e-5
REVISION = "0123456789abcdef0123456789abcdef01234567"

LORA = {"rank": 4, "alpha": 8.0}
NATIVE = {"architecture": "native"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "triad, full": ("bert", {"method": "full"}, {}),
    "triad, full, mean pooling": ("bert", {"method": "full"}, {"pooling": "mean"}),
    "triad, lora on all linear layers": ("bert", LORA, {}),
    "triad, lora on attention, mean pooling": ("bert", LORA | {"targets": "attention"}, {"pooling": "mean"}),
    "triad, lora on named layers": ("bert", LORA | {"targets": ["q_proj", "v_proj"], "dropout": 0.1}, {}),
    "triad of roberta, lora": ("roberta", LORA, {}),
    "triad of distilbert, lora": ("distilbert", LORA, {}),
    "bert, full": ("bert", {"method": "full"}, NATIVE),
    "bert, lora on all linear layers": ("bert", LORA, NATIVE),
    "bert, lora on attention": ("bert", LORA | {"targets": "attention"}, NATIVE),
    "bert, lora on named layers": ("bert", LORA | {"targets": ["query", "value"], "dropout": 0.1}, NATIVE),
    "roberta, lora": ("roberta", LORA, NATIVE),
    "distilbert, lora on attention": ("distilbert", LORA | {"targets": "attention"}, NATIVE),
    "distilbert, full": ("distilbert", {"method": "full"}, NATIVE),
    "electra, lora": ("electra", LORA, NATIVE),
}
ADAPTERS = [case for case, (_, adapter, _) in CASES.items() if adapter.get("method") != "full"]

# What the model card tells people to write, and proof that the toolkit has no part in it.
PLAIN = """
import json, pathlib, sys
import numpy as np, torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
torch.set_num_threads(1)
texts = json.loads(sys.argv[1])
for folder in map(pathlib.Path, sys.argv[2:]):
    own_code = (folder / "modeling_triad.py").exists()
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        config = AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
        if own_code:
            Triad = get_class_from_dynamic_module("modeling_triad.TriadForSequenceClassification", folder)
            base = Triad.from_pretrained(name, config=config, key_mapping=config.base_key_mapping)
        else:
            base = AutoModelForSequenceClassification.from_pretrained(name, config=config)
        model = PeftModel.from_pretrained(base, folder)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=own_code)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    np.save(folder.parent / "plain.npy", logits.numpy())
    labels = [model.config.id2label[i] for i in range(logits.shape[1])]
    assert labels == ["negative", "neutral", "positive"], labels
assert not any(name.partition(".")[0] == "finetune" for name in sys.modules)
"""


@dataclass
class Saved:
    """A trained model, and the folder that it was saved to."""

    model: nn.Module
    folder: Path
    logits: np.ndarray


def write_texts(count: int) -> list[str]:
    generator = np.random.default_rng(3)
    return [" ".join(generator.choice(WORDS, size=generator.integers(1, 12))) for _ in range(count)]


TEXTS = write_texts(24)


@pytest.fixture(scope="module")
def hub(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Hub cache with four small bases, so that saved models name them as acme/tiny-bert and so on."""
    cache = tmp_path_factory.mktemp("hub")
    words = len(BertTokenizerFast.from_pretrained(tiny_base))
    # Larger random weights than usual: in a model this narrow the usual ones give all texts the same logits.
    size: dict[str, Any] = {"vocab_size": words, "pad_token_id": 0, "initializer_range": 0.3}
    bert = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 66,
    }
    configs = {
        "roberta": RobertaConfig(**size, **bert),
        "distilbert": DistilBertConfig(
            **size, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=66
        ),
        "electra": ElectraConfig(**size, **bert, embedding_size=16),
    }
    for name in ("bert", *configs):
        repository = cache / f"models--acme--tiny-{name}"
        snapshot = repository / "snapshots" / REVISION
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        BertTokenizerFast.from_pretrained(tiny_base).save_pretrained(snapshot)
        torch.manual_seed(1)
        model = AutoModel.from_pretrained(tiny_base) if name == "bert" else AutoModel.from_config(configs[name])
        model.save_pretrained(snapshot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        yield cache


def encode(tokenizer: Any, texts: list[str]) -> Examples:
    keywords = {word: i // 3 for i, word in enumerate(WORDS[:9])}
    labels = [
        next((TASK.labels[keywords[word]] for word in text.split() if word in keywords), "neutral") for text in texts
    ]
    rows = [
        Row(id=str(i), split=None, number=i + 1, values={"text": text, "label": label})
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    return TASK.build_examples(rows, tokenizer, 64)


def train(root: Path, family: str, adapter: AdapterSection, section: ModelSection) -> Saved:
    base = resolve_base(f"acme/tiny-{family}")
    tokenizer = load_tokenizer(base)
    model = TASK.build_model(base, section, tokenizer, 0)
    head, pad_token_id = list_head_modules(model), get_padding(model, tokenizer)
    model = attach_adapter(model, adapter, head, base.reference)
    examples = encode(tokenizer, write_texts(60))
    problem = Problem(
        train=examples,
        validation=examples,
        row_weights=np.ones(len(examples), dtype=np.float32),
        compute_losses=lambda model, batch: TASK.compute_losses(model, batch, 0.0),
        compute_metrics=partial(TASK.compute_metrics, names=[]),
        is_larger_better=lambda _name: False,
        head=head,
        pad_token_id=pad_token_id,
    )
    recipe = TrainSection(epochs=1, tokens_per_batch=128, learning_rate=0.02, precision="float32", early_stop=None)
    with closing(build_session(recipe, root, "float32")) as session:
        fit(model, problem, recipe, session, quiet=True)
    save_model(model, tokenizer, root / "model", {"task": TASK.to_config(), "temperature": 1.0, "max_length": 64})
    return Saved(model, root / "model", compute_logits(model, encode(tokenizer, TEXTS), pad_token_id))


@pytest.fixture(scope="module")
def saved(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every case, trained for some steps with a large rate, and saved."""
    return {
        case: train(
            tmp_path_factory.mktemp("run"),
            family,
            AdapterSection(**adapter),
            ModelSection(base=f"acme/tiny-{family}", **section),
        )
        for case, (family, adapter, section) in CASES.items()
    }


@pytest.fixture(scope="module")
def plain(hub: Path, saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], np.ndarray]:
    """Logits out of one clean process for all cases; it runs elsewhere and can find the toolkit nowhere."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    modules = tmp_path_factory.mktemp("modules")
    environment |= {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
    subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(TEXTS), *(str(model.folder) for model in saved.values())],
        check=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment,
        capture_output=True,
        text=True,
    )
    return lambda case: np.load(saved[case].folder.parent / "plain.npy")


def compute_logits_of_texts(predictor: Predictor) -> np.ndarray:
    return predictor.compute_logits([Row(id=text, split=None, number=1, values={"text": text}) for text in TEXTS])


@pytest.mark.parametrize("case", CASES)
def test_training_did_something(saved, case):
    """Logits that hardly differ between texts would be equal everywhere for no good reason."""
    assert saved[case].logits.std(axis=0).min() > 100 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_loaded_by_the_toolkit(saved, case):
    predictor = load(saved[case].folder)
    np.testing.assert_allclose(compute_logits_of_texts(predictor), saved[case].logits, atol=TOLERANCE, rtol=0)
    assert not any(parameter.requires_grad for parameter in predictor.model.parameters())
    assert not predictor.model.training


@pytest.mark.parametrize("case", CASES)
def test_loaded_by_transformers_and_peft_alone(saved, plain, case):
    np.testing.assert_allclose(plain(case), saved[case].logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ADAPTERS)
def test_merged(saved, case):
    merged = merge_adapter(copy.deepcopy(saved[case].model))
    assert not any("lora" in name for name, _ in merged.named_modules())
    tokenizer = load_tokenizer(resolve_base(f"acme/tiny-{CASES[case][0]}"))
    logits = compute_logits(merged, encode(tokenizer, TEXTS), get_padding(merged, tokenizer))
    np.testing.assert_allclose(logits, saved[case].logits, atol=TOLERANCE, rtol=0)


def test_merging_a_whole_model_is_the_model(saved):
    model = saved["bert, full"].model
    assert merge_adapter(model) is model


def list_tensors(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_folder_holds_adapter_and_head_only(saved, case):
    family, _, section = CASES[case]
    names = {name.removeprefix("base_model.model.") for name in list_tensors(saved[case].folder)}
    native = {
        "bert": {"classifier.", "bert.pooler."},
        "roberta": {"classifier."},
        "distilbert": {"pre_classifier.", "classifier."},
        "electra": {"classifier."},
    }
    triad = {"classifier."} if section.get("pooling") == "mean" else {"classifier.", "pooler."}
    heads = native[family] if section == NATIVE else triad
    whole = {name for name in names if ".lora_" not in name}
    for part in heads:
        assert any(name.startswith(part) for name in whole), part
    assert all(name.startswith(tuple(heads)) for name in whole), whole
    assert any(".lora_" in name for name in names)
    assert not any("word_embeddings" in name or "tokens" in name for name in names)


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_names_its_base_as_the_recipe_does(saved, case):
    config = json.loads((saved[case].folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"acme/tiny-{CASES[case][0]}"
    assert config["inference_mode"] is True


@pytest.mark.parametrize("case", CASES)
def test_a_model_folder_has_no_pickle_and_no_path_of_this_machine(saved, hub, case):
    folder = saved[case].folder
    code = {path.name for path in folder.glob("*.py")}
    assert code == ({"modeling_triad.py", "configuration_triad.py"} if case.startswith("triad") else set())
    assert {path.suffix for path in folder.iterdir()} - {".py"} <= {".json", ".safetensors", ".txt"}
    private = [str(part) for part in (hub, folder.parent, Path.home(), Path.cwd())]
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not [part for part in private if len(part) > 1 and part.encode() in content], path.name
        assert REVISION.encode() not in content, path.name


@pytest.mark.parametrize("case", ["bert, full", "distilbert, full"])
def test_a_whole_model_needs_no_base(saved, tmp_path, monkeypatch, case):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    np.testing.assert_allclose(compute_logits_of_texts(load(saved[case].folder)), saved[case].logits, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_saved_weights_are_float32(saved, case):
    for path in saved[case].folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118  (no dict)
