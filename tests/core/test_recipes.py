"""Recipes: sizes pinned, every one trains at its picture size, operations against a hand count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atoll.core import flow, recipes, seeds
from atoll.core.conditioning import Conditioning
from atoll.core.errors import ConfigError, ExitCode
from atoll.core.families import FAMILIES, Family
from atoll.core.manifest import Picture
from atoll.core.recipes import (
    RECIPES,
    build,
    default_recipe,
    forward_flops,
    gate_flops,
    network_config,
    outline,
    outline_of,
    parameter_count,
    recipe_of,
    saved_bytes,
    training_bytes,
)
from atoll.core.trunk import TrunkConfig

MakeCond = Callable[..., Conditioning]
DIGIT, SMALL = Picture(channels=1, height=8, width=8), Picture(channels=3, height=32, width=32)
LATENT = Picture(channels=4, height=32, width=32)
# A change of one of these changes every number that was measured.
SMALL_SIZES = {
    "unet-digits": (DIGIT, 1_622_353),
    "unet-nano": (SMALL, 4_803_875),
    "unet-tiny": (DIGIT, 47_993),
    "pixart-nano": (SMALL, 1_773_488),
    "pixart-tiny": (DIGIT, 16_308),
    "uvit-nano": (SMALL, 1_557_572),
    "uvit-tiny": (DIGIT, 16_030),
    "dit-nano": (SMALL, 1_901_104),
    "dit-tiny": (DIGIT, 16_116),
    "sd3-nano": (SMALL, 2_288_944),
    "sd3-tiny": (DIGIT, 23_396),
}
LARGE_SIZES = {
    "unet-300m": 314_140_228,
    "unet-600m": 553_235_204,
    "unet-sd1": 859_520_964,
    "unet-2.3b": 2_349_226_244,
    "pixart-300m": 311_823_376,
    "pixart-600m": 607_003_792,
    "pixart-2.3b": 2_318_768_144,
    "pixart-8b": 8_193_994_768,
    "uvit-300m": 287_641_380,
    "uvit-h": 501_996_404,
    "uvit-600m": 619_540_516,
    "uvit-2.3b": 2_347_989_924,
    "uvit-8b": 8_188_488_612,
    "dit-b": 130_717_456,
    "dit-300m": 307_520_528,
    "dit-600m": 604_165_408,
    "dit-xl": 675_881_296,
    "dit-2.3b": 2_284_807_696,
    "dit-8b": 8_027_424_016,
    "sd3-300m": 319_574_544,
    "sd3-600m": 596_903_952,
    "sd3-2b": 2_021_108_752,
    "sd3-2.3b": 2_285_081_616,
    "sd3-8b": 8_045_187_344,
}


def written(count: int) -> str:
    """A count as `about` writes it: 4.8M, 288M, 2.35B."""
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.0f}M" if count >= 1e8 else f"{count / 1e6:.1f}M"


def test_every_recipe_is_pinned() -> None:
    assert {*SMALL_SIZES, *LARGE_SIZES} == RECIPES.keys()


def test_every_family_goes_from_tiny_and_nano_to_what_it_has() -> None:
    for family in FAMILIES:
        sizes = {name.removeprefix(f"{family}-") for name in RECIPES if name.startswith(family)}
        assert sizes >= {"tiny", "nano", "300m", "600m", "2.3b"}
        assert "8b" in sizes or family == "unet"  # of which nobody made one
    assert all(recipe.family == name.split("-")[0] for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_as_many_as_written(name: str) -> None:
    picture, wanted = SMALL_SIZES.get(name) or (LATENT, LARGE_SIZES[name])
    network = outline(recipe_of(name), picture, 64 if name in SMALL_SIZES else 768)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert parameter_count(network) == wanted
    about = RECIPES[name].about
    if about[0].isdigit():
        assert about.partition(":")[0] == written(wanted)


@pytest.mark.parametrize("name", LARGE_SIZES)
def test_size_in_a_name_is_true_to_a_tenth(name: str) -> None:
    number, unit = (name.split("-")[1][:-1], name[-1])
    if unit in "mb" and number.replace(".", "").isdigit():
        said = float(number) * {"m": 1e6, "b": 1e9}[unit]
        assert LARGE_SIZES[name] == pytest.approx(said, rel=0.1)
    else:
        assert name in ("unet-sd1", "uvit-h", "dit-b", "dit-xl")


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_outline_is_the_network_without_weights(name: str) -> None:
    recipe, picture = recipe_of(name), SMALL_SIZES[name][0]
    thin, real = outline(recipe, picture, 64), build(recipe, picture, 64, seed=0)
    assert [(n, p.shape) for n, p in thin.named_parameters()] == [
        (n, p.shape) for n, p in real.named_parameters()
    ]


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_every_small_recipe_learns_at_its_size(name: str, cond: MakeCond) -> None:
    picture, _ = SMALL_SIZES[name]
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


@pytest.mark.parametrize("name", [name for name in SMALL_SIZES if name.endswith("tiny")])
def test_every_tiny_recipe_learns_a_small_batch_by_heart(name: str, cond: MakeCond) -> None:
    recipe = recipe_of(name)
    network = build(recipe, DIGIT, 8, seed=0).train()
    x_data, c = seeds.normal(0, "x_data", first=0, count=4, shape=DIGIT.shape), cond(4)
    x_noise = seeds.normal(0, "x_noise", first=0, count=4, shape=DIGIT.shape)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    x_t = flow.interpolate(x_data, x_noise, t)
    wanted = flow.target(x_data, x_noise, t, flow.Prediction.VELOCITY)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3 * recipe.base_learning_rate)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        output = FAMILIES[recipe.family].adapter(network, x_t, t, c)
        loss = (output - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_text_reaches_the_output(name: str, cond: MakeCond) -> None:
    picture, _ = SMALL_SIZES[name]
    recipe = recipe_of(name)
    network = build(recipe, picture, 8, seed=0)
    with torch.no_grad():  # transformers begin at a zero output
        for index, parameter in enumerate(network.parameters()):
            noise = seeds.normal(0, "noise", first=index, count=1, shape=tuple(parameter.shape))
            parameter.add_(0.05 * noise[0])
    x, t, c = torch.zeros(2, *picture.shape), torch.full((2,), 0.5), cond(6, length=6)
    with torch.no_grad():
        one = FAMILIES[recipe.family].adapter(network, x, t, c[torch.tensor([3, 5])])
    assert not torch.allclose(one[0], one[1])


@pytest.mark.parametrize("family", ["uvit", "dit", "sd3"])
def test_transformers_begin_calm(family: str, cond: MakeCond) -> None:
    network = build(recipe_of(f"{family}-tiny"), DIGIT, 8, seed=0)
    output = FAMILIES[family].adapter(network, torch.ones(3, 1, 8, 8), torch.ones(3), cond(3))
    assert output.abs().max() == 0


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
        ("pixart-nano", Picture(channels=3, height=32, width=16), "families unet, uvit, dit"),
        ("sd3-nano", Picture(channels=3, height=32, width=16), "families unet, uvit, dit"),
        ("sd3-nano", Picture(channels=3, height=30, width=30), "multiple of 4"),
        ("uvit-nano", Picture(channels=3, height=32, width=30), "multiple of 4"),
        ("dit-tiny", Picture(channels=1, height=7, width=8), "multiple of 2"),
    ],
)
def test_picture_that_does_not_fit_is_refused_with_the_cure(
    name: str, picture: Picture, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        network_config(recipe_of(name), picture, 8)


@pytest.mark.parametrize("family", ["unet", "uvit", "dit"])
def test_oblong_pictures_go_through(family: str, cond: MakeCond) -> None:
    picture = Picture(channels=3, height=8, width=12)
    network: Any = build(recipe_of(f"{family}-tiny"), picture, 8, seed=0)
    assert tuple(network.config.sample_size) == (8, 12)
    x = torch.zeros(1, *picture.shape)
    assert FAMILIES[family].adapter(network, x, torch.ones(1), cond(1)).shape == x.shape


@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_pooled_vector_may_be_wider_than_the_tokens(family: str, cond: MakeCond) -> None:
    network = build(recipe_of(f"{family}-tiny"), DIGIT, 8, seed=0, pooled_width=12)
    x = torch.zeros(2, *DIGIT.shape)
    assert FAMILIES[family].adapter(network, x, torch.ones(2), cond(2, dim=12)).shape == x.shape


@pytest.mark.parametrize(("side", "name"), [(8, "unet-digits"), (16, "unet-digits"), (32, None)])
def test_default_fits_its_picture(side: int, name: str | None) -> None:
    picture = Picture(channels=1, height=side, width=side)
    chosen = default_recipe(picture)
    assert chosen == (name or "unet-nano")
    network_config(recipe_of(chosen), picture, 8)


def test_dropout_is_0_everywhere() -> None:
    for name in RECIPES:
        picture, _ = SMALL_SIZES.get(name, (LATENT, 0))
        for module in outline(recipe_of(name), picture, 8).modules():
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
    known = Family(__name__, "_Known", lambda network, x, _t, c: network(x, c.pooled)[0])
    monkeypatch.setitem(recipes.FAMILIES, "known", known)
    by_hand = 2 * (5 * 32 * 32 * 3 * 3 * 3) + 2 * (8 * 7)
    assert forward_flops(_Known(), "known", SMALL, cond(4)) == by_hand


def test_a_gates_operations_are_those_of_a_hand_count(cond: MakeCond) -> None:
    width, pooled, labels = 32, 8, 3
    signal, places = 4 * width, 16 * 16  # of the first block
    shape = {"channels": 3, "pooled": pooled, "labels": dict.fromkeys("abc", 1)}
    lower = 9 * places * (3 * width + 2 * width**2 / 4 + 2 * 4 * width**2 / 4)
    # Time's 32 waves and the text; what moves and scales the four blocks.
    lower += signal * (32 + pooled + 2 * (1 + 2 + 2 + 2) * width)
    upper = 9 * places * 8 * width**2 / 16 + signal * 8 * width + 4 * width * 2 * labels
    text = signal * (pooled + 2 * labels)
    found = gate_flops(TrunkConfig(**shape, width=width), SMALL, cond(4))
    assert found == (2 * lower, 2 * (upper + text))


@pytest.mark.parametrize(
    ("recipe", "most"),
    [("unet-nano", 0.05), ("uvit-nano", 0.15), ("pixart-nano", 0.17), ("dit-nano", 0.21)],
)
def test_eight_heads_and_their_trunk_are_light_beside_an_expert(
    recipe: str, most: float, cond: MakeCond
) -> None:
    text = cond(1, width=64, dim=64)
    config = TrunkConfig(channels=3, pooled=64, labels=dict.fromkeys("abcdefgh", 1))
    shared, own = gate_flops(config, SMALL, text)
    expert = outline(recipe_of(recipe), SMALL, 64)
    whole = forward_flops(expert, recipe_of(recipe).family, SMALL, text)
    assert (shared + 8 * own) / whole < most


def test_a_gate_head_of_the_digits_is_light_beside_its_expert(cond: MakeCond) -> None:
    """So light that the usual limit of its computations leaves the demo's heads as they are."""
    text = cond(1, width=64, dim=64)
    config = TrunkConfig(channels=1, pooled=64, stride=1, labels=dict.fromkeys("abcd", 1))
    shared, own = gate_flops(config, DIGIT, text)
    expert = forward_flops(outline(recipe_of("unet-digits"), DIGIT, 64), "unet", DIGIT, text)
    assert 2 * 2 * (shared + 3 * own) / (3 * expert) < 0.25


def test_an_outline_of_a_configuration_has_the_shapes_of_its_network() -> None:
    for family in FAMILIES:
        network: Any = build(recipe_of(f"{family}-tiny"), DIGIT, 8, seed=0)
        found = outline_of(family, dict(network.config))
        assert all(parameter.is_meta for parameter in found.parameters())
        shapes = [{n: v.shape for n, v in each.state_dict().items()} for each in (network, found)]
        assert shapes[0] == shapes[1]


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


@pytest.mark.parametrize("name", [name for name in SMALL_SIZES if name.endswith("tiny")])
def test_operations_of_an_outline_are_those_of_the_network(name: str, cond: MakeCond) -> None:
    recipe = recipe_of(name)
    real, thin = build(recipe, DIGIT, 8, seed=0), outline(recipe, DIGIT, 8)
    counts = [forward_flops(network, recipe.family, DIGIT, cond(3)) for network in (real, thin)]
    assert counts[0] == counts[1] > 0


def test_operations_are_those_of_the_papers(cond: MakeCond) -> None:
    # DiT, arXiv 2212.09748, table 4, counts multiply-adds: DiT-B/2 23.01G, DiT-XL/2 118.64G.
    for name, published in (("dit-b", 23.01e9), ("dit-xl", 118.64e9)):
        network = outline(recipe_of(name), LATENT, 768)
        flops = forward_flops(network, "dit", LATENT, cond(1, width=768, dim=768))
        assert flops / 2 == pytest.approx(published, rel=0.01)


def test_memory_of_training_is_20_bytes_a_parameter_in_float32() -> None:
    assert training_bytes(1000) == 20_000
    assert training_bytes(1000, average=None) == 16_000
    assert training_bytes(1000, weights=torch.bfloat16, gradients=torch.bfloat16) == 16_000


def test_memory_of_training_is_what_a_step_leaves_behind(cond: MakeCond) -> None:
    network = build(recipe_of("uvit-tiny"), DIGIT, 8, seed=0)
    average = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters())
    x = torch.ones(2, *DIGIT.shape)
    FAMILIES["uvit"].adapter(network, x, torch.ones(2), cond(2)).mean().backward()
    optimizer.step()
    moments = [v for s in optimizer.state.values() for v in s.values() if v.ndim > 0]
    held = [*network.parameters(), *(p.grad for p in network.parameters()), *moments, *average]
    assert sum(h.nbytes for h in held if h is not None) == training_bytes(parameter_count(network))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_saved_for_the_backward_pass_is_what_autograd_saves(
    family: str, precision: torch.dtype, cond: MakeCond
) -> None:
    recipe, batch = recipe_of(f"{family}-tiny"), 4
    network = build(recipe, DIGIT, 8, seed=0).train()
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    low = precision != torch.float32
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", precision, enabled=low),
    ):
        x = torch.zeros(batch, *DIGIT.shape)
        output = FAMILIES[family].adapter(network, x, torch.ones(batch), cond(batch))
    assert output.requires_grad
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    measured = sum(s.nbytes() for place, s in saved.items() if place not in weights)
    foretold = saved_bytes(recipe, DIGIT, cond(1), batch=batch, precision=precision)
    # What a processor's own kernels for bfloat16 keep besides is not foretold.
    assert foretold == pytest.approx(measured, rel=0.02 if low else 0)
    assert foretold < saved_bytes(recipe, DIGIT, cond(1), batch=2 * batch, precision=precision)
