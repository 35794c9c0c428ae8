"""Thresholds: streams in which nothing changes are alerted as often as stated, with a reference that is estimated."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import nbinom, poisson

from finetune.applications.monitor import thresholds as module
from finetune.applications.monitor.detectors import (
    Usual,
    compute_ewma,
    compute_gain,
    compute_score,
    compute_spread,
    compute_surprise,
    count_guard,
    judge_streams,
    update_cusum,
    update_ewma,
)
from finetune.applications.monitor.thresholds import (
    SHARES,
    SIZES,
    choose_thresholds,
    draw_streams,
    load_thresholds,
    merge_bins,
    save_thresholds,
)
from finetune.errors import ResourceError
from finetune.recipe.applications import MonitorSection

SECTION = MonitorSection(reference_windows=16, false_alarm_windows=100, rise=0.1)
PERFECT = np.array([1e-9, 1e9])
"""Ratios of two bins that tell all."""
USUAL = Usual(np.array(0.2), np.array(1 / (0.2 * 0.8)), np.array(1600))


@pytest.fixture(scope="module")
def chosen(quantifier):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SIZES", (50, 100))
        patch.setattr(module, "SHARES", (0.1, 0.3))
        patch.setattr(module, "BURSTS", 1000)
        return choose_thresholds(quantifier, SECTION, 3, streams=400, windows=100)


# The tests by hand


def test_gain_and_score_with_a_perfect_model_by_hand():
    counts = np.array([70, 30])
    gain = 30 * np.log(0.3 / 0.2) + 70 * np.log(0.7 / 0.8)
    assert compute_gain(counts, PERFECT, USUAL, 0.1) == pytest.approx(gain)
    assert compute_score(counts, PERFECT, USUAL) == pytest.approx(
        (0.3 - 0.2) * 100 / (0.2 * 0.8)
    )  # distance x information
    assert (
        compute_gain(counts, PERFECT, Usual(np.array(0.95), USUAL.information, USUAL.items), 0.1) < -100
    )  # 1, not 1.05


def test_cusum_and_ewma_by_hand():
    assert update_cusum(1.0, -3.0, 1.0) == 0
    assert update_cusum(1.0, 3.0, 2.0) == 2.5  # stories halve what a window says
    moments = update_ewma(update_ewma([0, 0, 0], 10.0, 4.0), 20.0, 4.0)
    assert moments == pytest.approx([0.1 * 0.9 * 10 + 0.1 * 20, (0.01 * 0.81 + 0.01) * 4, (0.1 * 0.9 + 0.1) * 4])
    assert update_ewma(moments, 0.0, 0.0) == pytest.approx(moments)  # an empty window says nothing
    error = moments[1] + moments[2] ** 2 / (1600 / 0.16)
    assert compute_ewma(moments, USUAL, 1.0) == pytest.approx(moments[0] / np.sqrt(error))
    assert compute_ewma(moments, USUAL, 4.0) == pytest.approx(moments[0] / np.sqrt(error) / 2)
    assert compute_ewma([0, 0, 0], USUAL, 1.0) == 0
    assert (compute_spread(48.0, 16), compute_spread(8.0, 16), compute_spread(0.0, 0)) == (3, 1, 1)


def test_the_surprise_is_the_tail_of_scipys_distributions():
    items = np.array([0, 1, 5, 30, 80])
    size = 10.0**2 / (40 - 10)
    tail = nbinom.sf(items - 1, size, size / (size + 10))
    assert compute_surprise(items, 10.0, 40.0) == pytest.approx(-np.log10(tail))
    assert compute_surprise(items, 10.0, 4.0) == pytest.approx(-np.log10(poisson.sf(items - 1, 10)))
    assert compute_surprise(2, 0.0, 0.0) == pytest.approx(-np.log10(poisson.sf(1, 1)))  # a silent topic
    assert np.isfinite(compute_surprise(10**6, 10.0, 4.0))


# Rates of false alarms


def count_alerts(counts, ratios, chosen, place):
    """First alerts of the share's tests, by level: windows for each."""
    cusum, ewma = judge_streams(counts, ratios, SECTION.reference_windows, SECTION.rise)
    lengths = {}
    for level in ("warning", "alarm"):
        over = (cusum > chosen.cusum[level][place]) | (ewma > chosen.ewma[level][place])
        run = np.where(over.any(axis=0), over.argmax(axis=0) + 1, len(over))
        lengths[level] = run.sum() / max(over.any(axis=0).sum(), 1)  # the exponential's, with censored runs
    return lengths


@pytest.mark.parametrize(("place", "size", "share"), [((0, 0), 50, 0.1), ((1, 1), 100, 0.3)])
def test_unchanged_streams_are_alerted_as_often_as_stated(quantifier, chosen, place, size, share):
    # All bins, and streams of other draws than those that the thresholds were chosen with.
    rates = np.stack([each / each.sum() for each in (quantifier.negatives, quantifier.others)])
    counts = draw_streams(rates, size, [share] * 116, np.random.default_rng(99), 400)
    lengths = count_alerts(counts, quantifier.ratios, chosen, place)
    stated = 100 / (1 - module.VOLUME_PART)
    assert 0.75 * stated < lengths["warning"] < 1.4 * stated
    assert lengths["alarm"] > 4 * lengths["warning"]


def test_a_rise_is_found_soon_and_stories_raise_no_more_false_alarms(quantifier, chosen):
    generator = np.random.default_rng(98)
    rates = np.stack([each / each.sum() for each in (quantifier.negatives, quantifier.others)])
    counts = draw_streams(rates, 100, [0.3] * 20 + [0.4] * 30, generator, 200)
    cusum, ewma = judge_streams(counts, quantifier.ratios, 16, 0.1)
    over = ((cusum > chosen.cusum["warning"][1, 1]) | (ewma > chosen.ewma["warning"][1, 1]))[4:]
    assert np.median(over.argmax(axis=0) + 1) <= 5
    # Windows of stories of five texts each: as many texts, five times the variance.
    stories = 5 * draw_streams(rates, 20, [0.3] * 116, generator, 400)
    lengths = count_alerts(stories, quantifier.ratios, chosen, (1, 1))
    assert lengths["warning"] > 60


def test_bursts_are_as_rare_as_stated_for_any_volume(chosen):
    generator = np.random.default_rng(97)
    for volume, dispersion in [(20, 0.0), (100, 0.3), (1000, 0.05)]:
        rate = generator.gamma(1 / dispersion, volume * dispersion, (2000, 36)) if dispersion else float(volume)
        items = generator.poisson(rate, (2000, 36))
        reference = items[:, :16]
        surprise = compute_surprise(
            items[:, 16:], reference.mean(1, keepdims=True), reference.var(1, ddof=1, keepdims=True)
        )
        assert (surprise > chosen.burst["warning"]).mean() < 1.3 * module.VOLUME_PART / 100
        assert (surprise > chosen.burst["alarm"]).mean() < 0.3 * module.VOLUME_PART / 100


def test_merged_bins_keep_what_the_bins_say(quantifier):
    rates, ratios = merge_bins(quantifier)
    assert rates.shape[1] <= module.MERGED
    assert rates.sum(axis=1) == pytest.approx([1, 1])
    assert (np.diff(ratios) > 0).all()
    assert rates[0] @ (ratios / (1 + ratios)) == pytest.approx(0.88, abs=0.03)


def test_the_same_seed_gives_the_same_thresholds(quantifier, monkeypatch):
    monkeypatch.setattr(module, "SIZES", (50,))
    monkeypatch.setattr(module, "SHARES", (0.1,))
    monkeypatch.setattr(module, "BURSTS", 100)
    first, second, other = (choose_thresholds(quantifier, SECTION, seed, streams=50, windows=20) for seed in (1, 1, 2))
    assert first.cusum["warning"] == second.cusum["warning"] != other.cusum["warning"]
    assert first.burst == second.burst != other.burst


# Between the places of the table, and the file


def build_table():
    """Thresholds that say where they stand: 1000 times the size's number, and the share's number."""
    rows = np.arange(len(SIZES))[:, None] * 1000.0 + np.arange(len(SHARES)) + 1
    chosen_for = {"reference_windows": 16, "false_alarm_windows": 100, "rise": 0.1}
    return module.Thresholds(
        {"warning": rows, "alarm": 2 * rows},
        {"warning": rows, "alarm": rows},
        {"warning": 3.0, "alarm": 5.0},
        chosen_for,
    )


def test_thresholds_between_the_places_by_hand():
    table = build_table()
    assert table.find("cusum", "warning", SIZES[1], SHARES[2]) == pytest.approx(1003)
    assert table.find("cusum", "alarm", SIZES[1], SHARES[2]) == pytest.approx(2006)
    assert table.find("ewma", "warning", (SIZES[0] * SIZES[1]) ** 0.5, SHARES[0]) == pytest.approx(501)
    assert table.find("ewma", "warning", SIZES[0], (SHARES[0] + SHARES[1]) / 2) == pytest.approx(1.5)
    assert table.find("ewma", "warning", 0, 0) == pytest.approx(1)
    assert table.find("ewma", "warning", 10**6, 1) == pytest.approx(1000 * (len(SIZES) - 1) + len(SHARES))
    assert table.find("burst", "alarm", 7, 0.5) == 5


def test_what_is_saved_loads_as_the_same(tmp_path):
    save_thresholds(tmp_path / "t.json", build_table())
    again = load_thresholds(tmp_path / "t.json")
    assert (again.cusum["alarm"] == build_table().cusum["alarm"]).all()
    assert (again.burst, again.chosen_for) == (build_table().burst, build_table().chosen_for)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": [1]}, r"must be a table of sizes \(5, 20"),
        ({"cusum": {"warning": [[1.0]], "alarm": [[1.0]]}}, "cusum.warning must be 6 x 4 above 0, got something else"),
        ({"ewma": None}, "ewma.warning must be 6 x 4 above 0"),
        ({"burst": {"warning": 1.0}}, "burst.alarm must be a number above 0, got something else. Run"),
        ({"burst": {"warning": -1.0, "alarm": 1.0}}, "burst.warning must be a number above 0"),
        ({"chosen_for": 3}, "chosen_for must say what the thresholds hold for, got 3"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, words):
    path = tmp_path / "t.json"
    save_thresholds(path, build_table())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ResourceError, match=words):
        load_thresholds(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ResourceError, match=r"t.json: must hold the thresholds of the tests, got nothing there"):
        load_thresholds(tmp_path / "t.json")


def test_the_guard_by_hand():
    assert [count_guard(windows) for windows in (8, 48, 100)] == [8, 12, 25]
