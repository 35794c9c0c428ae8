"""How sure an entry is: evidence by hand, and the fit against scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from finetune.applications.support.relevance import (
    Relevance,
    collect_evidence,
    fit_relevance,
    load_relevance,
    save_relevance,
)
from finetune.errors import ResourceError


def test_evidence_by_hand():
    cosines = np.array([0.5, 0.9, 0.1], dtype=np.float32)
    evidence = collect_evidence(cosines, [3.0, 1.5, 0.0], [-1.0, -2.0], [1, 2], [0.8, 0.5])
    shares = np.exp(20 * cosines.astype(float)) / np.exp(20 * cosines.astype(float)).sum()
    assert evidence[:, 0] == pytest.approx([0.9, 0.1])
    assert evidence[:, 1] == pytest.approx(np.log(shares[[1, 2]]))
    assert evidence[:, 2] == pytest.approx([0.5, 0.0])
    assert evidence[:, 3] == pytest.approx([-1.0, -2.0])
    assert evidence[:, 4] == pytest.approx([np.log(4), 0], abs=1e-6)


def test_no_shared_word_is_no_evidence():
    assert np.isfinite(collect_evidence([0.2, 0.3], [0.0, 0.0], [0, 0], [0, 1], [0.0, 1.0])).all()


def test_without_a_fit_the_second_look_decides():
    probabilities = Relevance().compute_probabilities(collect_evidence([0.2, 0.3], [1, 2], [0, 0], [0, 1], [0.8, 0.25]))
    assert probabilities == pytest.approx([0.8, 0.25])


def test_the_fit_is_a_logistic_regression_over_all_candidates():
    generator = np.random.default_rng(3)
    evidence = [generator.normal(size=(4, 5)) for _ in range(30)]
    right = [found[:, 0] + found[:, 4] + 0.3 * generator.normal(size=4) > 0.5 for found in evidence]
    expected = LogisticRegression(C=10.0, max_iter=1000).fit(np.concatenate(evidence), np.concatenate(right))
    probabilities = fit_relevance(evidence, right).compute_probabilities(evidence[0])
    assert probabilities == pytest.approx(expected.predict_proba(evidence[0])[:, 1])


def test_a_second_look_that_does_not_help_has_no_weight():
    generator = np.random.default_rng(3)
    evidence = [generator.normal(size=(4, 5)) for _ in range(60)]
    right = [found[:, 0] + 0.3 * generator.normal(size=4) > 0.5 for found in evidence]
    fitted = fit_relevance(evidence, right)
    assert fitted.reread == 0
    without = np.concatenate(evidence)[:, :4]
    expected = LogisticRegression(C=10.0, max_iter=1000).fit(without, np.concatenate(right))
    assert [fitted.cosine, fitted.share, fitted.words, fitted.asked] == pytest.approx(expected.coef_[0], abs=1e-3)


def test_entries_without_links_have_a_fit_of_their_own():
    generator = np.random.default_rng(3)
    evidence = [generator.normal(size=(4, 5)) for _ in range(60)]
    right = [found[:, 0] + found[:, 3] + 0.3 * generator.normal(size=4) > 0.5 for found in evidence]
    fitted = fit_relevance(evidence, right).unlinked
    without = np.concatenate(evidence)[:, :3]
    expected = LogisticRegression(C=10.0, max_iter=1000).fit(without, np.concatenate(right))
    assert (fitted.asked, fitted.unlinked) == (0, None)
    assert [fitted.cosine, fitted.share, fitted.words] == pytest.approx(expected.coef_[0], abs=1e-3)


@pytest.mark.parametrize("truth", [True, False])
def test_where_nothing_differs_nothing_is_fitted(truth):
    assert fit_relevance([np.ones((2, 5))], [np.full(2, truth)]) == Relevance()


def test_what_is_saved_loads_as_the_same_and_the_rest_is_refused(tmp_path):
    path = tmp_path / "relevance.json"
    with pytest.raises(ResourceError, match=r"must hold how entries are weighed, got nothing there. Build"):
        load_relevance(path)
    relevance = Relevance(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, unlinked=Relevance(7.0))
    save_relevance(path, relevance)
    assert load_relevance(path) == relevance
    path.write_text('{"intercept": 1, "cosine": 2, "share": 3, "words": 4, "asked": 5, "reread": 6}')  # older runs
    assert load_relevance(path) == replace(relevance, unlinked=None)
    path.write_text('{"intercept": "1"}')
    with pytest.raises(
        ResourceError, match="must hold the numbers intercept, cosine, share, words, asked, reread, got"
    ):
        load_relevance(path)
