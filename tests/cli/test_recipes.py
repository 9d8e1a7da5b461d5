"""`atoll recipes`: what it counts against the weights and the table that tests of core pin."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from atoll.cli.recipes import _cost, _table, _usual
from atoll.core.families import FAMILIES
from atoll.core.manifest import Picture
from atoll.core.recipes import RECIPES
from tests.cli.conftest import atoll, done
from tests.core.test_recipes import LARGE_SIZES


def test_without_a_run_they_are_counted_for_latents() -> None:
    said = done("recipes", "--family", "dit")
    assert said["picture"] == [4, 32, 32]
    assert said["text_width"] == 768
    counts = {row["name"]: row["parameters"] for row in said["recipes"]}
    assert counts.keys() == {name for name in RECIPES if name.startswith("dit")}
    for name in counts.keys() & LARGE_SIZES.keys():
        assert counts[name] == LARGE_SIZES[name]


def test_of_a_run_they_are_counted_for_its_pictures_and_text(based: Path) -> None:
    said = done("recipes", based, "--family", "unet")
    assert said["picture"] == [1, 8, 8]
    rows = {row["name"]: row for row in said["recipes"]}
    assert list(rows) == [name for name in RECIPES if name.startswith("unet")]
    weights = load_file(next((based / "base").glob("*.safetensors")))
    tiny = rows["unet-tiny"]
    assert tiny["parameters"] == sum(weight.numel() for weight in weights.values())
    assert tiny["training_bytes"] == 5 * 4 * tiny["parameters"]
    text = atoll("recipes", based, "--family", "unet").out
    assert "unet-tiny" in text
    assert f"{tiny['parameters']:,}" in text


def test_a_recipe_that_does_not_fit_says_why() -> None:
    _, cond = _usual()
    squares = [Picture(channels=3, height=side, width=side) for side in (32, 20)]
    cost = _cost("unet-nano", squares, cond)
    assert cost.reason == "This recipe divides pictures by 8, these are 20x20"
    assert f"unet-nano    {cost.reason}" in _table([cost], squares[0])


@pytest.mark.parametrize(("arguments", "said"), [(["--family=uvt"], "uvit"), (["nowhere"], "run")])
def test_what_is_not_there(arguments: list[str], said: str) -> None:
    ended = atoll("recipes", *arguments, "--json")
    assert ended.code == 2
    assert said in ended.error["what"]
    assert ended.error["cure"] or all(family in ended.error["allowed"] for family in FAMILIES)
