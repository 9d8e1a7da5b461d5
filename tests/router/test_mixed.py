"""Mixed experts: every prediction, on our path and two noise schedules, in one exact ensemble."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core import flow, sampler, seeds
from atoll.core.denoiser import Card, Denoiser
from atoll.core.flow import Prediction
from atoll.core.schedule import NoiseSchedule
from atoll.router.chooser import sample_settings
from atoll.router.ensemble import Trajectory

World = Any  # what `make_world` makes; see conftest.py
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
# What the expert of each shard predicts, and on which schedule.
KINDS: list[tuple[Prediction, dict[str, Any] | None]] = [
    (Prediction.VELOCITY, None),
    (Prediction.EPSILON, STABLE_DIFFUSION),
    (Prediction.X_DATA, COSINE),
    (Prediction.V_PREDICTION, STABLE_DIFFUSION),
    (Prediction.EPSILON, None),
    (Prediction.V_PREDICTION, COSINE),
    (Prediction.X_DATA, None),
    (Prediction.VELOCITY, COSINE),
]
# Where all of them are exact: the span of Stable Diffusion's schedule.
LOW, HIGH = 0.02835, 0.93595


class Best(nn.Module):
    """The best network for some points of a world, called as a DiT is."""

    def __init__(
        self, world: World, shard: int, prompt: Any, prediction: Prediction, keys: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.world, self.chosen, self.prompt = world, world.shard == shard, prompt
        self.prediction = prediction
        self.share = None if keys is None else DDIMScheduler(**keys).alphas_cumprod.double()

    def forward(
        self, z: Tensor, timestep: Tensor, *, pooled_projections: Tensor, **_: Any
    ) -> tuple[Tensor]:
        if self.share is None:
            t, x_t = timestep / 1000, z
        else:
            ratios = (1 - self.share).sqrt() / (self.share.sqrt() + (1 - self.share).sqrt())
            below = timestep.floor().long().clamp(max=998)
            t = torch.lerp(ratios[below], ratios[below + 1], timestep - below)
            x_t = z * torch.hypot(1 - t, t)[:, None]
        captions = pooled_projections[:, 0].long().tolist()
        velocity = self.world.velocity_over(self.chosen, x_t, t, self.prompt(captions))
        x_data, x_noise = x_t - t[:, None] * velocity, x_t + (1 - t[:, None]) * velocity
        v = ((1 - t[:, None]) * x_noise - t[:, None] * x_data) / torch.hypot(1 - t, t)[:, None]
        outputs = {
            Prediction.VELOCITY: velocity,
            Prediction.EPSILON: x_noise,
            Prediction.X_DATA: x_data,
            Prediction.V_PREDICTION: v,
        }
        return (outputs[self.prediction],)


def experts(world: World, prompt: Any) -> list[Callable[..., Tensor]]:
    made = []
    for shard, (prediction, keys) in enumerate(KINDS):
        card = Card(
            name=world.names[shard], kind="expert", shard=world.names[shard], base_sha256=None,
            family="dit", prediction=prediction, latent_space="pixels", images_seen=0,
            schedule=None if keys is None else NoiseSchedule(**keys),
        )  # fmt: skip
        made.append(Denoiser(Best(world, shard, prompt, prediction, keys), card).velocity)
    return made


def trajectory(
    world: World, prompt: Any, captions: list[int], *, guidance: float = 1.0
) -> Trajectory:
    return Trajectory(
        experts(world, prompt),
        world.gate,
        shards=world.names,
        settings=sample_settings(len(captions), world.names, routing="full", guidance=guidance),
        cond=prompt(captions),
        null=prompt([0]),
    )


@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 5), min_size=len(KINDS), max_size=len(KINDS)),
    t=st.floats(LOW, HIGH),
    guidance=st.sampled_from([1.0, 3.0]),
)
@settings(max_examples=30)
@torch.no_grad()
def test_full_is_the_global_velocity(
    make_world: Callable[..., World],
    prompt: Any,
    seed: int,
    sizes: list[int],
    t: float,
    guidance: float,
) -> None:
    world, captions = make_world(seed, sizes=sizes), [0, 1, 2]
    x_data = world.points[torch.arange(3) % len(world.points)]
    x_noise = seeds.normal(seed, "x_noise", first=0, count=3, shape=(2,)).double()
    times = torch.full((3,), t, dtype=torch.float64)
    x_t = flow.interpolate(x_data, x_noise, times)
    wanted = world.velocity(x_t, times, prompt(captions))
    if guidance != 1:
        null = world.velocity(x_t, times, prompt([0] * 3))
        wanted = sampler.guide(wanted, null, guidance)
    found = trajectory(world, prompt, captions, guidance=guidance)(x_t, times)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_samples_from_pure_noise_are_nearly_those_of_exact_experts(
    make_world: Callable[..., World], prompt: Any
) -> None:
    """Beyond the spans, too, where an expert's x_data is that of its end point."""
    count = 400
    world = make_world(5, sizes=[4, 3, 2, 2, 1, 3, 2, 1])
    x_noise = seeds.normal(6, "x_noise", first=0, count=count, shape=(2,)).double()
    grid = sampler.times(50)
    found = sampler.euler(trajectory(world, prompt, [0] * count), x_noise, grid)
    exact = sampler.euler(lambda x_t, t: world.velocity(x_t, t, prompt([0] * count)), x_noise, grid)
    assert float((found - exact).norm(dim=1).max()) < 0.02
