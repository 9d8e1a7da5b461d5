"""Euler against flows whose solution is known, and against diffusers step for step."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atoll.core import flow, sampler, seeds


def noise(count: int = 6, shape: tuple[int, ...] = (2, 4, 4)) -> Tensor:
    return seeds.normal(0, "noise", first=0, count=count, shape=shape)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_constant_velocity_is_exact_whatever_the_steps(steps: int) -> None:
    x, data = noise().double(), noise().double().flip(0)
    end = sampler.euler(lambda _x, _t: x - data, x, sampler.times(steps))
    torch.testing.assert_close(end, data, rtol=0, atol=1e-6)  # the times are float32


def test_order_is_1_against_the_closed_form_flow_of_a_gaussian() -> None:
    mean, std = 0.3, 0.5

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        t = flow.expand(t, x_t)
        away = (x_t - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
        return t * away - (mean + (1 - t) * std**2 * away)

    x = noise(64).double()
    # Along the flow x_t = (1 - t) mean + sqrt((1 - t)^2 std^2 + t^2) x_noise.
    wanted = mean + std * x
    errors = [
        float((sampler.euler(velocity, x, sampler.times(steps)) - wanted).abs().mean())
        for steps in (50, 100, 200, 400)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert 0.9 < math.log2(coarse / fine) < 1.1
    assert errors[-1] < 2e-3


@given(steps=st.integers(1, 200), shift=st.floats(0.2, 10))
def test_times_fall_strictly_from_1_to_0(steps: int, shift: float) -> None:
    grid = sampler.times(steps, shift=shift)
    assert len(grid) == steps + 1
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


@given(steps=st.integers(1, 100), shift=st.floats(0.2, 10))
def test_times_are_those_of_the_shift_in_double_precision(steps: int, shift: float) -> None:
    t = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    wanted = shift * t / (1 + (shift - 1) * t)
    torch.testing.assert_close(
        sampler.times(steps, shift=shift).double(), wanted, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=r"steps is .*; allowed: 1 or more; cure:"):
        sampler.times(steps)


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 25, 50])
def test_path_is_bitwise_that_of_diffusers(steps: int, shift: float) -> None:
    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x_t) * (1 + flow.expand(t, x_t)) - 0.1

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    x = theirs = noise()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        v = velocity(theirs, sigma.expand(len(theirs)))
        theirs = scheduler.step(v, t, theirs, return_dict=False)[0]
    assert torch.equal(scheduler.sigmas, sampler.times(steps, shift=shift))
    assert torch.equal(sampler.euler(velocity, x, sampler.times(steps, shift=shift)), theirs)


def test_guidance_is_linear_through_null_at_0_and_conditional_at_1() -> None:
    conditional, null = noise(), noise().flip(0)
    assert torch.equal(sampler.guide(conditional, null, 0.0), null)
    torch.testing.assert_close(sampler.guide(conditional, null, 1.0), conditional)
    torch.testing.assert_close(sampler.guide(conditional, null, 3.0), 3 * conditional - 2 * null)
    assert torch.equal(sampler.guide(null, null, 7.5), null)


def test_watch_sees_every_step_before_it_is_taken() -> None:
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    x, grid = noise(), sampler.times(3)
    end = sampler.euler(
        lambda x_t, _t: x_t,
        x,
        grid,
        watch=lambda step, t, x_t, v: seen.append((step, float(t[0]), x_t, v)),
    )
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert [t for _, t, *_ in seen] == grid[:-1].tolist()
    assert torch.equal(seen[0][2], x)
    assert torch.equal(seen[1][2], x + (grid[1] - grid[0]) * x)
    assert torch.equal(end, seen[2][2] + (grid[3] - grid[2]) * seen[2][3])


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    x, grid = noise(), sampler.times(5)
    together = sampler.euler(lambda x_t, t: x_t * flow.expand(t, x_t), x, grid)
    for row in range(len(x)):
        alone = sampler.euler(lambda x_t, t: x_t * flow.expand(t, x_t), x[row : row + 1], grid)
        assert torch.equal(alone[0], together[row])
