"""What the benchmarks compute and parse; their measurements are no tests."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from finetune.artifact.run_folder import RunFolder, save_json
from finetune.recipe import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    """A script, with its folder on the path as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


measuring, train_speed, predict_speed, attention_cost, results_table = map(
    load, ["measuring", "train_speed", "predict_speed", "attention_cost", "results_table"]
)
SCRIPTS = [train_speed, predict_speed, attention_cost]
LENGTHS = [3, 5, 5, 8]
SHAPE = measuring.Shape(layers=3, width=12, inner=20, heads=2)


# The products that the ceiling counts


def count_bert(trained: str | None) -> int:
    """Operations that PyTorch counts in BERT on rows of LENGTHS, one by one; `trained` names the weights that learn."""
    config = BertConfig(
        vocab_size=30,
        hidden_size=SHAPE.width,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        intermediate_size=SHAPE.inner,
        attn_implementation="eager",
    )
    model = BertModel(config, add_pooling_layer=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is not None and re.search(trained, name) is not None)
    with FlopCounterMode(display=False) as counter:
        for length in LENGTHS:
            states = model(torch.arange(length)[None]).last_hidden_state
            if trained is not None:
                states.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("predict", None),
        ("full", "."),
        # Training biases alone costs the gradients of inputs and none of weights: LoRA of rank 0.
        ("all-linear", r"encoder.*(self|dense).*bias"),
        ("query-value", r"(query|value)\.bias"),
    ],
)
def test_the_ceiling_counts_what_pytorch_does(method: str, trained: str | None):
    products = measuring.list_products(SHAPE, LENGTHS, method, rank=0)
    assert measuring.count_operations(products) == count_bert(trained)


def test_an_update_costs_its_merge_and_four_products():
    """Query and value of three layers, 21 tokens, width 12: 2 (r D^2) for B A, and 2 (N D r) for each of the others."""
    with_update, without = (
        measuring.count_operations(measuring.list_products(SHAPE, LENGTHS, "query-value", rank=rank)) for rank in (4, 0)
    )
    assert with_update - without == 3 * 2 * (2 * 4 * 12 * 12 + 4 * 2 * 21 * 12 * 4)


def test_every_product_of_every_batch_is_timed(monkeypatch: pytest.MonkeyPatch):
    multiplied: list[tuple[int, ...]] = []

    def record(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        assert out.shape[-2:] == (a.shape[-2], b.shape[-1])
        multiplied.append((a.shape[0] if a.ndim == 3 else 1, a.shape[-2], a.shape[-1], b.shape[-1]))
        return out

    monkeypatch.setattr(torch, "mm", record)
    monkeypatch.setattr(torch, "bmm", record)
    batches = [measuring.list_products(SHAPE, rows, "all-linear") for rows in ([3, 5], [8], [2, 2, 2])]
    seconds = measuring.time_products(batches, "float32")
    warm_up = len(batches[0])
    assert multiplied[warm_up:] == [product for products in batches for product in products]
    assert len(seconds) == 3


# Medians, ratios, tables


def test_a_ratio_compares_neighbours_in_time():
    """Twice as fast in every round, though the second round was slow for both: medians would say 4 / 3."""
    assert measuring.compute_ratio([8.0, 2.0, 4.0, 6.0], [4.0, 1.0, 2.0, 3.0]) == 2.0
    assert measuring.compute_ratio([8.0, 2.0, 4.0], [4.0, 1.0, 4.0]) == 2.0


def test_results_are_written_with_what_they_were_made_with(tmp_path: Path):
    path = tmp_path / "out.json"
    setting = attention_cost.Setting((256,), 1)
    measuring.write_json(path, setting=setting, rows={"a": [[attention_cost.Cost(256, 1.5, 2.0)]]})
    measuring.write_json(None, setting=setting)
    assert measuring.json.loads(path.read_text(encoding="utf-8")) == {
        "setting": {"lengths": [256], "threads": 1},
        "rows": {"a": [[{"length": 256, "milliseconds": 1.5, "peak_mb": 2.0}]]},
    }


def get_cells(table: str, name: str) -> list[str]:
    """The cells of the row of a Markdown table that begins with a name."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_training_is_shown_against_both_trainers_and_the_ceiling():
    build = train_speed.Outcome
    found = {
        "trainer": [build(10.0, 0.5, 900.0)],
        "trainer_best": [build(20.0, 0.6, 1800.0)],
        "finetune": [build(50.0, 0.7, 700.0)],
        "ceiling": [build(80.0)],
    }
    table = train_speed.build_table(found)
    assert get_cells(table, "finetune") == ["finetune", "50.0", "5.00", "2.50", "62.5%", "0.7000", "700"]
    assert get_cells(table, "ceiling") == ["ceiling", "80.0", "8.00", "4.00", "100.0%", "", ""]
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_prediction_is_faster_where_its_time_is_shorter():
    build = predict_speed.Outcome
    found = {
        "pipeline": [build(100.0, 8.0, 12.0, 500.0, ("a", "b"))],
        "finetune": [build(450.0, 4.0, 5.0, 400.0, ("a", "c"))],
        "ceiling": [build(900.0, 2.0, 3.0)],
    }
    table = predict_speed.build_table(found)
    assert get_cells(table, "finetune") == ["finetune", "450.0", "4.50", "50.0%", "4.00", "2.00", "5.00", "400"]
    assert get_cells(table, "ceiling")[-2:] == ["3.00", ""]
    assert predict_speed.compute_agreement(found) == {"finetune": 0.5}
    assert predict_speed.drop_labels(found["ceiling"][0]).keys() == {"rows_per_second", "p50_ms", "p95_ms", "peak_mb"}


def test_variants_that_answer_differently_are_not_compared():
    predict_speed.check_agreement({"finetune": 0.9995})
    message = "must give the pipeline's label to 99.9% of the rows, got finetune_native 100.00%, finetune 99.80%"
    with pytest.raises(SystemExit, match=re.escape(message)):
        predict_speed.check_agreement({"finetune_native": 1.0, "finetune": 0.998})


def test_percentiles_are_numpys():
    milliseconds = np.random.default_rng(0).gamma(2, size=37).tolist()
    assert predict_speed.compute_percentiles(milliseconds) == pytest.approx(np.percentile(milliseconds, [50, 95]))


@pytest.mark.parametrize(("count", "expected"), [(3, [0, 4, 8]), (10, list(range(10))), (99, list(range(10)))])
def test_single_rows_come_from_all_over_the_file(count: int, expected: list[int]):
    assert list(predict_speed.pick_single(list(range(10)), count)) == expected


def test_an_assistant_has_a_row_of_what_became_of_the_questions_in_scope(tmp_path: Path):
    """Two seeds: the mean of .80 and .86, and each with its interval."""
    recipe = load_recipe(BENCHMARKS.parent / "recipes" / "support.yaml")
    recipes, runs = [], []
    for seed, right in ((13, 0.80), (17, 0.86)):
        run = RunFolder(tmp_path / str(seed))
        (run.path / "support").mkdir(parents=True)
        save_json(run.status, {"training": {"parameters": {"trained": 3, "total": 100}, "seconds": 600}})
        shares = {"right": right, "wrong": 0.05, "asked_back": 0.03, "handed_over": 0.92 - right}
        found = {key: {"value": value, "low": value - 0.01, "high": value + 0.02} for key, value in shares.items()}
        save_json(run.path / "support" / "test.json", {"all": {}, "in_scope": found})
        runs.append(run)
        recipes.append(recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})}))
    name = "support, end to end in scope (illustrative sample)"
    _, tuning, score, seeds, *rest = get_cells(results_table.build_assistant_row(runs, recipes), name)
    assert (tuning, rest) == ("lora", ["", "3.0%", "10"])
    assert score == "**0.830** right, 0.050 wrong, 0.030 asked back, 0.090 handed over"
    both = "wrong 0.050 (0.040 to 0.070), asked back 0.030 (0.020 to 0.050)"
    assert seeds == (
        f"13: right 0.800 (0.790 to 0.820), {both}, handed over 0.120 (0.110 to 0.140); "
        f"17: right 0.860 (0.850 to 0.880), {both}, handed over 0.060 (0.050 to 0.080)"
    )


# Attention


@pytest.mark.parametrize("length", [1, 4, 5, 6, 30])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_pairs_that_see_each_other_are_counted(length: int, window: int | None):
    places = np.arange(length)
    seen = np.abs(places[:, None] - places) < (window or length)
    assert attention_cost.count_pairs(length, window) == seen.sum()


def test_operations_of_forward_and_backward_are_those_that_pytorch_counts():
    length, heads, width = 16, attention_cost.HEADS, attention_cost.HEAD_DIM
    query, key, value = (torch.randn(heads, length, width, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        ((query @ key.transpose(1, 2)).softmax(-1) @ value).sum().backward()
    assert attention_cost.count_operations(length, None) == counter.get_total_flops()


def test_the_slope_is_the_exponent():
    assert attention_cost.fit_slope([(n, 3 * n**1.7) for n in (256, 512, 4096)]) == pytest.approx(1.7)
    assert np.isnan(attention_cost.fit_slope([(256, 1.0)]))


def test_rounds_are_merged_as_far_as_all_of_them_came():
    cost = attention_cost.Cost
    rounds = [[cost(256, 1.0, 10.0), cost(512, 9.0, 90.0)], [cost(256, 2.0, 30.0)], [cost(256, 9.0, 20.0)]]
    assert attention_cost.merge_rounds(rounds) == [cost(256, 2.0, 20.0)]
    assert attention_cost.merge_rounds(rounds[:2]) == [cost(256, 1.5, 20.0)]


@pytest.mark.parametrize(
    ("gains", "expected"), [([0.5, 0.9, 1.1, 2.0], 32), ([1.2, 0.9, 1.1], 32), ([1.5, 1.1], 8), ([1.5, 1.0], None)]
)
def test_sdpa_wins_from_where_it_never_loses_again(gains: list[float], expected: int | None):
    costs = [attention_cost.PackCost(8 * 2**i, gain, 1.0, 1.0, 2.0) for i, gain in enumerate(gains)]
    assert attention_cost.find_crossover(costs, "training") == expected
    assert attention_cost.find_crossover(costs, "prediction") is None
    table = attention_cost.build_pack_table(costs)
    assert f"training: SDPA is faster from rows of {expected or 'no length measured'}" in table


def build_costs() -> dict[str, list[Any]]:
    """Times that grow as the operations do."""
    return {
        name: [
            attention_cost.Cost(n, attention_cost.count_operations(n, window) / 1e6, n / 2) for n in (1024, 2048, 4096)
        ]
        for name in attention_cost.VARIANTS
        for window in [attention_cost.WINDOW if name.startswith("window") else None]
    }


def test_measured_slopes_stand_beside_those_on_paper():
    found = build_costs()
    words = attention_cost.describe_slopes(found)
    assert "full, plain     slope from N = 2,048: operations 2.00, time 2.00" in words
    assert re.search(r"window, blocks  slope from N = 2,048: operations (1\.0\d), time \1", words)
    rows = [line for line in attention_cost.build_row_table(found).splitlines() if line.startswith("| full, plain ")]
    # 12 heads x 32 features x 6 products x 2 operations x 2048^2 pairs
    assert rows[1] == "| full, plain | 2,048 | 19.33 | 19,327.4 | 1.0 | 2.00 | 1,024 |"


def test_the_plot_is_an_image_with_a_curve_for_each_variant():
    image = ElementTree.fromstring(attention_cost.build_plot(build_costs()))
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in image.iter(f"{space}text")]
    assert set(attention_cost.VARIANTS) < set(texts)
    assert {"1,024", "2,048", "4,096"} < set(texts)
    curves = [line for line in image.iter(f"{space}polyline") if line.get("stroke-width") == "2"]
    assert len(curves) == 2 * len(attention_cost.VARIANTS)
    points = [tuple(map(float, point.split(","))) for point in curves[0].get("points", "").split()]
    assert [x for x, _ in points] == [60.0, 250.0, 440.0]
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)  # a power law is straight


# The command line


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_commands_to_repeat_can_be_given(script: ModuleType):
    commands = re.findall(rf"benchmarks/{script.__name__}\.py (.*)", script.__doc__ or "")
    assert commands
    for command in commands:
        options = script.build_parser().parse_args(command.replace("$targets", "query-value").split())
        assert options.rounds == 3
        assert options.json.suffix == ".json"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_variant_is_explained(script: ModuleType):
    explained = re.findall(r"^    (\w+(?:, \w+)?)  ", (script.__doc__ or "").split("Variants:")[1], flags=re.MULTILINE)
    assert explained == list(script.VARIANTS)


def test_targets_are_known_words(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        train_speed.build_parser().parse_args(["--targets", "everything"])
    error = capsys.readouterr().err
    assert all(word in error for word in ("everything", "query-value", "all-linear", "full"))


@pytest.mark.parametrize(("targets", "architecture"), [("query-value", "native"), ("query-value", "triad")])
def test_query_and_value_are_named_as_in_the_architecture(targets: str, architecture: str):
    names = {"native": ["query", "value"], "triad": ["q_proj", "v_proj"]}[architecture]
    assert train_speed.build_section(targets, architecture).targets == names


def test_the_other_targets_are_the_recipes_own_words():
    assert train_speed.build_section("all-linear", "triad").targets == "all-linear"
    assert train_speed.build_section("full", "native").method == "full"


def test_rows_shorter_than_the_shortest_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["attention_cost.py", "--max-length", "128"])
    with pytest.raises(SystemExit):
        attention_cost.main()
    assert "--max-length must be at least 256, got 128." in capsys.readouterr().err


def test_lengths_are_powers_of_two():
    assert attention_cost.list_lengths(2000) == (256, 512, 1024)
