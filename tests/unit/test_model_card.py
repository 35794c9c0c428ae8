"""The model card of each task type: what the Hub reads of it and what people read."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from finetune.artifact.card import Publication, build_model_card
from finetune.recipe.card import Card
from finetune.recipe.schema import Recipe

STATUS = {
    "training": {
        "steps": 4000,
        "seconds": 1770.4,
        "device": "cpu",
        "rows": 29000,
        "parameters": {"trained": 7812352, "total": 7812352},
    }
}
LOCK = {"precision": "float32", "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}}
SCRATCH = {"base": "scratch", "max_length": 64}
SCORES = {
    "text_classification": {"macro_f1": 0.9},
    "causal_lm": {"loss": 1.5948, "perplexity": 4.9277, "token_accuracy": 0.5312},
    "masked_lm": {"loss": 2.1482, "perplexity": 8.5694},
    "completion": {"chrf": 41.2, "bleu": 12.5},
    "seq2seq": {"bleu": 33.4171, "chrf": 58.3812, "loss": 1.4692},
    "question_answering": {"answer_f1": 0.7, "exact_match": 0.6},
}
PAIRS = Card(
    name="pairs",
    title="Pairs",
    licence="CC0-1.0",
    language=["en", "de"],
    files={"all": "pairs.csv"},
    roles={"text": "en", "target": "de"},
)


def write_card(
    kind: str,
    data: Card | None = None,
    origin: str = "download",
    publication: Publication | None = None,
    **recipe: Any,
) -> ModelCard:
    """The card of a run of that task type, with intervals of 1 % and a baseline that knows the first metric only."""
    metrics = {name: {"value": x, "low": 0.99 * x, "high": 1.01 * x} for name, x in SCORES[kind].items()}
    first = next(iter(metrics))
    test = {
        "rows": 1000,
        "confidence": 0.95,
        "resamples": 1000,
        "opened": 1,
        "metrics": metrics,
        "baselines": {"simple": {"metrics": {first: {"value": 1.23456, "low": 1.0, "high": 2.0}}}},
    }
    if kind == "text_classification":
        test |= {"labels": ["bad", "good"], "temperature": 1.31}
    values = {"recipe": 1, "name": "card", "tasks": {"only": {"type": kind, "data": "rows.csv"}}} | recipe
    checked = Recipe.model_validate(values)
    base = checked.model.base
    lock = LOCK | {"base": {"reference": base, "origin": "random weights" if base == "scratch" else origin}}
    return ModelCard(build_model_card(checked, {"only": data}, {"only": test}, STATUS, lock, publication))


@pytest.mark.parametrize(
    ("kind", "data", "tag", "head"),
    [
        ("text_classification", None, "text-classification", "ForSequenceClassification"),
        ("causal_lm", None, "text-generation", "ForCausalLM"),
        ("completion", None, "text-generation", "ForCausalLM"),
        ("masked_lm", None, "fill-mask", "ForMaskedLM"),
        ("seq2seq", PAIRS, "translation", "ForSeq2SeqLM"),
        ("seq2seq", PAIRS.model_copy(update={"language": ["en"]}), "text-generation", "ForSeq2SeqLM"),
        ("seq2seq", None, "text-generation", "ForSeq2SeqLM"),
    ],
)
def test_the_hub_learns_the_task_and_people_the_class(kind: str, data: Card | None, tag: str, head: str) -> None:
    card = write_card(kind, data, adapter={"method": "full"})
    assert card.data.pipeline_tag == tag
    assert {one.task_type for one in card.data.eval_results} == {tag}
    assert {one.metric_name: one.metric_value for one in card.data.eval_results} == SCORES[kind]
    assert f'AutoModel{head}.from_pretrained("model", trust_remote_code=True)' in card.text
    assert card.data.language == (data.language if data else None)
    assert "\n\n\n" not in card.text


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "seq2seq"])
def test_no_trace_of_classes_and_confidence(kind: str) -> None:
    text = write_card(kind, model=SCRATCH).text.replace("ForSequenceClassification", "")
    words = ("class", "label", "onfiden", "calibrat", "temperature", "answers with", "predict(")
    assert not [word for word in words if word in text]


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "seq2seq"])
def test_a_model_from_scratch_has_no_base(kind: str) -> None:
    card = write_card(kind, model=SCRATCH)
    assert card.data.base_model is None
    assert (card.data.library_name, card.data.tags) == ("transformers", ["finetune-toolkit", "from-scratch"])
    assert "Trained from scratch: " in card.text
    assert "7,812,352 parameters, and a tokenizer of byte pairs learned from the train split." in card.text
    assert "Base model" not in card.text
    assert "`scratch`" not in card.text


@pytest.mark.parametrize(
    ("kind", "scratch", "words"),
    [
        ("causal_lm", {"num_hidden_layers": 6}, "6 layers, 256 wide, 4 heads"),
        ("seq2seq", {"num_hidden_layers": 3}, "3 + 3 layers"),
        ("seq2seq", {"num_hidden_layers": 6, "num_decoder_layers": 2}, "6 + 2 layers"),
        ("causal_lm", {"tokenizer": "characters"}, "a tokenizer of characters learned"),
    ],
)
def test_the_size_of_a_model_from_scratch(kind: str, scratch: dict[str, Any], words: str) -> None:
    assert words in write_card(kind, model=SCRATCH | {"scratch": scratch}).text


def test_a_base_of_the_hub_is_named() -> None:
    card = write_card("masked_lm", model={"base": "acme/base@v1"})
    assert card.data.base_model == "acme/base"
    assert "Base model `acme/base`, full tuning: 7,812,352 of 7,812,352 parameters were trained." in card.text


@pytest.mark.parametrize("architecture", ["native", "triad"])
def test_the_code_loads_the_revision_that_was_tuned(architecture: str) -> None:
    lora = {"method": "lora"}
    card = write_card("causal_lm", model={"base": "acme/base@v1", "architecture": architecture}, adapter=lora)
    assert '.from_pretrained("acme/base", revision="v1", config=' in card.text
    card = write_card("causal_lm", model={"base": "acme/base", "architecture": architecture}, adapter=lora)
    assert '.from_pretrained("acme/base", config=' in card.text


@pytest.mark.parametrize("base", ["/data/models/in-house", "models/in-house"])
def test_a_folder_is_no_base_of_the_hub_wherever_the_card_is_written(base: str) -> None:
    """Nothing of that name lies here, and on the Hub anybody may take it."""
    card = write_card("causal_lm", model={"base": base}, adapter={"method": "full"}, origin="local folder")
    assert card.data.base_model is None
    assert "Base model `in-house`, full tuning" in card.text
    assert base not in str(card)


@pytest.mark.parametrize(
    ("kind", "row", "baseline"),
    [
        ("causal_lm", "| 1.595 (1.579 to 1.611) | 4.93 (4.88 to 4.98) | 0.531 (0.526 to 0.537) |", "1.235"),
        ("seq2seq", "| 33.4 (33.1 to 33.8) | 58.4 (57.8 to 59.0) | 1.469 (1.455 to 1.484) |", "1.2"),
    ],
)
def test_scores_have_the_decimals_of_their_metric(kind: str, row: str, baseline: str) -> None:
    text = write_card(kind, model=SCRATCH).text
    assert f"| **this model** {row}\n" in text
    low, high = ("1.000", "2.000") if kind == "causal_lm" else ("1.0", "2.0")
    others = len(SCORES[kind]) - 1
    assert f"| simple | {baseline} ({low} to {high}) |" + " \N{EN DASH} |" * others + "\n" in text


def test_a_translation_says_from_what_to_what_and_how_it_was_written() -> None:
    text = write_card("seq2seq", PAIRS, model=SCRATCH).text
    assert "A translation model. It reads `en` and writes `de`." in text
    assert "Texts were written by beam search with 5 beams." in text
    assert "from 0 to 100 (sacreBLEU, tok:13a)." in text, "BLEU without its tokens can be compared with nothing"


@pytest.mark.parametrize(
    ("generate", "words", "call"),
    [
        ({"beams": 1}, "by taking the likeliest token each time", "max_new_tokens=64)"),
        ({"beams": 1, "max_new_tokens": 20}, "by taking the likeliest token each time", "max_new_tokens=20)"),
        ({"beams": 4}, "by beam search with 4 beams", "max_new_tokens=64, num_beams=4)"),
        (
            {"beams": 4, "length_penalty": 0.6},
            "by beam search with 4 beams",
            "max_new_tokens=64, num_beams=4, length_penalty=0.6)",
        ),
        (
            {"beams": 1, "temperature": 0.8},
            "by sampling each token at temperature 0.8",
            "do_sample=True, temperature=0.8, top_k=0)",
        ),
        (
            {"beams": 1, "temperature": 1.0, "top_k": 50},
            "by sampling each token among the 50 likeliest at temperature 1",
            "do_sample=True, temperature=1.0, top_k=50)",
        ),
    ],
)
def test_the_code_writes_as_the_judged_model_did(generate: dict[str, Any], words: str, call: str) -> None:
    text = write_card("seq2seq", model=SCRATCH, evaluate={"generate": generate}).text
    assert f"Texts were written {words}." in text
    assert call in text


@pytest.mark.parametrize("architecture", ["triad", "native"])
@pytest.mark.parametrize(
    ("kind", "method", "head"),
    [
        ("text_classification", "lora", "ForSequenceClassification"),
        ("text_classification", "full", "ForSequenceClassification"),
        ("causal_lm", "lora", "ForCausalLM"),
        ("causal_lm", "full", "ForCausalLM"),
        ("completion", "lora", "ForCausalLM"),
        ("masked_lm", "full", "ForMaskedLM"),
        ("seq2seq", "lora", "ForSeq2SeqLM"),
        ("seq2seq", "full", "ForSeq2SeqLM"),
        ("question_answering", "lora", "ForQuestionAnswering"),
        ("question_answering", "full", "ForQuestionAnswering"),
    ],
)
def test_the_code_is_python_for_every_kind_of_model(kind: str, method: str, head: str, architecture: str) -> None:
    model = {"base": "acme/base", "architecture": architecture}
    card = write_card(kind, model=model, adapter={"method": method})
    code = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)[0]
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    loaded = {alias.name for node in imports for alias in node.names}
    assert ("PeftModel" in loaded) == (method == "lora") == (card.data.library_name == "peft")
    assert ("trust_remote_code=True" in code) == (architecture == "triad")
    assert head in code
    assert code.count("\ninputs = tokenizer(") == (kind != "text_classification")


def test_a_published_card_says_what_of_the_data_is_in_the_model() -> None:
    publication = Publication("acme/shelf", holds=["The catalogue of 2 items is part of the model."])
    card = write_card("text_classification", publication=publication)
    assert "\n- The catalogue of 2 items is part of the model.\n" in card.text.split("## Limits")[1]


@pytest.mark.parametrize("architecture", ["native", "triad"])
def test_a_method_that_peft_lacks_is_registered_before_its_folder_is_read(architecture: str) -> None:
    model = {"base": "acme/base", "architecture": architecture}
    code, other = (
        write_card("text_classification", model=model, adapter={"method": method}).text for method in ("bitfit", "lora")
    )
    line = 'get_class_from_dynamic_module("frozen.register", "model")()'
    assert 0 < code.index(line) < code.index("PeftModel.from_pretrained(")
    assert "code lies beside its weights:" in code
    assert line not in other


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text_classification", 'finetune.load("model").predict(["some text"])'),
        ("causal_lm", 'finetune.load("model").generate(["some text"])'),
        ("seq2seq", 'finetune.load("model").generate(["some text"])'),
        ("completion", 'finetune.load("model").generate(["some text"])'),
        ("masked_lm", "model: {base: model}"),
        ("question_answering", 'finetune.load("model").answer("some question", "some passage")'),
    ],
)
def test_use_with_the_toolkit(kind: str, words: str) -> None:
    assert words in write_card(kind, adapter={"method": "full"}).text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text_classification", "- Texts longer than 128 tokens are cut."),
        ("seq2seq", "- Texts longer than 128 tokens are cut."),
        ("seq2seq", "- A fluent text may say something else than its source."),
        ("causal_lm", "- It sees at most 128 tokens at once."),
        ("causal_lm", "- It writes what is likely, not what is true, and may repeat passages of its training text."),
        ("masked_lm", "- It sees at most 128 tokens at once."),
        ("masked_lm", "- It is a base for fine-tuning: by itself it guesses single tokens."),
        ("question_answering", "- Passages longer than 384 tokens are read in windows: it sees one at a time."),
        ("question_answering", "- An answer stands in the passage word for word;"),
    ],
)
def test_limits(kind: str, words: str) -> None:
    assert words in write_card(kind, adapter={"method": "full"}).text
