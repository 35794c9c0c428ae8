"""The same answers from the run and from its exports, of every task type; alone or together, padded or not."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import finetune
from finetune.artifact.export.export_run import export_run
from finetune.artifact.run_folder import RunFolder

TOLERANCE = 1e-4
"""Of logits and vectors, the one that docs/export.md states."""
QUICK = [("text_classification", "onnx"), ("text_classification", "torch-export")]
QUICK += [("multi_task", "onnx")]
SLOW = [(kind, "onnx") for kind in ("retrieval", "reranking", "question_answering")]
SLOW += [(kind, "torch-export") for kind in ("multi_task", "retrieval", "reranking", "question_answering")]
KINDS = ("text_classification", "multi_task", "retrieval", "reranking", "question_answering")
SLOW += [(kind, "openvino") for kind in KINDS]
SLOW += [(kind, "transformers") for kind in ("reranking", "question_answering")]
NEEDS = {"onnx": ["onnxruntime"], "openvino": ["openvino", "nncf"]}
TEXTS = ["gains", "loss falls meeting " * 8, "shares names unchanged schedule beats", "the meeting"]


def skip_without(name):
    """Skip where the engine of a format is not installed."""
    for package in NEEDS.get(name, []):
        pytest.importorskip(package, reason=f"needs the extra {name}")


@pytest.mark.parametrize(("kind", "name"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)])
def test_an_engine_gives_what_the_run_gives(export, find_run, list_answers, kind, name):
    skip_without(name)
    exported = export(kind, name)
    for task in exported.parity["tasks"].values():
        assert task["rows"] > 0
        assert task["equal_decisions"] == 1
        assert task["largest_difference"] < TOLERANCE
        assert all(abs(values["lost"]["value"]) < 1e-9 for values in task["metrics"].values())
    run, engine = finetune.load(find_run(kind)), finetune.load(find_run(kind), engine=name)
    ours, theirs = list_answers(run, kind), list_answers(engine, kind)
    np.testing.assert_allclose(theirs, ours, atol=TOLERANCE)
    assert np.ptp(ours) > 50 * TOLERANCE  # numbers that are all alike would agree with anything


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["onnx-int8", "openvino-int8"])
def test_8_bits_lose_no_more_than_they_may(export, find_run, list_answers, kind, name):
    """Of every task type, and what is measured is not the run itself once more."""
    skip_without(name.removesuffix("-int8"))
    exported = export(kind, name)
    for task, found in exported.parity["tasks"].items():
        for metric, most in exported.parity["max_drop"][task].items():
            assert found["metrics"][metric]["lost"]["value"] <= most
        assert found["largest_difference"] > TOLERANCE
    run, engine = finetune.load(find_run(kind)), finetune.load(find_run(kind), engine=name)
    ours, theirs = list_answers(run, kind), list_answers(engine, kind)
    assert np.abs(theirs - ours).max() > 0


@pytest.mark.parametrize("name", ["onnx", "torch-export", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_row_alone_gives_what_it_gives_among_others(export, find_run, name):
    """Any number of rows and any length, one included: neither is a constant of the graph."""
    skip_without(name)
    model = finetune.load(export("text_classification", name).folder, engine=name).model
    generator = np.random.default_rng(3)
    rows = [torch.tensor(generator.integers(5, 400, size=length)) for length in (1, 2, 9, 31, 32)]
    together = torch.zeros((5, 40), dtype=torch.int64)
    for place, row in enumerate(rows):
        together[place, : len(row)] = row
    mask = (together > 0).long()
    padded = model(input_ids=together, attention_mask=mask).logits
    for place, row in enumerate(rows):
        alone = model(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits
        np.testing.assert_allclose(padded[place], alone[0], atol=TOLERANCE)
    noise = together + (1 - mask) * 7  # what stands where padding is must not matter
    np.testing.assert_allclose(model(input_ids=noise, attention_mask=mask).logits, padded, atol=TOLERANCE)


def test_the_folder_of_transformers_loads_without_this_package(export, find_run):
    """BERT's own class in plain transformers, from weights and configuration alone, gives the run's logits."""
    exported = export("text_classification", "transformers")
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert "auto_map" not in config
    assert not list(exported.folder.glob("*.py"))
    model = AutoModelForSequenceClassification.from_pretrained(exported.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    assert type(model).__module__.startswith("transformers.")
    assert list(model.config.id2label.values()) == ["negative", "neutral", "positive"]
    with torch.inference_mode():
        found = model(**tokenizer(TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")).logits
    run = finetune.load(find_run("text_classification"))
    np.testing.assert_allclose(found, run.compute_logits(run.clean(TEXTS)), atol=1e-5)
    again = finetune.load(find_run("text_classification"), engine="transformers")
    assert [one.label for one in again.predict(TEXTS)] == [one.label for one in run.predict(TEXTS)]


@pytest.mark.parametrize(
    "name", ["onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx-int8", "openvino"))]
)
def test_weights_that_are_too_large_for_one_file_are_counted_and_not_left_behind(
    find_run, brief_speed, tmp_path, monkeypatch, name
):
    """As above 1.5 GB, where torch puts them beside the graph."""
    skip_without(name.removesuffix("-int8"))
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
    run = find_run("text_classification")
    exported = export_run(run, name, tmp_path / name)
    names = {path.name for path in exported.folder.iterdir()}
    assert {found for found in names if found.endswith((".onnx", ".data", ".xml", ".bin"))} == {
        "onnx": {"model.onnx", "model.onnx.data"},
        "onnx-int8": {"model.onnx"},
        "openvino": {"model.xml", "model.bin"},
    }[name]
    assert not [found for found in names if found.startswith(".")]
    size = exported.parity["bytes"]
    assert size["after"] > (0.2 if name == "onnx-int8" else 0.9) * size["before"]
    answers = [finetune.load(one).predict(TEXTS) for one in (run, exported.folder)]
    assert [one.label for one in answers[0]] == [one.label for one in answers[1]]


def test_no_file_says_where_it_was_made(export):
    import zipfile

    folder = export("text_classification", "torch-export").folder
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    contents += [path.read_bytes() for path in folder.iterdir() if path.suffix != ".pt2"]
    assert not [content for content in contents if b'modeling_triad.py", line' in content or b'File "' in content]


def test_thresholds_and_labels_come_along(export, find_run):
    """Temperature and probability by class are those of the run, from the exported folder alone."""
    exported = export("text_classification", "torch-export")
    run, engine = finetune.load(find_run("text_classification")), finetune.load(exported.folder, engine="torch-export")
    assert engine.temperature == run.temperature != 1.0
    for ours, theirs in zip(run.predict(TEXTS), engine.predict(TEXTS), strict=True):
        assert theirs.scores == pytest.approx(ours.scores, abs=1e-4)


def test_the_applications_read_through_an_engine(export, find_run):
    """The readers of the assistant and of the monitor, on an export and on the run: the same readings."""
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from finetune.applications.monitor import reader as monitor
    from finetune.applications.support import trained as support
    from finetune.recipe.applications import MonitorSection

    export("multi_task", "onnx")
    run = RunFolder(find_run("multi_task"))
    ours, theirs = (support.build_reader(run, engine) for engine in (None, "onnx"))
    assert theirs.fingerprint == ours.fingerprint  # the index and the thresholds of the run go on to hold
    one, other = ours.read("gains shares", "Customer: earlier"), theirs.read("gains shares", "Customer: earlier")
    np.testing.assert_allclose(other.features, one.features, atol=TOLERANCE)
    np.testing.assert_allclose(other.scores, one.scores, atol=TOLERANCE)
    pair = ("gains shares", "", ["gains profit", "loss meeting"])
    np.testing.assert_allclose(theirs.rerank(*pair), ours.rerank(*pair), atol=TOLERANCE)
    section = MonitorSection(sentiment="tone", negative="returns")
    said = [monitor.build_reader(run, section, engine).read(TEXTS) for engine in (None, "onnx")]
    assert [one.sentiment for one in said[1]] == [one.sentiment for one in said[0]]
    np.testing.assert_allclose(*[[one.negative for one in part] for part in said], atol=TOLERANCE)


def test_the_command_line_exports_and_predicts(command, find_run, brief_speed):
    run = find_run("text_classification")
    done = command("export", run, "--format", "transformers")
    assert done.code == 0
    assert "100.00% of 9 decisions are equal, largest difference" in done.out
    assert "transformers: written. Use it:" in done.out
    assert '"some text" --engine transformers' in done.out
    assert "holding it against the run on validation" in done.err
    said = command("export", run, "--format", "transformers", "--json")
    assert said.err == ""
    assert json.loads(said.out)["tasks"]["tone"]["equal_decisions"] == 1
    plain, engine = (command("predict", run, *TEXTS, "--json", *more) for more in ((), ("--engine", "transformers")))
    for ours, theirs in zip(json.loads(plain.out), json.loads(engine.out), strict=True):
        assert theirs["label"] == ours["label"]
        assert theirs["confidence"] == pytest.approx(ours["confidence"], abs=1e-4)


def test_parity_says_what_was_measured_and_where(export, find_run):
    parity = json.loads((export("text_classification", "torch-export").folder / "parity.json").read_text())
    task = parity["tasks"]["tone"]
    validation = json.loads((find_run("text_classification") / "evaluation" / "validation.json").read_text())
    for name in ("macro_f1", "accuracy"):
        ours, theirs = validation["metrics"][name], task["metrics"][name]["after"]
        assert {key: ours[key] for key in ("value", "low", "high")} == {
            key: theirs[key] for key in ("value", "low", "high")
        }
    assert task["rows"] == validation["rows"]
    assert parity["max_drop"] == {"tone": {"macro_f1": 0.005}}
    for contender in ("pipeline", "run", "export"):
        assert set(parity["speed"][contender]) == {"rows_per_second", "p50_ms", "p95_ms"}
        assert parity["speed"][contender]["p95_ms"] >= parity["speed"][contender]["p50_ms"] > 0
    assert parity["machine"]["threads"] == torch.get_num_threads()
    assert parity["bytes"]["before"] > 0
    assert re.fullmatch("[0-9a-f]{64}", parity["engine"]["source"])
