"""What routings do in law, by two-sample tests on closed-form experts; every seed is fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atoll.core import flow, sampler, seeds

World = Any  # what `make_world` makes; see conftest.py
SIZES = (30, 12, 6, 3)


def samples(
    world: World, routing: str, captions: list[int], *, seed: int, start: float = 1.0
) -> Tensor:
    """x_data of one picture per caption, from noise, or from records noised to `start`."""
    n = len(captions)
    noise = seeds.normal(seed, "x_noise", first=0, count=n, shape=(2,)).double()
    if start < 1:
        rows = seeds.uniform(seed, "rows", first=0, count=n)[:, 0].mul(len(world.points)).long()
        at = torch.full((n,), start, dtype=torch.float64)
        noise = flow.interpolate(world.points[rows], noise, at)
    grid = sampler.times(50).double() * start
    return sampler.euler(world.trajectory(routing, captions, seed=seed), noise, grid)


def p_value(a: Tensor, b: Tensor, *, permutations: int = 400) -> float:
    """Permutation test on the energy distance of two samples of one size."""
    n, both = len(a), torch.cat([a, b])
    distance = torch.cdist(both, both)
    side = torch.cat([torch.ones(n), -torch.ones(n)]).double()
    generator = np.random.default_rng(0)
    order = torch.from_numpy(np.stack([generator.permutation(2 * n) for _ in range(permutations)]))
    signs = torch.cat([side[None], side[order]])
    energy = -((signs @ distance) * signs).sum(dim=1) / n**2
    return float((energy[1:] >= energy[0]).double().mean())


def shares(world: World, x_data: Tensor) -> Tensor:
    """How many pictures are nearest to a record of each shard, as shares."""
    nearest = torch.cdist(x_data, world.points).argmin(dim=1)
    return torch.bincount(world.shard[nearest], minlength=world.count) / len(x_data)


def off(found: Tensor, wanted: Tensor, n: int) -> float:
    """The largest deviation of shares of n draws, in standard deviations."""
    return float(((found - wanted).abs() / (wanted * (1 - wanted) / n).sqrt()).max())


@pytest.fixture(scope="module")
def world(make_world: Callable[..., World]) -> World:
    return make_world(21, sizes=SIZES, spread=0.25)


@pytest.fixture(scope="module")
def full(world: World) -> Tensor:
    return samples(world, "full", [0] * 700, seed=1)


@pytest.mark.parametrize("routing", ["once", "full", "mass:0.95", "full>0.5,once"])
def test_unguided_once_equals_full_in_law(world: World, full: Tensor, routing: str) -> None:
    """The two-sample test of promise 1; `full` again says what the test makes of equal laws."""
    assert p_value(full, samples(world, routing, [0] * 700, seed=2)) > 0.02


def test_the_test_has_power(world: World, full: Tensor) -> None:
    """top-k:1 starves the small shards, and is found out."""
    assert p_value(full, samples(world, "top-k:1", [0] * 700, seed=2)) < 0.005


def test_once_equals_full_in_law_given_a_caption(world: World) -> None:
    full = samples(world, "full", [1] * 500, seed=3)
    assert p_value(full, samples(world, "once", [1] * 500, seed=4)) > 0.02
    # It is the caption's law: that of the other caption is another.
    assert p_value(full, samples(world, "once", [2] * 500, seed=4)) < 0.005


def test_shares_of_shards(world: World) -> None:
    wanted = torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)
    for routing in ("full", "once", "full>0.6,once", "once>0.8,full>0.4,once"):
        found = shares(world, samples(world, routing, [0] * 2000, seed=5))
        assert off(found, wanted, 2000) < 4, routing
    # Late as early: the likeliest is not one that was drawn.
    for routing in ("top-k:1", "full>0.6,top-k:1"):
        assert off(shares(world, samples(world, routing, [0] * 2000, seed=5)), wanted, 2000) > 8


def test_once_from_the_middle_of_the_path(world: World) -> None:
    """A trajectory that starts at t < 1 keeps the law when it draws from p(k | x_t, t, cond)."""
    n = 600
    full = samples(world, "full", [0] * n, seed=6, start=0.5)
    assert p_value(full, samples(world, "once", [0] * n, seed=7, start=0.5)) > 0.02


@pytest.mark.parametrize(("t", "caption"), [(1.0, 0), (1.0, 1), (0.6, 0), (0.4, 2)])
def test_once_draws_from_the_posterior_at_its_start(
    world: World, prompt: Any, t: float, caption: int
) -> None:
    """At t = 1 that is p(k | cond), whatever the noise; later it depends on x_t."""
    n = 20_000
    place = world.points.mean(dim=0) if t < 1 else torch.tensor([3.0, -2.0])
    x_t = place.to(torch.float64).expand(n, 2)
    at = torch.full((n,), t, dtype=torch.float64)
    trajectory = world.trajectory("once", [caption] * n, trace=True, seed=8)
    trajectory(x_t, at)
    found = trajectory.trace[0].weights.mean(dim=0)
    wanted = world.posterior(x_t[:1], at[:1], prompt([caption]))[0]
    if t == 1:
        prior = torch.stack([world.likelihood[caption, world.shard == k].sum() for k in range(4)])
        torch.testing.assert_close(wanted, prior / prior.sum())
    assert off(found, wanted, n) < 4


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_sample_is_unbiased_with_the_variance_of_a_mean(
    world: World, prompt: Any, draws: int
) -> None:
    n, t = 10_000, 0.6
    x_t = world.points.mean(dim=0).expand(n, 2)
    at = torch.full((n,), t, dtype=torch.float64)
    p = world.posterior(x_t[:1], at[:1], prompt([1]))[0]
    trajectory = world.trajectory(f"sample:{draws}", [1] * n, trace=True, seed=9)
    v = trajectory(x_t, at)
    weights = trajectory.trace[0].weights
    variance = p * (1 - p) / draws
    assert float(((weights.mean(dim=0) - p).abs() / (variance / n).sqrt()).max()) < 4
    torch.testing.assert_close(weights.var(dim=0), variance, rtol=0.1, atol=1e-4)
    # And so is the velocity, which is linear in the weights.
    exact = world.velocity(x_t[:1], at[:1], prompt([1]))[0]
    assert float(((v.mean(dim=0) - exact).abs() / (v.std(dim=0) / n**0.5)).max()) < 4
