from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from finetune.errors import DataError, DivergedError, RecipeError
from finetune.evaluation.corpus_metrics import compute_corpus_metric
from finetune.evaluation.corpus_scoring import CorpusSplit, SystemOutput, compute_corpus_estimates, score_corpus
from finetune.evaluation.intervals import Resampling, draw_weights
from finetune.evaluation.scoring import check_early_stop, check_section, choose_section
from finetune.recipe.schema import EvaluateSection

N = 60
WORDS = ["the", "a", "man", "woman", "child", "dog", "sees", "rides", "red", "blue", "bike", "near", "house", "two"]


def draw_likelihood(seed: int, nats: float) -> np.ndarray:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 20, N)
    return np.stack([tokens * generator.uniform(0.5, 1.5, N) * nats, tokens, tokens // 3, tokens * 4], axis=1)


def make_split(**changes: Any) -> CorpusSplit:
    """Translations that are right but for one word in four, and baselines that write or that score, not both."""
    generator = np.random.default_rng(0)
    references = [" ".join(generator.choice(WORDS, generator.integers(3, 14))) for _ in range(N)]
    written = [" ".join("oops" if generator.random() < 0.25 else w for w in text.split()) for text in references]
    split = CorpusSplit(
        name="test",
        model=SystemOutput(draw_likelihood(1, nats=1.0), written),
        references=references,
        inputs=[f"{text} x" for text in references],
        values=[{"source": "web" if i % 3 else "book"} for i in range(N)],
        baselines={
            "copy": SystemOutput(texts=[f"{text[:9]} x" for text in references], settings={"n": 1}),
            "unigram": SystemOutput(draw_likelihood(1, nats=2.0)),
        },
        resampling=Resampling(100, 0),
        opened=1,
    )
    return dataclasses.replace(split, **changes)


def make_section(**changes: Any) -> EvaluateSection:
    names = {"metrics": ["bleu", "chrf", "loss"], "baselines": ["copy"], "slices": ["length", "source"]}
    return EvaluateSection(resamples=100, **(names | changes))


def test_layout_is_that_of_a_classifier_without_its_parts() -> None:
    scored = score_corpus(
        make_split(resampling=Resampling(100, 13)), make_section(gates={"perplexity": "< 9", "beats_baselines": True})
    )
    assert list(scored) == [
        *("split", "rows", "confidence", "resamples", "seed", "opened", "metrics", "baselines", "slices", "gates")
    ]
    head = ("test", N, 0.95, 100, 13, 1)
    assert tuple(scored[key] for key in ("split", "rows", "confidence", "resamples", "seed", "opened")) == head
    assert list(scored["metrics"]) == ["bleu", "chrf", "loss", "perplexity"]  # the recipe's, then the gates'
    assert set(scored["metrics"]["bleu"]) == {"value", "low", "high"}
    assert set(scored["baselines"]["copy"]) == {"metrics", "difference", "settings"}
    assert set(scored["baselines"]["copy"]["difference"]["bleu"]) == {"value", "low", "high", "p_value"}
    assert scored["baselines"]["copy"]["settings"] == {"n": 1}
    assert set(scored["slices"]["source"][0]) == {"value", "rows", "metrics"}
    assert set(scored["gates"]["perplexity"]) == {"condition", "value", "passed"}


def test_values_are_those_of_sacrebleu_and_of_the_sums() -> None:
    split = make_split()
    scored = score_corpus(split, make_section())
    expected = BLEU().corpus_score(split.model.texts, [split.references]).score
    assert scored["metrics"]["bleu"]["value"] == pytest.approx(expected, abs=1e-6)
    nats, tokens, *_ = split.model.likelihood.sum(axis=0)
    assert scored["metrics"]["loss"]["value"] == pytest.approx(nats / tokens, abs=1e-6)


def test_intervals_are_those_of_corpora_drawn_group_by_group() -> None:
    split = make_split(resampling=Resampling(100, 5, np.arange(N) // 4))
    scored = score_corpus(split, make_section(metrics=["bleu"]))
    assert scored["groups"] == N / 4
    drawn = []
    for weights in draw_weights(N, split.resampling):
        for column in weights.T.astype(int):
            rows = np.repeat(np.arange(N), column)
            texts = [split.model.texts[i] for i in rows]
            drawn.append(BLEU().corpus_score(texts, [[split.references[i] for i in rows]]).score)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert scored["metrics"]["bleu"] == pytest.approx(
        {"value": BLEU().corpus_score(split.model.texts, [split.references]).score, "low": low, "high": high}, abs=1e-6
    )


def test_systems_see_the_same_resamples() -> None:
    scored = score_corpus(make_split(), make_section(metrics=["loss"]))["baselines"]["unigram"]["difference"]
    # The baseline's nats are twice the model's in every row, so that the difference is minus the model's loss.
    model = score_corpus(make_split(), make_section(metrics=["loss"]))["metrics"]["loss"]
    assert scored["loss"]["value"] == pytest.approx(-model["value"], abs=2e-6)
    assert scored["loss"]["low"] == pytest.approx(-model["high"], abs=2e-6)
    assert scored["loss"]["high"] == pytest.approx(-model["low"], abs=2e-6)
    assert scored["loss"]["p_value"] == pytest.approx(2 / 101, abs=1e-6)


def test_a_baseline_lacks_what_it_says_nothing_about() -> None:
    baselines = score_corpus(make_split(), make_section())["baselines"]
    for part in ("metrics", "difference"):
        assert list(baselines["copy"][part]) == ["bleu", "chrf"]
        assert list(baselines["unigram"][part]) == ["loss"]


def test_gates_pass_over_baselines_without_the_headline() -> None:
    section = make_section(metrics=["loss", "bleu"], gates={"beats_baselines": True, "bleu": ">= 99"})
    gates = score_corpus(make_split(), section)["gates"]
    assert gates["beats_baselines"]["condition"].startswith("loss below unigram's ")
    assert gates["beats_baselines"]["passed"]
    assert not gates["bleu"]["passed"]
    without = make_split(baselines={"copy": make_split().baselines["copy"]})
    assert score_corpus(without, section)["gates"]["beats_baselines"] == {
        "condition": "loss below every baseline, and there is none",
        "value": pytest.approx(1.0, abs=0.2),
        "passed": False,
    }


def test_a_metric_that_the_model_says_nothing_about_has_no_value() -> None:
    split = make_split(model=SystemOutput(draw_likelihood(1, nats=1.0)), references=None)
    scored = score_corpus(split, make_section(gates={"bleu": "> 1"}))
    assert list(scored["metrics"]) == ["bleu", "chrf", "loss"]  # the headline stays the headline
    assert scored["metrics"]["bleu"] == {"value": None, "low": None, "high": None}
    assert scored["gates"]["bleu"] == {"condition": "> 1", "value": None, "passed": False}
    assert list(scored["slices"]["source"][0]["metrics"]) == ["loss"]


def test_slices_are_scored_by_their_rows() -> None:
    split = make_split()
    scored = score_corpus(split, make_section())["slices"]
    web = [i for i in range(N) if i % 3]
    assert (scored["source"][0]["value"], scored["source"][0]["rows"]) == ("web", len(web))
    expected = BLEU().corpus_score([split.model.texts[i] for i in web], [[split.references[i] for i in web]]).score
    assert scored["source"][0]["metrics"]["bleu"]["value"] == pytest.approx(expected, abs=1e-6)
    assert scored["length"][0]["value"].endswith(" words")
    assert sum(part["rows"] for part in scored["length"]) == N


def test_validation_is_scored_without_gates() -> None:
    scored = score_corpus(make_split(name="validation", opened=None), make_section(gates={"bleu": "> 0"}))
    assert scored["gates"] == {}
    assert "opened" not in scored


def test_result_is_strict_json_and_depends_on_the_seed_only() -> None:
    rows = make_split().model.likelihood * [1000, 1, 1, 0]  # perplexity beyond float64, no bytes
    section = make_section(metrics=["perplexity", "bits_per_byte", "token_accuracy"], slices=[])
    one, two = (
        score_corpus(make_split(model=SystemOutput(rows), resampling=Resampling(100, 4)), section) for _ in range(2)
    )
    assert one == two == json.loads(json.dumps(one, allow_nan=False))
    assert one["metrics"]["perplexity"] == one["metrics"]["bits_per_byte"] == {"value": None, "low": None, "high": None}
    other = score_corpus(make_split(model=SystemOutput(rows), resampling=Resampling(100, 5)), section)
    assert other["metrics"]["token_accuracy"] != one["metrics"]["token_accuracy"]


def test_no_rows() -> None:
    nothing = SystemOutput(np.zeros((0, 4)), [])
    split = CorpusSplit(
        "validation",
        nothing,
        references=[],
        inputs=[],
        values=[],
        resampling=Resampling(100, 0),
        baselines={"copy": nothing},
    )
    scored = score_corpus(split, make_section(slices=["length"]))
    assert scored["rows"] == 0
    assert scored["metrics"]["bleu"] == scored["metrics"]["loss"] == {"value": None, "low": None, "high": None}
    assert compute_corpus_estimates({}, Resampling(100, 0)) == {}


def test_one_row_has_no_interval() -> None:
    one = SystemOutput(draw_likelihood(1, nats=1.0), ["a text"])
    split = CorpusSplit(
        "validation",
        one,
        references=["a text"],
        inputs=["x"],
        values=[{}],
        resampling=Resampling(100, 0),
        baselines={"copy": one},
    )
    scored = score_corpus(split, make_section(metrics=["bleu", "loss"], slices=[]))
    assert scored["metrics"]["loss"]["value"] is not None
    assert {(found["low"], found["high"]) for found in scored["metrics"].values()} == {(None, None)}
    assert scored["baselines"]["copy"]["difference"]["loss"] == {"value": 0, "low": None, "high": None, "p_value": None}


def test_likelihoods_that_are_not_finite() -> None:
    rows = draw_likelihood(1, nats=1.0)
    rows[3, 0], rows[5, 0] = np.nan, np.inf
    with pytest.raises(
        DivergedError, match=r"test: the model's loss must be finite, got nan or infinity in 2 of 60 rows\. Lower"
    ):
        score_corpus(make_split(model=SystemOutput(rows)), make_section(metrics=["loss"]))


def test_a_slice_over_a_column_that_is_not_there() -> None:
    with pytest.raises(DataError, match=r"column 'sorce' must exist, got columns source\. Did you mean 'source'"):
        score_corpus(make_split(), make_section(slices=["sorce"]))


def test_estimates_are_metrics_of_the_sums() -> None:
    tables = {"loss": draw_likelihood(3, nats=1.5), "token_accuracy": draw_likelihood(3, nats=1.5)}
    estimates = compute_corpus_estimates(tables, Resampling(150, 2))
    for name, table in tables.items():
        assert estimates[name].value == compute_corpus_metric(name, table)
        assert estimates[name].samples.shape == (150,)
        assert estimates[name].samples.mean() == pytest.approx(estimates[name].value, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "metrics", "baselines"),
    [
        ("labels", ["accuracy"], ["majority"]),
        ("likelihood", ["loss", "bits_per_byte", "perplexity", "token_accuracy"], ["unigram", "ngram"]),
        ("masked", ["loss", "perplexity", "token_accuracy"], ["unigram"]),
        ("texts", ["bleu", "bleu_zh", "chrf", "loss", "perplexity", "token_accuracy"], ["copy", "nearest"]),
    ],
)
def test_each_kind_of_task_has_its_metrics_and_baselines(kind: str, metrics: list[str], baselines: list[str]) -> None:
    gates = {metrics[0]: "> 0", "beats_baselines": True}
    check_section(EvaluateSection(metrics=metrics, baselines=baselines, gates=gates), kind)


@pytest.mark.parametrize(
    ("kind", "section", "problems"),
    [
        (
            "likelihood",
            {"metrics": ["bleu", "macro_f1", "perplexiti"], "baselines": ["copy", "ngram"], "gates": {"ece": "< 1"}},
            [
                "evaluate.metrics: must name metrics out of bits_per_byte, loss, perplexity, token_accuracy, "
                "got 'bleu'. It is for tasks that write a text for a text or tasks that complete a prompt.",
                "evaluate.metrics: must name metrics out of bits_per_byte, loss, perplexity, token_accuracy, "
                "got 'macro_f1'. It is for tasks with class labels.",
                "evaluate.metrics: must name metrics out of bits_per_byte, loss, perplexity, token_accuracy, "
                "got 'perplexiti'. Did you mean 'perplexity'?",
                "evaluate.baselines: must name baselines out of unigram, ngram, got 'copy'. "
                "It is for tasks that write a text for a text or tasks that complete a prompt.",
                "evaluate.gates: must name metrics out of beats_baselines, bits_per_byte, loss, perplexity, "
                "token_accuracy, got 'ece'. It is for tasks with class labels.",
            ],
        ),
        (
            "masked",
            {"metrics": ["loss"], "baselines": ["ngram"]},
            ["evaluate.baselines: must name baselines out of unigram, got 'ngram'. It is for language models."],
        ),
        (
            "texts",
            {"metrics": ["loss", "bleu"], "baselines": ["copy"], "gates": {"beats_baselines": True}},
            [
                "evaluate.gates: beats_baselines must have a first metric that copy, nearest have, got 'loss'. "
                "Put bleu or chrf first in evaluate.metrics."
            ],
        ),
        (
            "texts",
            {"metrics": ["bleu"], "baselines": [], "gates": {"beats_baselines": True}},
            [
                "evaluate.gates: beats_baselines must have a baseline to beat, got none. "
                "Add evaluate.baselines: [copy, nearest]."
            ],
        ),
        (
            "labels",
            {"metrics": ["bleu"], "baselines": ["nearest"]},
            [
                "evaluate.metrics: must name metrics out of accuracy, auroc, brier, ece, log_loss, macro_f1, mcc, "
                "weighted_f1, got 'bleu'. It is for tasks that write a text for a text or tasks that complete a "
                "prompt.",
                "evaluate.baselines: must name baselines out of majority, tfidf_logreg, frozen_logreg, got 'nearest'. "
                "It is for tasks that write a text for a text or tasks that complete a prompt.",
            ],
        ),
    ],
)
def test_what_does_not_suit_the_task(kind: str, section: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        check_section(EvaluateSection(**section), kind)
    assert str(caught.value).splitlines() == problems


def test_the_metric_that_stops_training_is_computed_while_training() -> None:
    for kind, name in [("labels", "macro_f1"), ("labels", "loss"), ("texts", "loss"), ("masked", "token_accuracy")]:
        check_early_stop(name, {"task": kind})
    for kind, name in [("texts", "bleu"), ("likelihood", "bits_per_byte")]:
        with pytest.raises(
            RecipeError,
            match=rf"^train\.early_stop\.metric: must be computed while training, got '{name}'\. Use loss\.",
        ):
            check_early_stop(name, {"task": kind})
    with pytest.raises(RecipeError, match=r"^train\.early_stop\.metric: must name .*'macro_f1'\. It is for tasks with"):
        check_early_stop("macro_f1", {"task": "texts"})


def test_of_several_tasks_the_metric_of_any_stops_training_or_that_of_one() -> None:
    kinds = {"intent": "labels", "answer": "ranking"}
    for name in ("macro_f1", "mrr", "loss", "answer.mrr", "intent.accuracy", "answer.loss"):
        check_early_stop(name, kinds)
    with pytest.raises(RecipeError, match=r"train.early_stop.metric: must name metrics out of .* got 'macro_f1'"):
        check_early_stop("answer.macro_f1", kinds)


def test_each_of_several_tasks_takes_what_is_for_it() -> None:
    section = EvaluateSection(
        metrics=["macro_f1", "mrr", "tpyo"], baselines=["bm25", "majority"], gates={"mrr": ">= 0.5", "accuracy": ">= 0"}
    )
    chosen = choose_section(section, "ranking", ["labels", "ranking"])
    assert (chosen.metrics, chosen.baselines, list(chosen.gates)) == (["mrr", "tpyo"], ["bm25"], ["mrr"])
    with pytest.raises(RecipeError, match=r"must name a metric for tasks that rank entries, got accuracy\."):
        choose_section(EvaluateSection(metrics=["accuracy"]), "ranking", ["labels", "ranking"])
