"""Sequence to sequence: a text for a text, such as translation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from finetune.data.batches import IGNORED, Batch, Examples, list_inputs
from finetune.data.cleaning import clean_text
from finetune.data.rows import Row
from finetune.evaluation.corpus_scoring import SystemOutput
from finetune.models.base import BaseModel
from finetune.models.generation import generate_texts
from finetune.recipe.schema import ModelSection, TaskSection, TextStep
from finetune.tasks import language
from finetune.tasks.shapes import OnLanguageModel
from finetune.tasks.task import HeldOut, Judgement, TaskData
from finetune.tasks.written import copy_or_find, judge_written


@dataclass(frozen=True)
class Seq2Seq(OnLanguageModel):
    """The shape of translation.

    Args:
        clean: steps on each text, source and target, before it is encoded.
    """

    clean: tuple[TextStep, ...] = ()

    type: ClassVar[str] = "seq2seq"
    roles: ClassVar[tuple[str, ...]] = ("text", "target")
    optional_roles: ClassVar[tuple[str, ...]] = ()
    scored_by: ClassVar[str] = "texts"
    peft_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    cuts_rows: ClassVar[bool] = True
    labels: ClassVar[None] = None

    @classmethod
    def build(cls, section: TaskSection, data: TaskData) -> Seq2Seq:
        """Nothing is left to the data."""
        return cls(tuple(section.clean))

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Clean source and target."""
        return [
            replace(
                row,
                values={**row.values}
                | {role: clean_text(row.values[role], self.clean) for role in self.roles if role in row.values},
            )
            for row in rows
        ]

    def build_tokenizer(self, base: BaseModel, rows: Sequence[Row], section: ModelSection) -> Any:
        """The base's, or one learned from both sides of the train rows."""
        texts = [row.values[role] for row in rows for role in self.roles]
        return language.build_tokenizer(base, texts, section, appends_end=True)

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Encode both sides, each cut at `max_length` tokens."""
        if not rows:
            return Examples.build([], targets=[])
        sources = tokenizer([row.values["text"] for row in rows], truncation=True, max_length=max_length)
        targets = tokenizer(
            text_target=[row.values.get("target", "") for row in rows], truncation=True, max_length=max_length
        )
        return Examples.build(sources["input_ids"], targets=targets["input_ids"])

    def compute_token_logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of the target, (B, T, V)."""
        return _run(model, batch)

    def judge(self, held_out: HeldOut) -> Judgement:
        """Write validation and test, and score what was written."""
        return judge_written(self, held_out, "Translations")

    def write(self, held_out: HeldOut, rows: Sequence[Row]) -> list[str]:
        """A text for each row, as `evaluate.generate` says."""
        return generate_texts(
            held_out.model,
            held_out.tokenizer,
            [row.values["text"] for row in rows],
            held_out.section.generate,
            kind=self.type,
            max_length=held_out.max_length,
            seed=held_out.seed,
        )

    def compute_baselines(self, held_out: HeldOut, rows: Sequence[Row]) -> dict[str, SystemOutput]:
        """The text itself, and the nearest pair in train."""
        texts = [row.values["text"] for row in rows]
        return {name: copy_or_find(name, held_out, texts) for name in held_out.section.baselines}

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {"type": self.type, "clean": list(self.clean)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Seq2Seq:
        """Inverse of `to_config`."""
        return cls(tuple(config["clean"]))


def _run(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of each target token, (B, T, V): the decoder reads the target moved right by one."""
    config: Any = getattr(model, "module", model).config  # a distributed replica keeps it one level down
    labels = batch["labels"]
    shifted = torch.cat([torch.full_like(labels[:, :1], config.decoder_start_token_id), labels[:, :-1]], dim=1)
    logits: torch.Tensor = model(
        **list_inputs(batch), decoder_input_ids=shifted.masked_fill(shifted == IGNORED, config.pad_token_id)
    ).logits
    return logits
