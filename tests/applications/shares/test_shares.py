"""Shares of rows whose truth is known; the file that they are corrected by."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.applications.monitor.records import BINS, Tally
from finetune.applications.monitor.shares import fit_quantifier, load_quantifier, save_quantifier
from finetune.errors import DataError, ResourceError
from finetune.evaluation.quantification import compute_ratios, estimate_sld


def test_validation_itself_has_its_prior_by_both_methods(made, validation, quantifier):
    share = quantifier.estimate(made.count(validation[0]))
    assert quantifier.prior == 0.2
    assert share.value == pytest.approx(0.2, abs=1e-6)
    assert share.check == pytest.approx(0.2, abs=1e-6)
    assert share.counted == pytest.approx((validation[0] > 0.5).mean())
    assert share.items == 1000
    assert share.low < 0.2 < share.high


def test_shares_of_new_rows_are_right_where_counting_is_not(made, quantifier):
    generator = np.random.default_rng(8)
    errors = []
    for share in np.linspace(0, 1, 11):
        for _ in range(10):
            found = quantifier.estimate(made.count(made.draw(generator, 200, share)[0]))
            errors.append([abs(each - share) for each in (found.value, found.check, found.counted)])
    sld, pacc, counted = np.mean(errors, axis=0)
    assert sld < 0.03
    assert pacc < 0.035
    assert sld < counted / 2


def test_bins_lose_little(made, quantifier):
    """Against SLD on the probabilities themselves, which are calibrated by construction."""
    generator = np.random.default_rng(9)
    for share in (0.05, 0.2, 0.5, 0.8):
        known, _ = made.draw(generator, 20_000, share)
        exact = float(estimate_sld(np.ones(len(known)), compute_ratios(known, 0.2)))
        assert quantifier.estimate(made.count(known)).value == pytest.approx(exact, abs=0.02)


def test_intervals_cover_the_source_as_often_as_they_say(made):
    """With another validation set each time, whose errors are part of what the interval must carry."""
    generator = np.random.default_rng(10)
    inside = []
    for _ in range(60):
        fitted = fit_quantifier(*made.draw(generator, 300, generator.binomial(300, 0.2) / 300))
        for share in (0.1, 0.3, 0.6):
            size = 1000  # so many that validation is what matters
            tally = made.count(made.draw(generator, size, generator.binomial(size, share) / size)[0])
            found = fitted.estimate(tally, 0.9)
            inside.append(found.low <= share <= found.high)
    assert 0.85 <= np.mean(inside) <= 0.99


def test_more_confidence_more_texts_and_more_validation(made, validation, quantifier):
    tally = made.count(made.draw(np.random.default_rng(11), 200, 0.3)[0])
    narrow, usual = quantifier.estimate(tally, 0.5), quantifier.estimate(tally)
    assert usual.low < narrow.low < narrow.value == usual.value < narrow.high < usual.high
    many = quantifier.estimate(Tally(tally.bins * 100, tally.called * 100))
    assert 0 < many.high - many.low < usual.high - usual.low
    few = fit_quantifier(validation[0][::10], validation[1][::10]).estimate(Tally(tally.bins * 100, tally.called * 100))
    assert few.high - few.low > 2 * (many.high - many.low)


def test_of_no_texts_nothing_is_known(quantifier):
    share = quantifier.estimate(Tally())
    assert (share.value, share.low, share.high, share.items) == (0.2, 0.0, 1.0, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 39), st.floats(0, 1), st.randoms())
def test_order_means_nothing_and_more_negative_texts_never_lower_it(made, quantifier, known, place, higher, random):
    share = quantifier.estimate(made.count(known))
    shuffled = random.sample(known, len(known))
    assert quantifier.estimate(made.count(shuffled)) == share
    moved = list(known)
    moved[place % len(known)] = max(higher, moved[place % len(known)])
    raised = quantifier.estimate(made.count(moved))
    assert raised.value >= share.value - 1e-7
    assert raised.check >= share.check - 1e-12
    assert 0 <= share.low <= share.value <= share.high <= 1


def test_what_is_saved_loads_as_the_same(made, quantifier, tmp_path):
    save_quantifier(tmp_path / "q.json", quantifier)
    again = load_quantifier(tmp_path / "q.json")
    tally = made.count(made.draw(np.random.default_rng(12), 100, 0.4)[0])
    assert again.estimate(tally) == quantifier.estimate(tally)
    assert json.loads((tmp_path / "q.json").read_text())["rows"] == 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"negatives": [1] * 5}, f"negatives must be {BINS} numbers of 0 or more, got something else"),
        ({"variances": [-1.0] * 21}, "variances must be 21 numbers of 0 or more"),
        ({"centres": ["x"] * BINS}, f"centres must be {BINS} numbers"),
        ({"slope": None}, "slope must be a number, got None"),
        ({"intercept": True}, "intercept must be a number, got True"),
        ({"slope": -1.0}, "probabilities that rise, and a slope above 0, got others. Run the recipe's monitor again"),
        ({"others": [0] * BINS}, "must hold counts of both classes"),
        ({"centres": [0.5] * BINS}, "probabilities that rise"),
    ],
)
def test_a_damaged_file_is_refused(quantifier, tmp_path, change, words):
    path = tmp_path / "q.json"
    save_quantifier(path, quantifier)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ResourceError, match=words):
        load_quantifier(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ResourceError, match=r"q.json: must hold how shares are corrected, got nothing there"):
        load_quantifier(tmp_path / "q.json")


def test_rows_that_teach_nothing_are_refused():
    with pytest.raises(DataError, match=r"in \[0, 1\], and its truth, got \(2,\) and \(3,\) values"):
        fit_quantifier([0.1, 0.2], [True, False, True])
    with pytest.raises(DataError, match=r"in \[0, 1\], and its truth"):
        fit_quantifier([0.1, np.nan], [True, False])
    with pytest.raises(DataError, match="must have rows of the negative class and others, got 0 negative of 2"):
        fit_quantifier([0.1, 0.2], [False, False])
    with pytest.raises(DataError, match=r"more likely negative than others, got mean probabilities of 0.09 and 0.89"):
        fit_quantifier([0.1, 0.9] * 50, [True, False] * 50)
