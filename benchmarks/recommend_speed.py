"""Speed of recommendation: one person, and many, against a large catalogue, beside the bare matrix products.

The catalogue, what was counted and the people are drawn at random, in the sizes of a shop: speed does not depend on
what they say. The sequence model has random weights, the trees are fitted on random answers. One person is asked for
with and without reasons. Many people are ranked in one call, without reasons; in turns with it, in the same process,
the matrix products are timed that this cannot do without: each history's state with every item's vector, and, where
there are two stages, the mean of its texts with every item's text. Machines are shared and noisy: read the share, which
compares neighbours in time.

To repeat, on a machine that does nothing else:

    .venv/bin/python benchmarks/recommend_speed.py --json recommend.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import compute_ratio, describe_machine, read_clock, read_peak_mb, run_alone, write_json

SEED = 13
WIDTH, TEXT_WIDTH = 64, 384
NEIGHBOURS = 50
"""Pairs of each item in every matrix of counts."""
LONGEST = 60
"""Events of a history, at most."""
WARM_UP = 5


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    items: int
    people: int
    single: int
    rounds: int


@dataclass(frozen=True)
class Outcome:
    """Of one recommender: one person at a time, then all in one call and the products alone, in rounds."""

    p50_ms: float
    p95_ms: float
    with_reasons_p50_ms: float
    with_reasons_p95_ms: float
    people_per_second: tuple[float, ...]
    ceiling_per_second: tuple[float, ...]
    peak_mb: float


def build_recommender(items: int, *, rank: bool) -> Any:
    """A recommender over random items."""
    from finetune.applications.recommender.recommender import Recommender
    from finetune.data.interactions import Catalogue
    from finetune.recipe.schema import RankSection, RecommendSection
    from finetune.tasks.recommendation import Recommendation

    generator = np.random.default_rng(SEED)
    prices = generator.lognormal(2, 1, items).round(2).tolist()
    kinds = [f"kind {kind}" for kind in generator.integers(0, 30, items).tolist()]
    ids = tuple(f"item {number}" for number in range(items))
    catalogue = Catalogue(ids, ids, {"price": tuple(prices), "kind": tuple(kinds)})
    known = tuple(generator.poisson(3, items).tolist())
    features = [*RankSection().features, "price", "kind"]
    section = RankSection(features=features) if rank else None
    task = Recommendation(catalogue, known, RecommendSection(), section)
    recommender = Recommender(task, build_model(items, generator), 50, build_counts(items, generator))
    if not rank:
        return recommender
    return Recommender(task, recommender.model, 50, recommender.counts, fit_trees(recommender))


def build_model(items: int, generator: np.random.Generator) -> Any:
    """A sequence model of the recipe's size, with texts."""
    import torch

    from finetune.models.next_item import ItemChoices, build_next_item
    from finetune.recipe.schema import ModelSection, ScratchSection
    from finetune.tasks.items import normalize

    texts = torch.from_numpy(normalize(generator.standard_normal((items, TEXT_WIDTH), np.float32)))
    scratch = ScratchSection(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, position="learned")
    section = ModelSection(max_length=50, scratch=scratch)
    model = build_next_item(section, items, texts, None, ItemChoices(bias=True), seed=SEED)
    return model.eval().requires_grad_(False)


def build_counts(items: int, generator: np.random.Generator) -> Any:
    """Pairs of items drawn by popularity, which follows Zipf's law."""
    from scipy import sparse

    from finetune.tasks.items import RECENT_DAYS, WINDOWS, Counts

    popularity = 1e5 / np.arange(1, items + 1)
    shares = popularity / popularity.sum()
    starts = np.arange(0, items * NEIGHBOURS + 1, NEIGHBOURS)

    def draw() -> Any:
        others = generator.choice(items, items * NEIGHBOURS, p=shares).astype(np.int32)
        matrix = sparse.csr_matrix((generator.random(len(others), np.float32), others, starts), shape=(items, items))
        matrix.sum_duplicates()
        return matrix

    matrices = {f"follows {window}": draw() for window in WINDOWS} | {"precedes": draw(), "ease": draw()}
    vectors = {"popularity": popularity, "age": generator.random(items) * 300}
    vectors |= {f"popularity {days}": np.floor(popularity * days / 1000) for days in RECENT_DAYS}
    return Counts(matrices, {name: vector.astype(np.float32) for name, vector in vectors.items()})


def fit_trees(recommender: Any) -> Any:
    """Trees fitted on answers that are candidates at random."""
    from finetune.applications.recommender.histories import read_histories
    from finetune.tasks import ranker
    from finetune.tasks.recommendation import compute_sequence_scores

    fresh = recommender.task.build_ranker(recommender.model, recommender.counts)
    histories = read_histories(draw_histories(recommender, 40, SEED + 1), recommender.task.catalogue).histories
    table = fresh.build_table(histories, compute_sequence_scores(recommender.model, histories, 50))
    generator = np.random.default_rng(SEED)
    answers = [generator.choice(table.item[table.request == row], 5) for row in range(len(histories))]
    return ranker.fit_trees([table], [answers], SEED)


def draw_histories(recommender: Any, people: int, seed: int) -> list[list[str]]:
    """What people had, by popularity."""
    generator = np.random.default_rng(seed)
    popularity = recommender.counts.vectors["popularity"].astype(float)
    lengths = generator.integers(1, LONGEST, people)
    drawn = generator.choice(len(popularity), int(lengths.sum()), p=popularity / popularity.sum())
    ids = recommender.task.catalogue.ids
    return [[ids[item] for item in part] for part in np.split(drawn, np.cumsum(lengths)[:-1])]


def time_single(answer: Callable[[list[str]], Any], histories: list[list[str]]) -> tuple[float, float]:
    """p50 and p95 in milliseconds."""
    found = []
    for place, history in enumerate(histories):
        start = read_clock()
        answer(history)
        if place >= WARM_UP:
            found.append(1000 * (read_clock() - start))
    return statistics.median(found), statistics.quantiles(found, n=20, method="inclusive")[-1]


def time_products(recommender: Any, people: int) -> float:
    """Seconds of the dense products for so many people, in the chunks that the recommender takes."""
    import torch

    from finetune.applications.recommender.recommender import choose_chunk

    items = len(recommender.task.catalogue.ids)
    step = choose_chunk(items)
    widths = [WIDTH, TEXT_WIDTH] if recommender.trees is not None else [WIDTH]
    pairs = [(torch.randn(step, width), torch.randn(items, width).T) for width in widths]
    results = [torch.empty(len(left), items) for left, _ in pairs]
    start = read_clock()
    for _ in range(0, people, step):
        for (left, right), result in zip(pairs, results, strict=True):
            torch.mm(left, right, out=result)
    return read_clock() - start


def measure(setting: Setting, rank: bool) -> Outcome:
    """One recommender; call it in a fresh process."""
    recommender = build_recommender(setting.items, rank=rank)
    alone = draw_histories(recommender, setting.single + WARM_UP, SEED + 2)
    plain = time_single(lambda history: recommender.recommend(history, explain=False), alone)
    explained = time_single(recommender.recommend, alone)
    everyone = draw_histories(recommender, setting.people, SEED + 3)
    recommender.recommend_many(everyone[:100], explain=False)
    time_products(recommender, 100)
    ours, ceiling = [], []
    for _ in range(setting.rounds):
        start = read_clock()
        recommender.recommend_many(everyone, explain=False)
        ours.append(setting.people / (read_clock() - start))
        ceiling.append(setting.people / time_products(recommender, setting.people))
    return Outcome(*plain, *explained, tuple(ours), tuple(ceiling), read_peak_mb())


def build_table(found: dict[str, Outcome]) -> str:
    """As Markdown."""
    lines = [
        "| stages | one person p50 ms | p95 ms | with reasons p50 ms | p95 ms | people/s | of ceiling | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        lines.append(
            f"| {name} | {one.p50_ms:.1f} | {one.p95_ms:.1f} | {one.with_reasons_p50_ms:.1f} "
            f"| {one.with_reasons_p95_ms:.1f} | {statistics.median(one.people_per_second):,.0f} "
            f"| {compute_ratio(one.people_per_second, one.ceiling_per_second):.1%} | {one.peak_mb:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--people", type=int, default=10_000, help="ranked in one call")
    parser.add_argument("--single", type=int, default=200, help="people who are asked for one at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="write every round to this file")
    options = parser.parse_args()
    machine = run_alone(describe_machine)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    setting = Setting(options.items, options.people, options.single, options.rounds)
    found = {name: run_alone(measure, setting, rank) for name, rank in (("sequence", False), ("both", True))}
    write_json(options.json, machine=machine, setting=setting, found=found)
    print(f"\n{build_table(found)}")


if __name__ == "__main__":
    main()
