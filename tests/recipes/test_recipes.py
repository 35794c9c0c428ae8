"""Everything in recipes/ and data/samples/ works as it lies there."""

from __future__ import annotations

import csv
from collections import Counter

import pytest

from finetune.applications.support.claims import check_claims
from finetune.data.catalog import card_names, list_cards, load_card
from finetune.data.cleaning import normalize_for_duplicates
from finetune.data.knowledge import load_card_knowledge
from finetune.data.sources import load_rows
from finetune.data.splits import split_rows
from finetune.evaluation.slices import DERIVED
from finetune.models.base import find_base
from finetune.recipe import find_recipe, list_recipes, load_recipe, shipped_folder
from finetune.recipe.comparison import list_comparisons, load_comparison
from finetune.runner import check, run
from finetune.tasks import QuestionAnswering

RECIPES = list_recipes()
COMPARISONS = list_comparisons()
WRITTEN_BY_HAND = "shop_replies"
"""A set of questions and replies is small: each reply was held against its entry."""
names = pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])


def test_recipes_are_found():
    assert {recipe.name for recipe in [*RECIPES, *COMPARISONS]} == {
        path.relative_to(shipped_folder("recipes")).with_suffix("").as_posix()
        for path in shipped_folder("recipes").rglob("*.yaml")
        if "\nsweep: " not in path.read_text(encoding="utf-8")
    }
    assert "sentiment" in {recipe.name for recipe in RECIPES}


@names
def test_a_recipe_is_short_and_says_what_it_is_for(recipe):
    assert recipe.problem is None
    assert 10 < len(recipe.description) <= 100
    lines = recipe.path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# "), "a sentence for whoever opens the file"
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("one", COMPARISONS, ids=lambda one: one.name)
def test_a_comparison_says_what_it_is_for(one):
    assert one.problem is None
    assert 10 < len(one.description) <= 110
    lines = one.path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("one", COMPARISONS, ids=lambda one: one.name)
def test_a_comparison_gives_each_candidate_the_same_number_of_rates(one):
    loaded = load_comparison(one.path)
    assert loaded.section.name == one.path.stem
    assert {len(loaded.section.list_rates(name)) for name in loaded.section.candidates} == {3}
    assert loaded.section.reference == "full"


@names
def test_a_recipe_names_data_that_has_a_card(recipe):
    loaded = load_recipe(recipe.path)
    cards = {name: load_card(task.data) for name, task in loaded.tasks.items()}
    for name, task in loaded.tasks.items():
        assert set(task.columns.values()) <= set(cards[name].columns)
        if isinstance(task.labels, list) and isinstance(cards[name].labels, list):
            assert sorted(task.labels) == sorted(cards[name].labels)
    for column in loaded.evaluate.slices:
        if column == "history" and any(task.type == "recommendation" for task in loaded.tasks.values()):
            continue  # how much a person had, which no column says
        assert column in DERIVED or any(column in card.columns for card in cards.values())


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.benchmark], ids=lambda one: one.name)
def test_a_recipe_trains_with_the_defaults_where_it_can(recipe):
    """What a recipe repeats of the defaults goes stale; those of a benchmark pin what was measured."""
    loaded = load_recipe(recipe.path)
    given = loaded.train.model_dump(exclude_unset=True)
    defaults = type(loaded.train)().model_dump()
    assert {key: value for key, value in given.items() if value == defaults[key]} == {}


def test_the_sentiment_recipe_passes_check():
    plan = check("sentiment")
    task = plan["tasks"]["sentiment"]
    assert task["data"] == "folder data/samples/financial_headlines"
    assert task["labels"] == ["negative", "neutral", "positive"]
    assert {name: split["rows"] for name, split in task["splits"].items()} == {
        "train": 560,
        "validation": 80,
        "test": 160,
    }
    assert [finding for finding in plan["findings"] if finding["severity"] != "note"] == []
    assert 0 < plan["parameters"]["trained"] < 0.05 * plan["parameters"]["total"]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.benchmark], ids=lambda one: one.name)
def test_a_recipe_on_a_sample_set_passes_check(recipe):
    loaded = load_recipe(recipe.path)
    if find_base(loaded.model.base) is None:
        pytest.skip(f"{loaded.model.base} is not installed")
    plan = check(recipe.path)
    assert [finding for finding in plan["findings"] if finding["severity"] == "error"] == []
    least = 15 if WRITTEN_BY_HAND in {task.data for task in loaded.tasks.values()} else 30
    assert min(split["rows"] for task in plan["tasks"].values() for split in task["splits"].values()) >= least
    assert plan["steps"] < 3000


@pytest.mark.parametrize("name", [card.name for card in list_cards() if card.illustrative])
def test_a_sample_set_is_what_its_card_says(name):
    card = load_card(name)
    folder = shipped_folder("data") / "samples" / name
    roles = tuple(card.roles) or ("text",)
    rows = load_rows(name, {}, roles=roles).rows
    assert len(rows) == sum(card.rows.values()) >= (120 if name == WRITTEN_BY_HAND else 300)
    for role in {"text", "target"} & set(roles):
        texts = Counter(normalize_for_duplicates(row.values[role]) for row in rows)
        assert [text for text, count in texts.items() if count > 1 or not text] == []
    assert card.licence
    assert "says nothing about real" in card.notes
    for file_name in card.files.values() if card.format == "csv" else ():
        with (folder / file_name).open(encoding="utf-8", newline="") as file:
            assert set(csv.DictReader(file).fieldnames or []) == set(card.columns)


@pytest.mark.parametrize("name", ["financial_headlines", "market_news"])
def test_headlines_hold_enough_of_each_class(name):
    card = load_card(name)
    labels = Counter(row.values["label"] for row in load_rows(name, {}).rows)
    assert sum(labels.values()) >= 700
    assert set(labels) == set(card.labels)
    assert min(labels.values()) > 0.2 * sum(labels.values())


def test_market_news_shares_no_headline_with_the_other_samples():
    """A monitor trained on it is shown market_stream, and scored on what is new to it."""
    texts = {
        name: {normalize_for_duplicates(row.values["text"]) for row in load_rows(name, {}, roles=("text",)).rows}
        for name in ("market_news", "financial_headlines", "market_stream")
    }
    assert not texts["market_news"] & (texts["financial_headlines"] | texts["market_stream"])


def test_market_news_holds_every_topic_in_every_tone():
    rows = [
        row.values
        for row in load_rows("market_news", {"label": "topic", "tone": "label"}, roles=("text", "label", "tone")).rows
    ]
    assert min(Counter(row["label"] for row in rows).values()) >= 110
    assert min(Counter((row["label"], row["tone"]) for row in rows).values()) >= 30


def test_answers_stand_in_their_passages():
    rows = load_rows("shop_policies", {}, roles=QuestionAnswering.roles).rows
    for row in rows:
        values = row.values
        start = values["answer_start"]
        assert (start == "") == (not values["answer"])
        assert not values["answer"] or values["passage"].startswith(values["answer"], int(start))
    assert 0.2 < sum(not row.values["answer"] for row in rows) / len(rows) < 0.3
    assert len({row.values["passage"] for row in rows}) == len({row.values["passage_id"] for row in rows}) >= 30


def test_no_passage_of_the_question_answering_recipe_is_in_two_splits():
    task = load_recipe(find_recipe("question_answering")).tasks["policies"]
    rows = load_rows(task.data, task.columns, roles=QuestionAnswering.roles).rows
    splits = split_rows(rows, task.split, seed=13)
    passages = [{row.values["passage"] for row in part} for part in splits.values()]
    assert sum(map(len, passages)) == len(set().union(*passages))


def test_the_question_answering_recipe_runs_on_a_small_base(tiny_base, tmp_path):
    """Its passages then take several windows each."""
    steps = ["train.max_steps=2", "train.precision=float32", "evaluate.resamples=100"]
    base = [f"model.base={tiny_base}", "model.max_length=64"]
    test = run("question_answering", [*base, *steps], runs=tmp_path, quiet=True).test
    assert test["rows"] == 80
    assert test["baselines"]["bm25_sentence"]["metrics"]["answer_f1"]["value"] > 0.25
    assert set(test["slices"]) == {"length", "topic"}


def test_every_sample_set_is_marked_as_illustrative():
    samples = {path.parent.name for path in shipped_folder("data").glob("samples/*/card.yaml")}
    assert samples
    assert samples <= set(card_names())
    assert {card.name for card in list_cards() if card.illustrative} == samples


def test_replies_of_the_shop_stand_in_its_entries():
    """Each is written from an entry as the knowledge has it; none of the questions is one of shop_support."""
    rows = load_rows("shop_replies", {}, roles=("text", "target", "passage")).rows
    entries = {entry.id: entry.passage for entry in load_card_knowledge(load_card("shop_support"))}
    assert Counter(row.values["entry"] for row in rows) == dict.fromkeys(entries, 2)
    assert all(entries[row.values["entry"]] == row.values["passage"] for row in rows)
    known = {
        normalize_for_duplicates(row.values["text"]) for row in load_rows("shop_support", {}, roles=("text",)).rows
    }
    assert not known & {normalize_for_duplicates(row.values["text"]) for row in rows}
    claims = [check_claims(row.values["target"], row.values["passage"]) for row in rows]
    assert all(claims)
    refused = [row for row, said in zip(rows, claims, strict=True) if any(claim.problem for claim in said)]
    assert len(refused) <= 4, "what the check is too strict for"
