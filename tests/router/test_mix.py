"""`mix`: a sole expert's output is handed on untouched, and 16-bit experts keep float32 odds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atoll.core import sampler, seeds
from atoll.core.conditioning import concatenate
from atoll.router.chooser import sample_settings
from atoll.router.ensemble import Trajectory, mix

World = Any  # what `make_world` makes; see conftest.py
ROUTINGS = ("full", "top-k:2", "mass:0.5", "threshold:0.3", "sample:3", "once", "oracle:only")


def bits(x: Tensor) -> Tensor:
    """Bit patterns: unlike equality, they tell -0.0 from 0.0 and know NaN from NaN."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def constant(value: Tensor) -> Callable[..., Tensor]:
    return lambda x_t, _t, _cond: value.expand(len(x_t), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sole_expert_is_untouched(prompt: Any, dtype: torch.dtype) -> None:
    odd = torch.tensor([-0.0, 0.0, float("inf"), float("nan"), 1e-45, 1 / 3, -1e38], dtype=dtype)
    others = torch.full_like(odd, 5.0)
    weights = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [0.5, 0.5, 0]], dtype=dtype)
    experts = [constant(others), constant(odd), constant(-others)]
    v = mix(experts, weights, torch.zeros(4, 7, dtype=dtype), torch.ones(4), prompt([0] * 4))
    assert torch.equal(bits(v[0]), bits(odd))
    assert torch.equal(v[1:3], torch.stack([others, -others]))


@given(row=st.permutations([0.0, 0.25, 0.75]) | st.permutations([0.0, 0.0, 1.0]))
def test_a_weight_of_zero_is_never_multiplied(prompt: Any, row: list[float]) -> None:
    nan = torch.tensor([float("nan")])
    experts = [constant(nan if w == 0 else torch.tensor([2.0])) for w in row]
    v = mix(experts, torch.tensor([row]), torch.zeros(1, 1), torch.ones(1), prompt([0]))
    assert float(v) == 2.0


def test_the_sum_of_16_bit_experts_is_not_taken_in_16_bits(prompt: Any) -> None:
    """.999 rounds to 1 in bfloat16, and the second expert would be all there is."""
    experts = [constant(torch.tensor([v], dtype=torch.bfloat16)) for v in (1000.0, 1.0)]
    weights = torch.tensor([[0.001, 0.999]])
    v = mix(experts, weights, torch.zeros(1, 1), torch.ones(1), prompt([0]))
    assert v.dtype == torch.float32
    assert float(v) == pytest.approx(1.999)
    # Nor where the pictures are in 16 bits, which the sum is rounded to once.
    small = mix(experts, weights, torch.zeros(1, 1).bfloat16(), torch.ones(1), prompt([0]))
    assert torch.equal(small, torch.tensor([[1.999]]).bfloat16())


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.0])
def test_a_one_shard_ensemble_is_its_expert(
    make_world: Callable[..., World], prompt: Any, routing: str, guidance: float
) -> None:
    """Bitwise, and without asking the gate."""
    world = make_world(3, sizes=(9,), dtype=torch.float32)
    cond, null = prompt([1, 2] * 3, torch.float32), prompt([0] * 6, torch.float32)

    def gate(*_: Any) -> Tensor:
        raise AssertionError("nothing to decide")

    def expert(x_t: Tensor, t: Tensor, c: Any) -> Tensor:
        return world.velocity(x_t, t, c)

    def alone(x_t: Tensor, t: Tensor) -> Tensor:
        if guidance == 1:
            return expert(x_t, t, cond)
        # Both branches in one batch: bits are promised at the same batch shape.
        v = expert(torch.cat([x_t, x_t]), torch.cat([t, t]), concatenate([cond, null]))
        return sampler.guide(*v.chunk(2), guidance)

    trajectory = Trajectory(
        [expert],
        gate,
        shards=["only"],
        settings=sample_settings(len(cond), ["only"], routing=routing, guidance=guidance),
        cond=cond,
        null=prompt([0], torch.float32),
    )
    noise = seeds.normal(1, "x_noise", first=0, count=6, shape=(2,))
    grid = sampler.times(8)
    got = sampler.euler(trajectory, noise, grid)
    assert torch.equal(bits(got), bits(sampler.euler(alone, noise, grid)))
