"""The recipe's `adapter`: which weights are trained besides the head, and which keys each method reads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from finetune.recipe.section import Ratio, Section, raise_all

ADAPTER_KEYS: dict[str, tuple[str, ...]] = {
    "full": (),
    "head": (),
    "lora": ("rank", "alpha", "dropout", "targets", "dora", "rslora", "init", "learning_rate_ratio"),
    "adalora": ("rank", "final_rank", "alpha", "dropout", "targets"),
    "ia3": (),
    "prefix": ("virtual_tokens",),
    "prompt": ("virtual_tokens",),
    "p_tuning": ("virtual_tokens",),
    "vera": ("rank", "dropout", "targets"),
    "ln_tuning": (),
    "loha": ("rank", "alpha", "targets"),
    "lokr": ("rank", "alpha", "targets"),
    "oft": ("block_size", "targets"),
    "fourierft": ("frequencies", "alpha", "targets"),
    "adapter": ("style", "reduction", "activation"),
    "bitfit": (),
}
"""Method -> the keys of `adapter` that it reads besides `method`."""
OWN_DEFAULTS: dict[str, dict[str, Any]] = {"vera": {"rank": 256}, "fourierft": {"alpha": 150.0}}
"""What a method changes of the defaults below: the papers' values for encoders of this size."""


class AdapterSection(Section):
    """What is trained besides the head. `finetune adapters list` says which method reads which key."""

    method: Literal[
        "full",
        "head",
        "lora",
        "adalora",
        "ia3",
        "prefix",
        "prompt",
        "p_tuning",
        "vera",
        "ln_tuning",
        "loha",
        "lokr",
        "oft",
        "fourierft",
        "adapter",
        "bitfit",
    ] = "lora"
    """`full`: every weight. `lora`: low-rank updates, arXiv:2106.09685. `finetune adapters list` explains all."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Rank of each update; of `adalora` at the start. 256 for `vera`, which trains no matrix."""
    alpha: float = Field(default=32.0, gt=0)
    """Updates are scaled by alpha / rank. Those of `fourierft` by alpha, 150 by default."""
    dropout: Ratio = 0.0
    """Dropout on the input of each update."""
    targets: Literal["all-linear", "attention"] | list[str] = "all-linear"
    """Which linear layers of the base get an update: a word, or module names."""
    dora: bool = False
    """Train length and direction of each weight vector apart, arXiv:2402.09353."""
    rslora: bool = False
    """Scale by alpha / root of rank, which suits high ranks, arXiv:2312.03732."""
    init: Literal["default", "pissa", "olora", "eva"] = "default"
    """Where `lora` starts: at no update; at the base's largest singular vectors (arXiv:2404.02948); at an orthonormal
    basis of its weights (arXiv:2406.01775); at the main directions of the train split's states (arXiv:2410.07170)."""
    learning_rate_ratio: float | None = Field(default=None, ge=1, le=1000)
    """LoRA+, arXiv:2402.12354: the rate of B as a multiple of that of A; null: the same."""
    final_rank: int | None = Field(default=None, ge=1, le=1024)
    """Mean rank that `adalora` leaves at the end of training, below `rank`; default half of it."""
    virtual_tokens: int = Field(default=20, ge=1, le=512)
    """Trained vectors in front of each text."""
    frequencies: int = Field(default=1000, ge=1, le=1_000_000)
    """Trained coefficients of each update's spectrum."""
    block_size: int = Field(default=32, ge=2, le=1024)
    """Width of the blocks that `oft` turns; must divide the inputs of every target."""
    style: Literal["pfeiffer", "houlsby", "parallel"] = "pfeiffer"
    """Where the bottlenecks of `adapter` stand: behind each feed-forward layer (arXiv:2005.00247), behind attention too
    (arXiv:1902.00751), or beside the feed-forward layer (arXiv:2110.04366)."""
    reduction: int = Field(default=16, ge=1, le=1024)
    """The base's width over that of a bottleneck."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """In the middle of a bottleneck."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return OWN_DEFAULTS.get(str(given.get("method")), {}) | given if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check(self) -> AdapterSection:
        if self.method == "full":  # it trains all there is: `--set adapter.method=full` works on every recipe
            return self
        known = ADAPTER_KEYS[self.method]
        problems = [
            f"{key}: must be left out for {self.method}, which reads {', '.join(known) or 'no key besides method'}; "
            f"got {getattr(self, key)!r}."
            for key in type(self).model_fields
            if key in self.model_fields_set and key not in ("method", *known)
        ]
        if self.method == "adalora" and self.rank < 2:
            problems.append(f"rank: must be at least 2 for adalora, which lowers it, got {self.rank}.")
        elif self.method == "adalora" and self.final_rank is not None and self.final_rank >= self.rank:
            problems.append(f"final_rank: must be below rank, which is {self.rank}, got {self.final_rank}.")
        if self.dora and self.init in ("pissa", "olora"):
            problems.append(
                f"init: must be default or eva with dora, got {self.init!r}: the base's weights are taken apart twice."
            )
        raise_all(problems)
        return self

    @model_serializer(mode="wrap")
    def _drop_unread(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What the method reads, so that a written section can be read again."""
        return {key: value for key, value in serialize(self).items() if key in ("method", *ADAPTER_KEYS[self.method])}
