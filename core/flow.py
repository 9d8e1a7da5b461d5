"""The one convention: the linear path, its velocity, and conversions of predictions and paths.

t = 0 is data and t = 1 is noise; x_t = (1 - t) x_data + t x_noise and
velocity = dx_t/dt = x_noise - x_data (rectified flow, Liu et al. 2022, arXiv 2209.03003, eq. 1;
flow matching, Lipman et al. 2022, arXiv 2210.02747). Only this file interpolates, forms targets or
converts predictions. Times are `(batch,)` and broadcast over the trailing dimensions of x.

A network of a noise schedule has learnt alpha_s x_data + sigma_s x_noise with alpha_s^2 + sigma_s^2
= 1. That is the point of our path with the same ratio of noise to data, sigma_s / alpha_s =
t / (1 - t), rescaled: x_t / norm(t). So x_data, x_noise and all that networks predict of them are
functions of (x_t, t) on every path, and a schedule decides three things alone: by what x_t is
divided, which timestep the network is told, and between which times it knows anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch
from torch import Tensor

from atoll.core.schedule import NoiseSchedule, alphas_cumprod

# diffusers embeds timesteps with frequencies made for 0 to 1000.
_TIMESTEPS = 1000.0


class Prediction(StrEnum):
    """What a denoiser's network puts out."""

    VELOCITY = "velocity"
    EPSILON = "epsilon"
    X_DATA = "x_data"
    V_PREDICTION = "v_prediction"


def expand(t: Tensor, like: Tensor) -> Tensor:
    """View times `(batch,)` so that they broadcast over `like` `(batch, ...)`."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def interpolate(x_data: Tensor, x_noise: Tensor, t: Tensor) -> Tensor:
    """The point x_t on the straight path from data to noise."""
    t = expand(t, x_data)
    return (1 - t) * x_data + t * x_noise


def norm(t: Tensor) -> Tensor:
    """Length of (1 - t, t): x_t / norm(t) is the point of the variance-preserving path."""
    return ((1 - t).square() + t.square()).sqrt()


def target(x_data: Tensor, x_noise: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """What a network of this kind should have put out at time `t` of our path."""
    match prediction:
        case Prediction.VELOCITY:
            return x_noise - x_data
        case Prediction.EPSILON:
            return x_noise
        case Prediction.X_DATA:
            return x_data
        case Prediction.V_PREDICTION:
            # alpha epsilon - sigma x (Salimans & Ho 2022, arXiv 2202.00512, section 4), with
            # alpha = (1 - t) / norm and sigma = t / norm.
            return interpolate(x_noise, -x_data, t) / expand(norm(t), x_data)


def velocity_to_x_data(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """x_data = x_t - t velocity; exact for every t."""
    return x_t - expand(t, x_t) * velocity


def velocity_to_epsilon(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """epsilon = x_t + (1 - t) velocity; exact for every t."""
    return x_t + (1 - expand(t, x_t)) * velocity


def velocity_to_v_prediction(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = norm velocity + (1 - 2 t) x_t / norm; exact for every t."""
    length = expand(norm(t), x_t)
    return length * velocity + (1 - 2 * expand(t, x_t)) * x_t / length


def epsilon_to_velocity(epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """velocity = (epsilon - x_t) / (1 - t); undefined at t = 1, where x_t is the noise itself."""
    return (epsilon - x_t) / (1 - expand(t, x_t))


def x_data_to_velocity(x_data: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """velocity = (x_t - x_data) / t; undefined at t = 0, where x_t is the data itself."""
    return (x_t - x_data) / expand(t, x_t)


def v_prediction_to_velocity(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """velocity = (v - (1 - 2 t) x_t / norm) / norm; exact for every t."""
    length = expand(norm(t), x_t)
    return (v - (1 - 2 * expand(t, x_t)) * x_t / length) / length


_TO_VELOCITY: dict[Prediction, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    Prediction.VELOCITY: lambda output, _x_t, _t: output,
    Prediction.EPSILON: epsilon_to_velocity,
    Prediction.X_DATA: x_data_to_velocity,
    Prediction.V_PREDICTION: v_prediction_to_velocity,
}

# Where each kind of prediction says enough about the velocity. Epsilon is asked for at t = 1 by
# every trajectory: an error of it is divided by 1 - t and taken over a whole solver step, so t is
# held a step of 50 away. Nobody asks for a velocity at t = 0.
_SPAN: dict[Prediction, tuple[float, float]] = {
    Prediction.VELOCITY: (0.0, 1.0),
    Prediction.EPSILON: (0.0, 0.98),
    Prediction.X_DATA: (5e-4, 1.0),
    Prediction.V_PREDICTION: (0.0, 1.0),
}


def to_velocity(output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """A network's output at (x_t, t) as velocity, for times at which its kind has one."""
    return _TO_VELOCITY[prediction](output, x_t, t)


@lru_cache(maxsize=64)
def _times_of(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    """The time of our path at each timestep, `(num_train_timesteps,)` float64, rising."""
    alphas = alphas_cumprod(schedule).double()
    data, noise = alphas.sqrt(), (1 - alphas).sqrt()
    return (noise / (data + noise)).to(device)


@lru_cache(maxsize=64)
def span(schedule: NoiseSchedule | None) -> tuple[float, float]:
    """The first and the last time of our path that a schedule has; None is our path, [0, 1]."""
    if schedule is None:
        return 0.0, 1.0
    times = _times_of(schedule, torch.device("cpu"))
    return float(times[0]), float(times[-1])


def timestep(t: Tensor, schedule: NoiseSchedule | None) -> Tensor:
    """What a network is told for `t`, `(batch,)`.

    A schedule's timestep s has sigma_s / alpha_s = t / (1 - t); between the discrete ones it is
    interpolated linearly in t, and beyond them it is the nearest.
    """
    if schedule is None:
        return t * _TIMESTEPS
    times = _times_of(schedule, t.device)
    held = t.double().clamp(times[0], times[-1])
    above = torch.searchsorted(times, held).clamp(min=1)
    below = times[above - 1]
    return (above - 1 + (held - below) / (times[above] - below)).to(t)


def rescale(x_t: Tensor, t: Tensor, schedule: NoiseSchedule | None) -> Tensor:
    """A point of our path as a network of this schedule takes it: (alpha_s + sigma_s) x_t."""
    return x_t if schedule is None else x_t / expand(norm(t), x_t)


@dataclass(frozen=True)
class Asked:
    """The point of our path, `x_t` `(batch, ...)` at `t` `(batch,)`, that a network is asked at."""

    x_t: Tensor
    t: Tensor


def ask(
    x_t: Tensor, t: Tensor, prediction: Prediction, schedule: NoiseSchedule | None = None
) -> Asked:
    """Where to ask a network about (x_t, t): there, or as near as it says enough.

    Beyond its span it is asked at the end point. What it then takes is x_t / norm(t) as elsewhere,
    which has the variance that it knows, exactly so for data of variance 1: a schedule that ends
    before t = 1 is given pure noise of variance 1 at its last timestep, as diffusers' pipelines
    start. Its mean is (1 - t) / norm(t) of the data's, where the network knows alpha at the end.
    """
    (low, high), (first, last) = span(schedule), _SPAN[prediction]
    low, high = max(low, first), min(high, last)
    if (low, high) == (0.0, 1.0):  # there is no beyond
        return Asked(x_t, t)
    held = t.clamp(low, high)
    return Asked(x_t * expand(norm(held) / norm(t), x_t), held)


def answer(output: Tensor, asked: Asked, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """The velocity at (x_t, t) from what a network put out where it was asked.

    Exact inside its span. Beyond, its x_data at the end point stands for that at t, and the
    velocity is the straight line there, whose end at t = 0 is that x_data. It is a mean of the data
    whatever the network is asked, so its error is at most the data's diameter D; more closely:

    - towards noise, D tanh(d / 4), where d = D |p| |u' c - u| + R^2 |u'^2 - u^2| / 2 bounds how far
      the odds of two records are moved: u = (1 - t) / t, p = x_t / t, u' that of the end point,
      c = sqrt((1 + u'^2) / (1 + u^2)) and R the largest norm of a record;
    - towards data, w (|y - m| / s^2 + |y| / 2) for Gaussian data of mean m and variance s^2, where
      y = x_t / (1 - t) and w = (sigma / alpha)^2 at the end point: 0.00085 of Stable Diffusion.

    An error of x_data is one of the velocity divided by t, and a solver that takes its last step
    from t moves by t times that. Nobody asks for a velocity at t = 0; t is held at 5e-4.
    """
    velocity = to_velocity(output, asked.x_t, asked.t, prediction)
    if asked.t is t:
        return velocity
    x_data = velocity_to_x_data(velocity, asked.x_t, asked.t)
    beyond = x_data_to_velocity(x_data, x_t, t.clamp(min=_SPAN[Prediction.X_DATA][0]))
    return torch.where(expand(asked.t == t, x_t), velocity, beyond)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Move times towards noise by t' = s t / (1 + (s - 1) t) (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(normal: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times from standard normals: t = sigmoid(mean + std z) (SD3, eq. 19)."""
    return torch.sigmoid(mean + std * normal)


def mode(uniform: Tensor, *, scale: float) -> Tensor:
    """Training times from uniforms in (0, 1), with heavy tails where `scale` is above 0.

    t = 1 - u - s (cos^2(pi u / 2) - 1 + u) (SD3, eq. 20); monotone for s in [-1, 2 / (pi - 2)].
    """
    bend = torch.cos(torch.pi / 2 * uniform).square() - 1 + uniform
    return 1 - uniform - scale * bend


def snr(t: Tensor) -> Tensor:
    """Signal-to-noise ratio ((1 - t) / t)^2 at `t`, alpha_s^2 / sigma_s^2 of a schedule."""
    return ((1 - t) / t).square()


def error_scale(t: Tensor, prediction: Prediction) -> Tensor:
    """How large an error of the velocity is in a prediction's own units, on every path.

    From x_data = x_t - t velocity, epsilon = x_t + (1 - t) velocity and v = norm velocity + ...
    """
    match prediction:
        case Prediction.VELOCITY:
            return torch.ones_like(t)
        case Prediction.EPSILON:
            return 1 - t
        case Prediction.X_DATA:
            return t
        case Prediction.V_PREDICTION:
            return norm(t)
