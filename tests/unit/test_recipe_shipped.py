"""The recipes that come with the toolkit load, are found by name, and a broken one does not hide the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe import find_recipe, list_recipes, load_recipe, shipped, shipped_folder
from finetune.recipe.comparison import list_comparisons

RECIPES = list_recipes()


def test_there_are_uses_and_benchmarks_in_this_order() -> None:
    names = [recipe.name for recipe in RECIPES]
    assert {"sentiment", "benchmarks/sentiment_twitter", "benchmarks/intents_banking77"} <= set(names)
    assert [recipe.benchmark for recipe in RECIPES] == sorted(recipe.benchmark for recipe in RECIPES)
    assert all(recipe.benchmark == recipe.name.startswith("benchmarks/") for recipe in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_shipped_recipes_load_and_are_short(recipe: shipped.ShippedRecipe) -> None:
    assert recipe.problem is None
    assert recipe.description
    assert load_recipe(recipe.path).name == recipe.path.stem
    assert len(recipe.path.read_text(encoding="utf-8").splitlines()) <= 40


def test_the_folder_of_an_installed_wheel_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "site" / "finetune" / "recipe" / "shipped.py"
    monkeypatch.setattr(shipped, "__file__", str(module))
    assert shipped_folder("data") == tmp_path / "site" / "data"
    installed = tmp_path / "site" / "finetune" / "shipped" / "data"
    installed.mkdir(parents=True)
    assert shipped_folder("data") == installed
    assert shipped_folder("recipes") == tmp_path / "site" / "recipes"


def test_a_broken_file_is_listed_with_its_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "b.yaml").write_text("recipe: 1\n", encoding="utf-8")
    (tmp_path / "z.yaml").write_bytes(b"\xff")
    monkeypatch.setattr(shipped, "shipped_folder", lambda _: tmp_path)
    broken = list_recipes()
    assert [recipe.name for recipe in broken] == ["z", "benchmarks/b"]
    assert [recipe.description for recipe in broken] == ["", ""]
    assert "must be UTF-8" in str(broken[0].problem)
    assert "2 problems" in str(broken[1].problem)


@pytest.mark.parametrize("name", ["sentiment", "sentiment.yaml", "recipes/sentiment.yaml"])
def test_a_shipped_recipe_is_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == shipped_folder("recipes") / "sentiment.yaml"


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sentiment").mkdir()
    assert find_recipe("sentiment") == shipped_folder("recipes") / "sentiment.yaml"
    mine = Path("mine.yaml")
    mine.touch()
    assert find_recipe(mine) == mine


def test_comparisons_lie_among_the_recipes_and_are_listed_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {comparison.name for comparison in list_comparisons()}
    assert names == {"benchmarks/adapters", "benchmarks/adapters_full"}
    assert names.isdisjoint(recipe.name for recipe in list_recipes())
    assert find_recipe("benchmarks/adapters", "compare") == shipped_folder("recipes") / "benchmarks" / "adapters.yaml"
    (tmp_path / "a.yaml").write_text("# compare: 1\n\nrecipe: 1\ncompare: 1\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("# two\n\n# lines\ncompare: 1\nrecipe: x\n", encoding="utf-8")
    monkeypatch.setattr(shipped, "shipped_folder", lambda _: tmp_path)
    assert [recipe.name for recipe in list_recipes()] == ["a"]
    assert [(one.name, one.description) for one in list_comparisons()] == [("b", "")]
    assert "b.yaml: 3 problems" in str(list_comparisons()[0].problem)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'sentiment'") as caught:
        find_recipe("sentimnt")
    assert str(caught.value).startswith("sentimnt: must be a file or the name of a shipped recipe. Did you mean")
    assert "benchmarks/intents_banking77" in str(caught.value)


def test_a_shipped_file_of_another_kind_is_told_with_the_command_for_it() -> None:
    words = r"^benchmarks/adapters: must be a recipe, got a comparison\. Try: finetune compare benchmarks/adapters$"
    with pytest.raises(RecipeError, match=words):
        find_recipe("benchmarks/adapters")


@pytest.mark.parametrize("name", ["../sentiment", "benchmarks/../sentiment", "", "x\0"])
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(RecipeError, match="must be a file or the name of a shipped recipe"):
        find_recipe(name)


def test_an_installation_without_recipes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "shipped_folder", lambda _: tmp_path / "nowhere")
    assert list_recipes() == []
    with pytest.raises(RecipeError, match="No recipe is shipped with this installation"):
        find_recipe("x")


def test_the_room_does_not_import_heavy_libraries() -> None:
    code = (
        "import sys, finetune.recipe; print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(shipped.__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"
