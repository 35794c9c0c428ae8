"""`finetune compare RUN RUN`: paired tests, held against numbers that are known for another reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import sacrebleu
from scipy import stats

import finetune
from finetune.artifact.compare_runs import compare_runs, describe_answer
from finetune.errors import UsageError

LABELS = ["no", "yes"]
ROWS = 200
MINUS = "\N{MINUS SIGN}"
REFERENCES = np.arange(ROWS) % 2


def write_run(folder: Path, columns: dict[str, Any], metrics: Sequence[str], labels: list[str] | None = None) -> Path:
    """What `compare` reads of a finished run."""
    (folder / "evaluation").mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": "finished"}))
    test = {"metrics": {metric: {} for metric in metrics}, "confidence": 0.95, "seed": 13, "opened": 1}
    (folder / "evaluation" / "test.json").write_text(json.dumps(test | ({"labels": labels} if labels else {})))
    pyarrow.parquet.write_table(pa.table(columns), folder / "evaluation" / "predictions.parquet")
    return folder


def write_classifier(folder: Path, wrong: Sequence[int], *, order: Sequence[int] | None = None, **changes: Any) -> Path:
    """A run that errs on the given of 200 rows, and is sure of it."""
    predictions = REFERENCES.copy()
    predictions[list(wrong)] = 1 - predictions[list(wrong)]
    columns = {
        "id": np.array([f"rows:{i:03}" for i in range(ROWS)]),
        "reference": np.array(LABELS)[REFERENCES],
        "score_no": np.where(predictions == 0, 0.9, 0.1),
        "score_yes": np.where(predictions == 1, 0.9, 0.1),
    } | changes
    shuffled = np.arange(ROWS) if order is None else np.asarray(order)
    metrics = ["accuracy", "macro_f1"]
    return write_run(folder, {name: values[shuffled] for name, values in columns.items()}, metrics, LABELS)


def convolve_exactly(wins: int, losses: int) -> tuple[np.ndarray, np.ndarray]:
    """The distribution of (wins - losses) in a resample of the rows, worked out: values and their probabilities."""
    step = np.array([losses, ROWS - wins - losses, wins]) / ROWS  # -1, 0, 1
    distribution = np.ones(1)
    for _ in range(ROWS):
        distribution = np.convolve(distribution, step)
    return np.arange(-ROWS, ROWS + 1), distribution


@pytest.mark.parametrize(("wins", "losses"), [(20, 10), (8, 6), (25, 3), (10, 10), (5, 16)])
def test_differences_and_p_values_by_hand(tmp_path: Path, wins: int, losses: int) -> None:
    """The second run is right on `wins` rows that the first one misses, and wrong on `losses` that it has."""
    both_wrong = list(range(150, 160))
    first = write_classifier(tmp_path / "a", [*range(wins), *both_wrong])
    second = write_classifier(tmp_path / "b", [*range(100, 100 + losses), *both_wrong])
    compared = compare_runs([first, second])
    difference = compared["runs"][str(second)]["difference"]["accuracy"]
    values, chances = convolve_exactly(wins, losses)
    assert difference["value"] == pytest.approx((wins - losses) / ROWS)
    rarer = min(chances[values <= 0].sum(), chances[values >= 0].sum())
    assert difference["p_value"] == pytest.approx(min(1, 2 * rarer), rel=0.2, abs=0.004)
    assert difference["p_adjusted"] == difference["p_value"], "one test needs no correction"
    cumulated = chances.cumsum()
    low, high = (values[np.searchsorted(cumulated, tail)] / ROWS for tail in (0.025, 0.975))
    assert (difference["low"], difference["high"]) == pytest.approx((low, high), abs=0.0051)  # one row
    assert compared["rows"] == ROWS


def test_intervals_are_those_of_scipy(tmp_path: Path) -> None:
    wrong = [list(range(0, 60, 2)), list(range(0, 100, 5))]
    runs = [write_classifier(tmp_path / name, rows) for name, rows in zip("ab", wrong, strict=True)]
    difference = compare_runs(runs)["runs"][str(runs[1])]["difference"]["accuracy"]
    right = np.ones((2, ROWS))
    for place, rows in enumerate(wrong):
        right[place, rows] = 0
    expected = stats.bootstrap(
        (right[1], right[0]),
        lambda one, other, axis: one.mean(axis=axis) - other.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (difference["low"], difference["high"]) == pytest.approx(expected, abs=0.0051)


def test_rows_are_paired_by_their_ids_whatever_their_order(tmp_path: Path) -> None:
    first = write_classifier(tmp_path / "a", range(20))
    second = write_classifier(tmp_path / "b", range(5, 20))
    shuffled = np.random.default_rng(3).permutation(ROWS)
    other = write_classifier(tmp_path / "c", range(5, 20), order=shuffled)
    straight, mixed = compare_runs([first, second]), compare_runs([first, other])
    assert mixed["runs"][str(other)]["difference"] == straight["runs"][str(second)]["difference"]
    assert straight["runs"][str(second)]["difference"]["accuracy"]["low"] > 0, "15 fewer mistakes, none new"


def test_several_runs_are_corrected_by_holm(tmp_path: Path) -> None:
    first = write_classifier(tmp_path / "a", range(30))
    others = [write_classifier(tmp_path / str(n), range(n, 30 + n // 3)) for n in (9, 12, 15)]
    compared = compare_runs([first, *others])
    each = [compared["runs"][str(other)]["difference"]["accuracy"] for other in others]
    raw = [one["p_value"] for one in each]
    assert raw[0] > raw[1] > raw[2]
    adjusted = [max(3 * raw[2], 2 * raw[1], raw[0]), max(3 * raw[2], 2 * raw[1]), 3 * raw[2]]
    assert [one["p_adjusted"] for one in each] == pytest.approx(adjusted, abs=1e-6)


def test_one_plain_sentence_says_whether_one_is_better(tmp_path: Path) -> None:
    first = write_classifier(tmp_path / "a", range(30))
    better = write_classifier(tmp_path / "b", range(20))
    same = write_classifier(tmp_path / "c", [*range(28), 101, 103])
    worse = write_classifier(tmp_path / "d", range(50))
    assert re.fullmatch(
        rf"{better} is really better than {first} in accuracy: \+0\.050 \(0\.0\d\d to 0\.0\d\d\), p < 0\.001\.",
        compare_runs([first, better])["answer"],
    )
    assert re.fullmatch(
        rf"{same} cannot be told from {first} by accuracy on these 200 rows: \+0\.000 "
        rf"\({MINUS}0\.0\d\d to 0\.0\d\d\), p = [01]\.\d{{3}}, which chance alone can do\.",
        compare_runs([first, same])["answer"],
    )
    answer = compare_runs([first, better, same, worse])["answer"]
    assert answer.count("is really better") == answer.count("is really worse") == answer.count("cannot be told") == 1
    assert f"{worse} is really worse than {first} in accuracy: {MINUS}0.100" in answer


def test_where_less_is_better_a_smaller_number_is_better() -> None:
    difference = {"value": -0.2, "low": -0.3, "high": -0.1, "p_value": 0.001, "p_adjusted": 0.001}
    runs = {"a": {"difference": {}}, "b": {"difference": {"loss": difference}}}
    said = describe_answer({"runs": runs, "metric": "loss", "confidence": 0.95, "rows": 10})
    assert said == f"b is really better than a in loss: {MINUS}0.200 ({MINUS}0.300 to {MINUS}0.100), p = 0.001."
    difference["p_adjusted"] = None
    said = describe_answer({"runs": runs, "metric": "loss", "confidence": 0.95, "rows": 10})
    assert said.startswith("b cannot be told from a by loss on these 10 rows")


# Language tasks


def test_translations_are_compared_as_sacrebleu_scores_them(tmp_path: Path) -> None:
    references = [f"the {a} dog sees the {b} house on day {n} ." for n, (a, b) in enumerate([("old", "red")] * 12)]
    good = [text.replace("sees", "looks at") if n % 3 else text for n, text in enumerate(references)]
    bad = [text.replace("dog", "cat").replace("house", "tree") for text in references]
    ids = [f"pairs:{n}" for n in range(12)]
    runs = [
        write_run(tmp_path / name, {"id": ids, "reference": references, "prediction": texts}, ["bleu", "chrf", "loss"])
        for name, texts in (("bad", bad), ("good", good))
    ]
    compared = compare_runs(runs)
    assert compared["metric"] == "bleu"
    for run, texts in zip(runs, (bad, good), strict=True):
        found = compared["runs"][str(run)]["metrics"]
        assert list(found) == ["bleu", "chrf"], "the file holds no likelihoods"
        # By id, pairs:10 stands before pairs:2; sums do not care.
        assert found["bleu"]["value"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score, abs=1e-4)
        assert found["chrf"]["value"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score, abs=1e-4)
    assert "is really better" in compared["answer"]


def test_language_models_are_compared_by_the_nats_of_their_tokens(tmp_path: Path) -> None:
    tokens = np.arange(5, 45, dtype=np.float64)
    texts = [f"block {n}" for n in range(40)]
    nats = [2.0 * tokens, 1.9 * tokens + np.random.default_rng(0).normal(0, 0.1, 40)]
    runs = [
        write_run(
            tmp_path / name,
            {"block": range(40), "text": texts, "tokens": tokens, "nats": one, "right": tokens // 2},
            ["loss", "perplexity", "bits_per_byte", "token_accuracy"],
        )
        for name, one in zip("ab", nats, strict=True)
    ]
    compared = compare_runs(runs)
    metrics = [compared["runs"][str(run)]["metrics"] for run in runs]
    assert list(metrics[0]) == ["loss", "perplexity", "token_accuracy"]
    assert [one["loss"]["value"] for one in metrics] == pytest.approx([n.sum() / tokens.sum() for n in nats], abs=1e-6)
    assert metrics[0]["perplexity"]["value"] == pytest.approx(np.exp(2.0), abs=1e-5)
    assert f"{runs[1]} is really better than {runs[0]} in loss" in compared["answer"]
    columns = {"block": range(40), "text": texts, "tokens": tokens + 1, "nats": nats[0], "right": tokens}
    other = write_run(tmp_path / "c", columns, ["loss"])
    with pytest.raises(UsageError, match="must be tested on the same rows"):
        compare_runs([runs[0], other])


def write_recommender(folder: Path, places: Sequence[Sequence[int]], **changes: Any) -> Path:
    """A run that was asked four times, three times for the same person."""
    columns = {
        "id": ["test:ann:0", "test:bob:1", "test:ann:2", "test:ann:3"],
        "user": ["ann", "bob", "ann", "ann"],
        "reference": [["a"], ["b"], ["a", "c"], ["b"]],
        "prediction": [["a", "b"]] * 4,
        "places": places,
    }
    return write_run(folder, columns | changes, ["mrr", "loss"])


def test_recommenders_are_compared_by_the_means_of_their_people(tmp_path: Path) -> None:
    runs = [
        write_recommender(tmp_path / name, places)
        for name, places in (("a", [[1], [4], [2, 3], [2]]), ("b", [[1], [2], [1, 3], [1]]))
    ]
    compared = compare_runs(runs)
    ann, bob = (1 + 1 / 2 + 1 / 2) / 3, 1 / 4
    found = compared["runs"][str(runs[0])]["metrics"]["mrr"]
    assert found["value"] == pytest.approx((ann + bob) / 2, abs=1e-6)
    # Two people: a resample holds both, or one of them twice.
    assert (found["low"], found["high"]) == pytest.approx((bob, ann), abs=1e-6)
    difference = compared["runs"][str(runs[1])]["difference"]["mrr"]
    assert difference["value"] == pytest.approx((1 + 1 / 2) / 2 - (ann + bob) / 2, abs=1e-6)
    assert compared["rows"] == 2


# What is refused


def test_recommenders_that_were_asked_other_things_are_refused(tmp_path: Path) -> None:
    places = [[1], [4], [2, 3], [2]]
    first = write_recommender(tmp_path / "a", places)
    second = write_recommender(tmp_path / "b", places, reference=[["a"], ["b"], ["a", "d"], ["b"]])
    with pytest.raises(UsageError, match="got 3 rows in common of 4 and 4"):
        compare_runs([first, second])


def test_runs_that_are_judged_by_other_classes_are_refused(tmp_path: Path) -> None:
    """Rows of a label that one run calls out of scope count in its scores of the classes in the other one alone."""
    references = np.array(["no", "yes", "odd", "no"])
    columns = {"id": list("abcd"), "reference": references, "score_no": [0.9] * 4, "score_yes": [0.1] * 4}
    first = write_run(tmp_path / "a", columns, ["accuracy"], LABELS)
    second = write_run(tmp_path / "b", columns | {"score_odd": [0.0] * 4}, ["accuracy"], [*LABELS, "odd"])
    with pytest.raises(UsageError) as caught:
        compare_runs([first, second])
    assert str(caught.value) == (
        f"{second}: must be judged by the same classes as {first}, got 3 and 2, which differ in odd. Train both with "
        "the same `labels` and `out_of_scope`."
    )
    columns |= {"score_no": [0.1] * 4, "score_yes": [0.9] * 4}
    turned = write_run(tmp_path / "c", columns, ["accuracy"], LABELS[::-1])
    difference = compare_runs([first, turned])["runs"][str(turned)]["difference"]["accuracy"]
    assert difference["value"] == pytest.approx(-1 / 3, abs=1e-6), "the order of the classes does not matter"


def test_other_rows_are_refused_in_words(tmp_path: Path) -> None:
    first = write_classifier(tmp_path / "a", range(30))
    ids = np.array([f"rows:{i:03}" for i in range(150, 150 + ROWS)])
    second = write_classifier(tmp_path / "b", range(20), id=ids)
    with pytest.raises(UsageError) as caught:
        compare_runs([first, second])
    assert str(caught.value) == (
        f"{second}: must be tested on the same rows as {first}, got 50 rows in common of 200 and 200. "
        "Train both on the same data with the same split and seed."
    )
    relabelled = write_classifier(tmp_path / "c", range(20), reference=np.array(LABELS)[(REFERENCES + 1) % 2])
    with pytest.raises(UsageError, match="got 0 rows in common of 200 and 200"):
        compare_runs([first, relabelled])


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, command: Callable[..., Any]) -> None:
    first = write_classifier(tmp_path / "a", range(30))
    second = write_classifier(tmp_path / "b", range(20))
    for what, words in (
        ([first, first], f"compare: must get different runs, got {first} and {first}, which are one."),
        ([first, tmp_path / "nothing"], f"{tmp_path / 'nothing'}: must be a finished run, got none."),
        ([first], f"compare: must get two or more runs, got {first} alone. Add another one."),
        ([first, "x.yaml"], "compare: must get one comparison file alone, or runs, got x.yaml among 2."),
        ([first, second, "--markdown", "t.md"], "compare: --markdown must come with a comparison file, got runs."),
        (["nowhere"], "nowhere: must be a file or the name of a shipped comparison."),
    ):
        done = command("compare", *what)
        assert done.code == 2
        assert words in done.err
    with pytest.raises(UsageError, match=r"must get two or more runs, got none\. Add another one\."):
        finetune.compare([])
    with pytest.raises(UsageError, match=r"must get two or more runs, got 1\. Add another one\."):
        finetune.compare([first])
    (second / "evaluation" / "predictions.parquet").unlink()
    with pytest.raises(UsageError, match=r"predictions\.parquet: must be the predictions of a .* Restore it, or"):
        finetune.compare([first, second])


def test_runs_without_a_metric_in_common_are_refused(tmp_path: Path) -> None:
    columns = {"id": ["1"], "reference": ["a b c d"], "prediction": ["a b c d"]}
    runs = [write_run(tmp_path / metric, columns, [metric]) for metric in ("bleu", "chrf")]
    with pytest.raises(UsageError) as caught:
        compare_runs(runs)
    assert str(caught.value) == (
        f"compare: the runs must share a metric that their predictions tell, got {runs[0]}: bleu; {runs[1]}: chrf."
    )


# The command, on runs that were trained


def test_finished_runs_are_compared_from_the_command_line(
    command: Callable[..., Any], finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, Path("runs") / "same" / "run")
    other = shutil.copytree(finished_run, Path("runs") / "other" / "run")
    path = other / "evaluation" / "predictions.parquet"
    table = pyarrow.parquet.read_table(path).to_pydict()
    for name in ("score_negative", "score_neutral", "score_positive"):
        table[name] = [1.0 if name == "score_neutral" else 0.0] * len(table["id"])
    pyarrow.parquet.write_table(pa.table(table), path)
    done = command("compare", "runs/same", "runs/other")
    assert (done.code, done.err) == (0, "")
    assert "18 test rows, 95% intervals, paired differences to runs/same" in done.out
    scored = json.loads((finished_run / "evaluation" / "test.json").read_text())["metrics"]
    assert re.search(rf"^runs/same +{scored['macro_f1']['value']:.3f} \(", done.out, re.MULTILINE)
    assert re.search(rf"^runs/other +0\.167 \(0\.\d+ to 0\.\d+\) +{MINUS}0\.\d{{3}} \({MINUS}", done.out, re.MULTILINE)
    assert "runs/other is really worse than runs/same in macro-F1" in done.out
    assert "Holm" not in done.out
    done = command("compare", "runs/same", "runs/other", "--json")
    compared = json.loads(done.out)
    assert compared["runs"]["runs/other"]["difference"]["accuracy"]["value"] < 0
    assert compared == finetune.compare(["runs/same", "runs/other"])
    done = command("compare", "runs/same", "runs/other", finished_run)
    assert "p-values are corrected for the number of runs (Holm); intervals are not." in done.out
    assert f"{finished_run} cannot be told from runs/same by macro-F1 on these 18 rows: +0.000" in done.out
