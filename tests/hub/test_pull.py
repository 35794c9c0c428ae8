"""What was pushed comes back: in a process without the toolkit, as a toolkit's model, as a base and as an adapter."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest

import finetune
from finetune.adapters.saving import write_own_code
from finetune.models.base import find_base, resolve_base

ADAPTER, WHOLE, BASE = "acme/tone", "acme/whole", "acme/tiny-base"
TEXTS = ["profit falls on loss", "the board names a new chair", "acme wins and raises its forecast after strong sales"]
TOLERANCE = 1e-5
Command = Callable[..., Any]

CLEAN = """
import json, sys
import torch
torch.set_num_threads(1)
codes, texts = json.loads(sys.argv[1])
found = []
for code in codes:
    names = {}
    exec(code, names)
    tokens = names["tokenizer"](texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found.append(names["model"].eval()(**tokens).logits.tolist())
print(json.dumps(found))
"""


@pytest.fixture
def pulled(hub: Any, waits: list[float], tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub with the base of the runs, and an empty cache in front of it."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    hub.create(BASE, files={path.name: path.read_bytes() for path in tiny_base.iterdir()})
    return cache


@pytest.fixture
def adapter(pulled: Path, run: Path, command: Command) -> str:
    """The name of an adapter that was pushed."""
    assert command("push", run, ADAPTER).code == 0
    return ADAPTER


@pytest.fixture
def whole(pulled: Path, run: Path, command: Command) -> str:
    """The name of the same, merged into its base."""
    assert command("push", run, WHOLE, "--merge").code == 0
    return WHOLE


def compute_logits(reference: str | Path) -> Any:
    return finetune.load(reference).compute_text_logits(TEXTS)


def test_a_process_without_the_toolkit_gets_the_same_logits(
    hub: Any, adapter: str, whole: str, finished_run: Path, tmp_path: Path, run_without_toolkit: Command
) -> None:
    cards = [hub.repos["model", name].files["README.md"].decode() for name in (adapter, whole)]
    codes = [re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0] for card in cards]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.reader}
    hub.fail("GET", "/elsewhere/", is_cut=True)  # weights that break off are gone on with
    found = run_without_toolkit(tmp_path, CLEAN, json.dumps([codes, TEXTS]), **environment)
    expected = compute_logits(finished_run)
    assert np.ptp(expected) > 0.1
    for logits in found:
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    assert not any(fault.times for fault in hub.faults)


REGISTER = """
import json
from peft import PeftConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
get_class_from_dynamic_module("frozen.register", "acme/biases")()
print(json.dumps(PeftConfig.from_pretrained("acme/biases").peft_type))
"""


def test_the_code_of_a_method_that_peft_lacks_is_fetched_file_by_file(
    hub: Any, tmp_path: Path, run_without_toolkit: Command
) -> None:
    write_own_code(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.py")}
    hub.create("acme/biases", files=files | {"adapter_config.json": b'{"peft_type": "BITFIT"}'})
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.reader}
    assert run_without_toolkit(tmp_path, REGISTER, **environment) == "BITFIT"


def test_the_toolkit_loads_it_by_name_and_again_without_the_hub(
    hub: Any, adapter: str, whole: str, finished_run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compute_logits(finished_run)
    for name in (adapter, whole):
        np.testing.assert_allclose(compute_logits(name), expected, atol=TOLERANCE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    np.testing.assert_allclose(compute_logits(adapter), expected, atol=TOLERANCE)
    said = json.loads(command("predict", adapter, TEXTS[0], "--json").out)
    assert said == json.loads(command("predict", finished_run, TEXTS[0], "--json").out)
    assert len(hub.requests) == asked


@pytest.mark.parametrize("way", ["adapter", "merged"])
@pytest.mark.parametrize(
    "kind",
    ["text_classification", "retrieval", pytest.param("reranking", marks=pytest.mark.slow)]
    + [pytest.param(kind, marks=pytest.mark.slow) for kind in ("multi_task", "question_answering")],
)
def test_every_task_type_answers_as_its_run_does(
    kind: str,
    way: str,
    pulled: Path,
    find_run: Callable[[str], Path],
    list_answers: Callable[[Any, str], Any],
    copy_for_hub: Callable[[Path], Path],
    command: Command,
) -> None:
    options = ["--merge"] if way == "merged" else []
    done = command("push", copy_for_hub(find_run(kind)), f"acme/{kind}", "--force", *options)
    assert done.code == 0, done.err
    expected = list_answers(finetune.load(find_run(kind)), kind)
    assert np.ptp(expected) > 50 * TOLERANCE
    np.testing.assert_allclose(list_answers(finetune.load(f"acme/{kind}"), kind), expected, atol=TOLERANCE)


def test_a_run_trains_on_from_it(
    whole: str, write_recipe: Callable[..., Path], tmp_path: Path, command: Command
) -> None:
    from safetensors.torch import load_file

    # Steps of no length: what comes out is what went in.
    train = {"epochs": 1, "learning_rate": 1e-12, "ema_decay": None}
    recipe = write_recipe(tmp_path / "on", model={"base": whole}, adapter={"method": "full"}, train=train)
    done = command("run", recipe, "--runs", tmp_path / "on" / "runs", "--json")
    assert done.code == 0, done.err
    folder = Path(json.loads(done.out)["run"])
    assert json.loads((folder / "run.lock").read_text())["base"]["reference"] == whole
    before = load_file(next((tmp_path / "cache").glob("models--acme--whole/snapshots/*/model.safetensors")))
    after = load_file(folder / "model" / "model.safetensors")
    shared = [name for name in before if "encoder" in name]
    assert len(shared) > 10
    for name in shared:
        np.testing.assert_allclose(after[name], before[name], atol=1e-6)


def test_an_adapter_trains_on_from_it(
    adapter: str, write_recipe: Callable[..., Path], tmp_path: Path, command: Command
) -> None:
    recipe = write_recipe(tmp_path / "on", model={"base": BASE, "adapters": [adapter]}, train={"epochs": 1})
    done = command("run", recipe, "--runs", tmp_path / "on" / "runs", "--json")
    assert done.code == 0, done.err


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json"])
def test_a_half_filled_cache_is_completed(pulled: Path, tiny_base: Path, missing: str) -> None:
    folder = resolve_base(BASE).folder
    (folder / missing).unlink()
    assert find_base(BASE) is None
    assert resolve_base(BASE).folder == folder
    assert (folder / missing).read_bytes() == (tiny_base / missing).read_bytes()
    assert find_base(BASE) is not None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "acme/nothing",
            "acme/nothing: must be a run, a saved model's folder or a model on the Hub; the Hub answered 404. "
            "Check the name, and HF_TOKEN where it is private.",
        ),
        (
            BASE,
            f"{BASE}: must be a model that this toolkit pushed, got one without finetune.json. "
            "To train on it, set model.base; to score it: finetune evaluate --model.",
        ),
    ],
)
def test_what_cannot_be_pulled(pulled: Path, command: Command, name: str, words: str) -> None:
    outcome = command("predict", name, "anything")
    assert outcome.code != 0
    assert words in outcome.err


def test_a_folder_with_the_owners_name(
    adapter: str, own_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies here comes first, nothing in a folder of runs is asked of the Hub, and all else is."""
    here = tmp_path / "here"
    (here / "acme").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert command("predict", adapter, "anything").code == 0
    outcome = command("predict", "acme/nothing", "anything")
    assert "; the Hub answered 404, and the folder acme here has no nothing. Check the name, and HF_T" in outcome.err
    shutil.copytree(own_run, here / "acme" / "tone" / own_run.name)
    assert command("predict", "acme/tone", "anything").code == 0
    outcome = command("predict", "acme/tome", "anything")
    assert "acme/tome: must be a finished run, got none. acme has tone. Make one: finetune run RECIPE" in outcome.err


def test_a_private_model_without_a_token(
    hub: Any, adapter: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    outcome = command("predict", adapter, "anything")
    assert outcome.code != 0
    assert "the Hub answered 401. Check the name, and HF_TOKEN where it is private." in outcome.err


def test_weights_that_are_not_those_that_were_pushed(hub: Any, adapter: str, command: Command) -> None:
    files = hub.repos["model", adapter].files
    weights = bytearray(files["adapter_model.safetensors"])
    weights[-1] ^= 1
    files["adapter_model.safetensors"] = bytes(weights)
    outcome = command("predict", adapter, "anything")
    assert outcome.code != 0
    assert "adapter_model.safetensors" in outcome.err


def test_an_adapter_is_no_base(
    adapter: str, write_recipe: Callable[..., Path], tmp_path: Path, command: Command
) -> None:
    outcome = command("check", write_recipe(tmp_path / "on", model={"base": adapter}))
    assert outcome.code != 0
    assert "or pushed with --merge. To train an adapter on: model.adapters." in outcome.err
