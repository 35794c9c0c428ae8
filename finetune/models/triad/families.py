"""How other families call what Triad has: for each a table of settings and of names, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MarianConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from finetune.models.triad.modeling_triad import (
    TriadForCausalLM,
    TriadForMaskedLM,
    TriadForQuestionAnswering,
    TriadForSeq2SeqLM,
    TriadForSequenceClassification,
    TriadForTokenClassification,
)

State = dict[str, torch.Tensor]
Names = tuple[tuple[str, str], ...]

# There -> here; of several names for one function, the first is the one to go back to.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}


@dataclass(frozen=True)
class Family:
    """What a family calls what Triad has.

    Args:
        config: its configuration class.
        prefix: name of the bare model within the others, as a regular expression.
        fixed: settings of Triad that all of its models have.
        settings: (there, here) of settings with the same value; a dot leads into a dictionary.
        base: (there, here) of modules of the bare model; * is the number of a layer.
        heads: (there, here) of what the other models have beside it.
        required: settings there -> the one value that Triad can express.
        activations: names of activation functions, there -> here.
        derive: settings of Triad that follow from others there.
        bare_options: arguments that leave out what a bare model has and Triad's has not.
        split, fuse: make the weights there such that renaming is all that is left to do, and undo that.
    """

    config: type[PreTrainedConfig]
    prefix: str
    fixed: Mapping[str, Any]
    settings: Names
    base: Names
    heads: Mapping[type[PreTrainedModel], Names]
    required: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=lambda: ACTIVATIONS)
    derive: Callable[[Any], dict[str, Any]] = lambda _: {}
    bare_options: Mapping[str, Any] = field(default_factory=dict)
    split: Callable[[State], State] | None = None
    fuse: Callable[[State], State] = field(default=lambda state: state)


def _same(*names: str) -> Names:
    return tuple((name, name) for name in names)


def _within(there: str, here: str, *names: tuple[str, str]) -> Names:
    return tuple((f"{there}.{old}", f"{here}.{new}") for old, new in names)


SHARED = _same("vocab_size", "id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id")
SIZES = _same("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

BERT_LIKE = {
    "shape": "encoder",
    "position": "learned",
    "embedding_norm": True,
    "scale_embeddings": False,
    "lm_head_bias": True,
    "pooling": "pooler",
}
BERT_SETTINGS = (
    *SHARED,
    *SIZES,
    *_same("max_position_embeddings", "type_vocab_size", "classifier_dropout", "initializer_range", "use_cache"),
    ("hidden_act", "activation"),
    ("layer_norm_eps", "norm_eps"),
    ("hidden_dropout_prob", "dropout"),
    ("attention_probs_dropout_prob", "attention_dropout"),
)
BERT_REQUIRED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    # Untied, the bias of the logits would be another one of two.
    "tie_word_embeddings": True,
}
BERT_BASE = (
    ("embeddings.word_embeddings", "encoder.embeddings.tokens"),
    ("embeddings.position_embeddings", "encoder.embeddings.positions"),
    ("embeddings.token_type_embeddings", "encoder.embeddings.token_types"),
    ("embeddings.LayerNorm", "encoder.embeddings.norm"),
    *_within(
        "encoder.layer.*",
        "encoder.layers.*",
        ("attention.self.query", "attention.q_proj"),
        ("attention.self.key", "attention.k_proj"),
        ("attention.self.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("attention.output.LayerNorm", "attention_norm"),
        ("intermediate.dense", "mlp.up_proj"),
        ("output.dense", "mlp.down_proj"),
        ("output.LayerNorm", "mlp_norm"),
    ),
)
DECODER_LIKE = {
    "shape": "decoder",
    "norm_position": "pre",
    "scale_embeddings": False,
    "pooling": "last",
    "classifier_bias": False,
}
LABELS = {TriadForTokenClassification: _same("classifier"), TriadForQuestionAnswering: _same("qa_outputs")}


def _split_gpt2(state: State) -> State:
    """Conv1D keeps its matrix transposed, and queries, keys and values in one."""
    parts = {}
    for name, tensor in state.items():
        is_matrix = re.search(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$", name)
        tensor = tensor.T if is_matrix else tensor
        if ".attn.c_attn." in name:
            chunks = zip(("q", "k", "v"), tensor.chunk(3), strict=True)
            parts.update({name.replace("c_attn", f"c_attn.{letter}"): chunk for letter, chunk in chunks})
        else:
            parts[name] = tensor
    return parts


def _fuse_gpt2(state: State) -> State:
    fused = {}
    for name, tensor in state.items():
        if ".c_attn.q." in name:
            tensor = torch.cat([state[name.replace(".q.", f".{letter}.")] for letter in "qkv"])
            name = name.replace(".q.", ".")
        elif ".c_attn." in name:
            continue
        is_matrix = re.search(r"\.c_(attn|proj|fc)\.weight$", name)
        fused[name] = tensor.T if is_matrix else tensor
    return fused


def _split_marian(state: State) -> State:
    """The bias of the logits lies in a row of its own; the sinusoids are computed here."""
    kept = {name: tensor for name, tensor in state.items() if "embed_positions" not in name}
    return {name: tensor.flatten() if name == "final_logits_bias" else tensor for name, tensor in kept.items()}


def _fuse_marian(state: State) -> State:
    fused = {name: tensor[None] if name == "final_logits_bias" else tensor for name, tensor in state.items()}
    return fused | {"model.shared.weight": state["model.encoder.embed_tokens.weight"]}


PROJECTIONS = (*_same("q_proj", "k_proj", "v_proj"), ("out_proj", "o_proj"))
MARIAN_LAYER = (
    *_within("self_attn", "attention", *PROJECTIONS),
    ("self_attn_layer_norm", "attention_norm"),
    ("fc1", "mlp.up_proj"),
    ("fc2", "mlp.down_proj"),
    ("final_layer_norm", "mlp_norm"),
)
FAMILIES = {
    "bert": Family(
        config=BertConfig,
        prefix="bert",
        fixed=BERT_LIKE,
        settings=BERT_SETTINGS,
        required=BERT_REQUIRED,
        base=BERT_BASE,
        heads={
            TriadForMaskedLM: (
                ("cls.predictions.transform.dense", "transform"),
                ("cls.predictions.transform.LayerNorm", "transform_norm"),
                ("cls.predictions.bias", "lm_head.bias"),
                ("cls.predictions.decoder", "lm_head"),
            ),
            TriadForSequenceClassification: (("bert.pooler.dense", "pooler.dense"), *_same("classifier")),
            **LABELS,
        },
        bare_options={"add_pooling_layer": False},
    ),
    "roberta": Family(
        config=RobertaConfig,
        prefix="roberta",
        fixed=BERT_LIKE,
        settings=BERT_SETTINGS,
        required=BERT_REQUIRED,
        # Its head for masked tokens takes GELU, whatever the layers take.
        activations={"gelu": "gelu"},
        base=BERT_BASE,
        heads={
            TriadForMaskedLM: (
                ("lm_head.dense", "transform"),
                ("lm_head.layer_norm", "transform_norm"),
                ("lm_head.bias", "lm_head.bias"),
                ("lm_head.decoder", "lm_head"),
            ),
            TriadForSequenceClassification: (
                ("classifier.dense", "pooler.dense"),
                ("classifier.out_proj", "classifier"),
            ),
            **LABELS,
        },
        # Positions are counted from the one behind the padding's.
        derive=lambda config: {"position_offset": config.pad_token_id + 1},
        bare_options={"add_pooling_layer": False},
    ),
    "distilbert": Family(
        config=DistilBertConfig,
        prefix="distilbert",
        fixed=BERT_LIKE | {"norm_eps": 1e-12, "pooler_activation": "relu"},
        settings=(
            *SHARED,
            *_same("max_position_embeddings", "tie_word_embeddings", "initializer_range"),
            *_same("activation", "dropout", "attention_dropout"),
            ("dim", "hidden_size"),
            ("n_layers", "num_hidden_layers"),
            ("n_heads", "num_attention_heads"),
            ("hidden_dim", "intermediate_size"),
            ("seq_classif_dropout", "classifier_dropout"),
        ),
        base=(
            ("embeddings.word_embeddings", "encoder.embeddings.tokens"),
            ("embeddings.position_embeddings", "encoder.embeddings.positions"),
            ("embeddings.LayerNorm", "encoder.embeddings.norm"),
            *_within(
                "transformer.layer.*",
                "encoder.layers.*",
                ("attention.q_lin", "attention.q_proj"),
                ("attention.k_lin", "attention.k_proj"),
                ("attention.v_lin", "attention.v_proj"),
                ("attention.out_lin", "attention.o_proj"),
                ("sa_layer_norm", "attention_norm"),
                ("ffn.lin1", "mlp.up_proj"),
                ("ffn.lin2", "mlp.down_proj"),
                ("output_layer_norm", "mlp_norm"),
            ),
        ),
        heads={
            TriadForMaskedLM: (
                ("vocab_transform", "transform"),
                ("vocab_layer_norm", "transform_norm"),
                ("vocab_projector", "lm_head"),
            ),
            TriadForSequenceClassification: (("pre_classifier", "pooler.dense"), *_same("classifier")),
            **LABELS,
        },
    ),
    "gpt2": Family(
        config=GPT2Config,
        prefix="transformer",
        fixed=DECODER_LIKE | {"position": "learned"},
        settings=(
            *SHARED,
            *_same("tie_word_embeddings", "initializer_range", "use_cache"),
            ("n_positions", "max_position_embeddings"),
            ("n_embd", "hidden_size"),
            ("n_layer", "num_hidden_layers"),
            ("n_head", "num_attention_heads"),
            ("n_inner", "intermediate_size"),
            ("activation_function", "activation"),
            ("layer_norm_epsilon", "norm_eps"),
            ("resid_pdrop", "dropout"),
            ("embd_pdrop", "dropout"),
            ("attn_pdrop", "attention_dropout"),
        ),
        required={
            "add_cross_attention": False,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
        },
        base=(
            ("wte", "decoder.embeddings.tokens"),
            ("wpe", "decoder.embeddings.positions"),
            ("ln_f", "decoder.norm"),
            *_within(
                "h.*",
                "decoder.layers.*",
                ("ln_1", "attention_norm"),
                ("ln_2", "mlp_norm"),
                ("attn.c_attn.q", "attention.q_proj"),
                ("attn.c_attn.k", "attention.k_proj"),
                ("attn.c_attn.v", "attention.v_proj"),
                ("attn.c_proj", "attention.o_proj"),
                ("mlp.c_fc", "mlp.up_proj"),
                ("mlp.c_proj", "mlp.down_proj"),
            ),
        ),
        heads={
            TriadForCausalLM: _same("lm_head"),
            TriadForSequenceClassification: (("score", "classifier"),),
            **LABELS,
        },
        derive=lambda config: {"intermediate_size": config.n_inner or 4 * config.n_embd},
        split=_split_gpt2,
        fuse=_fuse_gpt2,
    ),
    "llama": Family(
        config=LlamaConfig,
        prefix="(?:model|transformer)",
        fixed=DECODER_LIKE | {"position": "rotary", "norm": "rmsnorm", "dropout": 0.0},
        settings=(
            *SHARED,
            *SIZES,
            *_same("max_position_embeddings", "tie_word_embeddings", "initializer_range", "use_cache"),
            *_same("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "attention_dropout"),
            ("attention_bias", "output_bias"),
            ("hidden_act", "activation"),
            ("rms_norm_eps", "norm_eps"),
            ("rope_parameters.rope_theta", "rope_theta"),
        ),
        required={"rope_parameters.rope_type": "default", "rope_parameters.partial_rotary_factor": 1.0},
        activations={"silu": "swiglu", "swish": "swiglu"},
        base=(
            ("embed_tokens", "decoder.embeddings.tokens"),
            ("norm", "decoder.norm"),
            *_within(
                "layers.*",
                "decoder.layers.*",
                ("input_layernorm", "attention_norm"),
                ("post_attention_layernorm", "mlp_norm"),
                *_within("self_attn", "attention", *_same("q_proj", "k_proj", "v_proj", "o_proj")),
                *_same("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            ),
        ),
        heads={
            TriadForCausalLM: _same("lm_head"),
            TriadForSequenceClassification: (("score", "classifier"),),
            TriadForTokenClassification: (("score", "classifier"),),
            TriadForQuestionAnswering: _same("qa_outputs"),
        },
    ),
    "marian": Family(
        config=MarianConfig,
        prefix="model",
        fixed={"shape": "encoder_decoder", "sinusoid_layout": "halves", "lm_head_bias": True},
        settings=(
            *SHARED,
            *_same("max_position_embeddings", "tie_word_embeddings", "decoder_start_token_id", "use_cache"),
            *_same("dropout", "attention_dropout", "activation_dropout"),
            ("decoder_vocab_size", "vocab_size"),
            ("share_encoder_decoder_embeddings", "tie_word_embeddings"),
            ("d_model", "hidden_size"),
            ("encoder_layers", "num_hidden_layers"),
            ("decoder_layers", "num_decoder_layers"),
            ("encoder_attention_heads", "num_attention_heads"),
            ("decoder_attention_heads", "num_attention_heads"),
            ("encoder_ffn_dim", "intermediate_size"),
            ("decoder_ffn_dim", "intermediate_size"),
            ("activation_function", "activation"),
            ("scale_embedding", "scale_embeddings"),
            ("init_std", "initializer_range"),
        ),
        required={"is_decoder": False, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
        base=(
            ("encoder.embed_tokens", "encoder.embeddings.tokens"),
            ("shared", "encoder.embeddings.tokens"),
            ("decoder.embed_tokens", "decoder.embeddings.tokens"),
            *_within("encoder.layers.*", "encoder.layers.*", *MARIAN_LAYER),
            *_within("decoder.layers.*", "decoder.layers.*", *MARIAN_LAYER),
            *_within("decoder.layers.*.encoder_attn", "decoder.layers.*.cross_attention", *PROJECTIONS),
            ("decoder.layers.*.encoder_attn_layer_norm", "decoder.layers.*.cross_attention_norm"),
        ),
        heads={TriadForSeq2SeqLM: (("final_logits_bias", "lm_head.bias"), *_same("lm_head"))},
        split=_split_marian,
        fuse=_fuse_marian,
    ),
}
