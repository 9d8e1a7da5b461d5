"""Networks of every prediction on every path, behind a denoiser, against closed forms on ours.

The networks are closed forms too: they know their schedule from diffusers' `DDIMScheduler` alone,
and data in float64 by its mean and variance, or point by point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core import flow, seeds
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Card, Denoiser
from atoll.core.flow import Prediction
from atoll.core.schedule import NoiseSchedule

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES: dict[str, dict[str, Any] | None] = {
    "our path": None,
    "scaled linear": STABLE_DIFFUSION,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero snr": {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True},
}
MEAN, STD = 0.4, 0.3
POINTS = seeds.normal(0, "points", first=0, count=6, shape=(2,)).double()

BestXData = Callable[[Tensor, Tensor, Tensor], Tensor]
"""E[x_data | z] where z = alpha x_data + sigma x_noise, by (z, alpha, sigma)."""


def gaussian(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return MEAN + alpha * STD**2 * (z - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def finite(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    gap = z[:, None] - alpha[:, None] * POINTS
    return (-gap.square().sum(2) / (2 * sigma**2)).softmax(1) @ POINTS


class Best(nn.Module):
    """The network that makes no error, called as a DiT is; it keeps what it was given."""

    def __init__(self, data: BestXData, prediction: Prediction, keys: dict[str, Any] | None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.data, self.prediction = data, prediction
        self.times = None
        if keys is not None:
            data_share = DDIMScheduler(**keys).alphas_cumprod.double()
            ratio = (1 - data_share).sqrt() / (data_share.sqrt() + (1 - data_share).sqrt())
            self.times = ratio
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        self.given.append((z, timestep))
        if self.times is None:
            t = timestep[:, None] / 1000
            alpha, sigma = 1 - t, t
        else:
            below = timestep.floor().long().clamp(max=len(self.times) - 2)
            share = timestep - below
            t = (self.times[below] * (1 - share) + self.times[below + 1] * share)[:, None]
            alpha, sigma = (1 - t) / torch.hypot(1 - t, t), t / torch.hypot(1 - t, t)
        x_data = self.data(z, alpha, sigma)
        x_noise = (z - alpha * x_data) / sigma
        length = torch.hypot(alpha, sigma)  # 1, but on our path
        return (
            {
                Prediction.VELOCITY: x_noise - x_data,
                Prediction.EPSILON: x_noise,
                Prediction.X_DATA: x_data,
                Prediction.V_PREDICTION: (alpha * x_noise - sigma * x_data) / length,
            }[self.prediction],
        )


def denoiser(name: str, prediction: Prediction, data: BestXData) -> tuple[Denoiser, Best]:
    keys = SCHEDULES[name]
    network = Best(data, prediction, keys)
    card = Card(
        name="best", kind="base", shard=None, base_sha256=None, family="dit",
        prediction=prediction, schedule=None if keys is None else NoiseSchedule(**keys),
        latent_space="pixels", images_seen=0,
    )  # fmt: skip
    return Denoiser(network, card), network


def spanned(name: str, prediction: Prediction) -> tuple[float, float]:
    """Where such a network says enough about the velocity: see `flow.ask`."""
    keys = SCHEDULES[name]
    low, high = flow.span(None if keys is None else NoiseSchedule(**keys))
    low = max(low, 5e-4) if prediction is Prediction.X_DATA else low
    return low, min(high, 0.98) if prediction is Prediction.EPSILON else high


def asked(made: Denoiser, x_t: Tensor, t: Tensor) -> Tensor:
    none = torch.zeros(len(x_t), 1, dtype=torch.float64)
    cond = Conditioning(none[..., None], none > 0, none, none[:, 0] == 0)
    with torch.no_grad():
        return made.velocity(x_t, t, cond)


def truth(data: BestXData, x_t: Tensor, t: Tensor) -> Tensor:
    return (x_t - data(x_t, 1 - t[:, None], t[:, None])) / t[:, None]


everywhere = pytest.mark.parametrize("name", SCHEDULES)
every_kind = pytest.mark.parametrize("prediction", list(Prediction))
scheduled = pytest.mark.parametrize("name", [name for name, keys in SCHEDULES.items() if keys])


@everywhere
@every_kind
@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_velocity_is_the_closed_form_at_every_time_of_the_span(
    name: str, prediction: Prediction, share: float, seed: int
) -> None:
    low, high = spanned(name, prediction)
    t = torch.tensor([low + share * (high - low)] * 4, dtype=torch.float64).clamp(1e-3, high)
    x_t = seeds.normal(seed, "x", first=0, count=4, shape=(2,)).double()
    for data in (gaussian, finite):
        made, _ = denoiser(name, prediction, data)
        torch.testing.assert_close(asked(made, x_t, t), truth(data, x_t, t), rtol=1e-6, atol=1e-6)


@scheduled
def test_network_is_told_its_timestep_and_given_its_point_of_the_path(name: str) -> None:
    """At every discrete timestep, and between two of them in their order."""
    made, network = denoiser(name, Prediction.V_PREDICTION, gaussian)
    share = DDIMScheduler(**SCHEDULES[name] or {}).alphas_cumprod.double()
    alpha, sigma = share.sqrt(), (1 - share).sqrt()
    t = sigma / (alpha + sigma)
    x_data, x_noise = seeds.normal(1, "x", first=0, count=2, shape=(len(t), 2)).double()
    asked(made, flow.interpolate(x_data, x_noise, t), t)
    point, told = network.given[-1]
    assert told.tolist() == list(range(len(t)))
    torch.testing.assert_close(point, alpha[:, None] * x_data + sigma[:, None] * x_noise)
    # In the single precision of pictures a time is that of its timestep to a ten-thousandth.
    assert flow.timestep(t.float(), made.card.schedule) == pytest.approx(told, abs=1e-3)

    between = torch.stack([t[:-1], (t[:-1] + t[1:]) / 2, t[1:]], 1)
    told = flow.timestep(between.flatten(), made.card.schedule).reshape(-1, 3)
    torch.testing.assert_close(
        told - told[:, :1], torch.tensor([0, 0.5, 1]).double().expand_as(told)
    )


@scheduled
def test_beyond_the_span_a_network_takes_what_it_knows(name: str) -> None:
    """A point of the variance that its schedule gives data of variance 1, whatever t is."""
    made, network = denoiser(name, Prediction.V_PREDICTION, gaussian)
    x_data, x_noise = seeds.normal(2, "x", first=0, count=2, shape=(40_000, 2)).double()
    for t in (0.0, 0.01, 0.95, 1.0):
        times = torch.full((len(x_data),), t, dtype=torch.float64)
        asked(made, flow.interpolate(x_data, x_noise, times), times)
        point, told = network.given[-1]
        assert float(point.square().mean()) == pytest.approx(1, abs=0.02)
        assert 0 <= float(told.min()) == float(told.max()) <= 999
    # Pure noise is given as it is, at the last timestep: as diffusers' pipelines start.
    torch.testing.assert_close(point, x_noise, rtol=1e-15, atol=0)
    assert float(told[0]) == 999


@scheduled
@every_kind
def test_beyond_the_span_towards_noise_the_error_is_bounded(
    name: str, prediction: Prediction
) -> None:
    """By the bound of `flow.answer`, for points of the plane and what noise makes of them."""
    made, _ = denoiser(name, prediction, finite)
    _, high = spanned(name, prediction)
    t = torch.linspace(high, 1, 400, dtype=torch.float64)
    rows = torch.arange(400) % len(POINTS)
    x_noise = seeds.normal(3, "x", first=0, count=400, shape=(2,)).double()
    x_t = flow.interpolate(POINTS[rows], x_noise, t)
    off = (t[:, None] * (asked(made, x_t, t) - truth(finite, x_t, t))).norm(dim=1)
    diameter, radius = torch.pdist(POINTS).max(), POINTS.norm(dim=1).max()
    u, end = (1 - t) / t, (1 - high) / high
    c = ((1 + end**2) / (1 + u**2)).sqrt()
    moved = diameter * (x_t / t[:, None]).norm(dim=1) * (end * c - u).abs()
    moved += radius**2 * (u**2 - end**2).abs() / 2
    assert bool((off <= diameter * torch.tanh(moved / 4) + 1e-9).all())
    # Which says something: a schedule that reaches t = 1 makes no error, and others a small one.
    worst = float(off.max() / diameter)
    assert worst < (1e-6 if high == 1 else 0.1)


@scheduled
@every_kind
def test_beyond_the_span_towards_data_the_error_is_bounded(
    name: str, prediction: Prediction
) -> None:
    made, _ = denoiser(name, prediction, gaussian)
    low, _ = spanned(name, prediction)
    t = torch.linspace(1e-3, low, 400, dtype=torch.float64)
    x = seeds.normal(4, "x", first=0, count=800).double().reshape(2, 400, 1)
    x_t = flow.interpolate(MEAN + STD * x[0], x[1], t)
    off = (t[:, None] * (asked(made, x_t, t) - truth(gaussian, x_t, t))).abs()
    y, w = x_t / (1 - t[:, None]), (low / (1 - low)) ** 2
    assert bool((off <= w * ((y - MEAN).abs() / STD**2 + y.abs() / 2) + 1e-9).all())
    assert float(off.max()) < 0.05 * STD


def test_epsilon_of_our_path_is_asked_at_a_step_before_pure_noise() -> None:
    """Where it still says something; its x_data there is what pure noise moves towards."""
    made, network = denoiser("our path", Prediction.EPSILON, gaussian)
    x_noise = seeds.normal(5, "x", first=0, count=100, shape=(2,)).double()
    velocity = asked(made, x_noise, torch.ones(100, dtype=torch.float64))
    assert network.given[-1][1].tolist() == [980.0] * 100
    # Exact is x_noise - MEAN. The odds of a Gaussian's x_data move by u = .02 of its variance.
    assert float((velocity - (x_noise - MEAN)).abs().max()) < 0.02 * STD**2 * 5


@scheduled
def test_velocity_is_finite_in_single_precision_everywhere(name: str) -> None:
    for prediction in Prediction:
        made, network = denoiser(name, prediction, gaussian)
        network.float()
        t = torch.cat([torch.linspace(0, 1, 101), torch.tensor(spanned(name, prediction))])
        assert bool(asked(made, torch.ones(len(t), 2), t).isfinite().all())
