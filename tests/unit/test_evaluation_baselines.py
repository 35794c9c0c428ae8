from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from finetune.data.rows import Row
from finetune.errors import DataError, RecipeError
from finetune.evaluation.baselines import C_GRID, BaselineData, BaselineResult, compute_baselines
from finetune.models.base import BaseModel, load_tokenizer
from finetune.recipe.schema import EvaluateSection, TaskSection
from finetune.tasks import TextClassification
from finetune.tasks.task import HeldOut, TaskData

WORDS = ["refund money please", "card arrived late", "rate of exchange"]


def make_split(n_rows: int, seed: int, n_labels: int = 3) -> BaselineData:
    """Texts that name their class in two of three rows; features that lie around its corner."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, n_labels, n_rows)
    fillers = generator.choice(["well", "so", "then", "now", "hello"], (n_rows, 3))
    told = generator.random(n_rows) < 2 / 3
    texts = [
        f"{' '.join(filler)} {WORDS[label] if is_told else ''}"
        for filler, label, is_told in zip(fillers, labels, told, strict=True)
    ]
    features = (np.eye(8)[labels] + generator.normal(scale=0.5, size=(n_rows, 8))).astype(np.float32)
    return BaselineData(texts, labels, lambda: features)


def hide_labels(data: BaselineData) -> BaselineData:
    return BaselineData(data.texts, None, data.features)


TRAIN, VALIDATION, TEST = make_split(120, 0), make_split(40, 1), make_split(50, 2)


def fit(name: str, train: BaselineData = TRAIN, n_labels: int = 3, seed: int = 0) -> BaselineResult:
    return compute_baselines([name], train, VALIDATION, hide_labels(TEST), n_labels, seed)[name]


def score(result: BaselineResult) -> float:
    return float(f1_score(TEST.labels, result.scores["test"].argmax(axis=1), average="macro"))


@pytest.mark.parametrize("name", ["majority", "tfidf_logreg", "frozen_logreg"])
def test_scores_are_probabilities_of_every_row(name: str) -> None:
    result = fit(name)
    assert {split: scores.shape for split, scores in result.scores.items()} == {"validation": (40, 3), "test": (50, 3)}
    for scores in result.scores.values():
        np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-6)


def test_majority_is_the_share_of_each_class() -> None:
    train = BaselineData(["a"] * 4, np.array([2, 2, 0, 2]))
    result = compute_baselines(["majority"], train, VALIDATION, TEST, 3, 0)["majority"]
    np.testing.assert_allclose(result.scores["test"][[0, 7]], [[0.25, 0, 0.75]] * 2)
    assert result.settings == {}


def test_models_learn_what_there_is_to_learn() -> None:
    assert score(fit("majority")) < 0.3 < 0.65 < score(fit("tfidf_logreg"))
    assert score(fit("frozen_logreg")) > 0.8


def test_words_count_also_without_spaces_between_them() -> None:
    texts = ["我要退款", "请退款给我", "卡还没有到", "我的卡到了吗"]
    train = BaselineData(texts * 3, np.array([0, 0, 1, 1] * 3))
    test = BaselineData(["怎么退款", "卡呢"])
    result = compute_baselines(["tfidf_logreg"], train, BaselineData(texts, np.array([0, 0, 1, 1])), test, 2, 0)
    assert result["tfidf_logreg"].scores["test"].argmax(axis=1).tolist() == [0, 1]


def test_c_is_the_best_of_validation() -> None:
    assert TRAIN.features
    assert VALIDATION.features
    train, validation = (
        d / np.linalg.norm(d, axis=1, keepdims=True) for d in (TRAIN.features(), VALIDATION.features())
    )
    by_c = {}
    for c in C_GRID:
        predictions = LogisticRegression(C=c, max_iter=1000).fit(train, TRAIN.labels).predict(validation)
        by_c[c] = f1_score(VALIDATION.labels, predictions, average="macro")
    assert fit("frozen_logreg").settings == {"C": max(by_c, key=lambda c: by_c[c])}
    assert len(set(by_c.values())) > 1


def test_test_rows_do_not_touch_the_fit() -> None:
    names = ["tfidf_logreg", "frozen_logreg"]
    one = compute_baselines(names, TRAIN, VALIDATION, hide_labels(TEST), 3, 0)
    two = compute_baselines(names, TRAIN, VALIDATION, hide_labels(make_split(20, 5)), 3, 0)
    for name in names:
        assert one[name].settings == two[name].settings
        np.testing.assert_array_equal(one[name].scores["validation"], two[name].scores["validation"])


def test_the_seed_fixes_the_scores() -> None:
    np.testing.assert_array_equal(
        fit("tfidf_logreg", seed=3).scores["test"], fit("tfidf_logreg", seed=3).scores["test"]
    )


def test_a_class_that_train_lacks_scores_zero() -> None:
    for name in ("majority", "tfidf_logreg", "frozen_logreg"):
        scores = fit(name, n_labels=5).scores["test"]
        assert scores.shape == (50, 5)
        assert not scores[:, 3:].any()


def test_features_are_made_only_for_the_baseline_that_needs_them() -> None:
    def refuse() -> np.ndarray:
        raise AssertionError("features were computed")

    train = BaselineData(TRAIN.texts, TRAIN.labels, refuse)
    assert list(compute_baselines(["majority", "tfidf_logreg"], train, VALIDATION, TEST, 3, 0)) == [
        "majority",
        "tfidf_logreg",
    ]


def test_no_solver_warnings_reach_the_user() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_baselines(["majority", "tfidf_logreg", "frozen_logreg"], TRAIN, VALIDATION, TEST, 3, 0)


def test_frozen_logreg_needs_a_base() -> None:
    with pytest.raises(
        RecipeError, match=r"evaluate\.baselines: frozen_logreg must have a pretrained base .* got none"
    ):
        fit("frozen_logreg", BaselineData(TRAIN.texts, TRAIN.labels))


def test_one_class_is_not_enough() -> None:
    with pytest.raises(DataError, match=r"train: must hold at least 2 classes .* got 1\. Check the split"):
        fit("tfidf_logreg", BaselineData(TRAIN.texts, np.zeros(120, dtype=np.int64)))


def test_texts_without_words() -> None:
    with pytest.raises(DataError, match="train: texts must hold words for the baseline tfidf_logreg, got none"):
        fit("tfidf_logreg", BaselineData(["!!", "?"] * 60, TRAIN.labels))


def test_train_without_labels_is_a_mistake_in_the_program() -> None:
    with pytest.raises(ValueError, match="must come with labels"):
        fit("majority", hide_labels(TRAIN))


def test_words_of_the_context_count_where_the_model_reads_it(tiny_base: Path) -> None:
    """The text is the same in every row: what was said before tells the class."""
    rows = [
        Row(f"r:{n}", None, n, {"text": "yes please", "label": label, "context": f"Agent: {said}"})
        for n, (label, said) in enumerate([("refund", "shall I return it"), ("order", "will you buy another")] * 6)
    ]
    base = BaseModel(str(tiny_base), tiny_base, "local folder")
    tokenizer = load_tokenizer(base)
    scores = {}
    for columns in ({}, {"context": "context"}):
        section = TaskSection(type="text_classification", data="rows.csv", columns=columns)
        task = TextClassification.build(section, TaskData(rows))
        splits = dict.fromkeys(("train", "validation", "test"), rows)
        examples = {name: task.build_examples(part, tokenizer, 32) for name, part in splits.items()}
        held_out = HeldOut(
            None, tokenizer, splits, examples, base, EvaluateSection(baselines=["tfidf_logreg"]), 32, 0, 1
        )
        found = task._compute_baselines(held_out)["tfidf_logreg"].scores["test"].argmax(axis=1)
        scores[bool(columns)] = float((found == examples["test"].labels).mean())
    assert scores == {False: 0.5, True: 1.0}
