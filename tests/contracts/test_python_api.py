"""`import finetune`: run, evaluate, load, predict."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import finetune
from finetune.errors import RecipeError, UsageError

TEXTS = ["shares fall", "the company names a new schedule " * 4, "record", "profit beats and gains", "", "ok ok ok"]


@pytest.fixture(scope="module")
def predictor(finished_run):
    return finetune.load(finished_run)


def test_the_package_offers_what_it_lists():
    code = "import sys, finetune; print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    for name in finetune.__all__:
        assert callable(getattr(finetune, name))
    assert set(finetune.__all__) <= set(dir(finetune))
    with pytest.raises(AttributeError, match="module 'finetune' has no attribute 'nothing'"):
        _ = finetune.nothing


def test_a_run_from_python(write_recipe, tmp_path, capfd):
    run = finetune.run(write_recipe(tmp_path / "in"), ["train.epochs=1"], runs=str(tmp_path / "runs"), quiet=True)
    assert capfd.readouterr().out == ""
    assert run.folder.path.parent == tmp_path / "runs" / "tiny"
    assert run.test == json.loads((run.folder.evaluation / "test.json").read_text())
    assert run.test["opened"] == 1
    assert run.evaluate()["opened"] == run.test["opened"] == 2
    assert run.load().predict(["shares fall"])[0].label in run.test["labels"]
    other = run.evaluate(str(tmp_path / "in" / "rows.csv"))
    assert (other["split"], other["rows"]) == ("rows", 90)
    assert run.test["opened"] == 2


def test_check_from_python(write_recipe, tmp_path):
    plan = finetune.check(write_recipe(tmp_path), ["train.epochs=1"])
    (task,) = plan["tasks"].values()
    assert task["splits"]["train"]["rows"] == 63
    with pytest.raises(RecipeError, match=r"train\.epochs: must be at least 1, got 0"):
        finetune.check(write_recipe(tmp_path), ["train.epochs=0"])
    assert finetune.check(write_recipe(tmp_path), "train.epochs=1")["steps"] == plan["steps"]
    with pytest.raises(RecipeError, match=r"train\.epochs: must be at most 10000, got a very large number\."):
        finetune.check(write_recipe(tmp_path), f"train.epochs={'9' * 23}")


def test_a_folder_of_splits_keeps_them_to_the_end(write_recipe, tmp_path):
    path = write_recipe(tmp_path / "in", tasks={"tone": {"data": "splits"}}, train={"epochs": 1})
    header, *rows = (tmp_path / "in" / "rows.csv").read_bytes().splitlines(keepends=True)
    (tmp_path / "in" / "splits").mkdir()
    for name, part in (("train", rows[:70]), ("test", rows[70:])):
        (tmp_path / "in" / "splits" / f"{name}.csv").write_bytes(header + b"".join(part))
    run = finetune.run(path, runs=tmp_path / "runs", quiet=True)
    ids = json.loads((run.folder.data / "ids.json").read_text())["tone"]
    assert ids["test"] == [f"test:{number}" for number in range(1, 21)]
    assert {row_id.partition(":")[0] for row_id in ids["train"] + ids["validation"]} == {"train"}
    assert run.evaluate()["rows"] == 20, "read again from recipe.resolved.yaml"
    said = {
        "MODEL_CARD.md": "Split by `given`",
        "evaluation/report.html": "by given",
        "recipe.resolved.yaml": "by: given",
    }
    for name, words in said.items():
        assert words in (run.folder.path / name).read_text(), name
    (finding,) = [
        found
        for found in finetune.check(path, ["tasks.tone.split.by=random"])["findings"]
        if found["kind"] == "given_test"
    ]
    assert f"{finding['count']} of 20 rows of the given test split are now in train" in finding["message"]


def test_shots_shrink_train_and_validation_alone(write_recipe, tmp_path):
    recipe = write_recipe(tmp_path)
    plans = {shots: finetune.check(recipe, [f"tasks.tone.split.shots={shots}"]) for shots in ("null", 2, 30)}
    rows = {
        shots: {name: split["rows"] for name, split in plan["tasks"]["tone"]["splits"].items()}
        for shots, plan in plans.items()
    }
    assert rows["null"] == rows[30] == {"train": 63, "validation": 9, "test": 18}
    assert rows[2] == {"train": 6, "validation": 6, "test": 18}
    kinds = {shots: {finding["kind"] for finding in plan["findings"]} for shots, plan in plans.items()}
    assert "few_rows" in kinds[30] - kinds[2] - kinds["null"]


def test_a_prediction_is_the_most_likely_class_with_its_probability(predictor):
    for prediction in predictor.predict([text for text in TEXTS if text]):
        assert sum(prediction.scores.values()) == pytest.approx(1.0)
        assert list(prediction.scores) == ["negative", "neutral", "positive"]
        assert prediction.confidence == max(prediction.scores.values()) == prediction.scores[prediction.label]


def test_order_is_kept(predictor):
    scores = predictor.compute_scores(TEXTS)
    assert scores.shape == (len(TEXTS), 3)
    assert predictor.compute_scores(TEXTS[::-1])[::-1] == pytest.approx(scores, abs=1e-6)
    assert len({tuple(row) for row in scores}) == len(TEXTS), "else the order could not be told"


def test_company_in_the_batch_and_padding_change_nothing(predictor):
    together = predictor.compute_scores(TEXTS)
    alone = [predictor.compute_scores([text])[0] for text in TEXTS]
    assert alone == pytest.approx(together, abs=1e-6)
    assert predictor.compute_scores(["long " * 500, TEXTS[0]])[1] == pytest.approx(together[0], abs=1e-6)


def test_many_texts_in_several_batches_with_progress(predictor):
    texts = [f"{TEXTS[i % 2]} {i}" for i in range(600)]
    seen = []
    scores = predictor.compute_scores(texts, advance=seen.append)
    assert len(seen) > 1
    assert sum(seen) == len(texts)
    assert predictor.compute_scores(texts[311:312])[0] == pytest.approx(scores[311], abs=1e-6)


def test_nothing_in_nothing_out(predictor):
    assert predictor.predict([]) == []
    assert predictor.compute_scores([]).shape == (0, 3)


def test_one_text_is_not_a_list_of_texts(predictor):
    with pytest.raises(UsageError, match=r"texts must be a list of texts, got one text\. Write predict\(\[text\]\)"):
        predictor.predict("shares fall")


def test_an_empty_text_has_no_class(predictor):
    """Its scores can be had, for whoever wants them; a label would be made up."""
    with pytest.raises(UsageError, match=r"^predict: no text may be empty, got 2 texts \(2, 3\)\. Leave out what is"):
        predictor.predict(["shares fall", "", " \n", "ok"])


@pytest.mark.parametrize(("missing", "shown"), [(None, "None"), (float("nan"), "nan"), (3, "3")])
def test_what_is_no_text_is_named(predictor, missing, shown):
    """A column of a table with an empty cell holds nan."""
    words = rf"^predict: every text must be a str, got {shown} as text 2\. Leave out what is missing, and write numbers"
    with pytest.raises(UsageError, match=words):
        predictor.predict(["shares fall", missing])


def test_texts_may_come_from_a_generator(predictor):
    texts = ["shares fall", "shares rise"]
    assert predictor.predict(text for text in texts) == predictor.predict(texts)


@pytest.mark.parametrize("part", ["", "model", ".."])
def test_load_takes_a_run_its_model_folder_or_a_name(predictor, finished_run, part):
    loaded = finetune.load(finished_run / part)
    assert (loaded.compute_scores(TEXTS) == predictor.compute_scores(TEXTS)).all()


def test_load_takes_a_model_folder_that_was_moved(predictor, own_run, tmp_path):
    moved = (own_run / "model").rename(tmp_path / "served")
    assert (finetune.load(moved).compute_scores(TEXTS) == predictor.compute_scores(TEXTS)).all()


def test_a_folder_of_a_newer_toolkit_is_refused(own_run):
    settings = json.loads((own_run / "model" / "finetune.json").read_text())
    (own_run / "model" / "finetune.json").write_text(json.dumps(settings | {"format": 2}))
    with pytest.raises(UsageError, match=r"must be in format 1, got 2\. Update the toolkit"):
        finetune.load(own_run)


def test_cleaning_is_part_of_the_model(write_recipe, tmp_path):
    run = finetune.run(
        write_recipe(tmp_path / "in", tasks={"tone": {"clean": ["html", "urls"]}}), runs=tmp_path, quiet=True
    )
    clean, raw = run.load().compute_scores(["profit &amp; loss", "profit & loss https://t.co/abc"])
    assert clean == pytest.approx(raw, abs=1e-6)
