"""The fast forward and backward of a LoRA layer are PEFT's own, and PEFT's own where they cannot be."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from finetune.adapters import fast_lora
from finetune.adapters.fast_lora import (
    FastLinear,
    FrozenLinear,
    is_merging_cheaper,
    restore_lora,
    speed_up_frozen,
    speed_up_lora,
)

IN, OUT, RANK = 6, 5, 2
INPUT_IDS = torch.tensor([[2, 40, 41, 3, 0, 0], [2, 50, 51, 52, 53, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
LABELS = torch.tensor([0, 2])

Grads = dict[str, torch.Tensor]


def build_layer(
    base: nn.Module | None = None, rank: int = RANK, dtype: torch.dtype = torch.float32, **options: Any
) -> Linear:
    """PEFT's layer with an update that is not zero."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT) if base is None else base
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=IN**-0.5)
    config = LoraConfig(r=rank, lora_alpha=3 * rank, **options)
    layer = Linear(base.requires_grad_(False), "default", config=config, r=rank, lora_alpha=3 * rank)
    nn.init.normal_(layer.lora_B["default"].weight, std=rank**-0.5)
    return layer.to(dtype)


def speed_up(layer: Linear) -> FastLinear:
    fast = speed_up_lora(copy.deepcopy(layer))
    assert type(fast) is FastLinear
    return fast


def draw_weights(y: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) / max(y.numel(), 1) ** 0.5


def run(layer: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Grads]:
    """Output, and the gradients of a sum of it with random weights, so small that they are of the size of 1."""
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    y = layer(x, *args, **kwargs)
    if y.requires_grad:
        (y * draw_weights(y)).sum().backward()
    tensors = {"x": x, **dict(layer.named_parameters())}
    return y.detach(), {name: tensor.grad.clone() for name, tensor in tensors.items() if tensor.grad is not None}


@pytest.fixture
def peft_calls() -> Iterator[Callable[[], int]]:
    """How often PEFT's own forward ran."""
    with patch.object(Linear, "forward", autospec=True, side_effect=Linear.forward) as spy:
        yield lambda: spy.call_count


def make_x(lead: tuple[int, ...], layout: str, dtype: torch.dtype, width: int = IN) -> torch.Tensor:
    """An input (*lead, width) whose memory is in one piece, in every second column, in another order or repeated."""
    torch.manual_seed(2)
    if layout == "strided":
        return torch.randn(*lead, 2 * width, dtype=dtype)[..., ::2]
    if layout == "permuted":
        return torch.randn(width, *lead, dtype=dtype).movedim(0, -1)
    if layout == "expanded":
        return torch.randn(width, dtype=dtype).expand(*lead, width)
    return torch.randn(*lead, width, dtype=dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lead=st.lists(st.integers(1, 7), max_size=3).map(tuple),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9)),
    layout=st.sampled_from(["contiguous", "strided", "permuted", "expanded"]),
    double=st.booleans(),
    bias=st.sampled_from(["none", "frozen", "trained"]),
    trained=st.sampled_from(["all", "factors", "x", "down", "up"]),
    merge=st.booleans(),
)
def test_equals_peft(
    lead: tuple[int, ...],
    sizes: tuple[int, int, int],
    layout: str,
    double: bool,
    bias: str,
    trained: str,
    merge: bool,
):
    width, out, rank = sizes
    dtype, tolerance = (torch.float64, 1e-10) if double else (torch.float32, 1e-5)
    layer = build_layer(nn.Linear(width, out, bias=bias != "none"), rank=rank, dtype=dtype)
    if bias == "trained":
        layer.base_layer.bias.requires_grad_(True)
    layer.lora_A["default"].requires_grad_(trained in ("all", "factors", "down"))
    layer.lora_B["default"].requires_grad_(trained in ("all", "factors", "up"))
    x = make_x(lead, layout, dtype, width).detach().requires_grad_(trained in ("all", "x"))
    expected, expected_grads = run(layer, x)
    with (
        patch.object(fast_lora, "is_merging_cheaper", lambda *_: merge),
        patch.object(Linear, "forward", side_effect=AssertionError("went PEFT's way")),
    ):
        found, grads = run(speed_up(layer), x)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(grads, expected_grads, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("lead", [(4,), (2, 3)])
def test_gradients_are_those_of_finite_differences(lead: tuple[int, ...], merge: bool):
    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    generator = torch.Generator().manual_seed(0)
    x, weight, bias, down, up = make(*lead, IN), make(OUT, IN), make(OUT), make(RANK, IN), make(OUT, RANK)
    for tensor in (x, bias, down, up):
        tensor.requires_grad_(True)
    with patch.object(fast_lora, "is_merging_cheaper", lambda *_: merge):
        assert torch.autograd.gradcheck(fast_lora.LoraFunction.apply, (x, weight, bias, down, up, 1.7))


def test_merges_where_the_products_are_fewer():
    # 384 * 384 / (384 + 384) = 192 tokens; 384 * 1536 / (384 + 1536) = 307.2
    assert [is_merging_cheaper(tokens, torch.empty(384, 384)) for tokens in (192, 193)] == [False, True]
    assert [is_merging_cheaper(tokens, torch.empty(1536, 384)) for tokens in (307, 308)] == [False, True]
    assert not is_merging_cheaper(10_000, torch.empty(384, 384, dtype=torch.bfloat16))
    assert not is_merging_cheaper(10_000, torch.empty(384, 384, device="meta"))


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_tokens(lead: tuple[int, ...]):
    layer = build_layer()
    x = torch.randn(*lead, IN, requires_grad=True)
    (expected, expected_grads), (found, grads) = run(layer, x), run(speed_up(layer), x)
    torch.testing.assert_close((found, grads), (expected, expected_grads))


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("wants_x", [False, True])
def test_keeps_nothing_of_the_size_of_the_output(tokens: int, wants_x: bool):
    layer, kept = speed_up(build_layer()), []
    x = torch.randn(tokens, IN, requires_grad=wants_x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
        layer(x)
    merged = is_merging_cheaper(tokens, layer.base_layer.weight)
    expected = {"x": x, "down": layer.lora_A["default"].weight, "up": layer.lora_B["default"].weight}
    shapes = [tuple(tensor.shape) for tensor in kept]
    pointers = [tensor.data_ptr() for tensor in kept]
    assert all(tensor.data_ptr() in pointers for tensor in expected.values())
    assert (layer.base_layer.weight.data_ptr() in pointers) is (wants_x and not merged)
    low = [] if merged else [(RANK, tokens)]
    assert sorted(shapes) == sorted([(tokens, IN), (RANK, IN), (OUT, RANK), *[(OUT, IN)] * wants_x, *low])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("lead", [(3,), (8, 6)])
def test_autocast_is_as_near_to_the_truth_as_peft(
    lead: tuple[int, ...], backward_inside: bool, dtype: torch.dtype, peft_calls: Callable[[], int]
):
    layer = build_layer(nn.Linear(64, 48), rank=4)
    layer.base_layer.bias.requires_grad_(True)
    x = make_x(lead, "contiguous", torch.float32, 64).requires_grad_(True)
    truth, true_grads = run(layer, x)

    def run_autocast(layer: nn.Module) -> tuple[torch.Tensor, Grads]:
        if backward_inside:
            with torch.autocast("cpu", dtype=dtype):
                return run(layer, x)
        return run(Autocast(layer, dtype), x)

    expected, expected_grads = run_autocast(layer)
    calls = peft_calls()
    found, grads = run_autocast(speed_up(layer))
    assert peft_calls() == calls
    assert found.dtype == expected.dtype == dtype
    assert {name: grad.dtype for name, grad in grads.items()} == dict.fromkeys(grads, torch.float32)
    assert grads.keys() == expected_grads.keys()
    pairs = {"y": (found, expected, truth)} | {
        name: (grads[name], expected_grads[name], true_grads[name.removeprefix("layer.")]) for name in grads
    }
    assert len(pairs) == 5
    for name, (ours, theirs, true) in pairs.items():
        ours_error, peft_error = ((values.float() - true).norm() / true.norm() for values in (ours, theirs))
        assert ours_error < 2 * peft_error, name
        assert ours_error < 0.01, name


class Autocast(nn.Module):
    """A layer whose forward alone is under autocast."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            return self.layer(x)


def build_pair() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Two frozen layers with a trained bias between, as they are and sped up, and an input."""
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    plain[0].requires_grad_(False)
    plain[1].weight.requires_grad_(False)
    return plain, speed_up_frozen(copy.deepcopy(plain)), torch.randn(3, 6, requires_grad=True)


def test_a_frozen_layer_says_under_autocast_what_it_says_without_memory():
    plain, fast, x = build_pair()
    assert [type(layer) for layer in fast] == [FrozenLinear, FrozenLinear]
    for layers in (plain, fast):
        with torch.inference_mode(), torch.autocast("cpu"):  # validation comes first
            layers(x)
    found = []
    for layers in (plain, fast):
        for _ in range(2):
            with torch.autocast("cpu"):
                y = layers(x)
            found.append((y.detach(), *torch.autograd.grad(y.sum(), [x, layers[1].bias])))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=0, rtol=0)


def test_a_frozen_layer_sees_that_its_weight_has_changed():
    plain, fast, x = build_pair()
    for change in (lambda weight: weight.mul_(2), lambda weight: weight.add_(1)):
        with torch.no_grad(), torch.autocast("cpu"):
            fast(x)
            for layers in (plain, fast):
                change(layers[0].weight)
            torch.testing.assert_close(fast(x), plain(x), atol=0, rtol=0)


def test_layers_that_are_trained_or_wrapped_stay_as_they_are(peft_model: nn.Module):
    linear = nn.Linear(3, 3)
    assert type(speed_up_frozen(nn.Sequential(linear))[0]) is nn.Linear
    fast = count_fast(speed_up_lora(peft_model))
    assert count_fast(speed_up_frozen(peft_model)) == fast
    bases = [module.base_layer for module in peft_model.modules() if type(module) is FastLinear]
    assert {type(base) for base in bases} == {nn.Linear}


def test_float32_layer_whose_backward_is_under_autocast():
    layer, x = build_layer(), torch.randn(3, IN, requires_grad=True)
    expected = run(layer, x)[1]["x"]
    y = speed_up(layer)(x)
    with torch.autocast("cpu"):
        grad = torch.autograd.grad(y, x, draw_weights(y))[0]
    torch.testing.assert_close(grad, expected)


# ---- where PEFT's own forward must run --------------------------------------------------------------------------


def add_second(layer: Linear) -> None:
    config = LoraConfig(r=3, lora_alpha=3, init_lora_weights=False)
    torch.manual_seed(1)
    layer.update_layer("second", 3, lora_alpha=3, config=config)


def activate_both(layer: Linear) -> None:
    add_second(layer)
    layer.set_adapter(["default", "second"])


def activate_none(layer: Linear) -> None:
    layer._active_adapter = ["elsewhere"]


def watch(get: Callable[[Linear], nn.Module]) -> Callable[[Linear], None]:
    """Double what a part of the layer gives."""
    return lambda layer: get(layer).register_forward_hook(lambda _module, _inputs, output: 2 * output) and None


def watch_before(layer: Linear) -> None:
    layer.base_layer.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))


def watch_backward(layer: Linear) -> None:
    layer.base_layer.register_full_backward_hook(lambda _module, inputs, _outputs: (2 * inputs[0],))


def watch_backward_before(layer: Linear) -> None:
    layer.base_layer.register_full_backward_pre_hook(lambda _module, outputs: (2 * outputs[0],))


def replace_forward(layer: Linear) -> None:
    base = layer.base_layer
    base.forward = lambda x: 2 * nn.functional.linear(x, base.weight, base.bias)


class DoubledLinear(nn.Linear):
    """Stands for quantized and other layers that only look like a linear one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


FALLBACKS: dict[str, tuple[dict[str, Any], Callable[[Linear], Any]]] = {
    "adapter disabled": ({}, lambda layer: layer.enable_adapters(False)),
    "merged": ({}, lambda layer: layer.merge()),
    "two active adapters": ({}, activate_both),
    "active adapter is elsewhere": ({}, activate_none),
    "dropout": ({"lora_dropout": 0.5}, lambda layer: layer.train()),
    "DoRA": ({"use_dora": True}, lambda _: None),
    "bias in the update": ({"lora_bias": True}, lambda layer: nn.init.ones_(layer.lora_B["default"].bias)),
    "base is trained": ({}, lambda layer: layer.base_layer.weight.requires_grad_(True)),
    "base is another class": ({"base": DoubledLinear(IN, OUT)}, lambda _: None),
    "base is a Conv1D": ({"base": Conv1D(OUT, IN), "fan_in_fan_out": True}, lambda _: None),
    "base has a hook": ({}, watch(lambda layer: layer.base_layer)),
    "A has a hook": ({}, watch(lambda layer: layer.lora_A["default"])),
    "B has a hook": ({}, watch(lambda layer: layer.lora_B["default"])),
    "base has a hook before": ({}, watch_before),
    "base has a hook on gradients": ({}, watch_backward),
    "base has a hook before gradients": ({}, watch_backward_before),
    "base has a forward of its own": ({}, replace_forward),
    "factors of another dtype": ({}, lambda layer: layer.lora_A.double() and layer.lora_B.double()),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_falls_back(case: str, peft_calls: Callable[[], int]):
    options, change = FALLBACKS[case]
    options = {name: copy.deepcopy(value) for name, value in options.items()}
    layer = build_layer(**options)
    x = torch.randn(4, IN, requires_grad=True)
    results = []
    for twin in (copy.deepcopy(layer), speed_up(layer)):
        change(twin)
        torch.manual_seed(2)
        results.append(run(twin, x))
    assert peft_calls() == 2
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


def test_falls_back_for_mixed_batches(peft_calls: Callable[[], int]):
    layer, x = build_layer(), torch.randn(4, IN)
    add_second(layer)
    names = ["default", "second", "__base__", "default"]
    found = speed_up(layer)(x, adapter_names=names)
    assert peft_calls() == 1
    torch.testing.assert_close(found, layer(x, adapter_names=names), atol=0, rtol=0)
    assert (found[1] - layer(x)[1]).abs().max() > 0.01


def test_falls_back_for_float64_under_autocast(peft_calls: Callable[[], int]):
    layer, x = build_layer(dtype=torch.float64), torch.randn(4, IN, dtype=torch.float64)
    with torch.autocast("cpu"):
        found = speed_up(layer)(x)
    assert (peft_calls(), found.dtype) == (1, torch.float64)


def test_falls_back_where_there_are_only_shapes(peft_calls: Callable[[], int]):
    layer = speed_up(build_layer()).to("meta")
    assert layer(torch.empty(4, IN, device="meta")).shape == (4, OUT)
    assert peft_calls() == 1


def test_falls_back_for_kinds_of_tensors(peft_calls: Callable[[], int]):
    class Kind(torch.Tensor):
        pass

    layer = speed_up(build_layer())
    assert type(layer(torch.randn(4, IN).as_subclass(Kind))) is Kind
    assert peft_calls() == 1
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.data.as_subclass(Kind), requires_grad=False)
    layer(torch.randn(4, IN))
    assert peft_calls() == 2


def test_falls_back_while_it_is_traced(peft_calls: Callable[[], int]):
    layer, x = speed_up(build_layer()), torch.randn(4, IN)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert peft_calls() == 1
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(traced(x), layer(x))


def test_is_exported_as_plain_operations():
    layer, x = speed_up(build_layer()), torch.randn(4, IN, requires_grad=True)
    program = torch.export.export(layer, (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("aten.linear.default") == 3  # base, A and B
    torch.testing.assert_close(program.module()(x), layer(x))


def test_is_compiled_from_plain_operations():
    layer, x, called = build_layer(), torch.randn(4, IN, requires_grad=True), []

    def note(module: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        called.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    found = run(torch.compile(speed_up(layer), backend=note, fullgraph=True), x)
    assert called.count(torch._C._nn.linear) == 3
    torch.testing.assert_close(found[0], run(layer, x)[0])


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"lora_dropout": 0.5}, lambda layer: layer.eval()),
        ({"use_rslora": True}, lambda _: None),
        ({}, lambda layer: add_second(layer) or layer.set_adapter("second")),
        ({}, lambda layer: layer.set_scale("default", 0.3)),
        ({"base": nn.Linear(IN, OUT, bias=False)}, lambda _: None),
    ],
    ids=["dropout off", "rank-stabilized scale", "second adapter active", "other scale", "no bias"],
)
@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no grad"])
def test_does_not_fall_back(
    options: dict[str, Any], change: Callable[[Linear], Any], enabled: bool, peft_calls: Callable[[], int]
):
    layer, x = build_layer(**options), torch.randn(4, IN)
    change(layer)
    expected = layer(x)
    with torch.set_grad_enabled(enabled):
        found = speed_up(layer)(x)
    assert peft_calls() == 1
    assert found.requires_grad is enabled
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- whole models -----------------------------------------------------------------------------------------------


@pytest.fixture
def peft_model(tiny_base: Path) -> PeftModel:
    """A classifier with LoRA on all linear layers, each update large enough to be seen in the logits."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_base, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, target_modules="all-linear")
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


def compute_logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=INPUT_IDS, attention_mask=MASK).logits


def compute_grads(model: nn.Module) -> Grads:
    model.zero_grad()
    nn.functional.cross_entropy(compute_logits(model), LABELS).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def count_fast(model: nn.Module) -> int:
    return sum(type(module) is FastLinear for module in model.modules())


def assert_near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_model_computes_and_learns_the_same(peft_model: PeftModel, peft_calls: Callable[[], int]):
    logits, grads = compute_logits(peft_model), compute_grads(peft_model)
    calls = peft_calls()
    assert speed_up_lora(peft_model) is peft_model
    assert count_fast(peft_model) == 13  # 6 in each of 2 layers, and the pooler
    assert_near(compute_logits(peft_model), logits)
    assert_near(compute_grads(peft_model), grads)
    assert peft_calls() == calls


def test_other_models_keep_their_forward_and_restore_gives_it_back(peft_model: PeftModel):
    other = copy.deepcopy(peft_model)
    assert count_fast(speed_up_lora(peft_model)) > count_fast(other) == 0
    assert restore_lora(peft_model) is peft_model
    assert count_fast(peft_model) == 0
    torch.testing.assert_close(compute_logits(peft_model), compute_logits(other), atol=0, rtol=0)


def test_kinds_of_the_layer_stay_as_they_are():
    class Kind(Linear):
        pass

    layer = build_layer()
    layer.__class__ = Kind
    assert type(speed_up_lora(layer)) is Kind


def test_embeddings_stay_as_they_are(tiny_base: Path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["word_embeddings", "query"]))
    before = [type(module) for module in wrapped.modules() if "Embedding" in type(module).__name__]
    speed_up_lora(wrapped)
    assert [type(module) for module in wrapped.modules() if "Embedding" in type(module).__name__] == before


def pass_through_pickle(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))  # noqa: S301  (our own bytes)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pass_through_pickle])
def test_a_copy_is_fast_and_has_weights_of_its_own(
    peft_model: PeftModel, duplicate: Callable[[PeftModel], PeftModel], peft_calls: Callable[[], int]
):
    logits = compute_logits(speed_up_lora(peft_model))
    twin = duplicate(peft_model)
    assert count_fast(twin) == count_fast(peft_model)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert_near(compute_logits(twin), logits)
    assert (compute_logits(peft_model) - logits).abs().max() > 0.01
    assert peft_calls() == 0


def test_peft_saves_disables_and_merges_as_before(peft_model: PeftModel, tiny_base: Path, tmp_path: Path):
    plain = copy.deepcopy(peft_model)
    speed_up_lora(peft_model)
    torch.testing.assert_close(get_peft_model_state_dict(peft_model), get_peft_model_state_dict(plain), atol=0, rtol=0)

    with peft_model.disable_adapter(), plain.disable_adapter():
        without = compute_logits(plain)
        torch.testing.assert_close(compute_logits(peft_model), without, atol=0, rtol=0)
    logits = compute_logits(plain)
    assert (logits - without).abs().max() > 0.01
    assert_near(compute_logits(peft_model), logits)

    peft_model.merge_adapter()
    assert_near(compute_logits(peft_model), logits)
    peft_model.unmerge_adapter()
    assert_near(compute_logits(peft_model), logits)

    for name, model in (("plain", plain), ("fast", peft_model)):
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("plain", "fast")]
    for config in configs:
        config["target_modules"].sort()  # PEFT keeps a set
    assert configs[1] == configs[0]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "fast")]
    assert weights[1] == weights[0]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3)
    assert_near(compute_logits(PeftModel.from_pretrained(base, tmp_path / "fast").eval()), logits)

    merged = peft_model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, Linear) for module in merged.modules())
    assert_near(compute_logits(merged), logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(peft_model: PeftModel, reentrant: bool, peft_calls: Callable[[], int]):
    expected = compute_grads(peft_model.train())
    calls = peft_calls()
    speed_up_lora(peft_model)
    peft_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    peft_model.enable_input_require_grads()
    with patch.object(fast_lora, "is_merging_cheaper", side_effect=is_merging_cheaper) as rule:
        grads = compute_grads(peft_model)
    assert rule.call_count == 2 * 12 + 1  # each layer's forward ran twice, the pooler's once
    assert_near(grads, expected)
    assert peft_calls() == calls


def test_gradients_of_micro_steps_add_up(peft_model: PeftModel):
    speed_up_lora(peft_model)
    once = {name: 2 * grad for name, grad in compute_grads(peft_model).items()}
    compute_grads(peft_model)
    nn.functional.cross_entropy(compute_logits(peft_model), LABELS).backward()
    twice = {name: parameter.grad for name, parameter in peft_model.named_parameters() if parameter.grad is not None}
    assert_near(twice, once)
