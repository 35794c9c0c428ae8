"""`finetune generate`: prompts and files, options, words."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
from finetune.artifact.save import save_model
from finetune.cli import generate as command_module
from finetune.models.language import LANGUAGE_SHAPES
from finetune.models.tokenizer import train_tokenizer
from finetune.models.triad import TriadConfig
from finetune.recipe.schema import GenerateSection
from finetune.tasks import CausalLM, Completion, MaskedLM, Seq2Seq

MAX_LENGTH = 16
ALPHABET = "".join(chr(code) for code in range(32, 127)) + "\n价格上涨"
TASKS = {"causal_lm": CausalLM(separator="\n\n"), "seq2seq": Seq2Seq(clean=("urls",)), "masked_lm": MaskedLM()}
TASKS["completion"] = Completion("{text}|{passage}>")
WRITING = {"causal_lm": {"max_new_tokens": 20}, "seq2seq": {"beams": 3, "max_new_tokens": 6}, "masked_lm": {}}
WRITING["completion"] = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Task type -> the `model/` folder of a run with random weights."""
    from finetune.models import triad

    root = tmp_path_factory.mktemp("models")

    def build(kind: str) -> Path:
        folder = root / kind / "model"
        if folder.exists():
            return folder
        folder.parent.mkdir()
        tokenizer = train_tokenizer([ALPHABET], "characters", 300, MAX_LENGTH, appends_end=kind == "seq2seq")
        shape, model_class = LANGUAGE_SHAPES[kind]
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config = TriadConfig(
            shape=shape,
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_LENGTH,
            pooling="last" if shape == "decoder" else "mean",
            eos_token_id=3,
            decoder_start_token_id=2,
            **sizes,
        )
        torch.manual_seed(1)
        model = getattr(triad, model_class.triad)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        writing = GenerateSection(**WRITING[kind]).model_dump(mode="json")
        settings = {"task": TASKS[kind].to_config(), "temperature": 1.0, "max_length": MAX_LENGTH, "generate": writing}
        save_model(model, tokenizer, folder, settings)
        return folder

    return build


@pytest.fixture(scope="module")
def causal(models) -> Path:
    return models("causal_lm")


@pytest.fixture(scope="module")
def translator(models) -> Path:
    return models("seq2seq")


def write(folder: Path, *texts: str, seed: int = 0, **section: Any) -> list[str]:
    """What Python writes one by one."""
    predictor = finetune.load(folder)
    chosen = GenerateSection(**section) if section else None
    return [predictor.generate([text], chosen, seed=seed)[0] for text in texts]


# Prompts


def test_a_causal_model_goes_on_with_the_prompt(command, causal):
    done = command("generate", causal, "--prompt", "The market 价")
    (written,) = write(causal, "The market 价")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"The market 价{written}\n"
    assert len(written) > 5


def test_several_prompts_stand_apart(command, causal):
    done = command("generate", causal, "--prompt", "One", "--prompt", "Two")
    one, two = write(causal, "One", "Two")
    assert done.out == f"One{one}\n\nTwo{two}\n"


def test_an_answer_comes_without_its_prompt(command, translator):
    done = command("generate", translator, "--prompt", "A dog runs.", "--prompt", "Two men")
    assert done.code == 0
    assert done.out == "".join(f"{text}\n" for text in write(translator, "A dog runs.", "Two men"))


def test_prompts_are_cleaned_as_the_recipe_says(command, translator):
    plain, linked = (
        command("generate", translator, "--prompt", prompt).out for prompt in ("A dog", "A dog https://t.co/abc")
    )
    assert plain == linked


def test_an_empty_prompt_begins_a_text(command, causal):
    done = command("generate", causal, "--prompt", "")
    assert (done.code, done.out) == (0, write(causal, "\n\n")[0] + "\n")


def test_text_comes_as_it_is_written(command, causal, monkeypatch):
    pieces: list[str] = []
    monkeypatch.setattr(command_module, "_show", pieces.append)
    assert command("generate", causal, "--prompt", "The").code == 0
    assert len(pieces) > 10
    assert "".join(pieces) == "The" + write(causal, "The")[0] + "\n"


def test_prompts_speak_json(command, causal, translator):
    for folder, prompts in ((causal, ["One", ""]), (translator, ["A dog runs.", "Two men"])):
        done = command("generate", folder, "--prompt", prompts[0], "--prompt", prompts[1], "--json")
        written = write(folder, *(prompt or "\n\n" for prompt in prompts))
        assert (done.code, done.err) == (0, "")
        assert json.loads(done.out) == [
            {"prompt": prompt, "generated": text} for prompt, text in zip(prompts, written, strict=True)
        ]


def test_ctrl_c_leaves_what_was_written_and_exits_with_75(command, causal, monkeypatch):
    show, pieces = command_module._show, []

    def stop(piece: str) -> None:
        show(piece)
        pieces.append(piece)
        if len(pieces) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(command_module, "_show", stop)
    done = command("generate", causal, "--prompt", "The")
    assert (done.code, done.err) == (75, "finetune: stopped by Ctrl-C.\n")
    assert done.out == "The" + write(causal, "The")[0][:4] + "\n"


# Options


@pytest.mark.parametrize(
    ("options", "section"),
    [
        ([], {"beams": 3, "max_new_tokens": 6}),
        (["--beams", "1"], {"max_new_tokens": 6}),
        (["--max-new-tokens", "3"], {"beams": 3, "max_new_tokens": 3}),
        (["--temperature", "0"], {"max_new_tokens": 6}),
        (["--temperature", "3"], {"temperature": 3.0, "max_new_tokens": 6}),
        (["--temperature", "3", "--top-k", "2"], {"temperature": 3.0, "top_k": 2, "max_new_tokens": 6}),
        (["--temperature", "3", "--beams", "2"], {"temperature": 3.0, "beams": 2, "max_new_tokens": 6}),
    ],
)
def test_options_change_how_the_recipe_writes(command, translator, options, section):
    done = command("generate", translator, "--prompt", "A dog runs.", *options)
    assert done.code == 0
    assert done.out == write(translator, "A dog runs.", **section)[0] + "\n"


def test_the_seed_decides_what_is_sampled(command, causal):
    options = ["--prompt", "The", "--temperature", "2"]
    drawn = [command("generate", causal, *options, "--seed", seed).out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[2] == "The" + write(causal, "The", seed=2, temperature=2.0, max_new_tokens=20)[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], 'generate: must get either --prompt TEXT or --input FILE, got neither. Add --prompt "some text".'),
        (
            ["--prompt", "a", "--input", "a.csv"],
            "generate: must get either --prompt TEXT or --input FILE, got both. Leave one out.",
        ),
        (["--input", "a.csv"], "generate: --input must come with --output, got none. Add --output generated.csv"),
        (["--input", "a.tsv"], "generate: --input must come with --output, got none. Add --output generated.csv"),
        (
            ["--prompt", "a", "--output", "a.csv"],
            "generate: --output must come with --input, got none. Add --input FILE, or leave it out.",
        ),
        (["--prompt", "a", "--beams", "0"], "generate: --beams must be at least 1, got 0."),
        (
            ["--prompt", "a", "--max-new-tokens", "0", "--temperature", "-1"],
            "generate: --max-new-tokens must be at least 1, got 0. --temperature must be above 0, got -1.0.",
        ),
        (
            ["--prompt", "a", "--top-k", "3"],
            "generate: --top-k must come with --temperature, got none. Add --temperature 1.",
        ),
        (["--prompt", "a", "--with", "passage"], "generate: --with must be COLUMN=TEXT, got 'passage'."),
        (
            ["--input", "a.csv", "--output", "b.csv", "--with", "a=b"],
            "generate: --with must come with --prompt, got --input, whose columns are read. Leave it out.",
        ),
        (["--prompt", "a", "--seed", "-1"], "Invalid value for '--seed'"),
    ],
)
def test_a_command_that_cannot_be_meant_exits_with_2(command, causal, arguments, words):
    done = command("generate", causal, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"finetune: {words}")
    if not words.startswith("Invalid"):
        assert done.err == f"finetune: {words}\n"


def test_nothing_cannot_be_answered(command, translator):
    done = command("generate", translator, "--prompt", "")
    assert (done.code, done.out) == (2, "")
    assert done.err == "finetune: generate: --prompt must hold a text to answer, got an empty one.\n"


def test_an_unknown_run(command, tmp_path):
    done = command("generate", tmp_path / "nothing", "--prompt", "a")
    assert done.code == 2
    assert "nothing: must be a finished run, got none." in done.err


# The wrong kind of run


def test_a_classifier_does_not_write(command, finished_run, tmp_path):
    (tmp_path / "a.csv").write_text("text\nx\n")
    for options in (["--prompt", "a"], ["--input", tmp_path / "a.csv", "--output", tmp_path / "b.csv"]):
        done = command("generate", finished_run, *options)
        assert (done.code, done.out) == (2, "")
        assert done.err == (
            "finetune: generate: must get a run that writes text (causal_lm, seq2seq, completion), got "
            "text_classification. Use finetune predict.\n"
        )


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_a_model_that_writes_does_not_classify(command, models, tmp_path, kind):
    (tmp_path / "a.csv").write_text("text\nx\n")
    for options in (["some text"], ["--input", tmp_path / "a.csv", "--output", tmp_path / "b.csv"]):
        done = command("predict", models(kind), *options)
        assert (done.code, done.out) == (2, "")
        assert done.err == (
            f"finetune: predict: must get a run that gives labels, got {kind}. Use finetune generate.\n"
        )
    assert not (tmp_path / "b.csv").exists()


@pytest.mark.parametrize(
    ("verb", "options", "must"),
    [
        ("generate", ["--prompt", "a"], "writes text (causal_lm, seq2seq, completion)"),
        ("predict", ["a <mask>"], "gives labels"),
    ],
)
def test_a_masked_language_model_is_a_base(command, models, verb, options, must):
    done = command(verb, models("masked_lm"), *options)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"finetune: {verb}: must get a run that {must}, got masked_lm. It is a base for other recipes: set model.base "
        "to this run, and train a task on it.\n"
    )


# Files


def test_a_column_is_added_to_a_file(command, causal, tmp_path):
    records = [
        {"id": "007", "text": "The market", "note": "a,b"},
        {"id": "NA", "text": "", "note": ""},
        {"id": "é", "text": "One\nTwo", "note": "null"},
    ]
    rows, out = tmp_path / "rows.csv", tmp_path / "out" / "rows.csv"
    with rows.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    done = command("generate", causal, "--input", rows, "--output", out, "--max-new-tokens", "4")
    assert (done.code, done.out) == (0, f"{out}: 3 rows written.\n")
    assert "generate" in done.err, "the progress bar"
    with out.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    written = write(causal, *(record["text"] for record in records), max_new_tokens=4)
    assert found == [record | {"generated": text} for record, text in zip(records, written, strict=True)]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_of_other_formats_and_another_column(command, translator, tmp_path, ending):
    rows, out = tmp_path / "rows.jsonl", tmp_path / f"out.{ending}"
    records = [{"en": "A dog runs.", "text": 1}, {"en": "Two men", "text": 2}]
    rows.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    done = command("generate", translator, "--input", rows, "--column", "en", "--output", out, "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == {"output": str(out), "rows": 2}
    if ending == "parquet":
        import pyarrow.parquet

        found = pyarrow.parquet.read_table(out).to_pylist()
    else:
        found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    written = write(translator, "A dog runs.", "Two men")
    assert found == [record | {"generated": text} for record, text in zip(records, written, strict=True)]


@pytest.mark.parametrize(
    ("source", "output", "options", "code", "words"),
    [
        ("rows.csv", "rows.csv", [], 2, "rows.csv: must be another file than the input, got the same."),
        ("rows.csv", "out.xlsx", [], 2, "out.xlsx: must end in .csv, .jsonl, .parquet, got '.xlsx'."),
        ("gone.csv", "out.csv", [], 3, "gone.csv: must be a file, got nothing there. Check the name."),
        ("rows.csv", "out.csv", ["--column", "txt"], 3, "rows.csv: column 'txt' must exist, got columns text."),
        ("done.csv", "out.csv", [], 3, "done.csv: generated must be free, got columns of that name. Rename them."),
    ],
)
def test_refusals_touch_nothing(command, causal, tmp_path, monkeypatch, source, output, options, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text\na\n")
    (tmp_path / "done.csv").write_text("text,generated\na,b\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = command("generate", causal, "--input", source, "--output", output, *options)
    assert (done.code, done.out) == (code, "")
    assert words in done.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_prompt_of_several_columns(command, models, tmp_path):
    """As the model goes on with the whole prompt, from the command line and from a file."""
    run = models("completion")
    model = finetune.load(run)
    ids = model.tokenizer("why|so>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    output = model.model.generate(ids, max_length=12, do_sample=False, eos_token_id=3, pad_token_id=0)
    expected = model.tokenizer.decode(output[0, 7:], skip_special_tokens=True)
    done = command("generate", run, "--prompt", "why", "--with", "passage=so", "--json")
    assert json.loads(done.out) == [{"prompt": "why", "generated": expected}]
    assert command("generate", run, "--prompt", "why", "--with", "passage=so").out == f"{expected}\n"
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"text": "why", "passage": "so"}\n')
    assert command("generate", run, "--input", rows, "--output", out).code == 0
    assert json.loads(out.read_text())["generated"] == expected
    refused = command("generate", run, "--prompt", "why")
    assert (refused.code, refused.err) == (
        3,
        "finetune: generate: must find the column 'passage' in row 1, got text. Add --with passage=TEXT.\n",
    )
