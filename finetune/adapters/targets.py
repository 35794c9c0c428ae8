"""Which modules of a base a method changes, by the recipe's words and by the names of the common families."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from finetune.errors import RecipeError

# Of Triad, Llama, Marian and BART; of BERT and its kin; DistilBERT; T5; and where queries, keys and values are one
# layer, GPT-2, ModernBERT and Phi.
KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "k", "v", "c_attn", "Wqkv", "qkv_proj")
# The second layer of the feed-forward part: Triad and Llama; BERT; Marian and BART; DistilBERT; T5; GPT-2; ModernBERT.
FEED_FORWARD = ("down_proj", "output.dense", "fc2", "ffn.lin2", "wo", "mlp.c_proj", "mlp.Wo")
NOT_FEED_FORWARD = ("attention.output.dense",)


def find_targets(
    model: nn.Module, targets: str | Sequence[str], head: Sequence[str], *, takes_conv1d: bool = True
) -> list[str]:
    """Full names of the linear layers of the base that get an update.

    Not the layer over the vocabulary, which PEFT's own all-linear leaves out too: where its matrix is also that of the
    tokens, an update merged into it would change what the model reads.

    Args:
        model: with its head.
        targets: `all-linear`, `attention`, or ends of names.
        head: names of the head's modules.
        takes_conv1d: whether GPT-2's own layers count, linear ones whose weight lies the other way round.

    Raises:
        RecipeError: a name that matches no linear layer, or a base without any.
    """
    over_vocabulary = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in model.named_modules()
        if is_linear(module, takes_conv1d) and module is not over_vocabulary and not is_part_of(name, head)
    ]
    if not linear:
        raise RecipeError(
            "adapter.targets: must be linear layers of the base, got a base without one (GPT-2's own class has another "
            "kind). Set model.architecture: triad, or adapter.method: full."
        )
    if targets == "all-linear":
        return linear
    if targets == "attention":
        found = [name for name in linear if "attention" in name.lower() or "attn" in name.lower()]
        if not found:
            raise RecipeError(
                "adapter.targets: attention needs a base whose attention layers are called so, got none. Name them: "
                f"this base has {_list_endings(linear)}; or say all-linear."
            )
        return found
    unknown = [target for target in targets if not any(ends_with(name, [target]) for name in linear)]
    if unknown:
        raise RecipeError(
            f"adapter.targets: each name must end the name of a linear layer of the base, got {', '.join(unknown)}. "
            f"This base has {_list_endings(linear)}; or say all-linear or attention."
        )
    return [name for name in linear if ends_with(name, targets)]


def _list_endings(names: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def find_keys_and_values(model: nn.Module) -> list[str]:
    """Full names of the layers that make keys and values.

    Raises:
        RecipeError: a family that names them in another way.
    """
    return _find_by_name(model, KEYS_AND_VALUES)


def find_feed_forward(model: nn.Module) -> list[str]:
    """Full names of the second layers of the feed-forward parts, whose inputs are its inner states.

    Raises:
        RecipeError: a family that names them in another way.
    """
    return [name for name in _find_by_name(model, FEED_FORWARD) if not ends_with(name, NOT_FEED_FORWARD)]


def find_norms(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Full names of the base's norms: LayerNorm, RMSNorm, and families' own, which are called so too.

    Raises:
        RecipeError: there are none.
    """
    norms = [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm") and not is_part_of(name, head)
    ]
    if not norms:
        raise RecipeError("adapter.method: ln_tuning needs a base with norms, got one without. Take lora.")
    return norms


def is_linear(module: nn.Module, takes_conv1d: bool = True) -> bool:
    """Whether it is a linear layer."""
    return isinstance(module, nn.Linear) or (takes_conv1d and type(module).__name__ == "Conv1D")


def is_part_of(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of those named, or inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def ends_with(name: str, endings: Sequence[str]) -> bool:
    """Whether a module's name is one of those, or ends in one after a dot."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _find_by_name(model: nn.Module, endings: Sequence[str]) -> list[str]:
    found = [name for name, module in model.named_modules() if is_linear(module) and ends_with(name, endings)]
    if not found:
        raise RecipeError(
            f"adapter.method: ia3 needs layers of known names, got a base without any called {', '.join(endings)}. "
            "Set model.architecture: triad, or adapter.method: lora."
        )
    return found
