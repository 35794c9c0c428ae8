"""`finetune push` against a Hub that speaks the client's protocol: what goes up, and what happens when it fails."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

FILES = {
    *("README.md", "recipe.yaml", "recipe.resolved.yaml", "run.lock", "finetune.json", "config.json"),
    *("adapter_config.json", "adapter_model.safetensors", "configuration_triad.py", "modeling_triad.py"),
    *("tokenizer.json", "tokenizer_config.json"),
}
NAME = "acme/tone"
Command = Callable[..., Any]


def read_all(folder: Path) -> dict[str, str]:
    """Path -> checksum of everything in a run."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# What goes up


def test_a_push_is_one_commit_with_all_that_a_reader_needs(
    hub: Any, waits: list[float], run: Path, command: Command
) -> None:
    done = command("push", run, NAME, "--json")
    assert done.code == 0, done.err
    repo = hub.repos["model", NAME]
    assert repo.private
    assert len(repo.commits) == 2  # the Hub's own, and ours
    assert set(repo.files) == FILES | {".gitattributes"}
    for name in ("adapter_model.safetensors", "modeling_triad.py", "finetune.json"):
        assert repo.files[name] == (run / "model" / name).read_bytes()
    said, receipt = json.loads(done.out), json.loads((run / "push.json").read_text())
    assert said["oid"] == receipt["oid"] == repo.head
    assert receipt["commit_url"] == f"{hub.url}/{NAME}/commit/{repo.head}"
    assert receipt["repo"] == NAME

    card = ModelCard(repo.files["README.md"].decode())
    test = json.loads((run / "evaluation" / "test.json").read_text())
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {name: score["value"] for name, score in test["metrics"].items()}
    assert card.data.base_model == "acme/tiny-base"
    assert f'PeftModel.from_pretrained(base, "{NAME}")' in card.text
    assert f'finetune.load("{NAME}")' in card.text
    assert "- The licence of rows.csv is not known: who passes on the model must know it." in card.text
    assert f"`finetune evaluate --model {NAME} --data FILE`" in card.text


def test_a_second_push_sends_nothing_and_makes_no_commit(
    hub: Any, waits: list[float], run: Path, command: Command
) -> None:
    command("push", run, NAME)
    uploads, commits = hub.count("PUT"), len(hub.repos["model", NAME].commits)
    again = command("push", run, NAME)
    assert again.code == 0
    assert "Nothing had changed since" in again.out
    assert (hub.count("PUT"), len(hub.repos["model", NAME].commits)) == (uploads, commits)


def test_a_recommenders_catalogue_is_said_to_go_along(run: Path, command: Command, tmp_path: Path) -> None:
    path = run / "model" / "finetune.json"
    task = {"type": "recommendation", "items": ["7", "8"], "texts": ["Tea", "Cup"], "columns": {"price": [1.0, 2.0]}}
    task |= {"counts": [1, 1], "recommend": {}, "rank": None, "by_moment": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task": task}))
    done = command("push", run, NAME, "--dry-run")
    assert done.code == 0, done.err
    words = (
        "The catalogue of 2 items is part of the model (ids, texts, price), and so is how often each was had and which "
        "were had together; no person's history is."
    )
    assert f"  warning: {words}\n" in done.out


def test_a_dry_run_tells_all_and_needs_no_token(
    hub: Any, waits: list[float], run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = read_all(run)
    done = command("push", run, NAME, "--dry-run", "--public", "--json")
    said = json.loads(done.out)
    assert done.code == 0
    assert {file["path"] for file in said["files"]} == FILES
    assert {file["path"]: file["bytes"] for file in said["files"]}["config.json"] > 100
    assert (said["private"], said["weights"]) == (False, "adapter")
    assert said["warnings"] == ["The licence of rows.csv is not known: who passes on the model must know it."]
    assert hub.requests == []
    assert read_all(run) == before


def test_merged_weights_take_the_place_of_an_adapter_in_one_commit(
    hub: Any, waits: list[float], own_run: Path, run: Path, command: Command
) -> None:
    command("push", run, NAME)
    repo = hub.repos["model", NAME]
    done = command("push", own_run, NAME, "--merge")
    assert done.code == 0, done.err
    assert len(repo.commits) == 3
    assert "model.safetensors" in repo.files
    # PEFT's config beside whole weights would put the adapter on top of them once more.
    assert not {"adapter_config.json", "adapter_model.safetensors"} & set(repo.files)
    card = repo.files["README.md"].decode()
    assert "and its updates are merged into the base's weights" in card
    assert f'AutoModelForSequenceClassification.from_pretrained("{NAME}", trust_remote_code=True)' in card
    assert b"/base" not in repo.files["recipe.yaml"]
    assert b"base: base\n" in repo.files["recipe.yaml"]


def test_a_folder_of_this_machine_is_no_base_of_the_hub(
    hub: Any, waits: list[float], own_run: Path, tiny_base: Path, command: Command, rebase: Callable[..., None]
) -> None:
    """Named as the Hub names models, and pushed from another folder than it was trained in."""
    rebase(own_run, str(tiny_base), "models/in-house", origin="local folder")
    words = "adapter_config.json: its base must be on the Hub, got a folder of this machine, models/in-house."
    refuse(hub, command("push", own_run, NAME), 2, words)


def test_what_is_said_of_a_folder_is_its_name(
    hub: Any, waits: list[float], own_run: Path, tiny_base: Path, command: Command
) -> None:
    path = own_run / "recipe.resolved.yaml"
    path.write_text(path.read_text().replace("description: ''", f"description: On {tiny_base}"))
    refuse(
        hub,
        command("push", own_run, NAME, "--merge"),
        2,
        f"recipe.resolved.yaml, line 3: must hold no path of this machine, got {tiny_base}.",
    )
    path.write_text(path.read_text().replace(f"On {tiny_base}", "On our base, and/or /more"))
    assert command("push", own_run, NAME, "--merge").code == 0
    files = hub.repos["model", NAME].files
    assert not [name for name, content in files.items() if str(tiny_base).encode() in content]
    assert b"On our base, and/or /more" in files["recipe.resolved.yaml"]


def test_both_puts_the_adapter_into_a_folder_of_its_own(
    hub: Any, waits: list[float], run: Path, tiny_base: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.models import base

    monkeypatch.setattr(base, "find_base", lambda reference: base.BaseModel(reference, tiny_base, "Hub cache"))
    assert command("push", run, NAME, "--both").code == 0
    files = hub.repos["model", NAME].files
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(files)
    assert "The adapter alone lies in `adapter/`." in files["README.md"].decode()


def test_the_recipe_says_where_to_and_who_may_see_it(hub: Any, waits: list[float], run: Path, command: Command) -> None:
    path = run / "recipe.resolved.yaml"
    text = path.read_text()
    assert "repo: null" in text
    path.write_text(text.replace("repo: null", "repo: ann/mine").replace("private: true", "private: false"))
    assert command("push", run).code == 0
    assert not hub.repos["model", "ann/mine"].private


# What is refused before anything goes up


def refuse(hub: Any, outcome: Any, code: int, *words: str) -> None:
    """Nothing was made or sent, and the message has these words."""
    assert outcome.code == code, outcome.err
    for part in words:
        assert part in outcome.err
    assert hub.count("^(PUT|POST)") == 0


def test_all_problems_come_at_once(
    hub: Any, waits: list[float], own_run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (own_run / "model" / "rows.csv").write_text("text,label\n")
    (own_run / "model" / "optimizer.pt").write_bytes(b"anything")
    (own_run / "model" / "notes.bak").write_bytes(b"\x80\x04\x95" + bytes(20))
    (own_run / "model" / "notes.txt").write_text("one\ntwo hf_" + "a1" * 17 + "\n")
    (own_run / "model" / "more.txt").write_text(f"see {own_run}/events.jsonl")
    refuse(
        hub,
        command("push", own_run, "acme/to..ne"),
        2,
        "must be fit to be published, got 8 problems",
        "'acme/to..ne': must be a name that the Hub takes, got one that it does not: Cannot have -- or ..",
        "adapter_config.json: its base must be on the Hub, got a folder of this machine",
        "Add --merge, or train on a base that others can load.",
        "rows.csv: must be no data, which a push leaves at home.",
        "optimizer.pt: must be no pickle, which can run code when it is opened.",
        "notes.bak: must be no pickle",
        "notes.txt, line 2: must hold no secret, got a Hugging Face token. Take it out, and make a new one",
        "token: must be there to push, got none.",
        f"more.txt, line 1: must hold no path of this machine, got {own_run}/events.jsonl. Write a relative path",
    )


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        (None, NAME, "token: must be there to push, got none. Make one that may write at"),
        ("stranger", NAME, "token: must be valid, got one that the Hub does not know (401). Make a new one at"),
        ("reader", NAME, "token: must be allowed to write, got one that may only read. Make another at"),
        ("narrow", NAME, "token: must be allowed to write to acme, got one that may not. Change its rights at"),
        (
            "writer",
            "bob/tone",
            "bob/tone: must belong to whoever the token belongs to, which is ann and acme, museum. Choose one of them.",
        ),
        ("writer", "museum/tone", "must belong to who lets ann write, got museum, where they may only read."),
        ("writer", "tone", "'tone': must be owner/name, got no owner. Write your user name or an organization"),
        ("writer", "acme/rows", "acme/rows: must be a free name or a model, got a dataset. Choose another name."),
        (
            "writer",
            "acme/theirs",
            "acme/theirs: must be new, empty or pushed by this toolkit, got a model of another origin "
            "(model.safetensors). Choose another name.",
        ),
        (
            "writer",
            "acme/open",
            "acme/open: must be private, got a public repository. Make it private on the Hub, or add --public.",
        ),
    ],
)
def test_who_may_not_write_there_is_told_why(
    hub: Any,
    waits: list[float],
    run: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    name: str,
    words: str,
) -> None:
    hub.create("acme/rows", "dataset")
    hub.create("acme/theirs", private=True, files={"model.safetensors": b"theirs"})
    hub.create("acme/open")
    if token:
        monkeypatch.setenv("HF_TOKEN", getattr(hub, token))
    else:
        monkeypatch.delenv("HF_TOKEN")
    outcome = command("push", run, name)
    refuse(hub, outcome, outcome.code, words)
    assert outcome.code in (2, 5)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "tiny.Q4_1.gguf", "onnx/model.onnx", "vocab.txt"])
def test_a_model_of_another_origin_stays_as_it_is(
    hub: Any, waits: list[float], run: Path, command: Command, file: str
) -> None:
    repo = hub.create("acme/theirs", private=True, files={"README.md": b"# Theirs", file: b"theirs"})
    refuse(hub, command("push", run, "acme/theirs"), 2, f"got a model of another origin ({file}). Choose another name.")
    assert len(repo.commits) == 1


def test_a_repository_that_its_page_made_is_empty(hub: Any, waits: list[float], run: Path, command: Command) -> None:
    hub.create("acme/new", private=True, files={"README.md": b"---\nlicense: mit\n---\n"})
    assert command("push", run, "acme/new").code == 0


def test_a_narrow_token_may_push_where_it_may_write(
    hub: Any, waits: list[float], run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.narrow)
    assert command("push", run, "acme/narrow").code == 0


def test_offline_mode_is_named(hub: Any, run: Path, command: Command) -> None:
    refuse(hub, command("push", run, NAME), 5, "HF_HUB_OFFLINE: must be unset to push, got offline mode.")


def test_a_run_without_a_name_to_go_to(hub: Any, waits: list[float], run: Path, command: Command) -> None:
    refuse(hub, command("push", run), 2, "push: must know where to, got no name and no hub.repo in the recipe.")


def test_a_run_that_did_not_finish(hub: Any, waits: list[float], run: Path, command: Command) -> None:
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
    refuse(hub, command("push", run, NAME), 2, "must be a finished run, got one that is stopped. Try: finetune resume")


def test_a_missed_gate_needs_force_and_stands_in_the_card(
    hub: Any, waits: list[float], run: Path, command: Command
) -> None:
    path = run / "evaluation" / "test.json"
    gate = {"macro_f1": {"condition": ">= 0.99", "value": 0.7, "passed": False}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gates": gate}))
    words = "macro_f1: must be >= 0.99, got 0.7"
    refuse(hub, command("push", run, NAME), 4, f"evaluate.gates: must be passed, got {words}.", "or add --force")
    assert command("push", run, NAME, "--force").code == 0
    card = hub.repos["model", NAME].files["README.md"].decode()
    assert f"**It misses what its recipe asks of it, and was published all the same: {words}.**" in card
    assert "\n\n\n" not in card
    assert json.loads((run / "push.json").read_text())["missed_gates"] == [words]


# What fails on the way


def fail(hub: Any, run: Path, command: Command, words: str) -> None:
    """A push that fails leaves the run as it was and says how to repeat it, which then goes through."""
    before = read_all(run)
    failed = command("push", run, NAME)
    assert failed.code == 5
    assert words in failed.err
    assert f"  finetune push {run} {NAME} --private\n" in failed.err
    assert read_all(run) == before
    hub.faults.clear()
    assert command("push", run, NAME).code == 0
    assert set(hub.repos["model", NAME].files) == FILES | {".gitattributes"}


@pytest.mark.parametrize(
    ("page", "how", "words"),
    [
        ("/commit/", {"status": 401}, "the token is not valid (401)"),
        ("/create", {"status": 403, "message": "not you"}, "the token may not do that (403): not you"),
        ("/create", {"status": 409}, "somebody else is changing it, or has taken its name (409)"),
        (
            "/commit/",
            {"status": 429, "headers": {"Retry-After": "30"}},
            "too many requests (429); it asks to wait 30 s",
        ),
        ("/commit/", {"status": 500}, "the Hub failed (500)"),
        ("/batch", {"status": 500, "times": 99}, "the Hub failed (500)"),
        ("/commit/", {"status": 418}, "the Hub refused (418)"),
    ],
)
def test_an_answer_that_is_no(
    hub: Any, waits: list[float], run: Path, command: Command, page: str, how: dict[str, Any], words: str
) -> None:
    hub.fail("POST", page, **how)
    fail(hub, run, command, words)


def test_the_hub_cannot_be_looked_up(hub: Any, waits: list[float], run: Path, command: Command) -> None:
    hub.fail("GET", "whoami", status=503)
    refuse(hub, command("push", run, NAME), 5, f"{NAME}: must be looked up on the Hub, got this: the Hub failed (503).")


def test_a_connection_cut_in_the_middle_of_a_file(hub: Any, waits: list[float], run: Path, command: Command) -> None:
    hub.fail("PUT", "/upload/", is_cut=True, times=99)
    fail(hub, run, command, "a connection that broke (")


def test_what_breaks_once_is_tried_again(hub: Any, waits: list[float], run: Path, command: Command) -> None:
    hub.fail("PUT", "/upload/", is_cut=True)
    hub.fail("POST", "/preupload/", status=429, headers={"Retry-After": "7"})
    assert command("push", run, NAME).code == 0
    assert waits == [8.0, 1.0]  # what the Hub asked for, and one more second; then the client's own first wait
    weights = (run / "model" / "adapter_model.safetensors").read_bytes()
    assert hub.repos["model", NAME].files["adapter_model.safetensors"] == weights


def test_a_slow_disk_there_is_waited_for(hub: Any, waits: list[float], run: Path, command: Command) -> None:
    hub.fail("PUT", "/upload/", is_slow=True)

    def watch() -> int:
        assert hub.is_waiting.wait(60)
        commits = hub.count("/commit/")  # the weights are not there yet: nothing may name them
        hub.go_on.set()
        return commits

    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(watch)
        assert command("push", run, NAME).code == 0
        assert before.result() == 0
    assert hub.count("/commit/") == 1


def test_repeating_does_not_upload_again_what_arrived(
    hub: Any, waits: list[float], run: Path, command: Command
) -> None:
    hub.fail("POST", "/commit/", status=500)
    fail(hub, run, command, "the Hub failed (500)")
    assert hub.count("PUT /upload/") == 1
