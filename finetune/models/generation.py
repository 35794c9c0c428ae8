"""Texts out of a language model: Hugging Face's `generate`, in batches by length and, for a long text, in windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from finetune.data.batches import plan_prediction
from finetune.errors import UsageError
from finetune.recipe.schema import GenerateSection

Tokens = list[int]

# Of a batch, read and written, in all beams: what the cache of keys and values grows to.
TOKENS_PER_BATCH = 16_384
UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character


def generate_texts(  # noqa: PLR0913  (a model, what it reads, and how it writes)
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Sequence[Tokens],
    section: GenerateSection,
    *,
    kind: str,
    max_length: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _rows: None,
) -> list[str]:
    """Let a model write to each text.

    What is written to a text does not depend on the others, unless it is sampled.

    Args:
        model: with Hugging Face's `generate`; left in the mode that it came in.
        tokenizer: the model's; must have an end token, at which it stops.
        texts: any number, or their tokens where a task encodes them itself. Of what is too long, a causal model reads
            the end and the other kind the beginning.
        section: how tokens are chosen, and how many at most.
        kind: `causal_lm` and `completion` go on with a text; `seq2seq` answers it.
        max_length: tokens that fit into the model. A causal model that has filled them goes on from the last half of
            them; an answer ends there.
        seed: of the sampling.
        advance: called with the number of finished texts after each batch.

    Returns:
        What was written, without the text that it goes on with, in the order of `texts`.
    """
    if isinstance(texts, str):
        raise UsageError("generate: texts must be a list of texts, got one text. Write [text].")
    writer = _Writer(model, tokenizer, section, kind == "seq2seq", max_length)
    prompts = writer.encode(texts)
    written = writer.write(prompts, seed, advance=advance)
    return [writer.decode(prompt, ids) for prompt, ids in zip(prompts, written, strict=True)]


def stream_text(  # noqa: PLR0913  (as above)
    model: Any,
    tokenizer: Any,
    text: str | Tokens,
    section: GenerateSection,
    emit: Callable[[str], None],
    *,
    kind: str,
    max_length: int,
    seed: int = 0,
) -> None:
    """Hand on what `generate_texts` writes to one text piece by piece, as it comes; from several beams, at the end.

    Args:
        model, tokenizer, section, kind, max_length, seed: as in `generate_texts`.
        text: what to write to, or its tokens.
        emit: takes each piece, of whole characters. What it raises ends the writing.
    """
    writer = _Writer(model, tokenizer, section, kind == "seq2seq", max_length)
    texts: Any = [text]  # of either kind
    (prompt,) = writer.encode(texts)
    if section.beams > 1:
        (written,) = writer.write([prompt], seed)
        emit(writer.decode(prompt, written))
        return
    pieces = _Pieces(tokenizer, [] if writer.answers else prompt, emit)
    writer.write([prompt], seed, streamer=pieces)
    pieces.finish()


@dataclass(frozen=True)
class _Writer:
    """A model and how it writes; `answers` says that it has an encoder for what it reads."""

    model: Any
    tokenizer: Any
    section: GenerateSection
    answers: bool
    max_length: int

    def encode(self, texts: Sequence[str] | Sequence[Tokens]) -> list[Tokens]:
        """What the model reads of each text, as it was trained: a causal model on a bare stream."""
        if not texts:
            return []
        given = [text for text in texts if not isinstance(text, str)]
        if given:
            encoded = [ids[-self.max_length :] for ids in given]
        elif self.answers:
            encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        else:
            ids = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            encoded = [prompt[-self.max_length :] for prompt in ids]
        # In a stream a text begins behind the end of another.
        return [prompt or [self.tokenizer.eos_token_id] for prompt in encoded]

    def decode(self, prompt: Tokens, written: Tokens) -> str:
        """The text of the tokens; of a continuation, what they add to the prompt: alone they may lose a first space."""
        if self.answers:
            return _decode(self.tokenizer, written)
        return _decode(self.tokenizer, prompt + written)[len(_decode(self.tokenizer, prompt)) :]

    def write(
        self,
        prompts: Sequence[Tokens],
        seed: int,
        *,
        advance: Callable[[int], None] = lambda _rows: None,
        streamer: _Pieces | None = None,
    ) -> list[Tokens]:
        """The tokens that follow each prompt, without the end token."""
        most = self.section.max_new_tokens
        if self.answers:
            most = min(most, self.max_length)
        written: list[Tokens] = [[] for _ in prompts]
        pending = list(range(len(prompts)))
        with self._prepare_model(seed):
            while pending:
                windows = {row: self._cut(prompts[row] + written[row]) for row in pending}
                counts = {row: min(most - len(written[row]), self._count_room(windows[row])) for row in pending}
                pending = []
                for rows in self._plan(windows, counts):
                    count = counts[rows[0]]
                    for row, ids in zip(rows, self._call([windows[row] for row in rows], count, streamer), strict=True):
                        written[row] += ids
                        if len(ids) == count and len(written[row]) < most:
                            pending.append(row)
                    advance(len(set(rows).difference(pending)))
        return written

    def _cut(self, ids: Tokens) -> Tokens:
        """What of a prompt and its continuation is read."""
        return ids if self.answers or len(ids) <= self.max_length else ids[-(self.max_length // 2) :]

    def _count_room(self, window: Tokens) -> int:
        """Tokens that can follow: the last one written is not read again."""
        return self.max_length if self.answers else self.max_length + 1 - len(window)

    def _plan(self, windows: dict[int, Tokens], counts: dict[int, int]) -> Iterator[list[int]]:
        """Batches of rows that get equally many tokens, so that a row outgrows the model where it would alone.

        Of equal length too where something stands in front of each row: padding must not come between the two.
        """
        alike = getattr(self.model, "packs_rows", True) or self.answers
        groups = {row: (counts[row], 0 if alike else len(windows[row])) for row in windows}
        for group in sorted(set(groups.values())):
            count = group[0]
            rows = np.array([row for row in windows if groups[row] == group])
            sizes = np.array([len(windows[row]) + count for row in rows]) * self.section.beams
            yield from (rows[batch].tolist() for batch in plan_prediction(sizes, TOKENS_PER_BATCH))

    def _call(self, windows: Sequence[Tokens], count: int, streamer: _Pieces | None) -> list[Tokens]:
        """At most `count` tokens behind each window, fewer where the end token came."""
        device, section, tokenizer = self.model.device, self.section, self.tokenizer
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        pad = end if pad is None else pad  # masked: any token will do
        side = "right" if self.answers else "left"  # a decoder goes on at the right edge
        inputs = [torch.tensor(window, device=device) for window in windows]
        input_ids = pad_sequence(inputs, batch_first=True, padding_value=pad, padding_side=side)  # (B, T)
        mask = pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True, padding_side=side)
        first = 1 if self.answers else input_ids.shape[1]  # an answer stands behind one start token
        # The section decides, not what a base's generation_config.json says about sampling and length.
        options: dict[str, Any] = {"do_sample": section.temperature is not None, "num_beams": section.beams}
        if section.temperature is not None:
            options |= {"temperature": section.temperature, "top_k": section.top_k or 0, "top_p": 1.0}
        if section.beams > 1:
            options["length_penalty"] = section.length_penalty
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_length=first + count,  # beside max_new_tokens a base's own max_length gives a warning
            max_new_tokens=None,
            eos_token_id=end,
            pad_token_id=pad,
            streamer=streamer,
            **options,
        )
        return [ids[: ids.index(end)] if end in ids else ids for ids in output[:, first:].tolist()]

    @contextmanager
    def _prepare_model(self, seed: int) -> Iterator[None]:
        """The model in evaluation mode and torch's generators at the seed; afterwards both as they were."""
        was_training, device = self.model.training, self.model.device
        self.model.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            try:
                yield
            finally:
                self.model.train(was_training)


class _Pieces:
    """A streamer for `generate` that hands on text when its last character is whole; one may take several tokens."""

    def __init__(self, tokenizer: Any, prompt: Tokens, emit: Callable[[str], None]) -> None:
        self.tokenizer, self.emit = tokenizer, emit
        self.ids = list(prompt)
        # The last piece handed on: how the next one is written may depend on it.
        self.start, self.end_of_last = 0, len(prompt)
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then one token at a time."""
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += value.tolist()
        if not (piece := self._decode_new()).endswith(UNFINISHED):
            self._hand_on(piece)

    def end(self) -> None:
        """Expect the prompt of another window."""
        self.is_prompt = True

    def finish(self) -> None:
        """Hand on what was held back."""
        self._hand_on(self._decode_new())

    def _decode_new(self) -> str:
        known = _decode(self.tokenizer, self.ids[self.start : self.end_of_last])
        return _decode(self.tokenizer, self.ids[self.start :])[len(known) :]

    def _hand_on(self, piece: str) -> None:
        if piece:
            self.start, self.end_of_last = self.end_of_last, len(self.ids)
            self.emit(piece)


def _decode(tokenizer: Any, ids: Tokens) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
