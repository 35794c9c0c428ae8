"""One battery over every method and both architectures: what is trained, saved, merged, switched off and resumed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.adapters.attach import (
    ParameterCount,
    attach_adapter,
    count_parameters,
    list_trained,
    load_adapter,
    merge_adapter,
    plan_parameters,
)
from finetune.adapters.budget import add_penalty, build_budget, get_rate_factor, start_adapter
from finetune.adapters.methods import METHODS
from finetune.artifact.save import save_model
from finetune.data.batches import Batch, Examples, collate, list_inputs
from finetune.errors import Interrupted, ModelError
from finetune.models.base import BaseModel, load_tokenizer
from finetune.models.classifier import get_padding, list_head_modules
from finetune.models.prediction import compute_logits
from finetune.recipe.schema import AdapterSection, ModelSection, TrainSection
from finetune.tasks.text_classification import TextClassification
from finetune.training.loop import Problem, count_steps, fit
from finetune.training.session import LoopState, build_session

TASK = TextClassification(["a", "b", "c"], {})
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
MERGE_TOLERANCE = 1e-4

# Processes that know nothing but the saved folders and where the base lies: one through the toolkit, and one as the
# model card says, through transformers and PEFT alone.
RELOAD = """
import json, pathlib, sys
import numpy as np, torch
from finetune.adapters.attach import load_adapter
from finetune.data.batches import Examples
from finetune.models.base import BaseModel
from finetune.models.prediction import compute_logits
from finetune.tasks.text_classification import TextClassification
torch.set_num_threads(1)
base, examples, *folders = map(pathlib.Path, sys.argv[1:])
examples = Examples.load(examples)
for folder in folders:
    task = TextClassification.from_config(json.loads((folder / "finetune.json").read_text())["task"])
    model = load_adapter(task.load_model(folder, BaseModel("acme/tiny", base, "here")), folder)
    np.save(folder.parent / "reloaded.npy", compute_logits(model, examples, 0))
"""
PLAIN = """
import json, pathlib, sys
import numpy as np, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module
torch.set_num_threads(1)
base, batch, *folders = map(pathlib.Path, sys.argv[1:])
batch = load_file(batch)
for folder in folders:
    if (folder / "frozen.py").exists():
        get_class_from_dynamic_module("frozen.register", folder)()
    own_code = (folder / "modeling_triad.py").exists()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
    if own_code:
        Triad = get_class_from_dynamic_module("modeling_triad.TriadForSequenceClassification", folder)
        plain = Triad.from_pretrained(base, config=config, key_mapping=config.base_key_mapping)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(plain, folder).eval()(**batch).logits
    np.save(folder.parent / "plain.npy", logits.numpy())
print(json.dumps(len(folders)))
"""


def build_examples(rows: int = 24, seed: int = 0) -> Examples:
    """Rows of 2 to 11 tokens; the first one says the class."""
    generator = np.random.default_rng(seed)
    encoded = [generator.integers(5, 300, size=generator.integers(2, 12)).tolist() for _ in range(rows)]
    return Examples.build(encoded, [row[0] % 3 for row in encoded])


def build_train_section(**changes: Any) -> TrainSection:
    values = {"epochs": 1, "tokens_per_batch": 90, "learning_rate": 0.02, "precision": "float32", "early_stop": None}
    return TrainSection(**{**values, "max_steps": 2, "ema_decay": None, **changes})


@dataclass
class Subject:
    """A classifier with an adapter, and what it was before.

    Args:
        model: as attached.
        section: the recipe's `adapter`.
        originals: name -> each weight that the model had, as object, and its bits once the adapter was there.
        base_logits: of the model before anything was attached.
        plan: weights that were counted beforehand.
    """

    model: Any
    section: AdapterSection
    originals: dict[str, tuple[nn.Parameter, torch.Tensor]]
    base_logits: np.ndarray
    plan: ParameterCount
    pad_token_id: int | None

    def compute_logits(self) -> np.ndarray:
        return compute_logits(self.model, EXAMPLES, self.pad_token_id)


EXAMPLES = build_examples()


def build_base(base: Path, architecture: str) -> Any:
    place = BaseModel("acme/tiny", base, "local folder")
    return TASK.build_model(place, ModelSection(architecture=architecture), load_tokenizer(place), 0)


def build(base: Path, architecture: str, values: dict[str, Any], train: TrainSection | None = None) -> Subject:
    """The way of `fitting.train`."""
    section, tokenizer = AdapterSection(**values), load_tokenizer(BaseModel("acme/tiny", base, "local folder"))
    model = build_base(base, architecture)
    parameters = dict(model.named_parameters())
    packs = METHODS[section.method].packs
    base_logits = compute_logits(model, EXAMPLES, get_padding(model, tokenizer) if packs else 0)
    head = list_head_modules(model)
    plan = plan_parameters(model, section, head)
    model = attach_adapter(
        model, section, head, "acme/tiny", total_steps=count_steps(EXAMPLES, train or build_train_section())
    )
    pad_token_id = get_padding(model, tokenizer)
    start_adapter(model, section, EXAMPLES, pad_token_id, partial(TASK.compute_losses, label_smoothing=0.0))
    originals = {name: (weight, weight.detach().clone()) for name, weight in parameters.items()}
    return Subject(model, section, originals, base_logits, plan, pad_token_id)


def train(subject: Subject, folder: Path, section: TrainSection, act: Callable[[], None] = lambda: None) -> LoopState:
    """`fit` with everything that the method needs; `act` is called before each step's losses."""
    budget = build_budget(subject.model, subject.section)
    compute = add_penalty(partial(TASK.compute_losses, label_smoothing=0.0), budget)

    def compute_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        act()
        return compute(model, batch)

    problem = Problem(
        train=EXAMPLES,
        validation=EXAMPLES,
        row_weights=np.ones(len(EXAMPLES), dtype=np.float32),
        compute_losses=compute_losses,
        compute_metrics=partial(TASK.compute_metrics, names=["macro_f1"]),
        is_larger_better=lambda name: name != "loss",
        head=["classifier"],
        pad_token_id=subject.pad_token_id,
        rate_factor=get_rate_factor(subject.section),
        rule=budget,
    )
    with closing(build_session(section, folder, section.precision)) as session:
        return fit(subject.model, problem, section, session, quiet=True)


@dataclass
class Trained:
    """A subject after two steps and a stir, and the folder that it was saved to."""

    subject: Subject
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    logits: np.ndarray
    folder: Path


@pytest.fixture(scope="module")
def trained(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, methods: dict[str, Any], stir: Callable[..., None]
) -> Callable[[str, str], Trained]:
    """`trained(architecture, case)`, each made once."""
    made: dict[tuple[str, str], Trained] = {}

    def get(architecture: str, case: str) -> Trained:
        if (architecture, case) not in made:
            subject = build(tiny_base, architecture, methods[case])
            before = {name: weight.detach().clone() for name, weight in list_trained(subject.model).items()}
            folder = tmp_path_factory.mktemp("run")
            train(subject, folder, build_train_section())
            after = {name: weight.detach().clone() for name, weight in list_trained(subject.model).items()}
            stir(subject.model)
            settings = {"task": TASK.to_config(), "temperature": 1.0, "max_length": 64}
            save_model(subject.model, load_tokenizer(BaseModel("tiny", tiny_base, "")), folder / "model", settings)
            logits = subject.compute_logits()
            made[architecture, case] = Trained(subject, before, after, logits, folder / "model")
        return made[architecture, case]

    return get


@pytest.fixture(scope="module")
def reload(tiny_base: Path) -> Callable[[Trained], Any]:
    """The saved adapter on its base, which is read anew and has the head that training began with."""

    def load(made: Trained, architecture: str) -> Any:
        return load_adapter(build_base(tiny_base, architecture), made.folder)

    return load


@pytest.fixture(scope="module")
def reloaded(
    trained: Callable[[str, str], Trained],
    methods: dict[str, Any],
    tiny_base: Path,
    tmp_path_factory: Any,
    run_without_toolkit: Callable[..., Any],
) -> Callable[[str, str, str], np.ndarray]:
    """Logits out of one other process for all cases, and of one without the toolkit."""
    folder = tmp_path_factory.mktemp("elsewhere")
    EXAMPLES.save(folder / "examples.safetensors")
    save_file(list_inputs(collate(EXAMPLES, np.arange(len(EXAMPLES)), 0)), folder / "batch.safetensors")
    folders = [str(trained(architecture, case).folder) for architecture in ("triad", "native") for case in methods]
    place = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    words = [str(tiny_base), str(folder / "batch.safetensors"), *folders]
    assert run_without_toolkit(folder, PLAIN, *words, **place) == len(folders)
    words = [str(tiny_base), str(folder / "examples.safetensors"), *folders]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return lambda architecture, case, way: np.load(trained(architecture, case).folder.parent / f"{way}.npy")


each_architecture = pytest.mark.parametrize("architecture", ["triad", "native"])


@each_architecture
def test_the_plan_counts_what_is_trained(trained, architecture, case):
    subject = trained(architecture, case).subject
    assert subject.plan == count_parameters(subject.model)
    assert 0 < subject.plan.trained < subject.plan.total


@each_architecture
def test_no_bit_of_the_base_is_touched(trained, architecture, case):
    made = trained(architecture, case)
    for name, (weight, bits) in made.subject.originals.items():
        assert not weight.requires_grad, name
        assert torch.equal(weight, bits), name


@each_architecture
def test_what_is_trained_is_new_and_moves(trained, architecture, case):
    """None of it is a weight that the model had; adapter and head both move."""
    made = trained(architecture, case)
    had = {id(weight) for weight, _ in made.subject.originals.values()}
    now = list_trained(made.subject.model)
    assert not [name for name, weight in now.items() if id(weight) in had]
    moved = {name for name in now if not torch.equal(made.before[name], made.after[name])}
    head = {name for name in now if "modules_to_save" in name}
    assert head <= moved
    assert moved - head or case == "head"
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in head} == {"classifier", "pooler"}


@each_architecture
def test_only_adapter_and_head_get_gradients(trained, architecture, case):
    subject = trained(architecture, case).subject
    batch = collate(EXAMPLES, np.arange(6), subject.pad_token_id)
    TASK.compute_losses(subject.model, batch, 0.0).mean().backward()
    with_gradient = {name for name, weight in subject.model.named_parameters() if weight.grad is not None}
    subject.model.zero_grad(set_to_none=True)
    assert with_gradient == set(list_trained(subject.model))


@each_architecture
def test_bf16_gives_numbers(trained, architecture, case):
    subject = trained(architecture, case).subject
    with torch.autocast("cpu", torch.bfloat16):
        losses = TASK.compute_losses(subject.model, collate(EXAMPLES, np.arange(6), subject.pad_token_id), 0.0)
    losses.mean().backward()
    gradients = [weight.grad for weight in list_trained(subject.model).values()]
    assert all(torch.isfinite(tensor).all() for tensor in (losses, *gradients))
    subject.model.zero_grad(set_to_none=True)


@each_architecture
def test_another_process_reads_the_same_model(trained, reloaded, architecture, case):
    logits = trained(architecture, case).logits
    assert logits.std(axis=0).min() > 100 * TOLERANCE  # equal for all rows would be equal for no good reason
    assert np.abs(logits - trained(architecture, case).subject.base_logits).max() > 100 * TOLERANCE
    for way in ("reloaded", "plain"):
        np.testing.assert_allclose(reloaded(architecture, case, way), logits, atol=TOLERANCE, rtol=0, err_msg=way)


@each_architecture
def test_the_head_comes_back_bit_for_bit(trained, reload, architecture, case):
    made = trained(architecture, case)
    loaded = dict(reload(made, architecture).named_parameters())
    head = [name for name in list_trained(made.subject.model) if "modules_to_save" in name]
    assert len(head) == 4
    for name in head:
        assert torch.equal(loaded[name], made.subject.model.get_parameter(name)), name
    assert not any(weight.requires_grad for weight in loaded.values())


@each_architecture
def test_switched_off_it_is_the_base(trained, reload, disable, architecture, case):
    """Bit for bit, also where training itself had changed the base in memory."""
    made = trained(architecture, case)
    with disable(reload(made, architecture)) as base:
        np.testing.assert_array_equal(
            compute_logits(base, EXAMPLES, made.subject.pad_token_id), made.subject.base_logits
        )


@each_architecture
def test_merged(trained, reload, architecture, merged):
    made = trained(architecture, merged)
    model = merge_adapter(reload(made, architecture))
    assert {name for name, _ in model.named_parameters()} == set(made.subject.originals)
    assert not any(hasattr(module, "base_layer") for module in model.modules())
    pad_token_id = get_padding(model, None) if architecture == "triad" else 0
    np.testing.assert_allclose(compute_logits(model, EXAMPLES, pad_token_id), made.logits, atol=MERGE_TOLERANCE, rtol=0)


@each_architecture
def test_words_where_nothing_can_be_merged(trained, architecture, unmerged):
    made = trained(architecture, unmerged)
    with pytest.raises(ModelError) as caught:
        merge_adapter(made.subject.model)
    kind = {"prefix": "prefix_tuning", "prompt": "prompt_tuning", "p_tuning": "p_tuning"}.get(unmerged, "bottleneck")
    reason = (
        "it is no linear function" if kind == "bottleneck" else "its virtual tokens are no part of the base's weights"
    )
    assert str(caught.value) == (
        f"adapter: must be one that can be merged, got {kind}: {reason}. Use the base and the adapter together."
    )


@each_architecture
def test_the_folder_holds_adapter_and_head_only(trained, tiny_base, architecture, case):
    made = trained(architecture, case)
    names = {"adapter_config.json", "adapter_model.safetensors", "config.json", "finetune.json"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    code = {"modeling_triad.py", "configuration_triad.py"} if architecture == "triad" else set()
    if made.subject.section.method in ("adapter", "bitfit", "head"):  # PEFT itself does not know them
        code |= {"frozen.py", "bias.py", "bottleneck.py", "targets.py", "errors.py"}
    assert {path.name for path in made.folder.iterdir()} == names | code
    tensors = load_file(made.folder / "adapter_model.safetensors")
    assert not [name for name in tensors if "base_layer" in name or "original_module" in name]
    base = [bits for name, (_, bits) in made.subject.originals.items() if bits.ndim == 2 and "classifier" not in name]
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert not any(tensor.shape == bits.shape and torch.equal(tensor, bits) for bits in base), name
    private = [str(path) for path in (tiny_base, made.folder.parent, Path.home(), Path.cwd())]
    for path in made.folder.iterdir():
        content = path.read_bytes()
        assert not [part for part in private if len(part) > 1 and part.encode() in content], path.name
    assert json.loads((made.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"


def test_stopped_and_resumed_it_ends_with_the_same_bits(tiny_base, methods, tmp_path, case):
    """With other random numbers at the start: everything must come from the checkpoint, the base or the data."""
    section = build_train_section(epochs=2, max_steps=4, ema_decay=0.9)

    def run(name: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        subject, steps = build(tiny_base, "triad", methods[case], section), itertools.count(1)

        def act() -> None:
            if next(steps) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        train(subject, tmp_path / name, section, act)
        return {name: weight.detach().clone() for name, weight in list_trained(subject.model).items()}

    whole = run("whole")
    with pytest.raises(Interrupted, match="after step 3 of 4"):
        run("parts", stop_at=3)
    parts = run("parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
