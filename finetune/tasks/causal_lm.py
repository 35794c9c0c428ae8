"""Causal language modelling: each token from those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from finetune.data.batches import Examples
from finetune.data.cleaning import clean_text
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.evaluation.corpus_baselines import compute_ngram, compute_unigram
from finetune.evaluation.corpus_scoring import CorpusSplit, SystemOutput, score_corpus
from finetune.models.base import BaseModel
from finetune.models.classifier import get_padding
from finetune.models.generation import generate_texts
from finetune.recipe.schema import ModelSection, TaskSection, TextStep
from finetune.tasks import language
from finetune.tasks.shapes import OnLanguageModel
from finetune.tasks.task import HeldOut, Judgement, TaskData

PROMPT_SHARE = 4
"""A sample's prompt is the first quarter of a block."""


@dataclass(frozen=True)
class CausalLM(OnLanguageModel):
    """The shape of text generation: rows are one stream of tokens, cut into blocks.

    Args:
        separator: text between two rows; None for the tokenizer's end token.
        clean: steps on each text before it is encoded.
    """

    separator: str | None = None
    clean: tuple[TextStep, ...] = ()

    type: ClassVar[str] = "causal_lm"
    roles: ClassVar[tuple[str, ...]] = ("text",)
    optional_roles: ClassVar[tuple[str, ...]] = ()
    scored_by: ClassVar[str] = "likelihood"
    peft_type: ClassVar[str] = "CAUSAL_LM"
    cuts_rows: ClassVar[bool] = False
    labels: ClassVar[None] = None

    @classmethod
    def build(cls, section: TaskSection, data: TaskData) -> CausalLM:
        """Nothing is left to the data."""
        return cls(section.separator, tuple(section.clean))

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Clean each text."""
        return [replace(row, values={**row.values, "text": clean_text(row.values["text"], self.clean)}) for row in rows]

    def build_tokenizer(self, base: BaseModel, rows: Sequence[Row], section: ModelSection) -> Any:
        """The base's, or one learned from the train rows."""
        # Joined, so that what stands between two rows is in the vocabulary too.
        texts = [row.values["text"] for row in rows] + [self.separator or ""]
        return language.build_tokenizer(base, texts, section, appends_end=False, pads_with_end=True)

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Blocks of `max_length` tokens of the stream, each with the tokens that follow; the last may be shorter.

        Raises:
            DataError: fewer than two tokens, or a tokenizer without an end token where rows are to be separated by it.
        """
        stream = np.fromiter(self._iterate_stream(rows, tokenizer), dtype=np.int32)
        if len(stream) < 2:
            raise DataError(f"causal_lm: each split must hold at least 2 tokens, got {len(stream)}. Add text.")
        cuts = np.arange(max_length, len(stream) - 1, max_length)
        return Examples.build(np.split(stream[:-1], cuts), targets=np.split(stream[1:], cuts))

    def judge(self, held_out: HeldOut) -> Judgement:
        """Score blocks of validation and test; the n-gram model is tuned on validation."""
        pad_token_id = get_padding(held_out.model, held_out.tokenizer)
        likelihoods: dict[str, npt.NDArray[np.float64]] = {}
        inputs: dict[str, list[str]] = {}
        for name in held_out.judged:
            examples = held_out.examples[name]
            likelihoods[name] = self.compute_outputs(held_out.model, examples, pad_token_id).astype(np.float64)
            likelihoods[name][:, 3] = language.count_bytes(held_out.tokenizer, language.list_targets(examples))
            inputs[name] = held_out.tokenizer.batch_decode(
                [ids.tolist() for ids in language.list_tokens(examples.input_ids, examples.starts)]
            )
        baselines = self._compute_baselines(held_out, likelihoods)
        scored = {
            name: score_corpus(
                CorpusSplit(
                    name=name,
                    model=SystemOutput(likelihood=likelihoods[name]),
                    references=None,
                    inputs=inputs[name],
                    values=[{}] * len(inputs[name]),
                    baselines=baselines[name],
                    resampling=held_out.resample(),
                    opened=held_out.opened if name == "test" else None,
                ),
                held_out.section,
            )
            for name in likelihoods
        }
        nats, tokens, right, _ = likelihoods["test"].T
        predictions = {"block": np.arange(len(nats)), "text": inputs["test"], "tokens": tokens, "nats": nats}
        return Judgement(
            scored=scored,
            predictions=predictions | {"right": right},
            samples=self._write_samples(held_out),
            samples_title="Text that it writes",
        )

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {"type": self.type, "separator": self.separator, "clean": list(self.clean)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CausalLM:
        """Inverse of `to_config`."""
        return cls(config["separator"], tuple(config["clean"]))

    def _iterate_stream(self, rows: Sequence[Row], tokenizer: Any) -> Any:
        if self.separator is not None:
            between = tokenizer(self.separator, add_special_tokens=False)["input_ids"]
        elif tokenizer.eos_token_id is not None:
            between = [tokenizer.eos_token_id]
        else:
            raise DataError(
                "causal_lm: the tokenizer must have an end token to stand between texts, got none. "
                "Set tasks.<name>.separator."
            )
        texts = [row.values["text"] for row in rows]
        # Without a warning about texts longer than the model: blocks are cut from them.
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        for number, ids in enumerate(encoded):
            if number:
                yield from between
            yield from ids
        if self.separator is None:
            yield from between  # so that the last text has an end too

    def _compute_baselines(
        self, held_out: HeldOut, likelihoods: Mapping[str, npt.NDArray[np.float64]]
    ) -> dict[str, dict[str, SystemOutput]]:
        """Split -> baseline -> its likelihoods of the same tokens."""
        targets = {name: language.list_targets(examples) for name, examples in held_out.examples.items()}
        train, vocab_size = targets["train"], len(held_out.tokenizer)
        found: dict[str, dict[str, SystemOutput]] = {name: {} for name in likelihoods}
        for name, likelihood in likelihoods.items():
            sizes = likelihood[:, 3]
            if "unigram" in held_out.section.baselines:
                found[name]["unigram"] = compute_unigram(train, targets[name], vocab_size, sizes=sizes)
            if "ngram" in held_out.section.baselines:
                found[name]["ngram"] = compute_ngram(
                    train, targets["validation"], targets[name], vocab_size, sizes=sizes
                )
        return found

    def _write_samples(self, held_out: HeldOut) -> list[dict[str, Any]]:
        """Continue beginnings of blocks from all over the test split."""
        examples = held_out.examples["test"]
        blocks = language.list_tokens(examples.input_ids, examples.starts)
        chosen = [blocks[i] for i in language.spread_rows(blocks, held_out.section.samples)]
        decode = held_out.tokenizer.decode
        prompts = [decode(ids[: max(1, len(ids) // PROMPT_SHARE)], skip_special_tokens=True) for ids in chosen]
        rests = [decode(ids[max(1, len(ids) // PROMPT_SHARE) :], skip_special_tokens=True) for ids in chosen]
        written = generate_texts(
            held_out.model,
            held_out.tokenizer,
            prompts,
            held_out.section.generate,
            kind=self.type,
            max_length=held_out.max_length,
            seed=held_out.seed,
        )
        return [
            {"input": prompt, "output": text, "reference": rest, "note": "", "continues": True}
            for prompt, text, rest in zip(prompts, written, rests, strict=True)
        ]
