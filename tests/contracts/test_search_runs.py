"""Runs that look for entries: alone, and three tasks of different types on one base, from the recipe to the answers."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import finetune
from finetune.artifact.export.export_run import export_run
from finetune.artifact.predictions import load_predictions
from finetune.errors import DataError, UsageError
from finetune.evaluation.corpus_metrics import compute_rank_statistics

SEARCH = {"data": "questions.jsonl", "knowledge": "faq.jsonl", "negatives": 2, "split": {"leaks": "warn"}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_support_recipe):
    return write_support_recipe(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return finetune.run(recipe, runs=tmp_path_factory.mktemp("runs"), quiet=True)


def test_each_task_is_scored_with_what_it_has(run):
    tests = run.tests
    assert {name: next(iter(test["metrics"])) for name, test in tests.items()} == {
        "tone": "macro_f1",
        "answer": "mrr",
        "rerank": "mrr",
    }
    assert {name: list(test["baselines"]) for name, test in tests.items()} == {
        "tone": ["majority"],
        "answer": ["bm25"],
        "rerank": ["bm25"],
    }
    assert tests["answer"]["entries"] == 3
    assert tests["answer"]["gates"]["mrr"]["passed"]
    assert not tests["tone"]["gates"]


def test_the_file_of_predictions_gives_the_scores_again(run):
    table = pyarrow.parquet.read_table(run.folder.evaluation / "answer" / "predictions.parquet")
    for name in ("mrr", "recall_at_1", "ndcg_at_10"):
        value = compute_rank_statistics(name, table["places"].to_pylist())[:, 0].mean()
        assert run.tests["answer"]["metrics"][name]["value"] == pytest.approx(value, abs=1e-6)
    assert "mrr" in load_predictions(run.folder, "answer").metrics


def test_rows_that_no_entry_answers_are_said(run):
    notes = [finding["message"] for finding in json.loads((run.folder.data / "findings.json").read_text())]
    assert "answer: 1 of 91 rows name no entry, and are left out of retrieval." in notes


def test_one_model_embeds_scores_pairs_and_classifies(run):
    loaded = run.load()
    vectors = loaded["answer"].embed(["gains profit gains meeting", "loss profit loss meeting"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    behind = loaded["answer"].embed(["gains shares"], ["Customer: earlier"])
    assert not np.allclose(behind, loaded["answer"].embed(["gains shares"]), atol=1e-3)
    scores = loaded["rerank"].score_pairs("gains shares", ["gains profit gains meeting", "loss profit"])
    assert scores.shape == (2,)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert list(loaded.predict(["gains shares"])) == ["tone"]


def test_what_a_task_does_not_give_is_refused_with_what_it_does(run):
    loaded = run.load()
    with pytest.raises(UsageError, match=r"embed: must get a run that gives vectors of texts, got reranking\. Use its"):
        loaded["rerank"].embed(["a"])
    with pytest.raises(UsageError, match=r"score_pairs: must get a run that gives scores of pairs, got text_cl"):
        loaded["tone"].score_pairs("a", ["b"])
    with pytest.raises(UsageError, match=r"predict: must get a run that gives labels, got retrieval\. Use its"):
        loaded["answer"].predict(["a"])


def test_scores_on_another_file(run, recipe):
    rows = [json.loads(line) for line in (recipe.parent / "questions.jsonl").read_text().splitlines()]
    other = recipe.parent / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    assert finetune.evaluate(run.folder.path, str(other), "answer")["rows"] == 9
    other.write_text(json.dumps(rows[0] | {"entry": "sise"}))
    with pytest.raises(DataError, match="entry: must be ids of the 3 entries"):
        finetune.evaluate(run.folder.path, str(other), "rerank")


def write_alone(write_questions, folder, base, task):
    """A recipe with one task."""
    write_questions(folder)
    recipe = {
        "recipe": 1,
        "name": "alone",
        "model": {"base": str(base), "max_length": 32},
        "adapter": {"rank": 8, "alpha": 16},
        "tasks": {"find": task},
        "train": {"epochs": 2, "tokens_per_batch": 128, "learning_rate": 0.01, "precision": "float32"},
        "evaluate": {"resamples": 100},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which is YAML too
    return path


@pytest.mark.parametrize(
    ("kind", "head", "use"),
    [
        ("retrieval", "TriadForSentenceEmbedding", 'encoder.embed(["a question"])'),
        ("reranking", "TriadForSequenceClassification", 'score_pairs("a question"'),
    ],
)
def test_one_task_alone(kind, head, use, write_questions, tiny_base, tmp_path):
    run = finetune.run(
        write_alone(write_questions, tmp_path, tiny_base, {"type": kind, **SEARCH}), runs=tmp_path / "runs", quiet=True
    )
    assert list(run.test["baselines"]) == ["bm25", "frozen", "fused"]
    assert run.test["metrics"]["recall_at_5"]["value"] == 1, "there are but three entries"
    card = run.folder.card.read_text()
    assert head in card
    assert use in card
    report = (run.folder.evaluation / "report.html").read_text()
    assert "Questions that it answered worst" in report
    assert "recall@1" in report
    predictor = run.load()
    if kind == "retrieval":
        assert predictor.embed(["gains profit"]).shape[0] == 1
    else:
        passages = ["gains profit", "loss"]
        export_run(run.folder.path, "transformers")
        whole = run.folder.export("transformers")
        tokenizer = AutoTokenizer.from_pretrained(whole)
        model = AutoModelForSequenceClassification.from_pretrained(whole).eval()
        with torch.no_grad():  # as people do who know transformers alone
            logits = model(**tokenizer(["gains"] * 2, passages, padding=True, return_tensors="pt")).logits[:, 0]
        assert predictor.score_pairs("gains", passages) == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)


def test_a_task_without_knowledge_says_where_to_put_it(write_questions, tiny_base, tmp_path):
    path = write_alone(write_questions, tmp_path, tiny_base, {"type": "retrieval", "data": "questions.jsonl"})
    with pytest.raises(DataError, match=r"retrieval must have entries to look for, got none\. Set tasks"):
        finetune.check(path)
