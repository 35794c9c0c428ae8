"""`finetune evaluate --model` of every shape but classifiers: the figures of transformers alone, and those of a run."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import finetune
from finetune.data.ranking import LexicalIndex
from finetune.models.tokenizer import train_tokenizer

Command = Callable[..., Any]
COLUMNS = {"text": "question", "passage": "passage", "answer": "answer"}
NOUNS, VALUES = ["loss", "meeting", "schedule", "gains"], ["low", "high", "new", "old", "big"]
ENTRIES = {"a": "profit falls", "b": "the meeting moves", "c": "gains and wins", "d": "a new schedule"}


@pytest.fixture
def score(command: Command) -> Command:
    """What `finetune evaluate ... --json` says."""

    def call(*arguments: Any) -> dict[str, Any]:
        done = command("evaluate", *arguments, "--json")
        assert done.code == 0, done.err
        scored: dict[str, Any] = json.loads(done.out)
        return scored

    return call


def get_values(scored: dict[str, Any]) -> dict[str, float]:
    return {name: metric["value"] for name, metric in scored["metrics"].items()}


def list_columns(columns: dict[str, str]) -> list[str]:
    return [word for role, name in columns.items() for word in ("--column", f"{role}={name}")]


# What rows and models of each shape are


def write_questions(path: Path, passages: int, seed: int) -> Path:
    """Passages about three of four nouns, and a question about each noun."""
    generator = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "passage", "answer"])
        for place in range(passages):
            nouns, values = (generator.permutation(words).tolist() for words in (NOUNS, VALUES))
            said = dict(zip(nouns[:3], values, strict=False))
            passage = " ".join(f"The {noun} is {value} of {place}." for noun, value in said.items())
            writer.writerows((f"The {noun}?", passage, said.get(noun, "")) for noun in nouns)
    return path


def write_search(folder: Path) -> tuple[Path, Path]:
    """Questions of words of their entries, some of them twice, and the entries."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(5)
    rows = []
    for i in range(40):
        names = generator.choice(list(ENTRIES), size=1 + i % 2, replace=False)
        words = [str(generator.choice(ENTRIES[name].split())) for name in names]
        rows.append({"text": f"{' '.join(words)} {i}", "entry": " ".join(names)})
    rows.append({"text": "nobody knows", "entry": ""})
    entries = [{"id": name, "text": text} for name, text in ENTRIES.items()]
    for name, records in (("questions", rows), ("entries", entries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "questions.jsonl", folder / "entries.jsonl"


def write_pairs(path: Path, start: int, stop: int) -> Path:
    words = ["dog", "cat", "sees", "likes", "tree", "house"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "target"])
        for i in range(start, stop):
            chosen = [words[(i * k + k) % len(words)] for k in range(1, 5)]
            writer.writerow([f"{' '.join(chosen)} {i}", " ".join(reversed(chosen))])
    return path


def save_on_base(tiny_base: Path, folder: Path, kind: Any) -> Path:
    """The tiny BERT with a random head, as transformers saves it."""
    torch.manual_seed(0)
    model = kind.from_pretrained(tiny_base, config=BertConfig.from_pretrained(tiny_base))
    if isinstance(model, BertForQuestionAnswering):
        nn.init.normal_(model.qa_outputs.weight, std=2.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


@pytest.fixture
def answerer(tiny_base: Path, tmp_path: Path) -> Path:
    return save_on_base(tiny_base, tmp_path / "answerer", BertForQuestionAnswering)


@pytest.fixture
def filler(tiny_base: Path, tmp_path: Path) -> Path:
    return save_on_base(tiny_base, tmp_path / "filler", BertForMaskedLM)


@pytest.fixture
def translator(tmp_path: Path) -> Path:
    """A random BART of characters."""
    tokenizer = train_tokenizer(["a dog cat sees likes tree house 0123456789"], "characters", 64, 48, appends_end=True)
    sizes = {"d_model": 32, "max_position_embeddings": 48, "init_std": 0.4}
    sizes |= {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.bos_token_id, forced_eos_token_id=None,
        **sizes, **tokens,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "translator")
    tokenizer.save_pretrained(tmp_path / "translator")
    return tmp_path / "translator"


# Plain models: what transformers and arithmetic say


@torch.no_grad()
def find_answers(folder: Path, path: Path) -> list[tuple[str, str]]:
    """The likeliest span of each passage, "" where the first token is likelier, beside the answer."""
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            tokens = tokenizer(row["question"], row["passage"], return_tensors="pt", return_offsets_mapping=True)
            places = tokens.pop("offset_mapping")[0]
            logits = model(**tokens)
            starts, ends = logits.start_logits[0], logits.end_logits[0]
            inside = [i for i, part in enumerate(tokens.sequence_ids(0)) if part == 1]
            sums = {(i, j): float(starts[i] + ends[j]) for i in inside for j in inside if i <= j < i + 30}
            first, last = max(sums, key=lambda span: sums[span])
            text = row["passage"][int(places[first][0]) : int(places[last][1])]
            found.append((text if sums[first, last] > float(starts[0] + ends[0]) else "", row["answer"]))
    return found


def test_question_answering(answerer: Path, tmp_path: Path, score: Command) -> None:
    rows = write_questions(tmp_path / "rows.csv", 30, seed=3)
    found = score("--model", answerer, "--data", rows, *list_columns(COLUMNS))
    said = find_answers(answerer, rows)
    nothing = [text == "" for text, answer in said if answer == ""]
    assert 0 < sum(nothing) < len(nothing), "else equal scores would say little"
    assert get_values(found)["no_answer_accuracy"] == pytest.approx(np.mean(nothing), abs=1e-6)
    overlaps = [_compute_overlap(text, answer) for text, answer in said]
    assert get_values(found)["answer_f1"] == pytest.approx(np.mean(overlaps), abs=1e-6)
    assert get_values(found)["has_answer_f1"] > 0
    assert (found["task"], found["max_length"], found["rows"]) == ("question_answering", 64, 120)
    assert list(found["baselines"]) == ["no_answer"]  # nothing to choose the other's threshold on
    assert found["baselines"]["no_answer"]["metrics"]["answer_f1"]["value"] == 0.25


def _compute_overlap(text: str, answer: str) -> float:
    """F1 of the words, as the script of SQuAD has it, for texts in which only "The" and dots are left out."""
    one, other = ([word for word in part.lower().replace(".", "").split() if word != "the"] for part in (text, answer))
    if not one or not other:
        return float(one == other)
    shared = sum(min(one.count(word), other.count(word)) for word in set(one))
    return 2 * shared / (len(one) + len(other))


def test_causal_lm_and_baselines_of_the_data(tiny_gpt2: Path, tmp_path: Path, score: Command) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, stop in (("train", 60), ("test", 20)):
        lines = [f"the dog sees a house {'in Spring' * (i % 3)} today." for i in range(stop)]
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text"], *([f"{line} {name} {i}"] for i, line in enumerate(lines))])
    found = score("--model", tiny_gpt2, "--data", folder)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_gpt2), AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    with (folder / "test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    stream = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], 3]]
    nats = []
    for start in range(0, len(stream) - 1, 64):
        block = torch.tensor([stream[start : start + 65]])
        with torch.no_grad():
            logits = model(block[:, :-1]).logits[0]
        nats += nn.functional.cross_entropy(logits, block[0, 1:], reduction="none").tolist()
    assert get_values(found)["loss"] == pytest.approx(np.mean(nats), abs=1e-5)
    assert get_values(found)["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
    assert (found["task"], found["max_length"]) == ("causal_lm", 64)
    assert list(found["baselines"]) == ["unigram", "ngram"]
    assert found["baselines"]["ngram"]["metrics"]["loss"]["value"] < get_values(found)["loss"]  # random weights


def test_seq2seq(translator: Path, tmp_path: Path, score: Command) -> None:
    rows = write_pairs(tmp_path / "pairs.csv", 0, 30)
    found = score("--model", translator, "--data", rows)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(translator),
        AutoModelForSeq2SeqLM.from_pretrained(translator).eval(),
    )
    with rows.open(encoding="utf-8", newline="") as file:
        pairs = [(row["text"], row["target"]) for row in csv.DictReader(file)]
    written, nats, count = [], 0.0, 0
    for text, target in pairs:
        tokens = tokenizer(text, return_tensors="pt")
        ids = model.generate(input_ids=tokens["input_ids"], num_beams=5, max_length=49, do_sample=False)
        written.append(tokenizer.decode(ids[0], skip_special_tokens=True))
        labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            nats += float(model(input_ids=tokens["input_ids"], labels=labels).loss) * labels.shape[1]
        count += labels.shape[1]
    targets = [target for _, target in pairs]
    assert len(set(written)) > 5, "else equal scores would say little"
    chrf = sacrebleu.corpus_chrf(written, [targets]).score
    assert get_values(found)["chrf"] == pytest.approx(chrf, abs=1e-4)
    assert get_values(found)["loss"] == pytest.approx(nats / count, abs=1e-5)
    copied = sacrebleu.corpus_bleu([text for text, _ in pairs], [targets]).score
    assert list(found["baselines"]) == ["copy"]
    assert found["baselines"]["copy"]["metrics"]["bleu"]["value"] == pytest.approx(copied, abs=1e-4)


@torch.no_grad()
def compute_mrr(folder: Path, questions: Path, *, first: bool = False) -> float:
    """The mean of 1 / place of the first right entry, by the cosine of means over tokens, or of first tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embed(text: str) -> torch.Tensor:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return nn.functional.normalize(hidden[0] if first else hidden.mean(0), dim=0)

    known = torch.stack([embed(text) for text in ENTRIES.values()])
    found = []
    for row in map(json.loads, questions.read_text().splitlines()):
        if names := row["entry"].split():
            order = [list(ENTRIES)[i] for i in (known @ embed(row["text"])).argsort(descending=True)]
            found.append(1 / (1 + min(order.index(name) for name in names)))
    return float(np.mean(found))


def copy_as_sentence_encoder(base: Path, folder: Path, way: str, *more: str) -> Path:
    """A base with the files that sentence-transformers puts beside it."""
    shutil.copytree(base, folder)
    names = ["Transformer", "Pooling", *more]
    paths = ["" if name == "Transformer" else f"{i}_{name}" for i, name in enumerate(names)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    ways = {f"pooling_mode_{name}": name == way for name in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | ways))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": False}))
    return folder


def test_retrieval(tiny_base: Path, filler: Path, tmp_path: Path, score: Command) -> None:
    questions, entries = write_search(tmp_path / "search")
    data = ("--data", questions, "--knowledge", entries)
    found = score("--model", tiny_base, *data)
    expected = compute_mrr(tiny_base, questions)
    assert 0.3 < expected < 1
    assert get_values(found)["mrr"] == pytest.approx(expected, abs=1e-6)
    assert (found["task"], found["max_length"], found["rows"], found["entries"]) == ("retrieval", 64, 40, 4)
    assert list(found["baselines"]) == ["bm25"]
    by_first = copy_as_sentence_encoder(tiny_base, tmp_path / "first", "cls_token", "Normalize")
    other = score("--model", by_first, *data)
    expected_first = compute_mrr(tiny_base, questions, first=True)
    assert abs(expected_first - expected) > 1e-3
    assert get_values(other)["mrr"] == pytest.approx(expected_first, abs=1e-6)
    assert other["max_length"] == 20
    # The same encoder below a head that fills in words: a word-filler, unless its folder or --task says otherwise.
    assert get_values(score("--model", filler, *data, "--task", "retrieval")) == get_values(found)
    by_mean = copy_as_sentence_encoder(filler, tmp_path / "mean", "mean_tokens")
    assert get_values(score("--model", by_mean, *data)) == get_values(found)


@pytest.fixture
def reader(tiny_base: Path, tmp_path: Path) -> Path:
    """A random cross-encoder that tells its two texts apart by their token types."""
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(tiny_base, num_labels=1)
    model = BertForSequenceClassification.from_pretrained(tiny_base, config=config)
    nn.init.normal_(model.bert.embeddings.token_type_embeddings.weight)
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "reader")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "reader")
    return tmp_path / "reader"


def write_library(folder: Path) -> tuple[Path, Path]:
    """30 entries of words, and questions with two words of one of them, behind what was said before."""
    folder.mkdir()
    generator = np.random.default_rng(9)
    words = [word for text in ENTRIES.values() for word in text.split()] + NOUNS + VALUES
    entries = [{"id": f"e{i}", "text": " ".join(generator.choice(words, size=6))} for i in range(30)]
    rows = []
    for i in range(40):
        entry = entries[int(generator.integers(30))]
        asked, said = (" ".join(generator.choice(text, size=2)) for text in (entry["text"].split(), words))
        rows.append({"text": f"{asked} {i}", "entry": entry["id"], "before": said})
    for name, records in (("questions", rows), ("entries", entries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "questions.jsonl", folder / "entries.jsonl"


@torch.no_grad()
def rerank(folder: Path, questions: Path, entries: Path, *, reads_before: bool = False) -> float:
    """MRR where a cross-encoder of transformers orders the 20 entries that share most words with the question."""
    model, tokenizer = (
        BertForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    rows, known = ([json.loads(line) for line in path.read_text().splitlines()] for path in (questions, entries))
    index, found = LexicalIndex([entry["text"] for entry in known]), []
    for row in rows:
        order = np.argsort(-index.compute_scores(row["text"]), kind="stable")[:20].tolist()
        asked = f"{row['before']}\n{row['text']}" if reads_before else row["text"]
        texts = [known[i]["text"] for i in order]
        scores = model(**tokenizer([asked] * 20, texts, padding=True, return_tensors="pt")).logits[:, 0]
        names = [known[order[i]]["id"] for i in scores.argsort(descending=True).tolist()]
        assert row["entry"] in names, "else what is behind them would have to be ordered here, too"
        found.append(1 / (1 + names.index(row["entry"])))
    return float(np.mean(found))


def test_reranking(reader: Path, tmp_path: Path, score: Command, command: Command) -> None:
    questions, entries = write_library(tmp_path / "library")
    data = ("--data", questions, "--knowledge", entries)
    found = score("--model", reader, *data)
    expected = rerank(reader, questions, entries)
    assert 0.1 < expected < 0.9
    assert get_values(found)["mrr"] == pytest.approx(expected, abs=1e-6)
    assert (found["task"], found["max_length"], found["rows"], found["entries"]) == ("reranking", 64, 40, 30)
    assert (found["first_search"], found["candidates"]) == ("bm25", 20)
    assert list(found["baselines"]) == ["bm25"]
    before = score("--model", reader, *data, "--column", "context=before")
    expected_before = rerank(reader, questions, entries, reads_before=True)
    assert abs(expected_before - expected) > 1e-3
    assert get_values(before)["mrr"] == pytest.approx(expected_before, abs=1e-6)
    assert before["baselines"]["bm25"]["settings"] == {"turns": 0}  # no validation to choose more on
    assert get_values(before["baselines"]["bm25"]) == get_values(found["baselines"]["bm25"])
    shown = " ".join(command("evaluate", "--model", reader, *data).out.split())
    assert "scored as reranking, 64 tokens at a time. It read again the first 20 entries that bm25 found." in shown


@pytest.fixture
def completer(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """The random GPT-2 with room for a prompt and 128 tokens behind it."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config.from_pretrained(tiny_gpt2, n_positions=256)).save_pretrained(tmp_path / "completer")
    AutoTokenizer.from_pretrained(tiny_gpt2, model_max_length=256).save_pretrained(tmp_path / "completer")
    return tmp_path / "completer"


def test_completion(completer: Path, tmp_path: Path, score: Command) -> None:
    rows = write_pairs(tmp_path / "pairs.csv", 0, 12)
    prompt = "of {n}: {text} ="
    with rows.open(encoding="utf-8", newline="") as file:
        pairs = [(row["text"], row["target"]) for row in csv.DictReader(file)]
    lines = [{"said": target, "text": text, "n": f"cat {i}"} for i, (text, target) in enumerate(pairs)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--task", "completion", "--prompt", prompt, "--column", "target=said")
    found = score("--model", completer, "--data", data, *options)
    tokenizer, model = AutoTokenizer.from_pretrained(completer), AutoModelForCausalLM.from_pretrained(completer).eval()
    written, nats, count = [], 0.0, 0
    for line in lines:
        # Each part by itself, as what stands in a column must not melt into the words around it.
        parts = ["of ", line["n"], ": ", line["text"], " ="]
        asked = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
        ids = model.generate(torch.tensor([asked]), max_new_tokens=128, do_sample=False)
        written.append(tokenizer.decode(ids[0, len(asked) :], skip_special_tokens=True))
        said = [*tokenizer(line["said"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([[*asked, *said[:-1]]])).logits[0, len(asked) - 1 :]
        nats += float(nn.functional.cross_entropy(logits, torch.tensor(said), reduction="sum"))
        count += len(said)
    assert get_values(found)["loss"] == pytest.approx(nats / count, abs=1e-5)
    assert get_values(found)["perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-5)
    assert len(set(written)) > 5, "else equal scores would say little"
    chrf = sacrebleu.corpus_chrf(written, [[line["said"] for line in lines]]).score
    assert get_values(found)["chrf"] == pytest.approx(chrf, abs=1e-4)
    assert (found["task"], found["max_length"], found["rows"], found["baselines"]) == ("completion", 256, 12, {})
    assert get_values(found) != get_values(score("--model", completer, "--data", data, *options[:2], *options[4:]))


# Models of this toolkit: what their runs say


@pytest.fixture(scope="module")
def search_run(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("search")
    write_search(folder)
    task = {"type": "retrieval", "data": "questions.jsonl", "knowledge": "entries.jsonl", "split": {"leaks": "drop"}}
    recipe = {"recipe": 1, "name": "search", "tasks": {"find": task}}
    return _run(folder, recipe, write_recipe)


@pytest.fixture(scope="module")
def answer_run(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_questions(folder / "questions.csv", 20, seed=7)
    task = {"type": "question_answering", "data": "questions.csv", "columns": COLUMNS, "split": {"leaks": "drop"}}
    return _run(folder, {"recipe": 1, "name": "answers", "tasks": {"ask": task}}, write_recipe)


def _run(folder: Path, recipe: dict[str, Any], write_recipe: Callable[..., Path]) -> Path:
    base = json.loads(json.dumps(_read_model(write_recipe(folder / "model"))))
    recipe |= {"model": base, "train": {"epochs": 2, "learning_rate": 0.01, "precision": "float32"}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"evaluate": {"resamples": 100}}))
    return finetune.run(folder / "recipe.yaml", runs=folder / "runs", quiet=True).folder.path


def _read_model(recipe: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    section: dict[str, Any] = YAML(typ="safe").load(recipe.read_text())["model"]
    return section | {"max_length": 48}


def test_a_search_run_and_its_model(search_run: Path, tmp_path: Path, score: Command) -> None:
    questions, entries = write_search(tmp_path)
    found = score("--model", search_run, "--data", questions, "--knowledge", entries)
    expected = score(search_run, "--data", questions)
    assert get_values(found) == pytest.approx(get_values(expected), abs=1e-6)
    assert get_values(found["baselines"]["bm25"]) == get_values(expected["baselines"]["bm25"])


def test_a_reranker_among_several_tasks(
    write_support_recipe: Callable[..., Path], tmp_path: Path, score: Command
) -> None:
    recipe = write_support_recipe(tmp_path / "in", train={"epochs": 1})
    run = finetune.run(recipe, runs=tmp_path / "runs", quiet=True).folder.path
    rows, entries = tmp_path / "in" / "questions.jsonl", tmp_path / "in" / "faq.jsonl"
    found = score("--model", run, "--data", rows, "--knowledge", entries, "--task", "rerank")
    expected = score(run, "--data", rows, "--task", "rerank")
    assert get_values(found).items() >= get_values(expected).items()
    assert (found["first_search"], found["rows"]) == ("fused", 90)
    assert get_values(found["baselines"]["bm25"])["mrr"] == get_values(expected["baselines"]["bm25"])["mrr"]


def test_a_run_of_answers_its_model_and_its_export(
    answer_run: Path, tmp_path: Path, score: Command, command: Command
) -> None:
    rows = write_questions(tmp_path / "other.csv", 12, seed=3)
    expected = get_values(score(answer_run, "--data", rows))
    options = ("--data", rows, *list_columns(COLUMNS))
    assert get_values(score("--model", answer_run / "model", *options)) == pytest.approx(expected, abs=1e-6)
    assert command("export", answer_run, "--format", "transformers", "--output", tmp_path / "plain").code == 0
    exported = score("--model", tmp_path / "plain", *options)
    assert get_values(exported) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "seq2seq", "completion"])
def test_a_language_run_and_its_model(
    kind: str, write_language_recipe: Callable[..., Path], tmp_path: Path, score: Command
) -> None:
    completes = {"tasks": {"only": {"type": kind, "prompt": "{text}:"}}} if kind == "completion" else {}
    rows_of = "seq2seq" if completes else kind
    recipe = write_language_recipe(tmp_path / "in", rows_of, {"train": {"epochs": 1}}, completes)
    run = finetune.run(recipe, runs=tmp_path / "runs", quiet=True)
    rows = next(path for path in (tmp_path / "in").iterdir() if path.suffix != ".yaml")
    columns = list_columns({"text": "en", "target": "de"}) if rows_of == "seq2seq" else []
    found = score("--model", run.folder.path, "--data", rows, *columns)
    assert get_values(found) == pytest.approx(get_values(score(run.folder.path, "--data", rows)), abs=1e-6)


def test_a_plain_word_filler_and_the_run_that_trained_it(
    tiny_base: Path, write_language_recipe: Callable[..., Path], tmp_path: Path, score: Command
) -> None:
    model = {"base": str(tiny_base), "architecture": "native", "max_length": 64}
    recipe = write_language_recipe(tmp_path / "in", "masked_lm", {"model": model, "train": {"epochs": 2}})
    run = finetune.run(recipe, runs=tmp_path / "runs", quiet=True).folder
    plain = tmp_path / "plain"
    shutil.copytree(run.model, plain, ignore=shutil.ignore_patterns("finetune.json"))
    rows = tmp_path / "in" / "notes.txt"
    found = score("--model", plain, "--data", rows)
    assert found["task"] == "masked_lm"
    assert get_values(found) == pytest.approx(get_values(score(run.path, "--data", rows)), abs=1e-6)


# What does not go together


def test_refusals(
    answerer: Path, filler: Path, tiny_base: Path, tiny_gpt2: Path, tmp_path: Path, command: Command
) -> None:
    rows = write_questions(tmp_path / "rows.csv", 2, seed=0)
    questions, entries = write_search(tmp_path / "search")
    dense = copy_as_sentence_encoder(tiny_base, tmp_path / "dense", "mean_tokens", "Dense")
    widest = copy_as_sentence_encoder(tiny_base, tmp_path / "widest", "max_tokens")
    asked = ("--data", rows, *list_columns(COLUMNS))
    completed = ("--task", "completion", *list_columns({"text": "question", "target": "answer"}))
    for arguments, code, words in (
        (
            (answerer, "--data", questions),
            3,
            f"questions.jsonl: column 'passage' must exist, got columns text, entry. {answerer} is scored as "
            "question_answering, on text, passage, answer: where the data call them otherwise, --column answer=NAME. "
            "For another task train it first: set model.base to it.",
        ),
        (
            (answerer, *asked, "--task", "masked_lm"),
            2,
            f"--task: must be question_answering for {answerer}, a BertForQuestionAnswering, got 'masked_lm'. Leave it "
            "out; to have a model for another task, train it: set model.base to it.",
        ),
        (
            (filler, *asked, "--task", "causal_lm"),
            2,
            f"--task: must be masked_lm or retrieval for {filler}, a BertForMaskedLM, got 'causal_lm'.",
        ),
        (
            (answerer, *asked, "--labels", "a,b"),
            2,
            "--labels: must come with a model for text_classification, got question_answering. Leave it out.",
        ),
        (
            (answerer, *asked, "--knowledge", entries),
            2,
            "--knowledge: must come with a model for retrieval or reranking, got question_answering. Leave it out.",
        ),
        (
            (tiny_gpt2, "--data", questions, "--prompt", "{text}"),
            2,
            "--prompt: must come with a model for completion, got causal_lm. Leave it out. Of a causal language model "
            "--task completion makes one.",
        ),
        (
            (tiny_gpt2, *asked[:2], *completed, "--prompt", "{text"),
            2,
            "--prompt: must name columns in braces, {{ and }} being braces themselves; expected '}' before end of",
        ),
        (
            (tiny_gpt2, *asked[:2], *completed, "--prompt", "{questoin}:"),
            3,
            "--prompt: must find the column 'questoin' in rows:1, got passage, text, target.",
        ),
        (
            (answerer, *asked, "--column", "label=x"),
            2,
            "--column: must be one of text, passage, answer for question_answering, got 'label'.",
        ),
        (
            (tiny_base, "--data", questions),
            2,
            f"--knowledge: must name what {questions} is answered from, got none. Write --knowledge FILE, with id, "
            "text and perhaps title and group of each entry.",
        ),
        (
            (dense, "--data", questions, "--knowledge", entries),
            5,
            f"{dense}: a sentence encoder must pool by the mean, the first or the last token, with nothing behind it, "
            "got Transformer, Pooling, Dense, mean_tokens. Take another one.",
        ),
        ((widest, "--data", questions), 5, "got Transformer, Pooling, max_tokens. Take another one."),
    ):
        outcome = command("evaluate", "--model", *arguments)
        assert outcome.code == code, outcome.err
        assert words in outcome.err


def test_a_class_or_family_that_is_not_scored(
    answerer: Path, tiny_base: Path, tmp_path: Path, command: Command
) -> None:
    questions, entries = write_search(tmp_path / "search")
    for folder, change, words in (
        (answerer, {"architectures": ["BertForNextSentencePrediction"]}, "got BertForNextSentencePrediction. Train it"),
        (
            answerer,
            {"architectures": ["ElectraModel"], "model_type": "electra"},
            "a sentence encoder must be of one of bert, distilbert, gpt2, llama, marian, roberta, got electra.",
        ),
    ):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        outcome = command("evaluate", "--model", folder, "--data", questions, "--knowledge", entries)
        assert outcome.code == 5
        assert words in outcome.err


def test_the_table_says_how_it_was_scored(tiny_gpt2: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "notes.txt").write_text("the dog sees a house today.\n\na cat likes two trees.\n")
    shown = command("evaluate", "--model", tiny_gpt2, "--data", tmp_path / "notes.txt")
    assert shown.code == 0, shown.err
    assert "scored as causal_lm, 64 tokens at a time." in " ".join(shown.out.split())


def test_a_base_that_a_wheel_carries(
    tiny_base: Path, tmp_path: Path, score: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.models import base

    package = tmp_path / "site" / "carried"
    shutil.copytree(tiny_base, package / "model")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(package.parent)
    sha256 = hashlib.sha256((tiny_base / "model.safetensors").read_bytes()).hexdigest()
    wheel = base.Wheel("carried", "carried", "model/model.safetensors", sha256)
    monkeypatch.setitem(base.WHEELS, "acme/carried", wheel)
    questions, entries = write_search(tmp_path / "search")
    found = score("--model", "acme/carried", "--data", questions, "--knowledge", entries)
    assert get_values(found)["mrr"] == pytest.approx(compute_mrr(tiny_base, questions), abs=1e-6)
