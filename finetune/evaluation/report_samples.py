"""Samples of the report page: what a model made of rows of the test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.evaluation.wording import part_of

SAMPLE_CHARACTERS = 2000
SAMPLE_PARTS = {"input": "Given", "output": "Model", "reference": "Reference"}
LIST_LABELS = {"input": "Had", "output": "List", "reference": "Turned to"}
"""What they are of a person and a list."""


def build_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """One sample as the page shows it."""
    continues = bool(sample.get("continues"))
    start = str(sample.get("input") or "").lstrip("\n") if continues else ""
    # An empty input or reference is none; an empty output is what the model wrote.
    parts = [
        {"key": key, "label": label, "start": start, "text": shorten(sample.get(key), SAMPLE_CHARACTERS)}
        for key, label in (SAMPLE_PARTS | part_of(sample, "labels")).items()
        if key == "output" or (sample.get(key) and not (continues and key == "input"))
    ]
    return {"parts": parts, "note": str(sample.get("note") or "")}


def describe_samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """How to read them."""
    if any(sample.get("labels") == LIST_LABELS for sample in samples):
        return "People of the test split: the last things that they had, the top of their list, and what came next."
    words = ["Rows of the test split and what the model wrote."]
    if any(sample.get("continues") for sample in samples):
        words = ["Beginnings from the test split in grey, and how the model goes on."]
    if any(sample.get("reference") for sample in samples):
        words.append("A reference is one good answer, not the only one.")
    return " ".join(words)


def shorten(text: Any, characters: int) -> str:
    """The text, cut where it is longer."""
    whole = str(text or "").rstrip("\n")
    return whole if len(whole) <= characters else whole[:characters].rstrip() + " \N{HORIZONTAL ELLIPSIS}"
