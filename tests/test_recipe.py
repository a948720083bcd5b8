from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accel.errors import RecipeError
from accel.recipe import ParityRecipe, Recipe, load_recipe, recipe_names
from accel.spec import ProfileRanges, Range

ONE = {"min": 1, "opt": 1, "max": 1}


def test_packaged_recipes_are_found_by_name() -> None:
    assert recipe_names() == ("decoder", "encoder")
    assert load_recipe(None, "decoder") == load_recipe("decoder") == Recipe(parity=ParityRecipe(greedy_tokens=16))
    assert load_recipe("encoder") == Recipe()


def test_mapping_and_file_are_laid_over_the_default(tmp_path: Path) -> None:
    data = {"task": "fill-mask", "max_positions": 64, "parity": {"cases": 5}}
    recipe = load_recipe(data)
    assert recipe == Recipe(task="fill-mask", max_positions=64, parity=ParityRecipe(cases=5))
    path = tmp_path / "own.yaml"
    path.write_text("task: fill-mask\nmax_positions: 64\nparity:\n  cases: 5\n")
    assert load_recipe(path) == load_recipe(str(path)) == recipe
    assert load_recipe(recipe) is recipe
    path.write_text("")
    assert load_recipe(path) == load_recipe(None)


def test_profiles_of_engines(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("profiles:\n  decode: {batch: {min: 1, opt: 4, max: 8}, sequence: {min: 1, opt: 1, max: 1}}\n")
    assert load_recipe(path, "decoder").profiles == {"decode": ProfileRanges(Range(1, 4, 8), Range(1, 1, 1))}
    assert load_recipe(None).profiles == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"max_position": 20}, "Unknown key 'max_position'.*Did you mean 'max_positions'"),
        ({"parity": {"limt": 1}}, "Unknown key 'limt'.*Did you mean 'limit'"),
        ({"task": "fill_mask"}, "Expected.*'fill-mask'"),
        ({"parity": {"enabled": 1}}, "Expected true or false"),
        ({"max_positions": "20"}, "Expected an integer"),
        ({"max_positions": 0}, "max_positions must be at least 1"),
        ({"parity": {"limit": float("nan")}}, "Expected a number"),
        ({"parity": {"limit": 0}}, "parity.limit must be above 0"),
        ({"parity": {"cases": 0}}, "parity.cases"),
        ({"parity": {"greedy_tokens": -1}}, "parity.greedy_tokens"),
        ({"parity": {"seed": -1}}, "parity.seed"),
        ({"parity": 3}, "Expected a mapping, found 3"),
        ({"profiles": {"decode": {"batch": ONE}}}, "Missing key 'sequence'"),
        ({"profiles": {"decode": {"batch": ONE, "sequence": ONE, "width": ONE}}}, "Unknown key 'width'"),
        ({"profiles": {"long": {"batch": ONE, "sequence": {"min": 9, "opt": 5, "max": 1}}}},
         "profiles.long.sequence must be 1 <= min <= opt <= max, not 9, 5, 1"),
        ({"profiles": {"none": {"batch": {"min": 0, "opt": 1, "max": 1}, "sequence": ONE}}}, "profiles.none.batch"),
    ],
)
def test_bad_keys_and_values(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_positions: 8\nmax_positions: 9\n", "Key 'max_positions' stands twice"),
        ("- 1\n", "not a mapping"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as info:
        load_recipe(path)
    assert "own.yaml" in str(info.value)


def test_absent_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Cannot read the recipe"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="no recipe 'decodr'.*Did you mean 'decoder'"):
        load_recipe("decodr")


def test_a_recipe_object_is_checked_too() -> None:
    with pytest.raises(RecipeError, match="max_positions must be"):
        load_recipe(Recipe(max_positions=-1))
