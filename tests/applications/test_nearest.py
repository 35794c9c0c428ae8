"""The index of a large catalogue: what it finds is what scoring everything finds, and its recall is what it says."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.applications.recommender import load_recommender
from finetune.applications.recommender.nearest import RECALL, NearestItems
from finetune.errors import ResourceError, UsageError

HISTORY = ["B0001", "B0002", "B0108"]


@pytest.fixture(scope="module")
def plain_run(shop_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the shop without its second stage."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(shop_run / "model", folder)
    path = folder / "finetune.json"
    said = json.loads(path.read_text())
    said["task"]["rank"] = None
    path.write_text(json.dumps(said))
    return folder


def draw(items: int, seed: int, *, biased: bool) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Vectors in clusters, as trained ones lie, biases, and states near some of them."""
    generator = np.random.default_rng(seed)
    centres = 2 * generator.standard_normal((max(1, items // 20), 8))
    vectors = centres[generator.integers(0, len(centres), items)] + 0.5 * generator.standard_normal((items, 8))
    states = vectors[generator.integers(0, items, 60)] + 0.3 * generator.standard_normal((60, 8))
    bias = generator.standard_normal(items) if biased else None
    return vectors.astype(np.float32), None if bias is None else bias.astype(np.float32), states.astype(np.float32)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 300), st.integers(0, 10_000), st.booleans())
def test_with_every_cell_it_finds_what_products_find(items, seed, biased):
    vectors, bias, states = draw(items, seed, biased=biased)
    nearest = NearestItems.build(vectors, bias, states)
    nearest.index.nprobe = nearest.index.nlist
    scores = states @ vectors.T + (0 if bias is None else bias)
    found = nearest.search(states, 5)
    count = min(5, items)
    assert found.shape == (len(states), count)
    best = -np.sort(-scores, axis=1)[:, :count]
    np.testing.assert_allclose(np.take_along_axis(scores, found, axis=1), best, rtol=1e-3, atol=1e-3)


def test_recall_is_reached_without_looking_everywhere():
    vectors, bias, states = draw(4000, 3, biased=True)
    nearest = NearestItems.build(vectors, bias, states)
    fresh = draw(4000, 3, biased=True)[2][1::2]
    best = np.argsort(-(fresh @ vectors.T + bias), axis=1)[:, :20]
    recall = np.mean([np.isin(right, some).mean() for right, some in zip(best, nearest.search(fresh, 20), strict=True)])
    assert nearest.recall == pytest.approx(recall)
    assert recall >= RECALL - 0.03  # tuned on the other half of the states
    assert nearest.looks_into < 0.6
    nearest.index.nprobe = 1
    assert np.mean(nearest.search(fresh, 20)[:, :1] == best[:, :1]) < 1  # one cell is not enough


def test_lists_are_those_of_the_exact_index(plain_run):
    exact, found = load_recommender(plain_run), load_recommender(plain_run, index="faiss")
    assert found.nearest is not None
    found.nearest.index.nprobe = found.nearest.index.nlist
    histories = [HISTORY, [], ["B0150"], ["B0001"] * 3]
    for wish in ({}, {"filters": ["price<8"]}, {"diversity": 0.5}, {"exclude_seen": False}, {"top": 500}):
        for right, one in zip(
            exact.recommend_many(histories, **wish), found.recommend_many(histories, **wish), strict=True
        ):
            assert [item.id for item in one.items] == [item.id for item in right.items], wish
            assert [item.by for item in one.items] == [item.by for item in right.items]


def test_the_command_says_how_much_it_finds(command, plain_run):
    done = command("recommend", plain_run, "--history", "B0001,B0002", "--index", "faiss", "--top", 3)
    assert done.code == 0, done.err
    assert "faiss: looks into " in done.err
    assert "% of the first 20." in done.err
    assert len([line for line in done.out.splitlines() if line.startswith("B0")]) == 3
    assert command("recommend", plain_run, "--history", "B0001", "--index", "faiss", "--json").err == ""


def test_what_it_does_not_go_with_is_refused(shop_run, plain_run, monkeypatch):
    with pytest.raises(
        UsageError, match=r"--index faiss: must be for a run without a second stage, whose features need"
    ):
        load_recommender(shop_run, index="faiss")
    with pytest.raises(UsageError, match=r"--index: must be one of exact, faiss, got 'annoy'\."):
        load_recommender(shop_run, index="annoy")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ResourceError, match=r"--index faiss: must have faiss.*pip install faiss-cpu"):
        load_recommender(plain_run, index="faiss")
