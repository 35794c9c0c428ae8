"""What a Triad model is made of: every choice, its default, and which choices do not go together."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

CHOICES = {
    "shape": ("encoder", "decoder", "encoder_decoder"),
    "norm_position": ("post", "pre"),
    "norm": ("layernorm", "rmsnorm"),
    "position": ("sinusoidal", "learned", "rotary"),
    "sinusoid_layout": ("interleaved", "halves"),
    "activation": ("relu", "gelu", "gelu_tanh", "silu", "swiglu"),
    "pooling": ("cls", "pooler", "mean", "last"),
    "pooler_activation": ("tanh", "relu"),
}
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_decoder_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)


class TriadConfig(PreTrainedConfig):
    """Configuration of the Triad models.

    The defaults are the base model of "Attention Is All You Need" (arXiv:1706.03762, table 3): post-norm, sinusoidal
    positions, ReLU, token embeddings scaled by the root of the width.

    Raises:
        ValueError: choices that cannot work; the message names all of them.
    """

    model_type = "triad"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (Trainer adds a list to it)

    shape: str = "encoder"
    """encoder | decoder | encoder_decoder."""
    vocab_size: int = 32000
    """Tokens V."""
    hidden_size: int = 512
    """Width D."""
    num_hidden_layers: int = 6
    """Layers of the encoder, or of the decoder where it is the only stack."""
    num_decoder_layers: int = None  # type: ignore[assignment]  # settled below
    """Layers of the decoder behind an encoder; default `num_hidden_layers`."""
    num_attention_heads: int = 8
    """Heads H of queries."""
    num_key_value_heads: int = None  # type: ignore[assignment]  # settled below
    """Heads of keys and values, each shared by H / this many heads of queries (arXiv:2305.13245); default H."""
    head_dim: int = None  # type: ignore[assignment]  # settled below
    """Width of a head; default D / H."""
    intermediate_size: int = 2048
    """Width of the feed-forward layer."""
    activation: str = "relu"
    """relu | gelu | gelu_tanh | silu, or the gated swiglu (arXiv:2002.05202)."""
    norm_position: str = "post"
    """post: normalise each residual sum. pre: normalise what enters each sublayer, and the end once."""
    norm: str = "layernorm"
    """layernorm | rmsnorm (arXiv:1910.07467)."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    position: str = "sinusoidal"
    """sinusoidal | learned | rotary (arXiv:2104.09864)."""
    sinusoid_layout: str = "interleaved"
    """Sines and cosines interleaved, as in the article, or in halves, as in Marian."""
    max_position_embeddings: int = 512
    """Positions that a row may have; the rows of the table where they are learned."""
    position_offset: int = 0
    """Position of the first token; 2 in RoBERTa. An encoder that learns positions then counts without padding."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    type_vocab_size: int = 0
    """Token types; 0 for none."""
    embedding_norm: bool = False
    """Normalise the sum of the embeddings."""
    scale_embeddings: bool = True
    """Multiply token embeddings by the root of D."""
    attention_bias: bool = True
    """Biases of the projections to queries, keys and values."""
    output_bias: bool = True
    """Bias of the projection behind the heads."""
    mlp_bias: bool = True
    """Biases of the feed-forward layer."""
    lm_head_bias: bool = False
    """Bias of each token's logit."""
    tie_word_embeddings: bool = True
    """One matrix for tokens in, in both stacks, and out; of `TriadForNextItem` one vector for an item in and out."""
    sliding_window: int | None = None
    """Tokens that a token sees: the last so many in a decoder; in an encoder those at most so many away."""
    dropout: float = 0.1
    """Rate on embeddings and on the output of each sublayer, while training."""
    attention_dropout: float = 0.0
    """Rate on attention weights."""
    activation_dropout: float = 0.0
    """Rate inside the feed-forward layer."""
    classifier_dropout: float | None = None
    """Rate before a task's head; default `dropout`."""
    pooling: str = "mean"
    """What a head for whole rows reads: the first token (`cls`), that token through a dense layer (`pooler`), the mean
    over tokens, or the last token."""
    pooler_activation: str = "tanh"
    """tanh | relu, behind the pooler's dense layer."""
    normalize_pooled: bool = False
    """Whether a head that classifies whole rows reads vectors of length 1."""
    classifier_bias: bool = True
    """Bias of a head that classifies whole rows."""
    normalize_embeddings: bool = True
    """Sentence embeddings have length 1."""
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Heads of `TriadForMultiTask`: name -> {type: sequence_classification | token_classification, num_labels}, or
    {type: sentence_embedding}."""
    num_items: int = 0
    """Items I of `TriadForNextItem`; they are its vocabulary, so that `vocab_size` follows. 0 for other models."""
    item_ids: bool = True
    """Each item has an embedding of its own, which only items that training saw can use."""
    item_text_size: int = 0
    """Width S of the vectors of the items' texts; 0 for items without text."""
    item_dropout: float = 0.0
    """Share of items that are read and scored by their text alone, while training: what new items need learned."""
    item_bias: bool = False
    """Bias of each item's score."""
    base_key_mapping: dict[str, str] | None = None
    """How the checkpoint of another family that the weights come from names them, pattern -> Triad's name: what
    `from_pretrained(key_mapping=...)` takes. None for Triad's own names."""
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    use_cache: bool = True
    """Keep keys and values while generating."""
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Settle what follows from other choices, and refuse what cannot work."""
        layers, heads, width = (  # at least 1, so that what is below is named once
            max(1, size) for size in (self.num_hidden_layers, self.num_attention_heads, self.hidden_size)
        )
        is_uneven = self.head_dim is None and self.hidden_size > 0 and width % heads > 0
        if self.num_items > 0:
            self.vocab_size, self.pad_token_id = self.num_items, None  # 0 is an item like any other
        if self.num_decoder_layers is None:
            self.num_decoder_layers = layers
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.head_dim is None:
            self.head_dim = max(1, width // heads)
        kwargs["is_encoder_decoder"] = self.shape == "encoder_decoder"
        problems = self.list_problems()
        if is_uneven:
            problems.append(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}), or head_dim be given."
            )
        if problems:
            raise ValueError("TriadConfig: " + " ".join(problems))
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> TriadConfig:
        """The config of one stack, whose number of layers Hugging Face's caches read."""
        if self.shape != "encoder_decoder" or not decoder or encoder:
            return self
        config = copy.copy(self)
        config.num_hidden_layers = self.num_decoder_layers
        return config

    def list_problems(self) -> list[str]:
        """One sentence for each choice that cannot work."""
        found = [
            f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}."
            for name, choices in CHOICES.items()
            if getattr(self, name) not in choices
        ]
        found += [
            f"{name} must be at least 1, got {getattr(self, name)}." for name in POSITIVE if getattr(self, name) < 1
        ]
        if found:
            return found
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        rules = (
            (
                heads % shared == 0,
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({shared}).",
            ),
            (
                self.position != "rotary" or self.head_dim % 2 == 0,
                f"rotary positions turn pairs of features: head_dim must be even, got {self.head_dim}.",
            ),
            (
                self.position != "sinusoidal" or self.hidden_size % 2 == 0,
                f"sinusoidal positions come in pairs: hidden_size must be even, got {self.hidden_size}.",
            ),
            (
                self.position != "rotary" or self.shape != "encoder_decoder",
                "rotary positions say nothing about tokens of the other stack: take sinusoidal or learned ones.",
            ),
            (
                self.sliding_window is None or self.shape != "encoder_decoder",
                "sliding_window is for a single stack: a decoder must see all of its encoder. Set it to null.",
            ),
            (
                self.sliding_window is None or self.sliding_window >= 1,
                f"sliding_window must be at least 1, got {self.sliding_window}. Null is for no window.",
            ),
            (
                self.shape != "decoder" or self.pooling in ("last", "mean"),
                f"pooling {self.pooling} reads the first token, which sees no other in a decoder: take last or mean.",
            ),
            (
                self.shape == "encoder" or not self.type_vocab_size,
                f"token types are for an encoder: type_vocab_size must be 0, got {self.type_vocab_size}.",
            ),
            (
                0 <= self.position_offset < self.max_position_embeddings,
                f"position_offset must lie in 0 to {self.max_position_embeddings - 1}, got {self.position_offset}.",
            ),
            (
                self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
                f"pad_token_id must lie in 0 to {self.vocab_size - 1}, got {self.pad_token_id}.",
            ),
            *self._list_item_rules(),
        )
        return [sentence for holds, sentence in rules if not holds]

    def _list_item_rules(self) -> list[tuple[bool, str]]:
        """What must hold of items, each with the sentence where it does not."""
        return [
            (self.num_items >= 0, f"num_items must be at least 0, got {self.num_items}."),
            (self.item_text_size >= 0, f"item_text_size must be at least 0, got {self.item_text_size}."),
            (
                self.num_items <= 0 or self.shape == "decoder",
                f"num_items is for a model that reads items in order: shape must be decoder, got {self.shape}.",
            ),
            (
                self.item_ids or self.item_text_size != 0,
                "items need a vector: set item_ids to true, or item_text_size to the width of their texts' vectors.",
            ),
            (0 <= self.item_dropout < 1, f"item_dropout must lie in 0 to 1, 1 left out, got {self.item_dropout}."),
            (
                self.item_dropout == 0 or (self.item_ids and self.item_text_size != 0),
                "item_dropout leaves text alone: it needs item_ids true and item_text_size above 0. Set it to 0.",
            ),
        ]


TriadConfig.register_for_auto_class()
