"""Triad, the project's own Transformer; importing it registers it with transformers' Auto classes."""

import transformers
from transformers import AutoConfig

from finetune.models.triad.configuration_triad import TriadConfig
from finetune.models.triad.modeling_triad import (
    AUTO_CLASSES,
    TriadForCausalLM,
    TriadForMaskedLM,
    TriadForMultiTask,
    TriadForQuestionAnswering,
    TriadForSentenceEmbedding,
    TriadForSeq2SeqLM,
    TriadForSequenceClassification,
    TriadForTokenClassification,
    TriadModel,
)
from finetune.models.triad.next_item import TriadForNextItem

AutoConfig.register("triad", TriadConfig, exist_ok=True)
for _model, _auto in AUTO_CLASSES.items():
    if _auto != "AutoModel" or _model is TriadModel:  # the others of AutoModel are loaded by their own names
        getattr(transformers, _auto).register(TriadConfig, _model, exist_ok=True)

__all__ = [
    "TriadConfig",
    "TriadForCausalLM",
    "TriadForMaskedLM",
    "TriadForMultiTask",
    "TriadForNextItem",
    "TriadForQuestionAnswering",
    "TriadForSentenceEmbedding",
    "TriadForSeq2SeqLM",
    "TriadForSequenceClassification",
    "TriadForTokenClassification",
    "TriadModel",
]
