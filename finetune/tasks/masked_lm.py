"""Masked language modelling: hidden tokens from those around them (arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.batches import IGNORED, Batch, Examples, Indices, collate, list_inputs
from finetune.data.cleaning import clean_text
from finetune.data.rows import Row
from finetune.errors import ModelError
from finetune.evaluation.corpus_baselines import compute_unigram
from finetune.evaluation.corpus_scoring import CorpusSplit, SystemOutput, score_corpus
from finetune.models.base import BaseModel
from finetune.models.classifier import get_padding
from finetune.recipe.schema import ModelSection, TaskSection, TextStep
from finetune.tasks import language
from finetune.tasks.shapes import OnLanguageModel
from finetune.tasks.task import HeldOut, Judgement, Outputs, TaskData

MASKED, RANDOM = 0.8, 0.1
"""Of the chosen tokens so many are hidden, so many replaced by a random one; the rest stay as they are."""
EVALUATION_SEED = 0
"""Of the tokens that are hidden when a split is scored: the same in every epoch and for every model."""


@dataclass(frozen=True)
class MaskedLM(OnLanguageModel):
    """The shape of pre-training an encoder on texts without labels.

    Args:
        mask_ratio: share of each row's tokens that is chosen; at least one.
        clean: steps on each text before it is encoded.
        mask_token_id: the tokenizer's; None until `bind`.
        vocab_size: tokens that a random one is drawn from.
    """

    mask_ratio: float = 0.15
    clean: tuple[TextStep, ...] = ()
    mask_token_id: int | None = None
    vocab_size: int = 0

    type: ClassVar[str] = "masked_lm"
    roles: ClassVar[tuple[str, ...]] = ("text",)
    optional_roles: ClassVar[tuple[str, ...]] = ()
    scored_by: ClassVar[str] = "masked"
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    cuts_rows: ClassVar[bool] = False
    labels: ClassVar[None] = None

    @classmethod
    def build(cls, section: TaskSection, data: TaskData) -> MaskedLM:
        """Nothing is left to the data."""
        return cls(section.mask_ratio, tuple(section.clean))

    def prepare_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Clean each text."""
        return [replace(row, values={**row.values, "text": clean_text(row.values["text"], self.clean)}) for row in rows]

    def build_tokenizer(self, base: BaseModel, rows: Sequence[Row], section: ModelSection) -> Any:
        """The base's, or one learned from the train rows."""
        texts = [row.values["text"] for row in rows]
        return language.build_tokenizer(base, texts, section, appends_end=True, reads_special=True)

    def bind(self, tokenizer: Any) -> MaskedLM:
        """Take over the mask token and the size of the vocabulary.

        Raises:
            ModelError: a tokenizer without a mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ModelError(
                "masked_lm: the tokenizer must have a mask token, got none. "
                "Take an encoder such as BERT as model.base, or set it to scratch."
            )
        return replace(self, mask_token_id=int(tokenizer.mask_token_id), vocab_size=len(tokenizer))

    def build_examples(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Examples:
        """Encode each text; a longer one becomes several rows. Targets are the tokens that may be hidden, else -100."""
        texts = [row.values["text"] for row in rows]
        windows = (
            tokenizer(texts, truncation=True, max_length=max_length, return_overflowing_tokens=True)["input_ids"]
            if texts
            else []
        )
        special = set(tokenizer.all_special_ids)
        targets = [[IGNORED if token in special else token for token in ids] for ids in windows]
        return Examples.build(windows, targets=targets)

    def list_modules(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """The layer between base and vocabulary, which sentence encoders such as MiniLM come without."""
        new = [name for name, _ in model.named_children() if name.startswith("transform")]
        return new, new

    def compute_losses(self, model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Mean over the chosen tokens of each row, (B,); they are drawn anew each time, from torch's generator."""
        shape, device = batch["labels"].shape, batch["labels"].device
        choice, change = torch.rand((2, *shape)).to(device)
        drawn = torch.randint(self.vocab_size, shape).to(device)
        chosen = self.choose(choice, batch)
        tokens = torch.where(change < MASKED, self.mask_token_id or 0, batch["input_ids"])
        tokens = torch.where((change >= MASKED) & (change < MASKED + RANDOM), drawn, tokens)
        logits = _run(model, batch, tokens, chosen)
        found = language.compute_token_losses(logits, batch["labels"][chosen], label_smoothing)
        losses = language.sum_by_row(found.new_zeros(shape).masked_scatter(chosen, found), batch)
        return losses / language.sum_by_row(chosen.to(losses), batch).clamp(min=1)

    def compute_row_weights(self, examples: Examples, scheme: str) -> npt.NDArray[np.float32]:
        """Chosen tokens of each row."""
        counts = torch.tensor([int((ids != IGNORED).sum()) for ids in language.list_targets(examples)])
        return self.count_chosen(counts).numpy().astype(np.float32)

    def compute_outputs(
        self,
        model: nn.Module,
        examples: Examples,
        pad_token_id: int | None,
        *,
        share: tuple[int, int] = (0, 1),
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> Outputs:
        """Likelihoods of hidden tokens, (N, 4); the same tokens each time."""
        noise = _draw_noise(examples)

        def measure(batch: Batch, rows: Indices) -> torch.Tensor:
            chosen = self.choose(_lay_out([noise[i] for i in rows], batch), batch)
            tokens = torch.full_like(batch["input_ids"], self.mask_token_id or 0)
            found = language.measure_tokens(_run(model, batch, tokens, chosen), batch["labels"][chosen])
            values = found.new_zeros(len(found), *chosen.shape)
            values[:, chosen] = found
            return values

        return language.compute_likelihoods(model, examples, pad_token_id, measure, share=share, advance=advance)

    def choose(self, noise: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Which tokens are hidden: in each row those with the least noise among those that may be.

        Args:
            noise: in [0, 1), laid out like the batch's labels, (B, T) or (1, total).
            batch: as `collate` makes it.
        """
        may = batch["labels"] != IGNORED
        rows = language.number_rows(batch)
        # Sorted by row, then by noise, those that may not be hidden last: a token's place says whether it is among
        # its row's first.
        order = torch.argsort((rows * 4 + noise.double() + 2 * (~may)).flatten())
        first = torch.searchsorted(rows.flatten()[order].contiguous(), torch.arange(int(rows.max()) + 1).to(order))
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        wanted = self.count_chosen(language.sum_by_row(may.double(), batch))
        return may & (places.view_as(rows) - first[rows] < wanted[rows])

    def count_chosen(self, counts: torch.Tensor) -> torch.Tensor:
        """How many tokens are chosen of so many that may be, (B,)."""
        return torch.minimum((counts.double() * self.mask_ratio).round().clamp(min=1), counts.double())

    def judge(self, held_out: HeldOut) -> Judgement:
        """Score hidden tokens of validation and test."""
        pad_token_id = get_padding(held_out.model, held_out.tokenizer)
        likelihoods, scored, shown = {}, {}, {}
        for name in held_out.judged:
            examples = held_out.examples[name]
            likelihoods[name] = self.compute_outputs(held_out.model, examples, pad_token_id).astype(np.float64)
            shown[name] = held_out.tokenizer.batch_decode(
                [ids.tolist() for ids in language.list_tokens(examples.input_ids, examples.starts)],
                skip_special_tokens=True,
            )
            split = CorpusSplit(
                name=name,
                model=SystemOutput(likelihood=likelihoods[name]),
                references=None,
                inputs=shown[name],
                values=[{}] * len(examples),
                baselines=self._compute_baselines(held_out, examples),
                resampling=held_out.resample(),
                opened=held_out.opened if name == "test" else None,
            )
            scored[name] = score_corpus(split, held_out.section)
        nats, tokens, right, _ = likelihoods["test"].T
        return Judgement(
            scored=scored,
            predictions={"row": np.arange(len(nats)), "text": shown["test"], "tokens": tokens, "nats": nats}
            | {"right": right},
            samples=self._fill_in(held_out, pad_token_id),
            samples_title="Masked words that it fills in",
        )

    def to_config(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {
            "type": self.type,
            "mask_ratio": self.mask_ratio,
            "clean": list(self.clean),
            "mask_token_id": self.mask_token_id,
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MaskedLM:
        """Inverse of `to_config`."""
        return cls(config["mask_ratio"], tuple(config["clean"]), config["mask_token_id"], config["vocab_size"])

    def _compute_baselines(self, held_out: HeldOut, examples: Examples) -> dict[str, SystemOutput]:
        if not held_out.section.baselines:
            return {}
        train = language.list_targets(held_out.examples["train"])
        return {"unigram": compute_unigram(train, self._list_hidden(examples), self.vocab_size)}

    def _list_hidden(self, examples: Examples) -> list[npt.NDArray[np.int32]]:
        """The tokens that are hidden in each row when it is scored."""
        targets, noise, hidden = language.list_targets(examples), _draw_noise(examples), []
        for i, ids in enumerate(targets):
            batch = {"labels": torch.from_numpy(ids.astype(np.int64))[None]}
            hidden.append(ids[self.choose(torch.from_numpy(noise[i])[None], batch)[0].numpy()])
        return hidden

    @torch.no_grad()
    def _fill_in(self, held_out: HeldOut, pad_token_id: int | None) -> list[dict[str, Any]]:
        """Rows from all over the test split, with tokens hidden, and with the likeliest in their place."""
        examples, tokenizer = held_out.examples["test"], held_out.tokenizer
        noise = _draw_noise(examples)
        samples = []
        for i in language.spread_rows(range(len(examples)), held_out.section.samples):
            batch = collate(examples, np.array([i]), pad_token_id)
            device = next(held_out.model.parameters()).device
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            chosen = self.choose(_lay_out([noise[i]], batch), batch)
            masks = torch.full_like(batch["input_ids"], self.mask_token_id or 0)
            guesses = _run(held_out.model, batch, masks, chosen).argmax(-1)
            ids = batch["input_ids"][0]
            masked = torch.where(chosen[0], masks[0], ids)
            filled = ids.clone()
            filled[chosen[0]] = guesses
            right = int((guesses == batch["labels"][chosen]).sum())
            ends = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
            samples.append(
                {
                    "input": tokenizer.decode([t for t in masked.tolist() if t not in ends]),
                    "output": tokenizer.decode([t for t in filled.tolist() if t not in ends]),
                    "reference": tokenizer.decode(ids, skip_special_tokens=True),
                    "note": f"{right} of {len(guesses)} right",
                }
            )
        return samples


def _run(model: nn.Module, batch: Batch, tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Logits of the chosen tokens, (M, V), with `tokens` in their place.

    Triad computes those only: over a vocabulary of 30,000 the rest would take longer than the base itself.
    """
    inputs = list_inputs(batch) | {"input_ids": torch.where(chosen, tokens, batch["input_ids"])}
    config: Any = getattr(model, "module", model).config
    if config.model_type == "triad" and len(chosen) == 1:
        logits: torch.Tensor = model(**inputs, logits_to_keep=chosen[0].nonzero()[:, 0]).logits[0]
        return logits
    every: torch.Tensor = model(**inputs).logits
    return every[chosen]


def _draw_noise(examples: Examples) -> list[npt.NDArray[np.float64]]:
    """A number in [0, 1) for each token, by row: which tokens are hidden does not depend on batches."""
    flat = np.random.Generator(np.random.Philox(EVALUATION_SEED)).random(len(examples.input_ids))
    return np.split(flat, examples.starts[1:-1])


def _lay_out(rows: Sequence[npt.NDArray[np.float64]], batch: Batch) -> torch.Tensor:
    """Numbers of each token, laid out like the batch's labels."""
    shape, device = batch["labels"].shape, batch["labels"].device
    if "attention_mask" not in batch:
        return torch.from_numpy(np.concatenate(rows))[None].to(device)
    padded = np.zeros(tuple(shape))
    for place, numbers in enumerate(rows):
        padded[place, : len(numbers)] = numbers
    return torch.from_numpy(padded).to(device)
