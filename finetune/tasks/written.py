"""How tasks are judged that write a text for each row: what is written, and the likelihood of what should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from finetune.data.batches import Examples
from finetune.data.rows import Row
from finetune.evaluation.corpus_baselines import copy_source, nearest_translation
from finetune.evaluation.corpus_metrics import compute_text_scores
from finetune.evaluation.corpus_scoring import CorpusSplit, SystemOutput, score_corpus
from finetune.models.classifier import get_padding
from finetune.tasks import language
from finetune.tasks.task import HeldOut, Judgement, Outputs


class Writes(Protocol):
    """A task that writes."""

    def compute_outputs(self, model: Any, examples: Examples, pad_token_id: int | None) -> Outputs:
        """Likelihoods of the targets, (N, 4)."""

    def write(self, held_out: HeldOut, rows: Sequence[Row]) -> list[str]:
        """What the model writes for each row."""

    def compute_baselines(self, held_out: HeldOut, rows: Sequence[Row]) -> Mapping[str, SystemOutput]:
        """What each baseline of the recipe writes."""


def judge_written(task: Writes, held_out: HeldOut, title: str) -> Judgement:
    """Write validation and test, and score what was written.

    Args:
        task: reads `text` and should write `target`.
        held_out: the model and the rows.
        title: what the report calls the samples.
    """
    pad_token_id = get_padding(held_out.model, held_out.tokenizer)
    scored, written = {}, {}
    for name in held_out.judged:
        rows, examples = held_out.rows[name], held_out.examples[name]
        likelihood = task.compute_outputs(held_out.model, examples, pad_token_id).astype(np.float64)
        likelihood[:, 3] = language.count_bytes(held_out.tokenizer, language.list_scored(examples))
        written[name] = task.write(held_out, rows)
        split = CorpusSplit(
            name=name,
            model=SystemOutput(likelihood=likelihood, texts=written[name]),
            references=[row.values["target"] for row in rows],
            inputs=[row.values["text"] for row in rows],
            values=[row.values for row in rows],
            baselines=task.compute_baselines(held_out, rows),
            resampling=held_out.resample(name),
            opened=held_out.opened if name == "test" else None,
        )
        scored[name] = score_corpus(split, held_out.section)
    rows = held_out.rows["test"]
    return Judgement(
        scored=scored,
        predictions={
            "id": [row.id for row in rows],
            "text": [row.values["text"] for row in rows],
            "reference": [row.values["target"] for row in rows],
            "prediction": written["test"],
        },
        samples=_show_samples(rows, written["test"], held_out.section.samples),
        samples_title=title,
    )


def copy_or_find(name: str, held_out: HeldOut, texts: Sequence[str]) -> SystemOutput:
    """The baseline `copy` or `nearest`."""
    if name == "copy":
        return copy_source(texts)
    train = held_out.rows["train"]
    return nearest_translation([row.values["text"] for row in train], [row.values["target"] for row in train], texts)


def _show_samples(rows: Sequence[Row], written: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Rows from the worst to the best text."""
    references = [row.values["target"] for row in rows]
    scores = compute_text_scores("chrf", written, references)
    order = np.argsort(scores, kind="stable")
    return [
        {
            "input": rows[i].values["text"],
            "output": written[i],
            "reference": references[i],
            "note": f"chrF {scores[i]:.0f}",
        }
        for i in (int(order[place]) for place in language.spread_rows(rows, count))
    ]
