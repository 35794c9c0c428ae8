"""The verbs that only show: recipes, data, schema, doctor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from finetune.cli.output import print_table
from finetune.recipe import list_recipes
from finetune.recipe.adapter import ADAPTER_KEYS
from finetune.recipe.comparison import list_comparisons
from finetune.recipe.loading import recipe_json_schema
from finetune.recipe.sweep import list_sweeps
from finetune.training import precision

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "words",
    [
        "recipes list",
        "recipes show sentiment",
        "data list",
        "data show banking77",
        "data show bookshop",
        "adapters list",
        "schema",
    ],
)
def test_what_only_shows_speaks_json(command, words):
    done = command(*words.split(), "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)


def test_recipes_are_listed_shown_and_copied(command, tmp_path):
    listed = json.loads(command("recipes", "list", "--json").out)
    kinds = {"recipe": list_recipes(), "comparison": list_comparisons(), "sweep": list_sweeps()}
    known = [(kind, one) for kind, found in kinds.items() for one in found]
    assert listed == [{"name": one.name, "kind": kind, "description": one.description} for kind, one in known]
    assert kinds.keys() == {one["kind"] for one in listed}
    assert all(one["name"] in command("recipes", "list").out for one in (listed[0], listed[-1]))
    source = (ROOT / "recipes" / "sentiment.yaml").read_text(encoding="utf-8")
    assert command("recipes", "show", "sentiment").out == source
    target = tmp_path / "new" / "mine.yaml"
    done = command("recipes", "copy", "sentiment", target)
    assert done.out == f"{target}: written. Edit it, then: finetune check {target}\n"
    assert target.read_text(encoding="utf-8") == source
    target.write_text("mine")
    again = command("recipes", "copy", "sentiment", target)
    assert again.code == 2
    assert f"{target}: must not exist yet, got a file." in again.err
    assert target.read_text() == "mine"
    assert json.loads(command("recipes", "copy", "sentiment", tmp_path, "--json").out) == {
        "path": str(tmp_path / "sentiment.yaml")
    }
    assert command("recipes", "copy", "sentiment", f"{tmp_path}/folder/").code == 0
    assert (tmp_path / "folder" / "sentiment.yaml").read_text(encoding="utf-8") == source
    refused = command("recipes", "copy", "sentiment", target / "below" / "mine.yaml")  # a file is no folder
    assert refused.code == 5
    assert f"{target / 'below'}: must be written (" in refused.err


def test_methods_are_listed(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    listed = {method["method"]: method for method in json.loads(command("adapters", "list", "--json").out)}
    assert set(listed) == set(ADAPTER_KEYS)
    assert listed["vera"]["paper"] == "https://arxiv.org/abs/2310.11454"
    assert listed["lora"]["keys"] == list(ADAPTER_KEYS["lora"])
    unmerged = [name for name, method in listed.items() if not method["merges"]]
    assert unmerged == ["prefix", "prompt", "p_tuning", "adapter"]
    text = command("adapters", "list").out
    assert re.search(r"^lokr +arXiv:2309\.14859 +yes +A Kronecker product", text, re.M)
    assert text.endswith(
        "In a recipe: adapter: {method: lora, rank: 16}. A key that the method does not read is an error.\n"
    )


def test_cards_are_listed_and_shown(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("FINETUNE_DATA", raising=False)
    listed = command("data", "list").out
    assert re.search(r"^financial_headlines +800 +Apache-2\.0 +folder data/samples/financial_headlines", listed, re.M)
    assert re.search(r"^banking77 +13,083 +CC-BY-4\.0 +Hub mteb/banking77@0fd18e25b25c", listed, re.M)
    shown = command("data", "show", "banking77").out
    assert "train 10,003, test 3,080" in shown
    assert "and 65 more" in shown
    unknown = command("data", "show", "bankng77")
    assert unknown.code == 3
    assert "data: must name a card, got 'bankng77'. Did you mean 'banking77'?" in unknown.err


def list_keys(value, schema, definitions, at=""):
    """Each key of a recipe, and whether the schema knows it."""
    options = [schema, *schema.get("anyOf", [])]
    options = [definitions[one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in options]
    for key, inner in value.items() if isinstance(value, dict) else ():
        named = [one["properties"][key] for one in options if key in one.get("properties", {})]
        free = [one["additionalProperties"] for one in options if one.get("additionalProperties")]
        matched = [
            child
            for one in options
            for pattern, child in one.get("patternProperties", {}).items()
            if re.search(pattern, key)
        ]
        children = [*named, *matched] or free
        yield f"{at}{key}", bool(children)
        for child in children:
            yield from list_keys(inner, child, definitions, f"{at}{key}.")


def test_the_schema_knows_every_key_of_the_shipped_recipes(command):
    schema = json.loads(command("schema").out)
    assert schema == recipe_json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (schema["type"], schema["additionalProperties"]) == ("object", False)
    assert set(schema["required"]) == {"recipe", "name", "tasks"}
    for recipe in list_recipes():
        keys = dict(list_keys(YAML(typ="safe").load(recipe.path), schema, schema["$defs"]))
        assert len(keys) > 10
        assert [key for key, known in keys.items() if not known] == []
    wrong = {"train": {"epoch": 1}, "tasks": {"-": {}}}
    assert dict(list_keys(wrong, schema, schema["$defs"])) == {
        "train": True,
        "train.epoch": False,
        "tasks": True,
        "tasks.-": False,
    }
    # Each reference leads somewhere, and each key says what it means, or the section that it refers to does.
    parts = [schema, *schema["$defs"].values()]
    assert set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema))) <= set(schema["$defs"])
    assert all("description" in part for part in schema["$defs"].values())
    assert [
        key for part in parts for key, one in part["properties"].items() if not one.keys() & {"description", "$ref"}
    ] == []


def test_doctor_looks_at_everything_a_run_needs(command, monkeypatch):
    monkeypatch.setattr(precision, "measure_bf16_ratio", lambda: 2.0)  # on a slow core it takes seconds
    found = json.loads(command("doctor", "--json").out)
    assert list(found) == ["machine", "devices", "precision", "versions", "base models", "data"]
    assert found["versions"]["torch"] == torch.__version__
    assert "sentence-transformers/all-MiniLM-L6-v2" in found["base models"]
    assert found["data"]["financial_headlines"] == "folder data/samples/financial_headlines"
    assert found["precision"] == {
        "bf16 over float32 on this CPU": "2.00 times as fast",
        "`precision: auto` means": "bf16",
    }
    text = command("doctor").out
    for section, facts in found.items():
        assert section in text.splitlines()
        assert all(re.search(rf"^  {re.escape(fact)} ", text, re.MULTILINE) for fact in facts)


def test_a_table_shows_its_cells_as_they_are(capsys):
    cells = ["C:\\[y] \\", "[bold]x[/bold] [/]"]
    print_table(["label", "text"], [cells])
    assert capsys.readouterr().out.splitlines()[1].rstrip() == "  ".join(cells)
