"""Triad for people's histories: which item comes next (SASRec, arXiv:1808.09781).

A decoder reads items in their order; the score of an item is the product of the last state and the item's vector. That
vector is an embedding of the item's own, or made from its text, or a mixture of both, so that items which training
never saw are read and scored by their text.

Shapes: I items, S width of the texts' vectors, N states to score; otherwise as in `modeling_triad`.

Like `modeling_triad`, this file is copied beside the weights: it imports nothing but torch, transformers and those two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_triad import TriadConfig
from .modeling_triad import TriadLabeler, TriadPooler


@dataclass
class NextItemOutput(ModelOutput):
    """What a decoder of items says.

    Args:
        loss: where labels were given.
        logits: (B, T or fewer, I), where asked for.
        last_hidden_state: (B, T, D), what `score` takes.
        hidden_states, attentions: where asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class TriadItems(nn.Module):
    """From item numbers to vectors: g * id + (1 - g) * text, with a gate g in (0, 1)^D that looks at both."""

    def __init__(self, config: TriadConfig) -> None:
        super().__init__()
        width, text_size = config.hidden_size, config.item_text_size
        self.id_embeddings = nn.Embedding(config.num_items, width) if config.item_ids else None
        self.text_projection = nn.Linear(text_size, width, bias=False) if text_size else None
        self.gate = nn.Linear(2 * width, width) if config.item_ids and text_size else None

    def forward(self, items: torch.Tensor, known: torch.Tensor, text_vectors: torch.Tensor | None) -> torch.Tensor:
        """Item numbers (...), whether their ids may speak (...), and their texts (..., S) -> (..., D)."""
        texts = None
        if self.text_projection is not None and text_vectors is not None:
            texts = self.text_projection(text_vectors.to(self.text_projection.weight.dtype))
        if self.id_embeddings is None:
            assert texts is not None  # the configuration refuses items without a vector
            return texts
        known = known[..., None]
        ids = self.id_embeddings(items) * known
        if self.gate is None or texts is None:
            return ids
        gate = torch.sigmoid(self.gate(torch.cat([ids, texts], dim=-1))) * known
        return texts + gate * (ids - texts)

    def extend(self, count: int) -> None:
        """Append so many embeddings of zeros."""
        if self.id_embeddings is not None:
            old = self.id_embeddings.weight
            new = torch.cat([old.detach(), old.new_zeros(count, old.shape[1])])
            self.id_embeddings = nn.Embedding(len(new), old.shape[1], _weight=new)
            self.id_embeddings.weight.requires_grad_(old.requires_grad)


class TriadForNextItem(TriadLabeler):
    """A decoder that scores every item as the next one.

    Two buffers are saved with the weights: `known` (I,) bool, the items that training saw, all of them at first; and
    `text_vectors` (I, S), which come from an encoder that is not part of this model, zeros at first.

    `input_ids` are item numbers, 0 to I - 1. There is no padding item: `attention_mask` says what is padding, and any
    number may stand there.
    """

    def __init__(self, config: TriadConfig) -> None:
        if config.shape != "decoder":
            raise ValueError(f"{type(self).__name__} needs a config of shape decoder, got {config.shape}.")
        if not config.num_items:
            raise ValueError(f"{type(self).__name__} needs config.num_items of at least 1, got 0.")
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # labels are the next items: nothing is shifted in the loss
        self.model.first.embeddings.tokens = None  # type: ignore[assignment]  # `items` stands in its place
        self.items = TriadItems(config)
        self.output_items = None if config.tie_word_embeddings else TriadItems(config)
        self.item_bias = nn.Parameter(torch.zeros(config.num_items)) if config.item_bias else None
        self.known: torch.Tensor
        self.text_vectors: torch.Tensor | None
        self.register_buffer("known", torch.ones(config.num_items, dtype=torch.bool))
        text_size = config.item_text_size
        self.register_buffer("text_vectors", torch.zeros(config.num_items, text_size) if text_size else None)
        self.pooler = TriadPooler(config, "last")
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            initialization.ones_(self.known)
            for tensor in (self.item_bias, self.text_vectors):
                if tensor is not None:
                    initialization.zeros_(tensor)

    def get_input_embeddings(self) -> nn.Module | None:
        """The items' own embeddings; None where they have only text."""
        return self.items.id_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace them."""
        self.items.id_embeddings = value

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Embedding:
        """New items have texts and are not known: `extend`."""
        raise NotImplementedError("The items of a TriadForNextItem are changed by extend, not resize_token_embeddings.")

    # Items

    @torch.no_grad()
    def set_text_vectors(self, vectors: torch.Tensor) -> None:
        """Take over the vectors of all items' texts, (I, S).

        Raises:
            ValueError: another shape, or numbers that are not finite.
        """
        if self.text_vectors is None:
            raise ValueError("Text vectors are for a model that reads texts, got config.item_text_size 0.")
        self.text_vectors.copy_(self._check_text_vectors(vectors, self.config.num_items))

    @torch.no_grad()
    def set_known(self, known: torch.Tensor) -> None:
        """Say which items training sees, (I,) bool; the others are read and scored by their text alone.

        Raises:
            ValueError: another shape.
        """
        if known.shape != self.known.shape:
            raise ValueError(f"known must say of each of {len(self.known)} items, got shape {tuple(known.shape)}.")
        self.known.copy_(known)

    @torch.no_grad()
    def extend(self, text_vectors: torch.Tensor | None = None, *, count: int | None = None) -> range:
        """Append new items, which training has not seen; before an optimizer is made, for it would hold the old ones.

        Args:
            text_vectors: (new items, S), for a model that reads texts.
            count: how many, for a model that reads none.

        Returns:
            Their numbers.

        Raises:
            ValueError: text vectors missing, of another width, or for a model that reads none.
        """
        old = self.config.num_items
        if self.text_vectors is not None and text_vectors is not None:
            count = len(text_vectors)
            texts = self._check_text_vectors(text_vectors, count).to(self.text_vectors)
            self.text_vectors = torch.cat([self.text_vectors, texts])
        elif self.text_vectors is not None or text_vectors is not None or count is None:
            wanted = "count" if self.text_vectors is None else "text_vectors"
            raise ValueError(f"extend needs {wanted}: config.item_text_size is {self.config.item_text_size}.")
        self.known = torch.cat([self.known, self.known.new_zeros(count)])
        if self.item_bias is not None:
            self.item_bias = nn.Parameter(torch.cat([self.item_bias, self.item_bias.new_zeros(count)]))
        for items in (self.items, self.output_items):
            if items is not None:
                items.extend(count)
        self.config.num_items = self.config.vocab_size = old + count
        return range(old, old + count)

    def compute_item_vectors(self, items: torch.Tensor | None = None, *, as_input: bool = False) -> torch.Tensor:
        """The vectors that states are multiplied with, or with `as_input` those that the decoder reads.

        Both are the same where `tie_word_embeddings`. While training, `item_dropout` leaves out other ids in each call.

        Args:
            items: numbers (...); None for all items.
            as_input: for the decoder; only untied items tell the difference.

        Returns:
            (..., D), or (I, D).
        """
        known = self.known
        if self.training and self.config.item_dropout:
            known = known & (torch.rand(known.shape, device=known.device) >= self.config.item_dropout)
        texts = self.text_vectors
        if items is None:
            items = torch.arange(len(known), device=known.device)
        else:
            self._check_items(items)
            known, texts = known[items], None if texts is None else texts[items]
        source = self.items if as_input or self.output_items is None else self.output_items
        vectors: torch.Tensor = source(items, known, texts)
        return vectors

    def compute_item_bias(self, items: torch.Tensor | None = None) -> torch.Tensor | None:
        """Bias of each item's score, (I,) or as `items`; None where there is none.

        0 for unknown items. That is the mean of all: the gradients of a softmax's biases sum to zero.
        """
        if self.item_bias is None:
            return None
        bias = self.item_bias * self.known
        return bias if items is None else bias[items]

    def score(
        self, hidden: torch.Tensor, items: torch.Tensor | None = None, item_vectors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores of items as the next one.

        Args:
            hidden: states (..., D), such as those of `encode`.
            items: numbers (K,); None for all.
            item_vectors: of those items, where they are computed already: (K, D).

        Returns:
            (..., K), or (..., I).
        """
        vectors = self.compute_item_vectors(items) if item_vectors is None else item_vectors
        scores = nn.functional.linear(hidden, vectors.to(hidden.dtype))
        bias = self.compute_item_bias(items)
        return scores if bias is None else scores + bias

    # Histories

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        item_vectors: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> NextItemOutput:
        """States of histories; logits only where asked for, because (B, T, I) is large.

        Args:
            input_ids: item numbers (B, T), or packed rows (1, total).
            attention_mask: (B, T) ones, and zeros for padding; None for packed rows.
            position_ids: (B, T), or (1, total), where they start again at each row.
            labels: the item that follows each position, (B, T); -100 counts for nothing. Nothing is shifted here. The
                loss is the mean cross-entropy over all items.
            logits_to_keep: the last so many positions, or their indices; 0 for all. None for all where there are
                labels, else for none.
            item_vectors: `compute_item_vectors()` where it is computed already, (I, D); untied items are only scored by
                them.
            kwargs: as in `TriadStack.forward`.
        """
        outputs, _ = self._read(input_ids, attention_mask, position_ids, item_vectors, kwargs)
        states = outputs.last_hidden_state
        logits = loss = None
        if labels is not None or logits_to_keep is not None:
            kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-(logits_to_keep or 0), None)
            logits = self.score(states[:, kept], item_vectors=item_vectors)
            if labels is not None:
                loss = self.loss_function(logits, labels[:, kept], vocab_size=logits.shape[-1], **kwargs)
        return NextItemOutput(loss, logits, states, outputs.hidden_states, outputs.attentions)

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        item_vectors: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The last state of each history, (rows, D); arguments as in `forward`."""
        _, pool = self._read(input_ids, attention_mask, position_ids, item_vectors, kwargs)
        return pool(self.pooler)

    def _read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        item_vectors: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """The decoder's outputs, and how to pool them."""
        if item_vectors is None or self.output_items is not None:
            embedded = self.compute_item_vectors(input_ids, as_input=True)
        else:
            self._check_items(input_ids)
            embedded = nn.functional.embedding(input_ids, item_vectors)
        return self.run(None, attention_mask, None, position_ids, kwargs | {"inputs_embeds": embedded})

    def _check_items(self, items: torch.Tensor) -> None:
        """Numbers out of range crash a GPU for good and say little on a CPU."""
        if torch.compiler.is_compiling():
            return
        if not items.numel():
            raise ValueError(f"Items must be at least one, got shape {tuple(items.shape)}.")
        if items.is_cuda:  # to look would synchronise
            return
        low, high = (int(number) for number in torch.aminmax(items))
        if low < 0 or high >= self.config.num_items:
            raise ValueError(
                f"Item numbers must lie in 0 to {self.config.num_items - 1}, got {low} to {high}: the catalogue and "
                "the model do not belong together."
            )

    def _check_text_vectors(self, vectors: torch.Tensor, count: int) -> torch.Tensor:
        wanted = (count, self.config.item_text_size)
        if tuple(vectors.shape) != wanted:
            raise ValueError(
                f"Text vectors must have shape {wanted}, items x item_text_size, got {tuple(vectors.shape)}."
            )
        if not torch.isfinite(vectors).all():
            raise ValueError("Text vectors must be finite, got NaN or infinity.")
        return vectors


TriadForNextItem.register_for_auto_class("AutoModel")
