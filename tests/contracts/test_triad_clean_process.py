"""A saved Triad folder needs nothing but transformers and the user's word: no part of the toolkit is there."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.models import triad

DECODER = {"shape": "decoder", "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "pooling": "last"}
SEQ2SEQ = {"shape": "encoder_decoder", "decoder_start_token_id": 1}
HEADS = {
    "tone": {"type": "sequence_classification", "num_labels": 3},
    "names": {"type": "token_classification", "num_labels": 4},
}
# class -> the Auto class that finds it without the toolkit, its choices
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "TriadModel": ("AutoModel", SEQ2SEQ),
    "TriadForMaskedLM": ("AutoModelForMaskedLM", {"lm_head_bias": True}),
    "TriadForCausalLM": ("AutoModelForCausalLM", DECODER),
    "TriadForSeq2SeqLM": ("AutoModelForSeq2SeqLM", SEQ2SEQ),
    "TriadForSequenceClassification": ("AutoModelForSequenceClassification", {"pooling": "pooler"}),
    "TriadForTokenClassification": ("AutoModelForTokenClassification", {"position": "learned"}),
    "TriadForQuestionAnswering": ("AutoModelForQuestionAnswering", {"norm_position": "pre"}),
    "TriadForSentenceEmbedding": ("AutoModel", {}),
    "TriadForMultiTask": ("AutoModel", {"heads": HEADS}),
    "TriadForNextItem": ("AutoModel", DECODER | {"num_items": 40, "item_text_size": 6, "item_bias": True}),
}
FILES = {"TriadForNextItem": ["next_item.py"]}
"""Those beside the two that all have."""
GENERATE = ["TriadForCausalLM", "TriadForSeq2SeqLM"]
IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])

CLEAN = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
root, cases, generate = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
inputs = load_file(root + "/inputs.safetensors")
refusals, classes = {}, {}
for name, auto in cases.items():
    auto, folder = getattr(transformers, auto), root + "/" + name
    for kind in (transformers.AutoConfig, auto):
        try:
            kind.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            refusals.setdefault(name, []).append(str(error))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    again = root + "/again/" + name
    model.save_pretrained(again)
    reloaded = auto.from_pretrained(again, trust_remote_code=True)
    save_file(compute(model, **inputs, generates=name in generate), folder + "/found.safetensors")
    save_file(compute(reloaded, **inputs, generates=name in generate), again + "/found.safetensors")
    classes[name] = [type(config).__name__, type(model).__name__, type(model).__module__.partition(".")[0]]
assert not any(name.partition(".")[0] == "finetune" for name in sys.modules)
print(json.dumps({"refusals": refusals, "classes": classes}))
"""


def compute(model, ids, mask, generates):  # no annotations: its text runs in the clean process too
    options = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    if model.config.num_items:
        options["logits_to_keep"] = 0
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, **options)
    found = {}
    for name, value in output.items():
        for part, tensor in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(tensor, torch.Tensor):
                found[name + part] = tensor.contiguous()
    if generates:
        found["generated"] = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
    return found


def build(name: str) -> Any:
    """A model whose weights are all random, biases and norms too."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = triad.TriadConfig(**sizes, intermediate_size=24, max_position_embeddings=32, **MODELS[name][1])
    torch.manual_seed(0)
    model = getattr(triad, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for tensor in model.buffers():
            tensor.copy_(torch.randn(tensor.shape) > 0)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each class, with what its model says here in `expected.safetensors`."""
    folder = tmp_path_factory.mktemp("triad")
    inputs = {"ids": IDS, "mask": MASK}
    save_file(inputs, folder / "inputs.safetensors")
    for name in MODELS:
        model = build(name)
        model.save_pretrained(folder / name)
        expected = compute(model, **inputs, generates=name in GENERATE)
        save_file(expected, folder / name / "expected.safetensors")
    return folder


@pytest.fixture(scope="module")
def clean(
    root: Path, tmp_path_factory: pytest.TempPathFactory, run_without_toolkit: Callable[..., Any]
) -> dict[str, Any]:
    """What one clean process says of all folders."""
    home = tmp_path_factory.mktemp("home")
    environment = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    cases = {name: auto for name, (auto, _) in MODELS.items()}
    code = inspect.getsource(compute) + CLEAN
    return run_without_toolkit(home, code, str(root), json.dumps(cases), json.dumps(GENERATE), **environment)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(root: Path, clean: dict[str, Any], name: str) -> None:
    assert clean["classes"][name] == ["TriadConfig", name, "transformers_modules"]
    expected = load_file(root / name / "expected.safetensors")
    for folder in (root / name, root / "again" / name):
        found = load_file(folder / "found.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[part], expected[part]) for part in expected)


@pytest.mark.parametrize("name", MODELS)
def test_refused_without_the_users_word(clean: dict[str, Any], name: str) -> None:
    assert len(clean["refusals"][name]) == 2
    assert all("trust_remote_code=True" in message for message in clean["refusals"][name])


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_holds_its_files_of_code(root: Path, name: str) -> None:
    code = {path.name for path in (root / name).glob("*.py")}
    assert code == {"configuration_triad.py", "modeling_triad.py", *FILES.get(name, [])}
    source = Path(triad.__file__).parent
    assert all((root / name / file).read_bytes() == (source / file).read_bytes() for file in code)
