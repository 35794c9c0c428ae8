"""What the tests share: no network, one thread, a base of a few thousand weights, and a recipe that trains on it."""

from __future__ import annotations

import os

# Before any library reads them. Sums on a GPU are not repeatable bit for bit: the tests stay on the CPU unless asked.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
HEADLINES = ROOT / "data" / "samples" / "financial_headlines" / "headlines.csv"
KEYWORDS = {
    "negative": ["falls", "loss", "cuts", "warns"],
    "neutral": ["names", "meeting", "schedule", "unchanged"],
    "positive": ["gains", "beats", "raises", "wins"],
}
WORDS = 600
ROWS_PER_CLASS = 30

torch.set_num_threads(1)


def read_headline_words() -> list[str]:
    """The commonest lower-case words of the sample headlines, letters only, no keyword among them."""
    with HEADLINES.open(encoding="utf-8", newline="") as file:
        words = Counter(word for row in csv.DictReader(file) for word in row["text"].lower().split() if word.isalpha())
    keywords = {word for group in KEYWORDS.values() for word in group}
    return [word for word, _ in words.most_common(WORDS) if word.isascii() and word not in keywords]


WITHOUT_TOOLKIT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "finetune":
            raise ImportError("the toolkit is not here")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="session")
def run_without_toolkit() -> Callable[..., Any]:
    """A function (folder, code, *arguments, **environment) -> what the code prints last, read as JSON.

    It runs in a process of its own, in that folder, which cannot import the toolkit.
    """

    def run(folder: Path, code: str, *arguments: str, **environment: str) -> Any:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        done = subprocess.run(
            [sys.executable, "-I", "-c", WITHOUT_TOOLKIT + code, *arguments],
            stdin=subprocess.DEVNULL,  # nobody is there to answer a question
            capture_output=True,
            text=True,
            env=kept | environment,
            cwd=folder,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of 2 layers x 32, random but the same every time, and a WordPiece tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "base"
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    keywords = [word for group in KEYWORDS.values() for word in group]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *keywords])
    vocabulary = list(pieces | dict.fromkeys(read_headline_words()))
    tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(vocabulary)}, model_max_length=64)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    seed_weights(model)
    model.save_pretrained(folder)
    return folder


def seed_weights(model: torch.nn.Module) -> None:
    """Random matrices with which attention averages over the words: in 2 x 32 the usual ones lose the text."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            quiet = any(part in name for part in ("query", "key", "position", "token_type"))
            std = 0.5 if "word_embeddings" in name else 0.02 if quiet else 0.18
            torch.nn.init.normal_(parameter, std=std, generator=generator)


def write_rows(path: Path, rows_per_class: int = ROWS_PER_CLASS) -> Path:
    """A CSV of text and label: headline words in random order, with two keywords that give the class away."""
    generator = np.random.default_rng(7)
    words = np.array(read_headline_words())
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows_per_class):
            for label, keywords in KEYWORDS.items():
                filler = generator.choice(words, size=int(generator.integers(2, 8)), replace=False)
                chosen = generator.choice(keywords, size=2, replace=False)
                writer.writerow([" ".join(generator.permutation([*filler, *chosen])), label])
    return path


def merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries key by key; anything else is replaced."""
    for key, change in changes.items():
        both = isinstance(change, Mapping) and isinstance(values.get(key), dict)
        values[key] = merge(values[key], change) if both else change
    return values


@pytest.fixture(scope="session")
def write_recipe(tiny_base: Path) -> Callable[..., Path]:
    """A function (folder, **changes) -> recipe.yaml, with its rows.csv beside it.

    A change replaces a key of the recipe; a dictionary is merged: `write_recipe(folder, train={"epochs": 1})`.
    """

    def write(folder: Path, **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "rows.csv")
        recipe: dict[str, Any] = {
            "recipe": 1,
            "name": "tiny",
            "model": {"base": str(tiny_base), "max_length": 32},
            "adapter": {"method": "lora", "rank": 8, "alpha": 16},
            "tasks": {
                "tone": {
                    "type": "text_classification",
                    "data": "rows.csv",
                    "labels": list(KEYWORDS),
                }
            },
            "train": {"epochs": 2, "tokens_per_batch": 128, "learning_rate": 0.01, "precision": "float32"},
            "evaluate": {"resamples": 100, "baselines": ["majority"]},
        }
        path = folder / "recipe.yaml"
        yaml = YAML()
        with path.open("w", encoding="utf-8") as file:
            yaml.dump(merge(recipe, changes), file)
        return path

    return write


THINGS = {"returns": "gains", "delivery": "loss", "sizes": "flat"}
"""Entry and intent -> a word of its questions that the tiny tokenizer knows."""


@pytest.fixture(scope="session")
def write_questions() -> Callable[[Path], None]:
    """A function that writes questions.jsonl, their answers (faq.jsonl) and what an assistant says (intents.jsonl)."""

    def write(folder: Path) -> None:
        generator = np.random.default_rng(11)
        words = ["shares", "meeting", "profit", "schedule", "beats", "misses", "names", "report"]
        rows: list[dict[str, str]] = []
        for i in range(90):
            name = list(THINGS)[i % 3]
            text = f"{THINGS[name]} {' '.join(generator.choice(words, size=4))} {i}"
            rows.append({"text": text, "entry": name, "intent": name, "context": "Customer: earlier" if i % 2 else ""})
        rows.append({"text": "nobody knows", "entry": "", "intent": "sizes", "context": ""})
        files: dict[str, list[dict[str, Any]]] = {
            "questions": rows,
            "faq": [
                {"id": name, "title": f"{word} profit", "text": f"{word} meeting"} for name, word in THINGS.items()
            ],
            "intents": [
                {
                    "intent": name,
                    "description": f"ask about {name}",
                    "template": "We return it." if name == "returns" else None,
                    "slots": [],
                }
                for name in THINGS
            ],
        }
        folder.mkdir(parents=True, exist_ok=True)
        for file, records in files.items():
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    return write


@pytest.fixture(scope="session")
def write_support_recipe(write_recipe: Callable[..., Path], write_questions: Callable[[Path], None]) -> Any:
    """A function (folder, **changes) -> a recipe with three tasks of different types on those questions."""
    search = {"data": "questions.jsonl", "knowledge": "faq.jsonl", "negatives": 2, "split": {"leaks": "warn"}}
    tone = {
        "data": "questions.jsonl",
        "columns": {"label": "intent", "context": "context"},
        "labels": list(THINGS),
        "split": {"leaks": "warn"},
    }

    def write(folder: Path, **changes: Any) -> Path:
        write_questions(folder)
        tasks = {
            "tone": tone,
            "answer": {"type": "retrieval", **search, "columns": {"context": "context"}},
            "rerank": {"type": "reranking", **search},
        }
        evaluate = {"baselines": ["majority", "bm25"], "slices": [], "gates": {"mrr": ">= 0.1"}}
        return write_recipe(folder, tasks=tasks, evaluate=evaluate, **changes)

    return write


class Outcome(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process, where torch is loaded already: `command("run", path)`."""
    from finetune.cli.main import main

    def call(*arguments: Any) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def secrets() -> dict[str, str]:
    """What is set in the environment while `finished_run` is made."""
    return {"HF_TOKEN": "hf_0123secret4567", "WANDB_API_KEY": "wandb-0123-secret-4567"}


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[..., Path], secrets: dict[str, str]
) -> Path:
    """The folder of a finished run, only to be read; its recipe is `in/recipe.yaml` beside `runs/`."""
    import finetune

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in secrets.items():
            patch.setenv(name, secret)
        run = finetune.run(write_recipe(folder / "in"), runs=folder / "runs", quiet=True)
    return run.folder.path


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / "tiny" / finished_run.name))


# Every task type that answers in one pass

SEARCH = {"data": "questions.jsonl", "knowledge": "faq.jsonl", "negatives": 2, "split": {"leaks": "warn"}}
SEARCH_EVALUATE = {"evaluate": {"baselines": ["bm25"], "slices": [], "gates": {}}}


def write_passages(path: Path) -> None:
    """Passages that say something about three nouns, and questions about them; of one in four there is no answer."""
    generator = np.random.default_rng(7)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["place", "question", "passage", "answer"])
        for place in range(16):
            nouns = generator.permutation(["loss", "meeting", "schedule", "gains"]).tolist()
            values = generator.permutation(["low", "high", "new", "old"]).tolist()
            said = dict(zip(nouns[:3], values, strict=False))
            passage = " ".join(f"The {noun} is {value} of {place}." for noun, value in said.items())
            writer.writerows((place, f"The {noun}?", passage, said.get(noun, "")) for noun in nouns)


@pytest.fixture(scope="session")
def find_run(
    tmp_path_factory: pytest.TempPathFactory,
    finished_run: Path,
    tiny_base: Path,
    write_recipe: Callable[..., Path],
    write_questions: Callable[[Path], None],
    write_support_recipe: Callable[..., Path],
) -> Callable[[str], Path]:
    """A function: task type -> the folder of a finished run, made when it is first asked for."""
    copied = tmp_path_factory.mktemp("text_classification") / finished_run.name  # it gets exports
    made = {"text_classification": Path(shutil.copytree(finished_run, copied))}

    def write(kind: str, folder: Path) -> Path:
        folder.mkdir()
        if kind == "multi_task":
            return write_support_recipe(folder)
        if kind == "question_answering":
            write_passages(folder / "questions.csv")
            task = {
                "type": kind,
                "data": "questions.csv",
                "columns": {"text": "question", "passage": "passage", "answer": "answer"},
                "split": {"by": "group", "column": "place", "validation": 0.2, "test": 0.2},
            }
            return _write_plain(folder, tiny_base, task, {})
        write_questions(folder)
        return _write_plain(folder, tiny_base, {"type": kind} | SEARCH, SEARCH_EVALUATE)

    def find(kind: str) -> Path:
        import finetune

        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = finetune.run(write(kind, folder / "in"), runs=folder / "runs", quiet=True).folder.path
        return made[kind]

    return find


def _write_plain(folder: Path, base: Path, task: dict[str, Any], changes: dict[str, Any]) -> Path:
    recipe = {
        "recipe": 1,
        "name": "one",
        "model": {"base": str(base), "max_length": 40},
        "adapter": {"method": "lora", "rank": 4},
        "tasks": {"one": task},
        "train": {"epochs": 2, "tokens_per_batch": 300, "learning_rate": 0.01, "precision": "float32"},
    } | changes
    path = folder / "recipe.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(recipe, file)
    return path


SAID = ["gains", "loss falls meeting " * 8, "shares names unchanged schedule beats", "the meeting"]
PASSAGES = [("The loss?", "The loss is new of 3. The gains is old of 3."), ("The gains?", "The meeting is low. " * 9)]


@pytest.fixture(scope="session")
def list_answers() -> Callable[[Any, str], np.ndarray]:
    """A function: a loaded model, its task type -> what it says by all the ways that people use, as one row."""

    def answer(loaded: Any, kind: str) -> list[np.ndarray]:
        if kind == "text_classification":
            return [loaded.compute_logits(loaded.clean(SAID))]
        if kind == "multi_task":
            parts = [loaded["answer"].embed(SAID), loaded["rerank"].score_pairs(SAID[0], SAID)]
            return [*parts, *loaded.compute_logits(SAID).values(), *loaded.read(SAID[1]).values()]
        if kind == "retrieval":
            return [loaded.embed(SAID)]
        if kind == "reranking":
            return [loaded.score_pairs(SAID[0], SAID)]
        said = loaded.answer_all(PASSAGES)
        return [np.array([[-1 if one.start is None else one.start, one.score] for one in said])]

    return lambda loaded, kind: np.concatenate([part.ravel() for part in answer(loaded, kind)])
