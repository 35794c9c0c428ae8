"""Completion: a text for a prompt, written by a causal language model that goes on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

from finetune.data.batches import IGNORED, Examples
from finetune.data.cleaning import clean_text
from finetune.data.rows import Row
from finetune.data.turns import CONTEXT
from finetune.errors import DataError
from finetune.evaluation.answer_baselines import find_sentences
from finetune.evaluation.corpus_scoring import SystemOutput
from finetune.models.base import BaseModel
from finetune.models.generation import generate_texts
from finetune.recipe.messages import suggest
from finetune.recipe.prompt import list_columns, parse_prompt
from finetune.recipe.schema import GenerateSection, ModelSection, TaskSection, TextStep
from finetune.tasks import language
from finetune.tasks.shapes import OnLanguageModel
from finetune.tasks.task import HeldOut, Judgement, TaskData
from finetune.tasks.written import copy_or_find, judge_written

PASSAGE = "passage"
"""The role of what a text is to be answered from."""


@dataclass(frozen=True)
class Completion(OnLanguageModel):
    """The shape of instruction tuning: a prompt, and what should be written behind it; only that is learned.

    Args:
        prompt: words, and columns in braces; special tokens are read in its words, and not in the columns' texts.
        clean: steps on the text of each column before it is encoded.
    """

    prompt: str = "{text}"
    clean: tuple[TextStep, ...] = ()

    type: ClassVar[str] = "completion"
    roles: ClassVar[tuple[str, ...]] = ("text", "target")
    optional_roles: ClassVar[tuple[str, ...]] = (CONTEXT, PASSAGE)
    scored_by: ClassVar[str] = "completions"
    peft_type: ClassVar[str] = "CAUSAL_LM"
    cuts_rows: ClassVar[bool] = True
    labels: ClassVar[None] = None

    @classmethod
    def build(cls, section: TaskSection, data: TaskData) -> Completion:
        """Check that the rows have the prompt's columns.

        Raises:
            DataError: they do not.
        """
        task = cls(section.prompt, tuple(section.clean))
        task.check_columns(data.rows, "tasks.<name>.prompt")
        return task

    @property
    def columns(self) -> list[str]:
        """What the prompt names."""
        return list_columns(self.prompt)

    def check_columns(self, rows: Sequence[Row], where: str, fix: str = "") -> None:
        """Every row must have what the prompt names.

        Args:
            rows: any number.
            where: begins the message.
            fix: ends it; `{column}` is the one that lacks.

        Raises:
            DataError: one has not.
        """
        for row in rows:
            for column in self.columns:
                if column not in row.values:
                    end = suggest(column, row.values) or (f" {fix.format(column=column)}" if fix else "")
                    raise DataError(
                        f"{where}: must find the column {column!r} in {row.id}, got {', '.join(row.values)}.{end}"
                    )

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Clean what is read and written."""
        return [
            replace(
                row,
                values={**row.values}
                | {
                    column: clean_text(str(row.values[column] or ""), self.clean)
                    for column in ("text", "target", *self.columns)
                    if column in row.values
                },
            )
            for row in rows
        ]

    def build_tokenizer(self, base: BaseModel, rows: Sequence[Row], section: ModelSection) -> Any:
        """The base's, or one learned from prompts and targets of the train rows."""
        texts = [text for row in rows for text in ("".join(self._list_parts(row)), row.values["target"])]
        return language.build_tokenizer(base, texts, section, appends_end=False, pads_with_end=True)

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Prompt and target as one row, and the token that follows each: -100 within the prompt.

        Where both do not fit, each keeps at least half of `max_length`: of the prompt what `encode_prompts` keeps, of
        the target the beginning. A target that is whole ends with the end token.

        Raises:
            DataError: words of the prompt that leave no room.
        """
        targets = [
            [*ids, tokenizer.eos_token_id]
            for ids in self._encode([row.values.get("target", "") for row in rows], tokenizer, reads_special=False)
        ]
        # The last token is only said: of max_length + 1 tokens max_length are read.
        rooms = [max(max_length // 2, max_length + 1 - len(target)) for target in targets]
        prompts = self.encode_prompts(rows, tokenizer, rooms)
        targets = [target[: max_length + 1 - len(prompt)] for prompt, target in zip(prompts, targets, strict=True)]
        pairs = list(zip(prompts, targets, strict=True))
        return Examples.build(
            [[*prompt, *target[:-1]] for prompt, target in pairs],
            targets=[[*[IGNORED] * (len(prompt) - 1), *target] for prompt, target in pairs],
        )

    def encode_prompts(self, rows: Sequence[Row], tokenizer: Any, rooms: Sequence[int]) -> list[list[int]]:
        """The tokens of each row's prompt.

        Of a prompt that is too long its longest columns are cut: the end of `context`, where the newest words are, and
        the beginning of all others stay.

        Args:
            rows: prepared.
            tokenizer: the model's.
            rooms: most tokens of each.

        Raises:
            DataError: the prompt's own words do not fit.
        """
        pieces = parse_prompt(self.prompt)
        words = self._encode([piece.words for piece in pieces], tokenizer, reads_special=True)
        own = sum(map(len, words))
        prompts = []
        for row, room in zip(rows, rooms, strict=True):
            texts = [row.values[piece.column] if piece.column else "" for piece in pieces]
            values = self._encode(texts, tokenizer, reads_special=False)
            if own >= room:
                raise DataError(
                    f"tasks.<name>.prompt: must leave room for the rows, got {own} tokens of its own where {room} fit. "
                    "Raise model.max_length, or shorten the prompt."
                )
            shares = share_room([len(ids) for ids in values], room - own)
            cut = [
                ids[len(ids) - share :] if piece.column == CONTEXT else ids[:share]
                for piece, ids, share in zip(pieces, values, shares, strict=True)
            ]
            prompt = list(chain.from_iterable(chain(*pair) for pair in zip(words, cut, strict=True)))
            prompts.append(prompt or [tokenizer.eos_token_id])  # something must stand before the first token
        return prompts

    def judge(self, held_out: HeldOut) -> Judgement:
        """Write validation and test, and score what was written."""
        return judge_written(self, held_out, "What it writes")

    def write(self, held_out: HeldOut, rows: Sequence[Row]) -> list[str]:
        """A text for each row, as `evaluate.generate` says."""
        section, length = held_out.section.generate, held_out.max_length
        return generate_texts(
            held_out.model,
            held_out.tokenizer,
            self.encode_for_writing(rows, held_out.tokenizer, length, section),
            section,
            kind=self.type,
            max_length=length,
            seed=held_out.seed,
        )

    def encode_for_writing(
        self, rows: Sequence[Row], tokenizer: Any, max_length: int, section: GenerateSection
    ) -> list[list[int]]:
        """Prompts that leave room for what is to be written, at most half of `max_length`."""
        room = max_length - min(section.max_new_tokens, max_length // 2)
        return self.encode_prompts(rows, tokenizer, [room] * len(rows))

    def compute_baselines(self, held_out: HeldOut, rows: Sequence[Row]) -> dict[str, SystemOutput]:
        """The text itself, the nearest pair in train, and the passage's sentence that shares most words with the text.

        Raises:
            DataError: `bm25_sentence` without passages.
        """
        texts = [row.values["text"] for row in rows]
        found: dict[str, SystemOutput] = {}
        for name in held_out.section.baselines:
            if name != "bm25_sentence":
                found[name] = copy_or_find(name, held_out, texts)
                continue
            if any(PASSAGE not in row.values for row in rows):
                raise DataError(
                    "evaluate.baselines: bm25_sentence must find the role passage in the rows, got none. "
                    "Set tasks.<name>.columns: {passage: <column>}, or leave it out."
                )
            found[name] = SystemOutput(texts=find_sentences(texts, [row.values[PASSAGE] for row in rows])[0])
        return found

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {"type": self.type, "prompt": self.prompt, "clean": list(self.clean)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Completion:
        """Inverse of `to_config`."""
        return cls(config["prompt"], tuple(config["clean"]))

    def _list_parts(self, row: Row) -> list[str]:
        """The prompt of a row as text, in parts."""
        return [
            part
            for piece in parse_prompt(self.prompt)
            for part in (piece.words, row.values[piece.column] if piece.column else "")
        ]

    def _encode(self, texts: Sequence[str], tokenizer: Any, *, reads_special: bool) -> list[list[int]]:
        """Tokens of each text. A row's text that holds "<|im_end|>" means ten characters by it, and ends nothing."""
        if not texts:
            return []
        encoded: list[list[int]] = tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=not reads_special, verbose=False
        )["input_ids"]
        return encoded


def share_room(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each length fits into a room together: the longest give way first.

    `share_room([5, 100, 40], 60)` is [5, 28, 27].
    """
    shares = [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    for done, place in enumerate(order):
        shares[place] = min(lengths[place], room // (len(order) - done))
        room -= shares[place]
    return shares
