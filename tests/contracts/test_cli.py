"""The command line as a contract: verbs, JSON, exit codes, words."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import transformers
import typer

from finetune import fitting, runner
from finetune.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
VERBS = [
    *("run", "check", "resume", "evaluate", "predict", "push", "export", "generate", "chat", "monitor", "compare"),
    *("compress", "sweep", "recommend"),
    *("recipes", "data", "adapters", "schema", "doctor"),
]
COMMANDS = [
    "run",
    "check",
    "resume",
    "evaluate",
    "compare",
    "predict",
    "push",
    "export",
    "compress",
    "generate",
    "chat",
    "monitor",
    "recommend",
    "sweep",
    "recipes list",
    "recipes show",
    "recipes copy",
    "data list",
    "data show",
    "data audit",
    "adapters list",
    "adapters merge",
    "schema",
    "doctor",
]


LINEAR = 6 * (4 * 384 * 384 + 2 * 384 * 1536)


def find_commands() -> dict[str, object]:
    """Words -> command, for everything that the application can be asked."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        children = getattr(command, "commands", None)
        found |= {f"{name} {child}": leaf for child, leaf in children.items()} if children else {name: command}
    return found


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Help


def test_every_command_is_known_here():
    assert sorted(find_commands()) == sorted(COMMANDS)


def test_help_lists_the_verbs_that_exist_and_no_other(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = command("--help")
    assert done.code == 0
    listed = done.out[done.out.index("Commands") :]
    assert sorted(re.findall(r"^│ ([a-z]+) ", listed, re.MULTILINE)) == sorted(VERBS)


@pytest.mark.parametrize("words", COMMANDS)
def test_help_lists_the_options_that_exist_and_no_other(command, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "200")
    done = command(*words.split(), "--help")
    parameters = find_commands()[words].params
    declared = {name for one in parameters for name in (*one.opts, *one.secondary_opts) if name[0] == "-"}
    assert (done.code, done.err) == (0, "")
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", done.out)) == declared | {"--help"}
    assert "--json" in declared


def test_version(command):
    done = command("--version")
    assert (done.code, done.out, done.err) == (0, f"finetune {importlib.metadata.version('finetune-toolkit')}\n", "")


def test_shipped_sweeps_are_listed(command):
    listed = json.loads(command("recipes", "list", "--json").out)
    assert [one["name"] for one in listed if one["kind"] == "sweep"] == ["sweep_sentiment"]
    assert "finetune sweep NAME" in command("recipes", "list").out


def test_no_text_speaks_of_a_verb_that_does_not_exist():
    texts = [*ROOT.glob("finetune/**/*.py"), *ROOT.glob("finetune/**/*.j2"), *ROOT.glob("recipes/**/*.yaml")]
    named = {
        (path.name, verb)
        for path in texts
        for verb in re.findall(r"(?:`|: )finetune ([a-z]+)\b", path.read_text(encoding="utf-8"))
    }
    assert {verb for _, verb in named} > {"run", "resume"}
    assert {(name, verb) for name, verb in named if verb not in VERBS} == set()


def test_help_imports_no_heavy_library():
    code = (
        "import sys\nfrom finetune.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pydantic', 'numpy', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Exit codes and words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ""),
        (["recipes"], ""),
        (["--nonsense"], "finetune: No such option: --nonsense. See finetune --help."),
        (["runn"], "finetune: No such command 'runn'. Did you mean 'run'? See finetune --help."),
        (["teach"], "finetune: No such command 'teach'. See finetune --help."),
        (["run"], "finetune: Missing argument 'RECIPE'. See finetune run --help."),
        (["data", "show", "a", "b"], "finetune: Got unexpected extra argument(s) (b). See finetune data show --help."),
        (
            ["run", "sentiment", "--processes", "0"],
            "Invalid value for '--processes': Input should be greater than or equal to 1. See",
        ),
        (["check", "sentimnt"], "must be a file or the name of a shipped recipe. Did you mean 'sentiment'?"),
        (["check", "sentiment", "--set", "train.epochs"], "must have the form key=value, such as train.epochs=1"),
        (["predict", "x"], "predict: must get either texts or --input FILE, got neither."),
        (["predict", "x", "text", "--input", "a.csv"], "predict: must get either texts or --input FILE, got both."),
        (["predict", "x", "--input", "a.csv"], "--input must come with --output, got none. Add --output scored.csv"),
        (["predict", "x", "--input", "a.tsv"], "--input must come with --output, got none. Add --output scored.csv"),
        (["predict", "x", "--input", "a.txt"], "--input must come with --output, got none. Add --output scored.csv"),
        (["predict", "x", "--input", "a.csv.gz"], "--input must come with --output, got none. Add --output scored.csv"),
        (["predict", "x", "--input", "a.jsonl.gz"], "got none. Add --output scored.jsonl"),
        (["predict", "x", "--input", "a.b.parquet"], "got none. Add --output scored.parquet"),
    ],
)
def test_a_command_that_cannot_be_meant_exits_with_2(command, arguments, words):
    done = command(*arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert "a bug" not in done.err
    # Without anything to do, the help is the answer.
    assert ("Usage: finetune" in done.out) == (words == "")


def test_a_recipe_with_mistakes_exits_with_2_and_names_them_all(command, write_recipe, tmp_path):
    path = write_recipe(tmp_path, train={"epochs": 0, "lerning_rate": 1})
    done = command("run", path, "--runs", tmp_path / "runs")
    assert done.code == 2
    assert done.err.startswith(f"finetune: {path}: 2 problems\n")
    assert "train.epochs: must be at least 1, got 0." in done.err
    assert "train.lerning_rate: unknown key. Did you mean 'learning_rate'?" in done.err
    assert re.search(r"line \d+ +train\.epochs", done.err)


def test_bad_rows_exit_with_3(command, write_recipe, tmp_path):
    done = command("check", write_recipe(tmp_path, tasks={"tone": {"data": "gone.csv"}}))
    assert done.code == 3
    assert "data: must be a card, a file, a folder or hub:org/name@revision, got 'gone.csv'" in done.err


def test_a_missed_gate_exits_with_4_after_everything_was_written(command, write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", evaluate={"gates": {"accuracy": "> 1", "macro_f1": ">= 0"}})
    done = command("run", path, "--runs", tmp_path / "runs", "--json")
    assert done.code == 4
    assert "evaluate.gates: 1 of 2 missed on test\n  accuracy: must be > 1, got " in done.err
    assert json.loads(done.out) == {"error": done.err.removeprefix("finetune: ").rstrip("\n"), "exit_code": 4}
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    gates = json.loads((folder / "evaluation" / "test.json").read_text())["gates"]
    assert {name: gate["passed"] for name, gate in gates.items()} == {"accuracy": False, "macro_f1": True}
    assert (folder / "evaluation" / "report.html").stat().st_size > 1000
    assert (folder / "MODEL_CARD.md").exists()
    assert command("predict", folder, "shares fall").code == 0
    (folder / "status.json").write_text((folder / "status.json").read_text().replace('"finished"', '"trained"'))
    shown = command("resume", folder)
    assert shown.code == 4
    assert "test: 18 rows, 95% bootstrap intervals" in shown.out
    assert re.search(r"^model +0\.\d{3} \(0\.\d{3} to [01]\.\d{3}\)", shown.out, re.MULTILINE)
    assert "evaluate.gates: 1 of 2 missed on test\n  accuracy: must be > 1, got " in shown.err


def test_missing_resources_exit_with_5(command, write_recipe, tmp_path):
    done = command("check", write_recipe(tmp_path, model={"base": str(tmp_path)}))
    assert done.code == 5
    assert "must hold config.json and model.safetensors, got no config.json" in done.err


def test_a_bug_exits_with_70_and_says_what_to_do(command, monkeypatch):
    monkeypatch.setattr(runner, "check", lambda *_: 1 / 0)
    done = command("check", "sentiment")
    assert done.code == 70
    assert done.err == (
        "finetune: a bug: ZeroDivisionError: division by zero. Run again with --debug and report what it prints.\n"
    )
    assert "Traceback" in command("check", "sentiment", "--debug").err


@pytest.mark.parametrize("verb", ["check", "evaluate"])
def test_ctrl_c_exits_with_75(command, monkeypatch, verb):
    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, verb, stop)
    done = command(verb, "sentiment")
    assert (done.code, done.out) == (75, "")
    assert done.err == "finetune: stopped by Ctrl-C.\n"


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
@pytest.mark.parametrize("phase", [(fitting, "fit"), (runner, "assess")], ids=["fit", "assess"])
def test_a_stopped_run_says_what_stopped_it_and_how_to_go_on(
    command, monkeypatch, write_recipe, tmp_path, number, name, phase
):
    monkeypatch.setattr(*phase, lambda *_arguments, **_options: signal.raise_signal(number))
    done = command("run", write_recipe(tmp_path / "in"), "--runs", tmp_path / "runs")
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    assert done.code == 75
    assert done.err.endswith(f"finetune: stopped by {name}. Go on with: finetune resume {folder}\n")
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["error"]) == ("stopped", f"stopped by {name}")
    monkeypatch.undo()
    assert command("resume", folder).code == 0


@pytest.mark.parametrize("arguments", [["--debug", "check", "nowhere"], ["check", "nowhere", "--debug"]])
def test_a_traceback_comes_with_debug_only(command, arguments):
    asked, plain = command(*arguments), command("check", "nowhere")
    assert asked.code == plain.code == 2
    assert "Traceback" in asked.err
    assert "RecipeError" in asked.err
    assert "Traceback" not in plain.out + plain.err


# JSON


def test_run_speaks_json(command, write_recipe, tmp_path):
    done = command("run", write_recipe(tmp_path / "in"), "--runs", tmp_path / "runs", "--json")
    assert done.code == 0
    content = json.loads(done.out)
    assert content.keys() == {"run", "report", "test"}
    assert Path(content["report"]).is_file()
    assert content["test"] == json.loads((Path(content["run"]) / "evaluation" / "test.json").read_text())


def test_resume_and_evaluate_speak_json(command, own_run):
    status = json.loads((own_run / "status.json").read_text())
    (own_run / "status.json").write_text(json.dumps(status | {"state": "trained"}))
    resumed = command("resume", own_run, "--json")
    assert resumed.code == 0
    assert json.loads(resumed.out)["run"] == str(own_run)
    evaluated = command("evaluate", own_run, "--json")
    assert evaluated.code == 0
    assert json.loads(evaluated.out)["metrics"] == json.loads(resumed.out)["test"]["metrics"]


def test_predict_speaks_json(command, finished_run, tmp_path):
    done = command("predict", finished_run, "shares fall", "profit [rises] 4 %", "--json")
    assert done.code == 0
    content = json.loads(done.out)
    assert [one["text"] for one in content] == ["shares fall", "profit [rises] 4 %"]
    assert content[0].keys() == {"text", "label", "confidence", "scores", "outside"}
    assert content[0]["confidence"] == content[0]["scores"][content[0]["label"]] == max(content[0]["scores"].values())
    (tmp_path / "a.csv").write_text("text\nx\n")
    done = command("predict", finished_run, "--input", tmp_path / "a.csv", "--output", tmp_path / "b.csv", "--json")
    assert json.loads(done.out) == {"output": str(tmp_path / "b.csv"), "rows": 1}


def test_check_speaks_json(command, write_recipe, tmp_path):
    done = command("check", write_recipe(tmp_path), "--json", "--set", "train.epochs=3")
    assert done.code == 0
    plan = json.loads(done.out)
    (task,) = plan["tasks"].values()
    assert {name: split["rows"] for name, split in task["splits"].items()} == {"train": 63, "validation": 9, "test": 18}
    assert task["labels"] == ["negative", "neutral", "positive"]
    assert task["classes"] == {"negative": 30, "neutral": 30, "positive": 30}
    assert 0 < plan["parameters"]["trained"] < plan["parameters"]["total"]
    assert plan["steps"] % 3 == 0


def test_check_shortens_the_list_of_many_classes(command, write_recipe, tmp_path):
    path = write_recipe(tmp_path, tasks={"tone": {"labels": None}})
    rows = [f"headline {i} of {name},class {name}\n" for name in range(14) for i in range(40 - name)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(rows))
    done = command("check", path)
    largest = ", ".join(f"class {name} {40 - name}" for name in range(11))
    assert f"\nclasses  14: {largest}, ..., class 13 27\n" in done.out


@pytest.mark.parametrize("words", ["check nowhere", "data show nothing", "predict nowhere text", "run"])
def test_errors_speak_json_too(command, words):
    done = command(*words.split(), "--json")
    content = json.loads(done.out)
    assert content.keys() == {"error", "exit_code"}
    assert content["exit_code"] == done.code != 0
    assert done.err == f"finetune: {content['error']}\n"


# One verb after another


def test_one_row_is_scored_without_intervals(command, own_run, tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("text,label\nprofit beats,positive\n")
    done = command("evaluate", own_run, "--data", path)
    assert done.code == 0
    assert "one: 1 row, no intervals" in done.out
    assert re.search(r"^model +[01]\.000 +[01]\.000 +0\.\d{3}$", done.out, re.MULTILINE)
    assert "  warning  One row shows nothing of chance. Score more rows.\n" in done.out
    assert " to " not in done.out
    scored = json.loads(command("evaluate", own_run, "--data", path, "--json").out)
    assert {(value["low"], value["high"]) for value in scored["metrics"].values()} == {(None, None)}


def test_other_rows_may_call_their_columns_otherwise(command, own_run, tmp_path):
    rows = "profit beats,positive\nshares fall,negative\nthe board meets,neutral\n"
    same, other = tmp_path / "same.csv", tmp_path / "other.csv"
    same.write_text(f"text,label\n{rows}")
    other.write_text(f"message,team\n{rows}")
    named = ("--column", "text=message", "--column", "label=team")
    expected = json.loads(command("evaluate", own_run, "--data", same, "--json").out)["metrics"]
    assert json.loads(command("evaluate", own_run, "--data", other, *named, "--json").out)["metrics"] == expected


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (
            ["--data", "{rows}"],
            3,
            "column 'text' must exist, got columns message, team. Say what the set calls it: --column ROLE=NAME.",
        ),
        (
            ["--data", "{rows}", "--column", "lable=team"],
            2,
            "--column: must be one of text, label, context for text_cl",
        ),
        (["--column", "text=message"], 2, "--column must come with --data, whose columns it names, got none. Leave it"),
        (
            ["--data", "{rows}", "--column", "message"],
            2,
            "--column: must have the form ROLE=NAME, such as label=intent",
        ),
    ],
)
def test_columns_of_other_rows_that_cannot_be_meant(command, own_run, tmp_path, options, code, words):
    path = tmp_path / "rows.csv"
    path.write_text("message,team\nprofit beats,positive\nshares fall,negative\n")
    done = command("evaluate", own_run, *(option.format(rows=path) for option in options))
    assert done.code == code
    assert words in done.err


def test_run_shows_scores_beside_baselines_and_where_things_lie(command, write_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    done = command("run", write_recipe(tmp_path / "in"))
    assert done.code == 0
    assert re.search(r"[\d,]+ of [\d,]+ parameters are trained \(\d+\.\d\d%\)", done.err)
    assert "test: 18 rows, 95% bootstrap intervals" in done.out
    for name in ("model", "majority"):
        assert re.search(rf"^{name} +0\.\d{{3}} \(0\.\d{{3}} to [01]\.\d{{3}}\)", done.out, re.MULTILINE)
    assert 'predict finetune predict runs/tiny "some text"' in done.out
    predicted = command("predict", "runs/tiny", "shares fall")
    assert predicted.code == 0
    assert re.search(r"^(negative|neutral|positive) +\d+\.\d% +shares fall$", predicted.out, re.MULTILINE)


def test_a_second_look_at_the_test_split_is_said(command, own_run):
    done = command("evaluate", own_run)
    assert done.code == 0
    assert "The test split has been opened 2 times: do not choose between models by this score." in done.out


def test_check_loads_no_weights_and_writes_nothing(command, write_recipe, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise AssertionError("weights were opened")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)
    monkeypatch.setattr(safetensors, "safe_open", fail)
    monkeypatch.setattr(safetensors.torch, "load_file", fail)
    monkeypatch.setattr(torch, "load", fail)
    path = write_recipe(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    before = read_files(tmp_path)
    done = command("check", path)
    assert (done.code, done.err) == (0, "")
    assert f"{path}: good." in done.out
    assert "\nclasses  3: negative 30, neutral 30, positive 30\n" in done.out
    assert re.search(r"[\d,]+ of [\d,]+ parameters would be trained .* in about \d+ steps", done.out)
    assert read_files(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "more"),
    [
        ({"train": {"ema_decay": 0.99}}, lambda trained: 4 * trained),
        ({"train": {"precision": "bf16"}}, lambda _trained: 2 * LINEAR),
        ({"model": {"quantize": "int8"}}, lambda _trained: -3 * LINEAR),
    ],
)
def test_check_tells_the_memory_of_what_is_held(write_recipe, tmp_path, given, more):
    """MiniLM: six layers of width 384 and 1536, and what is trained as `check` counts it."""
    if "quantize" in given.get("model", {}):
        pytest.importorskip("torchao")
    model = {"base": "sentence-transformers/all-MiniLM-L6-v2", "pooling": "mean"}
    train = {"ema_decay": None, "precision": "float32"}
    plain = runner.check(write_recipe(tmp_path / "plain", model=model, train=train))
    changed = {"model": model | given.get("model", {}), "train": train | given.get("train", {})}
    found = runner.check(write_recipe(tmp_path / "given", **{**given, **changed}))
    expected = more(plain["parameters"]["trained"]) / 2**20
    assert found["memory_mb"] - plain["memory_mb"] == pytest.approx(expected, abs=3)


def test_check_shows_findings(command, write_recipe, tmp_path):
    path = write_recipe(tmp_path)
    rows = tmp_path / "rows.csv"
    rows.write_text(rows.read_text() + "many " + "words " * 60 + ",neutral\n")
    done = command("check", path)
    assert done.code == 0
    assert re.search(r"(note|warning) +\w+: 1 row of \d+ \(\d+\.\d%\) must be cut to 32 tokens\.", done.out)


def test_sigterm_before_training_exits_with_75(command, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *_arguments, **_options: os.kill(os.getpid(), signal.SIGTERM))
    done = command("run", "sentiment")
    assert (done.code, done.err) == (75, "finetune: stopped by SIGTERM.\n")
