"""Trees as tables: LightGBM's own prediction is what they must come to."""

from __future__ import annotations

import lightgbm
import numpy as np
import pytest

from finetune.tasks.forest import BLOCK, Forest
from finetune.tasks.ranker import TREES

ROWS, FEATURES = 2 * BLOCK + 37, 6


@pytest.fixture(scope="module")
def rows():
    """Numbers of every kind: few that repeat, some missing, some at zero, large ones."""
    generator = np.random.default_rng(0)
    found = generator.normal(size=(ROWS, FEATURES)).astype(np.float32)
    found[:, 1] = generator.integers(0, 4, ROWS)
    found[generator.random(ROWS) < 0.2, 2] = np.nan
    found[generator.random(ROWS) < 0.5, 3] = 0
    found[:, 4] = np.round(found[:, 4], 1) * np.float32(1e6)
    return found


def fit(rows, rounds, seed=0, **settings):
    """Trees on answers that depend on all columns."""
    generator = np.random.default_rng(seed)
    signal = np.nan_to_num(rows) / (1 + np.abs(np.nan_to_num(rows)).mean(axis=0))
    labels = signal.sum(axis=1) + generator.normal(size=len(rows)) > 1
    data = lightgbm.Dataset(rows, labels.astype(np.int32), group=[len(rows)])
    return lightgbm.train(TREES | {"seed": seed} | settings, data, num_boost_round=rounds)


@pytest.mark.parametrize("settings", [{}, {"min_data_in_leaf": 1, "num_leaves": 16}, {"num_leaves": 2}])
def test_scores_are_those_of_lightgbm(rows, settings):
    trees = fit(rows, 60, **settings)
    forest = Forest.build(trees)
    np.testing.assert_allclose(forest.score(rows), trees.predict(rows), rtol=0, atol=1e-12)
    # Where training missed nothing, zeros stand for what is missing.
    holes = np.where(np.random.default_rng(1).random(rows.shape) < 0.3, np.float32(np.nan), rows)
    np.testing.assert_allclose(forest.score(holes), trees.predict(holes), rtol=0, atol=1e-12)
    far = np.where(np.random.default_rng(2).random(rows.shape) < 0.5, np.float32(np.inf), np.float32(-np.inf))
    np.testing.assert_allclose(forest.score(far), trees.predict(far), rtol=0, atol=1e-12)


def test_a_value_at_a_threshold_goes_where_lightgbm_sends_it(rows):
    trees = fit(rows, 60)
    forest = Forest.build(trees)
    for feature, thresholds in zip(forest.features, forest.thresholds, strict=True):
        beside = [np.nextafter(thresholds, np.float32(end)) for end in (-np.inf, np.inf)]
        values = np.concatenate([thresholds, *beside])
        values = values[np.abs(values) > 1e-34]  # smaller ones LightGBM takes for 0
        near = rows[np.arange(len(values)) % ROWS].copy()
        near[:, feature] = values
        np.testing.assert_allclose(forest.score(near), trees.predict(near), rtol=0, atol=1e-12)


def test_trees_that_never_split_and_no_rows(rows):
    trees = fit(rows, 3, min_data_in_leaf=ROWS)
    forest = Forest.build(trees)
    assert forest.features == ()
    np.testing.assert_allclose(forest.score(rows), trees.predict(rows), rtol=0, atol=1e-12)
    assert Forest.build(fit(rows, 3)).score(rows[:0]).shape == (0,)
