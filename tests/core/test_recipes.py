"""Recipes: sizes pinned, every one trains at its picture size, operations against a hand count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from atoll.core import recipes
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import FAMILIES, Family
from atoll.core.errors import ConfigError, ExitCode
from atoll.core.manifest import Picture
from atoll.core.recipes import (
    RECIPES,
    build,
    default_recipe,
    forward_flops,
    network_config,
    recipe_of,
)

MakeCond = Callable[..., Conditioning]
DIGIT, SMALL = Picture(channels=1, height=8, width=8), Picture(channels=3, height=32, width=32)
# A change here changes every number that was measured.
PARAMETERS = {
    "unet-digits": (DIGIT, 1_622_353),
    "unet-nano": (SMALL, 4_803_875),
    "unet-tiny": (DIGIT, 47_993),
    "pixart-nano": (SMALL, 1_773_488),
    "pixart-tiny": (DIGIT, 16_308),
}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_every_recipe_is_pinned() -> None:
    assert PARAMETERS.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_as_many_as_written(name: str) -> None:
    picture, wanted = PARAMETERS[name]
    network = build(recipe_of(name), picture, 64, seed=0)
    assert count(network) == wanted
    about = RECIPES[name].about
    if about[0].isdigit():
        assert about.startswith(f"{wanted / 1e6:.1f}M:")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_at_its_size(name: str, cond: MakeCond) -> None:
    picture, _ = PARAMETERS[name]
    recipe = recipe_of(name)
    network = build(recipe, picture, 8, seed=0)
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(2, 2, *picture.shape, generator=generator)
    c, t = cond(2), torch.tensor([0.2, 0.8])

    def loss() -> Tensor:
        output = FAMILIES[recipe.family].adapter(network, x, t, c)
        assert output.shape == x.shape
        return (output - wanted).square().mean()

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    first = loss()
    first.backward()
    gradients = {n: p.grad for n, p in network.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        last = loss()
        last.backward()
    assert last.item() < first.item()


@pytest.mark.parametrize("name", RECIPES)
def test_text_reaches_the_output(name: str, cond: MakeCond) -> None:
    picture, _ = PARAMETERS[name]
    recipe = recipe_of(name)
    network = build(recipe, picture, 8, seed=0)
    if recipe.family == "pixart":
        nn.init.normal_(network.proj_out.weight, generator=torch.Generator().manual_seed(0))
    x, t, c = torch.zeros(2, *picture.shape), torch.full((2,), 0.5), cond(6, length=6)
    with torch.no_grad():
        one = FAMILIES[recipe.family].adapter(network, x, t, c[torch.tensor([3, 5])])
    assert not torch.allclose(one[0], one[1])


@pytest.mark.parametrize(("given", "meant"), [("unet-dgits", "unet-digits"), ("pixart", "pixart")])
def test_unknown_recipe_names_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"Did you mean '{meant}") as caught:
        recipe_of(given)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert all(name in str(caught.value) for name in RECIPES)


@pytest.mark.parametrize(
    ("name", "picture", "said"),
    [
        ("unet-nano", Picture(channels=3, height=20, width=20), "multiple of 8"),
        ("unet-digits", Picture(channels=1, height=7, width=8), "multiple of 2"),
        ("pixart-nano", Picture(channels=3, height=30, width=30), "multiple of 4"),
        ("pixart-nano", Picture(channels=3, height=32, width=16), "choose a unet recipe"),
    ],
)
def test_picture_that_does_not_fit_is_refused_with_the_cure(
    name: str, picture: Picture, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        network_config(recipe_of(name), picture, 8)


def test_oblong_pictures_go_through_a_unet(cond: MakeCond) -> None:
    picture = Picture(channels=3, height=8, width=12)
    network = build(recipe_of("unet-tiny"), picture, 8, seed=0)
    x = torch.zeros(1, *picture.shape)
    assert FAMILIES["unet"].adapter(network, x, torch.ones(1), cond(1)).shape == x.shape


@pytest.mark.parametrize(("side", "name"), [(8, "unet-digits"), (16, "unet-digits"), (32, None)])
def test_default_fits_its_picture(side: int, name: str | None) -> None:
    picture = Picture(channels=1, height=side, width=side)
    chosen = default_recipe(picture)
    assert chosen == (name or "unet-nano")
    network_config(recipe_of(chosen), picture, 8)


def test_dropout_is_0_everywhere() -> None:
    for name, (picture, _) in PARAMETERS.items():
        for module in build(recipe_of(name), picture, 8, seed=0).modules():
            assert not isinstance(module, nn.Dropout) or module.p == 0


class _Known(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.linear = nn.Linear(8, 7)

    def forward(self, x: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.linear(pooled)


def test_operations_are_those_of_a_hand_count(
    cond: MakeCond, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Family(_Known, lambda network, x, _t, c: network(x, c.pooled)[0])
    monkeypatch.setitem(recipes.FAMILIES, "known", known)
    by_hand = 2 * (5 * 32 * 32 * 3 * 3 * 3) + 2 * (8 * 7)
    assert forward_flops(_Known(), "known", SMALL, cond(4)) == by_hand


def test_operations_grow_with_the_picture_and_not_with_the_batch(cond: MakeCond) -> None:
    recipe = recipe_of("unet-tiny")
    network = build(recipe, DIGIT, 8, seed=0)
    small = forward_flops(network, "unet", DIGIT, cond(3))
    assert small == forward_flops(network, "unet", DIGIT, cond(1))
    large = forward_flops(network, "unet", Picture(channels=1, height=16, width=16), cond(3))
    assert 3.5 < large / small <= 4.2
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    # Every convolution runs at 8x8 or 4x4: the count lies between the two.
    products = sum(m.weight.numel() for m in convolutions)
    assert 2 * products * 16 < small < 2 * products * 64 * 2
