"""OpenVINO in 8 bits, where it is installed; in float, test_equality.py asks it what it asks the others."""

from __future__ import annotations

import pytest

import finetune

pytest.importorskip("openvino", reason="needs the extra openvino")
pytest.importorskip("nncf", reason="needs the extra openvino")
TEXTS = ["gains", "loss falls meeting " * 8, "names unchanged schedule"]


@pytest.mark.slow
def test_8_bits_keep_the_decisions(export, find_run):
    exported = export("text_classification", "openvino-int8")
    assert exported.parity["tasks"]["tone"]["equal_decisions"] >= 0.95
    assert exported.parity["tasks"]["tone"]["largest_difference"] > 1e-4  # 8 bits that changed nothing would be none
    assert {path.name for path in exported.folder.iterdir()} >= {"model.xml", "model.bin", "parity.json"}
    assert not list(exported.folder.glob("*.onnx"))
    assert {one["scheme"] for one in exported.parity["candidates"]} == {"static"}
    loaded = finetune.load(find_run("text_classification"), engine="openvino-int8")
    assert [one.label for one in loaded.predict(TEXTS)] == ["positive", "negative", "neutral"]
