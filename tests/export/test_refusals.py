"""What an export and its engine refuse, in words, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import finetune
from finetune.artifact.export import export_run as story
from finetune.artifact.export import formats
from finetune.artifact.export.engine import EngineModel, load_engine
from finetune.artifact.export.export_run import export_run
from finetune.artifact.export.formats import check_task
from finetune.artifact.export.graph import trace
from finetune.artifact.export.parity import check_drop, list_differences, list_excesses, settle_max_drop
from finetune.artifact.export.transformers_format import convert, write_transformers
from finetune.errors import GateError, ModelError, ResourceError, UsageError
from finetune.models.triad import TriadConfig, TriadForSentenceEmbedding, TriadForSequenceClassification


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is asked for


def test_a_run_that_did_not_finish(command, own_run):
    (own_run / "status.json").write_text('{"state": "interrupted"}')
    done = command("export", own_run, "--format", "torch-export")
    assert done.code == 2
    assert "must be a finished run, got one that is interrupted. Try: finetune resume" in done.err


def test_a_format_that_is_none(command, own_run):
    done = command("export", own_run, "--format", "onnx-int4")
    assert done.code == 2
    assert "--format: must be one of transformers, onnx, onnx-int8," in done.err
    assert "Did you mean 'onnx-int8'?" in done.err
    done = command("export", own_run, "--format", "zip")
    assert done.code == 2
    assert "torch-export, got 'zip'. Take onnx-int8 for speed on a CPU.\n" in done.err


def test_an_engine_that_is_none(command, own_run):
    done = command("predict", own_run, "some text", "--engine", "magic")
    assert done.code == 2
    assert "--engine: must be one of transformers, onnx, onnx-int8," in done.err
    fix = f"Leave it out, or write an export first: finetune export {own_run} --format onnx-int8"
    assert f"got 'magic'. {fix}\n" in done.err


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq", "masked_lm", "completion"])
def test_a_task_without_a_graph_of_one_pass(kind):
    with pytest.raises(UsageError, match=rf"must get a run of type text_classification, .*, got {kind}: its model"):
        check_task(kind)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "onnx",
            r"onnx: onnx, onnxscript, onnxruntime must be installed, .*them: pip install onnx onnxscript onnxruntime",
        ),
        (
            "openvino-int8",
            r"openvino-int8: onnx, onnxscript, openvino, nncf must be .*pip install onnx onnxscript openvino nncf",
        ),
    ],
)
def test_missing_packages(own_run, monkeypatch, name, words):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ResourceError, match=words):
        export_run(own_run, name)
    with pytest.raises(ResourceError, match=r"onnx: onnxruntime must be installed, got no such package\. Install it:"):
        load_engine(own_run, {"format": "onnx"})
    assert not (own_run / "export").exists()


def test_a_folder_that_is_something_else(own_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"mine: must be a new folder or an older export, got something else\."):
        export_run(own_run, "torch-export", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_the_folder_that_one_is_in(command, own_run, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for output in (".", "../empty"):
        done = command("export", own_run, "--format", "torch-export", "--output", output)
        assert done.code == 2
        words = "must be another folder than the one that you are in, got that one. Choose another --output."
        assert f"{tmp_path / 'empty'}: {words}" in done.err


def test_a_metric_that_the_run_does_not_have(command, own_run):
    done = command("export", own_run, "--format", "torch-export", "--set", "export.max_drop={mrr: 0.1}")
    assert done.code == 2
    assert "export.max_drop: must name metrics of the run, macro_f1, accuracy, ece, got 'mrr'." in done.err


# What would be worse than the run

METRICS = {"tone": ["macro_f1", "accuracy"], "answer": ["mrr"]}


def test_a_worse_export_is_not_written_and_an_older_one_stays(command, own_export, brief_speed, monkeypatch):
    run = own_export("torch-export")
    folder = run / "export" / "torch-export"
    before = read(folder)

    class Wrong:
        """Takes every class for the next one."""

        def __init__(self, engine):
            self.engine = engine

        def run(self, inputs):
            return {name: -array for name, array in self.engine.run(inputs).items()}

    def load_wrong(place, settings):
        model = load_engine(place, settings)
        return EngineModel(Wrong(model.engine), model.inputs, model.config)

    monkeypatch.setattr(story, "load_engine", load_wrong)
    done = command("export", run, "--format", "torch-export")
    assert done.code == 4
    assert "of the run on validation, got a difference of " in done.err
    assert (
        "The export that was there is as it was. This engine does not compute here what the run does: take" in done.err
    )
    assert read(folder) == before
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("amount", "words"), [(0.05, "a difference of 0."), (float("nan"), "no numbers")])
def test_an_export_in_float_that_decides_alike_but_says_other_things_is_not_written(
    command, own_run, brief_speed, monkeypatch, amount, words
):
    class Noisy(EngineModel):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits += amount * torch.randn(found.logits.shape, generator=torch.Generator().manual_seed(0))
            return found

    def load_noisy(place, settings):
        model = load_engine(place, settings)
        return Noisy(model.engine, model.inputs, model.config)

    monkeypatch.setattr(story, "load_engine", load_noisy)
    done = command("export", own_run, "--format", "torch-export", "--set", "export.max_drop={macro_f1: 1}")
    assert done.code == 4
    assert f"on validation, got {words}" in done.err
    assert "Nothing was written. This engine does not compute here" in done.err
    assert not list((own_run / "export").iterdir())


def test_a_difference_is_held_against_the_size_of_the_outputs():
    """Sums of float32 in another order differ by a share of the numbers; a tie may then be decided otherwise."""
    task = {"rows": 1000, "largest_output": 20.0, "largest_difference": 0.0015, "equal_decisions": 0.999}
    assert list_differences({"tone": task}) == []
    assert list_differences({"tone": task | {"largest_difference": 0.0025}}) == [
        "tone must be within 2.0e-03 of the run on validation, got a difference of 0.0025, with 99.90% of 1,000 "
        "decisions equal"
    ]


def test_what_may_be_lost_is_said_by_metric():
    judged = {name: SimpleNamespace(section=SimpleNamespace(metrics=metrics)) for name, metrics in METRICS.items()}
    assert settle_max_drop(None, judged) == {"tone": {"macro_f1": 0.005}, "answer": {"mrr": 0.005}}
    assert settle_max_drop({"accuracy": 0.02}, judged) == {"tone": {"accuracy": 0.02}, "answer": {"mrr": 0.005}}
    limits = settle_max_drop({"accuracy": 0.02, "mrr": 0.0}, judged)
    assert limits == {"tone": {"accuracy": 0.02}, "answer": {"mrr": 0.0}}

    def lose(accuracy, mrr):
        values = {"tone": {"accuracy": accuracy}, "answer": {"mrr": mrr}}
        return {
            task: {
                "metrics": {
                    name: {"before": {"value": 0.5}, "after": {"value": 0.4}, "lost": {"value": lost}}
                    for name, lost in metrics.items()
                }
            }
            for task, metrics in values.items()
        }

    assert list_excesses(lose(0.02, -0.1), limits) == []
    assert list_excesses(lose(0.03, None), limits) == [
        "tone.accuracy must lose at most 0.02 on validation, lost 0.0300 (0.5 -> 0.4)",
        "answer.mrr must lose at most 0 on validation, lost nothing that is a number (0.5 -> 0.4)",
    ]
    with pytest.raises(
        GateError, match=r"^run: a; b\. Nothing was written\. Take a format without int8, or allow more"
    ):
        check_drop("run", ["a", "b"], kept=False)


# What no graph, or no class, expresses


class Branching(nn.Module):
    """Looks at a number to decide what to do."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float() if ids.sum().item() > 3 else -ids.float()


class Odd(nn.Module):
    """Calls an operator that ONNX does not have."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(ids.float().unsqueeze(-1) @ ids.float().unsqueeze(-2)).real


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inner(input_ids))


def test_a_model_that_decides_by_numbers_names_the_layer():
    with pytest.raises(
        ModelError, match=r"export: the model must be a graph of operators .* in Branching that is none"
    ):
        trace(Holder(Branching()), reads_types=False)


def test_an_operator_that_onnx_does_not_have_is_named_with_its_layer(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    from finetune.artifact.export.onnx_format import write_onnx

    graph = trace(Holder(Odd()), reads_types=False)
    with pytest.raises(ModelError, match=r"got aten\.linalg_eig in inner that is none \(No ONNX function found"):
        write_onnx(graph, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


SIZES = {"vocab_size": 50, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}


def test_a_model_that_no_class_of_transformers_expresses(tmp_path):
    config = TriadConfig(shape="encoder", pooling="mean", num_labels=3, **SIZES)
    with pytest.raises(UsageError, match=r"got one that none does: Triad\w+ cannot become bert: .*pooling must be"):
        convert(TriadForSequenceClassification(config))
    with pytest.raises(UsageError, match=r"TriadForSentenceEmbedding has no counterpart in \w+\. Take onnx"):
        write_transformers(TriadForSentenceEmbedding(config), tmp_path)
    adapted = nn.Module()
    adapted.peft_config = {"default": SimpleNamespace(peft_type="PeftType.PROMPT_TUNING")}
    with pytest.raises(UsageError, match=r"must be merged into plain layers, got PROMPT_TUNING, which cannot be"):
        write_transformers(adapted, tmp_path)


# What is loaded


def test_an_engine_of_another_model(own_export):
    run = own_export("torch-export")
    weights = run / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")  # as after training it again
    with pytest.raises(
        UsageError, match=r"must be an export of this run's model \(sha256 \w{12}\), got one of another"
    ):
        finetune.load(run, engine="torch-export")


def test_an_export_that_was_not_made(command, own_run):
    done = command("predict", own_run, "gains", "--engine", "onnx-int8")
    assert done.code == 2
    assert "must be an export of the run, got none. Make it: finetune export" in done.err
    assert "--format onnx-int8" in done.err


def test_another_format_than_the_folder_has(own_export):
    run = own_export("torch-export")
    with pytest.raises(UsageError, match=r"must be an export for onnx, got one for torch-export\. Leave --engine out"):
        finetune.load(run / "export" / "torch-export", engine="onnx")
    with pytest.raises(UsageError, match=r"model: must be an export for onnx, got one for none, a model as it was tr"):
        finetune.load(run / "model", engine="onnx")


def test_a_program_is_read_only_where_it_is_asked_for_and_sealed(own_export, monkeypatch):
    """Reading a .pt2 file may unpickle: nothing of it is read before both hold."""
    folder = own_export("torch-export") / "export" / "torch-export"
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("was read"))
    with pytest.raises(UsageError, match=r"its \.pt2 file is a program, which runs when it is read, and must be asked"):
        finetune.load(folder)
    settings = json.loads((folder / "finetune.json").read_text())
    sealed = settings["files"].pop("model.pt2")
    (folder / "finetune.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"model\.pt2 must be named with its checksum in finetune\.json, got none"):
        finetune.load(folder, engine="torch-export")
    settings["files"]["model.pt2"] = sealed
    (folder / "finetune.json").write_text(json.dumps(settings))
    with (folder / "model.pt2").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError, match=r"model\.pt2: must be as it was saved"):
        finetune.load(folder, engine="torch-export")


def test_a_file_that_the_engine_cannot_read(own_run):
    (own_run / "model" / "model.pt2").write_bytes(b"no program")
    with pytest.raises(ModelError, match=r"model: must be a graph that torch reads, got: "):
        load_engine(own_run / "model", {"format": "torch-export", "inputs": [], "outputs": []})
