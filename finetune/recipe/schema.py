"""The schema of a recipe: every key, its type, its range and its default. Defaults are stated here and nowhere else."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from finetune.recipe.adapter import AdapterSection as AdapterSection  # as: part of this module for those who import it
from finetune.recipe.applications import AssistantSection as AssistantSection
from finetune.recipe.applications import MonitorSection as MonitorSection
from finetune.recipe.defaults import CLASS_BASELINES, CLASS_METRICS, fill_in_defaults
from finetune.recipe.prompt import list_columns
from finetune.recipe.recommendation import ItemsSection as ItemsSection
from finetune.recipe.recommendation import RankSection as RankSection
from finetune.recipe.recommendation import RecommendSection as RecommendSection
from finetune.recipe.section import Ratio, raise_all
from finetune.recipe.section import Section as Section
from finetune.recipe.together import list_problems

SCHEMA_VERSION = 1
DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
REPO_PATTERN = r"^[\w.-]+/[\w.-]+$"

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
TextStep = Literal["html", "urls"]
Baseline = Literal[
    "majority",
    "tfidf_logreg",
    "frozen_logreg",
    "unigram",
    "ngram",
    "copy",
    "nearest",
    "bm25",
    "frozen",
    "fused",
    "no_answer",
    "bm25_sentence",
    "popular",
    "popular_week",
    "own_history",
    "item_knn",
    "ease",
    "co_occurrence",
]
OutsideScore = Literal["energy", "max_probability"]


class ScratchSection(Section):
    """Tokenizer and size of a model that starts from random weights; TriadConfig's names (models/triad)."""

    tokenizer: Literal["bpe", "characters"] = "bpe"
    """What a token is, learned from the train split: byte pairs, or single characters."""
    vocab_size: int = Field(default=8000, ge=16, le=1_000_000)
    """Most tokens that the tokenizer may have."""
    hidden_size: int = Field(default=256, ge=8)
    """Width."""
    num_hidden_layers: int = Field(default=4, ge=1)
    """Layers of the encoder, or of the decoder where it is the only stack."""
    num_decoder_layers: int | None = Field(default=None, ge=1)
    """Layers of the decoder behind an encoder; default `num_hidden_layers`."""
    num_attention_heads: int = Field(default=4, ge=1)
    """Heads; must divide the width."""
    intermediate_size: int | None = Field(default=None, ge=8)
    """Width of the feed-forward layers; default four times `hidden_size`."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu"] = "gelu"
    """Of the feed-forward layers."""
    norm_position: Literal["post", "pre"] = "pre"
    """Behind each residual sum, as in the article, or before each sublayer, which trains at higher rates."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """How states are normalised."""
    position: Literal["sinusoidal", "learned", "rotary"] = "rotary"
    """How the model knows where a token stands; `sinusoidal` for seq2seq."""
    tie_word_embeddings: bool = True
    """One matrix for tokens in and out."""


class ModelSection(Section):
    """The pretrained part."""

    base: str = Field(default=DEFAULT_BASE, min_length=1)
    """A Hub id, `id@revision`, a local folder, a run (`runs/pretrain_mlm`), or `scratch`: random weights, and a
    tokenizer learned from the train split."""
    adapters: list[str] = Field(default_factory=list)
    """Saved adapters of this base (runs, or folders that PEFT wrote) to start from: one with the method and shapes of
    `adapter`, or several of method lora, whose mean is taken. A head for the same classes is taken over."""
    scratch: ScratchSection = Field(default_factory=ScratchSection)
    """Tokenizer and size where `base` is `scratch`."""
    architecture: Literal["triad", "native"] = "triad"
    """`triad`: the base's weights in the project's own Transformer, which packs rows without padding. `native`: the
    base's own Hugging Face class, for families that Triad has no form of."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Keep the base's linear layers in 8 or 4 bits while a LoRA adapter is trained on it (the extra `quantize`):
    `int8` with a scale for each output, `nf4` as in arXiv:2305.14314. The adapter then loads on the whole base."""
    max_length: int = Field(default=128, ge=8, le=8192)
    """Tokens after which a text is cut. For question_answering 384, and what is longer is read in several windows."""
    pooling: Literal["auto", "first", "mean"] = "auto"
    """What the head reads: the first token, or the mean over tokens (`triad` only). `auto`: the mean where the base
    says so in `1_Pooling/config.json`, as sentence encoders do; else what the base's own class reads."""
    normalize_features: bool = False
    """What the head reads has length 1, as sentence encoders are compared (`triad` only); true where train.few_shot is
    contrastive."""
    dropout: Ratio = 0.0
    """Dropout inside the base while training; short runs on small models do better without."""


def check_classes(labels: list[str] | dict[str, str]) -> None:
    """Raise ValueError unless at least two classes are named, and in a list none twice."""
    names = list(labels.values()) if isinstance(labels, dict) else labels
    twice = [name for name, times in Counter(names).items() if times > 1] if isinstance(labels, list) else []
    if twice:
        raise ValueError(f"must not repeat a class, got {', '.join(map(repr, twice))} more than once.")
    if len(set(names)) < 2:
        raise ValueError(f"must name at least 2 classes, got {sorted(set(names))}.")


class SplitSection(Section):
    """How rows become train, validation and test."""

    by: Literal["auto", "random", "group", "time", "order", "given", "time_cut", "leave_one_out"] = "auto"
    """`auto`: `given` where the data bring a split of their own, not all of it train; else `random`.
    `random`: stratified by label, drawn by `train.seed`, the file's name and the row's number in it: a renamed file is
    split anew. `group`: no value of `column` in two splits. `time`: oldest first by `column`.
    For recommendation: `time_cut`, the default there, two cuts in time that are the same for everyone, behind which
    nothing is known but what a person did; or `leave_one_out`, each person's last event, as in papers.
    `order`: as the rows stand, train first and test last. `given`: the card's or folder's own splits; a missing
    validation split is cut from train."""
    column: str | None = None
    """The column that `group` and `time` read."""
    validation: Ratio = 0.1
    """Share of rows for validation."""
    test: Ratio = 0.2
    """Share of rows for test; not read when the splits are given."""
    shots: int | None = Field(default=None, ge=1)
    """Few-shot: so many rows of each class stay in train, of different texts drawn by the seed, and at most as many in
    validation; test stays whole. For text_classification."""
    leaks: Literal["fail", "warn", "drop"] = "fail"
    """A text of the test split that is also in train or validation: stop; go on with a warning, as published figures
    do; or drop the row outside test."""

    @model_validator(mode="after")
    def _check(self) -> SplitSection:
        problems = []
        if self.by in ("group", "time") and not self.column:
            problems.append(f"column: must name a column when `by` is {self.by}, got nothing.")
        if self.by not in ("group", "time") and self.column:
            problems.append(f"column: must be left out unless `by` is group or time, got {self.column!r}.")
        if self.by != "given":
            if self.validation + self.test >= 1:
                problems.append(f"must leave rows for train: validation + test is {self.validation + self.test:g}.")
            problems += [f"{key}: must be above 0, got 0." for key in ("validation", "test") if not getattr(self, key)]
        raise_all(problems)
        return self


class TaskSection(Section):
    """One problem: its shape, its data and its labels."""

    type: Literal[
        "text_classification",
        "causal_lm",
        "masked_lm",
        "seq2seq",
        "completion",
        "retrieval",
        "reranking",
        "question_answering",
        "recommendation",
    ]
    """The problem shape: one class per text; the next token; masked tokens; a text for a text, by an encoder and
    a decoder; the text behind a prompt, by a decoder that learns nothing of the prompt; the entries that answer a
    question, found among all; the same, looked at again one by one; a question's answer, or that there is none, in a
    passage; the items that a person turns to next."""
    data: str = Field(min_length=1)
    """A card in the catalog or the samples, a path (file or folder of splits), or `hub:org/name@revision`
    (of several configurations one: `hub:org/name:config@revision`). A relative path leads from the recipe's folder, or,
    where nothing lies there, from the working folder."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Role -> column of the data; roles are named by the task type: `text`, and `label`, `target` or `entry`; for
    question_answering `passage` and `answer`, and `answer_start` where there is one. `context`: what was said before a
    text, and for completion `passage`: what it is answered from, both read where they are named. For recommendation
    `user`, `item` and `time`, and where it is named `weight`, above 0: what an event counts in what is popular. Where a
    card has entries and its rows name them, `title` and `passage` are columns too: those of the row's entries."""
    labels: list[str] | dict[str, str] | None = None
    """The classes in order, or value-in-the-data -> class; the card's own, else those that occur."""
    out_of_scope: str | None = Field(default=None, min_length=1)
    """The label of rows that belong to no class (text_classification). No class is learned from them, and they count in
    no score of the classes; on validation and test they show how well the model knows that it does not know."""
    outlier_exposure: float = Field(default=0.0, ge=0, le=10)
    """What train rows labelled `out_of_scope` count in the loss, beside 1 for others: the model is to be as unsure of
    them as it can (outlier exposure, arXiv:1812.04606). 0: they are left out of train."""
    clean: list[TextStep] = Field(default_factory=list)
    """Steps on each text before it is encoded: `html` decodes entities, `urls` removes links."""
    separator: str | None = None
    """What stands between two texts of a language model's stream; null: the tokenizer's end token."""
    prompt: str = "{text}"
    """What `completion` reads: words, and in braces roles or columns of the data, as in "Question: {text}". A base that
    was instructed wants its chat template's words around them, special tokens included; in the rows' own texts these
    are characters like any others."""
    mask_ratio: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that `masked_lm` hides, arXiv:1810.04805."""
    knowledge: str | None = None
    """The entries of `retrieval` and `reranking`: a file of `id`, `text` and perhaps `title` and `group`, or a card;
    null: the card's own."""
    negatives: int = Field(default=4, ge=0, le=64)
    """Entries that a question is trained to be parted from, beside those of other questions: they share words with it
    and do not answer it."""
    candidates: int = Field(default=20, ge=2, le=1000)
    """Entries that `reranking` looks at again when it is judged."""
    stride: int | None = Field(default=None, ge=0)
    """Tokens that two windows share in which `question_answering` reads a passage longer than model.max_length; default
    a third of that."""
    max_answer_tokens: int = Field(default=30, ge=1)
    """Most tokens of an answer that `question_answering` gives."""
    class_names: Literal["ignore", "rows"] = "ignore"
    """`rows`: the name of each class, underscores as spaces, is one more train row of it. Where rows are few, names say
    much."""
    typos: Ratio = 0.0
    """Share of the train rows of which a copy with mistakes of typing is learned from too; for text_classification,
    retrieval and reranking."""
    subject_changes: Ratio = 0.0
    """Share of the train rows without context of which a copy behind a conversation about another row is learned from
    too: what was said before need not matter. For tasks that `typos` is for, where a column is read as `context`."""
    items: ItemsSection | None = None
    """The catalogue of a recommendation's items; its keys go before those of the card."""
    recommend: RecommendSection | None = None
    """How a recommender is asked, and how its first stage reads histories; null: the defaults."""
    rank: RankSection | None = None
    """The second stage of a recommendation; null: the sequence model alone."""
    split: SplitSection = Field(default_factory=SplitSection)
    """How rows become train, validation and test."""
    weight: float = Field(default=1.0, gt=0)
    """What a row counts in the loss, beside those of other tasks."""

    @field_validator("labels")
    @classmethod
    def _labels(cls, labels: list[str] | dict[str, str] | None) -> list[str] | dict[str, str] | None:
        if labels is not None:
            check_classes(labels)
        return labels

    @model_validator(mode="before")
    @classmethod
    def _split_events(cls, task: Any) -> Any:
        if isinstance(task, dict) and task.get("type") == "recommendation" and isinstance(task.get("split", {}), dict):
            return {**task, "split": {"by": "time_cut", **task.get("split", {})}}
        return task

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, prompt: str) -> str:
        if not list_columns(prompt):
            raise ValueError(f"must name at least one column in braces, such as {{text}}, got {prompt!r}.")
        return prompt


class EarlyStopSection(Section):
    """When to stop before the last epoch."""

    metric: str = "macro_f1"
    """Validation metric to watch; larger is better unless it is an error such as `loss`, `ece`, `brier`."""
    patience: int = Field(default=2, ge=1)
    """Evaluations without a new best before stopping. Counted only after half of the planned steps: with a warm
    learning rate validation falls before it rises."""


class DistillSection(Section):
    """A model that this one learns from, beside the labels (arXiv:1503.02531)."""

    teacher: str = Field(min_length=1)
    """A finished run for the same classes, or its `model/` folder; `finetune compress` sets it to the run that it made
    smaller."""
    temperature: float = Field(default=2.0, gt=0, le=100)
    """What the logits of both are divided by, so that small probabilities count too."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the teacher's scores in the loss; the labels have the rest."""


class TrainSection(Section):
    """The loop."""

    epochs: int = Field(default=4, ge=1, le=10_000)
    """Passes over the train split."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps where the epochs have more; the learning rate decays to that end."""
    tokens_per_batch: int = Field(default=1024, ge=16)
    """Tokens, padding included, of one optimizer step over all processes."""
    micro_steps: int = Field(default=1, ge=1)
    """Forward + backward passes per step; more use less memory and give the same update."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak rate of the adapter, or of the base when tuning fully. Higher for methods that train few weights: 5e-3 to
    5e-2."""
    head_learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Peak rate of the head; default three times `learning_rate`, and 3e-3 for methods that train few weights."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up: down to zero, or constant."""
    warmup_ratio: Ratio = 0.06
    """Share of the steps in which the rate climbs."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """AdamW's decoupled decay, on matrices only."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient of one step."""
    ema_decay: float | None = Field(default=0.99, gt=0, lt=1)
    """Validation and the saved model use a moving average of the weights over about 1 / (1 - decay) steps; null: the
    weights of the last step."""
    label_smoothing: Ratio = 0.0
    """Share of the target spread over all classes."""
    class_weights: Literal["none", "balanced", "sqrt_balanced"] = "none"
    """Weight of a row by its class: `balanced` is n / (classes * count), `sqrt_balanced` its root."""
    few_shot: Literal["none", "contrastive"] = "none"
    """`contrastive`, for few rows a class: the base is tuned until texts of one class lie close together, then a
    logistic regression on its features becomes the head, arXiv:2209.11055."""
    distill: DistillSection | None = None
    """Learn from another model's scores too; for text_classification. A base that is a classifier of the same classes
    keeps its head."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """`auto` measures whether bf16 products are faster on this device."""
    evaluations_per_epoch: int = Field(default=1, ge=1, le=100)
    """How often validation is scored and a checkpoint written."""
    checkpoint_seconds: float = Field(default=600.0, gt=0)
    """A checkpoint is also written when the last is older than this."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept besides the best."""
    early_stop: EarlyStopSection | None = Field(default_factory=EarlyStopSection)
    """When to stop before the last epoch; null trains all of them."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Experiment trackers, through Accelerate; each is an extra."""
    seed: int = Field(default=13, ge=0, lt=2**32)
    """Seeds the split, the order, the head's start, dropout and the bootstrap."""


class GenerateSection(Section):
    """How text is written."""

    beams: int = Field(default=1, ge=1, le=64)
    """Hypotheses kept at each token; 1 takes the likeliest token, or samples."""
    max_new_tokens: int = Field(default=128, ge=1, le=8192)
    """Tokens after which a text ends."""
    temperature: float | None = Field(default=None, gt=0)
    """Sample from logits / temperature; null does not sample."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample among so many likeliest tokens only."""
    length_penalty: float = Field(default=1.0, ge=-5, le=5)
    """Beam scores are divided by length to this power."""


class EvaluateSection(Section):
    """How the model is judged."""

    metrics: list[str] = Field(default_factory=lambda: list(CLASS_METRICS), min_length=1)
    """Computed on validation and test; the first is the headline. Of several tasks each takes those that it has."""
    baselines: list[Baseline] = Field(default_factory=lambda: list(CLASS_BASELINES))  # type: ignore[arg-type]
    """What the model is compared with, each fitted on the same train split. Of several tasks each takes those that it
    has."""
    generate: GenerateSection = Field(default_factory=GenerateSection)
    """How a task that writes text writes it when it is judged."""
    samples: int = Field(default=8, ge=0, le=100)
    """Texts of the test split shown in the report with what the model writes."""
    calibrate: Literal["none", "temperature"] = "temperature"
    """Fitted on validation, arXiv:1706.04599."""
    outside_score: OutsideScore = "energy"
    """What tells rows of no class from others, where a task has `out_of_scope`: `energy`, -logsumexp of the logits
    (arXiv:2010.03759), or `max_probability`, 1 - the largest probability."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Level of the bootstrap intervals."""
    resamples: int = Field(default=1000, ge=100, le=100_000)
    """Bootstrap resamples."""
    slices: list[str] = Field(default_factory=lambda: ["length"])
    """Columns by whose values the score is broken down, and what is no column: `length`, the number of words;
    `numbers`, `tickers` (`$AAPL`), `percent` and `negation` (English), texts with and without."""
    gates: dict[str, str | bool] = Field(default_factory=dict)
    """Metric -> condition on its test value such as `">= 0.80"`; `beats_baselines: true`. With several tasks it holds
    for each, and `<task>.<metric>` for one."""

    @field_validator("gates", mode="before")
    @classmethod
    def _gates(cls, gates: Any) -> Any:
        if not isinstance(gates, dict):
            return gates
        problems = []
        for metric, condition in gates.items():
            if metric.rpartition(".")[2] == "beats_baselines":
                if not isinstance(condition, bool):
                    problems.append(f"beats_baselines: must be true or false, got {condition!r}.")
            elif not isinstance(condition, str) or not re.fullmatch(r"(>=|<=|>|<)\s*\d*\.?\d+", condition):
                problems.append(f'{metric}: must be a condition such as ">= 0.80", got {condition!r}.')
        raise_all(problems)
        return gates


class ExportSection(Section):
    """What `finetune export` must keep."""

    max_drop: dict[str, Annotated[float, Field(ge=0.0)]] | None = None
    """Metric -> the most that an exported model may lose of it on validation, or it is not written; of several tasks
    each takes those that it has. A task without one, and null: 0.005 of the headline."""


class HubSection(Section):
    """Where `push` goes."""

    repo: str | None = Field(default=None, pattern=REPO_PATTERN)
    """`owner/name`."""
    private: bool = True
    """Whether the repository is private."""


class Recipe(Section):
    """A run, as data."""

    recipe: Literal[1]
    """Schema version."""
    name: Name
    """Names the run's folder."""
    description: str = ""
    """One line for `finetune recipes list`."""
    model: ModelSection = Field(default_factory=ModelSection)
    """The pretrained part."""
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    """What is trained besides the head."""
    tasks: dict[Name, TaskSection] = Field(min_length=1)
    """Task name -> task. Several share the base and the adapter, each with a head of its own."""
    train: TrainSection = Field(default_factory=TrainSection)
    """The loop."""
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    """How the model is judged."""
    assistant: AssistantSection | None = None
    """Build a customer-service assistant on the tasks."""
    monitor: MonitorSection | None = None
    """Build a monitor of a stream of texts on the tasks."""
    export: ExportSection = Field(default_factory=ExportSection)
    """What `finetune export` must keep."""
    hub: HubSection = Field(default_factory=HubSection)
    """Where `push` goes."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _version(cls, version: object) -> object:
        if type(version) is not int or version != SCHEMA_VERSION:
            newer = type(version) is int and version > SCHEMA_VERSION
            fix = "Update the toolkit." if newer else f"Write `recipe: {SCHEMA_VERSION}`."
            raise ValueError(f"must be {SCHEMA_VERSION}, the version this toolkit reads, got {version!r}. {fix}")
        return version

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, recipe: Any) -> Any:
        return fill_in_defaults(recipe) if isinstance(recipe, dict) else recipe

    @model_validator(mode="after")
    def _check_together(self) -> Recipe:
        raise_all(list_problems(self))
        return self

    def evaluate_for(self, name: str) -> EvaluateSection:
        """`evaluate` as it holds for one of the tasks: gates called `<task>.<metric>` are for that task alone."""
        if len(self.tasks) == 1:
            return self.evaluate
        own, gates = f"{name}.", self.evaluate.gates
        chosen = {
            gate.removeprefix(own): value for gate, value in gates.items() if "." not in gate or gate.startswith(own)
        }
        return self.evaluate.model_copy(update={"gates": chosen})

    def to_dict(self) -> dict[str, Any]:
        """Every key with its resolved value, as plain YAML types."""
        return self.model_dump(mode="json")
