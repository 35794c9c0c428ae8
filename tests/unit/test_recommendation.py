"""The task: what is learned from and asked, what is refused, and that nothing sees what comes after a cut."""

from __future__ import annotations

import csv
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_arrays
from safetensors.torch import load_file

from finetune.artifact.predictions import Predictions
from finetune.artifact.run_folder import RunFolder
from finetune.data.batches import IGNORED, Examples, collate
from finetune.data.histories import split_by_time, split_leave_one_out
from finetune.data.interactions import Catalogue, Interactions
from finetune.errors import DataError, Interrupted, RecipeError, ResourceError, UsageError
from finetune.evaluation.counting import COUNTINGS, DAY, Events, Histories
from finetune.evaluation.intervals import Resampling
from finetune.evaluation.ranking_baselines import find_places
from finetune.evaluation.recommending import CHUNK
from finetune.fitting import search
from finetune.layout import lay_out
from finetune.models.next_item import build_next_item
from finetune.recipe import load_recipe
from finetune.recipe.schema import (
    EvaluateSection,
    ModelSection,
    RankSection,
    RecommendSection,
    ScratchSection,
    TaskSection,
)
from finetune.tasks import judge_lists, recommendation
from finetune.tasks.items import Counts
from finetune.tasks.judge_lists import place_candidates
from finetune.tasks.people import load_others, load_people
from finetune.tasks.preparation import _check_named_columns as check_named_columns
from finetune.tasks.preparation import check_roles
from finetune.tasks.ranker import Table
from finetune.tasks.recommendation import Recommendation, Record, compute_sequence_scores, encode_questions
from finetune.tasks.task import HeldOut
from finetune.training.checkpoint import has_checkpoint

ITEMS, START = 30, 1_700_000_000
BASELINES = ["popular", "popular_week", "own_history", "item_knn", "ease", "co_occurrence"]


def make_log(events, items=6):
    """Interactions of (person, item, time)."""
    user, item, time = (np.array(values, np.int64) for values in zip(*events, strict=True))
    order = np.lexsort((time, user))
    ids = tuple(f"i{number}" for number in range(items))
    users = tuple(f"u{number}" for number in range(int(user.max()) + 1))
    return Interactions(users, Catalogue(ids, ids, {}), user[order], item[order], time[order])


def draw_events(seed=0, people=40, items=ITEMS):
    """(person, item, time) of people who go on to the items behind those they had; the last three are nobody's."""
    generator = np.random.default_rng(seed)
    events = []
    for person in range(people):
        count, first = int(generator.integers(4, 14)), int(generator.integers(items))
        path = (first + np.cumsum(generator.integers(1, 3, count))) % (items - 3)
        times = START + np.sort(generator.integers(0, 60 * DAY, count))
        events += [(f"p{person:02}", f"b{item:02}", int(time)) for item, time in zip(path, times, strict=True)]
    return events


def write_events(path, events):
    """(user, item, time), and a weight where they have one."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("user", "item", "time", "weight")[: len(events[0])], *events])


def write_shop(folder, events, items=ITEMS):
    write_events(folder / "events.csv", events)
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(f"b{item:02}", f"word{item % 5}", "ab"[item % 2], item) for item in range(items)]
        csv.writer(file).writerows([("item", "title", "kind", "price"), *rows])


def make_section(**keys):
    known = {"file": "items.csv", "text": ["title"], "categorical": ["kind"], "numeric": ["price"]}
    split = {"validation": 0.2, "test": 0.2} | keys.pop("split", {})
    return TaskSection.model_validate(
        {"type": "recommendation", "data": "events.csv", "items": known, "split": split, **keys}
    )


def load_shop(folder, events, **keys):
    write_shop(folder, events)
    return load_people(make_section(**keys), folder, seed=0)


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(ITEMS, 8, generator=generator), dim=1)
    scratch = ScratchSection(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    return build_next_item(ModelSection(base="scratch", max_length=20, scratch=scratch), ITEMS, texts, seed=0).eval()


# What is learned from


def test_what_comes_next_of_baskets_by_hand():
    time = np.array([1, 1, 1, 4, 4, 9])
    assert recommendation._find_next(time).tolist() == [3, 4, 3, 5, 5, 6]
    assert recommendation._find_next(np.array([1, 2, 3])).tolist() == [1, 2, 3]
    assert recommendation._find_next(np.array([5, 5])).tolist() == [2, 2], "nothing follows"


@given(st.lists(st.integers(0, 6), min_size=1, max_size=15).map(sorted))
@settings(max_examples=60, deadline=None)
def test_what_comes_next_is_always_at_the_next_time_and_all_of_it_is_learned(times):
    time = np.array(times)
    following = recommendation._find_next(time)
    moments = sorted(set(times))
    for moment, later in zip(moments, [*moments[1:], None], strict=True):
        own = following[time == moment]
        if later is None:
            assert (own == len(time)).all()
        else:
            basket = np.flatnonzero(time == later).tolist()
            assert len(set(own.tolist())) == min(len(own), len(basket))
            assert set(own.tolist()) <= set(basket)


def make_record(log, validation=0.2, test=0.2):
    cuts, requests = split_by_time(log, validation, test)
    return Record(log, requests, cuts)


def list_pairs(examples):
    starts, targets = examples.starts, examples.target_starts
    assert starts.tolist() == targets.tolist()
    return [
        (examples.input_ids[start:end].tolist(), examples.target_ids[start:end].tolist())
        for start, end in pairwise(starts)
    ]


def test_train_examples_by_hand():
    # Person 0 buys 0 and 1 at once, then 2, then 3; person 1 is asked for what comes after both cuts.
    events = [(0, 0, 1), (0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 4, 2), (1, 5, 7), (1, 0, 8), (0, 4, 7), (2, 1, 3)]
    log = make_log(events)
    record = Record(log, split_by_time(log, 0.2, 0.1)[1], (7, 8))
    build = recommendation._build_sequences
    people = np.array([0, 1, 2])
    assert list_pairs(build(record, people, 10, by_moment=True)) == [([0, 1, 2], [2, 2, 3])]
    assert list_pairs(build(record, people, 2, by_moment=True)) == [([0, 1], [2, 2]), ([2], [3])]
    one_out = Record(log, split_leave_one_out(log), None)
    # Without its last two events person 0 has 0, 1, 2; person 1 has 4 alone; person 2 has too few to be asked.
    assert list_pairs(build(one_out, people, 10, by_moment=False)) == [([0, 1], [1, 2])]


def test_held_out_examples_are_newest_items_with_their_answers(monkeypatch, tmp_path):
    _, task, splits = load_shop(tmp_path, draw_events())
    asked = task.record.ask("validation", exclude_seen=True)
    with_history = [row for row in range(len(asked)) if len(asked.histories.get(row))]
    examples = task.build_examples(splits["validation"], None, 3)
    assert len(examples) == len(with_history)
    assert examples.lengths.max() == 3
    row = next(row for row in with_history if len(asked.histories.get(row)) > 3)
    place = with_history.index(row)
    start, end = examples.starts[place : place + 2]
    assert examples.input_ids[start:end].tolist() == asked.histories.get(row)[-3:].tolist()
    monkeypatch.setattr(recommendation, "CHECKED", 10)
    fewer = task.build_examples(splits["validation"], None, 3)
    assert 10 <= len(fewer) < 20, "spread over all"


def test_a_person_is_asked_as_often_as_the_recipe_says(tmp_path):
    for most in (1, 3):
        _, task, _ = load_shop(tmp_path, draw_events(people=8), recommend={"requests": most})
        for requests in task.record.requests.values():
            times = np.bincount(requests.person)
            assert times.max() == most
    again = load_shop(tmp_path, draw_events(people=8), recommend={"requests": 3})[1]
    assert again.record.requests["test"].moment.tolist() == task.record.requests["test"].moment.tolist()


# Nothing sees what comes after a cut


def change_after(events, cut, seed=1):
    """Who did what from a time on, dealt anew."""
    late = [event for event in events if event[2] >= cut]
    assert len(late) > 10
    generator = np.random.default_rng(seed)
    users, items = generator.permutation([user for user, *_ in late]), generator.integers(0, ITEMS, len(late))
    changed = [(str(user), f"b{item:02}", time) for user, item, (*_, time) in zip(users, items, late, strict=True)]
    return [event for event in events if event[2] < cut] + changed


def same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize("at", ["validation", "test"])
def test_nothing_that_is_fitted_sees_events_after_its_cut(tmp_path, at):
    events = draw_events()
    _, task, splits = load_shop(tmp_path, events)
    cut = task.record.cuts[0 if at == "validation" else 1]
    _, other, other_splits = load_shop(tmp_path, change_after(events, cut))
    assert other.record.cuts == task.record.cuts
    assert other.counts == task.counts
    assert [row.values for row in other_splits["train"]] == [row.values for row in splits["train"]]
    trained, again = (one.build_examples(splits["train"], None, 20) for one in (task, other))
    assert list_pairs(trained) == list_pairs(again)
    known, still = (one.record.list_known(at) for one in (task, other))
    assert known.now == still.now == cut
    assert known.time.max() < cut
    same(
        {key: getattr(known, key) for key in ("user", "item", "time")},
        {key: getattr(still, key) for key in ("user", "item", "time")},
    )
    same(Counts.fit(known).to_arrays(), Counts.fit(still).to_arrays())
    histories = Histories(np.arange(12), np.array([0, 3, 5]), np.array([3, 5, 5]))
    for name in BASELINES:
        chosen = COUNTINGS[name].list_settings()[-1:]
        one, two = (next(COUNTINGS[name].fit_all(counted, chosen))(histories) for counted in (known, still))
        np.testing.assert_array_equal(one, two)


def judge(task, model, **keys):
    section = EvaluateSection(
        metrics=["ndcg_at_10", "mrr"], baselines=["popular_week", "co_occurrence"], slices=[], resamples=100
    )
    return judge_lists.judge_lists(task, task.record, HeldOut(model, None, {}, {}, None, section, 20, 0, 1, **keys))


@pytest.fixture(scope="module")
def judged(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("shop")
    _, task, _ = load_shop(folder, draw_events(), rank={"features": ["sequence", "co_occurrence", "price", "kind"]})
    return folder, task, judge(task, model)


def test_both_stages_are_judged_beside_each_alone(judged):
    _, task, judgement = judged
    scored = judgement.scored["test"]
    assert list(scored["baselines"]) == ["sequence", "popular_week", "co_occurrence"]
    assert set(scored["ranker"]["importances"]) == {"sequence", "co_occurrence", "price", "kind"}
    assert set(judgement.files) == {"ranker.txt", "counts.safetensors"}
    asked = task.record.ask("test", exclude_seen=True)
    assert (scored["lists"]["requests"], scored["lists"]["people"]) == (len(asked), len(np.unique(asked.person)))
    rows = judgement.predictions
    assert len(rows["prediction"]) == len(asked)
    for row, (shown, places) in enumerate(zip(rows["prediction"], rows["places"], strict=True)):
        had = {task.catalogue.ids[item] for item in asked.histories.get(row).tolist()}
        assert not had & set(shown), "what a person had is on no list"
        if places[0] <= 10:
            assert set(shown) & set(rows["reference"][row])
    saved = Predictions(RunFolder(Path("run")), scored, rows)
    again = saved.compute_estimates(["ndcg_at_10", "mrr"], Resampling(10, 0))
    for name, estimate in again.items():
        assert estimate.value == pytest.approx(scored["metrics"][name]["value"], abs=1e-6)
    assert saved.count == scored["lists"]["people"] < len(asked)


def test_what_validation_says_does_not_depend_on_test(judged, model, tmp_path):
    _, task, judgement = judged
    rank = {"features": list(task.rank.features)}
    _, other, _ = load_shop(tmp_path, change_after(draw_events(), task.record.cuts[1]), rank=rank)
    again = judge(other, model)
    assert again.scored["validation"] == judgement.scored["validation"]
    assert again.files == judgement.files, "trees and counts too"
    assert again.scored["test"]["metrics"] != judgement.scored["test"]["metrics"]


def weigh(events, heavy="b03"):
    """Events with one item four times as heavy as others."""
    return [(*event, 4 if event[1] == heavy else 1) for event in events]


def test_column_of_weights_that_nobody_named_changes_nothing(judged, model, tmp_path):
    _, _, judgement = judged
    rank = {"features": ["sequence", "co_occurrence", "price", "kind"]}
    _, task, _ = load_shop(tmp_path, weigh(draw_events()), rank=rank)
    again = judge(task, model)
    assert (again.scored, again.files) == (judgement.scored, judgement.files)


def test_weights_count_in_what_is_popular_alone(judged, model, tmp_path):
    _, plain, judgement = judged
    rank = {"features": ["sequence", "co_occurrence", "price", "kind"]}
    _, task, splits = load_shop(tmp_path, weigh(draw_events()), rank=rank, columns={"weight": "weight"})
    examples = (one.build_examples(splits["train"], None, 20) for one in (task, plain))
    assert list_pairs(next(examples)) == list_pairs(next(examples)), "the first stage learns the same"
    again = judge(task, model)
    assert again.files["ranker.txt"] == judgement.files["ranker.txt"], "and so do the trees"
    assert set(load_arrays(again.files["counts.safetensors"])) - set(
        load_arrays(judgement.files["counts.safetensors"])
    ) == {"weighted"}
    popular, before = (one.scored["test"]["baselines"]["popular_week"]["metrics"] for one in (again, judgement))
    assert popular != before


def test_weights_are_one_on_average_over_what_is_known(tmp_path):
    events = draw_events()
    columns = {"weight": "weight"}
    _, task, _ = load_shop(tmp_path, weigh(events), columns=columns)
    cut = task.record.cuts[0]
    known = task.record.list_known("validation")
    assert known.weight.mean() == pytest.approx(1)
    heavy = known.item == task.catalogue.numbers["b03"]
    assert np.unique(known.weight[heavy] / known.weight[~heavy][0]).tolist() == pytest.approx([4])
    later = [(*event[:3], 100 if event[2] >= cut else event[3]) for event in weigh(events)]
    other = load_shop(tmp_path, later, columns=columns)[1].record.list_known("validation")
    np.testing.assert_array_equal(other.weight, known.weight)


def test_what_is_counted_for_a_split_ends_at_its_own_cut(judged, model, monkeypatch):
    _, task, _ = judged
    counted = []
    fit, rank, choose = Counts.fit, judge_lists.rank_by_counting, judge_lists.choose_settings
    monkeypatch.setattr(judge_lists.Counts, "fit", lambda events: counted.append(events) or fit(events))
    monkeypatch.setattr(judge_lists, "rank_by_counting", lambda *given: counted.append(given[2]) or rank(*given))
    monkeypatch.setattr(judge_lists, "choose_settings", lambda *given: counted.append(given[1]) or choose(*given))
    judge(task, model)
    first, second = task.record.cuts
    # Two baselines are tuned; for each split the trees' counts, then both baselines.
    assert [events.now for events in counted] == [first] * 5 + [second] * 3
    assert all(events.time.max() < events.now for events in counted)


def test_judging_says_how_far_it_is(judged, model):
    _, task, judgement = judged
    told, done = [], {}

    def track(stage, parts):
        told.append((stage, len(parts)))
        for part in parts:
            yield part
            done[stage] = done.get(stage, 0) + 1

    assert judge(task, model, track=track).scored == judgement.scored, "it changes nothing"
    validation, test = (len(task.record.ask(split, exclude_seen=True)) for split in ("validation", "test"))
    assert told == [
        ("validation: settings of co_occurrence", 18),
        ("validation: first stage", -(-validation // CHUNK)),
        ("validation: candidates", -(-validation // CHUNK)),
        ("validation: candidates, some items hidden", -(-validation // CHUNK)),
        ("validation: trees", 3),
        ("validation: baselines", 2),
        ("test: first stage", -(-test // CHUNK)),
        ("test: both stages", -(-test // CHUNK)),
        ("test: baselines", 2),
    ]
    assert done == dict(told), "each to its end"


# Scores


def test_sequence_scores_are_those_of_one_history_at_a_time(model):
    histories = Histories(np.array([1, 2, 3, 4, 5, 6, 7]), np.array([0, 3, 3]), np.array([3, 3, 7]))
    scores = compute_sequence_scores(model, histories, max_length=3)
    assert scores.shape == (3, ITEMS)
    assert np.isnan(scores[1]).all()
    np.testing.assert_allclose(np.exp(scores[[0, 2]]).sum(axis=1), 1, rtol=1e-5)
    for row, newest in ((0, [1, 2, 3]), (2, [5, 6, 7])):
        alone = model.score(model.encode(torch.tensor([newest]))).log_softmax(-1)
        np.testing.assert_allclose(scores[row], alone[0].detach(), rtol=1e-4, atol=1e-5)


def test_outputs_of_validation_are_the_metrics_of_its_lists(tmp_path, model):
    _, task, _ = load_shop(tmp_path, draw_events())
    asked = task.record.ask("validation", exclude_seen=True)
    rows = [row for row in range(len(asked)) if len(asked.histories.get(row))][:20]
    outputs = task.compute_outputs(model, encode_questions(asked, rows, 20), None)
    scores = compute_sequence_scores(model, asked.histories, 20)
    for found, row in zip(outputs, rows, strict=True):
        own, targets = scores[row].copy(), asked.targets[row]
        assert found[0] == pytest.approx(-own[targets].mean(), rel=1e-4)
        own[asked.histories.get(row)] = -np.inf
        assert found[3] == pytest.approx(1 / find_places(own, targets)[0], rel=1e-5)
    assert set(task.compute_metrics(outputs, np.zeros(0), ["mrr"])) == {"loss", "mrr"}


def test_after_nothing_comes_what_was_popular_of_late(model):
    now = START + 60 * DAY
    item = np.array([0] * 50 + [1] * 20 + [2] * 2 + [3] * 2 + [3] * 9)
    time = np.array([START] * 70 + [now - DAY] * 4 + [START] * 9)
    events = Events(np.arange(len(item)), item, time, ITEMS, now)
    first = judge_lists._First(model, 20, Counts.fit(events).rank_lately())
    histories = Histories(np.array([4, 5]), np.array([0, 0]), np.array([0, 2]))
    sequence = first.compute(histories)
    filled = judge_lists.fill_popular(sequence, histories, first.popular)
    # 2 and 3 are had twice in the week, 3 more often before.
    assert np.argsort(-filled[0], kind="stable")[:4].tolist() == [3, 2, 0, 1]
    np.testing.assert_array_equal(filled[1], sequence[1])
    table = Table(np.array([0, 1, 1]), np.array([9, 8, 7]), np.zeros((3, 1), np.float32))
    placed = place_candidates(filled, table, np.array([5.0, -2.0, 1.0]), histories)
    np.testing.assert_array_equal(placed[0], filled[0])
    others = np.delete(sequence[1], [7, 8])
    order = np.argsort(-placed[1], kind="stable").tolist()
    assert order[:2] == [7, 8], "candidates in the order of the second stage"
    assert order[2] == np.flatnonzero(sequence[1] == others.max())[0], "then the first stage"


def test_texts_are_shown_of_people_with_a_history(judged):
    samples = judged[2].samples
    assert samples
    for sample in samples:
        assert 0 < len(sample["input"].split("\n")) <= 5
        assert all(part.startswith("word") for part in sample["input"].split("\n"))
        assert sample["reference"]
        assert "events before, first hit at place" in sample["note"]


# Round trip


def test_a_task_comes_back_from_its_config(tmp_path):
    _, task, _ = load_shop(tmp_path, draw_events(), rank={"features": ["sequence", "price"]})
    again = Recommendation.from_config(task.to_config())
    assert again == task
    assert again.known.tolist() == (np.array(task.counts) > 0).tolist()
    with pytest.raises(UsageError, match="recommendation: must have its events at hand, got a model alone"):
        again.build_examples([], None, 3)


# What is refused


def test_features_that_do_not_exist(tmp_path):
    with pytest.raises(DataError) as caught:
        load_shop(tmp_path, draw_events(), rank={"features": ["sequence", "colour", "weight"]})
    assert str(caught.value) == (
        "rank.features: must be out of sequence, co_occurrence, ease, text, popularity, recency, repeats, history and "
        "the catalogue's columns (kind, price), got colour, weight."
    )


def test_a_column_that_is_called_like_a_feature(tmp_path):
    write_shop(tmp_path, draw_events())
    catalogue = (tmp_path / "items.csv").read_text(encoding="utf-8")
    (tmp_path / "items.csv").write_text(catalogue.replace("price", "popularity", 1), encoding="utf-8")
    items = {"file": "items.csv", "text": ["title"], "categorical": ["kind"], "numeric": ["popularity"]}
    section = make_section(
        data=str(tmp_path / "events.csv"), items=items, rank={"features": ["sequence", "popularity"]}
    )
    with pytest.raises(DataError) as caught:
        load_people(section, None, 0)
    assert str(caught.value) == (
        "rank.features: must mean one thing, got popularity, which the catalogue also has as a column. Rename the "
        "column, or leave it out of items.categorical and items.numeric."
    )
    section = make_section(data=str(tmp_path / "events.csv"), items=items, rank={"features": ["sequence", "kind"]})
    assert load_people(section, None, 0)[1].rank.features == ["sequence", "kind"], "nothing asks for either"


def test_features_that_say_nothing_are_left_out(tmp_path):
    keys = {"recommend": {"vectors": "ids"}, "rank": {"features": ["text", "repeats", "price"]}}
    assert load_shop(tmp_path, draw_events(), **keys)[1].rank.features == ["price"]
    keys["rank"] = {"features": ["text", "repeats"]}
    with pytest.raises(DataError) as caught:
        load_shop(tmp_path, draw_events(), **keys)
    assert str(caught.value) == (
        "rank.features: must leave one, got text, repeats: text is nothing where recommend.vectors is ids, and repeats "
        "where recommend.exclude_seen is true. Add sequence."
    )


def test_a_second_stage_without_lightgbm_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ResourceError, match="rank: must have LightGBM, got no such package"):
        load_shop(tmp_path, draw_events(), rank={})
    load_shop(tmp_path, draw_events())


def test_a_split_counts_the_people_that_it_is_judged_by(tmp_path):
    """Who only came back to what lists leave out is asked for nothing, and counted in no held-out split."""
    back = [("back", "b01", START + DAY * day) for day in range(60)]
    found = {}
    for exclude_seen in (True, False):
        _, task, splits = load_shop(tmp_path, draw_events() + back, recommend={"exclude_seen": exclude_seen})
        for name in ("validation", "test"):
            asked = task.record.ask(name, exclude_seen=exclude_seen)
            assert [row.values["person"] for row in splits[name]] == np.unique(asked.person).tolist()
            found[exclude_seen, name] = {row.values["user"] for row in splits[name]}
    for name in ("validation", "test"):
        assert found[False, name] - found[True, name] >= {"back"}
        assert found[True, name] <= found[False, name]


def test_people_who_only_come_back_to_what_they_had(tmp_path):
    events = [(f"p{person}", "b01", START + DAY * day) for person in range(5) for day in range(9)]
    with pytest.raises(DataError) as caught:
        load_shop(tmp_path, events)
    assert str(caught.value) == (
        "events.csv: validation must have people with something to ask for, got none. Change split.validation and "
        "split.test, or give more events; where things are had again, set recommend.exclude_seen: false."
    )
    load_shop(tmp_path, events, recommend={"exclude_seen": False})


RECIPE = """\
recipe: 1
name: shop
model: {{base: {base}}}
adapter: {{method: {method}}}
tasks:
  next_item:
    type: {type}
    data: events.csv
    {more}
"""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"more": "split: {by: random}"},
            "tasks.next_item.split.by: must be time_cut or leave_one_out for recommendation, got 'random'.",
        ),
        (
            {"method": "lora"},
            "adapter.method: must be full for recommendation, got 'lora': the first stage starts from random weights, "
            "and the texts' encoder stays as it is.",
        ),
        (
            {"base": "scratch"},
            "model.base: must be the encoder of the items' texts for recommendation, got 'scratch'. For ids alone set "
            "tasks.next_item.recommend.vectors: ids.",
        ),
        (
            {"type": "text_classification", "more": "rank: {}\n    split: {by: leave_one_out}"},
            "tasks.next_item.rank: must be left out for text_classification, got a section.",
        ),
        (
            {"type": "text_classification", "more": "split: {by: leave_one_out}"},
            "tasks.next_item.split.by: must part rows, not events, for text_classification, got 'leave_one_out'.",
        ),
        (
            {"more": "items: {categorical: [price], numeric: [price]}"},
            "must not repeat a column of `categorical`, got 'price'.",
        ),
    ],
)
def test_keys_that_do_not_go_together(tmp_path, changes, words):
    given = {"base": "sentence-transformers/all-MiniLM-L6-v2", "method": "full", "type": "recommendation", "more": ""}
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(**(given | changes)), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert words in str(caught.value)


def test_roles_of_events():
    check_named_columns(make_section(columns={"user": "who", "weight": "stars"}))
    with pytest.raises(RecipeError) as caught:
        check_named_columns(make_section(columns={"wieght": "stars"}))
    words = "must name what recommendation reads (user, item, time, weight), got 'wieght'. Did you mean 'weight'?"
    assert words in str(caught.value)


def test_other_events_are_asked_about_without_weights(tmp_path):
    events = draw_events()
    _, task, _ = load_shop(tmp_path, weigh(events), columns={"weight": "weight"})
    with pytest.raises(UsageError) as caught:
        check_roles(task, {"weight": "stars"})
    words = "--column: must be one of user, item, time for recommendation, got 'weight'."
    assert words in str(caught.value)


def test_sections_have_defaults():
    assert RecommendSection().exclude_seen
    assert "repeats" not in RankSection().features, "they say nothing where lists leave out what was had"


# Other events in the place of test


def list_requests(record):
    """(person, history, targets) of test, in ids."""
    log, _ = record.find("test")
    asked, ids = record.ask("test", exclude_seen=True), np.array(log.catalogue.ids)
    histories = [ids[asked.histories.get(row)].tolist() for row in range(len(asked))]
    people = [log.users[person] for person in asked.person]
    return list(zip(people, histories, [ids[targets].tolist() for targets in asked.targets], strict=True))


@pytest.mark.parametrize("by", ["time_cut", "leave_one_out"])
def test_other_events_are_asked_about_as_those_of_test_were(tmp_path, by):
    events = draw_events()
    _, task, _ = load_shop(tmp_path, events, split={"by": by})
    own = list_requests(task.record)
    kept = sorted({user for user, _, _ in own})[::2]
    others = [(f"x{user}", item, time) for user, item, time in reversed(events) if user in kept]
    others += [("stranger", "a new book", START), ("stranger", "b01", START + 1)]
    others = [event for event in others for event in (event, (event[0], "another", event[2] - 1))]
    write_events(tmp_path / "others.csv", others)
    columns = {"user": "user", "item": "item", "time": "time"}
    loaded, asked, rows = load_others(str(tmp_path / "others.csv"), columns, task, seed=0)
    found = list_requests(asked.record)
    assert found == [(f"x{user}", *rest) for user, *rest in own if user in kept]
    assert [row.values["user"] for row in rows] == sorted({user for user, _, _ in found})
    unknown = [finding for finding in loaded.findings if finding.kind == "unknown_item"]
    message = f"{len(others) // 2 + 1} of {len(others)} events are with items that the run does not know: left out."
    assert [finding.message for finding in unknown] == [message]
    known, still = (one.record.list_known("test") for one in (task, asked))
    assert (known.user.tolist(), known.item.tolist()) == (still.user.tolist(), still.item.tolist())
    assert list_requests(task.record) == own


@pytest.mark.parametrize(
    ("by", "others", "words"),
    [
        (
            "time_cut",
            [("a", "b01", START), ("a", "b02", START + 1)],
            "must have events behind the run's cut, 2024-01-",
        ),
        (
            "leave_one_out",
            [("a", "b01", START), ("a", "b02", START + 1)],
            "others.csv: must have people with 3 events, with something to ask for, got none. Give more events of "
            "people, with what they had before.",
        ),
        (
            "time_cut",
            [("a", "x1", START)],
            "others.csv: events must name items that the run knows, such as 'b00', got others, such as 'x1'. Take the "
            "ids of the run's own data.",
        ),
    ],
)
def test_other_events_that_ask_for_nothing(tmp_path, by, others, words):
    _, task, _ = load_shop(tmp_path, draw_events(), split={"by": by})
    write_events(tmp_path / "others.csv", others)
    with pytest.raises(DataError) as caught:
        load_others(str(tmp_path / "others.csv"), {}, task, seed=0)
    assert words in str(caught.value)


# The losses of training


def make_batch(rows):
    """(inputs, targets) as the packed batch of a Triad; a target of None counts for nothing."""
    inputs, targets = [row[0] for row in rows], [[IGNORED if t is None else t for t in row[1]] for row in rows]
    return collate(Examples.build(inputs, targets=targets), np.arange(len(rows)), None)


def make_task(**keys):
    section = RecommendSection(item_dropout=0.0, **keys)
    counts = (0, 0, *[3] * (ITEMS - 2))  # nobody had items 0 and 1
    ids = tuple(str(number) for number in range(ITEMS))
    return Recommendation(Catalogue(ids, ids, {}), counts, section, None)


ROWS = [([2, 3, 4], [3, 4, 9]), ([5, 6], [6, None]), ([7], [2])]


def test_the_softmax_is_over_known_items_and_means_are_over_places(model):
    task = make_task()
    losses = task.compute_losses(model, make_batch(ROWS), 0.0)
    for row, (inputs, targets) in enumerate(ROWS):
        states = model(torch.tensor([inputs])).last_hidden_state[0]
        logits = model.score(states)[:, 2:]
        kept = [place for place, target in enumerate(targets) if target is not None]
        wanted = torch.tensor([targets[place] - 2 for place in kept])
        assert losses[row].item() == pytest.approx(
            torch.nn.functional.cross_entropy(logits[kept], wanted).item(), abs=1e-5
        )


@pytest.mark.parametrize("loss", ["softmax", "sampled", "gbce"])
def test_a_row_has_the_same_loss_alone_and_each_loss_teaches(model, loss):
    task = make_task(loss=loss, negatives=8)

    def compute(rows):
        torch.manual_seed(0)
        return task.compute_losses(model, make_batch(rows), 0.0)

    together = compute(ROWS)
    assert torch.allclose(compute([ROWS[0]]), together[:1], atol=1e-5)
    (gradient,) = torch.autograd.grad(together.sum(), model.items.id_embeddings.weight)
    assert torch.isfinite(gradient).all()
    assert gradient[2].abs().sum() > 0


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path, tiny_base):
    write_shop(tmp_path, draw_events())
    recipe = tmp_path / "shop.yaml"
    recipe.write_text(
        f"""recipe: 1
name: shop
model: {{base: {tiny_base}, max_length: 20, scratch: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}}}}
tasks:
  next_item:
    type: recommendation
    data: events.csv
    items: {{file: items.csv, text: [title]}}
    recommend: {{loss: sampled, negatives: 8}}
train: {{epochs: 4, tokens_per_batch: 64, precision: float32, early_stop: null}}
evaluate: {{resamples: 100, baselines: [popular]}}
""",
        encoding="utf-8",
    )

    def train(name, stops):
        folder, _ = lay_out(load_recipe(recipe), recipe, tmp_path / name)
        if stops:
            with pytest.raises(Interrupted):
                search(folder, gives_up=Stop(), quiet=True)
            assert has_checkpoint(folder.checkpoints)
        search(folder, quiet=True)
        return load_file(folder.model / "model.safetensors")

    whole, resumed = train("whole", stops=False), train("stopped", stops=True)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


class Stop:
    """Raises what a signal raises, at the second look at validation."""

    def __init__(self):
        self.looks = 0

    def __call__(self, share, metrics):
        self.looks += 1
        if self.looks == 2:
            raise Interrupted("stopped")
        return False
