"""The methods: what each one is, what it can be combined with, and how the recipe's words become PEFT's.

PEFT is imported inside of functions: it takes seconds, and `finetune adapters list` needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.adapters.targets import find_feed_forward, find_keys_and_values, find_norms, find_targets
from finetune.errors import RecipeError
from finetune.recipe.schema import AdapterSection

# AdaLoRA's budget: full at the start, final at the end, as shares of the steps; arXiv:2303.10512, table 6, has 9 to
# 15 % and 46 to 58 %.
WARM_UP_SHARE, SETTLED_SHARE = 0.1, 0.5
ALLOCATIONS = 1000  # at most so many times

IN_TREE = ("adapter", "bitfit", "head")
"""What PEFT does not have: their code is saved beside their weights."""


@dataclass(frozen=True)
class Site:
    """Where a method is attached.

    Args:
        model: a Hugging Face model with its head.
        head: names of the head's modules.
        task_type: PEFT's name for what the model does.
        total_steps: optimizer steps of the whole run.
    """

    model: nn.Module
    head: Sequence[str]
    task_type: str
    total_steps: int

    @property
    def options(self) -> dict[str, Any]:
        """What every PEFT config takes."""
        from peft import TaskType

        return {"task_type": TaskType[self.task_type], "modules_to_save": list(self.head)}


@dataclass(frozen=True)
class Method:
    """A way to tune.

    Args:
        name: as in the recipe.
        title: as people write it.
        paper: its number on arXiv; empty where there is none.
        summary: what is trained, and what it is good for.
        merges: whether it can be folded into the base's weights.
        packs: whether it works on packed rows; if not, a Triad gets padded ones.
        limits: what it cannot be combined with.
        build: (section, site) -> PEFT's config; None where PEFT has no part in it.
    """

    name: str
    title: str
    paper: str
    summary: str
    merges: bool
    packs: bool
    limits: str
    build: Callable[[AdapterSection, Site], Any] | None


def _build_lora(section: AdapterSection, site: Site) -> Any:
    from peft import EvaConfig, LoraConfig

    # OLoRA lays its start the wrong way round into GPT-2's own layers.
    targets = find_targets(site.model, section.targets, site.head, takes_conv1d=section.init != "olora")
    if section.init != "default":
        _check_directions(section, site.model, targets)
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_dora=section.dora,
        use_rslora=section.rslora,
        init_lora_weights=True if section.init == "default" else section.init,
        # EVA may also deal ranks out to the layers that need them; here each keeps its own, which the plan counted.
        eva_config=EvaConfig(rho=1.0) if section.init == "eva" else None,
        target_modules=targets,
        **site.options,
    )


def _check_directions(section: AdapterSection, model: nn.Module, targets: Sequence[str]) -> None:
    """A start from directions of a layer needs as many of them as the rank."""
    for name in targets:
        most = min(model.get_parameter(f"{name}.weight").shape)
        if section.rank > most:
            raise RecipeError(
                f"adapter.rank: must be at most {most} with init {section.init}, the width of {name}, got "
                f"{section.rank}."
            )


def _build_adalora(section: AdapterSection, site: Site) -> Any:
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=section.rank,
        target_r=section.final_rank or section.rank // 2,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        total_step=site.total_steps,
        tinit=int(WARM_UP_SHARE * site.total_steps),
        tfinal=int(SETTLED_SHARE * site.total_steps),
        deltaT=max(1, site.total_steps // ALLOCATIONS),
        target_modules=find_targets(site.model, section.targets, site.head),
        **site.options,
    )


def _build_ia3(section: AdapterSection, site: Site) -> Any:  # noqa: ARG001  (it has no settings)
    from peft import IA3Config

    feed_forward = find_feed_forward(site.model)
    return IA3Config(
        target_modules=[*find_keys_and_values(site.model), *feed_forward],
        feedforward_modules=feed_forward,
        **site.options,
    )


def _build_prefix(section: AdapterSection, site: Site) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(num_virtual_tokens=section.virtual_tokens, **site.options)


def _build_prompt(section: AdapterSection, site: Site) -> Any:
    from peft import PromptTuningConfig

    # From tokens of the vocabulary, which the paper finds better than random vectors.
    return PromptTuningConfig(
        num_virtual_tokens=section.virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB", **site.options
    )


def _build_p_tuning(section: AdapterSection, site: Site) -> Any:
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(num_virtual_tokens=section.virtual_tokens, **site.options)


def _build_vera(section: AdapterSection, site: Site) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        r=section.rank,
        vera_dropout=section.dropout,
        target_modules=find_targets(site.model, section.targets, site.head),
        **site.options,
    )


def _build_ln_tuning(section: AdapterSection, site: Site) -> Any:  # noqa: ARG001
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=find_norms(site.model, site.head), **site.options)


def _build_loha(section: AdapterSection, site: Site) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(
        r=section.rank,
        alpha=section.alpha,
        target_modules=find_targets(site.model, section.targets, site.head, takes_conv1d=False),
        **site.options,
    )


def _build_lokr(section: AdapterSection, site: Site) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(
        r=section.rank,
        alpha=section.alpha,
        target_modules=find_targets(site.model, section.targets, site.head, takes_conv1d=False),
        **site.options,
    )


def _build_oft(section: AdapterSection, site: Site) -> Any:
    from peft import OFTConfig

    targets = find_targets(site.model, section.targets, site.head, takes_conv1d=False)
    for name in targets:
        inputs: int = site.model.get_submodule(name).in_features  # type: ignore[assignment]  # a linear layer
        if inputs % section.block_size:  # PEFT would take another size
            raise RecipeError(
                f"adapter.block_size: must divide the inputs of each target, got {section.block_size} for {name} with "
                f"{inputs} inputs."
            )
    return OFTConfig(oft_block_size=section.block_size, target_modules=targets, **site.options)


def _build_fourierft(section: AdapterSection, site: Site) -> Any:
    from peft import FourierFTConfig

    targets = find_targets(site.model, section.targets, site.head)
    for name in targets:
        size = site.model.get_parameter(f"{name}.weight").numel()
        if section.frequencies > size:
            raise RecipeError(
                f"adapter.frequencies: must be at most the weights of each target, got {section.frequencies} for "
                f"{name} with {size}."
            )
    # From zeros: the paper's random spectra would change what the base says before anything was learned.
    return FourierFTConfig(
        n_frequency=section.frequencies,
        scaling=section.alpha,
        init_weights=True,
        target_modules=targets,
        **site.options,
    )


def _build_bottleneck(section: AdapterSection, site: Site) -> Any:
    from finetune.adapters.bottleneck import BottleneckConfig

    return BottleneckConfig(
        style=section.style, reduction=section.reduction, activation=section.activation, **site.options
    )


def _build_bitfit(section: AdapterSection, site: Site) -> Any:  # noqa: ARG001
    from finetune.adapters.bias import BiasConfig

    return BiasConfig(**site.options)


def _build_head(section: AdapterSection, site: Site) -> Any:  # noqa: ARG001
    from finetune.adapters.frozen import HeadConfig

    return HeadConfig(**site.options)


_ANY = "goes with every task type and both architectures"
_LINEAR = f"{_ANY}; not with GPT-2's own class, whose layers are of another kind"
_PROMPT = (
    "not merged: what it adds is no weight of the base. Not packed: a Triad gets padded rows. Its tokens take "
    "positions from the text"
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "full",
            "full tuning",
            "",
            "Every weight. The best score where data are plenty; a whole model for each task.",
            merges=True,
            packs=True,
            limits=_ANY,
            build=None,
        ),
        Method(
            "head",
            "head only",
            "",
            "Nothing of the base: a classifier on its features. The yardstick of what an adapter adds.",
            merges=True,
            packs=True,
            limits="goes with tasks that have a head of their own, on both architectures",
            build=_build_head,
        ),
        Method(
            "lora",
            "LoRA",
            "2106.09685",
            "A product of two thin matrices added to each linear layer. The first choice: near full tuning with a few "
            "percent of the weights. Variants: dora, rslora, init (pissa, olora, eva), learning_rate_ratio (LoRA+).",
            merges=True,
            packs=True,
            limits=f"{_ANY}; dora not with init pissa or olora",
            build=_build_lora,
        ),
        Method(
            "adalora",
            "AdaLoRA",
            "2303.10512",
            "LoRA whose rank shrinks during training where it matters least. For a fixed budget over unequal layers; "
            "wants some hundred steps.",
            merges=True,
            packs=True,
            limits=_ANY,
            build=_build_adalora,
        ),
        Method(
            "ia3",
            "(IA)^3",
            "2205.05638",
            "Factors on keys, values and the inside of the feed-forward layers. Very few weights, for few examples; "
            "wants a high rate.",
            merges=True,
            packs=True,
            limits=f"{_ANY}; finds its layers by the names of the common families",
            build=_build_ia3,
        ),
        Method(
            "prefix",
            "prefix tuning",
            "2101.00190",
            "Trained keys and values in front of each layer's own. Made for generation with large models.",
            merges=False,
            packs=False,
            limits=_PROMPT,
            build=_build_prefix,
        ),
        Method(
            "prompt",
            "prompt tuning",
            "2104.08691",
            "Trained vectors in front of the text. A few thousand weights; weak on small models.",
            merges=False,
            packs=False,
            limits=_PROMPT,
            build=_build_prompt,
        ),
        Method(
            "p_tuning",
            "P-tuning",
            "2103.10385",
            "Prompt tuning through a small network that is dropped after training, which makes it steadier.",
            merges=False,
            packs=False,
            limits=_PROMPT,
            build=_build_p_tuning,
        ),
        Method(
            "vera",
            "VeRA",
            "2310.11454",
            "LoRA with one random pair of matrices for all layers and two trained vectors for each. Where many "
            "adapters are kept; layers of different shapes share parts of the pair.",
            merges=True,
            packs=True,
            limits=_ANY,
            build=_build_vera,
        ),
        Method(
            "ln_tuning",
            "LN tuning",
            "2312.11420",
            "The norms alone. Very few weights; for small shifts of domain or style.",
            merges=True,
            packs=True,
            limits=_ANY,
            build=_build_ln_tuning,
        ),
        Method(
            "loha",
            "LoHa",
            "2108.06098",
            "The elementwise product of two low-rank products: rank up to its square for twice the weights of LoRA.",
            merges=True,
            packs=True,
            limits=_LINEAR,
            build=_build_loha,
        ),
        Method(
            "lokr",
            "LoKr",
            "2309.14859",
            "A Kronecker product of a small and a low-rank matrix: high rank from few weights.",
            merges=True,
            packs=True,
            limits=_LINEAR,
            build=_build_lokr,
        ),
        Method(
            "oft",
            "OFT",
            "2306.07280",
            "Turns the inputs of each layer in blocks, which keeps the angles between its weights. Steady at high "
            "rates, slower than LoRA.",
            merges=True,
            packs=True,
            limits=f"{_LINEAR}; block_size must divide every target's inputs",
            build=_build_oft,
        ),
        Method(
            "fourierft",
            "FourierFT",
            "2405.03003",
            "A few coefficients of each update's spectrum. Fewer weights than LoRA, slow on wide layers; wants a high "
            "rate.",
            merges=True,
            packs=True,
            limits=_ANY,
            build=_build_fourierft,
        ),
        Method(
            "adapter",
            "bottleneck adapters",
            "2005.00247",
            "A narrow layer of two matrices behind or beside the sublayers of each block. Near full tuning with few "
            "weights; slower to predict with than what can be merged. Styles: pfeiffer, houlsby, parallel.",
            merges=False,
            packs=True,
            limits=f"{_ANY}; not merged, as it is no linear function; finds its layers by the names of the common "
            "families",
            build=_build_bottleneck,
        ),
        Method(
            "bitfit",
            "BitFit",
            "2106.10199",
            "The biases alone. A tenth of a percent of the weights; good with few rows.",
            merges=True,
            packs=True,
            limits=f"{_ANY}; not with bases without biases, such as Llama's",
            build=_build_bitfit,
        ),
    )
}


def describe(section: AdapterSection) -> str:
    """The tuning in a few words, for reports: `LoRA, rank 16, alpha 32, all-linear`."""
    method = METHODS[section.method]
    values = section.model_dump(mode="json", exclude={"method"})
    title = "DoRA" if values.pop("dora", False) else method.title
    words = {
        "rank": "rank {:g}",
        "final_rank": "final rank {:g}",
        "alpha": "alpha {:g}",
        "dropout": "dropout {:g}",
        "rslora": "rank-stabilized",
        "init": "{} start",
        "learning_rate_ratio": "LoRA+ ratio {:g}",
        "virtual_tokens": "{:,} virtual tokens",
        "frequencies": "{:,} frequencies",
        "block_size": "blocks of {:,}",
        "style": "{}",
        "reduction": "reduction {:g}",
        "activation": "{}",
        "targets": "{}",
    }
    said = [
        words[key].format(", ".join(value) if isinstance(value, list) else value)
        for key, value in sorted(values.items(), key=lambda pair: list(words).index(pair[0]))
        if value and value != "default"
    ]
    return ", ".join([title, *said])
