"""What intents and entries say of each other: by hand, and the fit against scikit-learn's optimum."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.applications.support.links import UNSEEN, Links, fit_exponents, load_links, save_links
from finetune.errors import ResourceError

INTENTS = ["cancel", "refund"]
MESSAGES = [
    ("cancel", ["c"]),
    ("cancel", ["c"]),
    ("refund", ["r"]),
    ("refund", ["c", "r"]),
    (None, ["c"]),
    ("refund", []),
]


@pytest.fixture
def links():
    return Links.count(INTENTS, MESSAGES)


def test_messages_are_counted_and_those_out_of_scope_are_not(links):
    assert links.entries == ["c", "r"]
    assert links.counts.tolist() == [[2, 0], [1, 2]]


def test_entries_by_their_intents(links):
    places = links.align(["r", "new", "c"])
    assert places.tolist() == [1, -1, 0]
    of_cancel = (np.array([2, 0]) + UNSEEN) / (2 + 2 * UNSEEN)
    of_refund = (np.array([1, 2]) + UNSEEN) / (3 + 2 * UNSEEN)
    mixed = 0.7 * of_cancel + 0.3 * of_refund
    found = links.weigh_entries(np.array([0.7, 0.3], dtype=np.float32), places)
    assert found == pytest.approx(np.log([mixed[1], 0.5, mixed[0]]), rel=1e-6)


def test_intents_by_the_entries_found(links):
    scores, shares = np.array([0.5, 0.5], dtype=np.float32), np.array([0.8, 0.1, 0.1])
    places = links.align(["c", "r", "new"])
    of_c, of_r = (np.array([2, 1]) + UNSEEN) / (3 + 2 * UNSEEN), (np.array([0, 2]) + UNSEEN) / (2 + 2 * UNSEEN)
    suggested = 0.8 * of_c + 0.1 * of_r + 0.1 / 2
    evidence = links.collect_evidence(scores, shares, places)
    assert evidence == pytest.approx(np.log(np.column_stack([scores, suggested])))
    fitted = Links(links.intents, links.entries, links.counts, own=0.0, linked=1.0)
    assert fitted.weigh_intents(scores, shares, places) == pytest.approx(suggested / suggested.sum(), rel=1e-5)
    assert links.weigh_intents(scores, shares, places) == pytest.approx(scores)  # as it stands the model's word is all


def test_without_messages_nothing_is_said():
    none = Links.count(INTENTS, [])
    places = none.align(["a", "b"])
    scores = np.array([0.9, 0.1], dtype=np.float32)
    assert none.weigh_entries(scores, places).tolist() == [0.0, 0.0]
    assert none.weigh_intents(scores, np.array([0.5, 0.5]), places) == pytest.approx(scores)


def test_the_exponents_make_what_came_likeliest():
    generator = np.random.default_rng(5)
    evidence = [np.log(generator.dirichlet(np.ones(4), size=2).T) for _ in range(400)]  # (4, 2)
    true = np.array([0.8, 0.4])
    weights = [np.exp(found @ true) for found in evidence]
    truth = [int(generator.choice(4, p=weight / weight.sum())) for weight in weights]

    def compute_loss(own, linked):
        logits = [found @ [own, linked] for found in evidence]
        return np.mean([np.log(np.exp(each).sum()) - each[place] for each, place in zip(logits, truth, strict=True)])

    own, linked = fit_exponents(evidence, truth)
    assert [own, linked] == pytest.approx(true, abs=0.15)
    around = [(own + a, linked + b) for a in (-0.01, 0, 0.01) for b in (-0.01, 0, 0.01)]
    assert compute_loss(own, linked) <= min(compute_loss(*place) for place in around) + 1e-9
    assert fit_exponents([], []) == (1.0, 0.0)


def test_what_is_saved_loads_as_the_same_and_the_rest_is_refused(links, tmp_path):
    path = tmp_path / "links.json"
    save_links(path, links)
    assert load_links(path, INTENTS).to_json() == links.to_json()
    with pytest.raises(
        ResourceError, match=r"must hold counts of this model's intents and entries, got others\. Build"
    ):
        load_links(path, ["refund", "cancel"])
    for change in ({"counts": [[1]]}, {"own": "much"}, {"linked": float("nan")}):
        path.write_text(json.dumps(links.to_json() | change))
        with pytest.raises(ResourceError, match="must hold counts"):
            load_links(path, INTENTS)
