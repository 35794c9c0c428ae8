"""8 bits: which layers stay in float, what becomes of the rest, and that the decisions stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import finetune
from finetune.artifact.export.int8 import Calibration, choose_quantization, rank_layers
from finetune.artifact.export.parity import Answers, Judged, compare_answers
from finetune.data.batches import Examples
from finetune.recipe.schema import EvaluateSection
from finetune.tasks import TextClassification

TEXTS = ["gains beats shares", "loss falls meeting", "names unchanged schedule"]


@pytest.fixture
def calibration(find_run):
    run = find_run("text_classification")
    return Calibration.draw(Examples.load(run / "data" / "train.safetensors"), 0, seed=1, rows=40)


def test_static_ranges_keep_the_decisions(export, find_run):
    """Weights by channel, ranges as constants of the graph, the head in float, embeddings by row."""
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    exported = export("text_classification", "onnx-int8")
    task = exported.parity["tasks"]["tone"]
    assert task["equal_decisions"] >= 0.95
    assert 1e-4 < task["largest_difference"] < 1  # 8 bits that changed nothing would be none
    tried = {one["scheme"]: one for one in exported.parity["candidates"]}
    assert set(tried) == {"static", "dynamic"}
    assert exported.parity["candidates"][0]["within_max_drop"]
    model = onnx.load(exported.folder / "model.onnx")
    tables = {tensor.name: tensor for tensor in model.graph.initializer}
    assert sum(len(tensor.raw_data) for tensor in tables.values()) < 0.4 * exported.parity["bytes"]["before"]
    loaded = finetune.load(find_run("text_classification"), engine="onnx-int8")
    assert [one.label for one in loaded.predict(TEXTS)] == ["positive", "negative", "neutral"]
    assert tables["model.model.encoder.embeddings.tokens.weight.scales"].dims[0] > 100
    (head,) = [name for name in tables if "classifier.weight" in name]
    assert tables[head].data_type == onnx.TensorProto.FLOAT


def test_a_static_file_carries_its_ranges_and_a_dynamic_one_does_not(find_run, calibration, tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from finetune.artifact.export.graph import trace
    from finetune.artifact.export.onnx_format import quantize_onnx, write_onnx

    graph = trace(finetune.load(find_run("text_classification")).model, reads_types=False)
    write_onnx(graph, tmp_path / "float.onnx")
    batches = calibration.list_arrays(graph.inputs)
    parts = [f"attention.{part}_proj" for part in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"]
    layers = [f"model.encoder.layers.{i}.{part}" for i in (0, 1) for part in parts]
    layers.remove("model.encoder.layers.0.mlp.up_proj")
    found = {}
    for scheme in ("static", "dynamic"):
        quantize_onnx(tmp_path / "float.onnx", tmp_path / f"{scheme}.onnx", scheme, layers, batches)
        model = onnx.load(tmp_path / f"{scheme}.onnx")
        found[scheme] = {tensor.name: tensor for tensor in model.graph.initializer}
        operators = [node.op_type for node in model.graph.node]
        assert ("DynamicQuantizeLinear" in operators) == (scheme == "dynamic")
        # 2 layers of 6 matrices, one of them left in float, and the pooler.
        kept = [t for t in found[scheme].values() if list(t.dims) == [32, 64] and t.data_type == onnx.TensorProto.FLOAT]
        assert len(kept) == 1
    scales = [t for name, t in found["static"].items() if name.endswith("_scale") and list(t.dims) == [64]]
    assert len(scales) == 1  # a scale for each output of the other layer's up_proj


def test_the_layer_that_8_bits_ruin_is_ranked_first(find_run, calibration):
    """Weights of an input that is always 0 change nothing, and take all 255 steps of their rows for themselves."""
    model = finetune.load(find_run("text_classification")).model
    planted, norm = (
        model.get_submodule(f"model.encoder.layers.1.{name}") for name in ("mlp.up_proj", "attention_norm")
    )
    with torch.no_grad():
        norm.weight[5], norm.bias[5] = 0.0, 0.0
        planted.weight[:, 5] = 100 * planted.weight.abs().amax()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranked = rank_layers(model, calibration, calibration)
    assert ranked[0] == "model.encoder.layers.1.mlp.up_proj"
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "layers" in name]
    assert sorted(ranked) == sorted(linear)
    assert len(ranked) == 12
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Fake(nn.Module):
    """Gives zeros, and remembers where it was read from."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def forward(self, **batch):
        return type("Output", (), {"logits": torch.zeros(len(batch["input_ids"]), 3)})()


def choose(tmp_path, calibration, needs, schemes=("static", "dynamic")):
    """Layers a to l; a scheme is good enough with so many of them in float."""
    ranked = list("abcdefghijkl")

    def write(scheme, left, place):
        (place / "file").write_text(json.dumps([scheme, *left]))

    def judge(model):
        scheme, *left = json.loads((model.place / "file").read_text())
        lost = max(0, needs[scheme] - len(left)) / 100
        metrics = {"macro_f1": {"lost": {"value": lost}}}
        tasks = {"tone": {"equal_decisions": 1.0, "mean_difference": lost, "metrics": metrics}}
        return tasks, ["too much"] if lost else []

    return choose_quantization(schemes, ranked, write, Fake, judge, calibration, tmp_path)


def test_the_most_harmful_layers_stay_in_float_until_the_answers_do(calibration, tmp_path):
    tried = choose(tmp_path, calibration, {"static": 2}, ("static",))
    assert [one.float_layers for one in tried] == [("a", "b"), ("a",), ()]
    assert json.loads((tmp_path / "file").read_text()) == ["static", "a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert tried[0].describe()["within_max_drop"]
    assert not tried[1].describe()["within_max_drop"]


def test_a_scheme_that_never_is_good_enough_gives_way_to_one_that_is(calibration, tmp_path):
    tried = choose(tmp_path, calibration, {"static": 12, "dynamic": 0})
    assert (tried[0].scheme, tried[0].float_layers) == ("dynamic", ())
    assert len(tried) == 6


def test_without_any_that_is_good_enough_the_one_that_lost_least_is_held_against_the_gate(calibration, tmp_path):
    tried = choose(tmp_path, calibration, {"static": 12, "dynamic": 11})
    assert (tried[0].scheme, len(tried[0].float_layers)) == ("dynamic", 6)
    assert tried[0].excesses == ("too much",)


def test_two_that_are_good_enough_are_timed(calibration, tmp_path):
    tried = choose(tmp_path, calibration, {"static": 0, "dynamic": 1})
    assert tried[0].seconds is not None
    assert tried[0].seconds == min(one.seconds for one in tried if not one.excesses)


def test_calibration_rows_come_from_their_seed(find_run):
    train = Examples.load(find_run("text_classification") / "data" / "train.safetensors")
    first, again, other = (Calibration.draw(train, 0, seed=seed, rows=20) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.examples.input_ids, again.examples.input_ids)
    assert not np.array_equal(first.examples.input_ids, other.examples.input_ids)


def test_rows_of_no_class_that_were_trained_on_count_in_no_score():
    task = TextClassification(["fall", "rise"], {}, out_of_scope="weather", exposure=0.5)
    judged = Judged(task, EvaluateSection(metrics=["accuracy", "macro_f1"], resamples=100), 1.0, seed=13)
    before = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    after, labels = before[:, ::-1].copy(), np.arange(40) % 3

    def compare(rows):
        return compare_answers(judged, Answers(before[rows], labels[rows]), Answers(after[rows], labels[rows]))

    assert compare(np.arange(40))["metrics"] == compare(np.flatnonzero(labels < 2))["metrics"]
