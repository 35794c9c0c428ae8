"""A recipe of each language task from its data to a judged model: what a run leaves, that it writes, what refuses."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import sacrebleu
import torch
from huggingface_hub import ModelCard
from torch import nn

import finetune
from finetune.adapters.attach import load_adapter
from finetune.artifact.predictor import USE_AS_BASE
from finetune.data.sources import load_rows
from finetune.errors import UsageError
from finetune.layout import settle_splits
from finetune.models.base import resolve_base
from finetune.recipe import load_recipe
from finetune.recipe.schema import GenerateSection
from finetune.runner import Run

GREEDY = GenerateSection(max_new_tokens=12)
PROMPTS = ["the dog", "a cat sees two", "your sister likes an apple"]
# Run -> task type
KINDS = {
    "causal": "causal_lm",
    "masked": "masked_lm",
    "translation": "seq2seq",
    "masked, on a BERT": "masked_lm",
    "causal, LoRA on a GPT-2": "causal_lm",
}
SCRATCH = ["causal", "masked", "translation"]
WRITERS = ["causal", "translation", "causal, LoRA on a GPT-2"]
METRICS = {
    "causal_lm": ["loss", "perplexity", "bits_per_byte", "token_accuracy"],
    "masked_lm": ["loss", "perplexity", "token_accuracy"],
    "seq2seq": ["bleu", "chrf", "loss"],
}
BASELINES = {"causal_lm": ["unigram", "ngram"], "masked_lm": ["unigram"], "seq2seq": ["copy", "nearest"]}
TITLES = {"causal_lm": "Text that it writes", "masked_lm": "Masked words that it fills in", "seq2seq": "Translations"}
PIPELINES = {"causal_lm": "text-generation", "masked_lm": "fill-mask", "seq2seq": "text-generation"}


@pytest.fixture(scope="module")
def get_run(
    tmp_path_factory: pytest.TempPathFactory,
    write_language_recipe: Callable[..., Path],
    tiny_base: Path,
    tiny_gpt2: Path,
) -> Callable[[str], Run]:
    """Name of a run -> the run, made once and only to be read."""
    root = tmp_path_factory.mktemp("language")
    changes: dict[str, dict[str, Any]] = {
        "translation": {"evaluate": {"generate": {"beams": 2}}},
        "masked, on a BERT": {"model": {"base": str(tiny_base)}, "train": {"epochs": 2}},
        "causal, LoRA on a GPT-2": {"model": {"base": str(tiny_gpt2)}, "adapter": {"method": "lora", "rank": 8}},
    }
    made: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in made:
            folder = root / re.sub(r"\W+", "_", name)
            recipe = write_language_recipe(folder / "in", KINDS[name], changes.get(name, {}))
            made[name] = finetune.run(recipe, runs=folder / "runs", quiet=True)
        return made[name]

    return get


@pytest.fixture
def copy_run(get_run: Callable[[str], Run], tmp_path: Path) -> Callable[[str], Run]:
    """Name of a run -> a copy of it, to be changed."""

    def copy(name: str) -> Run:
        folder = get_run(name).folder
        return Run(type(folder)(Path(shutil.copytree(folder.path, tmp_path / folder.path.name))))

    return copy


def find_input(run: Run) -> Path:
    """The file of rows that a run was trained on."""
    folder = run.folder.path.parents[2] / "in"
    return next(path for path in folder.iterdir() if path.suffix != ".yaml")


def read_test_texts(run: Run) -> list[str]:
    """The texts of the test split, by their ids."""
    columns = next(iter(load_recipe(run.folder.recipe).tasks.values())).columns
    texts = {row.id: row.values["text"] for row in load_rows(str(find_input(run)), columns, roles=("text",)).rows}
    (ids,) = json.loads((run.folder.data / "ids.json").read_text()).values()
    return [texts[i] for i in ids["test"]]


def read_predictions(run: Run) -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(run.folder.evaluation / "predictions.parquet").to_pydict()


# What a run leaves


@pytest.mark.parametrize("name", KINDS)
def test_layout(get_run: Callable[[str], Run], name: str) -> None:
    run = get_run(name)
    files = {path.relative_to(run.folder.path).as_posix() for path in run.folder.path.rglob("*") if path.is_file()}
    code = {"configuration_triad.py", "modeling_triad.py"}
    weights = {"adapter_model.safetensors", "adapter_config.json"} if "LoRA" in name else {"model.safetensors"}
    writes = {"generation_config.json"} if name in SCRATCH and name in WRITERS else set()
    model = code | weights | writes | {"config.json", "finetune.json", "tokenizer.json", "tokenizer_config.json"}
    learned = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} if name in SCRATCH else set()
    data = learned | {"findings.json", "ids.json", "task.json"}
    data |= {f"{split}.safetensors" for split in ("train", "validation", "test")}
    evaluation = {"predictions.parquet", "report.html", "test.json", "validation.json"}
    assert {file for file in files if not file.startswith("checkpoints/")} == {
        *{".lock", "MODEL_CARD.md", "events.jsonl", "recipe.resolved.yaml", "recipe.yaml", "run.lock", "status.json"},
        *(f"data/{file}" for file in data),
        *(f"evaluation/{file}" for file in evaluation),
        *(f"model/{file}" for file in model),
    }
    written = load_recipe(run.folder.path / "recipe.yaml")
    assert load_recipe(run.folder.recipe) == settle_splits(written, dict.fromkeys(written.tasks, "random"))


@pytest.mark.parametrize("name", KINDS)
def test_scores_have_one_layout(get_run: Callable[[str], Run], name: str) -> None:
    run, kind = get_run(name), KINDS[name]
    test = run.test
    assert test.keys() == {
        *("split", "rows", "confidence", "resamples", "seed", "opened", "metrics", "baselines", "slices", "gates")
    }
    assert (test["split"], test["rows"], test["opened"]) == ("test", len(read_predictions(run)["text"]), 1)
    assert list(test["metrics"]) == METRICS[kind]
    assert all(score["low"] <= score["value"] <= score["high"] for score in test["metrics"].values())
    assert list(test["baselines"]) == BASELINES[kind]
    for baseline in test["baselines"].values():
        assert (
            list(baseline["metrics"])
            == list(baseline["difference"])
            == [metric for metric in METRICS[kind] if kind != "seq2seq" or metric != "loss"]
        )
        for metric, score in baseline["metrics"].items():
            gap = test["metrics"][metric]["value"] - score["value"]
            assert baseline["difference"][metric]["value"] == pytest.approx(gap, abs=2e-6)
    validation = json.loads((run.folder.evaluation / "validation.json").read_text())
    assert validation.keys() == test.keys() - {"opened"}


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_predictions_give_the_likelihoods(get_run: Callable[[str], Run], name: str) -> None:
    run = get_run(name)
    found = read_predictions(run)
    assert list(found) == ["block" if name == "causal" else "row", "text", "tokens", "nats", "right"]
    values = {metric: score["value"] for metric, score in run.test["metrics"].items()}
    loss = sum(found["nats"]) / sum(found["tokens"])
    assert values["loss"] == pytest.approx(loss, abs=1e-5)
    assert values["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    assert values["token_accuracy"] == pytest.approx(sum(found["right"]) / sum(found["tokens"]), abs=1e-6)


def test_bits_per_byte_count_the_bytes_of_the_file(get_run: Callable[[str], Run]) -> None:
    """All of the test split but its first character, which nothing comes before."""
    run = get_run("causal")
    stream = "\n\n".join(read_test_texts(run))
    found = read_predictions(run)
    assert sum(found["tokens"]) == len(stream) - 1
    bits = sum(found["nats"]) / np.log(2)
    assert run.test["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits / len(stream[1:].encode()), abs=1e-5)


def test_translations_give_the_scores_of_sacrebleu(get_run: Callable[[str], Run]) -> None:
    run = get_run("translation")
    found = read_predictions(run)
    assert list(found) == ["id", "text", "reference", "prediction"]
    assert found["text"] == read_test_texts(run)
    values = {metric: score["value"] for metric, score in run.test["metrics"].items()}
    bleu = sacrebleu.corpus_bleu(found["prediction"], [found["reference"]]).score
    chrf = sacrebleu.corpus_chrf(found["prediction"], [found["reference"]]).score
    assert values["bleu"] == pytest.approx(bleu, abs=1e-4)
    assert values["chrf"] == pytest.approx(chrf, abs=1e-4)
    assert bleu > 5, "else equal scores would say little"


# What people read


@pytest.mark.parametrize("name", KINDS)
def test_the_report_shows_samples_and_nothing_of_a_classifier(get_run: Callable[[str], Run], name: str) -> None:
    run, kind = get_run(name), KINDS[name]
    page = (run.folder.evaluation / "report.html").read_text(encoding="utf-8")
    slices = ["slices"] if kind == "seq2seq" else []
    assert re.findall(r'<section id="(\w+)"', page) == [
        *("scores", "training", *slices, "samples", "findings", "facts", "recipe")
    ]
    assert f">{TITLES[kind]}</h2>" in page
    outputs = re.findall(r'<dd class="output"[^>]*>(.*?)</dd>', page, re.DOTALL)
    assert len(outputs) == 2
    if kind == "masked_lm":
        mask = html.escape(run.load().tokenizer.mask_token)
        assert all(mask in given for given in re.findall(r'<dd class="input"[^>]*>(.*?)</dd>', page, re.DOTALL))
        assert len(re.findall(r"<p>\d+ of \d+ right</p>", page)) == 2


def test_the_report_shows_what_the_loaded_model_writes(get_run: Callable[[str], Run]) -> None:
    run = get_run("causal")
    page = (run.folder.evaluation / "report.html").read_text(encoding="utf-8")
    found = re.findall(r'<dd class="output"[^>]*><span class="start">(.*?)</span>(.*?)</dd>', page, re.DOTALL)
    starts, shown = ([html.unescape(pair[part]) for pair in found] for part in (0, 1))
    assert [text.rstrip("\n") for text in run.load().generate(starts)] == shown
    assert len(starts) == 2
    assert all(start in "\n\n".join(read_test_texts(run)) for start in starts)

    run = get_run("translation")
    found = read_predictions(run)
    assert run.load().generate(found["text"]) == found["prediction"]
    page = (run.folder.evaluation / "report.html").read_text(encoding="utf-8")
    shown = [html.unescape(text) for text in re.findall(r'<dd class="output"[^>]*>(.*?)</dd>', page, re.DOTALL)]
    assert len(shown) == 2
    assert set(shown) <= set(found["prediction"])


@pytest.mark.parametrize("name", KINDS)
def test_the_card_can_be_read(get_run: Callable[[str], Run], name: str) -> None:
    run, kind = get_run(name), KINDS[name]
    card = ModelCard.load(run.folder.card)
    data = card.data
    assert data.pipeline_tag == PIPELINES[kind]
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        metric: score["value"] for metric, score in run.test["metrics"].items()
    }
    assert {result.task_type for result in data.eval_results} == {PIPELINES[kind]}
    assert data.library_name == ("peft" if "LoRA" in name else "transformers")
    assert data.base_model is None  # all of these began at random, or in a folder of this machine
    assert ("from-scratch" in data.tags) == (name in SCRATCH)
    assert not re.search(r"calibrat|confidence|None|nan\b", card.text, re.IGNORECASE)


# The loaded model


@pytest.mark.parametrize("name", WRITERS)
def test_a_loaded_model_writes_the_same_each_time(get_run: Callable[[str], Run], name: str) -> None:
    first, second = (get_run(name).load().generate(PROMPTS) for _ in range(2))
    assert first == second
    assert len(set(first)) == len(PROMPTS)
    assert all(len(text) > 2 for text in first)
    assert get_run(name).load().writing == load_recipe(get_run(name).folder.recipe).evaluate.generate


@pytest.mark.parametrize("name", SCRATCH)
def test_a_language_model_gives_no_labels(get_run: Callable[[str], Run], name: str) -> None:
    predictor = get_run(name).load()
    fix = USE_AS_BASE if name == "masked" else "Use finetune generate."
    words = f"predict: must get a run that gives labels, got {KINDS[name]}. {fix}"
    for ask in (predictor.predict, predictor.compute_scores):
        with pytest.raises(UsageError) as caught:
            ask(PROMPTS)
        assert str(caught.value) == words
    with pytest.raises(UsageError):
        _ = predictor.labels


def test_a_masked_language_model_does_not_write(get_run: Callable[[str], Run]) -> None:
    with pytest.raises(
        UsageError, match=r"generate: must get a run that writes text \(causal_lm, seq2seq, completion\), got masked"
    ):
        get_run("masked").load().generate(PROMPTS)


# Scored again


@pytest.mark.parametrize("name", SCRATCH)
def test_every_opening_of_the_test_split_is_counted(copy_run: Callable[[str], Run], name: str) -> None:
    run = copy_run(name)
    before = run.test
    again = run.evaluate()
    assert again == run.test == before | {"opened": 2}


@pytest.mark.parametrize("name", SCRATCH)
def test_another_held_out_set_leaves_the_test_split_closed(
    get_run: Callable[[str], Run], copy_run: Callable[[str], Run], tmp_path: Path, name: str
) -> None:
    run = copy_run(name)
    before, source = run.test, find_input(get_run(name))
    other = tmp_path / f"other{source.suffix}"
    other.write_bytes(source.read_bytes())
    scored = run.evaluate(str(other))
    assert (scored["split"], scored["data"]) == ("other", str(other))
    assert "opened" not in scored
    assert scored["rows"] > before["rows"]
    assert list(scored["metrics"]) == list(before["metrics"])
    assert [finding["kind"] for finding in scored["findings"]][:1] == ["leak"], "it holds the train rows too"
    assert json.loads((run.folder.evaluation / "other.json").read_text()) == scored
    assert run.test == before


# Without the toolkit

CLEAN = """
import json, sys
import torch, transformers
torch.set_num_threads(1)
folders, prompts, tokens = json.loads(sys.argv[1])
written = {}
for name, (auto, folder) in folders.items():
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    if "Masked" in auto:
        inputs = tokenizer("the " + tokenizer.mask_token, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[inputs.input_ids == tokenizer.mask_token_id]
        written[name] = logits.tolist()
        continue
    written[name] = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        start = 1 if model.config.is_encoder_decoder else inputs.input_ids.shape[1]
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        written[name].append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
assert not any(name.partition(".")[0] == "finetune" for name in sys.modules)
print(json.dumps(written))
"""
AUTO = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "translation": "AutoModelForSeq2SeqLM"}


@pytest.fixture(scope="module")
def clean(
    get_run: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory, run_without_toolkit: Callable[..., Any]
) -> dict[str, Any]:
    """What transformers alone writes with the models of all runs from scratch."""
    home = tmp_path_factory.mktemp("home")
    environment = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    folders = {name: (auto, str(get_run(name).folder.model)) for name, auto in AUTO.items()}
    return run_without_toolkit(home, CLEAN, json.dumps([folders, PROMPTS, GREEDY.max_new_tokens]), **environment)


@pytest.mark.parametrize("name", ["causal", "translation"])
def test_transformers_alone_writes_the_same(get_run: Callable[[str], Run], clean: dict[str, Any], name: str) -> None:
    assert clean[name] == get_run(name).load().generate(PROMPTS, GREEDY)


@torch.no_grad()
def test_transformers_alone_fills_in_the_same(get_run: Callable[[str], Run], clean: dict[str, Any]) -> None:
    predictor = get_run("masked").load()
    ids = predictor.tokenizer("the ")["input_ids"]
    ids.insert(len(ids) - 1, predictor.tokenizer.mask_token_id)  # the last one is the end token
    expected = predictor.model(torch.tensor([ids])).logits[0, -2]
    torch.testing.assert_close(torch.tensor(clean["masked"]), expected[None], atol=1e-5, rtol=1e-5)


# An adapter


@torch.no_grad()
def test_a_merged_adapter_gives_the_same_logits(get_run: Callable[[str], Run], tiny_gpt2: Path) -> None:
    run = get_run("causal, LoRA on a GPT-2")
    predictor = run.load()
    ids = torch.tensor([predictor.tokenizer(PROMPTS[-1])["input_ids"]])

    def compute(model: nn.Module) -> torch.Tensor:
        logits: torch.Tensor = model.eval()(input_ids=ids).logits
        return logits

    untrained = predictor.task.load_model(run.folder.model, resolve_base(str(tiny_gpt2)))
    before = compute(untrained)
    adapted = load_adapter(untrained, run.folder.model)
    torch.testing.assert_close(compute(predictor.model), compute(adapted), atol=1e-5, rtol=1e-5)
    assert (compute(adapted) - before).abs().max() > 0.1
    # Its matrix is that of the tokens too: merged into it, an update would change what is read.
    assert not any("lm_head" in part for part, _ in adapted.named_parameters() if "lora_" in part)
    assert json.loads((run.folder.model / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
