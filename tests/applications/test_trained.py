"""A trained run as an assistant: built, tuned, answered for, and talked to."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

import finetune
from finetune.applications.support import Session, build, load_assistant
from finetune.applications.support.build import build_assistant
from finetune.applications.support.trained import build_reader
from finetune.errors import DataError, RecipeError, UsageError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_support_recipe):
    folder = tmp_path_factory.mktemp("support")
    return write_support_recipe(folder, assistant={"templates": "intents.jsonl", "wrong_cost": 3})


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return finetune.run(recipe, runs=tmp_path_factory.mktemp("runs"), quiet=True)


@pytest.fixture(scope="module")
def figures(run):
    return build_assistant(run.folder.path)


def test_one_reading_is_what_each_task_says_alone(run):
    reader, loaded = build_reader(run.folder), run.load()
    for text, context in [("gains meeting", ""), ("loss shares", "Customer: earlier")]:
        reading = reader.read(text, context)
        np.testing.assert_allclose(reading.features, loaded["answer"].embed([text], [context])[0], atol=1e-5)
        if not context:
            expected = loaded["tone"].predict([text])[0]
            assert dict(zip(reader.intents, reading.scores, strict=True)) == pytest.approx(expected.scores, abs=1e-5)
            assert reading.outside == pytest.approx(1 - expected.confidence, abs=1e-5)
    passages = ["gains profit", "loss profit"]
    np.testing.assert_allclose(
        reader.rerank("gains", "", passages), loaded["rerank"].score_pairs("gains", passages), atol=1e-6
    )


def test_every_test_question_is_accounted_for(run, figures):
    shares = figures["all"]
    assert shares["questions"] == run.tests["tone"]["rows"]
    assert sum(shares[name]["value"] for name in ("right", "wrong", "handed_over", "asked_back")) == pytest.approx(1)
    assert len(figures["replies"]) == shares["questions"]
    right = np.mean([reply["outcome"] == "right" for reply in figures["replies"]])
    assert shares["right"]["value"] == pytest.approx(right)
    costs = json.loads((run.folder.path / "support" / "decision.json").read_text())["costs"]
    assert costs["wrong"] == 3


def test_the_assistant_answers_new_entries_at_once(run, figures, tmp_path):
    (tmp_path / "new.jsonl").write_text(json.dumps({"id": "new", "title": "gains profit", "text": "gains report"}))
    assistant = load_assistant(run.folder.path, tmp_path / "new.jsonl")
    assert [entry.id for entry in assistant.index.entries] == ["new"]
    assert assistant.reply("gains meeting", Session()).kind in ("template", "passage", "question", "handover")


def test_an_index_of_another_model_is_refused(run, figures):
    path = run.folder.path / "support" / "index" / "index.json"
    content = path.read_text()
    path.write_text(json.dumps(json.loads(content) | {"model": "b" * 64}))
    try:
        with pytest.raises(UsageError, match=r"the index must be built by this model, .* got one of bbbbbbbbbbbb"):
            load_assistant(run.folder.path)
        build_assistant(run.folder.path)  # as the message says
        assert json.loads(path.read_text()) == json.loads(content)
    finally:
        path.write_text(content)
    load_assistant(run.folder.path)


def test_a_build_that_was_killed_is_none(run, figures, command, monkeypatch):
    judged = []

    def judge(*values):
        judged.append(values)
        if len(judged) == 2:
            raise KeyboardInterrupt
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(build, "_judge", judge)
        with pytest.raises(KeyboardInterrupt):
            build_assistant(run.folder.path)
    assert not build.is_built(run.folder.path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "building the assistant" in command("chat", run.folder.path, "--json").err
    assert json.loads((run.folder.path / "support" / "test.json").read_text()) == figures
    assert build.is_built(run.folder.path)


def test_chat_speaks_json(run, figures, command, monkeypatch):
    lines = b'{"text": "gains meeting", "session": "a"}\nno json\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    done = command("chat", run.folder.path, "--json")
    answered, refused = (json.loads(line) for line in done.out.splitlines())
    assert answered["session"] == "a"
    assert answered["kind"] in ("template", "passage", "question", "handover")
    assert "line 2: must be a JSON object" in refused["error"]


def test_run_ends_with_the_figures_of_the_assistant(recipe, command, tmp_path):
    done = command("run", recipe, "--runs", tmp_path, "--set", "train.max_steps=2", "--set", "evaluate.gates={}")
    assert done.code == 0
    assert "assistant, test, end to end" in done.out
    assert "finetune chat" in done.out


def test_a_run_of_other_tasks_is_refused(write_recipe, command, tmp_path):
    path = write_recipe(tmp_path / "one", train={"max_steps": 2})
    run = finetune.run(path, runs=tmp_path / "runs", quiet=True)
    done = command("chat", run.folder.path)
    assert done.code == 2
    assert "must have the tasks of an assistant (text_classification, retrieval, reranking), got text_" in done.err
    with pytest.raises(UsageError, match="must come from a recipe with `assistant`, got one without"):
        build_assistant(run.folder.path)


def test_an_assistant_without_its_tasks_is_refused_by_the_recipe(write_recipe, tmp_path):
    with pytest.raises(RecipeError, match="assistant: must have one task each of text_classification, retrieval, rera"):
        finetune.check(write_recipe(tmp_path, assistant={"wrong_cost": 3}))


def test_without_templates_the_recipe_must_name_them(write_support_recipe, tmp_path):
    path = write_support_recipe(tmp_path, assistant={"wrong_cost": 3}, train={"max_steps": 2})
    run = finetune.run(path, ["evaluate.gates={}"], runs=tmp_path / "runs", quiet=True)
    with pytest.raises(DataError, match=r"assistant.templates: must name a file of intents .* got none"):
        build_assistant(run.folder.path)
